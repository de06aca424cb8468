//! The tasks of a daemon: all of them run, or none does.
//!
//! If a task panicked or exited by itself, the daemon would look alive without working. So its end cancels the others,
//! and the process exits with an error that its supervisor sees.

use std::collections::HashMap;
use std::future::Future;

use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

/// A task exited before the shutdown.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the task `{name}` failed; see the log")]
pub struct TaskFailed {
    pub name: &'static str,
}

/// The running tasks of one daemon. Dropping them ends them at once, and everything that shares their token.
#[derive(Debug)]
pub struct Tasks {
    set: JoinSet<bool>,
    names: HashMap<Id, &'static str>,
    shutdown: CancellationToken,
}

/// Cancels the other tasks when its own exits, also by a panic.
struct ExitGuard {
    name: &'static str,
    shutdown: CancellationToken,
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        if !self.shutdown.is_cancelled() {
            tracing::error!(task = self.name, "task exited unexpectedly; shutting down");
            self.shutdown.cancel();
        }
    }
}

impl Tasks {
    /// A task that exits before `shutdown` is cancelled cancels it.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { set: JoinSet::new(), names: HashMap::new(), shutdown }
    }

    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        let task = self.set.spawn(async move {
            let _guard = ExitGuard { name, shutdown: shutdown.clone() };
            task.await;
            shutdown.is_cancelled()
        });
        self.names.insert(task.id(), name);
    }

    /// Waits until all tasks have exited.
    pub async fn ended(mut self) -> Result<(), TaskFailed> {
        let mut failed = None;
        while let Some(ended) = self.set.join_next_with_id().await {
            let (id, well) = match ended {
                Ok(ended) => ended,
                Err(error) => {
                    tracing::error!(%error, "task panicked");
                    (error.id(), false)
                }
            };
            if !well {
                failed = failed.or(self.names.get(&id).copied());
            }
        }
        failed.map_or(Ok(()), |name| Err(TaskFailed { name }))
    }
}

impl Drop for Tasks {
    /// Running tasks that are dropped don't exit unexpectedly, and the log must not say so.
    fn drop(&mut self) {
        if !self.set.is_empty() {
            self.shutdown.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn shutdown_ends_tasks_without_an_error() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("one", shutdown.clone().cancelled_owned());
        shutdown.cancel();
        assert_eq!(tasks.ended().await, Ok(()));
    }

    #[tokio::test]
    async fn task_that_exits_unexpectedly_ends_the_others() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("patient", shutdown.clone().cancelled_owned());
        tasks.spawn("hasty", async {});
        assert_eq!(tasks.ended().await, Err(TaskFailed { name: "hasty" }));
        assert!(shutdown.is_cancelled());
    }

    #[tokio::test]
    async fn dropped_tasks_are_cancelled_first() {
        let shutdown = CancellationToken::new();
        let (sender, was_cancelled) = tokio::sync::oneshot::channel();
        let mut tasks = Tasks::new(shutdown.clone());
        let observer = DropObserver { shutdown: shutdown.clone(), sender: Some(sender) };
        tasks.spawn("patient", async move {
            let _observer = observer;
            std::future::pending::<()>().await;
        });
        drop(tasks);
        assert_eq!(was_cancelled.await, Ok(true), "cancelled before it was dropped");
    }

    /// Sends whether the shutdown had begun when its task was dropped.
    struct DropObserver {
        shutdown: CancellationToken,
        sender: Option<tokio::sync::oneshot::Sender<bool>>,
    }

    impl Drop for DropObserver {
        fn drop(&mut self) {
            let sent = self.sender.take().map(|sender| sender.send(self.shutdown.is_cancelled()));
            assert_eq!(sent, Some(Ok(())));
        }
    }

    #[tokio::test]
    async fn task_that_panics_ends_the_others() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("patient", shutdown.clone().cancelled_owned());
        tasks.spawn("broken", async { panic!("on purpose") });
        assert_eq!(tasks.ended().await, Err(TaskFailed { name: "broken" }));
        assert!(shutdown.is_cancelled());
    }
}
