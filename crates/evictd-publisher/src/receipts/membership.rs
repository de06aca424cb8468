//! The agent processes behind probes and lookups, which receipts have to wait for (R11).

use std::time::Duration;

use evictd_core::ids::Identity;
use evictd_core::roster::Instance;
use evictd_ops::log_limit;
use evictd_wire::probe::ProbeRefusal;
use tokio::sync::{mpsc, oneshot};

use super::input::ReceiptInput;
use crate::metrics::Refusal;

#[derive(Clone)]
pub(crate) struct Membership {
    pub(super) queue: mpsc::Sender<ReceiptInput>,
    pub(super) bound: Duration,
}

impl Membership {
    /// Admits a process that requests a lease. From here on receipts wait for it: before the round that writes it into
    /// the roster, and however long it was silent (R11).
    pub(crate) async fn admit(&self, instance: &Instance) -> Result<(), (Refusal, ProbeRefusal)> {
        let Instance { identity, bound, .. } = instance;
        if *bound > self.bound {
            if let Some(unlogged) = log_limit!(1, format_args!("{}.{}", identity.region, identity.agent)) {
                tracing::warn!(
                    region = %identity.region, agent = %identity.agent, ?bound, limit = ?self.bound,
                    unlogged = unlogged.field(),
                    "refused an agent whose lease.bound exceeds this publisher's receipts.bound; change one of them"
                );
            }
            return Err((Refusal::Bound, ProbeRefusal::Bound { limit: self.bound }));
        }
        let probed = |reply| ReceiptInput::Probed { instance: instance.clone(), reply };
        if self.query(probed).await.unwrap_or(false) {
            return Ok(());
        }
        if let Some(unlogged) = log_limit!(1, format_args!("{}.{}", identity.region, identity.agent)) {
            tracing::warn!(
                region = %identity.region, agent = %identity.agent, unlogged = unlogged.field(),
                "refused an agent process: too many run under this name; give each its own"
            );
        }
        Err((Refusal::Overload, ProbeRefusal::Crowded))
    }

    /// Notes a lookup, and returns whether receipts wait for the process that sent it. The roster is read before the
    /// answer is no: another publisher may have just written the process into it.
    pub(crate) async fn looked_up(&self, identity: &Identity) -> bool {
        self.query(|reply| ReceiptInput::LookedUp { identity: identity.clone(), reply })
            .await
            .unwrap_or(false)
    }

    /// Returns the processes that have sent something since the last call, for a round to refresh their rows.
    pub(crate) async fn take_seen(&self) -> Vec<Identity> {
        self.query(|reply| ReceiptInput::TakeSeen { reply }).await.unwrap_or_default()
    }

    /// `None` if the task has ended, or gave no answer.
    async fn query<T>(&self, input: impl FnOnce(oneshot::Sender<T>) -> ReceiptInput) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.queue.send(input(reply)).await.ok()?;
        answer.await.ok()
    }
}
