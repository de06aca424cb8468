//! What a request carries: read within limits, or discarded.
//!
//! A server that answers early and closes the connection while its client is still sending makes the client's
//! system throw the answer away: bytes that arrive for a closed socket are answered with a reset, and a reset
//! discards what hasn't been read yet. So whatever of a body nobody reads is still taken in, and dropped.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use hyper::body::{Body as _, Incoming};
use hyper::header::EXPECT;
use hyper::http::request::Parts;
use tokio::runtime::Handle;

/// How long a client that was answered early may pause before it is taken to have stopped sending. How long it
/// may go on altogether is the header timeout: it is as good as the beginning of another request.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Why a body couldn't be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BodyError {
    /// It is, or says it will be, larger than allowed.
    #[error("the request's body is larger than {limit} bytes")]
    TooLarge {
        /// Largest body, in bytes.
        limit: usize,
    },
    /// It didn't arrive in time.
    #[error("the request's body didn't arrive within {after:?}")]
    TooSlow {
        /// How long the server waited.
        after: Duration,
    },
    /// The connection ended or its framing is wrong.
    #[error("the request's body ended early or is malformed")]
    Broken,
}

impl BodyError {
    /// The status that tells the client.
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
pub(super) struct Body {
    /// `None` once it has been read to its end, or broke off.
    incoming: Option<Incoming>,
    /// The client sends nothing before it is told to.
    waits_to_be_told: bool,
}

impl Body {
    pub(super) fn new(incoming: Incoming, parts: &Parts) -> Self {
        Self { incoming: Some(incoming), waits_to_be_told: parts.headers.contains_key(EXPECT) }
    }

    /// All of it. A second call returns nothing more.
    pub(super) async fn read(&mut self, limit: usize, after: Duration) -> Result<Bytes, BodyError> {
        let Some(incoming) = &mut self.incoming else { return Ok(Bytes::new()) };
        // Refuse what announces itself as too large before asking the client to send it.
        if incoming.size_hint().lower() > limit as u64 {
            return Err(BodyError::TooLarge { limit });
        }
        self.waits_to_be_told = false;
        let read = tokio::time::timeout(after, collect(incoming, limit)).await;
        let read = read.unwrap_or(Err(BodyError::TooSlow { after }));
        if matches!(read, Ok(_) | Err(BodyError::Broken)) {
            self.incoming = None;
        }
        read
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        // Who waits to be told learns from the answer that it needn't send anything.
        let rest = self.incoming.take().filter(|rest| !rest.is_end_stream() && !self.waits_to_be_told);
        // Outside of a runtime there is no connection either.
        if let (Some(rest), Ok(runtime)) = (rest, Handle::try_current()) {
            runtime.spawn(discard(rest));
        }
    }
}

/// Collects a body of at most `limit` bytes. A body of one frame, the usual case, isn't copied.
async fn collect(body: &mut Incoming, limit: usize) -> Result<Bytes, BodyError> {
    let mut first = Bytes::new();
    let mut joined = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            tracing::debug!(%error, "a request's body broke off");
            BodyError::Broken
        })?;
        let Ok(data) = frame.into_data() else { continue }; // trailers
        if first.len() + joined.len() + data.len() > limit {
            return Err(BodyError::TooLarge { limit });
        }
        if first.is_empty() && joined.is_empty() {
            first = data;
        } else {
            joined.extend_from_slice(&std::mem::take(&mut first));
            joined.extend_from_slice(&data);
        }
    }
    Ok(if joined.is_empty() { first } else { joined.freeze() })
}

/// Takes in what still comes. When the connection ends, so does the body.
async fn discard(mut rest: Incoming) {
    while let Ok(Some(Ok(_))) = tokio::time::timeout(SILENCE_MAX, rest.frame()).await {}
}
