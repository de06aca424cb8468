//! What the checker must find: each protection missing by itself, and flaws around the core.

use evictd_core::protection::Protection::{
    self, ForeignHistoriesMoveNothing, LoneNewcomersBegin, LostPastsNeedAWord, NewcomersAsk,
    OwnHistoryComesFirst, PastsAreKnown, RivalsFallSilent, SilentPublishersHoldReceipts,
    SuccessorsKnowAllThatWasSeen, VouchersAreChecked,
};
use evictd_core::rules::Rule;

use super::world::{HistoryFlaw, HistoryWorld};
use super::worlds::{CUT, FORGED, HANDOVER, LOYAL, PHYSICAL_COPY, TWO_COPIES};
use crate::check::{self, CheckOutcome};

/// A negative control: a missing protection or a flaw, and the world that shows it.
#[derive(Clone, Copy, Debug)]
pub struct HistoryControl {
    pub world: HistoryWorld,
    /// One of these rules must break. Empty for a second line of defense: then none may break.
    pub breaks: &'static [Rule],
}

impl HistoryControl {
    pub fn check(&self) -> CheckOutcome {
        check::shortest_violation(HistoryWorld { heals: false, ..self.world })
    }

    pub fn name(&self) -> String {
        match (self.world.missing, self.world.flaw) {
            (Some(missing), _) => format!("without {missing:?} ({})", missing.rule()),
            (None, Some(flaw)) => format!("{flaw:?}"),
            (None, None) => self.world.about.to_owned(),
        }
    }
}

pub const ALL: &[HistoryControl] = &[
    without(PastsAreKnown, TWO_COPIES, &[Rule::G2]),
    without(LostPastsNeedAWord, TWO_COPIES, &[Rule::G2]),
    without(SuccessorsKnowAllThatWasSeen, TWO_COPIES, &[Rule::G2]),
    with(HistoryFlaw::RowsLagBehindTheirVouchers, TWO_COPIES, &[Rule::G2]),
    without(ForeignHistoriesMoveNothing, TWO_COPIES, &[Rule::G2]),
    without(LoneNewcomersBegin, PHYSICAL_COPY, &[Rule::G2]),
    without(NewcomersAsk, HANDOVER, &[Rule::G4]),
    without(RivalsFallSilent, CUT, &[Rule::G4]),
    without(SilentPublishersHoldReceipts, HANDOVER, &[Rule::G4]),
    without(OwnHistoryComesFirst, LOYAL, &[Rule::G4]),
    without(VouchersAreChecked, FORGED, &[Rule::R16]),
];

const fn without(missing: Protection, world: HistoryWorld, breaks: &'static [Rule]) -> HistoryControl {
    HistoryControl { world: HistoryWorld { missing: Some(missing), ..world }, breaks }
}

const fn with(flaw: HistoryFlaw, world: HistoryWorld, breaks: &'static [Rule]) -> HistoryControl {
    HistoryControl { world: HistoryWorld { flaw: Some(flaw), ..world }, breaks }
}
