//! The numbers of processes, of their runs, and of queries.

/// Numbers processes: agents from zero, then publishers, last those of a copy of the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeNumber(pub usize);

/// The run of a process. Messages to an earlier one aren't delivered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Life(pub u32);

pub type Nonce = u64;
