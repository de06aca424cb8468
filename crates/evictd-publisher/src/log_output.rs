//! Passes on what the log has gained: to the live feed, to receipts and to metrics.

use evictd_core::position::LogPosition;
use evictd_core::rules::Rule;
use evictd_ops::log_limit;
use evictd_store::log::{Head, Numbered};

use crate::live_feed::LiveFeed;
use crate::receipts::Receipts;
use crate::shared::Shared;

/// Shared by those that number rows: the sequencer, and the authority's rounds.
#[derive(Clone)]
pub(crate) struct LogOutput {
    pub(crate) feed: LiveFeed,
    pub(crate) receipts: Receipts,
    pub(crate) shared: Shared,
}

impl LogOutput {
    /// Passes on the rows of one transaction. `before` is the head that was known when it began.
    pub(crate) async fn numbered(&self, before: LogPosition, numbered: &Numbered) {
        // Before anything is sent: an agent that confirms it must not seem to be ahead of the log.
        self.note(&numbered.head).await;
        let is_behind = !numbered.rows.is_empty() && self.is_behind(before, numbered.head.at);
        if !numbered.rows.is_empty() && !is_behind {
            self.check_density(numbered);
        }
        // Side by side: no receipt may delay the invalidation itself.
        tokio::join!(self.feed.send(numbered), self.receipts.numbered(numbered, is_behind));
    }

    /// Passes on the end of the log. `before` is the head that was known when it was read.
    pub(crate) async fn tick(&self, before: LogPosition, head: &Head) {
        self.is_behind(before, head.at);
        self.note(head).await;
        self.feed.tick(head).await;
    }

    /// Ends the incarnation: the next publisher of this store begins another one.
    pub(crate) async fn end(&self) {
        let head = self.shared.history.head();
        self.feed.end(self.shared.history.voucher(&head, head.at)).await;
    }

    async fn note(&self, head: &Head) {
        if let Err(error) = self.shared.history.note(head).await {
            self.shared.metrics.store_failed(&error);
        }
        if let Some(ended) = self.shared.history.take_ended() {
            self.feed.end(ended).await;
        }
        self.shared.head.advance(head.at);
        self.shared.metrics.head(head.at);
    }

    /// Returns whether the store went back. Requests a round then, which compares its server's history.
    fn is_behind(&self, before: LogPosition, head: LogPosition) -> bool {
        let is_behind = head < before;
        if is_behind {
            if let Some(unlogged) = log_limit!(1, "") {
                let unlogged = unlogged.field();
                tracing::warn!(%head, known = %before, unlogged, "home store is behind the known head");
            }
            self.shared.rounds.request();
        }
        is_behind
    }

    /// R1, as far as it shows here.
    fn check_density(&self, numbered: &Numbered) {
        let Numbered { rows, head, .. } = numbered;
        let ends_at_head = rows.last().is_some_and(|last| last.position == head.at);
        let is_dense = rows.windows(2).all(|pair| pair[0].position.next() == Some(pair[1].position));
        if !ends_at_head || !is_dense {
            let first = rows.first().map(|row| row.position);
            let found = format_args!("{} rows from {first:?} to the head {}", rows.len(), head.at);
            self.shared.invariants.violated(Rule::R1, found);
        }
    }
}
