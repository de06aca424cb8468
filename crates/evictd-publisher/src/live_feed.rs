//! The sending end of the live feed.

use std::sync::Arc;

use evictd_core::invalidation::Invalidation;
use evictd_core::position::LogPosition;
use evictd_wire::live::{encode_invalidations, encode_tick};
use evictd_wire::subject::LIVE;

use crate::bus::Bus;
use crate::confirmations::Confirmations;
use crate::metrics::Metrics;

/// Emits what the log gained. What isn't sent is not kept: agents ask for it.
#[derive(Clone)]
pub(crate) struct LiveFeed {
    pub(crate) bus: Bus,
    pub(crate) confirmations: Arc<Confirmations>,
    pub(crate) metrics: Arc<Metrics>,
}

impl LiveFeed {
    /// Emits rows that just got their positions. They count as open first, or an agent could confirm one
    /// before anybody waits for it.
    pub(crate) async fn send(&self, rows: &[Invalidation]) {
        self.confirmations.numbered(rows);
        for payload in encode_invalidations(rows) {
            let sent = self.bus.send(LIVE.to_owned(), payload).await;
            self.metrics.live_message(sent);
        }
    }

    /// Tells how long the log is.
    pub(crate) async fn tick(&self, head: LogPosition) {
        self.confirmations.head(head);
        self.bus.send(LIVE.to_owned(), encode_tick(head)).await;
    }
}
