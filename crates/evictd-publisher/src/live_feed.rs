//! The sending end of the live feed. What can't be sent isn't queued: agents request what they miss.

use evictd_core::history::Voucher;
use evictd_core::limits::LIVE_BATCH_MAX;
use evictd_store::log::{Head, Numbered};
use evictd_wire::live::{Live, LiveEvent};
use evictd_wire::subject::LIVE;

use crate::bus::Bus;
use crate::shared::Shared;

#[derive(Clone)]
pub(crate) struct LiveFeed {
    pub(crate) bus: Bus,
    pub(crate) shared: Shared,
}

impl LiveFeed {
    /// Sends rows that just got their positions.
    pub(crate) async fn send(&self, numbered: &Numbered) {
        for batch in numbered.rows.chunks(LIVE_BATCH_MAX) {
            let Some(last) = batch.last() else { continue };
            let voucher = self.shared.history.voucher(&numbered.head, last.position);
            let sent = self.publish(Live { voucher, event: LiveEvent::Invalidations(batch.to_vec()) }).await;
            self.shared.metrics.live_message(sent);
        }
    }

    /// Sends the end of the log.
    pub(crate) async fn tick(&self, head: &Head) {
        let voucher = self.shared.history.voucher(head, head.at);
        self.publish(Live { voucher, event: LiveEvent::Tick(Some(head.round)) }).await;
    }

    /// Sends that an incarnation has ended, so that agents needn't wait until it is silent.
    pub(crate) async fn end(&self, voucher: Voucher) {
        self.publish(Live { voucher, event: LiveEvent::Ended }).await;
    }

    async fn publish(&self, live: Live) -> bool {
        self.shared.vouching.is_allowed() && self.bus.send(LIVE.to_owned(), live.encode()).await
    }
}
