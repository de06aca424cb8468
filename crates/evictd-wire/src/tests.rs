//! Tests of the bus messages as a whole: what is written reads back, what is broken is refused, and what
//! a later version may add doesn't harm.

mod compatibility;
mod limits;
mod messages;

use bytes::Bytes;
use evictd_core::limits::{LIVE_BATCH_MAX, PAYLOAD_BYTES_MAX};
use proptest::prelude::*;
use proptest::sample::Index;

use self::messages::{Message, any_message, decode_as_everything};

proptest! {
    #[test]
    fn every_message_reads_back_as_it_was_written(message in any_message()) {
        let payload = message.encode();
        prop_assert!(!payload.is_empty(), "NATS has a meaning of its own for empty answers");
        prop_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        prop_assert_eq!(message.decode_same_kind(&payload), Ok(message));
    }

    #[test]
    fn arbitrary_bytes_never_panic_a_reader(payload in prop::collection::vec(any::<u8>(), 0..300)) {
        decode_as_everything(&payload);
    }

    #[test]
    fn a_truncated_message_never_panics_a_reader(message in any_message(), at in any::<Index>()) {
        let payload = message.encode();
        decode_as_everything(&payload[..at.index(payload.len())]);
    }

    #[test]
    fn flipped_bits_never_panic_a_reader(
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

    /// An inbox takes one kind of answer, but what arrives there is anybody's guess.
    #[test]
    fn a_message_of_another_kind_never_panics_a_reader(message in any_message()) {
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
fn the_largest_rows_fit_where_they_are_promised_to_fit() {
    let rows: Vec<_> = (0..1024).map(messages::largest_row).collect();
    for batch in rows.chunks(LIVE_BATCH_MAX) {
        assert!(Message::live_of(batch.to_vec()).encode().len() <= PAYLOAD_BYTES_MAX);
    }

    let message = Message::replay_of(rows.clone());
    let payload = message.encode();
    assert!(payload.len() < PAYLOAD_BYTES_MAX, "{} bytes", payload.len());
    let Ok(Message::ReplayAnswer(_, answer)) = message.decode_same_kind(&payload) else {
        panic!("not a replay answer");
    };
    let evictd_core::follower::ReplayOutcome::Rows(prefix) = answer.outcome else { panic!("not rows") };
    assert!(!prefix.is_empty());
    assert_eq!(prefix, rows[..prefix.len()], "a prefix has no holes");
}
