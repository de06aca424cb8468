//! Announcements of progress.

use std::time::Duration;

use bytes::Bytes;
use evictd_core::history::Provenance;
use evictd_core::ids::InstanceId;
use evictd_core::limits::SIGHTINGS_MAX;
use evictd_core::position::LogPosition;
use evictd_core::receipts::{Exposure, Sighting, Span};

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;

/// An agent tells how far it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Applied {
    /// The process that speaks.
    pub instance: InstanceId,
    /// Whose log it applied.
    pub provenance: Provenance,
    /// Everything up to here is applied.
    pub applied: LogPosition,
    /// What it saw of changes of that epoch that it applied lately, at most [`SIGHTINGS_MAX`].
    pub sightings: Vec<Sighting>,
    /// It answers nothing any more.
    pub leaving: bool,
}

impl Applied {
    /// As bytes. Sightings of another epoch, and those over the limit, are left out.
    pub fn encode(&self) -> Bytes {
        let epoch = self.applied.epoch();
        let sightings = self.sightings.iter().filter(|sighting| sighting.position.epoch() == epoch);
        codec::encode(&pb::Applied {
            instance: self.instance.0,
            epoch,
            position: self.applied.position(),
            sightings: sightings.take(SIGHTINGS_MAX).map(sighting_to_wire).collect(),
            leaving: self.leaving,
            provenance: Some(codec::provenance_to(self.provenance)),
        })
    }

    /// From bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let applied: pb::Applied = codec::decode(payload)?;
        if applied.instance == 0 {
            return Err(field("instance"));
        }
        if applied.sightings.len() > SIGHTINGS_MAX {
            return Err(field("sightings"));
        }
        let sighting = |sighting: &pb::Sighting| sighting_from_wire(applied.epoch, sighting);
        Ok(Self {
            instance: InstanceId(applied.instance),
            provenance: codec::provenance_from(applied.provenance)?,
            applied: codec::position(applied.epoch, applied.position, "position")?,
            sightings: applied.sightings.iter().map(sighting).collect::<Result<_, _>>()?,
            leaving: applied.leaving,
        })
    }
}

fn sighting_to_wire(sighting: &Sighting) -> pb::Sighting {
    let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    pb::Sighting {
        position: sighting.position.position(),
        lag_low_us: micros(sighting.lag.low),
        lag_high_us: micros(sighting.lag.high),
        last_answer_after_us: micros(sighting.exposure.last_after),
    }
}

fn sighting_from_wire(epoch: u32, sighting: &pb::Sighting) -> Result<Sighting, DecodeError> {
    if sighting.position == 0 {
        return Err(field("sightings.position"));
    }
    let lag = Span {
        low: Duration::from_micros(sighting.lag_low_us),
        high: Duration::from_micros(sighting.lag_high_us),
    };
    let last_after = Duration::from_micros(sighting.last_answer_after_us);
    Ok(Sighting {
        position: codec::position(epoch, sighting.position, "sightings.position")?,
        lag,
        exposure: Exposure { last_after },
    })
}
