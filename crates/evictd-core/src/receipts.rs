//! How far each change has come through the regions (R11, R12).
//!
//! A [`ReceiptTracker`] takes in which agent processes the roster has, how far each has applied the
//! log, and which changes were numbered. It ends the receipt of a change early when every process
//! that could have served the key has confirmed. Otherwise it ends the receipt when the bound has
//! elapsed since the change was first seen: then G1 itself holds for it.
//!
//! The caller has two duties:
//!
//! * It reads the roster after a change is committed and before it tracks the change. A process
//!   that is entered later starts at a base that includes the change.
//! * When a new epoch begins, it looks the open receipts up in the store again
//!   ([`ReceiptTracker::begin_epoch`]): the store may have lost the change.
//!
//! The parts: [`receipt`] is what a receipt says, [`open`] one that isn't final, [`instances`] and
//! [`region`] how far the agents are, [`tracker`] all of it together.

mod instances;
mod open;
mod receipt;
mod region;
mod tracker;

pub use self::receipt::{Change, Measured, Receipt, ReceiptEvent, RegionReceipt, RegionState};
pub use self::tracker::{ReceiptTracker, TrackerConfig};

#[cfg(test)]
mod tests;
