//! Malformed and forged messages on the bus: from an attacker with an agent's login, and from one with the publisher's.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use evictd_core::history::{Incarnation, LogToken, Milestone, Provenance, StoreId, Voucher};
use evictd_core::ids::{InstanceId, KeyHash};
use evictd_core::limits::{EPOCH_MAX, PAYLOAD_BYTES_MAX, POSITION_MAX};
use evictd_core::position::LogPosition;
use evictd_core::roster::PartitionPolicy;
use evictd_tests::bus::NatsConnection;
use evictd_tests::nats_server::User;
use evictd_tests::topology::Node;
use evictd_tests::wait::{throughout, try_eventually};
use evictd_wire::applied::Applied;
use evictd_wire::live::{Live, LiveEvent};
use evictd_wire::lookup::{LookupAnswer, LookupOutcome, LookupRequest};
use evictd_wire::probe::ProbeRequest;
use evictd_wire::replay::ReplayRequest;
use evictd_wire::subject::{LIVE, MessageKind};

use crate::world::{A_WHILE, SOON, World, count, flushes, plan, wait_for_count};

const REFUSED: &str = "evictd_publisher_refused_messages_total";
const IGNORED: &str = "evictd_agent_ignored_messages_total";

/// Logs in as the first agent of `region`, beside the real one, and subscribes to what it may.
fn impostor(world: &World, region: &str) -> Result<NatsConnection> {
    let home = &world.topology.home;
    let mut bus = NatsConnection::connect(home.clients(), home.login(&User::agent(region, "agent-1"))?)?;
    bus.subscribe(LIVE, None)?;
    bus.subscribe(&format!("{}.rogue.>", inbox(region)), None)?;
    bus.subscribe(&format!("{}.stolen.>", inbox(region)), None)?;
    settle(&mut bus)?;
    Ok(bus)
}

fn inbox(region: &str) -> String {
    format!("_INBOX_evictd.{region}.agent-1")
}

/// Waits until the server has processed all that was sent. An error that it reported fails the test.
fn settle(bus: &mut NatsConnection) -> Result<()> {
    let errors = bus.sync()?;
    ensure!(errors.is_empty(), "{errors:?}");
    Ok(())
}

fn probe(seen: Option<Voucher>) -> Bytes {
    let (nonce, instance) = (77, InstanceId(77));
    let bound = Duration::from_secs(30);
    ProbeRequest { nonce, instance, policy: PartitionPolicy::Deny, bound, seen }.encode()
}

/// Returns a message that a real agent could send.
fn good(kind: MessageKind) -> Result<Bytes> {
    Ok(match kind {
        MessageKind::Probe => probe(None),
        MessageKind::Replay => ReplayRequest { nonce: 77, epoch: 1, from: 1, to: 1 }.encode(),
        MessageKind::Lookup => {
            LookupRequest { nonce: 77, hash: KeyHash([7; 32]), instance: InstanceId(77) }.encode()
        }
        MessageKind::Applied => {
            let applied = LogPosition::new(1, 1).context("a position")?;
            let provenance = Provenance { store: StoreId(77), incarnation: Incarnation(77) };
            let instance = InstanceId(77);
            Applied { instance, provenance, applied, apply_reports: Vec::new(), leaving: false }.encode()
        }
    })
}

/// Returns payloads that decode as no kind of message.
fn malformed(good: &Bytes) -> Vec<Vec<u8>> {
    let random: Vec<u8> = (0..200_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    vec![
        Vec::new(),
        vec![0],
        vec![0xff; 64],
        random,
        b"{\"nonce\": 77}".to_vec(),
        good[..good.len() - 1].to_vec(),
        [&good[..], &[0x0a]].concat(),
        // A group that never ends, and a field whose length exceeds all memory.
        vec![0x0b; 300],
        vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
        vec![0x08; PAYLOAD_BYTES_MAX + 1],
    ]
}

fn refused(world: &World, kind: MessageKind, reason: &str) -> Result<u64> {
    count(world.publisher(), REFUSED, &[("subject", kind.token()), ("reason", reason)])
}

fn wait_for_refusals(world: &World, kind: MessageKind, reason: &str, wanted: u64) -> Result<()> {
    wait_for_count(world.publisher(), REFUSED, &[("subject", kind.token()), ("reason", reason)], wanted)
}

/// Failure: an undecodable payload ends a task of the publisher, or is decoded as a message.
#[test]
fn undecodable_requests_are_counted_and_not_answered() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let mut rogue = impostor(&world, "eu")?;
    for kind in MessageKind::ALL {
        let subject = format!("evictd.v1.{}.eu.agent-1", kind.token());
        let reply = format!("{}.rogue.{}", inbox("eu"), kind.token());
        let reply = Some(reply.as_str()).filter(|_| kind != MessageKind::Applied);
        let payloads = malformed(&good(kind)?);
        for payload in &payloads {
            rogue.publish(&subject, reply, payload)?;
        }
        settle(&mut rogue)?;
        wait_for_refusals(&world, kind, "malformed", payloads.len() as u64)?;

        // The same subject and inbox with a valid message: nothing else caused the refusals.
        rogue.publish(&subject, reply, &good(kind)?)?;
        settle(&mut rogue)?;
        if kind != MessageKind::Applied {
            let answer = next_answer(&mut rogue)?;
            assert_eq!(Some(answer.as_str()), reply, "the first answer is not to the first valid request");
        }
        assert_eq!(refused(&world, kind, "malformed")?, payloads.len() as u64);
    }

    // Larger than the NATS server's limit: it closes this connection, and no other.
    let sent = rogue.publish("evictd.v1.lookup.eu.agent-1", None, &vec![0; 2 << 20]);
    ensure!(sent.and_then(|()| rogue.sync()).is_err(), "2 MiB were accepted");
    world.assert_works()
}

/// Returns the subject of the next message that isn't the live feed's.
fn next_answer(bus: &mut NatsConnection) -> Result<String> {
    loop {
        let message = bus.next(SOON)?.context("no answer came")?;
        if message.subject != LIVE {
            return Ok(message.subject);
        }
    }
}

/// Failure: a requester makes the publisher write to a subject that only the publisher may write to. NATS checks no
/// permission on reply subjects.
#[test]
fn replies_go_only_to_the_requesters_own_inbox() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    world.wait_until_caught_up()?;
    let (mut rogue, mut victim) = (impostor(&world, "eu")?, impostor(&world, "us")?);
    let stolen = format!("{}.stolen.x", inbox("us"));
    let elsewhere = [
        Some(stolen.as_str()),
        Some(LIVE),
        Some("evictd.v1.applied.us.agent-1"),
        Some("_INBOX_evictd.eu.agent-1"),
        Some("_INBOX_evictd.eu.agent-11.rogue.x"),
        Some("_INBOX.rogue"),
        Some("$SYS.REQ.SERVER.PING"),
        None,
    ];
    let requests = [MessageKind::Probe, MessageKind::Replay, MessageKind::Lookup];
    for kind in requests {
        for reply in elsewhere {
            rogue.publish(&format!("evictd.v1.{}.eu.agent-1", kind.token()), reply, &good(kind)?)?;
        }
        settle(&mut rogue)?;
        wait_for_refusals(&world, kind, "reply", elsewhere.len() as u64)?;
    }
    for reply in elsewhere {
        rogue.publish("evictd.v1.probe.eu.agent-1.any", reply, &good(MessageKind::Probe)?)?;
    }
    wait_for_refusals(&world, MessageKind::Probe, "reply", 2 * elsewhere.len() as u64)?;

    // The same requests with its own inbox are answered. By then, the earlier ones would have been answered too.
    for kind in requests {
        let reply = format!("{}.rogue.{}", inbox("eu"), kind.token());
        rogue.publish(&format!("evictd.v1.{}.eu.agent-1", kind.token()), Some(&reply), &good(kind)?)?;
        assert_eq!(next_answer(&mut rogue)?, reply);
    }
    // The victim receives the ticks of some seconds, and nothing else.
    for _ in 0..3 {
        let message = victim.next(SOON)?.context("the victim receives nothing at all")?;
        assert_eq!(message.subject, LIVE, "something was written into another's inbox");
        Live::decode(&message.payload).context("something else was written to the live feed")?;
    }
    for agent in world.topology.agents() {
        assert_eq!((count(agent, IGNORED, &[])?, flushes(agent)?), (0, 0));
    }
    assert_eq!(count(world.publisher(), "evictd_publisher_nats_errors_total", &[])?, 0);
    world.assert_works()
}

/// Returns the history that an agent follows.
fn followed(agent: &Node) -> Result<Provenance> {
    let status = agent.status()?;
    let id = |name: &str| -> Result<u64> {
        Ok(u64::from_str_radix(status[name].as_str().with_context(|| format!("no {name}"))?, 16)?)
    };
    Ok(Provenance { store: StoreId(id("homeStore")?), incarnation: Incarnation(id("incarnation")?) })
}

/// Returns a voucher that no store issued.
fn forged(provenance: Provenance, at: LogPosition) -> Voucher {
    Voucher { milestone: Milestone { provenance, at, token: LogToken(7) }, mac: [7; 16] }
}

/// Failure: an agent that forges what it has seen begins epochs. Every region flushes repeatedly, and the epochs are
/// used up.
#[test]
fn forged_claims_begin_no_epoch_and_flush_no_agent() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let provenance = followed(world.agent(0))?;
    let misses = |agent: &Node| count(agent, "evictd_agent_cache_misses_total", &[]);
    let before = [misses(world.agent(0))?, misses(world.agent(1))?];
    let mut rogue = impostor(&world, "eu")?;
    let at = |epoch, position| LogPosition::new(epoch, position).context("a position");
    let claims = [at(1, POSITION_MAX)?, at(2, 0)?, at(17, 3)?, at(EPOCH_MAX, POSITION_MAX)?];
    for (sent, claim) in (1..).zip(claims.into_iter().cycle().take(20)) {
        let reply = format!("{}.rogue.probe", inbox("eu"));
        rogue.publish("evictd.v1.probe.eu.agent-1", Some(&reply), &probe(Some(forged(provenance, claim))))?;
        settle(&mut rogue)?;
        wait_for_refusals(&world, MessageKind::Probe, "unproved", sent)?;
    }
    let last = at(EPOCH_MAX, POSITION_MAX)?;
    let instance = InstanceId(77);
    let applied = Applied { instance, provenance, applied: last, apply_reports: Vec::new(), leaving: false };
    rogue.publish("evictd.v1.applied.eu.agent-1", None, &applied.encode())?;
    settle(&mut rogue)?;

    assert_eq!(count(world.publisher(), "evictd_publisher_epoch", &[])?, 1);
    throughout(A_WHILE, || {
        for agent in world.topology.agents() {
            assert_eq!(world.code(agent, &key)?, "VALID");
        }
        Ok(())
    })?;
    assert_eq!(
        [misses(world.agent(0))?, misses(world.agent(1))?],
        before,
        "an agent had to load something again"
    );
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    world.assert_works()
}

/// Failure: one forged tick with the highest epoch, sent with the publisher's login, makes every agent deny until it
/// is restarted.
#[test]
fn agents_recover_from_forged_ticks() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let provenance = followed(world.agent(0))?;
    let home = &world.topology.home;
    let mut thief = NatsConnection::connect(home.clients(), home.login(&User::Publisher)?)?;
    let foreign = Provenance { incarnation: Incarnation(77), ..provenance };
    for (provenance, epoch) in [(provenance, EPOCH_MAX), (provenance, 1), (foreign, EPOCH_MAX)] {
        let at = LogPosition::new(epoch, POSITION_MAX).context("the last position")?;
        let tick = Live { voucher: forged(provenance, at), event: LiveEvent::Tick(None) };
        thief.publish(LIVE, None, &tick.encode())?;
    }
    settle(&mut thief)?;
    let received = |agent: &Node| count(agent, "evictd_agent_rival_messages_total", &[]);
    for agent in world.topology.agents() {
        try_eventually(
            "the forged ticks to be received",
            SOON,
            || Ok((received(agent)? >= 2).then_some(())),
        )?;
    }
    throughout(A_WHILE, || {
        for agent in world.topology.agents() {
            assert_eq!(world.code(agent, &key)?, "VALID");
        }
        Ok(())
    })?;
    world.delete(&key)?;
    world.wait_for_codes(&[&key], "NOT_FOUND")?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    world.assert_works()
}

/// Failure: an undecodable payload ends the agent's task that follows the log, or the agent uses an answer that it
/// didn't request.
#[test]
fn agents_ignore_undecodable_and_unrequested_messages() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let agent = world.agent(0);
    let instance = agent.status()?["instance"].as_str().context("no instance")?.to_owned();
    let home = &world.topology.home;
    let mut thief = NatsConnection::connect(home.clients(), home.login(&User::Publisher)?)?;

    let voucher = forged(followed(agent)?, LogPosition::new(1, 1).context("a position")?);
    let payloads = malformed(&Live { voucher, event: LiveEvent::Tick(None) }.encode());
    for payload in &payloads {
        thief.publish(LIVE, None, payload)?;
    }
    settle(&mut thief)?;
    let ignored = |subject, reason| [("subject", subject), ("reason", reason)];
    wait_for_count(agent, IGNORED, &ignored("live", "malformed"), payloads.len() as u64)?;

    let outcome = LookupOutcome::Busy;
    let unrequested = LookupAnswer { nonce: u64::MAX, hash: KeyHash([7; 32]), outcome }.encode();
    for (kind, answers) in
        [(MessageKind::Probe, "probe"), (MessageKind::Replay, "replay"), (MessageKind::Lookup, "lookup.7")]
    {
        let subject = format!("{}.{instance}.{answers}", inbox("eu"));
        let payloads = malformed(&unrequested);
        for payload in &payloads {
            thief.publish(&subject, None, payload)?;
        }
        settle(&mut thief)?;
        wait_for_count(agent, IGNORED, &ignored(kind.token(), "malformed"), payloads.len() as u64)?;
    }
    thief.publish(&format!("{}.{instance}.lookup.7", inbox("eu")), None, &unrequested)?;
    settle(&mut thief)?;
    wait_for_count(agent, IGNORED, &ignored("lookup", "unasked"), 1)?;

    assert_eq!((agent.status()?["mode"].as_str(), flushes(agent)?), (Some("live"), 0));
    world.wait_for_codes(&[&key], "VALID")?;
    world.assert_works()
}
