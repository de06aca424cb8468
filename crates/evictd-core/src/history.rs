//! One history (R15): which store a message speaks for, and which pasts a store knows.
//!
//! "The agents have seen more than this store holds" has two explanations: the store went back, or it is a copy
//! and another one serves. A position can't tell them apart, because both copies give out the same positions. So
//! each stretch of a store's life has a random name, its [`Incarnation`], and the store keeps the list of them,
//! its [`History`]. Whatever vouches for something names the incarnation it comes from.
//!
//! A publisher vouches only for agents whose past lies in its own history ([`History::judge`]). An epoch belongs to
//! one incarnation: what begins an epoch begins an incarnation.

use std::fmt;

use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::StoreTime;

/// A store, drawn at random when it is created. Its copies have the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreId(pub u64);

/// A stretch of a store's life, drawn at random when it begins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Incarnation(pub u64);

/// Drawn at random by each transaction that gives positions, and kept with the rows that got them: two logs that
/// agree on a position and its token agree on everything up to there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LogToken(pub u64);

/// Drawn at random by each probe round, and kept in the store for a while: a publisher that doesn't find the token
/// of a colleague in its own store works on a copy.
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

/// Whom a message speaks for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Provenance {
    /// The store.
    pub store: StoreId,
    /// The stretch of its life.
    pub incarnation: Incarnation,
}

/// A place in one store's log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Milestone {
    /// Whose log.
    pub provenance: Provenance,
    /// How far it reached.
    pub at: LogPosition,
    /// The token of the row at this position; of the incarnation's beginning, if it has given none yet.
    pub token: LogToken,
}

/// The bytes of a message authentication code.
pub type Mac = [u8; 16];

/// A milestone with the store's own code over it (R16): an agent can present only what it was given, and a store
/// that was put back recognizes what its lost future gave out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Voucher {
    /// The place in the log.
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
    /// The database's server writes another history: a promotion or a restore (PostgreSQL).
    Branched,
    /// An operator declared that this store is the one to follow.
    Declared,
    /// The schema was changed by somebody else than evictd, so that changes may have gone unlogged (R3).
    SchemaChanged,
}

impl BeginCause {
    /// All causes.
    pub const ALL: [Self; 5] =
        [Self::Created, Self::Opened, Self::Branched, Self::Declared, Self::SchemaChanged];

    /// The name in the store, in logs and on the command line.
    pub fn label(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Opened => "opened",
            Self::Branched => "branched",
            Self::Declared => "declared",
            Self::SchemaChanged => "schema_changed",
        }
    }

    /// The inverse of [`BeginCause::label`].
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| cause.label() == label)
    }

    /// Whether it begins an epoch, so that agents flush.
    pub fn begins_epoch(self) -> bool {
        matches!(self, Self::Branched | Self::Declared | Self::SchemaChanged)
    }

    /// Whether it says that commits may be lost, and that this store is to be followed all the same.
    fn supersedes(self) -> bool {
        matches!(self, Self::Branched | Self::Declared)
    }
}

/// The beginning of an incarnation.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Begin {
    /// Its name.
    pub incarnation: Incarnation,
    /// The head at which the one before it ended.
    pub after: LogPosition,
    /// The head from which it goes on.
    pub at: LogPosition,
    /// Why it began.
    pub cause: BeginCause,
    /// When, on the store's clock.
    pub time: StoreTime,
    /// What showed that it had to begin: an operator's name, a server's timeline, a table. For people.
    pub evidence: Option<Box<str>>,
}

/// What a store makes of an agent's past.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Past {
    /// It lies in this history.
    Known,
    /// It doesn't, but a later epoch of this history was begun although commits may be lost: the agent flushes.
    Superseded,
    /// This store is an older copy, or another store: it must not vouch.
    Unknown,
}

/// What an agent's claim to have seen something is worth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// The store knows that past, or supersedes it.
    Admitted,
    /// It can't be told from a lie, and moves nothing.
    Unproved,
    /// The store gave it out, and doesn't know it: this is an older copy.
    Unknown,
}

impl Claim {
    /// Judges what [`History::judge_row`] made of it. `is_authentic`: the store's own code is over it (R16).
    ///
    /// Without the code it shows nothing about this store. But an agent that followed a store which this one
    /// supersedes may change over.
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
    /// `None` if there is no incarnation.
    pub fn new(store: StoreId, begins: Vec<Begin>) -> Option<Self> {
        (!begins.is_empty()).then_some(Self { store, begins })
    }

    /// Whose history it is.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// All incarnations, oldest first.
    pub fn begins(&self) -> &[Begin] {
        &self.begins
    }

    /// The incarnation that goes on.
    pub fn current(&self) -> &Begin {
        // Never empty: see `new`.
        &self.begins[self.begins.len() - 1]
    }

    /// What messages of this store name now.
    pub fn provenance(&self) -> Provenance {
        Provenance { store: self.store, incarnation: self.current().incarnation }
    }

    /// Whether an agent that has proved to have seen `seen` may be vouched for, when this store's log ends at `head`.
    ///
    /// A past that isn't known shows that commits were lost, or that another copy serves. Only what is newer than all
    /// of it excuses that: an epoch that began above it because the server's own history shows a promotion, or
    /// because an operator said so. A copy of the store that was taken later has the same excuse, but not for what
    /// was seen of that epoch.
    pub fn judge(&self, seen: &Milestone, head: LogPosition) -> Past {
        if self.has(seen, head) || !Protection::PastsAreKnown.holds() {
            return Past::Known;
        }
        self.judge_lost(seen)
    }

    /// The same when the row at that position has the token `own` in this log, if it is still kept: with another one, the
    /// position was given out by another copy of the same incarnation (of a PostgreSQL server, say), or by a future that
    /// this store has lost and has caught up with.
    pub fn judge_row(&self, seen: &Milestone, head: LogPosition, own: Option<LogToken>) -> Past {
        let is_another = own.is_some_and(|own| own != seen.token) && Protection::PastsAreKnown.holds();
        match self.judge(seen, head) {
            Past::Known if is_another => self.judge_lost(seen),
            past => past,
        }
    }

    fn judge_lost(&self, seen: &Milestone) -> Past {
        let mut superseding = self.begins.iter().filter(|begin| begin.cause.supersedes());
        if superseding.any(|begin| begin.at.epoch() > seen.at.epoch())
            || !Protection::LostPastsNeedAWord.holds()
        {
            return Past::Superseded;
        }
        Past::Unknown
    }

    fn has(&self, seen: &Milestone, head: LogPosition) -> bool {
        let Provenance { store, incarnation } = seen.provenance;
        let place = self.begins.iter().rposition(|begin| begin.incarnation == incarnation);
        let Some(place) = place.filter(|_| store == self.store) else { return false };
        let end = self.begins.get(place + 1).map_or(head, |next| next.after);
        (self.begins[place].at..=end).contains(&seen.at)
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
    fn what_lies_within_an_incarnation_is_known() {
        for known in [seen(1, at(1, 0)), seen(1, at(1, 10)), seen(2, at(1, 20)), seen(3, at(2, 25))] {
            assert_eq!(history().judge(&known, at(2, 25)), Past::Known, "{known:?}");
        }
    }

    #[test]
    fn a_restart_costs_no_flush() {
        let mut restarted = history().begins.clone();
        restarted.push(begin(4, at(2, 25), at(2, 25), BeginCause::Opened));
        let restarted = History::new(STORE, restarted).unwrap();
        assert_eq!(restarted.judge(&seen(3, at(2, 25)), at(2, 30)), Past::Known);
    }

    #[test]
    fn an_older_copy_knows_no_future_even_when_its_positions_caught_up() {
        let copy = History::new(STORE, history().begins[..2].to_vec()).unwrap();
        assert_eq!(copy.judge(&seen(2, at(1, 21)), at(1, 20)), Past::Unknown);
        let mut caught_up = copy.begins.clone();
        caught_up.push(begin(9, at(1, 20), at(1, 20), BeginCause::Opened));
        let caught_up = History::new(STORE, caught_up).unwrap();
        assert_eq!(caught_up.judge(&seen(2, at(1, 21)), at(1, 90)), Past::Unknown);
        assert_eq!(caught_up.judge(&seen(8, at(1, 15)), at(1, 90)), Past::Unknown);
    }

    #[test]
    fn a_declared_epoch_supersedes_what_was_seen_before_it() {
        assert_eq!(history().judge(&seen(2, at(1, 21)), at(2, 20)), Past::Superseded);
        assert_eq!(history().judge(&seen(8, at(1, 500)), at(2, 20)), Past::Superseded);
    }

    #[test]
    fn a_declared_epoch_supersedes_nothing_of_its_own() {
        // A copy that was taken after the declaration, started beside the store that went on.
        assert_eq!(history().judge(&seen(3, at(2, 30)), at(2, 25)), Past::Unknown);
        assert_eq!(history().judge(&seen(8, at(2, 1)), at(2, 25)), Past::Unknown);
    }

    #[test]
    fn a_changed_schema_supersedes_nothing() {
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
    fn position_that_another_copy_gave_out_is_unknown_until_a_word() {
        let (seen, head) = (seen(3, at(2, 22)), at(2, 25));
        let another = Some(LogToken(seen.token.0 + 1));
        assert_eq!(history().judge_row(&seen, head, Some(seen.token)), Past::Known);
        assert_eq!(history().judge_row(&seen, head, None), Past::Known, "a purged row says nothing");
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
