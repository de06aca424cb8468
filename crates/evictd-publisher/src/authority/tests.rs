//! Rounds: what they cost, what begins epochs, and when a publisher keeps silent.

use std::time::Instant;

use async_nats::Message;
use evictd_core::history::{Incarnation, LogToken, Milestone, Voucher};
use evictd_core::ids::{InstanceId, KeyHash};
use evictd_core::roster::PartitionPolicy;
use evictd_ops::metrics::Registry;
use evictd_ops::readiness::Readiness;
use evictd_store::operator::Operator;
use evictd_store::sqlite::SqliteStore;
use evictd_store::{LogStore, OperatorStore, RosterStore};
use evictd_wire::lookup::LookupRequest;
use evictd_wire::subject::MessageKind;
use parking_lot::Mutex;
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::DropGuard;

use super::*;
use crate::bus::tests::{carrying, fed, unconnected};
use crate::config::ReceiptsConfig;
use crate::history::HomeHistory;
use crate::live_feed::LiveFeed;
use crate::metrics;
use crate::queries::Lookups;
use crate::receipts::ReceiptsTask;
use crate::vouching::Vouching;

/// How long what is bound to happen may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);

const BOUND: Duration = Duration::from_secs(30);

/// A publisher without NATS: tests feed it with requests.
struct AuthorityFixture {
    store: Arc<SqliteStore>,
    vouching: Vouching,
    history: Arc<HomeHistory>,
    registry: Registry,
    readiness: Readiness,
    probes: [UnboundedSender<Message>; 2],
    lookups: [UnboundedSender<Message>; 2],
    _stop: DropGuard,
}

impl AuthorityFixture {
    async fn new(store: &std::path::Path, patience: Duration) -> Self {
        let store = Arc::new(SqliteStore::open(store).await.unwrap());
        let registry = Registry::new(metrics::SPECS, &[]).unwrap();
        let history = Arc::new(HomeHistory::read(store.clone()).await.unwrap());
        let shared = Shared::serving(history, &registry);
        let bus = unconnected(&shared.metrics).await;
        let stop = CancellationToken::new();
        let receipts_config = ReceiptsConfig { bound: BOUND.into(), regions: Vec::new() };
        let (receipts, membership, task) =
            ReceiptsTask::new(&receipts_config, store.clone(), shared.clone(), &registry, stop.clone());
        tokio::spawn(task.run());
        let config = AuthorityConfig {
            round_spacing: Duration::from_millis(250).into(),
            round_patience: patience.into(),
            probes_waiting_max: 20_000,
            lookups_max: 256,
            replays_max: 8,
        };
        let lookups = Arc::new(Lookups {
            store: store.clone(),
            bus: bus.clone(),
            membership: membership.clone(),
            permits: Arc::new(Semaphore::new(config.lookups_max)),
            by_requester: Mutex::default(),
            per_requester_max: config.lookups_max / 2,
            shared: shared.clone(),
        });
        let feed = LiveFeed { bus: bus.clone(), shared: shared.clone() };
        let (readiness, serving) = (Readiness::new(), watch::Sender::new(true));
        let authority = Authority {
            config,
            store: store.clone(),
            bus: bus.clone(),
            output: LogOutput { feed, receipts, shared: shared.clone() },
            membership,
            serving: serving.clone(),
            succeeding: watch::Sender::new(true),
            condition: readiness.condition("rounds", "the test"),
            shared: shared.clone(),
        };
        let (probe_requests, probes) = fed(&bus, MessageKind::Probe);
        let (lookup_requests, lookup_senders) = fed(&bus, MessageKind::Lookup);
        tokio::spawn(lookups.run(lookup_requests, serving.subscribe(), stop.clone()));
        tokio::spawn(authority.run(probe_requests, stop.clone()));
        let (lookups, stop) = (lookup_senders, stop.drop_guard());
        let Shared { history, vouching, .. } = shared;
        Self { store, vouching, history, registry, readiness, probes, lookups, _stop: stop }
    }

    fn metric(&self, series: &str) -> u64 {
        let scrape = self.registry.render();
        let line = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{scrape}")).parse::<f64>().unwrap() as u64
    }

    fn rounds(&self) -> u64 {
        self.metric("evictd_publisher_rounds_total{outcome=\"ok\"}")
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        // Rarely: with 300 regions a look is long.
        let mut look = tokio::time::interval(Duration::from_millis(100));
        let looking = async {
            while !is_so(self) {
                look.tick().await;
            }
        };
        assert!(tokio::time::timeout(SOON, looking).await.is_ok(), "{what}\n{}", self.registry.render());
    }
}

fn probe(agent: u64, seen: Option<Voucher>) -> Message {
    let request = ProbeRequest {
        nonce: agent + 1,
        instance: InstanceId(agent + 1),
        policy: PartitionPolicy::Deny,
        bound: BOUND,
        seen,
    };
    let (region, agent) = (agent % 300, agent / 300);
    let subject = format!("evictd.v1.probe.r{region}.a{agent}");
    carrying(request.encode(), &subject, Some(&format!("_INBOX_evictd.r{region}.a{agent}.x")))
}

fn lookup(agent: u64) -> Message {
    let request = LookupRequest { nonce: 1, hash: KeyHash([7; 32]), instance: InstanceId(agent + 1) };
    let subject = format!("evictd.v1.lookup.r{agent}.a");
    carrying(request.encode(), &subject, Some(&format!("_INBOX_evictd.r{agent}.a.x")))
}

#[tokio::test]
async fn ten_thousand_agents_cost_no_more_rounds_than_one() {
    let directory = tempfile::tempdir().unwrap();
    let home = AuthorityFixture::new(&directory.path().join("home.db"), SOON).await;
    let began = Instant::now();
    for times in 1..=3 {
        for agent in 0..10_000 {
            home.probes[0].send(probe(agent, None)).unwrap();
        }
        home.until("all probes to be answered", |home| {
            home.metric("evictd_publisher_probes_total") == times * 10_000
        })
        .await;
    }
    let (rounds, most) = (home.rounds(), began.elapsed().as_secs_f64() * 4.0 + 1.0);
    assert!(rounds as f64 <= most, "{rounds} rounds in {:?}", began.elapsed());
    assert_eq!(home.store.roster(0).await.unwrap().entries.len(), 10_000);
    assert_eq!(
        home.metric("evictd_publisher_refused_messages_total{subject=\"probe\",reason=\"overload\"}"),
        0
    );
}

fn refused(home: &AuthorityFixture, reason: &str) -> u64 {
    home.metric(&format!("evictd_publisher_refused_messages_total{{subject=\"probe\",reason=\"{reason}\"}}"))
}

/// What this store would give out at `position` of an incarnation.
fn given_out(home: &AuthorityFixture, incarnation: Incarnation, position: u64) -> Voucher {
    let head = home.history.head();
    let at = LogPosition::new(head.at.epoch(), position).unwrap();
    home.history.voucher(&Head { incarnation, ..head }, at)
}

/// Failure: one login that forges claims makes every region flush, until the epochs are used up.
#[tokio::test]
async fn claim_that_is_not_proved_moves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let home = AuthorityFixture::new(&directory.path().join("home.db"), SOON).await;
    let before = home.store.head().await.unwrap();
    let provenance = home.history.history().provenance();
    let milestone = |epoch, position| Milestone {
        provenance,
        at: LogPosition::new(epoch, position).unwrap(),
        token: LogToken(1),
    };
    for (agent, milestone) in (0..).zip([milestone(1, 50), milestone(9, 0), milestone(1_048_575, 3)]) {
        home.probes[0].send(probe(agent, Some(Voucher { milestone, mac: [7; 16] }))).unwrap();
    }
    home.until("all claims to be refused", |home| refused(home, "unproved") == 3).await;
    assert_eq!(home.store.head().await.unwrap().at, before.at);
    assert!(home.vouching.is_allowed(), "a forged claim silences no publisher");
}

#[tokio::test]
async fn a_proved_past_that_the_store_lacks_silences_its_publisher() {
    let directory = tempfile::tempdir().unwrap();
    let home = AuthorityFixture::new(&directory.path().join("home.db"), SOON).await;
    let lost = given_out(&home, Incarnation(99), 50);
    home.probes[0].send(probe(1, Some(lost))).unwrap();
    home.until("the claim to be refused", |home| refused(home, "unknown_past") == 1).await;
    assert!(!home.vouching.is_allowed());
    let reason = home.vouching.refusal().unwrap();
    assert!(reason.contains("older copy") && reason.contains("r1/a0") && reason.contains("1.50"), "{reason}");
    assert_eq!(home.store.head().await.unwrap().at.epoch(), 1, "nothing begins by itself");
}

/// Failure: another copy of the same incarnation has given out the position, and this one's log caught up.
#[tokio::test]
async fn position_with_the_token_of_another_copy_is_not_known() {
    let directory = tempfile::tempdir().unwrap();
    let home = AuthorityFixture::new(&directory.path().join("home.db"), SOON).await;
    let head = home.store.head().await.unwrap();
    let twin = home.history.voucher(&Head { token: LogToken(head.token.0 ^ 1), ..head }, head.at);
    home.probes[0].send(probe(1, Some(twin))).unwrap();
    home.until("the claim to be refused", |home| refused(home, "unknown_past") == 1).await;
    assert!(!home.vouching.is_allowed());
}

#[tokio::test]
async fn a_past_that_an_operator_superseded_silences_no_publisher() {
    let directory = tempfile::tempdir().unwrap();
    let home = AuthorityFixture::new(&directory.path().join("home.db"), SOON).await;
    let lost = given_out(&home, Incarnation(99), 50);
    let operator = Operator { name: "ops".to_owned(), request_id: "req_1".to_owned() };
    home.store.begin_epoch(&operator).await.unwrap();
    home.probes[0].send(probe(1, Some(lost))).unwrap();
    home.until("the probe to take part", |home| home.metric("evictd_publisher_probes_total") == 1).await;
    // The next one takes part when the first was judged.
    home.probes[0].send(probe(2, None)).unwrap();
    home.until("another probe to take part", |home| home.metric("evictd_publisher_probes_total") == 2).await;
    assert_eq!((refused(&home, "unknown_past"), refused(&home, "unproved")), (0, 0));
    assert!(home.vouching.is_allowed());
}

#[tokio::test]
async fn lookups_raise_the_fence_of_a_publisher_without_probes() {
    let directory = tempfile::tempdir().unwrap();
    let home = AuthorityFixture::new(&directory.path().join("home.db"), SOON).await;
    home.until("its first round", |home| home.rounds() == 1).await;
    let answered =
        |home: &AuthorityFixture| home.metric("evictd_publisher_lookups_total{outcome=\"answered\"}");
    // Until the fence of its start is too old for them.
    for hundreds in 1.. {
        for agent in 0..100 {
            home.lookups[0].send(lookup(agent)).unwrap();
        }
        home.until("the lookups to be answered", |home| answered(home) == hundreds * 100).await;
        if home.rounds() > 1 {
            break;
        }
    }
    assert!(home.rounds() <= 3, "they share it: {}", home.rounds());
}

/// Failure: a publisher that can do no round, because its role may not write, calls itself ready until it has failed
/// for long enough.
#[tokio::test]
async fn a_publisher_is_ready_after_its_first_successful_round() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    drop(SqliteStore::open(&path).await.unwrap());
    let mut other =
        SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
    // Whatever it writes there is refused.
    sqlx::query("CREATE TRIGGER no_rounds BEFORE UPDATE ON log_head BEGIN SELECT RAISE(ABORT, 'no'); END")
        .execute(&mut other)
        .await
        .unwrap();
    let home = AuthorityFixture::new(&path, SOON).await;
    let failed = |home: &AuthorityFixture| home.metric("evictd_publisher_rounds_total{outcome=\"failed\"}");
    home.until("it to try again and again", |home| failed(home) >= 3).await;
    assert!(!home.readiness.is_ready(), "its patience hasn't ended, and yet");
    sqlx::query("DROP TRIGGER no_rounds").execute(&mut other).await.unwrap();
    home.until("it to be ready", |home| home.readiness.is_ready()).await;
    assert!(home.rounds() > 0);
}

#[tokio::test]
async fn a_publisher_leaves_its_queue_groups_while_rounds_stall() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    let home = AuthorityFixture::new(&path, Duration::from_millis(100)).await;
    let mut other =
        SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
    let lock = other.begin_with("BEGIN IMMEDIATE").await.unwrap();
    home.probes[0].send(probe(1, None)).unwrap();
    home.until("it to leave", |home| home.probes[0].is_closed() && home.lookups[0].is_closed()).await;
    assert!(!home.probes[1].is_closed(), "second tries still reach it");
    assert_eq!(home.metric("evictd_publisher_stalled"), 1);
    lock.rollback().await.unwrap();
    home.until("it to find back", |home| home.metric("evictd_publisher_stalled") == 0).await;
}
