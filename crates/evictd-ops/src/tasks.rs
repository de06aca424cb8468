//! The tasks of a daemon: all of them run, or none does.
//!
//! A part that panics or ends by itself would leave a daemon behind that looks alive and isn't. So its end
//! cancels the others, and the process ends with an error that its supervisor sees.

use std::collections::HashMap;
use std::future::Future;

use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

/// A part ended although nobody asked it to.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the part `{name}` failed; see the log")]
pub struct TaskFailed {
    /// Which part.
    pub name: &'static str,
}

/// The running tasks of one daemon. Dropping them ends them at once, and whoever shares their token.
#[derive(Debug)]
pub struct Tasks {
    set: JoinSet<bool>,
    names: HashMap<Id, &'static str>,
    shutdown: CancellationToken,
}

/// Tells of its task's end, however it comes, also by a panic.
struct End {
    name: &'static str,
    shutdown: CancellationToken,
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.shutdown.is_cancelled() {
            tracing::error!(part = self.name, "a part ended by itself; ending the others");
            self.shutdown.cancel();
        }
    }
}

impl Tasks {
    /// No tasks. Whichever ends before `shutdown` is cancelled cancels it.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { set: JoinSet::new(), names: HashMap::new(), shutdown }
    }

    /// Starts one.
    pub fn spawn(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        let task = self.set.spawn(async move {
            let _end = End { name, shutdown: shutdown.clone() };
            part.await;
            shutdown.is_cancelled()
        });
        self.names.insert(task.id(), name);
    }

    /// Waits until all have ended.
    pub async fn ended(mut self) -> Result<(), TaskFailed> {
        let mut failed = None;
        while let Some(ended) = self.set.join_next_with_id().await {
            let (id, well) = match ended {
                Ok(ended) => ended,
                Err(error) => {
                    tracing::error!(%error, "a part panicked");
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
    /// Who lets go of tasks that run wants them to end: none of them does so by itself, and the log must not say so.
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
    async fn tasks_that_are_told_to_end_end_well() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("one", shutdown.clone().cancelled_owned());
        shutdown.cancel();
        assert_eq!(tasks.ended().await, Ok(()));
    }

    #[tokio::test]
    async fn a_part_that_ends_by_itself_ends_the_others() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("patient", shutdown.clone().cancelled_owned());
        tasks.spawn("hasty", async {});
        assert_eq!(tasks.ended().await, Err(TaskFailed { name: "hasty" }));
        assert!(shutdown.is_cancelled());
    }

    #[tokio::test]
    async fn who_lets_go_of_tasks_ends_them_before_any_could_seem_to_end_by_itself() {
        let shutdown = CancellationToken::new();
        let (ended, told) = tokio::sync::oneshot::channel();
        let mut tasks = Tasks::new(shutdown.clone());
        let seen = Seen { shutdown: shutdown.clone(), ended: Some(ended) };
        tasks.spawn("patient", async move {
            let _seen = seen;
            std::future::pending::<()>().await;
        });
        drop(tasks);
        assert_eq!(told.await, Ok(true), "it was told to end before it was dropped");
    }

    /// Tells whether the shutdown had begun when its task was dropped.
    struct Seen {
        shutdown: CancellationToken,
        ended: Option<tokio::sync::oneshot::Sender<bool>>,
    }

    impl Drop for Seen {
        fn drop(&mut self) {
            let told = self.ended.take().map(|ended| ended.send(self.shutdown.is_cancelled()));
            assert_eq!(told, Some(Ok(())));
        }
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_the_others() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("patient", shutdown.clone().cancelled_owned());
        tasks.spawn("broken", async { panic!("on purpose") });
        assert_eq!(tasks.ended().await, Err(TaskFailed { name: "broken" }));
        assert!(shutdown.is_cancelled());
    }
}
