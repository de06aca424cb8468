//! Positions in the log.

use std::fmt;

use crate::limits::{EPOCH_MAX, POSITION_BITS, POSITION_MAX};

/// An epoch and a position in it, ordered epoch first (R2).
///
/// Both live in one `u64`, so that the hot path compares them with one atomic load.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct LogPosition(u64);

impl LogPosition {
    /// Below every position of a log: epochs start at 1.
    pub const ZERO: Self = Self(0);

    /// Above every position: a floor that nothing meets.
    pub const NEVER: Self = Self(u64::MAX);

    /// Returns `None` when a part is out of range ([`EPOCH_MAX`], [`POSITION_MAX`]).
    pub const fn new(epoch: u32, position: u64) -> Option<Self> {
        if epoch > EPOCH_MAX || position > POSITION_MAX {
            return None;
        }
        Some(Self(((epoch as u64) << POSITION_BITS) | position))
    }

    /// How often the store may have gone back.
    pub const fn epoch(self) -> u32 {
        (self.0 >> POSITION_BITS) as u32
    }

    /// The number of the change: dense, from 1, and not reset by a new epoch.
    pub const fn position(self) -> u64 {
        self.0 & POSITION_MAX
    }

    /// The next position of the same epoch, or `None` at [`POSITION_MAX`].
    pub const fn next(self) -> Option<Self> {
        Self::new(self.epoch(), self.position() + 1)
    }

    /// An integer that orders like the position, for atomics.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch(), self.position())
    }
}

impl fmt::Debug for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogPosition({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_compare_epoch_first() {
        let old = LogPosition::new(1, POSITION_MAX).unwrap();
        let new = LogPosition::new(2, 0).unwrap();
        assert!(new > old);
        assert_eq!((old.epoch(), old.position()), (1, POSITION_MAX));
    }

    #[test]
    fn parts_out_of_range_are_refused() {
        assert_eq!(LogPosition::new(EPOCH_MAX + 1, 0), None);
        assert_eq!(LogPosition::new(0, POSITION_MAX + 1), None);
        assert_eq!(LogPosition::new(1, POSITION_MAX).unwrap().next(), None);
    }
}
