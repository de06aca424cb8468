//! What others need of probe rounds: to ask for one, and to know when the last one succeeded (R7, R8).

use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::fence_age;
use evictd_core::history::RoundToken;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use tokio::sync::{Notify, watch};

use crate::vouching::Vouching;

/// A question starts a round if the last one is older: what isn't vouched for anew is soon worth nothing.
pub(crate) const FENCE_AGE_MAX: Duration = Duration::from_secs(1);

/// How long a verification at home waits for a round.
const VOUCHING_PATIENCE: Duration = Duration::from_secs(2);

/// The last successful round: when it began, and what it drew. Lookups carry its age: what they read may come from a
/// primary that was demoted since.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fence(watch::Sender<Option<(LeaseTime, RoundToken)>>);

impl Fence {
    /// When the last round began, and what it drew; `None` if there was no round yet.
    pub(crate) fn last(&self) -> Option<(LeaseTime, RoundToken)> {
        *self.0.borrow()
    }

    /// What the last round drew.
    pub(crate) fn round(&self) -> Option<RoundToken> {
        self.last().map(|(_, token)| token)
    }

    /// Decades if there was no round yet: nothing is vouched for.
    pub(crate) fn age(&self) -> Duration {
        fence_age(self.last().map(|(began, _)| began), clock::lease_now())
    }

    /// `None` if there was no round yet.
    pub(crate) fn raised_ago(&self) -> Option<Duration> {
        self.last().map(|(began, _)| clock::lease_now().since(began))
    }

    pub(crate) fn raised(&self, began: LeaseTime, token: RoundToken) {
        self.0.send_if_modified(|last| {
            let is_newer = last.is_none_or(|(before, _)| before < began);
            if is_newer {
                *last = Some((began, token));
            }
            is_newer
        });
    }

    /// Tells of each further round.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<(LeaseTime, RoundToken)>> {
        self.0.subscribe()
    }
}

/// How others ask for a round: there may be nobody who probes here, and yet something that rests on rounds.
#[derive(Clone, Debug, Default)]
pub(crate) struct RoundWish(Arc<Notify>);

impl RoundWish {
    /// A round is wanted; several wishes are one round.
    pub(crate) fn want(&self) {
        self.0.notify_one();
    }

    /// Returns when one is wanted.
    pub(crate) async fn wanted(&self) {
        self.0.notified().await;
    }
}

/// What this publisher's own verifications rest on, as an agent's do on its lease: a database that was demoted, or
/// put back, goes on being readable, and alone doesn't know.
#[derive(Clone, Debug)]
pub(crate) struct Vouched {
    pub(crate) fence: Fence,
    pub(crate) rounds: RoundWish,
    pub(crate) vouching: Vouching,
    /// How old the last round may be.
    pub(crate) trust: Duration,
}

impl Vouched {
    /// Whether a round is young enough to vouch for what is read from now on. Has one made if need be, and waits for
    /// it a while.
    pub(crate) async fn is_young(&self) -> bool {
        if self.fence.age() > FENCE_AGE_MAX {
            self.rounds.want();
        }
        let mut fence = self.fence.watch();
        let young = fence.wait_for(|_| self.fence.age() < self.trust);
        let waited = tokio::time::timeout(VOUCHING_PATIENCE, young).await;
        matches!(waited, Ok(Ok(_))) && self.vouching.may_finalize(clock::lease_now())
    }
}
