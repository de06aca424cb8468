//! Whose request the store works on next.
//!
//! The store works on a few requests at once, and the others wait here. Workspaces take turns, so that one with many
//! requests doesn't delay those of another. Deletions go first: they take rights away.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use evictd_core::ids::WorkspaceId;
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// After so many deletions in a row, another request gets a turn if one waits.
const DELETIONS_IN_A_ROW_MAX: u32 = 8;

/// Which requests go first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Urgency {
    Deletion,
    Other,
}

/// A number of turns, shared among the workspaces that want one.
#[derive(Clone, Debug)]
pub(crate) struct Turns(Arc<Mutex<TurnState>>);

#[derive(Debug)]
struct TurnState {
    free: usize,
    deletions: TurnQueue,
    others: TurnQueue,
    deletions_in_a_row: u32,
}

/// Requests that wait, by workspace.
#[derive(Default, Debug)]
struct TurnQueue {
    /// The workspaces that wait, the next one first. Each once.
    order: VecDeque<WorkspaceId>,
    /// None of the queues is empty.
    by_workspace: HashMap<WorkspaceId, VecDeque<oneshot::Sender<Turn>>>,
}

/// A request's turn, which ends when it is dropped. `None` inside once it was passed on.
#[derive(Debug)]
pub(crate) struct Turn(Option<Turns>);

impl Turns {
    pub(crate) fn new(at_once: usize) -> Self {
        let (deletions, others) = (TurnQueue::default(), TurnQueue::default());
        Self(Arc::new(Mutex::new(TurnState { free: at_once, deletions, others, deletions_in_a_row: 0 })))
    }

    /// Waits for a turn. Dropping the future gives up the place.
    pub(crate) async fn take(&self, workspace: &WorkspaceId, urgency: Urgency) -> Turn {
        let waiting = {
            let mut state = self.0.lock();
            if state.free > 0 {
                // Nothing waits while a turn is free.
                state.free -= 1;
                return Turn(Some(self.clone()));
            }
            let (sender, waiting) = oneshot::channel();
            state.queue(urgency).push(workspace, sender);
            waiting
        };
        // A sender is never dropped unused while its receiver waits.
        waiting.await.unwrap_or(Turn(None))
    }

    /// Gives a turn to the next request that still waits.
    fn pass_on(&self) {
        let mut state = self.0.lock();
        while let Some(next) = state.next() {
            match next.send(Turn(Some(self.clone()))) {
                Ok(()) => return,
                // Its client is gone. The turn must not end here, under the lock.
                Err(mut unused) => unused.0 = None,
            }
        }
        state.free += 1;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.pass_on();
        }
    }
}

impl TurnState {
    fn queue(&mut self, urgency: Urgency) -> &mut TurnQueue {
        match urgency {
            Urgency::Deletion => &mut self.deletions,
            Urgency::Other => &mut self.others,
        }
    }

    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let others_first = self.deletions_in_a_row >= DELETIONS_IN_A_ROW_MAX;
        let order = if others_first {
            [Urgency::Other, Urgency::Deletion]
        } else {
            [Urgency::Deletion, Urgency::Other]
        };
        for urgency in order {
            if let Some(next) = self.queue(urgency).pop() {
                self.deletions_in_a_row =
                    if urgency == Urgency::Deletion { self.deletions_in_a_row.saturating_add(1) } else { 0 };
                return Some(next);
            }
        }
        None
    }
}

impl TurnQueue {
    fn push(&mut self, workspace: &WorkspaceId, sender: oneshot::Sender<Turn>) {
        let waiting = self.by_workspace.entry(workspace.clone()).or_default();
        if waiting.is_empty() {
            self.order.push_back(workspace.clone());
        }
        waiting.push_back(sender);
    }

    /// Takes the first request of the next workspace, which then is the last one in order.
    fn pop(&mut self) -> Option<oneshot::Sender<Turn>> {
        let workspace = self.order.pop_front()?;
        let waiting = self.by_workspace.get_mut(&workspace)?;
        let next = waiting.pop_front();
        if waiting.is_empty() {
            self.by_workspace.remove(&workspace);
        } else {
            self.order.push_back(workspace);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;

    use futures_util::FutureExt as _;

    use super::*;

    type Waiting = Pin<Box<dyn Future<Output = Turn>>>;

    fn request(turns: &Turns, workspace: &str, urgency: Urgency) -> Waiting {
        let (turns, workspace) = (turns.clone(), WorkspaceId::new(workspace));
        let mut waiting: Waiting = Box::pin(async move { turns.take(&workspace, urgency).await });
        assert!((&mut waiting).now_or_never().is_none(), "a turn was free");
        waiting
    }

    /// Ends one turn after the other, and returns the names of those that wait in the order in which they get theirs.
    fn served(turn: Turn, mut waiting: Vec<(&'static str, Waiting)>) -> Vec<&'static str> {
        let (mut order, mut turn) = (Vec::new(), Some(turn));
        while turn.take().is_some() {
            for (name, request) in &mut waiting {
                if !order.contains(name)
                    && let Some(next) = request.now_or_never()
                {
                    order.push(*name);
                    turn = Some(next);
                    break;
                }
            }
        }
        order
    }

    fn only_turn(turns: &Turns) -> Turn {
        turns.take(&WorkspaceId::new("ws_0"), Urgency::Other).now_or_never().unwrap()
    }

    #[test]
    fn workspaces_take_turns() {
        let turns = Turns::new(1);
        let turn = only_turn(&turns);
        let waiting = [("a1", "ws_a"), ("a2", "ws_a"), ("a3", "ws_a"), ("b1", "ws_b"), ("c1", "ws_c")]
            .map(|(name, workspace)| (name, request(&turns, workspace, Urgency::Other)));
        assert_eq!(served(turn, waiting.into()), ["a1", "b1", "c1", "a2", "a3"]);
        drop(only_turn(&turns));
    }

    #[test]
    fn deletions_go_first_but_not_for_ever() {
        let turns = Turns::new(1);
        let turn = only_turn(&turns);
        let mut waiting = vec![("create", request(&turns, "ws_a", Urgency::Other))];
        let names = ["d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8", "d9"];
        waiting.extend(names.map(|name| (name, request(&turns, "ws_b", Urgency::Deletion))));
        let order = served(turn, waiting);
        assert_eq!(order.iter().position(|name| *name == "create"), Some(8), "{order:?}");
    }

    #[test]
    fn request_that_is_gone_takes_no_turn() {
        let turns = Turns::new(1);
        let turn = only_turn(&turns);
        drop(request(&turns, "ws_a", Urgency::Other));
        let waiting = vec![("b", request(&turns, "ws_b", Urgency::Other))];
        assert_eq!(served(turn, waiting), ["b"]);
        // A turn that was sent to a request which is dropped before it looks is passed on.
        let turn = only_turn(&turns);
        let gone = request(&turns, "ws_a", Urgency::Other);
        let mut next = request(&turns, "ws_b", Urgency::Other);
        drop(turn);
        drop(gone);
        assert!((&mut next).now_or_never().is_some());
    }
}
