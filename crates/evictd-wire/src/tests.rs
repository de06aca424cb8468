//! Tests of the bus messages as a whole: what is written reads back, what is broken is refused, and what
//! a later version may add doesn't harm.

mod compatibility;
mod limits;
mod messages;

use bytes::Bytes;
use evictd_core::limits::{LIVE_BATCH_MAX, PAYLOAD_BYTES_MAX};
use proptest::prelude::*;
use proptest::sample::Index;

use self::messages::{Message, any_message, any_rows, decode_as_everything};
use crate::live::{self, Live};

proptest! {
    #[test]
    fn every_message_reads_back_as_it_was_written(message in any_message()) {
        let payload = message.encode();
        prop_assert!(!payload.is_empty(), "NATS has a meaning of its own for empty answers");
        prop_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        prop_assert_eq!(message.decode_same_kind(&payload), Ok(message));
    }

    #[test]
    fn rows_travel_in_order_in_batches_of_one_epoch(
        first in any_rows(1..150), second in any_rows(1..150), third in any_rows(0..10),
    ) {
        let rows = [first, second, third].concat();
        let mut received = Vec::new();
        for payload in live::encode_invalidations(&rows) {
            let Ok(Live::Invalidations(batch)) = live::decode(&payload) else {
                panic!("not a batch of invalidations");
            };
            prop_assert!((1..=LIVE_BATCH_MAX).contains(&batch.len()));
            let epoch = batch[0].position.epoch();
            prop_assert!(batch.iter().all(|row| row.position.epoch() == epoch));
            received.extend(batch);
        }
        prop_assert_eq!(received, rows);
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
fn no_rows_are_no_message() {
    assert_eq!(live::encode_invalidations(&[]).count(), 0);
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
    for payload in live::encode_invalidations(&rows) {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX);
    }

    let message = Message::replay_of(rows.clone());
    let payload = message.encode();
    assert!(payload.len() < PAYLOAD_BYTES_MAX, "{} bytes", payload.len());
    let Ok(Message::ReplayAnswer(_, answer)) = message.decode_same_kind(&payload) else {
        panic!("not a replay answer");
    };
    let evictd_core::follower::ReplayAnswer::Rows(prefix) = answer.outcome else { panic!("not rows") };
    assert!(!prefix.is_empty());
    assert_eq!(prefix, rows[..prefix.len()], "a prefix has no holes");
}
