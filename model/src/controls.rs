//! What the checker must find: each protection missing by itself, and flaws around the core.

use evictd_core::protection::Protection::{
    self, AnswersMatchQuestions, AnswersMeetWhatWasApplied, AppliedIsContiguous, BranchesBeginAnEpoch,
    DatabasesShareTheLog, DroppedFloorsLiveOn, HitsMeetFloors, LeasesRunOut, LoadsAreSharedUnderALease,
    LoadsMeetFloors, LostEpochsAreNotRepeated, NewerEpochsFlush, OldPositionsAreApplied,
    OlderEpochsMoveNothing, ProofsDateFromTheQuestion, ProofsWaitForTheirHead, ReplaysAreComplete,
};
use evictd_core::rules::Rule;

use crate::check::{self, Outcome};
use crate::world::{Flaw, World};
use crate::worlds::{
    DEMOTED, FAIL_OVER, FEW_API_FLOORS, FEW_KEY_FLOORS, PURGE, RECEIPTS, REPLICA, RESTART, ROUNDS, SMALLEST,
    STRAY, TWO_CHANGES, TWO_FAIL_OVERS,
};

/// Something that is missing or wrong, and where that shows.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    /// The world without it.
    pub world: World,
    /// What must break: one of these. None where the protection is a second line: then nothing may break.
    pub breaks: &'static [Rule],
}

impl Control {
    /// Looks for a shortest way to a broken rule.
    pub fn check(&self) -> Outcome {
        check::shortest_violation(World { heals: false, ..self.world })
    }

    /// What is missing or wrong.
    pub fn name(&self) -> String {
        match (self.world.missing, self.world.flaw) {
            (Some(missing), _) => format!("without {missing:?} ({})", missing.rule()),
            (None, Some(flaw)) => format!("{flaw:?}"),
            (None, None) => self.world.name.to_owned(),
        }
    }
}

/// The controls, in the order of the rules.
pub const ALL: &[Control] = &[
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
    Control { world: World { missing: Some(ReplaysAreComplete), ..PURGE }, breaks: &[] },
    without(DroppedFloorsLiveOn, SMALLEST, &[Rule::G1, Rule::G2]),
    without(DroppedFloorsLiveOn, FEW_KEY_FLOORS, &[Rule::G1, Rule::G2]),
    without(DroppedFloorsLiveOn, FEW_API_FLOORS, &[Rule::G1, Rule::G2]),
    without(DroppedFloorsLiveOn, REPLICA, &[Rule::G1, Rule::G2]),
    without(HitsMeetFloors, TWO_CHANGES, &[Rule::G1, Rule::G2]),
    with(Flaw::SnapshotsAreTorn, SMALLEST, &[Rule::G1, Rule::G2]),
    without(ProofsWaitForTheirHead, SMALLEST, &[Rule::G1, Rule::G2]),
    without(ProofsDateFromTheQuestion, SMALLEST, &[Rule::G1, Rule::G2]),
    with(Flaw::RoundsDoNotNumber, SMALLEST, &[Rule::G1, Rule::G2]),
    with(Flaw::RoundsAnswerLatecomers, ROUNDS, &[Rule::G1, Rule::G2]),
    without(LeasesRunOut, SMALLEST, &[Rule::G1]),
    with(Flaw::LoadsDateFromTheirArrival, SMALLEST, &[Rule::G1]),
    with(Flaw::ReplicasVouchForTheirReads, REPLICA, &[Rule::G1]),
    with(Flaw::FencesAreIgnored, DEMOTED, &[Rule::G1]),
    without(LoadsMeetFloors, SMALLEST, &[Rule::G1, Rule::G2]),
    without(AnswersMeetWhatWasApplied, SMALLEST, &[Rule::G1, Rule::G2]),
    without(LoadsAreSharedUnderALease, RECEIPTS, &[Rule::G4]),
    without(DatabasesShareTheLog, STRAY, &[Rule::G1, Rule::G2]),
    without(AnswersMatchQuestions, RESTART, &[Rule::G1, Rule::G2]),
];

const fn without(missing: Protection, world: World, breaks: &'static [Rule]) -> Control {
    Control { world: World { missing: Some(missing), ..world }, breaks }
}

const fn with(flaw: Flaw, world: World, breaks: &'static [Rule]) -> Control {
    Control { world: World { flaw: Some(flaw), ..world }, breaks }
}
