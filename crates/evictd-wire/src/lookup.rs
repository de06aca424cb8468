//! Lookups and their answers.

use std::time::Duration;

use bytes::Bytes;
use evictd_core::history::LogToken;
use evictd_core::ids::{ApiId, InstanceId, KeyHash, KeyId, WorkspaceId};
use evictd_core::limits::META_BYTES_MAX;
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::time::{StoreTime, micros};

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;
use crate::generated::found::Record as PbRecord;
use crate::generated::lookup_answer::Outcome as PbOutcome;

/// An agent's query for the record behind a key's hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LookupRequest {
    pub nonce: u64,
    pub hash: KeyHash,
    pub instance: InstanceId,
}

/// The record behind a hash, or the refusal of an overloaded publisher.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LookupAnswer {
    pub nonce: u64,
    pub hash: KeyHash,
    pub outcome: LookupOutcome,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LookupOutcome {
    Found {
        lookup: Lookup,
        /// The age of the authority's last probe round. The read may come from a primary that was demoted
        /// since (R8).
        fence_age: Duration,
    },
    /// The publisher shed the query. The agent retries later.
    Busy,
}

impl LookupRequest {
    pub fn encode(&self) -> Bytes {
        let hash = self.hash.0.to_vec();
        codec::encode(&pb::LookupRequest { nonce: self.nonce, hash, instance: self.instance.0 })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let request: pb::LookupRequest = codec::decode(payload)?;
        if request.instance == 0 {
            return Err(field("instance"));
        }
        let instance = InstanceId(request.instance);
        Ok(Self { nonce: codec::nonce(request.nonce)?, hash: codec::hash(&request.hash)?, instance })
    }
}

impl LookupAnswer {
    pub fn encode(&self) -> Bytes {
        let outcome = match &self.outcome {
            LookupOutcome::Found { lookup, fence_age } => PbOutcome::Found(pb::Found {
                epoch: lookup.as_of.epoch(),
                head: lookup.as_of.position(),
                fence_age_us: micros(*fence_age),
                record: record_to(&lookup.record),
                provenance: Some(codec::provenance_to(lookup.provenance)),
                token: lookup.token.0,
            }),
            LookupOutcome::Busy => PbOutcome::Busy(pb::Busy {}),
        };
        codec::encode(&pb::LookupAnswer {
            nonce: self.nonce,
            hash: self.hash.0.to_vec(),
            outcome: Some(outcome),
        })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let answer: pb::LookupAnswer = codec::decode(payload)?;
        let outcome = match answer.outcome.ok_or(DecodeError::Unknown)? {
            PbOutcome::Found(found) => {
                let as_of = codec::position(found.epoch, found.head, "head")?;
                let provenance = codec::provenance_from(found.provenance)?;
                let (token, record) = (LogToken(found.token), record_from(found.record)?);
                let lookup = Lookup { as_of, provenance, token, record };
                LookupOutcome::Found { lookup, fence_age: Duration::from_micros(found.fence_age_us) }
            }
            PbOutcome::Busy(_) => LookupOutcome::Busy,
        };
        Ok(Self { nonce: codec::nonce(answer.nonce)?, hash: codec::hash(&answer.hash)?, outcome })
    }
}

fn record_to(record: &Record) -> Option<PbRecord> {
    match record {
        Record::Absent => None,
        Record::Key(key) => Some(PbRecord::Key(pb::Key {
            key_id: key.key_id.to_string(),
            api_id: key.api_id.to_string(),
            workspace_id: key.workspace_id.to_string(),
            state: state_to(key.state).into(),
            name: key.name.as_deref().unwrap_or_default().to_owned(),
            meta: key.meta.as_deref().unwrap_or_default().to_owned(),
            external_id: key.external_id.as_deref().unwrap_or_default().to_owned(),
            permissions: key.permissions.iter().map(ToString::to_string).collect(),
            expires_at_unix_us: key.expires_at.map(|at| at.0),
        })),
        Record::RootKey(root) => Some(PbRecord::RootKey(pb::RootKey {
            root_key_id: root.root_key_id.to_string(),
            workspace_id: root.workspace_id.to_string(),
            state: state_to(root.state).into(),
            permissions: root.permissions.iter().map(ToString::to_string).collect(),
            expires_at_unix_us: root.expires_at.map(|at| at.0),
        })),
    }
}

fn record_from(record: Option<PbRecord>) -> Result<Record, DecodeError> {
    Ok(match record {
        None => Record::Absent,
        Some(PbRecord::Key(key)) => {
            let state = state_from(key.state());
            if key.meta.len() > META_BYTES_MAX {
                return Err(field("meta"));
            }
            Record::Key(KeyRecord {
                key_id: KeyId::new(codec::id(key.key_id, "key_id")?),
                api_id: ApiId::new(codec::id(key.api_id, "api_id")?),
                workspace_id: WorkspaceId::new(codec::id(key.workspace_id, "workspace_id")?),
                state,
                name: text(key.name),
                meta: text(key.meta),
                external_id: text(key.external_id),
                permissions: key.permissions.into_iter().map(String::into_boxed_str).collect(),
                expires_at: key.expires_at_unix_us.map(StoreTime),
            })
        }
        Some(PbRecord::RootKey(root)) => {
            let state = state_from(root.state());
            Record::RootKey(RootKeyRecord {
                root_key_id: KeyId::new(codec::id(root.root_key_id, "root_key_id")?),
                workspace_id: WorkspaceId::new(codec::id(root.workspace_id, "workspace_id")?),
                state,
                permissions: root.permissions.into_iter().map(String::into_boxed_str).collect(),
                expires_at: root.expires_at_unix_us.map(StoreTime),
            })
        }
    })
}

fn text(text: String) -> Option<Box<str>> {
    if text.is_empty() { None } else { Some(text.into_boxed_str()) }
}

fn state_to(state: RecordState) -> pb::State {
    match state {
        RecordState::Active => pb::State::Active,
        RecordState::Disabled => pb::State::Disabled,
        RecordState::Expired => pb::State::Expired,
        RecordState::Deleted => pb::State::Deleted,
        RecordState::WorkspaceDisabled => pb::State::WorkspaceDisabled,
    }
}

fn state_from(state: pb::State) -> RecordState {
    match state {
        pb::State::Active => RecordState::Active,
        pb::State::Disabled => RecordState::Disabled,
        pb::State::Expired => RecordState::Expired,
        pb::State::WorkspaceDisabled => RecordState::WorkspaceDisabled,
        // A state of a later version grants nothing.
        pb::State::Deleted | pb::State::Unspecified => RecordState::Deleted,
    }
}
