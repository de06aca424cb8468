//! A message that breaks a limit of the specification is rejected, and the error names the field.

use std::fmt::Debug;

use evictd_core::limits::{
    APPLY_REPORTS_MAX, EPOCH_MAX, ID_BYTES_MAX, INVALIDATION_BYTES_MAX, LIVE_BATCH_MAX, META_BYTES_MAX,
    PAYLOAD_BYTES_MAX, POSITION_MAX,
};
use evictd_core::service::Standing;
use prost::Message as _;

use super::messages::{largest_row, smallest};
use crate::applied::Applied;
use crate::codec::{self, DecodeError};
use crate::generated as pb;
use crate::generated::found::Record as PbRecord;
use crate::generated::invalidation::Scope as PbScope;
use crate::generated::live::Event;
use crate::live::Live;
use crate::lookup::{LookupAnswer, LookupRequest};
use crate::probe::{ProbeReply, ProbeRequest};
use crate::publisher::PublisherQuery;
use crate::replay::{ReplayAnswer, ReplayRequest};

const HASH: [u8; 32] = [7; 32];

fn assert_refused<T: Debug>(read: Result<T, DecodeError>, field: &str) {
    match read {
        Err(DecodeError::Field { field: named }) => assert_eq!(named, field),
        other => panic!("expected a refusal of {field}, got {other:?}"),
    }
}

fn row(position: u64, scope: PbScope) -> pb::Invalidation {
    pb::Invalidation { position, scope: Some(scope), cause: 1, committed_at_unix_us: 1 }
}

fn key_scope(hash: &[u8], key_id: &str, api_id: &str) -> PbScope {
    PbScope::Key(pb::KeyScope { hash: hash.to_vec(), key_id: key_id.to_owned(), api_id: api_id.to_owned() })
}

fn provenance() -> pb::Provenance {
    pb::Provenance { store: 1, incarnation: 1 }
}

fn voucher(epoch: u32, position: u64) -> pb::Voucher {
    pb::Voucher { provenance: Some(provenance()), epoch, position, token: 0, mac: vec![0; 16] }
}

fn live_of(voucher: pb::Voucher, event: Event) -> Result<Live, DecodeError> {
    Live::decode(&pb::Live { voucher: Some(voucher), event: Some(event) }.encode_to_vec())
}

fn live_with(epoch: u32, invalidations: Vec<pb::Invalidation>) -> Result<Live, DecodeError> {
    let last = invalidations.last().map_or(1, |last| last.position);
    live_of(voucher(epoch, last), Event::Invalidations(pb::Invalidations { invalidations }))
}

fn live_scope(scope: PbScope) -> Result<Live, DecodeError> {
    live_with(1, vec![row(1, scope)])
}

fn tick(epoch: u32, head: u64) -> Result<Live, DecodeError> {
    live_of(voucher(epoch, head), Event::Tick(pb::Tick { round: 0 }))
}

fn replay_answer(
    epoch: u32,
    from: u64,
    invalidations: Vec<pb::Invalidation>,
) -> Result<ReplayAnswer, DecodeError> {
    let outcome = Some(pb::replay_answer::Outcome::Rows(pb::ReplayRows { invalidations }));
    let provenance = Some(provenance());
    ReplayAnswer::decode(&pb::ReplayAnswer { nonce: 1, epoch, from, outcome, provenance }.encode_to_vec())
}

fn replay_refused(epoch: u32, head: u64) -> Result<ReplayAnswer, DecodeError> {
    let refused = pb::ReplayRefused { head: Some(voucher(epoch, head)) };
    let (outcome, provenance) = (Some(pb::replay_answer::Outcome::Refused(refused)), Some(provenance()));
    let answer = pb::ReplayAnswer { nonce: 1, epoch: 1, from: 1, outcome, provenance };
    ReplayAnswer::decode(&answer.encode_to_vec())
}

fn replay_request(epoch: u32, from: u64, to: u64) -> Result<ReplayRequest, DecodeError> {
    ReplayRequest::decode(&pb::ReplayRequest { nonce: 1, epoch, from, to }.encode_to_vec())
}

fn found(epoch: u32, head: u64, record: Option<PbRecord>) -> Result<LookupAnswer, DecodeError> {
    let provenance = Some(provenance());
    let found = pb::Found { epoch, head, fence_age_us: 0, record, provenance, token: 0 };
    let outcome = Some(pb::lookup_answer::Outcome::Found(found));
    LookupAnswer::decode(&pb::LookupAnswer { nonce: 1, hash: HASH.to_vec(), outcome }.encode_to_vec())
}

fn key() -> pb::Key {
    pb::Key {
        key_id: "key_1".to_owned(),
        api_id: "api_1".to_owned(),
        workspace_id: "ws_1".to_owned(),
        state: 1,
        ..pb::Key::default()
    }
}

fn found_key(change: impl FnOnce(&mut pb::Key)) -> Result<LookupAnswer, DecodeError> {
    let mut key = key();
    change(&mut key);
    found(1, 1, Some(PbRecord::Key(key)))
}

fn found_root_key(change: impl FnOnce(&mut pb::RootKey)) -> Result<LookupAnswer, DecodeError> {
    let mut root_key = pb::RootKey {
        root_key_id: "root_1".to_owned(),
        workspace_id: "ws_1".to_owned(),
        state: 1,
        ..pb::RootKey::default()
    };
    change(&mut root_key);
    found(1, 1, Some(PbRecord::RootKey(root_key)))
}

fn probe_request(change: impl FnOnce(&mut pb::ProbeRequest)) -> Result<ProbeRequest, DecodeError> {
    let mut request = pb::ProbeRequest { nonce: 1, instance: 1, ..pb::ProbeRequest::default() };
    change(&mut request);
    ProbeRequest::decode(&request.encode_to_vec())
}

fn probe_answer(nonce: u64, epoch: u32, head: u64) -> Result<ProbeReply, DecodeError> {
    let head = Some(voucher(epoch, head));
    ProbeReply::decode(&pb::ProbeAnswer { nonce, head, ..pb::ProbeAnswer::default() }.encode_to_vec())
}

fn applied(instance: u64, epoch: u32, position: u64) -> Result<Applied, DecodeError> {
    let provenance = Some(provenance());
    let applied = pb::Applied { instance, epoch, position, provenance, ..pb::Applied::default() };
    Applied::decode(&applied.encode_to_vec())
}

#[test]
fn apply_reports_are_limited_and_name_a_change() {
    let with = |apply_reports| {
        let applied = pb::Applied {
            instance: 1,
            epoch: 1,
            position: 9,
            apply_reports,
            leaving: false,
            provenance: Some(provenance()),
        };
        Applied::decode(&applied.encode_to_vec())
    };
    let apply_report = pb::ApplyReport { position: 1, ..pb::ApplyReport::default() };
    assert_refused(with(vec![apply_report; APPLY_REPORTS_MAX + 1]), "apply_reports");
    assert_refused(with(vec![pb::ApplyReport::default()]), "apply_reports.position");
    assert_eq!(with(vec![apply_report]).unwrap().apply_reports.len(), 1);
}

#[test]
fn an_empty_payload_is_no_message() {
    for message in smallest() {
        assert_eq!(message.decode_same_kind(&[]), Err(DecodeError::Empty), "{message:?}");
    }
}

#[test]
fn a_payload_over_the_limit_is_not_parsed() {
    let bytes = PAYLOAD_BYTES_MAX + 1;
    for message in smallest() {
        let read = message.decode_same_kind(&vec![0xff; bytes]);
        assert_eq!(read, Err(DecodeError::TooLong { bytes }), "{message:?}");
    }
}

#[test]
fn a_payload_that_is_not_protobuf_is_malformed() {
    for message in smallest() {
        let read = message.decode_same_kind(&[0xff; 16]);
        assert!(matches!(read, Err(DecodeError::Malformed(_))), "{read:?}");
    }
}

#[test]
fn a_hash_has_32_bytes() {
    for length in [0, 31, 33] {
        let hash = vec![7; length];
        assert_refused(live_scope(key_scope(&hash, "", "")), "hash");
        let request = pb::LookupRequest { nonce: 1, hash: hash.clone(), instance: 1 };
        assert_refused(LookupRequest::decode(&request.encode_to_vec()), "hash");
        let outcome = Some(pb::lookup_answer::Outcome::Busy(pb::Busy {}));
        let answer = pb::LookupAnswer { nonce: 1, hash, outcome };
        assert_refused(LookupAnswer::decode(&answer.encode_to_vec()), "hash");
    }
}

#[test]
fn a_required_id_has_1_to_255_bytes() {
    let longest = "x".repeat(ID_BYTES_MAX);
    assert!(live_scope(PbScope::ApiId(longest.clone())).is_ok());
    assert!(live_scope(PbScope::WorkspaceId(longest.clone())).is_ok());
    assert!(found_key(|key| key.key_id = longest).is_ok());
    // Measured in bytes: these are 128 characters.
    for bad in [String::new(), "x".repeat(ID_BYTES_MAX + 1), "ä".repeat(128)] {
        let bad = || bad.clone();
        assert_refused(live_scope(PbScope::ApiId(bad())), "api_id");
        assert_refused(live_scope(PbScope::WorkspaceId(bad())), "workspace_id");
        assert_refused(found_key(|key| key.key_id = bad()), "key_id");
        assert_refused(found_key(|key| key.api_id = bad()), "api_id");
        assert_refused(found_key(|key| key.workspace_id = bad()), "workspace_id");
        assert_refused(found_root_key(|root_key| root_key.root_key_id = bad()), "root_key_id");
        assert_refused(found_root_key(|root_key| root_key.workspace_id = bad()), "workspace_id");
    }
}

#[test]
fn ids_of_a_key_scope_may_be_missing_but_not_too_long() {
    let too_long = "x".repeat(ID_BYTES_MAX + 1);
    assert!(live_scope(key_scope(&HASH, "", "")).is_ok());
    assert_refused(live_scope(key_scope(&HASH, &too_long, "")), "key_id");
    assert_refused(live_scope(key_scope(&HASH, "", &too_long)), "api_id");
}

#[test]
fn no_epoch_is_zero_or_too_large() {
    let one = || vec![row(1, PbScope::All(pb::AllScope {}))];
    for (epoch, field) in [(0, "epoch"), (EPOCH_MAX + 1, "position")] {
        assert_refused(live_with(epoch, one()), field);
        assert_refused(replay_answer(epoch, 1, one()), field);
        assert_refused(applied(1, epoch, 1), field);
    }
    for (epoch, field) in [(0, "epoch"), (EPOCH_MAX + 1, "position")] {
        assert_refused(tick(epoch, 1), field);
        assert_refused(probe_answer(1, epoch, 1), field);
        assert_refused(replay_refused(epoch, 1), field);
        assert_refused(probe_request(|request| request.seen = Some(voucher(epoch, 1))), field);
    }
    assert_refused(found(0, 1, None), "epoch");
    assert_refused(found(EPOCH_MAX + 1, 1, None), "head");
    assert_refused(replay_request(0, 1, 1), "epoch");
    assert_refused(replay_request(EPOCH_MAX + 1, 1, 1), "to");
    // Only an agent that follows no history yet sends no voucher.
    assert!(probe_request(|request| request.seen = None).is_ok());
}

#[test]
fn no_position_is_too_large_and_no_rows_position_is_zero() {
    let row_at = |position| vec![row(position, PbScope::All(pb::AllScope {}))];
    let over = POSITION_MAX + 1;
    assert!(live_with(1, row_at(POSITION_MAX)).is_ok());
    for position in [0, over] {
        assert_refused(live_with(1, row_at(position)), "position");
        assert_refused(replay_answer(1, position, row_at(position)), "position");
    }
    assert_refused(applied(1, 1, over), "position");
    assert_refused(tick(1, over), "position");
    assert_refused(probe_answer(1, 1, over), "position");
    assert_refused(replay_refused(1, over), "position");
    assert_refused(found(1, over, None), "head");
    assert_refused(probe_request(|request| request.seen = Some(voucher(1, over))), "position");
    assert!(tick(1, 0).is_ok(), "an empty log has a head");
}

#[test]
fn no_nonce_is_zero() {
    assert_refused(probe_request(|request| request.nonce = 0), "nonce");
    assert_refused(probe_answer(0, 1, 1), "nonce");
    let request = pb::ReplayRequest { nonce: 0, epoch: 1, from: 1, to: 1 };
    assert_refused(ReplayRequest::decode(&request.encode_to_vec()), "nonce");
    let refused = pb::ReplayRefused { head: Some(voucher(1, 1)) };
    let outcome = Some(pb::replay_answer::Outcome::Refused(refused));
    let answer = pb::ReplayAnswer { nonce: 0, epoch: 1, from: 1, outcome, provenance: Some(provenance()) };
    assert_refused(ReplayAnswer::decode(&answer.encode_to_vec()), "nonce");
    let request = pb::LookupRequest { nonce: 0, hash: HASH.to_vec(), instance: 1 };
    assert_refused(LookupRequest::decode(&request.encode_to_vec()), "nonce");
    let outcome = Some(pb::lookup_answer::Outcome::Busy(pb::Busy {}));
    let answer = pb::LookupAnswer { nonce: 0, hash: HASH.to_vec(), outcome };
    assert_refused(LookupAnswer::decode(&answer.encode_to_vec()), "nonce");
}

#[test]
fn no_instance_is_zero() {
    assert_refused(probe_request(|request| request.instance = 0), "instance");
    assert_refused(applied(0, 1, 1), "instance");
    let lookup = pb::LookupRequest { nonce: 1, hash: HASH.to_vec(), instance: 0 };
    assert_refused(LookupRequest::decode(&lookup.encode_to_vec()), "instance");
}

#[test]
fn no_store_and_no_incarnation_is_zero_or_missing() {
    let tick = || Event::Tick(pb::Tick { round: 0 });
    let of = |provenance| live_of(pb::Voucher { provenance, ..voucher(1, 1) }, tick());
    for (store, incarnation) in [(0, 1), (1, 0)] {
        assert_refused(of(Some(pb::Provenance { store, incarnation })), "provenance");
    }
    assert_refused(of(None), "provenance");
    assert_refused(Live::decode(&pb::Live { voucher: None, event: Some(tick()) }.encode_to_vec()), "voucher");
}

#[test]
fn code_has_16_bytes() {
    for length in [0, 15, 17] {
        let voucher = pb::Voucher { mac: vec![0; length], ..voucher(1, 1) };
        assert_refused(live_of(voucher, Event::Ended(pb::Ended {})), "mac");
    }
}

#[test]
fn voucher_is_that_of_the_last_row() {
    let rows = vec![row(5, PbScope::All(pb::AllScope {})), row(6, PbScope::All(pb::AllScope {}))];
    let event = Event::Invalidations(pb::Invalidations { invalidations: rows });
    assert!(live_of(voucher(1, 6), event.clone()).is_ok());
    assert_refused(live_of(voucher(1, 5), event), "voucher");
}

#[test]
fn peer_has_an_id_and_a_short_name() {
    let query = |peer: pb::Peer| {
        PublisherQuery::decode(&pb::PublisherQuery { nonce: 1, peer: Some(peer) }.encode_to_vec())
    };
    let peer = || pb::Peer { id: 1, provenance: Some(provenance()), ..pb::Peer::default() };
    assert_eq!(query(peer()).unwrap().from.peer.standing, Standing::Serving, "unknown reads as the worst");
    assert_refused(query(pb::Peer { id: 0, ..peer() }), "id");
    assert_refused(query(pb::Peer { name: "x".repeat(ID_BYTES_MAX + 1), ..peer() }), "name");
    assert_refused(query(pb::Peer { provenance: None, ..peer() }), "provenance");
}

#[test]
fn a_live_message_holds_1_to_64_rows() {
    let rows = |count: usize| (1..=count as u64).map(|at| row(at, PbScope::All(pb::AllScope {}))).collect();
    assert_refused(live_with(1, rows(0)), "invalidations");
    assert!(live_with(1, rows(LIVE_BATCH_MAX)).is_ok());
    assert_refused(live_with(1, rows(LIVE_BATCH_MAX + 1)), "invalidations");
}

#[test]
fn a_replay_spans_1_to_1024_positions() {
    assert!(replay_request(1, 1, 1).is_ok());
    assert!(replay_request(1, 5, 1028).is_ok());
    for (from, to) in [(0, 5), (6, 5), (5, 1029), (1, u64::MAX), (u64::MAX, 5)] {
        assert!(matches!(replay_request(1, from, to), Err(DecodeError::Field { .. })), "{from}..={to}");
    }
    assert_refused(replay_request(1, POSITION_MAX, POSITION_MAX + 1), "to");
}

#[test]
fn a_replay_answer_begins_where_its_request_does() {
    let rows = |from: u64| vec![row(from, PbScope::All(pb::AllScope {}))];
    assert!(replay_answer(1, 5, rows(5)).is_ok());
    assert_refused(replay_answer(1, 5, rows(6)), "invalidations");
    assert_refused(replay_answer(1, 5, Vec::new()), "invalidations");
}

#[test]
fn meta_has_at_most_16_kib() {
    assert!(found_key(|key| key.meta = "m".repeat(META_BYTES_MAX)).is_ok());
    assert_refused(found_key(|key| key.meta = "m".repeat(META_BYTES_MAX + 1)), "meta");
}

#[test]
fn no_row_is_longer_than_its_limit() {
    assert!(codec::invalidation_to(&largest_row(1023)).encoded_len() <= INVALIDATION_BYTES_MAX);
}
