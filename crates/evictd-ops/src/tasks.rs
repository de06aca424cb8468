//! The tasks of a daemon: all of them run, or none does.
//!
//! If a task panicked or exited by itself, the daemon would look alive without working. So its end cancels the others,
//! and the process exits with an error that its supervisor sees.

use std::collections::HashMap;
use std::future::Future;

use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::shutdown::Shutdown;

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
    running: HashMap<Id, RunningTask>,
    shutdown: Shutdown,
    /// Cancelled when only the last tasks are left.
    last: CancellationToken,
}

#[derive(Clone, Copy, Debug)]
struct RunningTask {
    name: &'static str,
    is_last: bool,
}

/// Cancels the other tasks when its own exits, also by a panic.
struct ExitGuard {
    name: &'static str,
    shutdown: Shutdown,
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        if !self.shutdown.closing.is_cancelled() {
            tracing::error!(task = self.name, "task exited unexpectedly; shutting down");
            self.shutdown.close();
        }
    }
}

impl Tasks {
    /// A task that exits before `shutdown` closes the daemon closes it.
    pub fn new(shutdown: impl Into<Shutdown>) -> Self {
        let (shutdown, last) = (shutdown.into(), CancellationToken::new());
        Self { set: JoinSet::new(), running: HashMap::new(), shutdown, last }
    }

    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn_task(RunningTask { name, is_last: false }, task);
    }

    /// Spawns a task that ends after the others: when the token that `task` gets is cancelled.
    pub fn spawn_last<T>(&mut self, name: &'static str, task: impl FnOnce(CancellationToken) -> T)
    where
        T: Future<Output = ()> + Send + 'static,
    {
        self.spawn_task(RunningTask { name, is_last: true }, task(self.last.clone()));
    }

    fn spawn_task(&mut self, running: RunningTask, task: impl Future<Output = ()> + Send + 'static) {
        let (name, shutdown) = (running.name, self.shutdown.clone());
        let task = self.set.spawn(async move {
            let _guard = ExitGuard { name, shutdown: shutdown.clone() };
            task.await;
            shutdown.closing.is_cancelled()
        });
        self.running.insert(task.id(), running);
    }

    /// Waits until all tasks have exited.
    pub async fn ended(self) -> Result<(), TaskFailed> {
        self.ended_then(async {}).await
    }

    /// As [`Tasks::ended`]. Runs `finally` when all but the last tasks have exited.
    pub async fn ended_then(mut self, finally: impl Future<Output = ()>) -> Result<(), TaskFailed> {
        let mut failed = None;
        while self.running.values().any(|task| !task.is_last) {
            failed = failed.or(self.next_failure().await);
        }
        finally.await;
        self.last.cancel();
        while !self.running.is_empty() {
            failed = failed.or(self.next_failure().await);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Waits for the end of one task, and returns its failure.
    async fn next_failure(&mut self) -> Option<TaskFailed> {
        let (id, well) = match self.set.join_next_with_id().await? {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(%error, "task panicked");
                (error.id(), false)
            }
        };
        let task = self.running.remove(&id)?;
        (!well).then_some(TaskFailed { name: task.name })
    }
}

impl Drop for Tasks {
    /// Running tasks that are dropped don't exit unexpectedly, and the log must not say so.
    fn drop(&mut self) {
        if !self.set.is_empty() {
            self.shutdown.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

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
    async fn last_task_ends_after_all_others_and_what_follows_them() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        let ends: Arc<Mutex<Vec<&str>>> = Arc::default();
        let note = |name| {
            let ends = ends.clone();
            move || ends.lock().push(name)
        };
        let noted = note("admin");
        tasks.spawn_last("admin", |end| async move {
            end.cancelled().await;
            noted();
        });
        for name in ["one", "another"] {
            let (noted, shutdown) = (note("other"), shutdown.clone());
            tasks.spawn(name, async move {
                shutdown.cancelled().await;
                noted();
            });
        }
        shutdown.cancel();
        let noted = note("store");
        assert_eq!(tasks.ended_then(async move { noted() }).await, Ok(()));
        assert_eq!(*ends.lock(), ["other", "other", "store", "admin"]);
    }

    #[tokio::test]
    async fn last_task_that_exits_unexpectedly_ends_the_others() {
        let shutdown = Shutdown::after(CancellationToken::new());
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("patient", shutdown.closing.clone().cancelled_owned());
        tasks.spawn_last("admin", |_| async {});
        assert_eq!(tasks.ended().await, Err(TaskFailed { name: "admin" }));
        assert!(shutdown.requested.is_cancelled(), "the process that started the daemon sees it");
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
