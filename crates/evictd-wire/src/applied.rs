//! Announcements of progress.

use bytes::Bytes;
use evictd_core::ids::InstanceId;
use evictd_core::position::LogPosition;

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;

/// An agent tells how far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Applied {
    /// The process that speaks.
    pub instance: InstanceId,
    /// Everything up to here is applied.
    pub applied: LogPosition,
}

impl Applied {
    /// As bytes.
    pub fn encode(&self) -> Bytes {
        codec::encode(&pb::Applied {
            instance: self.instance.0,
            epoch: self.applied.epoch(),
            position: self.applied.position(),
        })
    }

    /// From bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let applied: pb::Applied = codec::decode(payload)?;
        if applied.instance == 0 {
            return Err(field("instance"));
        }
        Ok(Self {
            instance: InstanceId(applied.instance),
            applied: codec::position(applied.epoch, applied.position, "position")?,
        })
    }
}
