//! `/status`: the log's head, open receipts, and the agents that they wait for.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use crate::receipts::ReceiptsSnapshot;
use crate::shared::Shared;

/// Answers from memory: a store that hangs must not hang this page.
pub(crate) struct Status {
    pub(crate) bound: Duration,
    pub(crate) receipts: watch::Receiver<ReceiptsSnapshot>,
    pub(crate) shared: Shared,
}

/// The page while the home store isn't open.
pub(crate) fn before_the_store_is_open() -> Value {
    json!({
        "role": "publisher",
        "version": env!("CARGO_PKG_VERSION"),
        "silentBecause": "the home store isn't open yet; /readyz has the reason",
    })
}

impl Status {
    pub(crate) fn to_json(&self) -> Value {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let head = self.shared.head.current();
        let provenance = self.shared.history.history().provenance();
        let receipts = self.receipts.borrow();
        json!({
            "role": "publisher",
            "version": env!("CARGO_PKG_VERSION"),
            "homeStore": provenance.store.to_string(),
            "incarnation": provenance.incarnation.to_string(),
            "standing": self.shared.vouching.standing().label(),
            "silentBecause": self.shared.vouching.refusal(),
            "silentRival": self.shared.vouching.silent_rival(),
            "epoch": head.epoch(),
            "headPosition": head.position(),
            "lastRoundMsAgo": self.shared.fence.raised_ago().map(millis),
            "unconfirmedDeletions": receipts.unconfirmed,
            "receipts": {
                "open": receipts.open,
                "unrecorded": receipts.unstored,
                "boundMs": millis(self.bound),
                "configuredRegions": receipts.configured_regions,
            },
            "agents": receipts.agents(),
        })
    }
}
