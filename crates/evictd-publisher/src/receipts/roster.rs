//! The roster as it was read last, and what is to be written to it (R11).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use evictd_core::ids::Identity;
use evictd_core::receipts::ReceiptTracker;
use evictd_core::roster::RosterEntry;
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_store::roster::Roster;

/// How often one process's row is to be refreshed. A refresh changes the row once a minute at most.
const REFRESH_EVERY: Duration = Duration::from_secs(15);

/// A row goes when its process has sent nothing to any publisher for so long. It exceeds the age of the roster's times, so
/// that a process that comes back finds its row gone, or refreshes it first.
const KEEP_ROWS: Duration = Duration::from_mins(5);

/// Processes that the log names at once.
const NAMES_MAX: usize = 20;

#[derive(Default)]
pub(super) struct RosterMirror {
    revision: u64,
    rows: BTreeMap<Identity, RosterRow>,
    /// Processes that have left, but whose row doesn't show that to other publishers yet.
    departed: BTreeSet<Identity>,
    /// Processes that have sent something since the last round.
    seen: Vec<Identity>,
    /// Until then the roster may lack processes, because an epoch has begun.
    distrusted_until: Option<LeaseTime>,
}

struct RosterRow {
    last_seen: StoreTime,
    /// When this publisher first read the row with this `last_seen`.
    since: LeaseTime,
    /// When a round last refreshed it.
    refreshed: Option<LeaseTime>,
}

/// What is to be written to the roster.
#[derive(Default)]
pub(super) struct RosterWrites {
    /// Whether the roster is complete again.
    pub(super) is_complete: bool,
    /// Processes that have left.
    pub(super) departed: Vec<Identity>,
    /// Rows to delete, unless they have been refreshed.
    pub(super) gone: Vec<(Identity, StoreTime)>,
}

impl RosterMirror {
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn has_departed(&self, identity: &Identity) -> bool {
        self.departed.contains(identity)
    }

    pub(super) fn take_seen(&mut self) -> Vec<Identity> {
        std::mem::take(&mut self.seen)
    }

    /// Notes that a process has sent something. Only rows that exist are refreshed.
    pub(super) fn saw(&mut self, identity: &Identity, now: LeaseTime) {
        if let Some(row) = self.rows.get_mut(identity)
            && row.refreshed.is_none_or(|refreshed| now.since(refreshed) >= REFRESH_EVERY)
        {
            row.refreshed = Some(now);
            self.seen.push(identity.clone());
        }
    }

    /// Notes that a process requests a lease, perhaps after it had left.
    pub(super) fn probed(&mut self, identity: &Identity) {
        self.departed.remove(identity);
    }

    /// Notes that a process has left; `is_member` if receipts waited for it. It may be so because of its probe alone:
    /// then its row is still to be read, and must not count. Returns whether the roster is to be read soon.
    pub(super) fn left(&mut self, identity: &Identity, is_member: bool) -> bool {
        let is_listed = self.rows.remove(identity).is_some() || is_member;
        if is_listed {
            self.departed.insert(identity.clone());
        }
        is_listed
    }

    /// Receipts aren't final early while the roster may lack processes.
    pub(super) fn distrust(&mut self, tracker: &mut ReceiptTracker, now: LeaseTime) {
        let until = now.after(tracker.bound());
        self.distrusted_until = Some(until);
        tracker.distrust_roster(until);
    }

    /// Takes in what the roster has gained.
    pub(super) fn update(&mut self, roster: &Roster, tracker: &mut ReceiptTracker, now: LeaseTime) {
        self.begin_update(roster, tracker, now);
        roster.entries.iter().for_each(|entry| self.register(entry, tracker, now));
    }

    /// Takes in all of the roster, and returns what is to be written to it.
    pub(super) fn replace(
        &mut self,
        roster: &Roster,
        tracker: &mut ReceiptTracker,
        now: LeaseTime,
    ) -> RosterWrites {
        self.begin_update(roster, tracker, now);
        let is_complete = self.distrusted_until.take_if(|until| now >= *until).is_some();
        let mut writes = RosterWrites { is_complete, ..RosterWrites::default() };
        for entry in &roster.entries {
            let identity = &entry.instance.identity;
            let row = self.rows.get(identity).filter(|row| row.last_seen == entry.last_seen);
            let is_old = row.is_some_and(|row| now.since(row.since) >= KEEP_ROWS);
            if is_old && !tracker.has_instance(identity) {
                writes.gone.push((identity.clone(), entry.last_seen));
            } else if self.departed.contains(identity) {
                if entry.departed {
                    self.departed.remove(identity);
                } else {
                    writes.departed.push(identity.clone());
                }
            } else if row.is_none() {
                self.register(entry, tracker, now);
            }
        }
        let listed: HashSet<&Identity> =
            roster.entries.iter().map(|entry| &entry.instance.identity).collect();
        self.departed.retain(|identity| listed.contains(identity));
        self.rows.retain(|identity, _| tracker.has_instance(identity) || listed.contains(identity));
        writes
    }

    fn begin_update(&mut self, roster: &Roster, tracker: &mut ReceiptTracker, now: LeaseTime) {
        self.revision = roster.revision;
        if !roster.is_complete && self.distrusted_until.is_none() {
            self.distrust(tracker, now);
        }
    }

    fn register(&mut self, entry: &RosterEntry, tracker: &mut ReceiptTracker, now: LeaseTime) {
        let identity = &entry.instance.identity;
        if self.departed.contains(identity) {
            return;
        }
        if entry.may_hold_lease() {
            tracker.register(&entry.instance, now);
        } else {
            tracker.mark_departed(identity, now);
        }
        let row = self.rows.get(identity);
        let refreshed = row.and_then(|row| row.refreshed);
        let since = row.filter(|row| row.last_seen == entry.last_seen).map_or(now, |row| row.since);
        let row = RosterRow { last_seen: entry.last_seen, since, refreshed };
        self.rows.insert(identity.clone(), row);
    }
}

impl RosterWrites {
    pub(super) fn is_empty(&self) -> bool {
        !self.is_complete && self.departed.is_empty() && self.gone.is_empty()
    }

    /// Returns the names of the first few rows to delete, and how many more there are.
    pub(super) fn names_of_gone(&self) -> String {
        let name = |(Identity { region, agent, instance }, _): &(Identity, StoreTime)| {
            format!("{region}/{agent}/{instance}")
        };
        let mut names: Vec<String> = self.gone.iter().take(NAMES_MAX).map(name).collect();
        if self.gone.len() > NAMES_MAX {
            names.push(format!("and {} more", self.gone.len() - NAMES_MAX));
        }
        names.join(", ")
    }
}
