//! Where records come from: the authority, by request and reply over the bus (R10).
//!
//! Questions and answers are matched here by number, not by the client's own request support: that one
//! keeps every unanswered question for ever, and an agent asks most when nobody answers.

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
use evictd_wire::lookup::{LookupAnswer, LookupOutcome, LookupRequest};
use evictd_wire::subject::MessageKind;
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::bus::{LookupPort, asked, nobody_listens};
use crate::metrics::{Incoming, LoadOutcome, Metrics};

/// A record as loaded.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) lookup: Lookup,
    /// Who read it.
    pub(crate) source: LoadSource,
    /// When the question was sent, less the age of the authority's last fence (R8).
    pub(crate) read_at: LeaseTime,
}

/// Why there is no fresh record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// Too many loads here, or the authority sheds them.
    #[error("too many records are being loaded")]
    Busy,
    /// No publisher answered.
    #[error("no publisher answered")]
    Unreachable,
    /// What arrived is older than what was applied here, twice.
    #[error("the record that arrived is too old")]
    Stale,
}

/// Where records come from.
#[async_trait]
pub(crate) trait Origin: Debug + Send + Sync {
    /// What `hash` stands for, read after the call.
    async fn lookup(&self, hash: KeyHash) -> Result<Loaded, (LoadOutcome, LoadError)>;
}

/// Pauses before another trial. The connection comes about within milliseconds, or may be away for hours.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// The authority, over the bus.
#[derive(Clone, Debug)]
pub(crate) struct Authority {
    port: LookupPort,
    instance: InstanceId,
    timeout: Duration,
    open: Arc<Mutex<HashMap<u64, Question>>>,
    next_nonce: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Question {
    hash: KeyHash,
    /// `None` if nobody listens.
    answer: oneshot::Sender<Option<LookupOutcome>>,
}

#[async_trait]
impl Origin for Authority {
    /// Asks once more if no answer comes, since core NATS may lose a message; then all publishers, since the
    /// one that was asked may be frozen (R14). The first answer counts.
    async fn lookup(&self, hash: KeyHash) -> Result<Loaded, (LoadOutcome, LoadError)> {
        for all in [false, true] {
            match self.ask(hash, all).await {
                Err((LoadOutcome::Timeout, _)) if !all => {}
                done => return done,
            }
        }
        Err((LoadOutcome::Timeout, LoadError::Unreachable))
    }
}

impl Authority {
    pub(crate) fn new(port: LookupPort, instance: InstanceId, timeout: Duration) -> Self {
        Self { port, instance, timeout, open: Arc::default(), next_nonce: Arc::new(AtomicU64::new(1)) }
    }

    /// Asks for nobody's key until a publisher answers, which meets `works`: a permission that lookups lack shows in
    /// nothing else, and had better not wait for the first client. Returns at `shutdown`.
    pub(crate) async fn try_out(self, works: Condition, shutdown: CancellationToken) {
        let trying = async {
            let mut pause = FIRST_PAUSE;
            while let Err((outcome, _)) = self.lookup(KeyHash([0; 32])).await {
                if outcome == LoadOutcome::Busy {
                    // That is an answer.
                    break;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            works.met();
        };
        shutdown.run_until_cancelled(trying).await;
        shutdown.cancelled().await;
    }

    async fn ask(&self, hash: KeyHash, all: bool) -> Result<Loaded, (LoadOutcome, LoadError)> {
        let nonce = self.next_nonce.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.open.lock().insert(nonce, Question { hash, answer });
        // Dropped with this future, whoever drops it: open questions can't pile up.
        let _open = Open { open: &self.open, nonce };
        let sent_at = clock::lease_now();
        let request = LookupRequest { nonce, hash, instance: self.instance };
        if !self.port.send(&request, all).await {
            return Err((LoadOutcome::Unsent, LoadError::Unreachable));
        }
        match tokio::time::timeout(self.timeout, answered).await {
            Ok(Ok(Some(LookupOutcome::Found { lookup, fence_age }))) => {
                let source = LoadSource::Authority(lookup.provenance);
                Ok(Loaded { lookup, source, read_at: sent_at.before(fence_age) })
            }
            Ok(Ok(Some(LookupOutcome::Busy))) => Err((LoadOutcome::Busy, LoadError::Busy)),
            Ok(Ok(None)) => Err((LoadOutcome::NoPublisher, LoadError::Unreachable)),
            Ok(Err(_)) | Err(_) => Err((LoadOutcome::Timeout, LoadError::Unreachable)),
        }
    }

    /// Hands answers to their questions until `shutdown`.
    pub(crate) async fn run(
        self,
        mut answers: Subscriber,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
    ) {
        while let Some(Some(message)) = shutdown.run_until_cancelled(answers.next()).await {
            self.on_answer(&message, &metrics);
        }
    }

    fn on_answer(&self, message: &Message, metrics: &Metrics) {
        let incoming = Incoming::Answer(MessageKind::Lookup);
        if nobody_listens(message) {
            if let Some(question) = asked(message).and_then(|nonce| self.open.lock().remove(&nonce)) {
                drop(question.answer.send(None));
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
        let question = {
            let mut open = self.open.lock();
            let fits = open.get(&answer.nonce).is_some_and(|question| question.hash == answer.hash);
            if fits { open.remove(&answer.nonce) } else { None }
        };
        match question {
            // The asker may have given up meanwhile.
            Some(question) => drop(question.answer.send(Some(answer.outcome))),
            // Late, or another publisher was quicker to answer a second try.
            None => metrics.unasked(incoming),
        }
    }
}

struct Open<'a> {
    open: &'a Mutex<HashMap<u64, Question>>,
    nonce: u64,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.open.lock().remove(&self.nonce);
    }
}

#[cfg(test)]
mod tests;
