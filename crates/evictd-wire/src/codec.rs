//! Conversions that several messages share: limits, positions, invalidations.

use bytes::Bytes;
use evictd_core::history::{Incarnation, LogToken, Milestone, Provenance, RoundToken, StoreId, Voucher};
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::limits::{ID_BYTES_MAX, PAYLOAD_BYTES_MAX};
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;
use prost::Message;

use crate::generated as pb;
use crate::generated::invalidation::Scope as PbScope;

/// The reason that a payload is ignored.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("the payload is empty")]
    Empty,
    #[error("the payload has {bytes} bytes, more than {PAYLOAD_BYTES_MAX}")]
    TooLong { bytes: usize },
    #[error("the payload doesn't decode: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// A field breaks a limit of the specification.
    #[error("the field {field} is missing or out of its limits")]
    Field { field: &'static str },
    /// The event or outcome was added by a later version.
    #[error("the payload has no event or outcome of this version")]
    Unknown,
}

pub(crate) fn field(field: &'static str) -> DecodeError {
    DecodeError::Field { field }
}

pub(crate) fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, DecodeError> {
    match payload.len() {
        0 => Err(DecodeError::Empty),
        bytes if bytes > PAYLOAD_BYTES_MAX => Err(DecodeError::TooLong { bytes }),
        _ => Ok(M::decode(payload)?),
    }
}

pub(crate) fn encode(message: &impl Message) -> Bytes {
    let bytes = Bytes::from(message.encode_to_vec());
    debug_assert!(!bytes.is_empty() && bytes.len() <= PAYLOAD_BYTES_MAX);
    bytes
}

pub(crate) fn position(epoch: u32, position: u64, name: &'static str) -> Result<LogPosition, DecodeError> {
    if epoch == 0 {
        return Err(field("epoch"));
    }
    LogPosition::new(epoch, position).ok_or(field(name))
}

pub(crate) fn provenance_from(provenance: Option<pb::Provenance>) -> Result<Provenance, DecodeError> {
    let pb::Provenance { store, incarnation } = provenance.ok_or(field("provenance"))?;
    if store == 0 || incarnation == 0 {
        return Err(field("provenance"));
    }
    Ok(Provenance { store: StoreId(store), incarnation: Incarnation(incarnation) })
}

pub(crate) fn provenance_to(provenance: Provenance) -> pb::Provenance {
    pb::Provenance { store: provenance.store.0, incarnation: provenance.incarnation.0 }
}

pub(crate) fn voucher_from(voucher: Option<pb::Voucher>) -> Result<Voucher, DecodeError> {
    let voucher = voucher.ok_or(field("voucher"))?;
    let milestone = Milestone {
        provenance: provenance_from(voucher.provenance)?,
        at: position(voucher.epoch, voucher.position, "position")?,
        token: LogToken(voucher.token),
    };
    let mac = voucher.mac.as_slice().try_into().map_err(|_| field("mac"))?;
    Ok(Voucher { milestone, mac })
}

pub(crate) fn voucher_to(voucher: &Voucher) -> pb::Voucher {
    let Milestone { provenance, at, token } = voucher.milestone;
    pb::Voucher {
        provenance: Some(provenance_to(provenance)),
        epoch: at.epoch(),
        position: at.position(),
        token: token.0,
        mac: voucher.mac.to_vec(),
    }
}

/// A round's token; 0 means none.
pub(crate) fn round(token: u64) -> Option<RoundToken> {
    (token != 0).then_some(RoundToken(token))
}

pub(crate) fn nonce(nonce: u64) -> Result<u64, DecodeError> {
    if nonce == 0 { Err(field("nonce")) } else { Ok(nonce) }
}

pub(crate) fn hash(bytes: &[u8]) -> Result<KeyHash, DecodeError> {
    bytes.try_into().map(KeyHash).map_err(|_| field("hash"))
}

/// A required id.
pub(crate) fn id(text: String, name: &'static str) -> Result<String, DecodeError> {
    if text.is_empty() || text.len() > ID_BYTES_MAX { Err(field(name)) } else { Ok(text) }
}

/// An optional id. In proto3 an absent string is empty.
fn optional_id(text: String, name: &'static str) -> Result<Option<String>, DecodeError> {
    if text.is_empty() { Ok(None) } else { id(text, name).map(Some) }
}

pub(crate) fn invalidation_from(epoch: u32, row: pb::Invalidation) -> Result<Invalidation, DecodeError> {
    let cause = row.cause();
    let at = position(epoch, row.position, "position")?;
    if row.position == 0 {
        return Err(field("position"));
    }
    let scope = match row.scope {
        Some(PbScope::Key(key)) => Scope::Key {
            hash: hash(&key.hash)?,
            key_id: optional_id(key.key_id, "key_id")?.map(KeyId::new),
            api_id: optional_id(key.api_id, "api_id")?.map(ApiId::new),
        },
        Some(PbScope::ApiId(api)) => Scope::Api(ApiId::new(id(api, "api_id")?)),
        Some(PbScope::WorkspaceId(workspace)) => {
            Scope::Workspace(WorkspaceId::new(id(workspace, "workspace_id")?))
        }
        // A scope of a later version is never wider than `all`.
        Some(PbScope::All(_)) | None => Scope::All,
    };
    let committed_at = StoreTime(row.committed_at_unix_us);
    Ok(Invalidation { position: at, scope, cause: cause_from(cause), committed_at })
}

pub(crate) fn invalidation_to(row: &Invalidation) -> pb::Invalidation {
    let scope = match &row.scope {
        Scope::Key { hash, key_id, api_id } => PbScope::Key(pb::KeyScope {
            hash: hash.0.to_vec(),
            key_id: key_id.as_ref().map(ToString::to_string).unwrap_or_default(),
            api_id: api_id.as_ref().map(ToString::to_string).unwrap_or_default(),
        }),
        Scope::Api(api) => PbScope::ApiId(api.to_string()),
        Scope::Workspace(workspace) => PbScope::WorkspaceId(workspace.to_string()),
        Scope::All => PbScope::All(pb::AllScope {}),
    };
    pb::Invalidation {
        position: row.position.position(),
        scope: Some(scope),
        cause: cause_to(row.cause).into(),
        committed_at_unix_us: row.committed_at.0,
    }
}

fn cause_from(cause: pb::Cause) -> Cause {
    match cause {
        pb::Cause::Created => Cause::Created,
        pb::Cause::Deleted => Cause::Deleted,
        pb::Cause::Erased => Cause::Erased,
        pb::Cause::Restored => Cause::Restored,
        pb::Cause::Expired => Cause::Expired,
        pb::Cause::Changed | pb::Cause::Unspecified => Cause::Changed,
    }
}

fn cause_to(cause: Cause) -> pb::Cause {
    match cause {
        Cause::Created => pb::Cause::Created,
        Cause::Changed => pb::Cause::Changed,
        Cause::Deleted => pb::Cause::Deleted,
        Cause::Erased => pb::Cause::Erased,
        Cause::Restored => pb::Cause::Restored,
        Cause::Expired => pb::Cause::Expired,
    }
}
