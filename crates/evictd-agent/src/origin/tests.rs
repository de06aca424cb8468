//! Answers and their questions.

use evictd_core::position::LogPosition;
use evictd_core::record::Record;
use evictd_ops::readiness::Readiness;
use evictd_wire::api::ids::hash;

use super::*;
use crate::bus;
use crate::fixture::{Agent, at, config, lookup};

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
async fn of_two_publishers_answers_the_first_counts_and_the_second_is_unasked() {
    let agent = Agent::live();
    let config = config(&[("nats.urls", "nats://127.0.0.1:1")]);
    let identity = evictd_core::ids::Identity {
        region: config.requester().region,
        agent: config.requester().agent,
        instance: InstanceId(1),
    };
    let bus = bus::connect(&config, &identity, &agent.metrics, &Readiness::new()).await.unwrap();
    let origin = Authority::new(bus.lookups(), identity.instance, config.loads.timeout.into());
    let (sender, mut answered) = oneshot::channel();
    origin.open.lock().insert(5, Question { hash: hash("alice"), answer: sender });

    origin.on_answer(&answer(5, "bob", at(1)), &agent.metrics);
    assert!(answered.try_recv().is_err(), "an answer to another question is none");
    origin.on_answer(&answer(5, "alice", at(2)), &agent.metrics);
    origin.on_answer(&answer(5, "alice", at(3)), &agent.metrics);
    match answered.try_recv().unwrap() {
        Some(LookupOutcome::Found { lookup, .. }) => assert_eq!(lookup.as_of, at(2)),
        other => panic!("{other:?}"),
    }
    let unasked = r#"evictd_agent_ignored_messages_total{subject="lookup",reason="unasked"}"#;
    assert_eq!(agent.metric(unasked), 2);
    assert!(origin.open.lock().is_empty());
}
