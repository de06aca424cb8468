//! Ends a process by signals: the first one starts its end, the second one skips what is left of it.

use std::io;
use std::time::Duration;

use serde::Deserialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::HumanDuration;
use crate::logging;

/// How long the log may hold up an exit at once.
const FLUSH_LIMIT: Duration = Duration::from_millis(100);

/// The section `[shutdown]` of a configuration.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownConfig {
    /// The lame-duck time: from the request to end until the daemon stops serving.
    pub delay: HumanDuration,
}

/// The two moments at which a daemon's end begins. In between it isn't ready, and still serves everything, so that
/// gateways and balancers that follow its readiness stop sending requests before it refuses any.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// Cancelled when the daemon is asked to end.
    pub requested: CancellationToken,
    /// Cancelled when it stops serving, never before `requested`.
    pub closing: CancellationToken,
}

impl Shutdown {
    /// Of a daemon that ends some time after `requested`: see
    /// [`Readiness::lame_duck`](crate::readiness::Readiness::lame_duck).
    pub fn after(requested: CancellationToken) -> Self {
        Self { requested, closing: CancellationToken::new() }
    }

    /// Ends at once, without lame-duck time.
    pub fn close(&self) {
        self.requested.cancel();
        self.closing.cancel();
    }
}

/// Of what ends when it is asked to.
impl From<CancellationToken> for Shutdown {
    fn from(token: CancellationToken) -> Self {
        Self { requested: token.clone(), closing: token }
    }
}

/// Returns a token that is cancelled at the first SIGINT or SIGTERM. A second signal ends the process at once, with the
/// exit code that a shell reports for it (130, 143).
///
/// Must be called inside a tokio runtime. If the signals can't be watched, that is logged, and they keep their usual
/// effect: they end the process without a drain.
pub fn on_signals() -> CancellationToken {
    let token = CancellationToken::new();
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(interrupt), Ok(terminate)) => {
            tokio::spawn(watch(interrupt, terminate, token.clone()));
        }
        (Err(error), _) | (_, Err(error)) => warn_of_no_drain(&error),
    }
    token
}

/// As [`on_signals`], and SIGHUP is a signal to end too, as for a program that belongs to a terminal.
pub fn on_signals_and_hang_up() -> CancellationToken {
    let token = on_signals();
    match signal(SignalKind::hangup()) {
        Ok(mut hang_up) => {
            let shutdown = token.clone();
            tokio::spawn(async move {
                hang_up.recv().await;
                tracing::info!(signal = "SIGHUP", "shutting down");
                shutdown.cancel();
            });
        }
        Err(error) => warn_of_no_drain(&error),
    }
    token
}

fn warn_of_no_drain(error: &io::Error) {
    tracing::error!(%error, "cannot watch signals; SIGINT and SIGTERM will end the process without a drain");
}

async fn watch(mut interrupt: Signal, mut terminate: Signal, token: CancellationToken) {
    let first = either(&mut interrupt, &mut terminate).await;
    tracing::info!(signal = name(first), "shutting down; a second signal ends the process at once");
    token.cancel();
    let second = either(&mut interrupt, &mut terminate).await;
    tracing::warn!(signal = name(second), "second signal; exiting without a drain");
    logging::flush(FLUSH_LIMIT);
    std::process::exit(exit_code(second));
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) -> SignalKind {
    tokio::select! {
        _ = interrupt.recv() => SignalKind::interrupt(),
        _ = terminate.recv() => SignalKind::terminate(),
    }
}

fn name(signal: SignalKind) -> &'static str {
    if signal == SignalKind::interrupt() { "SIGINT" } else { "SIGTERM" }
}

/// As shells report the end of a process by a signal: 128 and the signal's number.
fn exit_code(signal: SignalKind) -> i32 {
    128 + signal.as_raw_value()
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal as Kill, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn first_signal_cancels_the_token() {
        let token = on_signals();
        assert!(!token.is_cancelled());
        kill_process(getpid(), Kill::TERM).unwrap();
        token.cancelled().await;
    }

    #[test]
    fn exit_codes_are_those_of_shells() {
        assert_eq!(exit_code(SignalKind::interrupt()), 130);
        assert_eq!(exit_code(SignalKind::terminate()), 143);
    }
}
