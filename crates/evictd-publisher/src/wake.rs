//! How other parts wake the sequencer.

use std::sync::Arc;

use tokio::sync::Notify;

/// Signals work to the sequencer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wake {
    pub(crate) rows: Arc<Notify>,
    pub(crate) tick: Arc<Notify>,
    pub(crate) unlogged: Arc<Notify>,
    pub(crate) schema: Arc<Notify>,
}

impl Wake {
    /// Signals a commit.
    pub(crate) fn now(&self) {
        self.rows.notify_one();
    }

    /// Signals a new connection: the end of the log is sent at once, because agents may have missed messages.
    pub(crate) fn tick(&self) {
        self.tick.notify_one();
    }

    /// Signals a change that got no row in the log and was undone ([`StoreError::Unlogged`](evictd_store::StoreError::Unlogged)).
    pub(crate) fn unlogged(&self) {
        self.unlogged.notify_one();
    }

    /// Signals that a round found another schema, or one that lets changes go past the log: the triggers are checked at
    /// once.
    pub(crate) fn schema_suspect(&self) {
        self.schema.notify_one();
    }
}
