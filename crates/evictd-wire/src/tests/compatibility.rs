//! Additions of later versions, as this version decodes them. They are encoded by hand.

use evictd_core::invalidation::{Cause, Scope};
use evictd_core::record::{Record, RecordState};
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::StoreTime;
use proptest::prelude::*;
use prost::encoding::{bytes, fixed64, uint64};

use super::messages::{any_message, smallest};
use crate::codec::DecodeError;
use crate::live::{Live, LiveEvent};
use crate::lookup::{LookupAnswer, LookupOutcome};
use crate::probe::ProbeRequest;
use crate::replay::ReplayAnswer;

/// A field number that no message uses.
const UNKNOWN: u32 = 1000;

const HASH: [u8; 32] = [7; 32];

/// A protobuf message, field by field.
#[derive(Clone, Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn number(mut self, tag: u32, value: u64) -> Self {
        uint64::encode(tag, &value, &mut self.0);
        self
    }

    fn fixed(mut self, tag: u32, value: u64) -> Self {
        fixed64::encode(tag, &value, &mut self.0);
        self
    }

    fn bytes(mut self, tag: u32, value: impl Into<Vec<u8>>) -> Self {
        bytes::encode(tag, &value.into(), &mut self.0);
        self
    }

    fn message(self, tag: u32, fields: Self) -> Self {
        self.bytes(tag, fields.0)
    }
}

fn fields() -> Fields {
    Fields::default()
}

fn provenance() -> Fields {
    fields().fixed(1, 1).fixed(2, 1)
}

fn voucher(position: u64) -> Fields {
    fields().message(1, provenance()).number(2, 1).number(3, position).bytes(5, [0; 16])
}

/// A live message with one row, which has these fields besides its position.
fn live_row(row: Fields) -> (Scope, Cause) {
    let row = row.number(1, 9);
    let payload = fields().message(1, voucher(9)).message(2, fields().message(1, row)).0;
    match Live::decode(&payload).map(|live| live.event) {
        Ok(LiveEvent::Invalidations(mut rows)) if rows.len() == 1 => {
            let row = rows.remove(0);
            assert_eq!((row.position.epoch(), row.position.position()), (1, 9));
            (row.scope, row.cause)
        }
        other => panic!("expected one row, got {other:?}"),
    }
}

/// Decodes an answer for [`HASH`] with this outcome.
fn lookup(outcome: impl FnOnce(Fields) -> Fields) -> Result<LookupOutcome, DecodeError> {
    let answer = outcome(fields().number(1, 1).bytes(2, HASH));
    LookupAnswer::decode(&answer.0).map(|answer| answer.outcome)
}

fn key_with_state(state: u64) -> Fields {
    fields().bytes(1, "key_1").bytes(2, "api_1").bytes(3, "ws_1").number(4, state)
}

#[test]
fn an_unknown_or_missing_scope_decodes_as_all() {
    assert_eq!(live_row(fields().message(UNKNOWN, fields().bytes(1, "narrower"))).0, Scope::All);
    assert_eq!(live_row(fields().bytes(UNKNOWN, "")).0, Scope::All);
    assert_eq!(live_row(fields()).0, Scope::All);
}

#[test]
fn an_unknown_or_missing_cause_decodes_as_changed() {
    for cause in [99, u64::MAX, 0] {
        assert_eq!(live_row(fields().number(6, cause)).1, Cause::Changed);
    }
    assert_eq!(live_row(fields()).1, Cause::Changed);
    assert_eq!(live_row(fields().number(6, 3)).1, Cause::Deleted);
}

#[test]
fn an_unknown_or_missing_state_grants_nothing() {
    for state in [99, u64::MAX, 0] {
        let key = fields().number(1, 1).message(6, provenance()).message(4, key_with_state(state));
        let Ok(LookupOutcome::Found { lookup: found, .. }) = lookup(|answer| answer.message(3, key)) else {
            panic!("not found");
        };
        assert!(matches!(found.record, Record::Key(key) if key.state == RecordState::Deleted));

        let root_key = fields().bytes(1, "root_1").bytes(2, "ws_1").number(3, state);
        let root_key = fields().number(1, 1).message(6, provenance()).message(5, root_key);
        let Ok(LookupOutcome::Found { lookup: found, .. }) = lookup(|answer| answer.message(3, root_key))
        else {
            panic!("not found");
        };
        assert!(matches!(found.record, Record::RootKey(root) if root.state == RecordState::Deleted));
    }
}

#[test]
fn an_expiry_of_zero_is_not_absent() {
    let ends = |key: Fields, root_key: Fields| {
        [(4, key), (5, root_key)].map(|(tag, record)| {
            let found = fields().number(1, 1).message(6, provenance()).message(tag, record);
            let Ok(LookupOutcome::Found { lookup: found, .. }) = lookup(|answer| answer.message(3, found))
            else {
                panic!("not found");
            };
            match found.record {
                Record::Key(key) => key.expires_at,
                Record::RootKey(root) => root.expires_at,
                Record::Absent => panic!("absent"),
            }
        })
    };
    let root_key = || fields().bytes(1, "root_1").bytes(2, "ws_1").number(3, 1);
    assert_eq!(ends(key_with_state(1), root_key()), [None, None]);
    let zero = Some(StoreTime(0));
    assert_eq!(ends(key_with_state(1).number(7, 0), root_key().number(5, 0)), [zero, zero]);
}

/// Such a record grants nothing.
#[test]
fn a_record_of_an_unknown_kind_decodes_as_absent() {
    let found = fields().number(1, 1).message(6, provenance()).message(UNKNOWN, fields().bytes(1, "x"));
    let Ok(LookupOutcome::Found { lookup: found, .. }) = lookup(|answer| answer.message(3, found)) else {
        panic!("not found");
    };
    assert_eq!(found.record, Record::Absent);
}

#[test]
fn an_unknown_or_missing_policy_promises_nothing() {
    let request = || fields().number(1, 1).fixed(2, 1);
    for (request, expected) in [
        (request(), PartitionPolicy::ServeStale),
        (request().number(3, 99), PartitionPolicy::ServeStale),
        (request().number(3, 2), PartitionPolicy::ServeStale),
        (request().number(3, 1), PartitionPolicy::Deny),
    ] {
        assert_eq!(ProbeRequest::decode(&request.0).unwrap().policy, expected);
    }
}

#[test]
fn an_unknown_or_missing_event_or_outcome_is_an_error() {
    let unknown = |known: Fields| [known.clone(), known.message(UNKNOWN, fields().number(1, 1))];
    for live in unknown(fields().message(1, voucher(1))) {
        assert_eq!(Live::decode(&live.0), Err(DecodeError::Unknown));
    }
    for replay in unknown(fields().number(1, 1).number(2, 1).number(3, 1)) {
        assert_eq!(ReplayAnswer::decode(&replay.0), Err(DecodeError::Unknown));
    }
    for lookup in unknown(fields().number(1, 1).bytes(2, HASH)) {
        assert_eq!(LookupAnswer::decode(&lookup.0), Err(DecodeError::Unknown));
    }
}

#[test]
fn the_last_of_several_outcomes_counts() {
    let both = lookup(|answer| answer.message(3, fields().number(1, 1)).message(4, fields()));
    assert_eq!(both, Ok(LookupOutcome::Busy));
}

#[test]
fn unknown_fields_inside_are_skipped() {
    let extra = |inner: Fields| inner.number(UNKNOWN, 5).bytes(UNKNOWN + 1, "later").fixed(UNKNOWN + 2, 6);
    let key = extra(fields().bytes(1, HASH).bytes(2, "key_1"));
    let (scope, cause) = live_row(extra(fields().message(2, key).number(6, 3)));
    assert_eq!(cause, Cause::Deleted);
    assert!(matches!(scope, Scope::Key { key_id: Some(id), api_id: None, .. } if id.as_str() == "key_1"));

    let found = extra(fields().number(1, 1).message(6, provenance()).message(4, extra(key_with_state(1))));
    let Ok(LookupOutcome::Found { lookup: found, .. }) = lookup(|answer| extra(answer.message(3, found)))
    else {
        panic!("not found");
    };
    assert!(matches!(found.record, Record::Key(key) if key.state == RecordState::Active));
}

#[test]
fn a_field_of_the_wrong_type_is_malformed() {
    for message in smallest() {
        // Field 1 is a number or another message.
        let payload = fields().bytes(1, "x").0;
        let read = message.decode_same_kind(&payload);
        assert!(matches!(read, Err(DecodeError::Malformed(_))), "{read:?}");
    }
}

proptest! {
    #[test]
    fn unknown_fields_before_and_after_are_skipped(message in any_message(), value: u64, text in ".{0,20}") {
        let extra = fields().number(UNKNOWN, value).bytes(UNKNOWN + 1, text).fixed(UNKNOWN + 2, value).0;
        let payload = [extra.as_slice(), &message.encode(), extra.as_slice()].concat();
        prop_assert_eq!(message.decode_same_kind(&payload), Ok(message));
    }
}
