//! The shutdown of a publisher, in bounded time, whatever the home store does meanwhile.
//!
//! First the control API ends, within [`DRAIN_LIMIT`](evictd_ops::http::DRAIN_LIMIT): requests in progress are answered.
//! Then the rest ends, all of it within [`END_LIMIT`]: the last changes are numbered and sent, final receipts are stored,
//! and the store is closed. The admin port ends last. All of it comes after the lame-duck time, and takes [`STOP_LIMIT`] at
//! most. A supervisor has to wait for longer before it kills; `TimeoutStopSec` in `deploy/systemd` does.
//!
//! A task that is aborted loses nothing (G3): the rows are committed, and the next publisher numbers them. It finds open
//! receipts in the store.

use std::future::Future;
use std::time::Duration;

use evictd_ops::tasks::Tasks;
use evictd_ops::{admin, http};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long everything may take that comes after the API's end.
///
/// A store that works needs some milliseconds, and NATS a second at most. One that hangs would delay each of the last
/// transactions, one after the other, by its timeouts.
const END_LIMIT: Duration = Duration::from_secs(3);

/// The longest time from the end of the lame-duck time to the end of the process.
pub const STOP_LIMIT: Duration =
    http::DRAIN_LIMIT.saturating_add(END_LIMIT).saturating_add(admin::DRAIN_LIMIT);

/// Signals that the API has ended, and that there is no time left for the rest.
#[derive(Clone, Debug)]
pub(crate) struct ShutdownPhases {
    drained: CancellationToken,
    overdue: CancellationToken,
}

impl ShutdownPhases {
    pub(crate) fn new() -> Self {
        let phases = Self { drained: CancellationToken::new(), overdue: CancellationToken::new() };
        let Self { drained, overdue } = phases.clone();
        tokio::spawn(async move {
            drained.cancelled().await;
            tokio::time::sleep(END_LIMIT).await;
            overdue.cancel();
        });
        phases
    }

    /// Returns the token that is cancelled when the API has ended.
    pub(crate) fn drained(&self) -> CancellationToken {
        self.drained.clone()
    }

    /// Returns a guard for the API's task to hold. When the task ends, even by a panic, the rest ends.
    pub(crate) fn begin_at_drop(&self) -> DropGuard {
        self.drained.clone().drop_guard()
    }

    /// Starts a task that ends by itself once the API has ended. It is aborted when there is no time left.
    pub(crate) fn spawn(
        &self,
        tasks: &mut Tasks,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let phases = self.clone();
        tasks.spawn(name, async move {
            if phases.in_time(task).await.is_none() {
                tracing::warn!(
                    task = name,
                    limit = ?END_LIMIT,
                    "shutdown timed out; task aborted. The next publisher finishes its work from the home store"
                );
            }
        });
    }

    /// Runs a future for as long as there is time.
    pub(crate) async fn in_time<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        self.overdue.run_until_cancelled(future).await
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_tasks_that_do_not_end_are_aborted_at_one_time() {
        let (phases, shutdown) = (ShutdownPhases::new(), CancellationToken::new());
        let mut tasks = Tasks::new(shutdown.clone());
        for name in ["one", "another"] {
            phases.spawn(&mut tasks, name, pending());
        }
        phases.spawn(&mut tasks, "patient", phases.drained().cancelled_owned());
        shutdown.cancel();
        // No task is aborted before the API has ended.
        tokio::time::sleep(END_LIMIT * 10).await;
        let drained_at = Instant::now();
        drop(phases.begin_at_drop());
        assert_eq!(tasks.ended().await, Ok(()), "its token was cancelled");
        assert_eq!(drained_at.elapsed(), END_LIMIT);
        assert_eq!(phases.in_time(async {}).await, None, "there is no time left after them");
        assert_eq!(drained_at.elapsed(), END_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_end_are_not_waited_for_any_longer() {
        let (phases, shutdown) = (ShutdownPhases::new(), CancellationToken::new());
        let mut tasks = Tasks::new(shutdown.clone());
        phases.spawn(&mut tasks, "patient", phases.drained().cancelled_owned());
        shutdown.cancel();
        let drained_at = Instant::now();
        drop(phases.begin_at_drop());
        assert_eq!(tasks.ended().await, Ok(()));
        assert_eq!(phases.in_time(async { "closed" }).await, Some("closed"));
        assert_eq!(drained_at.elapsed(), Duration::ZERO);
    }
}
