//! Request bodies: read within limits, or discarded.
//!
//! If a server answers early and closes the connection while its client is still sending, the client's system
//! discards the answer: bytes that arrive for a closed socket cause a reset, and a reset drops what hasn't been read
//! yet. So what remains of a body is received and dropped.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::StatusCode;
use hyper::body::{Body as _, Incoming};
use hyper::header::EXPECT;
use hyper::http::request::Parts;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// After which silence a client that was answered early is taken to have stopped sending. How long it may go on
/// altogether is the header timeout: the rest counts as the beginning of another request.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Why a body couldn't be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the request's body is larger than {limit} bytes")]
    TooLarge { limit: usize },
    #[error("the request's body didn't arrive within {after:?}")]
    TooSlow { after: Duration },
    /// The connection ended, or the framing is wrong.
    #[error("the request's body ended early or is malformed")]
    Broken,
}

impl BodyError {
    pub fn status(self) -> StatusCode {
        match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Broken => StatusCode::BAD_REQUEST,
        }
    }
}

/// A request's body, or what is left of it.
#[derive(Debug)]
pub(super) struct RequestBody {
    /// `None` once it has been read to its end, or broke off.
    incoming: Option<Incoming>,
    /// Whether the client sends nothing before it gets a `100 Continue`, which reading sends.
    awaits_continue: bool,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming, parts: &Parts) -> Self {
        Self { incoming: Some(incoming), awaits_continue: parts.headers.contains_key(EXPECT) }
    }

    /// Reads the whole body. A second call returns nothing more.
    pub(super) async fn read(&mut self, limit: usize, after: Duration) -> Result<Bytes, BodyError> {
        let Some(incoming) = &mut self.incoming else { return Ok(Bytes::new()) };
        // A body that is announced as too large is refused before the client sends it.
        if incoming.size_hint().lower() > limit as u64 {
            return Err(BodyError::TooLarge { limit });
        }
        self.awaits_continue = false;
        let read = match timeout(after, Limited::new(incoming, limit).collect()).await {
            // A body of one frame, the usual case, isn't copied.
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(BodyError::TooLarge { limit }),
            Ok(Err(error)) => {
                tracing::debug!(error, "request body broke off");
                Err(BodyError::Broken)
            }
            Err(_) => Err(BodyError::TooSlow { after }),
        };
        if matches!(read, Ok(_) | Err(BodyError::Broken)) {
            self.incoming = None;
        }
        read
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        // A client that awaits `100 Continue` learns from the answer that it needn't send anything.
        let rest = self.incoming.take().filter(|rest| !rest.is_end_stream() && !self.awaits_continue);
        // Without a runtime there is no connection either.
        if let (Some(rest), Ok(runtime)) = (rest, Handle::try_current()) {
            runtime.spawn(discard(rest));
        }
    }
}

/// Receives what still comes, and drops it. When the connection ends, so does the body.
async fn discard(mut rest: Incoming) {
    while let Ok(Some(Ok(_))) = timeout(SILENCE_MAX, rest.frame()).await {}
}
