//! Announcements: how far each agent process has applied the log, and what it measured.

use evictd_wire::applied::Applied;
use tokio_util::sync::CancellationToken;

use crate::bus::Subscription;
use crate::metrics::Refusal;
use crate::receipts::Receipts;

/// Passes announcements on to receipts until `shutdown`.
pub(crate) async fn receive(
    mut announcements: Subscription,
    receipts: Receipts,
    shutdown: CancellationToken,
) {
    while let Some(Some(envelope)) = shutdown.run_until_cancelled(announcements.next()).await {
        match Applied::decode(&envelope.payload) {
            Ok(announcement) => {
                let identity = envelope.identity(announcement.instance);
                receipts.announced(identity, announcement).await;
            }
            Err(_) => announcements.refuse(Refusal::Malformed),
        }
    }
}
