//! The sending end of the live feed.

use std::sync::Arc;

use evictd_core::limits::LIVE_BATCH_MAX;
use evictd_core::position::LogPosition;
use evictd_store::log::{Head, Numbered};
use evictd_wire::live::{Event, Live};
use evictd_wire::subject::LIVE;

use crate::bus::Bus;
use crate::history::{EndedIncarnation, HomeHistory};
use crate::metrics::Metrics;
use crate::receipts::Receipts;
use crate::vouching::Vouching;

/// Emits what the log gained. What isn't sent is not kept: agents ask for it.
#[derive(Clone)]
pub(crate) struct LiveFeed {
    pub(crate) bus: Bus,
    pub(crate) receipts: Arc<Receipts>,
    pub(crate) history: Arc<HomeHistory>,
    pub(crate) vouching: Vouching,
    pub(crate) metrics: Arc<Metrics>,
}

impl LiveFeed {
    /// Emits rows that just got their positions, and opens their receipts. `known` is the head as it was known
    /// before they were numbered.
    pub(crate) async fn send(&self, known: LogPosition, numbered: &Numbered) {
        // Before anything is sent: an agent that tells of it must not seem to claim more than there is.
        self.note(&numbered.head).await;
        // Side by side: no receipt is worth a delay of the invalidation itself.
        tokio::join!(self.emit(numbered), self.receipts.numbered(known, numbered));
    }

    async fn emit(&self, numbered: &Numbered) {
        for batch in numbered.rows.chunks(LIVE_BATCH_MAX) {
            let Some(last) = batch.last() else { continue };
            let voucher = self.history.voucher(&numbered.head, last.position);
            let live = Live { voucher, event: Event::Invalidations(batch.to_vec()) };
            let sent = self.publish(&live).await;
            self.metrics.live_message(sent);
        }
    }

    /// Tells how long the log is.
    pub(crate) async fn tick(&self, head: &Head) {
        self.note(head).await;
        let voucher = self.history.voucher(head, head.at);
        self.publish(&Live { voucher, event: Event::Tick(Some(head.round)) }).await;
    }

    /// Nothing more comes from this incarnation: the next publisher of this store begins another one, and agents
    /// needn't wait for this one to be silent.
    pub(crate) async fn end(&self) {
        let head = self.history.head();
        self.tell_end(EndedIncarnation(self.history.voucher(&head, head.at))).await;
    }

    async fn note(&self, head: &Head) {
        if let Err(error) = self.history.note(head).await {
            self.metrics.store_failed(&error);
        }
        if let Some(ended) = self.history.take_ended() {
            self.tell_end(ended).await;
        }
        self.receipts.head(head.at);
        self.metrics.head(head.at);
    }

    async fn tell_end(&self, EndedIncarnation(voucher): EndedIncarnation) {
        self.publish(&Live { voucher, event: Event::Ended }).await;
    }

    async fn publish(&self, live: &Live) -> bool {
        self.vouching.is_allowed() && self.bus.send(LIVE.to_owned(), live.encode()).await
    }
}
