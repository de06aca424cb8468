//! A receipt as clients see it (R12): evictd's own addition to Unkey's API.
//!
//! Times are milliseconds, with fractions where they were measured.

use std::borrow::Cow;
use std::time::Duration;

use evictd_core::ids::Identity;
use evictd_core::invalidation::Cause;
use evictd_core::offset::DurationRange;
use evictd_core::position::LogPosition;
use evictd_core::receipts::{Receipt, RegionReceipt, RegionState};
use evictd_core::time::{StoreTime, millis};
use serde::{Deserialize, Serialize};

/// The progress of a change.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Propagation {
    pub request_id: String,
    /// `pending`, `confirmed`, `elapsed` or `unproven`: the weakest state of the regions.
    pub state: Cow<'static, str>,
    pub r#final: bool,
    /// The change's position in the log. Absent until it has one, and for a request that affected no cached record.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub position: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub epoch: Option<u32>,
    /// `created`, `changed`, `deleted`, `erased`, `restored` or `expired`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cause: Option<Cow<'static, str>>,
    /// The commit on the home store's clock, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub committed_at: Option<i64>,
    /// The start of the durations below. `request`: before the commit, so that each duration is an upper bound.
    /// `first_sight`: when this publisher found a change that another one had made.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub measured_from: Option<Cow<'static, str>>,
    pub bound_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub final_after_ms: Option<f64>,
    pub regions: Vec<RegionPropagation>,
}

/// The progress of a change in one region.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegionPropagation {
    pub region: String,
    /// `pending`; `confirmed` by every agent process; `elapsed`: the bound has passed, so no agent answers from
    /// before the change; `unproven`: the same, except that an agent serves stale records by policy; `absent`: a
    /// configured region without an agent.
    pub state: Cow<'static, str>,
    /// The number of agent processes.
    pub instances: usize,
    /// The last confirmation. No verification that starts later in the region is answered from before the change.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub confirmed_after_ms: Option<f64>,
    /// The first of the processes that haven't confirmed.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub missing: Vec<MissingInstance>,
    /// The number of all of them.
    pub missing_count: usize,
    /// From the commit to the application by the slowest agent, as that agent measured it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub lag_ms: Option<MillisInterval>,
    /// Answers from the old state, as far as agents reported them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exposure: Option<ExposureSeen>,
    /// Whether several live processes have one name, which is a configuration error.
    pub duplicate_names: bool,
}

/// An agent process that hasn't confirmed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MissingInstance {
    pub agent: String,
    pub instance: String,
}

/// A measurement with its error: the true value is between the two.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct MillisInterval {
    pub low: f64,
    pub high: f64,
}

/// Answers that were given from the old state after the commit.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExposureSeen {
    /// The time from the commit to the last such answer, at most; 0 if there was none.
    pub last_answer_after_ms: f64,
}

impl Propagation {
    /// Converts a receipt, open or final. `None` if no request made the change, so that no client can query it.
    pub fn new(receipt: &Receipt, bound: Duration) -> Option<Self> {
        let change = &receipt.change;
        let (request, _) = change.request.as_ref()?;
        Some(Self {
            state: Cow::Borrowed(receipt.state().label()),
            r#final: receipt.is_final,
            measured_from: Some(Cow::Borrowed(receipt.measured.label())),
            final_after_ms: receipt.final_after.map(millis),
            regions: receipt.regions.iter().map(RegionPropagation::new).collect(),
            ..Self::waiting(request, Some((change.position, change.cause)), Some(change.committed_at), bound)
        })
    }

    /// The receipt of a request that affected no cached record: it is final at once.
    pub fn nothing(request_id: &str, bound: Duration) -> Self {
        Self {
            state: Cow::Borrowed(RegionState::Confirmed.label()),
            r#final: true,
            ..Self::waiting(request_id, None, None, bound)
        }
    }

    /// The receipt of a committed change that this publisher doesn't track yet.
    pub fn waiting(
        request_id: &str,
        change: Option<(LogPosition, Cause)>,
        committed_at: Option<StoreTime>,
        bound: Duration,
    ) -> Self {
        Self {
            request_id: request_id.to_owned(),
            state: Cow::Borrowed(RegionState::Pending.label()),
            r#final: false,
            position: change.map(|(position, _)| position.position()),
            epoch: change.map(|(position, _)| position.epoch()),
            cause: change.map(|(_, cause)| Cow::Borrowed(cause.label())),
            committed_at: committed_at.map(StoreTime::as_millis),
            measured_from: None,
            bound_ms: u64::try_from(bound.as_millis()).unwrap_or(u64::MAX),
            final_after_ms: None,
            regions: Vec::new(),
        }
    }
}

impl RegionPropagation {
    fn new(region: &RegionReceipt) -> Self {
        let missing = |identity: &Identity| MissingInstance {
            agent: identity.agent.to_string(),
            instance: identity.instance.to_string(),
        };
        Self {
            region: region.region.to_string(),
            state: Cow::Borrowed(region.state.label()),
            instances: region.instances,
            confirmed_after_ms: region.confirmed_after.map(millis),
            missing: region.missing.iter().map(missing).collect(),
            missing_count: region.missing_count,
            lag_ms: region
                .lag
                .map(|DurationRange { low, high }| MillisInterval { low: millis(low), high: millis(high) }),
            exposure: region
                .exposure
                .map(|exposure| ExposureSeen { last_answer_after_ms: millis(exposure.last_after) }),
            duplicate_names: region.duplicate_names,
        }
    }
}

#[cfg(test)]
mod tests {
    use evictd_core::exposure::Exposure;
    use evictd_core::ids::{AgentName, InstanceId, Region, WorkspaceId};
    use evictd_core::receipts::{Change, Measured};

    use super::*;

    fn receipt() -> Receipt {
        let confirmed = RegionReceipt {
            region: Region::new("eu"),
            state: RegionState::Confirmed,
            instances: 2,
            confirmed_after: Some(Duration::from_micros(4_250)),
            missing: Vec::new(),
            missing_count: 0,
            lag: Some(DurationRange { low: Duration::from_micros(900), high: Duration::from_millis(2) }),
            exposure: Some(Exposure { last_after: Duration::from_millis(1) }),
            duplicate_names: false,
        };
        let elapsed = RegionReceipt {
            region: Region::new("us"),
            state: RegionState::Elapsed,
            confirmed_after: None,
            missing: vec![Identity {
                region: Region::new("us"),
                agent: AgentName::new("a"),
                instance: InstanceId(7),
            }],
            missing_count: 1,
            lag: None,
            exposure: None,
            ..confirmed.clone()
        };
        Receipt {
            change: Change {
                request: Some(("req_1".into(), WorkspaceId::new("ws_1"))),
                position: LogPosition::new(2, 9).unwrap(),
                cause: Cause::Deleted,
                committed_at: StoreTime::from_millis(1_700_000_000_123),
            },
            is_final: true,
            measured: Measured::FromRequest,
            final_after: Some(Duration::from_secs(30)),
            regions: vec![confirmed, elapsed],
        }
    }

    #[test]
    fn a_receipt_is_the_documented_json_and_parses_back() {
        let propagation = Propagation::new(&receipt(), Duration::from_secs(30)).unwrap();
        let json = serde_json::to_string(&propagation).unwrap();
        assert_eq!(
            json,
            concat!(
                r#"{"requestId":"req_1","state":"elapsed","final":true,"position":9,"epoch":2,"cause":"deleted","#,
                r#""committedAt":1700000000123,"measuredFrom":"request","boundMs":30000,"finalAfterMs":30000.0,"#,
                r#""regions":[{"region":"eu","state":"confirmed","instances":2,"confirmedAfterMs":4.25,"#,
                r#""missingCount":0,"lagMs":{"low":0.9,"high":2.0},"#,
                r#""exposure":{"lastAnswerAfterMs":1.0},"duplicateNames":false},"#,
                r#"{"region":"us","state":"elapsed","instances":2,"#,
                r#""missing":[{"agent":"a","instance":"0000000000000007"}],"missingCount":1,"#,
                r#""duplicateNames":false}]}"#
            )
        );
        assert_eq!(serde_json::from_str::<Propagation>(&json).unwrap(), propagation);
    }

    #[test]
    fn a_request_that_affects_no_cache_is_confirmed_at_once() {
        let json = serde_json::to_string(&Propagation::nothing("req_1", Duration::from_secs(30))).unwrap();
        let expected =
            r#"{"requestId":"req_1","state":"confirmed","final":true,"boundMs":30000,"regions":[]}"#;
        assert_eq!(json, expected);
    }

    #[test]
    fn a_change_without_a_request_has_no_receipt() {
        let mut receipt = receipt();
        receipt.change.request = None;
        assert_eq!(Propagation::new(&receipt, Duration::ZERO), None);
    }
}
