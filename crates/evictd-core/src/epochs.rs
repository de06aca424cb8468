//! When a store begins a new epoch, and which (R2).

use crate::limits::{EPOCH_MAX, EPOCHS_PER_TIMELINE};
use crate::protection::Protection;

/// Whether the head of a log was written in another history than the one that the server writes
/// now. Then commits may be lost, and their positions must not be used again in the same epoch.
pub fn is_branched<L: PartialEq>(head: &L, server: &L) -> bool {
    head != server && Protection::BranchesBeginAnEpoch.holds()
}

/// Returns the epoch after the store's `own` and the highest that an agent proved to have `seen`,
/// on a server that writes `timeline`. SQLite has one timeline.
///
/// Adding one is not enough: the commit that began an epoch may be among the lost ones. So each
/// timeline has [`EPOCHS_PER_TIMELINE`] epochs of its own.
pub fn next_epoch(timeline: u32, own: u32, seen: u32) -> u32 {
    let next = own.max(seen).saturating_add(1);
    if Protection::LostEpochsAreNotRepeated.holds() { next.max(first_epoch(timeline)) } else { next }
}

/// The first epoch of a timeline. Timelines beyond the 4096th have none of their own, and count on.
fn first_epoch(timeline: u32) -> u32 {
    let first = timeline.saturating_sub(1).saturating_mul(EPOCHS_PER_TIMELINE).saturating_add(1);
    if first <= EPOCH_MAX { first } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_epoch_is_above_the_own_and_the_seen_one() {
        assert_eq!(next_epoch(1, 1, 0), 2);
        assert_eq!(next_epoch(1, 1, 5), 6);
        assert_eq!(next_epoch(1, 5, 1), 6);
    }

    #[test]
    fn timelines_share_no_epoch() {
        assert_eq!(next_epoch(2, 1, 0), 257);
        assert_eq!(next_epoch(2, 300, 0), 301);
        assert_eq!(next_epoch(3, 300, 301), 513);
        // The standby didn't receive the epochs that an operator began on the first timeline.
        let (lost, begun) = (next_epoch(1, 255, 0), next_epoch(2, 1, 0));
        assert!(lost < begun);
    }

    #[test]
    fn late_timeline_counts_on() {
        assert_eq!(next_epoch(4096, 1, 0), 4095 * 256 + 1);
        assert_eq!(next_epoch(4097, 9, 0), 10);
        assert_eq!(next_epoch(u32::MAX, 9, 0), 10);
    }
}
