//! What the checker must find in small worlds: each protection missing by itself, and flaws around the core.

use evictd_core::protection::Protection::{
    AnswersMatchQuestions, AnswersMeetWhatWasApplied, AppliedIsContiguous, BranchesBeginAnEpoch,
    DatabasesShareTheLog, DroppedFloorsLiveOn, HitsMeetFloors, LeasesRunOut, LoadsAreSharedUnderALease,
    LoadsMeetFloors, LostEpochsAreNotRepeated, NewerEpochsFlush, OldPositionsAreApplied,
    OlderEpochsMoveNothing, ProofsDateFromTheQuestion, ProofsWaitForTheirHead, ReplaysAreComplete,
};
use evictd_core::rules::Rule::{G1, G2, G3, G4};

use crate::defect::Control;
use crate::defect::Defect::{With, Without};
use crate::defect::Flaw::{
    FencesAreIgnored, LoadsDateFromTheirArrival, ReplicasVouchForTheirReads, RoundsAnswerLatecomers,
    RoundsDoNotNumber, SnapshotsAreTorn,
};
use crate::world::SmallWorld;
use crate::worlds::{
    DEMOTED, FAIL_OVER, FEW_API_FLOORS, FEW_KEY_FLOORS, PURGE, RECEIPTS, REPLICA, RESTART, ROUNDS, SMALLEST,
    STRAY, TWO_CHANGES, TWO_FAIL_OVERS,
};

/// The controls, in the order of the rules.
pub const ALL: &[Control<SmallWorld>] = &[
    Control(Without(BranchesBeginAnEpoch), FAIL_OVER, &[G1, G2, G3]),
    // Two epochs with one number are different incarnations: an agent of the lost one is denied. `sim` checks the number.
    Control(Without(LostEpochsAreNotRepeated), TWO_FAIL_OVERS, &[]),
    // Proofs of the new epoch wait for a head in it, and the store refuses replays of the old one: that flushes.
    Control(Without(NewerEpochsFlush), FAIL_OVER, &[]),
    // Floors and proofs of an old epoch lie below the horizon of the new one.
    Control(Without(OlderEpochsMoveNothing), FAIL_OVER, &[]),
    // No position is given twice, so what is at or below `applied` was applied or lies below the horizon.
    Control(Without(OldPositionsAreApplied), FAIL_OVER, &[]),
    Control(Without(OldPositionsAreApplied), RESTART, &[]),
    Control(Without(AppliedIsContiguous), PURGE, &[G1, G2]),
    // What is left out stays a hole, since `applied` advances over what is contiguous only.
    Control(Without(ReplaysAreComplete), PURGE, &[]),
    Control(Without(DroppedFloorsLiveOn), SMALLEST, &[G1, G2]),
    Control(Without(DroppedFloorsLiveOn), FEW_KEY_FLOORS, &[G1, G2]),
    Control(Without(DroppedFloorsLiveOn), FEW_API_FLOORS, &[G1, G2]),
    Control(Without(DroppedFloorsLiveOn), REPLICA, &[G1, G2]),
    Control(Without(HitsMeetFloors), TWO_CHANGES, &[G1, G2]),
    Control(With(SnapshotsAreTorn), SMALLEST, &[G1, G2]),
    Control(Without(ProofsWaitForTheirHead), SMALLEST, &[G1, G2]),
    Control(Without(ProofsDateFromTheQuestion), SMALLEST, &[G1, G2]),
    Control(With(RoundsDoNotNumber), SMALLEST, &[G1, G2]),
    Control(With(RoundsAnswerLatecomers), ROUNDS, &[G1, G2]),
    Control(Without(LeasesRunOut), SMALLEST, &[G1]),
    Control(With(LoadsDateFromTheirArrival), SMALLEST, &[G1]),
    Control(With(ReplicasVouchForTheirReads), REPLICA, &[G1]),
    Control(With(FencesAreIgnored), DEMOTED, &[G1]),
    Control(Without(LoadsMeetFloors), SMALLEST, &[G1, G2]),
    Control(Without(AnswersMeetWhatWasApplied), SMALLEST, &[G1, G2]),
    Control(Without(LoadsAreSharedUnderALease), RECEIPTS, &[G4]),
    Control(Without(DatabasesShareTheLog), STRAY, &[G1, G2]),
    Control(Without(AnswersMatchQuestions), RESTART, &[G1, G2]),
];
