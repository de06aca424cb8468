//! `/status`: the log's head, receipts on their way, and the agents that they wait for.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::history::HomeHistory;
use crate::receipts::Receipts;
use crate::rounds::Fence;
use crate::vouching::Vouching;

/// The closure behind `/status`. It answers from memory: a store that hangs must not hang this page.
pub(crate) fn status(
    receipts: Arc<Receipts>,
    fence: Fence,
    history: Arc<HomeHistory>,
    vouching: Vouching,
) -> Arc<dyn Fn() -> Value + Send + Sync> {
    Arc::new(move || {
        let head = receipts.log_head();
        let provenance = history.history().provenance();
        json!({
            "role": "publisher",
            "version": env!("CARGO_PKG_VERSION"),
            "homeStore": provenance.store.to_string(),
            "incarnation": provenance.incarnation.to_string(),
            "standing": vouching.standing().label(),
            "silentBecause": vouching.refusal(),
            "epoch": head.epoch(),
            "headPosition": head.position(),
            "lastRoundMsAgo": fence.raised_ago().map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            "unconfirmedDeletions": receipts.unconfirmed(),
            "receipts": receipts.status(),
            "agents": receipts.agents(),
        })
    })
}
