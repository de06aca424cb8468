//! Detects the server's warnings during a COMMIT (R4).
//!
//! A COMMIT that waits for a synchronous standby and is cancelled succeeds with a warning: what it wrote is on this server
//! alone, and lost when the standby takes over. The driver only logs such notices, so this subscribes to the log while a
//! COMMIT is polled.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::LazyLock;

use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Level, Metadata, Subscriber};

/// Where the driver logs notices.
const TARGET: &str = "sqlx::postgres::notice";

thread_local! {
    static WARNED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `commit`. Also returns whether the server warned meanwhile.
pub(super) async fn watch<T>(commit: impl Future<Output = T>) -> (T, bool) {
    static SUBSCRIBER: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoticeSubscriber));
    let mut commit = pin!(commit);
    let mut warned = false;
    let outcome = poll_fn(|context| {
        WARNED.set(false);
        let subscription = tracing::dispatcher::set_default(&SUBSCRIBER);
        let outcome = commit.as_mut().poll(context);
        drop(subscription);
        warned |= WARNED.get();
        outcome
    })
    .await;
    (outcome, warned)
}

/// Sets [`WARNED`] at a warning.
struct NoticeSubscriber;

impl Subscriber for NoticeSubscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == TARGET && *metadata.level() <= Level::WARN
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        if self.enabled(event.metadata()) {
            WARNED.set(true);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_warnings_of_the_server_are_detected() {
        let quiet = watch(async {
            tracing::warn!("of another crate");
            tracing::info!(target: "sqlx::postgres::notice", "no warning");
            1
        });
        assert_eq!(quiet.await, (1, false));
        let warning = watch(async {
            tracing::warn!(target: "sqlx::postgres::notice", "canceling wait");
            tokio::task::yield_now().await;
            2
        });
        assert_eq!(warning.await, (2, true));
    }
}
