//! What the checker must find: each protection missing by itself, and flaws around the core.

use evictd_core::protection::Protection::{
    self, AnswersMatchQuestions, AnswersMeetWhatWasApplied, AppliedIsContiguous, BranchesBeginAnEpoch,
    DatabasesShareTheLog, DroppedFloorsLiveOn, HitsMeetFloors, LeasesRunOut, LoadsAreSharedUnderALease,
    LoadsMeetFloors, LostEpochsAreNotRepeated, NewerEpochsFlush, OldPositionsAreApplied,
    OlderEpochsMoveNothing, ProofsDateFromTheQuestion, ProofsWaitForTheirHead, ReplaysAreComplete,
};
use evictd_core::rules::Rule;

use crate::check::{self, CheckOutcome};
use crate::world::{SmallWorld, WorldFlaw};
use crate::worlds::{
    DEMOTED, FAIL_OVER, FEW_API_FLOORS, FEW_KEY_FLOORS, PURGE, RECEIPTS, REPLICA, RESTART, ROUNDS, SMALLEST,
    STRAY, TWO_CHANGES, TWO_FAIL_OVERS,
};

/// A negative control: a missing protection or a flaw, and the world that shows it.
#[derive(Clone, Copy, Debug)]
pub struct WorldControl {
    pub world: SmallWorld,
    /// One of these rules must break. Empty for a second line of defense: then none may break.
    pub breaks: &'static [Rule],
}

impl WorldControl {
    pub fn check(&self) -> CheckOutcome {
        check::shortest_violation(SmallWorld { heals: false, ..self.world })
    }

    pub fn name(&self) -> String {
        match (self.world.missing, self.world.flaw) {
            (Some(missing), _) => format!("without {missing:?} ({})", missing.rule()),
            (None, Some(flaw)) => format!("{flaw:?}"),
            (None, None) => self.world.name.to_owned(),
        }
    }
}

/// The controls, in the order of the rules.
pub const ALL: &[WorldControl] = &[
    without(BranchesBeginAnEpoch, FAIL_OVER, &[Rule::G1, Rule::G2, Rule::G3]),
    // Two epochs with one number are different incarnations: an agent of the lost one is denied. `sim` checks the number.
    without(LostEpochsAreNotRepeated, TWO_FAIL_OVERS, &[]),
    // Proofs of the new epoch wait for a head in it, and the store refuses replays of the old one: that flushes.
    without(NewerEpochsFlush, FAIL_OVER, &[]),
    // Floors and proofs of an old epoch lie below the horizon of the new one.
    without(OlderEpochsMoveNothing, FAIL_OVER, &[]),
    // No position is given twice, so what is at or below `applied` was applied or lies below the horizon.
    without(OldPositionsAreApplied, FAIL_OVER, &[]),
    without(OldPositionsAreApplied, RESTART, &[]),
    without(AppliedIsContiguous, PURGE, &[Rule::G1, Rule::G2]),
    // What is left out stays a hole, since `applied` advances over what is contiguous only.
    WorldControl { world: SmallWorld { missing: Some(ReplaysAreComplete), ..PURGE }, breaks: &[] },
    without(DroppedFloorsLiveOn, SMALLEST, &[Rule::G1, Rule::G2]),
    without(DroppedFloorsLiveOn, FEW_KEY_FLOORS, &[Rule::G1, Rule::G2]),
    without(DroppedFloorsLiveOn, FEW_API_FLOORS, &[Rule::G1, Rule::G2]),
    without(DroppedFloorsLiveOn, REPLICA, &[Rule::G1, Rule::G2]),
    without(HitsMeetFloors, TWO_CHANGES, &[Rule::G1, Rule::G2]),
    with(WorldFlaw::SnapshotsAreTorn, SMALLEST, &[Rule::G1, Rule::G2]),
    without(ProofsWaitForTheirHead, SMALLEST, &[Rule::G1, Rule::G2]),
    without(ProofsDateFromTheQuestion, SMALLEST, &[Rule::G1, Rule::G2]),
    with(WorldFlaw::RoundsDoNotNumber, SMALLEST, &[Rule::G1, Rule::G2]),
    with(WorldFlaw::RoundsAnswerLatecomers, ROUNDS, &[Rule::G1, Rule::G2]),
    without(LeasesRunOut, SMALLEST, &[Rule::G1]),
    with(WorldFlaw::LoadsDateFromTheirArrival, SMALLEST, &[Rule::G1]),
    with(WorldFlaw::ReplicasVouchForTheirReads, REPLICA, &[Rule::G1]),
    with(WorldFlaw::FencesAreIgnored, DEMOTED, &[Rule::G1]),
    without(LoadsMeetFloors, SMALLEST, &[Rule::G1, Rule::G2]),
    without(AnswersMeetWhatWasApplied, SMALLEST, &[Rule::G1, Rule::G2]),
    without(LoadsAreSharedUnderALease, RECEIPTS, &[Rule::G4]),
    without(DatabasesShareTheLog, STRAY, &[Rule::G1, Rule::G2]),
    without(AnswersMatchQuestions, RESTART, &[Rule::G1, Rule::G2]),
];

const fn without(missing: Protection, world: SmallWorld, breaks: &'static [Rule]) -> WorldControl {
    WorldControl { world: SmallWorld { missing: Some(missing), ..world }, breaks }
}

const fn with(flaw: WorldFlaw, world: SmallWorld, breaks: &'static [Rule]) -> WorldControl {
    WorldControl { world: SmallWorld { flaw: Some(flaw), ..world }, breaks }
}
