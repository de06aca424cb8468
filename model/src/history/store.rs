//! A home store as the rules of one history see it: incarnations, rows, copies. Each method is one transaction.

use evictd_core::epochs;
use evictd_core::history::{
    Begin, BeginCause, History, Incarnation, LogToken, Milestone, Past, Provenance, StoreId, Voucher,
};
use evictd_core::invalidation::Invalidation;
use evictd_core::log;
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::time::StoreTime;

use crate::script::ModelKey;
use crate::script::ScriptChange;

const STORE: StoreId = StoreId(1);

/// The store's own code. Here it is right or wrong, no more.
const MAC: [u8; 16] = [1; 16];

/// The change that the laws are about.
pub const DELETION: ScriptChange = ScriptChange::Delete(ModelKey::A);

/// A change of something else: with it, the positions of a copy catch up.
pub const OTHER: ScriptChange = ScriptChange::Create(ModelKey::B);

/// A committed change that has its position. The other worlds have the sequencer's delays.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HistoryRow {
    pub change: ScriptChange,
    pub at: LogPosition,
    /// Drawn by the transaction that gave the position.
    pub token: LogToken,
}

impl HistoryRow {
    /// As it travels.
    pub fn invalidation(&self) -> Invalidation {
        self.change.row(self.at)
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HistoryStore {
    begins: Vec<Begin>,
    /// Dense: the first one has position 1.
    pub rows: Vec<HistoryRow>,
    head: LogPosition,
    /// The highest epoch that an agent has proved without this store knowing it.
    noted: u32,
}

impl HistoryStore {
    pub fn create(incarnation: Incarnation) -> Self {
        let head = LogPosition::new(1, 0).unwrap_or(LogPosition::ZERO);
        let mut store = Self { begins: Vec::new(), rows: Vec::new(), head, noted: 0 };
        store.begin(incarnation, BeginCause::Created);
        store
    }

    /// An incarnation begins in the same epoch.
    pub fn begin(&mut self, incarnation: Incarnation, cause: BeginCause) {
        self.begin_at(incarnation, self.head, cause);
    }

    /// An operator declares this store, whatever agents have received.
    pub fn declare(&mut self, incarnation: Incarnation) {
        let epoch = epochs::next_epoch(1, self.head.epoch(), self.noted);
        let at = LogPosition::new(epoch, self.head.position()).unwrap_or(self.head);
        self.begin_at(incarnation, at, BeginCause::Declared);
    }

    fn begin_at(&mut self, incarnation: Incarnation, at: LogPosition, cause: BeginCause) {
        let begin = Begin { incarnation, after: self.head, at, cause, time: StoreTime(0), evidence: None };
        self.begins.push(begin);
        self.head = at;
    }

    pub fn record(&mut self, change: ScriptChange, token: LogToken) {
        for (at, change) in log::number(self.head, [change]).unwrap_or_default() {
            self.rows.push(HistoryRow { change, at, token });
            self.head = at;
        }
    }

    /// Keeps for `declare` what an agent has proved.
    pub fn note(&mut self, seen: &Milestone) {
        self.noted = self.noted.max(seen.at.epoch());
    }

    pub fn has(&self, change: ScriptChange) -> bool {
        self.rows.iter().any(|row| row.change == change)
    }

    /// The last row, if the present incarnation recorded it.
    pub fn newest_row(&self) -> Option<&HistoryRow> {
        self.rows.last().filter(|row| row.at > self.history().current().at)
    }

    pub fn history(&self) -> History {
        History::new(STORE, self.begins.clone()).unwrap_or_else(|| unreachable!("it was created"))
    }

    pub fn provenance(&self) -> Provenance {
        self.history().provenance()
    }

    /// What its publishers give out now.
    pub fn voucher(&self) -> Voucher {
        let milestone =
            Milestone { provenance: self.provenance(), at: self.head, token: self.token_at(self.head) };
        Voucher { milestone, mac: MAC }
    }

    /// Judges an agent's past.
    pub fn judge(&self, seen: &Milestone) -> Past {
        self.history().judge_row(seen, self.head, Some(self.token_at(seen.at)))
    }

    fn token_at(&self, at: LogPosition) -> LogToken {
        let row = (at.position() as usize).checked_sub(1).and_then(|index| self.rows.get(index));
        row.map_or(LogToken(0), |row| row.token)
    }
}

/// Whether the store's own code is on it (R16).
pub fn is_authentic(voucher: &Voucher) -> bool {
    voucher.mac == MAC || !Protection::VouchersAreChecked.holds()
}

/// Vouchers that an agent may claim without having received them.
pub fn forgeries(genuine: &Voucher) -> Vec<Voucher> {
    let Milestone { at, provenance, token } = genuine.milestone;
    let further = at.next().unwrap_or(at);
    let later = LogPosition::new(at.epoch() + 1, at.position()).unwrap_or(at);
    let elsewhere = Provenance { incarnation: Incarnation(u64::MAX), ..provenance };
    let forged = |provenance, at| Voucher { milestone: Milestone { provenance, at, token }, mac: [0; 16] };
    vec![forged(provenance, further), forged(provenance, later), forged(elsewhere, at)]
}
