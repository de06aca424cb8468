//! Which agent processes there are, as the store's roster tells (R11).

use std::collections::HashSet;
use std::time::Duration;

use evictd_core::ids::Identity;
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use evictd_store::StoreError;
use evictd_store::roster::{Roster, RosterEntry};

use super::{Receipts, State};

/// How often one process's sign of life is taken to the roster. There it changes something once a minute.
const TOUCH_EVERY: Duration = Duration::from_secs(15);

/// A row of the roster, as it was read last.
pub(super) struct Known {
    last_seen: StoreTime,
    /// When a sign of life last went with a round.
    touched: Option<LeaseTime>,
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
        let now = clock::lease_now();
        let mut state = self.state.lock();
        for entry in &roster.entries {
            state.register(entry, now);
        }
        Ok(())
    }

    /// Reads all of it: also who was heard by other publishers, and who can be forgotten.
    pub(super) async fn read_roster(&self) -> Result<(), StoreError> {
        let gone = {
            let mut revision = self.revision.lock().await;
            let roster = self.store.roster(0).await?;
            *revision = roster.revision;
            self.state.lock().compare(&roster, clock::lease_now())
        };
        if gone.is_empty() {
            return Ok(());
        }
        tracing::info!(processes = gone.len(), "forgetting agent processes that are gone");
        self.store.forget_instances(&gone).await
    }

    /// Whether receipts wait for this process. Asks the store before it says no: another publisher may have
    /// written the process into the roster a moment ago.
    pub(crate) async fn waits_for(&self, identity: &Identity) -> bool {
        if self.state.lock().book.knows(identity) {
            return true;
        }
        self.read_roster_changes().await.is_ok() && self.state.lock().book.knows(identity)
    }

    /// A process was heard. It is kept in the roster.
    pub(crate) fn heard(&self, identity: &Identity) {
        let now = clock::lease_now();
        let mut state = self.state.lock();
        state.book.heard(identity, now);
        state.touch(identity, now);
    }

    /// Who was heard since the last call, to go with a round. The roster's own time is coarse, so that each goes
    /// now and then only.
    pub(crate) fn take_heard(&self) -> Vec<Identity> {
        std::mem::take(&mut self.state.lock().heard)
    }
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

    fn register(&mut self, entry: &RosterEntry, now: LeaseTime) {
        let identity = &entry.instance.identity;
        if self.departed.contains(identity) {
            return;
        }
        self.book.registered(&entry.instance, now);
        let touched = self.known.get(identity).and_then(|known| known.touched);
        self.known.insert(identity.clone(), Known { last_seen: entry.last_seen, touched });
        self.series.region(&identity.region);
    }

    /// Compares the whole roster with what was known of it, and returns the rows that can go: of processes that
    /// said goodbye, and of those that nobody has heard for so long that they hold nothing any more.
    fn compare(&mut self, roster: &Roster, now: LeaseTime) -> Vec<(Identity, StoreTime)> {
        let mut gone = Vec::new();
        for entry in &roster.entries {
            let identity = &entry.instance.identity;
            let unchanged = self.known.get(identity).is_some_and(|known| known.last_seen == entry.last_seen);
            if self.departed.contains(identity) || (unchanged && !self.book.knows(identity)) {
                gone.push((identity.clone(), entry.last_seen));
            } else if !unchanged {
                self.register(entry, now);
            }
        }
        let listed: HashSet<&Identity> =
            roster.entries.iter().map(|entry| &entry.instance.identity).collect();
        let Self { known, book, departed, .. } = self;
        departed.retain(|identity| listed.contains(identity));
        known.retain(|identity, _| book.knows(identity) || listed.contains(identity));
        gone
    }
}
