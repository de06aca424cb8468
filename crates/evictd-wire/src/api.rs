//! The HTTP wire: JSON over POST, shaped like Unkey's v2 API, shared by publisher, agent and CLI.
//!
//! In reading order:
//!
//! * [`requests`]: what a caller may send, checked as it is read.
//! * [`responses`]: what a successful answer holds.
//! * [`envelope`]: the frame around every answer.
//! * [`propagation`]: how far a change has come, where the caller asked.
//! * [`prefer`]: how the caller asks for it.
//! * [`error`]: every way to fail, with its status, title and content type.
//! * [`root_key`]: whether a caller may act at all.
//! * [`verification`]: what a verification answers.
//! * [`permission_query`]: what a verification may ask a key to be allowed to do.
//! * [`ids`]: new ids and keys, and the hash under which a key is known.
//! * [`secret`]: text that no log may show.
//!
//! Status codes, error types and content types follow what Unkey's server and SDKs do, also where its
//! documentation says otherwise, so that its SDKs raise the same typed errors against evictd.

pub mod envelope;
pub mod error;
pub mod ids;
pub mod permission_query;
pub mod prefer;
pub mod propagation;
pub mod requests;
pub mod responses;
pub mod root_key;
mod schema;
pub mod secret;
pub mod verification;
