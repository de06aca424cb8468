//! `/status`: the log's head, and the agents that were heard.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::authority::Fence;
use crate::confirmations::Confirmations;

/// The closure behind `/status`. It answers from memory: a store that hangs must not hang this page.
pub(crate) fn status(
    confirmations: Arc<Confirmations>,
    fence: Fence,
) -> Arc<dyn Fn() -> Value + Send + Sync> {
    Arc::new(move || {
        let head = confirmations.log_head();
        json!({
            "role": "publisher",
            "version": env!("CARGO_PKG_VERSION"),
            "epoch": head.epoch(),
            "headPosition": head.position(),
            "lastRoundMsAgo": fence.raised_ago().map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            "unconfirmedDeletions": confirmations.unconfirmed(),
            "agents": confirmations.agents(),
        })
    })
}
