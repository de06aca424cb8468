//! Tests of the bus messages: encoded messages decode to the same, broken ones are rejected, and additions of later
//! versions do no harm.

mod compatibility;
mod limits;
mod messages;

use bytes::Bytes;
use evictd_core::limits::{LIVE_BATCH_MAX, PAYLOAD_BYTES_MAX};
use proptest::prelude::*;
use proptest::sample::Index;

use self::messages::{AnyMessage, any_message, decode_as_everything};

proptest! {
    #[test]
    fn every_message_decodes_as_it_was_encoded(message in any_message()) {
        let payload = message.encode();
        prop_assert!(!payload.is_empty(), "NATS gives empty answers a meaning of its own");
        prop_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        prop_assert_eq!(message.decode_same_kind(&payload), Ok(message));
    }

    #[test]
    fn arbitrary_bytes_never_panic_a_decoder(payload in prop::collection::vec(any::<u8>(), 0..300)) {
        decode_as_everything(&payload);
    }

    #[test]
    fn a_truncated_message_never_panics_a_decoder(message in any_message(), at in any::<Index>()) {
        let payload = message.encode();
        decode_as_everything(&payload[..at.index(payload.len())]);
    }

    #[test]
    fn flipped_bits_never_panic_a_decoder(
        message in any_message(),
        flips in prop::collection::vec((any::<Index>(), 0u8..8), 1..8),
    ) {
        let mut payload = message.encode().to_vec();
        for (at, bit) in flips {
            let at = at.index(payload.len());
            payload[at] ^= 1 << bit;
        }
        decode_as_everything(&payload);
    }

    /// An inbox is meant for one kind of answer, but any message may arrive there.
    #[test]
    fn a_message_of_another_kind_never_panics_a_decoder(message in any_message()) {
        decode_as_everything(&message.encode());
    }
}

#[test]
fn the_smallest_message_of_each_kind_is_not_empty() {
    for message in messages::smallest() {
        let payload: Bytes = message.encode();
        assert!(!payload.is_empty(), "{message:?}");
        assert_eq!(message.decode_same_kind(&payload).as_ref(), Ok(&message));
    }
}

#[test]
fn batches_of_the_largest_rows_fit_a_message() {
    let rows: Vec<_> = (0..1024).map(messages::largest_row).collect();
    for batch in rows.chunks(LIVE_BATCH_MAX) {
        assert!(AnyMessage::live_of(batch.to_vec()).encode().len() <= PAYLOAD_BYTES_MAX);
    }

    let message = AnyMessage::replay_of(rows.clone());
    let payload = message.encode();
    assert!(payload.len() < PAYLOAD_BYTES_MAX, "{} bytes", payload.len());
    let Ok(AnyMessage::ReplayAnswer(_, answer)) = message.decode_same_kind(&payload) else {
        panic!("not a replay answer");
    };
    let evictd_core::follower::ReplayOutcome::Rows(prefix) = answer.outcome else { panic!("not rows") };
    assert!(!prefix.is_empty());
    assert_eq!(prefix, rows[..prefix.len()], "a prefix has no holes");
}
