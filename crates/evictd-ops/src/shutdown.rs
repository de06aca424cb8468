//! Ends a process by signals: the first one starts the drain, the second one skips it.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

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
