//! What a receipt says of one change, and of each region.

use std::time::Duration;

use crate::exposure::Exposure;
use crate::ids::{Identity, Region, WorkspaceId};
use crate::invalidation::Cause;
use crate::offset::DurationRange;
use crate::position::LogPosition;
use crate::time::StoreTime;

/// A numbered change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The request that made it, and its workspace. `None` for direct SQL and for expiries, which
    /// have no request that a receipt could be queried by.
    pub request: Option<(Box<str>, WorkspaceId)>,
    pub position: LogPosition,
    pub cause: Cause,
    pub committed_at: StoreTime,
}

/// The moment from which the times of a receipt are measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measured {
    /// Before the commit, on this publisher's clock: each time is an upper bound.
    FromRequest,
    /// When this publisher first saw the change, which was committed earlier.
    FromFirstSight,
}

labels!(Measured { FromRequest = "request", FromFirstSight = "first_sight" });

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RegionState {
    /// An agent of the region has not confirmed yet.
    Pending,
    /// Every agent of the region that could have served the key has applied the change.
    Confirmed,
    /// Not every agent confirmed, but the bound has elapsed: no agent there answers from before the
    /// change.
    Elapsed,
    /// The bound has elapsed, and an agent that didn't confirm serves stale records by policy.
    Unproven,
    /// A configured region without a known agent.
    Absent,
}

labels!(RegionState {
    Pending = "pending",
    Confirmed = "confirmed",
    Elapsed = "elapsed",
    Unproven = "unproven",
    Absent = "absent",
});

/// One region's line of a receipt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionReceipt {
    pub region: Region,
    pub state: RegionState,
    /// How many agent processes the region has.
    pub instances: usize,
    /// When the last of them confirmed, since the start of the measurement.
    pub confirmed_after: Option<Duration>,
    /// The first [`RECEIPT_NAMES_MAX`](crate::limits::RECEIPT_NAMES_MAX) processes that haven't
    /// confirmed.
    pub missing: Vec<Identity>,
    /// How many haven't confirmed.
    pub missing_count: usize,
    /// The lag that the slowest agent measured, of those whose report arrived.
    pub lag: Option<DurationRange>,
    /// The last answer from the old state by any agent whose report arrived.
    pub exposure: Option<Exposure>,
    /// Several live processes share an agent's name.
    pub duplicate_names: bool,
}

/// What is known of one change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Receipt {
    pub change: Change,
    /// Nothing in it can change any more.
    pub is_final: bool,
    pub measured: Measured,
    /// How long it took to become final, since the start of the measurement.
    pub final_after: Option<Duration>,
    /// By region name.
    pub regions: Vec<RegionReceipt>,
}

impl Receipt {
    /// The weakest of the regions' states. Absent regions don't count.
    pub fn state(&self) -> RegionState {
        let weakest = [RegionState::Pending, RegionState::Unproven, RegionState::Elapsed]
            .into_iter()
            .find(|state| self.regions.iter().any(|region| region.state == *state));
        match weakest {
            Some(state) => state,
            None if self.is_final => RegionState::Confirmed,
            None => RegionState::Pending,
        }
    }
}

/// What happened, for metrics and the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReceiptEvent {
    /// Every agent of the region has applied a deletion.
    Confirmed {
        region: Region,
        /// Since the start of the measurement.
        after: Duration,
    },
    /// A request's receipt is final and is to be stored.
    Final(Receipt),
}
