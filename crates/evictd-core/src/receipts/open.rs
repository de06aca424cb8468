//! A receipt that is not final yet.

use std::collections::BTreeMap;
use std::time::Duration;

use super::receipt::{Change, Measured, ReceiptEvent};
use crate::exposure::{ApplyReport, Exposure};
use crate::ids::Region;
use crate::limits::REPORTED_TIME_MAX;
use crate::offset::DurationRange;
use crate::time::LeaseTime;

#[derive(Debug)]
pub(super) struct OpenReceipt {
    pub(super) change: Change,
    /// Where its times are measured from.
    pub(super) since: LeaseTime,
    pub(super) measured: Measured,
    pub(super) first_seen: LeaseTime,
    /// How many changes were tracked before it.
    pub(super) number: u64,
    pub(super) reports: RegionReports,
}

impl OpenReceipt {
    /// Returns the longest time that can have passed since the commit.
    pub(super) fn age_at_most(&self, now: LeaseTime) -> Duration {
        match self.measured {
            Measured::FromRequest => now.since(self.since),
            Measured::FromFirstSight => REPORTED_TIME_MAX,
        }
    }

    /// The event of a region that confirms now. Only deletions have one.
    pub(super) fn confirmation(&self, region: &Region, now: LeaseTime) -> Option<ReceiptEvent> {
        let after = now.since(self.since);
        let is_deletion = self.change.cause.is_deletion();
        is_deletion.then(|| ReceiptEvent::Confirmed { region: region.clone(), after })
    }
}

/// What the agents of each region reported of one change.
pub(super) type RegionReports = BTreeMap<Region, RegionReport>;

#[derive(Clone, Copy, Default, Debug)]
pub(super) struct RegionReport {
    pub(super) lag: Option<DurationRange>,
    pub(super) exposure: Option<Exposure>,
}

impl RegionReport {
    /// Returns the report without what is impossible: no agent can have measured more.
    #[must_use]
    pub(super) fn at_most(self, max: Duration) -> Self {
        let exposure =
            self.exposure.map(|Exposure { last_after }| Exposure { last_after: last_after.min(max) });
        Self { lag: self.lag.map(|lag| lag.at_most(max)), exposure }
    }

    /// Keeps the longest lag and the latest answer.
    pub(super) fn add(&mut self, ApplyReport { lag, exposure, .. }: &ApplyReport) {
        let slowest = self.lag.get_or_insert(*lag);
        if lag.high > slowest.high {
            *slowest = *lag;
        }
        let worst = self.exposure.get_or_insert_default();
        worst.last_after = worst.last_after.max(exposure.last_after);
    }
}
