//! A store's decisions about its log: which positions rows get (R1), which rows answer a replay
//! (R5), and which rows it may delete.
//!
//! The store finds the rows, and writes what is decided here, in one transaction.

use std::time::Duration;

use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::StoreTime;

/// Numbers committed rows from `head` on, without a gap. `waiting` is in the order of their ids.
/// Returns `None` when the epoch has too few positions left: then no row may get one.
pub fn number<R>(head: LogPosition, waiting: impl IntoIterator<Item = R>) -> Option<Vec<(LogPosition, R)>> {
    let mut at = head;
    let number = |row| {
        at = at.next()?;
        Some((at, row))
    };
    waiting.into_iter().map(number).collect()
}

/// Returns how many of the rows `found` may answer a replay that begins at `first`: those before
/// the first gap, because a missing row doesn't mean that nothing changed. Rows of another epoch
/// than the head's don't answer.
pub fn covered(head: LogPosition, first: LogPosition, found: impl IntoIterator<Item = LogPosition>) -> usize {
    let mut expected = Some(first).filter(|first| first.epoch() == head.epoch());
    let is_next = |position: &LogPosition| {
        let meets = Some(*position) == expected || !Protection::ReplaysAreComplete.holds();
        expected = position.next();
        meets
    };
    found.into_iter().take_while(is_next).count()
}

/// What decides how long a numbered row is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoggedRow {
    pub committed_at: StoreTime,
    /// The row is a request's that has no final receipt yet.
    pub awaits_receipt: bool,
}

/// Returns how many of the oldest rows may be deleted when each is kept for `kept`. `rows` is in
/// the order of positions; only a prefix is deleted, never a row from the middle.
///
/// A row from the future was written before the clock was set back. It counts as old as the row
/// before it, and doesn't stop the purge.
pub fn purgeable(rows: impl IntoIterator<Item = LoggedRow>, now: StoreTime, kept: Duration) -> usize {
    let may_go = |row: &LoggedRow| {
        let is_young = row.committed_at > now.before(kept) && row.committed_at <= now;
        !is_young && !row.awaits_receipt
    };
    rows.into_iter().take_while(may_go).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::POSITION_MAX;

    fn at(epoch: u32, position: u64) -> LogPosition {
        LogPosition::new(epoch, position).unwrap()
    }

    #[test]
    fn positions_follow_the_head() {
        assert_eq!(number(at(2, 7), ["a", "b"]), Some(vec![(at(2, 8), "a"), (at(2, 9), "b")]));
        assert_eq!(number(at(2, 7), [""; 0]), Some(vec![]));
    }

    #[test]
    fn rows_beyond_the_last_position_are_not_numbered() {
        assert_eq!(number(at(1, POSITION_MAX - 1), ["a"]), Some(vec![(at(1, POSITION_MAX), "a")]));
        assert_eq!(number(at(1, POSITION_MAX - 1), ["a", "b"]), None);
    }

    #[test]
    fn replay_ends_at_the_first_gap() {
        let covered = |found: &[u64]| covered(at(2, 9), at(2, 4), found.iter().map(|n| at(2, *n)));
        assert_eq!(covered(&[4, 5, 6]), 3);
        assert_eq!(covered(&[4, 5, 7]), 2, "a purged row ends the answer");
        assert_eq!(covered(&[5, 6]), 0, "so does a missing first row");
        assert_eq!(covered(&[]), 0);
    }

    #[test]
    fn replay_covers_nothing_of_another_epoch() {
        assert_eq!(covered(at(3, 9), at(2, 4), [at(2, 4)]), 0);
        assert_eq!(covered(at(2, 9), at(2, 4), [at(3, 4)]), 0);
    }

    #[test]
    fn only_a_prefix_of_old_final_rows_is_purgeable() {
        let row = |seconds: i64, awaits_receipt| LoggedRow {
            committed_at: StoreTime(seconds * 1_000_000),
            awaits_receipt,
        };
        let purgeable = |rows: &[LoggedRow]| {
            purgeable(rows.iter().copied(), StoreTime(100_000_000), Duration::from_secs(30))
        };
        let (old, young, open) = (row(70, false), row(71, false), row(9, true));
        assert_eq!(purgeable(&[old, old, young]), 2);
        assert_eq!(purgeable(&[young, old]), 0, "only a prefix");
        assert_eq!(purgeable(&[old, open, old]), 1, "its receipt is not final");
        assert_eq!(
            purgeable(&[old, row(101, false), old, young]),
            3,
            "the future is as old as the row before it"
        );
    }
}
