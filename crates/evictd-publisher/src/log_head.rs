//! The end of the log, as far as this publisher has read it.

use evictd_core::position::LogPosition;
use tokio::sync::watch;

/// The highest position that the store has reported. Sequencer, authority, receipts and status share it.
#[derive(Clone, Debug)]
pub(crate) struct LogHead(watch::Sender<LogPosition>);

impl LogHead {
    pub(crate) fn new(head: LogPosition) -> Self {
        Self(watch::Sender::new(head))
    }

    pub(crate) fn current(&self) -> LogPosition {
        *self.0.borrow()
    }

    /// Raises the head to what the store has reported. Reads that finish out of order don't lower it.
    pub(crate) fn advance(&self, head: LogPosition) {
        self.0.send_if_modified(|current| {
            let is_further = head > *current;
            *current = head.max(*current);
            is_further
        });
    }

    /// Signals each further advance.
    pub(crate) fn watch(&self) -> watch::Receiver<LogPosition> {
        self.0.subscribe()
    }
}
