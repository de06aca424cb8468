//! Announcements: how far each agent process is, and what it saw.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::history::{LogToken, Milestone, Past};
use evictd_core::ids::Identity;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_wire::applied::Applied;
use tokio_util::sync::CancellationToken;

use super::Receipts;
use crate::bus::Intake;
use crate::metrics::Refusal;

/// How often the store is asked because of what an announcement says: the head may be another publisher's
/// work, or the process new. The next announcement comes in a second.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// An announcement that claims more than there is.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Ahead;

impl Receipts {
    /// Hears announcements until `shutdown`.
    pub(crate) async fn hear(self: Arc<Self>, mut intake: Intake, shutdown: CancellationToken) {
        let mut asked = LeaseTime(0);
        while let Some(Some(heard)) = shutdown.run_until_cancelled(intake.next()).await {
            let Ok(announcement) = Applied::decode(&heard.payload) else {
                intake.refuse(Refusal::Malformed);
                continue;
            };
            self.metrics.announced();
            let identity = Identity {
                region: heard.speaker.region,
                agent: heard.speaker.agent,
                instance: announcement.instance,
            };
            if self.is_news(&identity, &announcement) && clock::lease_now().since(asked) >= ASK_EVERY {
                asked = clock::lease_now();
                self.catch_up().await;
            }
            if self.announced(&identity, &announcement) == Err(Ahead) {
                tracing::debug!(
                    region = %identity.region, agent = %identity.agent, applied = %announcement.applied,
                    "an agent claims more than the log holds"
                );
                intake.refuse(Refusal::Ahead);
            }
        }
    }

    /// Whether the store may know what this publisher doesn't.
    fn is_news(&self, identity: &Identity, announcement: &Applied) -> bool {
        let state = self.state.lock();
        let ahead = announcement.applied > state.head;
        ahead
            || (!announcement.leaving
                && !state.tracker.has_instance(identity)
                && !state.departed.contains(identity))
    }

    async fn catch_up(&self) {
        let asked = async {
            self.head(self.store.head().await?.at);
            self.read_roster_changes().await
        };
        if let Err(error) = asked.await {
            self.metrics.store_failed(&error);
        }
    }

    /// Takes an announcement in, unless it claims to have applied more than there is: that confirms nothing.
    pub(super) fn announced(&self, identity: &Identity, announcement: &Applied) -> Result<(), Ahead> {
        let (at, provenance) = (announcement.applied, announcement.provenance);
        let history = self.history.history();
        let (mut state, now) = self.lock();
        // What was applied of another history confirms nothing here.
        let applied = Milestone { provenance, at, token: LogToken::default() };
        let counts = at <= state.head && history.judge(&applied, state.head) == Past::Known;
        if !counts && !announcement.leaving {
            return Err(Ahead);
        }
        if announcement.leaving {
            // First what it has applied, and then that it doesn't count any more.
            if counts {
                state.tracker.record_applied(
                    identity,
                    announcement.applied,
                    &announcement.apply_reports,
                    now,
                );
            }
            // It may be listed by its probe alone: its row in the roster is still to be read, and must not count.
            let was_listed = state.tracker.has_instance(identity);
            state.tracker.mark_departed(identity, now);
            if state.known.remove(identity).is_some() || was_listed {
                state.departed.insert(identity.clone());
                self.look_again.notify_one();
            }
        } else {
            state.tracker.record_applied(identity, announcement.applied, &announcement.apply_reports, now);
            state.touch(identity, now);
        }
        self.settle(&mut state);
        Ok(())
    }
}
