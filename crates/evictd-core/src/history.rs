//! One history (R15): which store a message is of, and which pasts a store has.
//!
//! If agents have seen more than a store has, there are two explanations: the store went back, or
//! it is a copy and another one serves. A position can't distinguish them, because both copies use
//! the same positions. So each stretch of a store's life has a random name, its [`Incarnation`],
//! and the store keeps the list of them, its [`History`]. Each proof names the incarnation that it
//! is of.
//!
//! A publisher vouches only for agents whose past is in its own history ([`History::judge`]). An
//! epoch belongs to one incarnation: each new epoch begins an incarnation.

use std::fmt;

use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::StoreTime;

/// Drawn at random when a store is created. Its copies have the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreId(pub u64);

/// A stretch of a store's life. Drawn at random when it begins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Incarnation(pub u64);

/// Drawn at random by each transaction that numbers rows, and kept with them. Two logs that agree
/// on a position and its token agree on all rows up to there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LogToken(pub u64);

/// Drawn at random by each round, and kept in the store for a while. Two publishers that don't find
/// each other's token in their stores work on copies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RoundToken(pub u64);

macro_rules! hexadecimal {
    ($($id:ty),*) => {$(
        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }
    )*};
}

hexadecimal!(StoreId, Incarnation, LogToken, RoundToken);

/// The store and the incarnation that a message is of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Provenance {
    pub store: StoreId,
    pub incarnation: Incarnation,
}

/// A place in one store's log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Milestone {
    pub provenance: Provenance,
    pub at: LogPosition,
    /// The token of the row at this position; of the incarnation's beginning, if it has no row yet.
    pub token: LogToken,
}

/// The bytes of a message authentication code.
pub type Mac = [u8; 16];

/// A milestone with the store's own code over it (R16). So an agent can present only what a store
/// issued, and a restored store recognizes what was issued in its lost future.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Voucher {
    pub milestone: Milestone,
    /// HMAC-SHA-256 by the store's key, truncated.
    pub mac: Mac,
}

/// Why an incarnation began.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BeginCause {
    /// The store was created.
    Created,
    /// A publisher opened it (SQLite). The epoch goes on.
    Opened,
    /// The server began another timeline, by a promotion or a restore (PostgreSQL).
    Branched,
    /// An operator declared that agents shall follow this store.
    Declared,
    /// The schema was changed outside evictd, so changes may be missing in the log (R3).
    SchemaChanged,
    /// Its publisher yielded to another history for a bound. The epoch goes on.
    Yielded,
}

labels!(BeginCause {
    Created = "created",
    Opened = "opened",
    Branched = "branched",
    Declared = "declared",
    SchemaChanged = "schema_changed",
    Yielded = "yielded",
});

impl BeginCause {
    /// Whether it begins an epoch, which makes agents flush.
    pub fn begins_epoch(self) -> bool {
        matches!(self, Self::Branched | Self::Declared | Self::SchemaChanged)
    }

    /// Whether agents shall follow the store although it may have lost commits.
    fn supersedes(self) -> bool {
        matches!(self, Self::Branched | Self::Declared)
    }
}

/// The beginning of an incarnation.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Begin {
    pub incarnation: Incarnation,
    /// The head at which the previous incarnation ended.
    pub after: LogPosition,
    /// The head at which this one begins.
    pub at: LogPosition,
    pub cause: BeginCause,
    pub time: StoreTime,
    /// For people: the operator, the server's timeline, or the table that caused it.
    pub evidence: Option<Box<str>>,
}

/// How a store judges an agent's past.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Past {
    /// It is in this history.
    Known,
    /// It isn't, but a later epoch of this history replaces it although commits may be lost: the
    /// agent flushes.
    Superseded,
    /// This store is an older copy, or another store. Its publisher must not vouch.
    Unknown,
}

/// How a publisher treats what an agent claims to have seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// The store has that past, or supersedes it.
    Admitted,
    /// It may be forged, and is ignored.
    Unproved,
    /// The store issued it, and doesn't have it: this is an older copy.
    Unknown,
}

impl Claim {
    /// `past` is the result of [`History::judge_row`]. `is_authentic`: the store's own code is over
    /// the claim (R16).
    ///
    /// Without the code, the claim says nothing about this store. But an agent may change to a
    /// store that supersedes the one that it followed.
    pub fn new(past: Past, is_authentic: bool) -> Self {
        match past {
            Past::Superseded => Self::Admitted,
            _ if !is_authentic && Protection::VouchersAreChecked.holds() => Self::Unproved,
            Past::Known => Self::Admitted,
            Past::Unknown => Self::Unknown,
        }
    }
}

/// The incarnations of one store, oldest first.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct History {
    store: StoreId,
    begins: Vec<Begin>,
}

impl History {
    /// Returns `None` without an incarnation.
    pub fn new(store: StoreId, begins: Vec<Begin>) -> Option<Self> {
        (!begins.is_empty()).then_some(Self { store, begins })
    }

    pub fn store(&self) -> StoreId {
        self.store
    }

    /// Oldest first.
    pub fn begins(&self) -> &[Begin] {
        &self.begins
    }

    /// The present incarnation.
    pub fn current(&self) -> &Begin {
        // Never empty: see `new`.
        &self.begins[self.begins.len() - 1]
    }

    pub fn provenance(&self) -> Provenance {
        Provenance { store: self.store, incarnation: self.current().incarnation }
    }

    /// Judges the past of an agent that proved to have seen `seen`, when this store's log ends at
    /// `head`.
    ///
    /// A past that isn't in the history shows that commits were lost, or that another copy serves.
    /// Only a newer epoch replaces it: one that began because the server's own history shows a
    /// promotion, or because an operator declared it. A later copy of the store has that epoch too,
    /// but it replaces nothing that was seen of the epoch itself.
    ///
    /// An epoch replaces nothing either after the store's publisher yielded to another history for
    /// a bound: agents followed that one, whatever a promotion or an operator said before.
    pub fn judge(&self, seen: &Milestone, head: LogPosition) -> Past {
        if self.has(seen, head) || !Protection::PastsAreKnown.holds() {
            return Past::Known;
        }
        self.judge_lost(seen)
    }

    /// Judges it when the row at that position has the token `own` in this log; `None` if the row
    /// is no longer kept. If the tokens differ, the position was used by another copy of the same
    /// incarnation (of a PostgreSQL server, say), or in a future that this store lost and whose
    /// positions it reached again.
    pub fn judge_row(&self, seen: &Milestone, head: LogPosition, own: Option<LogToken>) -> Past {
        let is_another = own.is_some_and(|own| own != seen.token) && Protection::PastsAreKnown.holds();
        match self.judge(seen, head) {
            Past::Known if is_another => self.judge_lost(seen),
            past => past,
        }
    }

    fn judge_lost(&self, seen: &Milestone) -> Past {
        if self.superseding().any(|begin| begin.at.epoch() > seen.at.epoch())
            || !Protection::LostPastsNeedAWord.holds()
        {
            return Past::Superseded;
        }
        Past::Unknown
    }

    /// Whether an epoch of this history may replace a past that it lacks.
    pub fn supersedes(&self) -> bool {
        self.superseding().next().is_some()
    }

    /// The beginnings that may replace a past that this history lacks, newest first.
    fn superseding(&self) -> impl Iterator<Item = &Begin> {
        let counts =
            |begin: &&Begin| begin.cause != BeginCause::Yielded || !Protection::YieldsNeedAWord.holds();
        self.begins.iter().rev().take_while(counts).filter(|begin| begin.cause.supersedes())
    }

    fn has(&self, seen: &Milestone, head: LogPosition) -> bool {
        let Provenance { store, incarnation } = seen.provenance;
        let index = self.begins.iter().rposition(|begin| begin.incarnation == incarnation);
        let Some(index) = index.filter(|_| store == self.store) else { return false };
        let end = self.begins.get(index + 1).map_or(head, |next| next.after);
        (self.begins[index].at..=end).contains(&seen.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: StoreId = StoreId(7);

    fn at(epoch: u32, position: u64) -> LogPosition {
        LogPosition::new(epoch, position).unwrap()
    }

    fn begin(incarnation: u64, after: LogPosition, at: LogPosition, cause: BeginCause) -> Begin {
        let incarnation = Incarnation(incarnation);
        Begin { incarnation, after, at, cause, time: StoreTime(0), evidence: None }
    }

    fn seen(incarnation: u64, at: LogPosition) -> Milestone {
        let provenance = Provenance { store: STORE, incarnation: Incarnation(incarnation) };
        Milestone { provenance, at, token: LogToken(0) }
    }

    /// Created, opened again at 10, declared at 20.
    fn history() -> History {
        let begins = vec![
            begin(1, LogPosition::ZERO, at(1, 0), BeginCause::Created),
            begin(2, at(1, 10), at(1, 10), BeginCause::Opened),
            begin(3, at(1, 20), at(2, 20), BeginCause::Declared),
        ];
        History::new(STORE, begins).unwrap()
    }

    #[test]
    fn past_within_an_incarnation_is_known() {
        for known in [seen(1, at(1, 0)), seen(1, at(1, 10)), seen(2, at(1, 20)), seen(3, at(2, 25))] {
            assert_eq!(history().judge(&known, at(2, 25)), Past::Known, "{known:?}");
        }
    }

    #[test]
    fn restart_keeps_the_past_known() {
        let mut restarted = history().begins.clone();
        restarted.push(begin(4, at(2, 25), at(2, 25), BeginCause::Opened));
        let restarted = History::new(STORE, restarted).unwrap();
        assert_eq!(restarted.judge(&seen(3, at(2, 25)), at(2, 30)), Past::Known);
    }

    #[test]
    fn older_copy_lacks_a_past_even_if_its_positions_caught_up() {
        let copy = History::new(STORE, history().begins[..2].to_vec()).unwrap();
        assert_eq!(copy.judge(&seen(2, at(1, 21)), at(1, 20)), Past::Unknown);
        let mut caught_up = copy.begins.clone();
        caught_up.push(begin(9, at(1, 20), at(1, 20), BeginCause::Opened));
        let caught_up = History::new(STORE, caught_up).unwrap();
        assert_eq!(caught_up.judge(&seen(2, at(1, 21)), at(1, 90)), Past::Unknown);
        assert_eq!(caught_up.judge(&seen(8, at(1, 15)), at(1, 90)), Past::Unknown);
    }

    #[test]
    fn declared_epoch_supersedes_older_pasts() {
        assert_eq!(history().judge(&seen(2, at(1, 21)), at(2, 20)), Past::Superseded);
        assert_eq!(history().judge(&seen(8, at(1, 500)), at(2, 20)), Past::Superseded);
    }

    #[test]
    fn declared_epoch_does_not_supersede_its_own_past() {
        // A copy that was taken after the declaration, started beside the store that went on.
        assert_eq!(history().judge(&seen(3, at(2, 30)), at(2, 25)), Past::Unknown);
        assert_eq!(history().judge(&seen(8, at(2, 1)), at(2, 25)), Past::Unknown);
    }

    #[test]
    fn yielding_ends_what_was_declared_before() {
        let mut begins = history().begins;
        begins.push(begin(4, at(2, 25), at(2, 25), BeginCause::Yielded));
        let yielded = History::new(STORE, begins.clone()).unwrap();
        assert!(!yielded.supersedes());
        assert_eq!(yielded.judge(&seen(8, at(1, 500)), at(2, 30)), Past::Unknown);
        assert_eq!(yielded.judge(&seen(3, at(2, 25)), at(2, 30)), Past::Known);
        begins.push(begin(5, at(2, 30), at(3, 30), BeginCause::Declared));
        let declared = History::new(STORE, begins).unwrap();
        assert_eq!(declared.judge(&seen(8, at(1, 500)), at(3, 30)), Past::Superseded);
    }

    #[test]
    fn changed_schema_supersedes_nothing() {
        let mut begins = history().begins[..2].to_vec();
        begins.push(begin(3, at(1, 20), at(2, 20), BeginCause::SchemaChanged));
        let history = History::new(STORE, begins).unwrap();
        assert_eq!(history.judge(&seen(2, at(1, 21)), at(2, 20)), Past::Unknown);
    }

    #[test]
    fn another_stores_past_is_unknown() {
        let mut foreign = seen(2, at(2, 15));
        foreign.provenance.store = StoreId(8);
        assert_eq!(history().judge(&foreign, at(2, 25)), Past::Unknown);
    }

    #[test]
    fn claim_without_the_stores_code_moves_nothing() {
        assert_eq!(Claim::new(Past::Known, false), Claim::Unproved);
        assert_eq!(Claim::new(Past::Unknown, false), Claim::Unproved);
        assert_eq!(Claim::new(Past::Unknown, true), Claim::Unknown);
        assert_eq!(Claim::new(Past::Superseded, false), Claim::Admitted);
        assert_eq!(Claim::new(Past::Known, true), Claim::Admitted);
    }

    #[test]
    fn position_of_another_copy_is_unknown_until_declared() {
        let (seen, head) = (seen(3, at(2, 22)), at(2, 25));
        let another = Some(LogToken(seen.token.0 + 1));
        assert_eq!(history().judge_row(&seen, head, Some(seen.token)), Past::Known);
        assert_eq!(history().judge_row(&seen, head, None), Past::Known, "the row is no longer kept");
        assert_eq!(history().judge_row(&seen, head, another), Past::Unknown);
        let mut begins = history().begins().to_vec();
        begins.push(begin(9, at(2, 25), at(3, 25), BeginCause::Declared));
        let declared = History::new(STORE, begins).unwrap();
        assert_eq!(declared.judge_row(&seen, at(3, 25), another), Past::Superseded);
    }

    #[test]
    fn causes_are_read_as_they_are_written() {
        for cause in BeginCause::ALL {
            assert_eq!(BeginCause::from_label(cause.label()), Some(cause));
        }
    }
}
