//! The protections, one by one, so that each can be missed.
//!
//! A checker that doesn't notice a missing protection proves nothing. So a build with
//! `--cfg evictd_negative_controls` can switch each one off, for the thread that asks; in every other build
//! [`Protection::holds`] is a constant, and the switch doesn't exist.

use crate::rules::Rule;

/// Something that is done for the sake of one rule, and whose absence breaks a guarantee.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protection {
    /// R2: a store whose server writes another history begins a new epoch before it numbers anything.
    BranchesBeginAnEpoch,
    /// R2: an epoch whose beginning was lost with other commits is not begun a second time.
    LostEpochsAreNotRepeated,
    /// R3: where the schema was altered, so that rows may have changed without a trigger, an epoch begins.
    SchemaChangesBeginAnEpoch,
    /// R5: what arrives at or below `applied` raises its floor all the same.
    OldPositionsAreApplied,
    /// R5: `applied` moves over contiguous positions only.
    AppliedIsContiguous,
    /// R5: a replay's rows count only if none is missing.
    ReplaysAreComplete,
    /// R2: what belongs to an older epoch moves nothing.
    OlderEpochsMoveNothing,
    /// R2: a newer epoch makes everything forgotten.
    NewerEpochsFlush,
    /// R6: when floors are forgotten, something wider rises in their place.
    DroppedFloorsLiveOn,
    /// R6, R9: each hit meets the floors.
    HitsMeetFloors,
    /// R7: a proof counts once its head is applied.
    ProofsWaitForTheirHead,
    /// R7: a proof dates from when its probe was sent.
    ProofsDateFromTheQuestion,
    /// R8: an entry is answered from within the bound only.
    LeasesRunOut,
    /// R8: something is kept back of the bound for clock rates and scheduling.
    MarginsAreKept,
    /// R8: a lookup's answer is as old as the authority's last fence.
    LookupsCarryTheFenceAge,
    /// R9: an entry is shown only after a look at its floors.
    EntriesAppearChecked,
    /// R9: that look follows its insertion.
    ChecksFollowInsertions,
    /// R9: entries are evicted before `applied` is published and announced.
    EvictionPrecedesApplied,
    /// R9: a verification reads the deadline before the entry and its floors.
    DeadlinePrecedesFloors,
    /// R9: a verification reads the proof before what was applied.
    ProofsPrecedeApplied,
    /// R6: a hit lifts its entry to what was applied before it read the floors, not after.
    AdvancesRestOnTheReading,
    /// R10: a load is cached only if it meets the floors after its insertion.
    LoadsMeetFloors,
    /// R10: a load answers only those who may have it.
    AnswersMeetWhatWasApplied,
    /// R10: without a lease, a load answers only those who waited when it was sent.
    LoadsAreSharedUnderALease,
    /// R12: a receipt is final early only when everybody has confirmed.
    ReceiptsWaitForAll,
    /// R12: a receipt that isn't confirmed elapses with the bound, not earlier.
    ReceiptsWaitForTheBound,
    /// G5: what leaves the cache hands on when it was last answered from.
    AnswersAreHandedOn,
    /// R11: when the store went back, the roster counts as incomplete for a bound.
    LostRostersAreDistrusted,
    /// R13: an answer counts only if it repeats an open question's number.
    AnswersMatchQuestions,
    /// R14: a second try goes to every publisher.
    SecondTriesGoToAll,
    /// R14: a publisher that stalls leaves the queue group.
    StalledPublishersKeepSilent,
    /// R15: a publisher vouches only for agents whose past lies in its store's history.
    PastsAreKnown,
    /// R15: a past that the store doesn't know needs an operator's word, or the server's own history.
    LostPastsNeedAWord,
    /// R15: a publisher that was away asks who else is there before it answers anything.
    NewcomersAsk,
    /// R15: a publisher that is the only one at a shared store begins an incarnation before it serves.
    LoneNewcomersBegin,
    /// R15: publishers of two histories that both served fall silent when they meet.
    RivalsFallSilent,
    /// R15: no receipt becomes final while agents may follow another history.
    SilentPublishersHoldReceipts,
    /// R15: messages of another history move nothing while the agent's own is alive.
    OwnHistoryComesFirst,
    /// R15: loads and rows count only if they come from the agent's own history.
    ForeignHistoriesMoveNothing,
    /// R15: an agent changes over only by an answer to a probe that proved all that it has seen.
    SuccessorsKnowAllThatWasSeen,
    /// R15: what an agent reads from a database counts only if that has the log that the agent follows.
    DatabasesShareTheLog,
    /// R16: what an agent presents as seen counts only with the store's own code over it.
    VouchersAreChecked,
}

impl Protection {
    /// The rule that it serves.
    pub fn rule(self) -> Rule {
        match self {
            Self::BranchesBeginAnEpoch
            | Self::LostEpochsAreNotRepeated
            | Self::OlderEpochsMoveNothing
            | Self::NewerEpochsFlush => Rule::R2,
            Self::SchemaChangesBeginAnEpoch => Rule::R3,
            Self::OldPositionsAreApplied | Self::AppliedIsContiguous | Self::ReplaysAreComplete => Rule::R5,
            Self::DroppedFloorsLiveOn | Self::HitsMeetFloors | Self::AdvancesRestOnTheReading => Rule::R6,
            Self::ProofsWaitForTheirHead | Self::ProofsDateFromTheQuestion => Rule::R7,
            Self::LeasesRunOut | Self::MarginsAreKept | Self::LookupsCarryTheFenceAge => Rule::R8,
            Self::EntriesAppearChecked
            | Self::ChecksFollowInsertions
            | Self::EvictionPrecedesApplied
            | Self::DeadlinePrecedesFloors
            | Self::ProofsPrecedeApplied => Rule::R9,
            Self::LoadsMeetFloors | Self::AnswersMeetWhatWasApplied | Self::LoadsAreSharedUnderALease => {
                Rule::R10
            }
            Self::AnswersAreHandedOn => Rule::G5,
            Self::ReceiptsWaitForAll | Self::ReceiptsWaitForTheBound => Rule::R12,
            Self::LostRostersAreDistrusted => Rule::R11,
            Self::AnswersMatchQuestions => Rule::R13,
            Self::SecondTriesGoToAll | Self::StalledPublishersKeepSilent => Rule::R14,
            Self::PastsAreKnown
            | Self::LostPastsNeedAWord
            | Self::NewcomersAsk
            | Self::LoneNewcomersBegin
            | Self::RivalsFallSilent
            | Self::SilentPublishersHoldReceipts
            | Self::OwnHistoryComesFirst
            | Self::ForeignHistoriesMoveNothing
            | Self::SuccessorsKnowAllThatWasSeen
            | Self::DatabasesShareTheLog => Rule::R15,
            Self::VouchersAreChecked => Rule::R16,
        }
    }

    /// Whether it is in force: always.
    #[cfg(not(evictd_negative_controls))]
    pub const fn holds(self) -> bool {
        true
    }

    /// Whether it is in force on this thread.
    #[cfg(evictd_negative_controls)]
    pub fn holds(self) -> bool {
        missing::NOW.with(|now| now.get() & self.bit() == 0)
    }

    /// Runs `run` without this protection, on this thread, and without those that are missing already.
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
