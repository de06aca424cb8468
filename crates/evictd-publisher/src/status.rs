//! `/status`: the log's head, and the agents that were heard.

use std::sync::Arc;

use evictd_core::position::LogPosition;
use evictd_store::HomeStore;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::authority::Fence;
use crate::confirmations::Confirmations;

/// How often the head shown is read.
const REFRESH: std::time::Duration = std::time::Duration::from_millis(500);

/// The closure behind `/status`. It answers from memory: a store that hangs must not hang this page.
pub(crate) fn status(
    store: Arc<dyn HomeStore>,
    confirmations: Arc<Confirmations>,
    fence: Fence,
    shutdown: CancellationToken,
) -> Arc<dyn Fn() -> Value + Send + Sync> {
    let head = Arc::new(Mutex::new(LogPosition::ZERO));
    let shown = head.clone();
    tokio::spawn(shutdown.run_until_cancelled_owned(async move {
        loop {
            if let Ok(read) = store.head().await {
                *head.lock() = read;
            }
            tokio::time::sleep(REFRESH).await;
        }
    }));
    Arc::new(move || {
        let head = *shown.lock();
        json!({
            "role": "publisher",
            "version": env!("CARGO_PKG_VERSION"),
            "epoch": head.epoch(),
            "headPosition": head.position(),
            "lastRoundMsAgo": u64::try_from(fence.age().as_millis()).unwrap_or(u64::MAX),
            "unconfirmedDeletions": confirmations.unconfirmed(),
            "agents": confirmations.agents(),
        })
    })
}
