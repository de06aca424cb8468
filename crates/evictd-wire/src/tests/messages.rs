//! Any message, for properties.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use evictd_core::exposure::{ApplyReport, Exposure};
use evictd_core::follower::ReplayOutcome as Replayed;
use evictd_core::history::{Incarnation, LogToken, Milestone, Provenance, RoundToken, StoreId, Voucher};
use evictd_core::ids::{ApiId, InstanceId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::limits::{
    APPLY_REPORTS_MAX, EPOCH_MAX, ID_BYTES_MAX, LIVE_BATCH_MAX, META_BYTES_MAX, POSITION_MAX,
    REPLAY_BATCH_MAX,
};
use evictd_core::offset::DurationRange;
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::roster::PartitionPolicy;
use evictd_core::service::{Peer, Standing};
use evictd_core::time::StoreTime;
use proptest::option;
use proptest::prelude::*;

use crate::applied::Applied;
use crate::codec::DecodeError;
use crate::live::{Live, LiveEvent};
use crate::lookup::{LookupAnswer, LookupOutcome, LookupRequest};
use crate::probe::{ProbeAnswer, ProbeRefusal, ProbeReply, ProbeRequest};
use crate::publisher::{PublisherAnswer, PublisherInfo, PublisherQuery};
use crate::replay::{ReplayAnswer, ReplayRequest};

/// A message of any kind.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum AnyMessage {
    Live(Live),
    ProbeRequest(ProbeRequest),
    ProbeReply(ProbeReply),
    ReplayRequest(ReplayRequest),
    /// With the request that it answers.
    ReplayAnswer(ReplayRequest, ReplayAnswer),
    LookupRequest(LookupRequest),
    LookupAnswer(LookupAnswer),
    Applied(Applied),
    PublisherQuery(PublisherQuery),
    PublisherAnswer(PublisherAnswer),
}

impl AnyMessage {
    pub(super) fn encode(&self) -> Bytes {
        match self {
            Self::Live(live) => live.encode(),
            Self::ProbeRequest(request) => request.encode(),
            Self::ProbeReply(reply) => reply.encode(),
            Self::ReplayRequest(request) => request.encode(),
            Self::ReplayAnswer(request, answer) => answer.encode(request),
            Self::LookupRequest(request) => request.encode(),
            Self::LookupAnswer(answer) => answer.encode(),
            Self::Applied(applied) => applied.encode(),
            Self::PublisherQuery(query) => query.encode(),
            Self::PublisherAnswer(answer) => answer.encode(),
        }
    }

    /// Decodes `payload` as a message of this kind.
    pub(super) fn decode_same_kind(&self, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(match self {
            Self::Live(_) => Self::Live(Live::decode(payload)?),
            Self::ProbeRequest(_) => Self::ProbeRequest(ProbeRequest::decode(payload)?),
            Self::ProbeReply(_) => Self::ProbeReply(ProbeReply::decode(payload)?),
            Self::ReplayRequest(_) => Self::ReplayRequest(ReplayRequest::decode(payload)?),
            Self::ReplayAnswer(request, _) => Self::ReplayAnswer(*request, ReplayAnswer::decode(payload)?),
            Self::LookupRequest(_) => Self::LookupRequest(LookupRequest::decode(payload)?),
            Self::LookupAnswer(_) => Self::LookupAnswer(LookupAnswer::decode(payload)?),
            Self::Applied(_) => Self::Applied(Applied::decode(payload)?),
            Self::PublisherQuery(_) => Self::PublisherQuery(PublisherQuery::decode(payload)?),
            Self::PublisherAnswer(_) => Self::PublisherAnswer(PublisherAnswer::decode(payload)?),
        })
    }

    /// A live message with these rows.
    pub(super) fn live_of(rows: Vec<Invalidation>) -> Self {
        let voucher = voucher(rows[rows.len() - 1].position);
        Self::Live(Live { voucher, event: LiveEvent::Invalidations(rows) })
    }

    /// The answer to a request for exactly these rows.
    pub(super) fn replay_of(rows: Vec<Invalidation>) -> Self {
        let (first, last) = (rows[0].position, rows[rows.len() - 1].position);
        let request =
            ReplayRequest { nonce: 1, epoch: first.epoch(), from: first.position(), to: last.position() };
        Self::ReplayAnswer(
            request,
            ReplayAnswer { nonce: 1, provenance: PROVENANCE, outcome: Replayed::Rows(rows) },
        )
    }
}

const PROVENANCE: Provenance = Provenance { store: StoreId(1), incarnation: Incarnation(1) };

pub(super) fn voucher(at: LogPosition) -> Voucher {
    Voucher { milestone: Milestone { provenance: PROVENANCE, at, token: LogToken(0) }, mac: [0; 16] }
}

/// Decodes `payload` as every kind of message, and ignores the result.
pub(super) fn decode_as_everything(payload: &[u8]) {
    for message in smallest() {
        let _ = message.decode_same_kind(payload);
    }
}

/// Each kind, with every optional part zero or absent.
pub(super) fn smallest() -> Vec<AnyMessage> {
    let start = LogPosition::new(1, 0).unwrap();
    let hash = KeyHash([0; 32]);
    let all = Invalidation {
        position: LogPosition::new(1, 1).unwrap(),
        scope: Scope::All,
        cause: Cause::Changed,
        committed_at: StoreTime(0),
    };
    let request = ReplayRequest { nonce: 1, epoch: 1, from: 1, to: 1 };
    let refused = ReplayAnswer {
        nonce: 1,
        provenance: PROVENANCE,
        outcome: Replayed::Refused { head: voucher(start) },
    };
    let introduction = PublisherInfo {
        id: 1,
        peer: Peer {
            publisher: "".into(),
            provenance: PROVENANCE,
            since: StoreTime(0),
            standing: Standing::Asking,
        },
        round: None,
    };
    let absent = LookupOutcome::Found {
        lookup: Lookup { as_of: start, provenance: PROVENANCE, token: LogToken(0), record: Record::Absent },
        fence_age: Duration::ZERO,
    };
    let lookup_answer = |outcome| LookupAnswer { nonce: 1, hash, outcome };
    vec![
        AnyMessage::live_of(vec![all]),
        AnyMessage::Live(Live { voucher: voucher(start), event: LiveEvent::Tick(None) }),
        AnyMessage::Live(Live { voucher: voucher(start), event: LiveEvent::Ended }),
        AnyMessage::PublisherQuery(PublisherQuery { nonce: 1, from: introduction.clone() }),
        AnyMessage::PublisherAnswer(PublisherAnswer { nonce: 1, from: introduction }),
        AnyMessage::ProbeRequest(ProbeRequest {
            nonce: 1,
            instance: InstanceId(1),
            policy: PartitionPolicy::Deny,
            bound: Duration::ZERO,
            seen: None,
        }),
        AnyMessage::ProbeReply(ProbeReply::Answer(ProbeAnswer {
            nonce: 1,
            head: voucher(start),
            store_time: StoreTime(0),
            held: Duration::ZERO,
            is_proof: true,
        })),
        AnyMessage::ReplayRequest(request),
        AnyMessage::ReplayAnswer(request, refused),
        AnyMessage::LookupRequest(LookupRequest { nonce: 1, hash, instance: InstanceId(1) }),
        AnyMessage::LookupAnswer(lookup_answer(absent)),
        AnyMessage::LookupAnswer(lookup_answer(LookupOutcome::Busy)),
        AnyMessage::Applied(Applied {
            instance: InstanceId(1),
            provenance: PROVENANCE,
            applied: start,
            apply_reports: Vec::new(),
            leaving: false,
        }),
    ]
}

/// The `n`th of the longest possible rows.
pub(super) fn largest_row(n: u64) -> Invalidation {
    let id = "x".repeat(ID_BYTES_MAX);
    Invalidation {
        position: LogPosition::new(EPOCH_MAX, POSITION_MAX - REPLAY_BATCH_MAX as u64 + n).unwrap(),
        scope: Scope::Key {
            hash: KeyHash([255; 32]),
            key_id: Some(KeyId::new(id.as_str())),
            api_id: Some(ApiId::new(id)),
        },
        cause: Cause::Expired,
        committed_at: StoreTime(-1),
    }
}

pub(super) fn any_message() -> impl Strategy<Value = AnyMessage> {
    prop_oneof![
        any_rows(1..LIVE_BATCH_MAX + 1).prop_map(AnyMessage::live_of),
        (any_voucher(), option::of(any_nonce())).prop_map(|(voucher, round)| {
            AnyMessage::Live(Live { voucher, event: LiveEvent::Tick(round.map(RoundToken)) })
        }),
        any_voucher().prop_map(|voucher| AnyMessage::Live(Live { voucher, event: LiveEvent::Ended })),
        (any_nonce(), any_introduction())
            .prop_map(|(nonce, from)| AnyMessage::PublisherQuery(PublisherQuery { nonce, from })),
        (any_nonce(), any_introduction())
            .prop_map(|(nonce, from)| AnyMessage::PublisherAnswer(PublisherAnswer { nonce, from })),
        any_probe_request().prop_map(AnyMessage::ProbeRequest),
        any_probe_reply().prop_map(AnyMessage::ProbeReply),
        any_replay_request().prop_map(AnyMessage::ReplayRequest),
        any_rows(1..100).prop_map(AnyMessage::replay_of),
        (any_replay_request(), any_voucher()).prop_map(|(request, head)| {
            let (nonce, provenance) = (request.nonce, head.milestone.provenance);
            let outcome = Replayed::Refused { head };
            AnyMessage::ReplayAnswer(request, ReplayAnswer { nonce, provenance, outcome })
        }),
        (any_nonce(), any_hash(), any_nonce()).prop_map(|(nonce, hash, instance)| {
            AnyMessage::LookupRequest(LookupRequest { nonce, hash, instance: InstanceId(instance) })
        }),
        (any_nonce(), any_hash(), any_outcome()).prop_map(|(nonce, hash, outcome)| AnyMessage::LookupAnswer(
            LookupAnswer { nonce, hash, outcome }
        )),
        any_applied().prop_map(AnyMessage::Applied),
    ]
}

fn any_applied() -> impl Strategy<Value = Applied> {
    let micros = || any::<u64>().prop_map(Duration::from_micros);
    let apply_report = (1..=POSITION_MAX, micros(), micros(), micros());
    let apply_reports = prop::collection::vec(apply_report, 0..=APPLY_REPORTS_MAX);
    (any_nonce(), any_voucher(), apply_reports, any::<bool>()).prop_map(
        |(instance, voucher, apply_reports, leaving)| {
            let Milestone { provenance, at: applied, .. } = voucher.milestone;
            let apply_report = |(position, low, high, last_after)| ApplyReport {
                position: LogPosition::new(applied.epoch(), position).unwrap(),
                lag: DurationRange { low, high },
                exposure: Exposure { last_after },
            };
            let apply_reports = apply_reports.into_iter().map(apply_report).collect();
            Applied { instance: InstanceId(instance), provenance, applied, apply_reports, leaving }
        },
    )
}

/// Rows of one epoch, dense and ascending.
pub(super) fn any_rows(count: Range<usize>) -> impl Strategy<Value = Vec<Invalidation>> {
    let row = (any_scope(), any_cause(), any::<i64>());
    let first = (1..=EPOCH_MAX, prop_oneof![1..1000_u64, 1..=POSITION_MAX - 1024]);
    (first, prop::collection::vec(row, count)).prop_map(|((epoch, first), rows)| {
        rows.into_iter()
            .zip(first..)
            .map(|((scope, cause, committed_at), position)| Invalidation {
                position: LogPosition::new(epoch, position).unwrap(),
                scope,
                cause,
                committed_at: StoreTime(committed_at),
            })
            .collect()
    })
}

fn any_scope() -> impl Strategy<Value = Scope> {
    prop_oneof![
        6 => (any_hash(), option::of(any_id()), option::of(any_id())).prop_map(|(hash, key, api)| Scope::Key {
            hash,
            key_id: key.map(KeyId::new),
            api_id: api.map(ApiId::new),
        }),
        2 => any_id().prop_map(|id| Scope::Api(ApiId::new(id))),
        1 => any_id().prop_map(|id| Scope::Workspace(WorkspaceId::new(id))),
        1 => Just(Scope::All),
    ]
}

fn any_cause() -> impl Strategy<Value = Cause> {
    prop::sample::select(vec![
        Cause::Created,
        Cause::Changed,
        Cause::Deleted,
        Cause::Erased,
        Cause::Restored,
        Cause::Expired,
    ])
}

fn any_probe_request() -> impl Strategy<Value = ProbeRequest> {
    let policy = prop::sample::select(vec![PartitionPolicy::Deny, PartitionPolicy::ServeStale]);
    let seen = option::of(any_voucher());
    (any_nonce(), any_nonce(), policy, any::<u64>(), seen).prop_map(
        |(nonce, instance, policy, bound, seen)| ProbeRequest {
            nonce,
            instance: InstanceId(instance),
            policy,
            bound: Duration::from_millis(bound),
            seen,
        },
    )
}

fn any_probe_reply() -> impl Strategy<Value = ProbeReply> {
    let bound = any::<u64>().prop_map(|limit| ProbeRefusal::Bound { limit: Duration::from_millis(limit) });
    let others = [ProbeRefusal::Crowded, ProbeRefusal::Unproved, ProbeRefusal::Other];
    let refusal = prop_oneof![bound, proptest::sample::select(others.to_vec())];
    prop_oneof![
        any_probe_answer().prop_map(ProbeReply::Answer),
        (any_nonce(), refusal).prop_map(|(nonce, refusal)| ProbeReply::Refused { nonce, refusal }),
    ]
}

fn any_probe_answer() -> impl Strategy<Value = ProbeAnswer> {
    (any_nonce(), any_voucher(), any::<i64>(), any::<u64>(), any::<bool>()).prop_map(
        |(nonce, head, time, held, is_proof)| ProbeAnswer {
            nonce,
            head,
            store_time: StoreTime(time),
            held: Duration::from_micros(held),
            is_proof,
        },
    )
}

fn any_replay_request() -> impl Strategy<Value = ReplayRequest> {
    let span = REPLAY_BATCH_MAX as u64;
    (any_nonce(), 1..=EPOCH_MAX, 1..=POSITION_MAX - span, 0..span)
        .prop_map(|(nonce, epoch, from, more)| ReplayRequest { nonce, epoch, from, to: from + more })
}

fn any_outcome() -> impl Strategy<Value = LookupOutcome> {
    prop_oneof![
        6 => (any_voucher(), any_record(), any::<u64>()).prop_map(|(head, record, age)| {
            let Milestone { provenance, at: as_of, token } = head.milestone;
            let lookup = Lookup { as_of, provenance, token, record };
            LookupOutcome::Found { lookup, fence_age: Duration::from_micros(age) }
        }),
        1 => Just(LookupOutcome::Busy),
    ]
}

fn any_record() -> impl Strategy<Value = Record> {
    let ids = (any_id(), any_id(), any_id());
    let key = (ids, any_state(), option::of(any_text()), option::of(any_meta()), option::of(any_end()));
    let permissions = prop::collection::vec(any_text(), 0..20);
    let root_key = ((any_id(), any_id()), any_state(), permissions, option::of(any_end()));
    prop_oneof![
        1 => Just(Record::Absent),
        4 => key.prop_map(|((key, api, workspace), state, name, meta, expires_at)| {
            Record::Key(KeyRecord {
                key_id: KeyId::new(key),
                api_id: ApiId::new(api),
                workspace_id: WorkspaceId::new(workspace),
                state,
                name,
                meta,
                external_id: None,
                permissions: Vec::new(),
                expires_at,
            })
        }),
        3 => root_key.prop_map(|((root_key, workspace), state, permissions, expires_at)| {
            Record::RootKey(RootKeyRecord {
                root_key_id: KeyId::new(root_key),
                workspace_id: WorkspaceId::new(workspace),
                state,
                permissions,
                expires_at,
            })
        }),
    ]
}

fn any_state() -> impl Strategy<Value = RecordState> {
    prop::sample::select(vec![
        RecordState::Active,
        RecordState::Disabled,
        RecordState::Expired,
        RecordState::Deleted,
    ])
}

/// Zero is an expiry, too.
fn any_end() -> impl Strategy<Value = StoreTime> {
    prop_oneof![1 => Just(0), 8 => any::<i64>()].prop_map(StoreTime)
}

/// Empty text means absent on the wire.
fn any_text() -> impl Strategy<Value = Box<str>> {
    "\\PC{1,30}".prop_map(String::into_boxed_str)
}

fn any_meta() -> impl Strategy<Value = Box<str>> {
    prop_oneof![8 => any_text(), 1 => Just("m".repeat(META_BYTES_MAX).into_boxed_str())]
}

/// At most 60 characters of at most 4 bytes, or as long as an id can be.
fn any_id() -> impl Strategy<Value = String> {
    prop_oneof![8 => "[a-z]{3}_[a-zA-Z0-9]{1,16}", 4 => "\\PC{1,60}", 1 => Just("i".repeat(ID_BYTES_MAX))]
}

fn any_hash() -> impl Strategy<Value = KeyHash> {
    any::<[u8; 32]>().prop_map(KeyHash)
}

fn any_nonce() -> impl Strategy<Value = u64> {
    1..=u64::MAX
}

fn any_voucher() -> impl Strategy<Value = Voucher> {
    (any_nonce(), any_nonce(), any_position(), any::<u64>(), any::<[u8; 16]>()).prop_map(
        |(store, incarnation, at, token, mac)| {
            let provenance = Provenance { store: StoreId(store), incarnation: Incarnation(incarnation) };
            Voucher { milestone: Milestone { provenance, at, token: LogToken(token) }, mac }
        },
    )
}

fn any_introduction() -> impl Strategy<Value = PublisherInfo> {
    let standing = prop::sample::select(Standing::ALL.to_vec());
    (any_nonce(), any_id(), any_voucher(), any::<i64>(), standing, option::of(any_nonce())).prop_map(
        |(id, name, voucher, since, standing, round)| {
            let peer = Peer {
                publisher: name.into(),
                provenance: voucher.milestone.provenance,
                since: StoreTime(since),
                standing,
            };
            PublisherInfo { id, peer, round: round.map(RoundToken) }
        },
    )
}

fn any_position() -> impl Strategy<Value = LogPosition> {
    (1..=EPOCH_MAX, 0..=POSITION_MAX).prop_map(|(epoch, position)| LogPosition::new(epoch, position).unwrap())
}
