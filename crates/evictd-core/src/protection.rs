//! The protections, one by one, so that each can be switched off.
//!
//! A checker that doesn't notice a missing protection proves nothing. So a build with `--cfg
//! evictd_negative_controls` can switch each one off, for the current thread. In every other build
//! [`Protection::holds`] is a constant, and the switch doesn't exist.

use crate::rules::Rule;

macro_rules! protections {
    ($($(#[$doc:meta])* $name:ident = $rule:ident,)*) => {
        /// A measure that serves one rule. Without it, a guarantee breaks.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Protection { $($(#[$doc])* $name,)* }

        impl Protection {
            pub fn rule(self) -> Rule {
                match self { $(Self::$name => Rule::$rule,)* }
            }
        }
    };
}

protections! {
    /// A store whose server writes another history begins a new epoch before it numbers anything.
    BranchesBeginAnEpoch = R2,
    /// An epoch whose beginning was lost with other commits is not begun a second time.
    LostEpochsAreNotRepeated = R2,
    /// A store begins an epoch when its schema was altered, because rows may have changed without a
    /// trigger.
    SchemaChangesBeginAnEpoch = R3,
    /// A position at or below `applied` still raises its floor.
    OldPositionsAreApplied = R5,
    /// `applied` advances over contiguous positions only.
    AppliedIsContiguous = R5,
    /// A replay's rows count only if none is missing.
    ReplaysAreComplete = R5,
    /// Messages of an older epoch are ignored.
    OlderEpochsMoveNothing = R2,
    /// A newer epoch flushes the cache.
    NewerEpochsFlush = R2,
    /// When floors are dropped, a wider one rises in their place.
    DroppedFloorsLiveOn = R6,
    /// Each hit meets its floors (also R9).
    HitsMeetFloors = R6,
    /// A proof counts once its head is applied.
    ProofsWaitForTheirHead = R7,
    /// A proof dates from when its probe was sent.
    ProofsDateFromTheQuestion = R7,
    /// An entry is served within the bound only.
    LeasesRunOut = R8,
    /// A margin of the bound is kept back for clock rates and scheduling.
    MarginsAreKept = R8,
    /// A lookup's answer is as old as the authority's last fence.
    LookupsCarryTheFenceAge = R8,
    /// An entry is shown only after a check of its floors.
    EntriesAppearChecked = R9,
    /// That check follows the insertion.
    ChecksFollowInsertions = R9,
    /// Entries are evicted before `applied` is published and announced.
    EvictionPrecedesApplied = R9,
    /// A verification reads the deadline before the entry and its floors.
    DeadlinePrecedesFloors = R9,
    /// A verification reads the proof before `applied`.
    ProofsPrecedeApplied = R9,
    /// A hit advances its entry to what was applied before it read the floors, not after.
    AdvancesRestOnTheReading = R6,
    /// A load is cached only if it meets the floors after its insertion.
    LoadsMeetFloors = R10,
    /// A load answers only the verifications that may share it.
    AnswersMeetWhatWasApplied = R10,
    /// Without a lease, a load answers only verifications that began before it was sent.
    LoadsAreSharedUnderALease = R10,
    /// A receipt becomes final early only when every agent has confirmed.
    ReceiptsWaitForAll = R12,
    /// A receipt that isn't confirmed elapses with the bound, not earlier.
    ReceiptsWaitForTheBound = R12,
    /// An entry that leaves the cache hands on when it was last served.
    AnswersAreHandedOn = G5,
    /// When the store went back, the roster counts as incomplete for a bound.
    LostRostersAreDistrusted = R11,
    /// An answer counts only if it repeats the number of an open request.
    AnswersMatchQuestions = R13,
    /// A second try goes to every publisher.
    SecondTriesGoToAll = R14,
    /// A publisher that stalls leaves the queue group.
    StalledPublishersKeepSilent = R14,
    /// A publisher vouches only for agents whose past is in its store's history.
    PastsAreKnown = R15,
    /// A past that the store doesn't have needs an operator's declaration, or the server's own
    /// history.
    LostPastsNeedAWord = R15,
    /// A store whose publisher yielded for a bound needs an operator's declaration again.
    YieldsNeedAWord = R15,
    /// A publisher that was absent queries the others before it answers anything.
    NewcomersAsk = R15,
    /// A publisher that is the only one at a shared store begins an incarnation before it serves.
    LoneNewcomersBegin = R15,
    /// Publishers of two histories that both served fall silent when they meet.
    RivalsFallSilent = R15,
    /// No receipt becomes final while agents may follow another history.
    SilentPublishersHoldReceipts = R15,
    /// Messages of another history are ignored while the agent's own is alive.
    OwnHistoryComesFirst = R15,
    /// Loads and rows count only if they are of the agent's own history.
    ForeignHistoriesMoveNothing = R15,
    /// An agent changes its history only by an answer to a probe that proved all it has seen.
    SuccessorsKnowAllThatWasSeen = R15,
    /// An agent's own read of a database counts only if that has the log that the agent follows.
    DatabasesShareTheLog = R15,
    /// What an agent presents as seen counts only with the store's own code over it.
    VouchersAreChecked = R16,
}

impl Protection {
    /// Whether it is in force: always, in this build.
    #[cfg(not(evictd_negative_controls))]
    pub const fn holds(self) -> bool {
        true
    }

    /// Whether it is in force on this thread.
    #[cfg(evictd_negative_controls)]
    pub fn holds(self) -> bool {
        missing::NOW.with(|now| now.get() & self.bit() == 0)
    }

    /// Runs `run` without this protection, on this thread, and without those that are missing
    /// already.
    #[cfg(evictd_negative_controls)]
    pub fn without<T>(self, run: impl FnOnce() -> T) -> T {
        let before = missing::NOW.with(|now| now.replace(now.get() | self.bit()));
        let result = run();
        missing::NOW.with(|now| now.set(before));
        result
    }

    #[cfg(evictd_negative_controls)]
    const fn bit(self) -> u64 {
        1 << self as u32
    }
}

#[cfg(evictd_negative_controls)]
mod missing {
    use std::cell::Cell;

    thread_local! {
        /// One bit each.
        pub(super) static NOW: Cell<u64> = const { Cell::new(0) };
    }
}
