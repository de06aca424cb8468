//! The home store: rows, positions, epochs, snapshots. Each method is one transaction.

use std::time::Duration;

use evictd_core::epochs;
use evictd_core::history::{
    Begin, BeginCause, Claim, History, Incarnation, LogToken, Milestone, Provenance, StoreId, Voucher,
};
use evictd_core::log::{self, LoggedRow};
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;

use crate::script::{ChangeId, View};
use crate::world::Tick;

/// A place in the log of one incarnation. All stores of a world are the primary or copies of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Mark {
    pub at: LogPosition,
    /// Which incarnation gave it.
    pub incarnation: Incarnation,
}

impl Mark {
    pub fn provenance(self) -> Provenance {
        Provenance { store: StoreId(1), incarnation: self.incarnation }
    }

    /// No two transactions of one incarnation give the same position here, so that one token does for all of them.
    pub fn token(self) -> LogToken {
        LogToken(self.incarnation.0)
    }

    /// As messages carry it.
    pub fn voucher(self) -> Voucher {
        let milestone = Milestone { provenance: self.provenance(), at: self.at, token: self.token() };
        Voucher { milestone, mac: [0; 16] }
    }

    /// The inverse of [`Mark::voucher`].
    pub fn of(voucher: &Voucher) -> Self {
        let Milestone { provenance, at, .. } = voucher.milestone;
        Self { at, incarnation: provenance.incarnation }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ModelRow {
    pub change: ChangeId,
    pub at: Tick,
    /// Its place in the log, once the sequencer was there (R1).
    pub position: Option<LogPosition>,
}

/// The answer to a replay: the rows from the first requested one on, or the head, if the range can't be covered.
pub type ModelReplay = Result<Vec<(LogPosition, ChangeId)>, Mark>;

/// A home store, the primary or a copy of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ModelStore {
    pub rows: Vec<ModelRow>,
    /// The last position given.
    pub head: LogPosition,
    /// So many of the oldest rows were purged from the log.
    purged: usize,
    /// The timeline that its head was written on.
    timeline: u32,
    begins: Vec<Begin>,
}

impl Default for ModelStore {
    fn default() -> Self {
        let head = LogPosition::new(1, 0).unwrap_or(LogPosition::ZERO);
        let begins = vec![begin(1, LogPosition::ZERO, head, BeginCause::Created)];
        Self { rows: Vec::new(), head, purged: 0, timeline: 1, begins }
    }
}

fn begin(timeline: u32, after: LogPosition, at: LogPosition, cause: BeginCause) -> Begin {
    // One begins on each timeline at most.
    let incarnation = Incarnation(timeline.into());
    Begin { incarnation, after, at, cause, time: StoreTime(0), evidence: None }
}

impl ModelStore {
    /// The changes that a snapshot includes now.
    pub fn view(&self) -> View {
        self.rows.iter().map(|row| row.change).collect()
    }

    /// The changes whose positions lie at or below `applied`.
    pub fn covered(&self, applied: LogPosition) -> View {
        let covered = self.rows.iter().filter(|row| row.position.is_some_and(|position| position <= applied));
        covered.map(|row| row.change).collect()
    }

    /// Whether [`ModelStore::number`] would change anything.
    pub fn is_numbered(&self) -> bool {
        self.rows.iter().all(|row| row.position.is_some())
    }

    /// The head, as messages name it.
    pub fn mark(&self) -> Mark {
        self.mark_at(self.head)
    }

    /// A position that the present incarnation gave.
    pub fn mark_at(&self, at: LogPosition) -> Mark {
        Mark { at, incarnation: self.history().current().incarnation }
    }

    fn history(&self) -> History {
        History::new(StoreId(1), self.begins.clone()).unwrap_or_else(|| unreachable!("it was created"))
    }

    /// Whether a probe that proves to have seen `seen` may be answered (R15). No voucher is forged here.
    pub fn admits(&self, seen: Option<Mark>) -> bool {
        let claim = |seen: Mark| {
            let past = self.history().judge(&seen.voucher().milestone, self.head);
            Claim::new(past, true)
        };
        seen.is_none_or(|seen| claim(seen) == Claim::Admitted)
    }

    /// The sequencer's transaction, and a round's: begins an epoch if its server writes another `timeline` than its
    /// head (R2), then gives waiting rows their positions. Returns those rows, and whether an epoch began.
    pub fn number(&mut self, seen_epoch: u32, timeline: u32) -> (Vec<(LogPosition, ChangeId)>, bool) {
        let begins = epochs::is_branched(&self.timeline, &timeline);
        if begins {
            let (after, epoch) = (self.head, epochs::next_epoch(timeline, self.head.epoch(), seen_epoch));
            self.head = LogPosition::new(epoch, after.position()).unwrap_or(after);
            self.timeline = timeline;
            self.begins.push(begin(timeline, after, self.head, BeginCause::Branched));
        }
        let waiting = self.rows.iter_mut().filter(|row| row.position.is_none());
        let mut numbered = Vec::new();
        for (position, row) in log::number(self.head, waiting).unwrap_or_default() {
            row.position = Some(position);
            numbered.push((position, row.change));
        }
        self.head = numbered.last().map_or(self.head, |(position, _)| *position);
        (numbered, begins)
    }

    /// Purges every row that may be purged.
    pub fn purge(&mut self) {
        let logged = LoggedRow { committed_at: StoreTime(0), awaits_receipt: false };
        let rows = self.rows.iter().filter(|row| row.position.is_some()).map(|_| logged);
        self.purged = log::purgeable(rows, StoreTime(1), Duration::ZERO);
    }

    /// Whether [`ModelStore::purge`] would change anything.
    pub fn is_purged(&self) -> bool {
        self.rows.iter().skip(self.purged).all(|row| row.position.is_none())
    }

    /// The rows `from..=to` of `epoch`, from the first on, as many as there are without a hole (R5).
    pub fn replay(&self, epoch: u32, from: u64, to: u64) -> ModelReplay {
        let (Some(first), Some(last)) = (LogPosition::new(epoch, from), LogPosition::new(epoch, to)) else {
            return Err(self.mark());
        };
        let kept = self.rows.iter().skip(self.purged);
        let kept = kept.filter_map(|row| Some((row.position?, row.change)));
        let mut rows: Vec<_> = kept.filter(|(position, _)| (first..=last).contains(position)).collect();
        rows.truncate(log::covered(self.head, first, rows.iter().map(|(position, _)| *position)));
        if rows.is_empty() { Err(self.mark()) } else { Ok(rows) }
    }
}
