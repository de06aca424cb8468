//! Reads of the roster, and what waits for them: receipts to open, announcements and lookups.

use std::time::Duration;

use evictd_core::ids::Identity;
use evictd_core::position::LogPosition;
use evictd_core::time::LeaseTime;
use evictd_store::StoreError;
use evictd_store::roster::Roster;
use evictd_wire::applied::Applied;
use evictd_wire::subject::MessageKind;

use super::{Deferred, PAUSE, ReceiptsTask, RosterRead};
use crate::metrics::Refusal;
use crate::receipts::input::NewChanges;
use crate::receipts::roster::RosterWrites;
use crate::receipts::state::{Ahead, ReceiptsState};
use crate::shared::Shared;

/// How often the whole roster is read, for what other publishers have received.
const ROSTER_EVERY: Duration = Duration::from_secs(15);

/// How often announcements may cause a read of the store. The next announcement comes in a second.
const CATCH_UP_EVERY: Duration = Duration::from_millis(50);

/// Announcements that may wait for such a read.
const ANNOUNCEMENTS_DEFERRED_MAX: usize = 4_096;

impl ReceiptsTask {
    /// Opens receipts after the roster was read: by then every process that may serve from before the changes stands in
    /// it (R12).
    pub(super) fn open(&mut self, changes: NewChanges) {
        if !changes.changes.is_empty() {
            self.work.deferred.changes.push(changes);
        }
    }

    /// Takes in an announcement. If the store may show more, that is read first: the head may be another publisher's
    /// work, or the process new.
    pub(super) fn on_announcement(&mut self, identity: Identity, announcement: Applied, now: LeaseTime) {
        let head = self.shared.head.current();
        let has_room = self.work.deferred.announcements.len() < ANNOUNCEMENTS_DEFERRED_MAX;
        if has_room && self.state.is_unknown(&identity, &announcement, head) {
            self.work.deferred.announcements.push((identity, announcement));
        } else {
            self.apply_announcement(&identity, &announcement, now).ok();
        }
    }

    pub(in crate::receipts) fn apply_announcement(
        &mut self,
        identity: &Identity,
        announcement: &Applied,
        now: LeaseTime,
    ) -> Result<(), Ahead> {
        let Shared { history, head, metrics, .. } = &self.shared;
        match self.state.announced(identity, announcement, (history, head.current()), now) {
            Ok(true) => (self.work.roster_due, self.work.adoption_due) = (now, now),
            Ok(false) => {}
            Err(Ahead) => {
                tracing::debug!(
                    region = %identity.region, agent = %identity.agent, applied = %announcement.applied,
                    "refused an announcement that is ahead of the log"
                );
                metrics.refused(MessageKind::Applied, Refusal::Ahead);
                return Err(Ahead);
            }
        }
        Ok(())
    }

    pub(super) fn read_roster(&mut self, now: LeaseTime) {
        let Deferred { changes, announcements, lookups } = &self.work.deferred;
        let is_whole = now >= self.work.roster_due && !self.work.is_writing_roster;
        let catches_up = now >= self.work.catch_up_due && !announcements.is_empty();
        let is_due = is_whole || catches_up || !changes.is_empty() || !lookups.is_empty();
        if self.work.roster_read.is_some() || !is_due {
            return;
        }
        let since = if is_whole { 0 } else { self.state.roster.revision() };
        if is_whole {
            self.work.roster_due = now.after(ROSTER_EVERY);
        }
        self.work.catch_up_due = now.after(CATCH_UP_EVERY);
        let deferred = std::mem::take(&mut self.work.deferred);
        self.work.roster_read = Some(RosterRead { since, before: self.shared.head.current(), deferred });
        let store = self.store.clone();
        let read = async move { Ok((store.roster(since).await?, store.head().await?.at)) };
        self.start(read, Self::on_roster_read);
    }

    pub(super) fn on_roster_read(&mut self, read: Result<(Roster, LogPosition), StoreError>) {
        let Some(RosterRead { since, before, mut deferred }) = self.work.roster_read.take() else { return };
        if let Ok((_, head)) = &read {
            self.shared.head.advance(*head);
        }
        let now = self.begin_step();
        match read {
            Ok((roster, _)) if roster.revision < since => {
                // The store was put back: what is known of its roster means nothing.
                self.work.roster_due = now;
                deferred.append(&mut self.work.deferred);
                self.work.deferred = deferred;
                return;
            }
            Ok((roster, head)) => {
                self.take_in(since, &roster, now);
                if head < before {
                    // The store went back. What agents have applied of the lost history must not confirm what replaced it.
                    self.shared.rounds.request();
                } else {
                    let epoch = self.shared.head.current().epoch();
                    let current = deferred.changes.drain(..).filter(|new| new.epoch == epoch);
                    for NewChanges { changes, opened, .. } in current {
                        self.state.track(changes, now);
                        drop(opened);
                    }
                }
            }
            Err(error) => {
                // Receipts that weren't opened are found in the store later.
                self.shared.metrics.store_failed(&error);
                if since == 0 {
                    self.work.roster_due = now.after(PAUSE);
                }
                deferred.lookups.clear();
            }
        }
        for (identity, announcement) in deferred.announcements {
            self.apply_announcement(&identity, &announcement, now).ok();
        }
        for (identity, reply) in deferred.lookups {
            reply.send(self.state.saw(&identity, now)).ok();
        }
    }

    pub(super) fn take_in(&mut self, since: u64, roster: &Roster, now: LeaseTime) {
        let ReceiptsState { roster: mirror, tracker, regions, .. } = &mut self.state;
        roster.entries.iter().for_each(|entry| regions.add(&entry.instance.identity.region));
        if since > 0 {
            mirror.update(roster, tracker, now);
        } else {
            let writes = mirror.replace(roster, tracker, now);
            self.write_roster(writes);
        }
    }

    pub(super) fn write_roster(&mut self, writes: RosterWrites) {
        if writes.is_empty() {
            return;
        }
        if !writes.gone.is_empty() {
            tracing::info!(
                processes = writes.names_of_gone(),
                "deleting roster rows of agent processes that are gone"
            );
        }
        self.work.is_writing_roster = true;
        let (store, epoch) = (self.store.clone(), self.shared.head.current().epoch());
        let written = async move {
            if writes.is_complete {
                store.mark_roster_complete(epoch).await?;
            }
            store.mark_departed(&writes.departed).await?;
            store.remove_instances(&writes.gone).await
        };
        self.start(written, Self::on_roster_written);
    }

    fn on_roster_written(&mut self, written: Result<(), StoreError>) {
        self.work.is_writing_roster = false;
        if let Err(error) = written {
            self.shared.metrics.store_failed(&error);
        }
    }
}
