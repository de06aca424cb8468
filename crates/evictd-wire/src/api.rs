//! The HTTP API: JSON over POST, shaped like Unkey's v2 API, shared by publisher, agent and CLI.
//!
//! In reading order:
//!
//! * [`requests`]: request bodies, checked while they are parsed.
//! * [`responses`]: the data of successful answers.
//! * [`envelope`]: the frame around every answer.
//! * [`propagation`]: receipts. [`prefer`]: the header that requests one.
//! * [`error`]: every error, with its status, title and content type.
//! * [`root_key`]: whether a root key may act.
//! * [`verification`]: the answer to a verification. [`permission_query`]: the query in its request.
//! * [`openapi`]: the description of all this for programs.
//! * [`ids`]: new ids and keys, and the hash of a key.
//! * [`secret`]: text that no log may show.
//!
//! Status codes, error types and content types are those of Unkey's server and SDKs, also where its documentation
//! differs. Its SDKs therefore raise the same typed errors against evictd.

pub mod envelope;
pub mod error;
pub mod ids;
pub mod openapi;
pub mod permission_query;
pub mod prefer;
pub mod propagation;
pub mod requests;
pub mod responses;
pub mod root_key;
mod schema;
pub mod secret;
pub mod verification;
