//! The home store: rows, positions, epochs, snapshots. Each method is one transaction.

use evictd_core::authority::is_credible;
use evictd_core::position::LogPosition;

use crate::script::{ChangeId, View};
use crate::world::{EpochsBegin, Tick};

/// A committed change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Row {
    /// Which.
    pub change: ChangeId,
    /// When it became visible.
    pub at: Tick,
    /// Its place in the log, once the sequencer was there (R1).
    pub position: Option<LogPosition>,
}

/// The answer to a replay: rows as (position, change), or from where to start over.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Replay {
    /// The rows from the first one asked for on.
    Rows(Vec<(LogPosition, ChangeId)>),
    /// The range can't be covered.
    Refused(LogPosition),
}

/// A home store, the primary or a copy of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Store {
    /// In the order of their commits.
    pub rows: Vec<Row>,
    /// The last position given.
    pub head: LogPosition,
    /// Rows up to here were purged from the log.
    pub purged: u64,
    /// It was put in the place of a store that may have been further, and hasn't begun an epoch since.
    pub moved: bool,
}

impl Default for Store {
    fn default() -> Self {
        let head = LogPosition::new(1, 0).unwrap_or(LogPosition::ZERO);
        Self { rows: Vec::new(), head, purged: 0, moved: false }
    }
}

impl Store {
    /// The changes that a snapshot includes now.
    pub fn view(&self) -> View {
        self.rows.iter().map(|row| row.change).collect()
    }

    /// Whether [`Store::number`] would change anything.
    pub fn is_numbered(&self) -> bool {
        self.rows.iter().all(|row| row.position.is_some())
    }

    /// The sequencer's transaction, and a round's: begins an epoch if one is due, then gives waiting rows
    /// their positions. Returns those rows, and whether an epoch began.
    ///
    /// `timelines` counts how often the store was put in another one's place. No epoch begins below it:
    /// otherwise one whose beginning was lost would begin again, and its positions be given twice.
    pub fn number(
        &mut self,
        seen: LogPosition,
        timelines: u32,
        begin: EpochsBegin,
    ) -> (Vec<(LogPosition, ChangeId)>, bool) {
        let (noticed, least) = match begin {
            EpochsBegin::WithTheTimeline => (self.moved, timelines),
            EpochsBegin::WithoutMemory => (self.moved, 0),
            EpochsBegin::WhenAnAgentHasSeenMore | EpochsBegin::Never => (false, 0),
        };
        let shown = seen > self.head && is_credible(seen, self.head) && begin != EpochsBegin::Never;
        let begins = noticed || shown;
        if begins {
            let epoch = seen.epoch().max(self.head.epoch()).max(least) + 1;
            self.head = LogPosition::new(epoch, self.head.position()).unwrap_or(self.head);
            self.moved = false;
        }
        let mut numbered = Vec::new();
        for row in self.rows.iter_mut().filter(|row| row.position.is_none()) {
            self.head = self.head.next().unwrap_or(self.head);
            row.position = Some(self.head);
            numbered.push((self.head, row.change));
        }
        (numbered, begins)
    }

    /// The rows `from..=to` of `epoch`, from the first on, as many as there are without a hole (R5).
    pub fn replay(&self, epoch: u32, from: u64, to: u64) -> Replay {
        let rows: Vec<_> =
            (from..=to).map_while(|position| self.row_at(LogPosition::new(epoch, position)?)).collect();
        let covered = epoch == self.head.epoch() && from > self.purged && !rows.is_empty();
        if covered { Replay::Rows(rows) } else { Replay::Refused(self.head) }
    }

    /// A replay that takes what is absent for nothing, as no store may.
    pub fn careless_replay(&self, epoch: u32, from: u64, to: u64) -> Replay {
        let kept = (from.max(self.purged + 1)..=to).filter_map(|at| LogPosition::new(epoch, at));
        Replay::Rows(kept.filter_map(|position| self.row_at(position)).collect())
    }

    fn row_at(&self, position: LogPosition) -> Option<(LogPosition, ChangeId)> {
        let row = self.rows.iter().find(|row| row.position == Some(position))?;
        Some((position, row.change))
    }
}
