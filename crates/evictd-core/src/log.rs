//! What a store decides about its log: which positions rows get (R1), which rows answer a replay (R5), and which may go.
//!
//! A store is a database. It finds the rows, and writes what is decided here, in one transaction.

use std::time::Duration;

use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::StoreTime;

/// Gives committed rows that have no position those that follow `head`, without a gap. `waiting` is in the order of
/// their ids. `None` if there aren't that many positions: then none may be given.
pub fn number<R>(head: LogPosition, waiting: impl IntoIterator<Item = R>) -> Option<Vec<(LogPosition, R)>> {
    let mut at = head;
    let place = |row| {
        at = at.next()?;
        Some((at, row))
    };
    waiting.into_iter().map(place).collect()
}

/// How many of the rows `found`, from the first on, may answer a replay that begins at `first`: as many as there are
/// without a gap, because what is absent doesn't stand for nothing. None of another epoch than the head's.
pub fn covered(head: LogPosition, first: LogPosition, found: impl IntoIterator<Item = LogPosition>) -> usize {
    let mut expected = Some(first).filter(|first| first.epoch() == head.epoch());
    let is_next = |position: &LogPosition| {
        let meets = Some(*position) == expected || !Protection::ReplaysAreComplete.holds();
        expected = position.next();
        meets
    };
    found.into_iter().take_while(is_next).count()
}

/// A numbered row, as far as it matters for how long it is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoggedRow {
    /// When it was committed, on the store's clock.
    pub committed_at: StoreTime,
    /// A request wrote it, and has no final receipt yet.
    pub awaits_receipt: bool,
}

/// How many of the oldest rows, in the order of positions, may be deleted at `now` when each is kept for `kept`: what is
/// gone is a prefix, never a row from the middle.
///
/// A row from the future was written before the clock was put back. It is as old as the one before it, and doesn't stop
/// the purge.
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
    fn rows_that_find_no_position_take_none() {
        assert_eq!(number(at(1, POSITION_MAX - 1), ["a"]), Some(vec![(at(1, POSITION_MAX), "a")]));
        assert_eq!(number(at(1, POSITION_MAX - 1), ["a", "b"]), None);
    }

    #[test]
    fn replay_covers_what_is_there_without_a_gap() {
        let covered = |found: &[u64]| covered(at(2, 9), at(2, 4), found.iter().map(|n| at(2, *n)));
        assert_eq!(covered(&[4, 5, 6]), 3);
        assert_eq!(covered(&[4, 5, 7]), 2, "what was purged isn't left out");
        assert_eq!(covered(&[5, 6]), 0, "nor the first");
        assert_eq!(covered(&[]), 0);
    }

    #[test]
    fn replay_covers_nothing_of_another_epoch() {
        assert_eq!(covered(at(3, 9), at(2, 4), [at(2, 4)]), 0);
        assert_eq!(covered(at(2, 9), at(2, 4), [at(3, 4)]), 0);
    }

    #[test]
    fn only_a_prefix_of_old_settled_rows_may_go() {
        let row = |seconds: i64, awaits_receipt| LoggedRow {
            committed_at: StoreTime(seconds * 1_000_000),
            awaits_receipt,
        };
        let purgeable = |rows: &[LoggedRow]| {
            purgeable(rows.iter().copied(), StoreTime(100_000_000), Duration::from_secs(30))
        };
        let (old, young, open) = (row(70, false), row(71, false), row(9, true));
        assert_eq!(purgeable(&[old, old, young]), 2);
        assert_eq!(purgeable(&[young, old]), 0, "never from the middle");
        assert_eq!(purgeable(&[old, open, old]), 1, "a request waits for its receipt");
        assert_eq!(
            purgeable(&[old, row(101, false), old, young]),
            3,
            "the future is as old as the row before it"
        );
    }
}
