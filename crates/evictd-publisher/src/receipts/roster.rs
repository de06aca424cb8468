//! Which agent processes there are, as the store's roster tells (R11).

use std::collections::HashSet;
use std::time::Duration;

use evictd_core::ids::Identity;
use evictd_core::roster::{Instance, RosterEntry};
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use evictd_store::StoreError;
use evictd_store::roster::Roster;

use super::{Receipts, State};

/// How often one process's sign of life is taken to the roster. There it changes something once a minute.
const TOUCH_EVERY: Duration = Duration::from_secs(15);

/// A row whose process nobody heard for so long goes. It is longer than the roster's own time is old, so that
/// whoever comes back later finds the row gone, or refreshes it first: then it stays.
const KEEP_ROWS: Duration = Duration::from_mins(5);

/// Forgotten processes that the log names.
const NAMES_MAX: usize = 20;

/// A row of the roster, as it was read last.
pub(super) struct Known {
    last_seen: StoreTime,
    /// Since when the row says so, as far as noticed.
    since: LeaseTime,
    /// When a sign of life last went with a round.
    touched: Option<LeaseTime>,
}

/// Rows of the roster whose processes serve nothing any more.
#[derive(Default)]
struct Ended {
    /// They said goodbye, and the roster doesn't tell others yet.
    departed: Vec<Identity>,
    /// They can go: nobody has heard of them for so long that they hold nothing any more.
    gone: Vec<(Identity, StoreTime)>,
}

impl Receipts {
    /// Reads what the roster gained. Cheap if that is nothing.
    pub(super) async fn read_roster_changes(&self) -> Result<(), StoreError> {
        let mut revision = self.revision.lock().await;
        let roster = self.store.roster(*revision).await?;
        if roster.revision < *revision {
            // The store was put back: what this publisher knows of its roster means nothing.
            drop(revision);
            return self.read_roster().await;
        }
        *revision = roster.revision;
        let (mut state, now) = self.lock();
        state.note_completeness(&roster, now);
        for entry in &roster.entries {
            state.register(entry, now);
        }
        Ok(())
    }

    /// Reads all of it: also who was heard by other publishers, and who can be forgotten.
    pub(super) async fn read_roster(&self) -> Result<(), StoreError> {
        let Ended { departed, gone } = {
            let mut revision = self.revision.lock().await;
            let roster = self.store.roster(0).await?;
            *revision = roster.revision;
            let (mut state, now) = self.lock();
            state.note_completeness(&roster, now);
            state.compare(&roster, now)
        };
        self.trust_roster_again().await?;
        self.store.mark_departed(&departed).await?;
        if gone.is_empty() {
            return Ok(());
        }
        tracing::info!(processes = names(&gone), "forgetting agent processes that are gone");
        self.store.remove_instances(&gone).await
    }

    /// Tells the store when a bound has passed since the epoch began.
    async fn trust_roster_again(&self) -> Result<(), StoreError> {
        let epoch = {
            let mut state = self.state.lock();
            if state.distrusted_until.is_none_or(|until| clock::lease_now() < until) {
                return Ok(());
            }
            state.distrusted_until = None;
            state.head.epoch()
        };
        self.store.mark_roster_complete(epoch).await
    }

    /// A process asks for a proof. From here on receipts wait for it: before the round that writes it into the
    /// roster, and however long it was silent (R11).
    pub(crate) fn probed(&self, instance: &Instance) {
        let (mut state, now) = self.lock();
        state.departed.remove(&instance.identity);
        state.tracker.register(instance, now);
        state.tracker.record_contact(&instance.identity, now);
        state.series.region(&instance.identity.region);
    }

    /// How many processes were heard lately under this agent's name, besides this one.
    pub(crate) fn duplicate_instances(&self, identity: &Identity) -> usize {
        let state = self.state.lock();
        state.tracker.duplicate_instances(identity, clock::lease_now())
    }

    /// Whether receipts wait for this process. Asks the store before it says no: another publisher may have
    /// written the process into the roster a moment ago.
    pub(crate) async fn waits_for(&self, identity: &Identity) -> bool {
        if self.state.lock().tracker.has_instance(identity) {
            return true;
        }
        self.read_roster_changes().await.is_ok() && self.state.lock().tracker.has_instance(identity)
    }

    /// A process was heard. It is kept in the roster.
    pub(crate) fn heard(&self, identity: &Identity) {
        let (mut state, now) = self.lock();
        state.tracker.record_contact(identity, now);
        state.touch(identity, now);
    }

    /// Who was heard since the last call, to go with a round. The roster's own time is coarse, so that each goes
    /// now and then only.
    pub(crate) fn take_heard(&self) -> Vec<Identity> {
        std::mem::take(&mut self.state.lock().heard)
    }
}

/// Names for the log: of the first few, and how many more there are.
fn names(gone: &[(Identity, StoreTime)]) -> String {
    let name = |Identity { region, agent, instance }: &Identity| format!("{region}/{agent}/{instance}");
    let mut names: Vec<String> = gone.iter().take(NAMES_MAX).map(|(identity, _)| name(identity)).collect();
    if gone.len() > NAMES_MAX {
        names.push(format!("and {} more", gone.len() - NAMES_MAX));
    }
    names.join(", ")
}

impl State {
    pub(super) fn touch(&mut self, identity: &Identity, now: LeaseTime) {
        if let Some(known) = self.known.get_mut(identity)
            && known.touched.is_none_or(|touched| now.since(touched) >= TOUCH_EVERY)
        {
            known.touched = Some(now);
            self.heard.push(identity.clone());
        }
    }

    /// Receipts aren't final early while the roster may lack somebody.
    pub(super) fn distrust_roster(&mut self, now: LeaseTime) {
        let until = now.after(self.tracker.bound());
        self.distrusted_until = Some(until);
        self.tracker.distrust_roster(until);
    }

    fn note_completeness(&mut self, roster: &Roster, now: LeaseTime) {
        if !roster.is_complete && self.distrusted_until.is_none() {
            self.distrust_roster(now);
        }
    }

    fn register(&mut self, entry: &RosterEntry, now: LeaseTime) {
        let identity = &entry.instance.identity;
        if self.departed.contains(identity) {
            return;
        }
        if entry.may_hold_lease() {
            self.tracker.register(&entry.instance, now);
        } else {
            self.tracker.mark_departed(identity, now);
        }
        let known = self.known.get(identity);
        let touched = known.and_then(|known| known.touched);
        let since = known.filter(|known| known.last_seen == entry.last_seen).map_or(now, |known| known.since);
        self.known.insert(identity.clone(), Known { last_seen: entry.last_seen, since, touched });
        self.series.region(&identity.region);
    }

    /// Compares the whole roster with what was known of it.
    fn compare(&mut self, roster: &Roster, now: LeaseTime) -> Ended {
        let mut ended = Ended::default();
        for entry in &roster.entries {
            let identity = &entry.instance.identity;
            let known = self.known.get(identity).filter(|known| known.last_seen == entry.last_seen);
            let is_old = known.is_some_and(|known| now.since(known.since) >= KEEP_ROWS);
            if is_old && !self.tracker.has_instance(identity) {
                ended.gone.push((identity.clone(), entry.last_seen));
            } else if self.departed.contains(identity) {
                if entry.departed {
                    self.departed.remove(identity);
                } else {
                    ended.departed.push(identity.clone());
                }
            } else if known.is_none() {
                self.register(entry, now);
            }
        }
        let listed: HashSet<&Identity> =
            roster.entries.iter().map(|entry| &entry.instance.identity).collect();
        let Self { known, tracker, departed, .. } = self;
        departed.retain(|identity| listed.contains(identity));
        known.retain(|identity, _| tracker.has_instance(identity) || listed.contains(identity));
        ended
    }
}
