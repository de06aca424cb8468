//! What is missing in a world of a negative control.

use evictd_core::protection::Protection;
use evictd_core::rules::Rule;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Defect {
    /// The core is without a protection.
    Without(Protection),
    /// A flaw around the core.
    With(Flaw),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Flaw {
    /// A round's answer goes to probes that arrived after its transaction.
    RoundsAnswerLatecomers,
    /// A demoted primary's reads count from their query, however old its fence.
    FencesAreIgnored,
    /// `as_of` is read after the record, in a snapshot of its own.
    SnapshotsAreTorn,
    /// A replica's reads count from their query.
    ReplicasVouchForTheirReads,
    /// Loads count from their arrival.
    LoadsDateFromTheirArrival,
    /// A round answers with the head, whatever waits for its position.
    RoundsDoNotNumber,
    /// A row says that the log reached the beginning of its incarnation, instead of its own position.
    RowsLagBehindTheirVouchers,
}

/// A negative control: a defect, the world that shows it, and the rules of which one must break. Without rules it is a
/// second line of defense: then none may break.
#[derive(Clone, Copy, Debug)]
pub struct Control<W: 'static>(pub Defect, pub W, pub &'static [Rule]);

/// Runs a part of the core with this defect.
pub fn under<T>(defect: Option<Defect>, run: impl FnOnce() -> T) -> T {
    match defect {
        #[cfg(evictd_negative_controls)]
        Some(Defect::Without(protection)) => protection.without(run),
        _ => run(),
    }
}
