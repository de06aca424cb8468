//! What other parts need of probe rounds: to request one, and to know how old the last one is (R7, R8).

use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::fence_age;
use evictd_core::history::RoundToken;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use tokio::sync::{Notify, watch};

use crate::vouching::Vouching;

/// A query requests a round if the last one is older: its proof expires soon.
pub(crate) const FENCE_AGE_MAX: Duration = Duration::from_secs(1);

/// How long a local verification waits for a round.
const FRESHNESS_PATIENCE: Duration = Duration::from_secs(2);

/// The last successful round: when it began, and the token that it drew. Lookup answers carry its age, because the
/// server that they were read from may have been demoted since.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fence(watch::Sender<Option<(LeaseTime, RoundToken)>>);

impl Fence {
    /// Returns when the last round began and its token; `None` before the first round.
    pub(crate) fn last(&self) -> Option<(LeaseTime, RoundToken)> {
        *self.0.borrow()
    }

    /// Returns decades before the first round: no read is proven then.
    pub(crate) fn age(&self) -> Duration {
        fence_age(self.last().map(|(began, _)| began), clock::lease_now())
    }

    /// Returns the time since the last round began; `None` before the first round.
    pub(crate) fn raised_ago(&self) -> Option<Duration> {
        self.last().map(|(began, _)| clock::lease_now().since(began))
    }

    /// Notes a successful round, unless a later one was noted already.
    pub(crate) fn raise(&self, began: LeaseTime, token: RoundToken) {
        self.0.send_if_modified(|last| {
            let is_newer = last.is_none_or(|(before, _)| before < began);
            if is_newer {
                *last = Some((began, token));
            }
            is_newer
        });
    }

    /// Signals each further round.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<(LeaseTime, RoundToken)>> {
        self.0.subscribe()
    }
}

/// Requests a round when no agent is probing but something else needs one.
#[derive(Clone, Debug, Default)]
pub(crate) struct RoundTrigger(Arc<Notify>);

impl RoundTrigger {
    /// Requests a round. Several requests are served by one round.
    pub(crate) fn request(&self) {
        self.0.notify_one();
    }

    /// Completes when a round has been requested.
    pub(crate) async fn requested(&self) {
        self.0.notified().await;
    }
}

/// What this publisher's own verifications rest on, as an agent's rest on its lease: a demoted or restored database
/// stays readable, and its reads alone don't show that it is out of date.
#[derive(Clone, Debug)]
pub(crate) struct FreshnessGuard {
    pub(crate) fence: Fence,
    pub(crate) rounds: RoundTrigger,
    pub(crate) vouching: Vouching,
    /// The greatest age of a round that proves a read.
    pub(crate) trust: Duration,
}

impl FreshnessGuard {
    /// Returns whether a round is recent enough to prove reads from now on. Requests one if need be, and waits for it
    /// for [`FRESHNESS_PATIENCE`].
    pub(crate) async fn is_fresh(&self) -> bool {
        if self.fence.age() > FENCE_AGE_MAX {
            self.rounds.request();
        }
        let mut fence = self.fence.watch();
        let fresh = fence.wait_for(|_| self.fence.age() < self.trust);
        let waited = tokio::time::timeout(FRESHNESS_PATIENCE, fresh).await;
        matches!(waited, Ok(Ok(_))) && self.vouching.may_finalize(clock::lease_now())
    }
}
