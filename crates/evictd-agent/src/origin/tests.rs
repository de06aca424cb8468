//! Answers and their queries.

use evictd_core::position::LogPosition;
use evictd_core::record::Record;
use evictd_ops::readiness::Readiness;
use evictd_wire::api::ids::hash;

use super::*;
use crate::bus;
use crate::fixture::{TestAgent, at, config, lookup};

fn answer(nonce: u64, text: &str, as_of: LogPosition) -> Message {
    let lookup = lookup(as_of, Record::Absent);
    let outcome = LookupOutcome::Found { lookup, fence_age: Duration::ZERO };
    let payload = LookupAnswer { nonce, hash: hash(text), outcome }.encode();
    Message {
        subject: format!("inbox.{nonce}").into(),
        reply: None,
        length: payload.len(),
        payload,
        headers: None,
        status: None,
        description: None,
    }
}

#[tokio::test]
async fn the_first_of_two_answers_counts_and_the_second_is_unasked() {
    let agent = TestAgent::live();
    let config = config(&[("nats.urls", "nats://127.0.0.1:1")]);
    let bus = bus::connect(&config, &agent.identity, &agent.metrics, &Readiness::new()).await.unwrap();
    let origin = BusOrigin::new(bus.lookups, agent.identity.instance, config.loads.timeout.into());
    let (sender, mut answered) = oneshot::channel();
    origin.pending.lock().insert(5, PendingLookup { hash: hash("alice"), answer: sender });

    origin.on_answer(&answer(5, "bob", at(1)), &agent.metrics);
    assert!(answered.try_recv().is_err(), "an answer for another hash doesn't count");
    origin.on_answer(&answer(5, "alice", at(2)), &agent.metrics);
    origin.on_answer(&answer(5, "alice", at(3)), &agent.metrics);
    match answered.try_recv().unwrap() {
        Some(LookupOutcome::Found { lookup, .. }) => assert_eq!(lookup.as_of, at(2)),
        other => panic!("{other:?}"),
    }
    let unasked = r#"evictd_agent_ignored_messages_total{subject="lookup",reason="unasked"}"#;
    assert_eq!(agent.metric(unasked), 2);
    assert!(origin.pending.lock().is_empty());
}
