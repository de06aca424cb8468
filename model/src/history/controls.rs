//! What the checker must find: each protection missing by itself, and flaws around the core.

use evictd_core::protection::Protection::{
    self, ForeignHistoriesMoveNothing, LoneNewcomersBegin, LostPastsNeedAWord, NewcomersAsk,
    OwnHistoryComesFirst, PastsAreKnown, RivalsFallSilent, SilentPublishersHoldReceipts,
    SuccessorsKnowAllThatWasSeen, VouchersAreChecked,
};
use evictd_core::rules::Rule;

use super::world::{Flaw, World};
use super::worlds::{CUT, FORGED, HANDOVER, LOYAL, PHYSICAL_COPY, TWO_COPIES};
use crate::check::{self, Outcome};

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
            (None, None) => self.world.about.to_owned(),
        }
    }
}

/// The controls.
pub const ALL: &[Control] = &[
    without(PastsAreKnown, TWO_COPIES, &[Rule::G2]),
    without(LostPastsNeedAWord, TWO_COPIES, &[Rule::G2]),
    without(SuccessorsKnowAllThatWasSeen, TWO_COPIES, &[Rule::G2]),
    with(Flaw::RowsLagBehindTheirVouchers, TWO_COPIES, &[Rule::G2]),
    without(ForeignHistoriesMoveNothing, TWO_COPIES, &[Rule::G2]),
    without(LoneNewcomersBegin, PHYSICAL_COPY, &[Rule::G2]),
    without(NewcomersAsk, HANDOVER, &[Rule::G4]),
    without(RivalsFallSilent, CUT, &[Rule::G4]),
    without(SilentPublishersHoldReceipts, HANDOVER, &[Rule::G4]),
    without(OwnHistoryComesFirst, LOYAL, &[Rule::G4]),
    without(VouchersAreChecked, FORGED, &[Rule::R16]),
];

const fn without(missing: Protection, world: World, breaks: &'static [Rule]) -> Control {
    Control { world: World { missing: Some(missing), ..world }, breaks }
}

const fn with(flaw: Flaw, world: World, breaks: &'static [Rule]) -> Control {
    Control { world: World { flaw: Some(flaw), ..world }, breaks }
}
