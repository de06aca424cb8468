//! What the log says about answers: each failure of the server, and with `http.access_log` every answer.
//!
//! Neither holds a key, a hash or a secret, nor a path that a client made up.

use std::net::SocketAddr;
use std::time::Instant;

use evictd_wire::api::error::{ApiError, ErrorKind};
use hyper::StatusCode;

use crate::logging::LogLimit;

/// Failures of one kind and operation that are logged in a window. In an outage, every request fails.
const FAILURES_PER_WINDOW: u32 = 100;

#[derive(Debug)]
pub struct AnswerLog {
    access: bool,
    failures: LogLimit<(&'static str, ErrorKind)>,
}

/// An answer on its way to the client.
#[derive(Clone, Copy, Debug)]
pub struct LoggedAnswer<'a> {
    /// The operation's path, which is one of evictd's own.
    pub operation: &'static str,
    /// `None` if the request was answered before it was read.
    pub request_id: Option<&'a str>,
    pub remote: SocketAddr,
    /// The root key that was authenticated.
    pub root_key_id: Option<&'a str>,
    pub status: StatusCode,
}

impl AnswerLog {
    /// Logs every answer if `access` is set.
    pub fn new(access: bool) -> Self {
        Self { access, failures: LogLimit::new(FAILURES_PER_WINDOW) }
    }

    /// Logs an error that is the server's fault, with its cause.
    pub fn failed(&self, operation: &'static str, request_id: &str, error: &ApiError) {
        let status = error.status();
        if status < 500 {
            return;
        }
        if let Some(unlogged) = self.failures.admit((operation, error.kind)) {
            let (cause, unlogged) = (error.cause.as_deref().unwrap_or(&error.detail), unlogged.field());
            tracing::error!(request_id, operation, status, cause, unlogged, "request failed");
        }
    }

    /// Returns the time of a request's arrival, if its answer is to be logged.
    pub fn arrived(&self) -> Option<Instant> {
        self.access.then(Instant::now)
    }

    /// Logs an answer to a request that [`Self::arrived`] then.
    pub fn answered(&self, arrived: Option<Instant>, answer: LoggedAnswer<'_>) {
        let Some(arrived) = arrived else { return };
        let LoggedAnswer { operation, request_id, remote, root_key_id, status } = answer;
        let (status, took) = (status.as_u16(), arrived.elapsed());
        tracing::info!(
            target: "evictd::access",
            request_id, operation, status, root_key_id, %remote, ?took, "answered"
        );
    }
}
