//! What an intake admits.

use evictd_ops::metrics::Registry;
use tokio::sync::mpsc;

use super::*;
use crate::metrics;

const INBOX: &str = "_INBOX_evictd.eu-central-1.edge.00ff.probe";

/// A connection to a server that can't be reached: what is sent is dropped.
pub(crate) async fn unconnected(metrics: &Arc<PublisherMetrics>) -> Bus {
    let config = BusConfig { urls: vec!["nats://127.0.0.1:1".to_owned()], ..BusConfig::default() };
    connect(&config, metrics, &Readiness::new(), || {}).await.unwrap()
}

/// An intake of such a publisher; messages are put before it by hand.
async fn subscription(kind: MessageKind) -> (Subscription, Registry) {
    let registry = Registry::new(metrics::SPECS, &[]).unwrap();
    let bus = unconnected(&Arc::new(PublisherMetrics::new(&registry))).await;
    (bus.receive(kind).await.unwrap(), registry)
}

fn message(subject: &str, reply: Option<&str>) -> Message {
    carrying(Bytes::from_static(b"x"), subject, reply)
}

pub(crate) fn carrying(payload: Bytes, subject: &str, reply: Option<&str>) -> Message {
    Message {
        subject: subject.into(),
        reply: reply.map(Into::into),
        length: payload.len(),
        payload,
        headers: None,
        status: None,
        description: None,
    }
}

#[tokio::test]
async fn a_request_comes_with_its_requester_and_inbox() {
    for kind in [MessageKind::Probe, MessageKind::Replay, MessageKind::Lookup] {
        let (subscription, _) = subscription(kind).await;
        let subject = format!("evictd.v1.{}.eu-central-1.edge", kind.token());
        let envelope = subscription.admit(message(&subject, Some(INBOX))).unwrap();
        assert_eq!(envelope.requester, Requester::new("eu-central-1", "edge").unwrap());
        assert_eq!((envelope.reply.as_str(), &envelope.payload[..]), (INBOX, &b"x"[..]));
    }
}

#[tokio::test]
async fn a_query_to_all_publishers_names_its_requester_too() {
    for kind in [MessageKind::Probe, MessageKind::Replay, MessageKind::Lookup] {
        let (subscription, _) = subscription(kind).await;
        let subject = format!("evictd.v1.{}.eu-central-1.edge.any", kind.token());
        let envelope = subscription.admit(message(&subject, Some(INBOX))).unwrap();
        assert_eq!(envelope.requester, Requester::new("eu-central-1", "edge").unwrap());
    }
}

/// Feeds an intake by hand: what it shares with other publishers, and what goes to all.
pub(crate) fn fed(bus: &Bus, kind: MessageKind) -> (Subscription, [mpsc::UnboundedSender<Message>; 2]) {
    let channel = || {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        (sender, futures_util::stream::poll_fn(move |context| receiver.poll_recv(context)).boxed())
    };
    let ((share, shared), (tell_all, to_all)) = (channel(), channel());
    (Subscription { bus: bus.clone(), kind, shared: Some(shared), to_all }, [share, tell_all])
}

#[tokio::test]
async fn without_its_queue_group_a_publisher_receives_second_tries() {
    let (unfed, _) = subscription(MessageKind::Lookup).await;
    let (mut subscription, [share, tell_all]) = fed(&unfed.bus, MessageKind::Lookup);
    let subject = "evictd.v1.lookup.eu-central-1.edge";
    share.send(message(subject, Some(INBOX))).unwrap();
    assert!(subscription.next().await.is_some());
    subscription.set_serving(false).await;
    assert!(share.is_closed(), "the subscription has ended");
    tell_all.send(message(&format!("{subject}.any"), Some(INBOX))).unwrap();
    assert!(subscription.next().await.is_some());
    subscription.set_serving(true).await;
    assert!(subscription.shared.is_some());
}

#[tokio::test]
async fn an_answer_goes_into_the_requesters_inbox_or_nowhere() {
    let (subscription, _) = subscription(MessageKind::Lookup).await;
    for reply in [
        None,
        Some(""),
        Some("_INBOX_evictd.eu-central-1.edge"),
        Some("_INBOX_evictd.eu-central-1.edge."),
        Some("_INBOX_evictd.eu-central-1.edge2.x"),
        Some("_INBOX_evictd.us-east-1.edge.x"),
        Some("_INBOX_evictd.eu-central-1.edge.>"),
        Some("_INBOX.x"),
        Some("evictd.v1.live"),
        Some("evictd.v1.applied.eu-central-1.edge"),
        Some("$SYS.REQ.SERVER.PING"),
    ] {
        let refused = subscription.admit(message("evictd.v1.lookup.eu-central-1.edge", reply)).unwrap_err();
        assert_eq!(refused, Refusal::Reply, "{reply:?}");
    }
}

#[tokio::test]
async fn a_subject_without_a_requester_is_refused() {
    let (subscription, _) = subscription(MessageKind::Probe).await;
    for subject in [
        "evictd.v1.probe",
        "evictd.v1.probe.eu",
        "evictd.v1.probe.eu.a.b",
        "evictd.v1.probe..a",
        "probe.eu.a",
    ] {
        let refused = subscription.admit(message(subject, Some(INBOX))).unwrap_err();
        assert_eq!(refused, Refusal::Subject, "{subject}");
    }
}

#[tokio::test]
async fn an_announcement_wants_no_answer() {
    let (subscription, _) = subscription(MessageKind::Applied).await;
    let envelope = subscription.admit(message("evictd.v1.applied.eu-central-1.edge", None)).unwrap();
    assert_eq!(envelope.reply, "");
    // Nothing is ever sent there.
    assert!(
        subscription.admit(message("evictd.v1.applied.eu-central-1.edge", Some("evictd.v1.live"))).is_ok()
    );
}

#[tokio::test]
async fn refusals_are_counted_by_kind_and_reason() {
    let (subscription, registry) = subscription(MessageKind::Replay).await;
    for (refusal, reason) in [
        (Refusal::Malformed, "malformed"),
        (Refusal::Reply, "reply"),
        (Refusal::Subject, "subject"),
        (Refusal::Overload, "overload"),
        (Refusal::Ahead, "ahead"),
    ] {
        subscription.refuse(refusal);
        let line =
            format!("evictd_publisher_refused_messages_total{{subject=\"replay\",reason=\"{reason}\"}} 1");
        let scrape = registry.render();
        assert!(scrape.lines().any(|found| found == line), "no {line} in\n{scrape}");
    }
}

#[tokio::test]
async fn nothing_is_queued_for_a_connection_that_is_down() {
    let (subscription, _) = subscription(MessageKind::Probe).await;
    assert!(!subscription.bus.send("evictd.v1.live".to_owned(), Bytes::from_static(b"x")).await);
}
