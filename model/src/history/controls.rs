//! What the checker must find in worlds of two databases.

use evictd_core::protection::Protection::{
    ForeignHistoriesMoveNothing, LoneNewcomersBegin, LostPastsNeedAWord, NewcomersAsk, OwnHistoryComesFirst,
    PastsAreKnown, RivalsFallSilent, SilentPublishersHoldReceipts, SuccessorsKnowAllThatWasSeen,
    VouchersAreChecked,
};
use evictd_core::rules::Rule::{G2, G4, R16};

use super::world::HistoryWorld;
use super::worlds::{CUT, FORGED, HANDOVER, LOYAL, PHYSICAL_COPY, TWO_COPIES};
use crate::defect::Control;
use crate::defect::Defect::{With, Without};
use crate::defect::Flaw::RowsLagBehindTheirVouchers;

pub const ALL: &[Control<HistoryWorld>] = &[
    Control(Without(PastsAreKnown), TWO_COPIES, &[G2]),
    Control(Without(LostPastsNeedAWord), TWO_COPIES, &[G2]),
    Control(Without(SuccessorsKnowAllThatWasSeen), TWO_COPIES, &[G2]),
    Control(With(RowsLagBehindTheirVouchers), TWO_COPIES, &[G2]),
    Control(Without(ForeignHistoriesMoveNothing), TWO_COPIES, &[G2]),
    Control(Without(LoneNewcomersBegin), PHYSICAL_COPY, &[G2]),
    Control(Without(NewcomersAsk), HANDOVER, &[G4]),
    Control(Without(RivalsFallSilent), CUT, &[G4]),
    Control(Without(SilentPublishersHoldReceipts), HANDOVER, &[G4]),
    Control(Without(OwnHistoryComesFirst), LOYAL, &[G4]),
    Control(Without(VouchersAreChecked), FORGED, &[R16]),
];
