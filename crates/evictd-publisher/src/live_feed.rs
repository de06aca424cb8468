//! The sending end of the live feed.

use std::sync::Arc;

use evictd_core::position::LogPosition;
use evictd_store::log::Numbered;
use evictd_wire::live::{encode_invalidations, encode_tick};
use evictd_wire::subject::LIVE;

use crate::bus::Bus;
use crate::metrics::Metrics;
use crate::receipts::Receipts;

/// Emits what the log gained. What isn't sent is not kept: agents ask for it.
#[derive(Clone)]
pub(crate) struct LiveFeed {
    pub(crate) bus: Bus,
    pub(crate) receipts: Arc<Receipts>,
    pub(crate) metrics: Arc<Metrics>,
}

impl LiveFeed {
    /// Emits rows that just got their positions, and opens their receipts. `known` is the head as it was known
    /// before they were numbered.
    pub(crate) async fn send(&self, known: LogPosition, numbered: &Numbered) {
        // Before anything is sent: an agent that tells of it must not seem to claim more than there is.
        self.receipts.head(numbered.head);
        self.metrics.head(numbered.head);
        // Side by side: no receipt is worth a delay of the invalidation itself.
        tokio::join!(self.emit(numbered), self.receipts.numbered(known, numbered));
    }

    async fn emit(&self, numbered: &Numbered) {
        for payload in encode_invalidations(&numbered.rows) {
            let sent = self.bus.send(LIVE.to_owned(), payload).await;
            self.metrics.live_message(sent);
        }
    }

    /// Tells how long the log is.
    pub(crate) async fn tick(&self, head: LogPosition) {
        self.receipts.head(head);
        self.metrics.head(head);
        self.bus.send(LIVE.to_owned(), encode_tick(head)).await;
    }
}
