//! The authority as the origin of records: lookups over the bus (R10).
//!
//! Answers are matched with their queries here, and not by the client's own request support, which keeps every
//! unanswered request forever. An agent sends most lookups when no publisher answers.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Message, Subscriber};
use async_trait::async_trait;
use evictd_core::follower::LoadSource;
use evictd_core::ids::{InstanceId, KeyHash};
use evictd_core::record::Lookup;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::readiness::Condition;
use evictd_ops::time::Backoff;
use evictd_wire::lookup::{LookupAnswer, LookupOutcome, LookupRequest};
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::bus::{LookupPort, is_no_responders, lookup_nonce};
use crate::metrics::{AgentMetrics, Incoming, LoadOutcome};

#[derive(Clone, Debug)]
pub(crate) struct LoadedRecord {
    pub(crate) lookup: Lookup,
    pub(crate) source: LoadSource,
    /// When the query was sent, less the age of the authority's last fence (R8).
    pub(crate) read_at: LeaseTime,
}

/// The reason that there is no fresh record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The limit of loads is reached here, or the authority shed the lookup.
    #[error("too many records are being loaded")]
    Busy,
    #[error("no publisher answered")]
    Unreachable,
    /// Two loads in a row were older than the applied changes.
    #[error("the loaded record is too old")]
    Stale,
}

/// A source of records.
#[async_trait]
pub(crate) trait Origin: Debug + Send + Sync {
    /// Returns the record behind `hash`, read after the call.
    async fn lookup(&self, hash: KeyHash) -> Result<LoadedRecord, (LoadOutcome, LoadError)>;
}

/// Bounds of the pause between two tries. The connection may come up within milliseconds, or be down for hours.
const RETRY: Backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_secs(1) };

/// The authority, over the bus.
#[derive(Clone, Debug)]
pub(crate) struct BusOrigin {
    port: LookupPort,
    instance: InstanceId,
    timeout: Duration,
    pending: Arc<Mutex<HashMap<u64, PendingLookup>>>,
    next_nonce: Arc<AtomicU64>,
}

#[derive(Debug)]
struct PendingLookup {
    hash: KeyHash,
    /// Receives `None` if no publisher subscribes.
    answer: oneshot::Sender<Option<LookupOutcome>>,
}

#[async_trait]
impl Origin for BusOrigin {
    /// Queries one publisher. If no answer arrives, queries all of them, since core NATS may lose a message and the
    /// first publisher may be frozen (R14). The first answer counts.
    async fn lookup(&self, hash: KeyHash) -> Result<LoadedRecord, (LoadOutcome, LoadError)> {
        match self.query(hash, false).await {
            Err((LoadOutcome::Timeout, _)) => self.query(hash, true).await,
            done => done,
        }
    }
}

impl BusOrigin {
    pub(crate) fn new(port: LookupPort, instance: InstanceId, timeout: Duration) -> Self {
        Self { port, instance, timeout, pending: Arc::default(), next_nonce: Arc::new(AtomicU64::new(1)) }
    }

    /// Sends lookups for a key that doesn't exist until a publisher answers, then meets `works`. Only a lookup shows
    /// that its permission is missing, and the first client must not be the one to find out. Returns at `shutdown`.
    pub(crate) async fn await_first_answer(self, works: Condition, shutdown: CancellationToken) {
        let answered = async {
            let mut failures = 0_u32;
            // `Busy` is an answer, too.
            while let Err((outcome, _)) = self.lookup(KeyHash([0; 32])).await
                && outcome != LoadOutcome::Busy
            {
                tokio::time::sleep(RETRY.pause(failures)).await;
                failures = failures.saturating_add(1);
            }
            works.met();
        };
        shutdown.run_until_cancelled(answered).await;
        shutdown.cancelled().await;
    }

    async fn query(&self, hash: KeyHash, all: bool) -> Result<LoadedRecord, (LoadOutcome, LoadError)> {
        let nonce = self.next_nonce.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.pending.lock().insert(nonce, PendingLookup { hash, answer });
        // Removes the entry even if this future is dropped, so that entries can't pile up.
        let _guard = PendingGuard { pending: &self.pending, nonce };
        let sent_at = clock::lease_now();
        let request = LookupRequest { nonce, hash, instance: self.instance };
        if !self.port.send(&request, all).await {
            return Err((LoadOutcome::Unsent, LoadError::Unreachable));
        }
        match tokio::time::timeout(self.timeout, answered).await {
            Ok(Ok(Some(LookupOutcome::Found { lookup, fence_age }))) => {
                let source = LoadSource::Authority(lookup.provenance);
                Ok(LoadedRecord { lookup, source, read_at: sent_at.before(fence_age) })
            }
            Ok(Ok(Some(LookupOutcome::Busy))) => Err((LoadOutcome::Busy, LoadError::Busy)),
            Ok(Ok(None)) => Err((LoadOutcome::NoPublisher, LoadError::Unreachable)),
            Ok(Err(_)) | Err(_) => Err((LoadOutcome::Timeout, LoadError::Unreachable)),
        }
    }

    /// Passes answers to their queries until `shutdown`.
    pub(crate) async fn run(
        self,
        mut answers: Subscriber,
        metrics: Arc<AgentMetrics>,
        shutdown: CancellationToken,
    ) {
        while let Some(Some(message)) = shutdown.run_until_cancelled(answers.next()).await {
            self.on_answer(&message, &metrics);
        }
    }

    fn on_answer(&self, message: &Message, metrics: &AgentMetrics) {
        let incoming = Incoming::Lookup;
        if is_no_responders(message) {
            if let Some(lookup) = lookup_nonce(message).and_then(|nonce| self.pending.lock().remove(&nonce)) {
                drop(lookup.answer.send(None));
            }
            return;
        }
        let answer = match LookupAnswer::decode(&message.payload) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(%error, "ignored a lookup answer");
                return metrics.malformed(incoming);
            }
        };
        let lookup = {
            let mut pending = self.pending.lock();
            let matches = pending.get(&answer.nonce).is_some_and(|lookup| lookup.hash == answer.hash);
            if matches { pending.remove(&answer.nonce) } else { None }
        };
        match lookup {
            // The receiver may have given up meanwhile.
            Some(lookup) => drop(lookup.answer.send(Some(answer.outcome))),
            // The answer is late, or another publisher answered a second try first.
            None => metrics.unasked(incoming),
        }
    }
}

struct PendingGuard<'a> {
    pending: &'a Mutex<HashMap<u64, PendingLookup>>,
    nonce: u64,
}

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        self.pending.lock().remove(&self.nonce);
    }
}

#[cfg(test)]
mod tests;
