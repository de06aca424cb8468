//! Announcements of progress.

use std::time::Duration;

use bytes::Bytes;
use evictd_core::exposure::{ApplyReport, Exposure};
use evictd_core::history::Provenance;
use evictd_core::ids::InstanceId;
use evictd_core::limits::APPLY_REPORTS_MAX;
use evictd_core::offset::DurationRange;
use evictd_core::position::LogPosition;
use evictd_core::time::micros;

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;

/// An agent's announcement of how far it has applied the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Applied {
    pub instance: InstanceId,
    pub provenance: Provenance,
    pub applied: LogPosition,
    /// Measurements of recently applied changes of that epoch, at most [`APPLY_REPORTS_MAX`].
    pub apply_reports: Vec<ApplyReport>,
    /// The process has stopped answering.
    pub leaving: bool,
}

impl Applied {
    /// Leaves out apply reports of another epoch and those over the limit.
    pub fn encode(&self) -> Bytes {
        let epoch = self.applied.epoch();
        let apply_reports =
            self.apply_reports.iter().filter(|apply_report| apply_report.position.epoch() == epoch);
        codec::encode(&pb::Applied {
            instance: self.instance.0,
            epoch,
            position: self.applied.position(),
            apply_reports: apply_reports.take(APPLY_REPORTS_MAX).map(apply_report_to_wire).collect(),
            leaving: self.leaving,
            provenance: Some(codec::provenance_to(self.provenance)),
        })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let applied: pb::Applied = codec::decode(payload)?;
        if applied.instance == 0 {
            return Err(field("instance"));
        }
        if applied.apply_reports.len() > APPLY_REPORTS_MAX {
            return Err(field("apply_reports"));
        }
        let apply_report =
            |apply_report: &pb::ApplyReport| apply_report_from_wire(applied.epoch, apply_report);
        Ok(Self {
            instance: InstanceId(applied.instance),
            provenance: codec::provenance_from(applied.provenance)?,
            applied: codec::position(applied.epoch, applied.position, "position")?,
            apply_reports: applied.apply_reports.iter().map(apply_report).collect::<Result<_, _>>()?,
            leaving: applied.leaving,
        })
    }
}

fn apply_report_to_wire(apply_report: &ApplyReport) -> pb::ApplyReport {
    pb::ApplyReport {
        position: apply_report.position.position(),
        lag_low_us: micros(apply_report.lag.low),
        lag_high_us: micros(apply_report.lag.high),
        last_answer_after_us: micros(apply_report.exposure.last_after),
    }
}

fn apply_report_from_wire(epoch: u32, apply_report: &pb::ApplyReport) -> Result<ApplyReport, DecodeError> {
    if apply_report.position == 0 {
        return Err(field("apply_reports.position"));
    }
    let lag = DurationRange {
        low: Duration::from_micros(apply_report.lag_low_us),
        high: Duration::from_micros(apply_report.lag_high_us),
    };
    let last_after = Duration::from_micros(apply_report.last_answer_after_us);
    Ok(ApplyReport {
        position: codec::position(epoch, apply_report.position, "apply_reports.position")?,
        lag,
        exposure: Exposure { last_after },
    })
}
