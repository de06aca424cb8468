//! The end of a publisher, in bounded time, whatever the home store does meanwhile.
//!
//! First the control API ends, within [`DRAIN_LIMIT`](evictd_ops::http::DRAIN_LIMIT): what is under way is answered.
//! Then comes the rest, all of it within [`END_LIMIT`]: what was answered is numbered and sent, what is final is
//! stored, and the store is let go of. A supervisor that kills has to wait for longer than both together, which are
//! 13 seconds; `TimeoutStopSec` in `deploy/systemd` does.
//!
//! To be cut short costs time and loses nothing (G3): the rows are committed, and whoever numbers next numbers them;
//! receipts that are open are found in the store.

use std::future::Future;
use std::time::Duration;

use evictd_ops::tasks::Tasks;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long everything may take that comes after the API's end.
///
/// A store that works needs some milliseconds, and NATS a second at most. One that doesn't would hold up the last
/// transactions, one after the other, for as long as each may take to connect and to be answered.
const END_LIMIT: Duration = Duration::from_secs(3);

/// When the API has ended, and when there is no time left for the rest.
#[derive(Clone, Debug)]
pub(crate) struct End {
    drained: CancellationToken,
    overdue: CancellationToken,
}

impl End {
    /// Nothing ends yet.
    pub(crate) fn new() -> Self {
        let end = Self { drained: CancellationToken::new(), overdue: CancellationToken::new() };
        let Self { drained, overdue } = end.clone();
        tokio::spawn(async move {
            drained.cancelled().await;
            tokio::time::sleep(END_LIMIT).await;
            overdue.cancel();
        });
        end
    }

    /// Cancelled when the API has ended: the signal for everything else.
    pub(crate) fn drained(&self) -> CancellationToken {
        self.drained.clone()
    }

    /// For the API to hold. However it ends, also by a panic, the rest ends then.
    pub(crate) fn begins_with(&self) -> DropGuard {
        self.drained.clone().drop_guard()
    }

    /// Starts a part that ends by itself once the API has, or is dropped when there is no time left.
    pub(crate) fn spawn(
        &self,
        tasks: &mut Tasks,
        name: &'static str,
        part: impl Future<Output = ()> + Send + 'static,
    ) {
        let end = self.clone();
        tasks.spawn(name, async move {
            if end.in_time(part).await.is_none() {
                tracing::warn!(
                    part = name,
                    limit = ?END_LIMIT,
                    "a part was cut short, because the end took too long; what it left undone is in the home store, \
                     for the next publisher"
                );
            }
        });
    }

    /// Does something for as long as there is time.
    pub(crate) async fn in_time<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        self.overdue.run_until_cancelled(what).await
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use evictd_ops::http::DRAIN_LIMIT;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_parts_that_do_not_end_are_cut_short_at_one_time() {
        let (end, shutdown) = (End::new(), CancellationToken::new());
        let mut tasks = Tasks::new(shutdown.clone());
        for name in ["one", "another"] {
            end.spawn(&mut tasks, name, pending());
        }
        end.spawn(&mut tasks, "patient", end.drained().cancelled_owned());
        shutdown.cancel();
        // Nobody is cut short as long as the API takes its time.
        tokio::time::sleep(END_LIMIT * 10).await;
        let drained_at = Instant::now();
        drop(end.begins_with());
        assert_eq!(tasks.ended().await, Ok(()), "it was told to end");
        assert_eq!(drained_at.elapsed(), END_LIMIT);
        assert_eq!(end.in_time(async {}).await, None, "what comes after them has no time of its own");
        assert_eq!(drained_at.elapsed(), END_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn parts_that_end_are_not_waited_for_any_longer() {
        let (end, shutdown) = (End::new(), CancellationToken::new());
        let mut tasks = Tasks::new(shutdown.clone());
        end.spawn(&mut tasks, "patient", end.drained().cancelled_owned());
        shutdown.cancel();
        let drained_at = Instant::now();
        drop(end.begins_with());
        assert_eq!(tasks.ended().await, Ok(()));
        assert_eq!(end.in_time(async { "closed" }).await, Some("closed"));
        assert_eq!(drained_at.elapsed(), Duration::ZERO);
    }

    #[test]
    fn a_supervisor_waits_for_longer_than_the_whole_end_takes() {
        const UNIT: &str = include_str!("../../../deploy/systemd/evictd-publisher.service");
        let limit = UNIT.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")?.strip_suffix('s'));
        let limit = Duration::from_secs(limit.unwrap().parse().unwrap());
        assert!(DRAIN_LIMIT + END_LIMIT < limit, "{DRAIN_LIMIT:?} and {END_LIMIT:?} against {limit:?}");
    }
}
