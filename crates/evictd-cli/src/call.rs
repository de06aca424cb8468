//! A request to a daemon's API, and when it is sent again.

use std::time::Duration;

use serde::Serialize;

/// How long a request is retried, counted from its first attempt. Unkey's SDKs take the same time.
pub(crate) const RETRY_LIMIT: Duration = Duration::from_secs(10);

/// The pause before the first retry; each further one is half as long again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The daemon that answers a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ApiServer {
    /// Serves the control API, and verifications too.
    Publisher,
    /// Serves the verify API.
    Agent,
}

impl ApiServer {
    /// Returns the command that starts it, and the environment variable with its URL.
    pub(crate) fn command_and_variable(self) -> (&'static str, &'static str) {
        match self {
            Self::Publisher => ("evictd publisher", "EVICTD_API_URL"),
            Self::Agent => ("evictd agent", "EVICTD_VERIFY_URL"),
        }
    }

    pub(crate) fn default_url(self) -> &'static str {
        match self {
            Self::Publisher => "http://127.0.0.1:7070",
            Self::Agent => "http://127.0.0.1:7080",
        }
    }
}

/// What happens when a request is sent again after it was carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Repeat {
    /// The answer is the same.
    Harmless,
    /// The answer is "not found": the object is already deleted.
    FindsNothing,
    /// A second object is created.
    Duplicates,
}

#[derive(Debug)]
pub(crate) struct ApiCall {
    pub(crate) path: &'static str,
    /// JSON.
    pub(crate) body: Vec<u8>,
    pub(crate) server: ApiServer,
    pub(crate) repeat: Repeat,
    /// How long the server may delay its answer until every region has confirmed. If set, even to zero, the
    /// answer contains the state of the receipt.
    pub(crate) prefer: Option<Duration>,
    /// Whether the exit code reports if the key is valid.
    pub(crate) exits_with_verdict: bool,
}

impl ApiCall {
    /// A call to the publisher.
    pub(crate) fn new(
        path: &'static str,
        request: &impl Serialize,
        repeat: Repeat,
    ) -> serde_json::Result<Self> {
        let body = serde_json::to_vec(request)?;
        let server = ApiServer::Publisher;
        Ok(Self { path, body, server, repeat, prefer: None, exits_with_verdict: false })
    }
}

/// An HTTP response of any status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ApiAnswer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    pub(crate) retry_after: Option<Duration>,
}

/// An attempt that got no response.
#[derive(Debug)]
pub(crate) struct NoAnswer {
    pub(crate) delivery: Delivery,
    pub(crate) cause: String,
}

/// How far a request without a response came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Delivery {
    /// The request could not be formed, because the URL or the root key is malformed. A retry is useless.
    Unsendable,
    /// The server did not receive it.
    NotSent,
    /// The server may have received it and carried it out.
    Unknown,
}

/// The result of [`send`].
#[derive(Debug)]
pub(crate) struct SentCall {
    /// The result of the last attempt.
    pub(crate) result: Result<ApiAnswer, NoAnswer>,
    /// Whether an earlier attempt may have been carried out.
    pub(crate) is_maybe_done: bool,
}

/// The network and the clock. Tests have their own.
pub(crate) trait Transport {
    /// Sends the request once.
    fn attempt(&mut self, call: &ApiCall) -> Result<ApiAnswer, NoAnswer>;
    /// Returns the time since a fixed moment before the first attempt.
    fn elapsed(&self) -> Duration;
    /// Waits before a retry. `cause` says what the server did, for a message to the user.
    fn pause(&mut self, pause: Duration, cause: &str);
    /// Waits. Returns false if the user cut the wait short.
    fn rest(&mut self, pause: Duration) -> bool;
}

/// Sends a request, and retries on 5XX and on lost connections for [`RETRY_LIMIT`].
///
/// A request that would create a second object is not repeated once the server may have received it. A 5XX
/// counts as received: the server, or a proxy before it, may have failed after the object was created.
pub(crate) fn send(transport: &mut impl Transport, call: &ApiCall) -> SentCall {
    let mut is_maybe_done = false;
    let (deadline, mut pause) = (transport.elapsed() + RETRY_LIMIT, FIRST_PAUSE);
    loop {
        let result = transport.attempt(call);
        let (cause, delivery) = match &result {
            Ok(answer) if answer.status >= 500 => (format!("answered {}", answer.status), Delivery::Unknown),
            Ok(_) => return SentCall { result, is_maybe_done },
            Err(lost) => (format!("does not answer ({})", lost.cause), lost.delivery),
        };
        let can_retry = match delivery {
            Delivery::Unsendable => false,
            Delivery::NotSent => true,
            Delivery::Unknown => call.repeat != Repeat::Duplicates,
        };
        if !can_retry || transport.elapsed() + pause > deadline {
            return SentCall { result, is_maybe_done };
        }
        is_maybe_done |= delivery == Delivery::Unknown;
        transport.pause(pause, &cause);
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Plays the given results, the last of them forever. Attempts take no time.
    struct ScriptedTransport {
        results: VecDeque<Result<u16, Delivery>>,
        now: Duration,
        attempts: usize,
    }

    impl ScriptedTransport {
        /// Takes statuses, and for lost requests how far they came.
        fn new(results: impl IntoIterator<Item = Result<u16, Delivery>>) -> Self {
            Self { results: results.into_iter().collect(), now: Duration::ZERO, attempts: 0 }
        }
    }

    impl Transport for ScriptedTransport {
        fn attempt(&mut self, _: &ApiCall) -> Result<ApiAnswer, NoAnswer> {
            self.attempts += 1;
            let next =
                if self.results.len() > 1 { self.results.pop_front() } else { self.results.front().copied() };
            match next.unwrap() {
                Ok(status) => Ok(ApiAnswer { status, body: Vec::new(), retry_after: None }),
                Err(delivery) => Err(NoAnswer { delivery, cause: "lost".into() }),
            }
        }

        fn elapsed(&self) -> Duration {
            self.now
        }

        fn pause(&mut self, pause: Duration, _: &str) {
            self.rest(pause);
        }

        fn rest(&mut self, pause: Duration) -> bool {
            self.now += pause;
            true
        }
    }

    fn call(repeat: Repeat) -> ApiCall {
        ApiCall::new("/v2/test", &serde_json::json!({}), repeat).unwrap()
    }

    #[test]
    fn answer_ends_the_attempts() {
        for status in [200, 400, 401, 404, 412, 429] {
            let mut transport = ScriptedTransport::new([Ok(status)]);
            let sent = send(&mut transport, &call(Repeat::Harmless));
            assert_eq!(
                (sent.result.unwrap().status, transport.attempts, sent.is_maybe_done),
                (status, 1, false)
            );
        }
    }

    #[test]
    fn server_failures_are_retried_for_ten_seconds() {
        for repeat in [Repeat::Harmless, Repeat::FindsNothing] {
            let mut transport = ScriptedTransport::new([Ok(500)]);
            let sent = send(&mut transport, &call(repeat));
            assert_eq!(sent.result.unwrap().status, 500);
            let now = transport.now;
            assert!(now <= Duration::from_secs(10) && now + LONGEST_PAUSE > RETRY_LIMIT, "{now:?}");
            assert!((14..=18).contains(&transport.attempts), "{}", transport.attempts);
        }
    }

    #[test]
    fn returning_server_is_reached() {
        let lost = Err(Delivery::NotSent);
        let mut transport = ScriptedTransport::new([lost, lost, Ok(200)]);
        let sent = send(&mut transport, &call(Repeat::Duplicates));
        assert_eq!((sent.result.unwrap().status, sent.is_maybe_done), (200, false));
    }

    #[test]
    fn deletion_reports_that_an_attempt_may_have_succeeded() {
        for first in [Err(Delivery::Unknown), Ok(503)] {
            let mut transport = ScriptedTransport::new([first, Ok(404)]);
            let sent = send(&mut transport, &call(Repeat::FindsNothing));
            assert_eq!((sent.result.unwrap().status, sent.is_maybe_done), (404, true));
        }
    }

    #[test]
    fn creation_is_not_repeated_after_a_lost_answer() {
        let mut transport = ScriptedTransport::new([Err(Delivery::Unknown), Ok(200)]);
        let sent = send(&mut transport, &call(Repeat::Duplicates));
        assert_eq!(sent.result.unwrap_err().delivery, Delivery::Unknown);
        assert_eq!(transport.attempts, 1);
    }

    #[test]
    fn creation_is_not_repeated_after_a_server_failure() {
        for status in [500, 502, 503, 504] {
            let mut transport = ScriptedTransport::new([Ok(status), Ok(200)]);
            let sent = send(&mut transport, &call(Repeat::Duplicates));
            assert_eq!((sent.result.unwrap().status, transport.attempts), (status, 1));
        }
    }
}
