//! The permissions of `deploy/nats` (R13), tested on real servers. For each refused action, the same action
//! succeeds for a user with the permission.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::bus::{Message, NatsConnection};
use crate::nats_server::{Listen, Login, NatsServer, User};

const DEADLINE: Duration = Duration::from_secs(20);

/// The kinds of requests that agents send to publishers.
const REQUESTS: [&str; 4] = ["probe", "replay", "lookup", "applied"];

/// Home and the servers of `eu` and `us`, with one publisher that subscribes to all requests.
struct LeafTopology {
    home: NatsServer,
    eu: NatsServer,
    us: NatsServer,
    publisher: NatsConnection,
    _dir: TempDir,
}

impl LeafTopology {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut home = NatsServer::start_home(dir.path(), Listen::free()?, &["eu", "us"])?;
        let region = |name| {
            let login = home.login(&User::leaf(name))?;
            NatsServer::start_region(dir.path(), Listen::free()?, name, &["a1", "a2"], home.leaves(), login)
        };
        let (mut eu, mut us) = (region("eu")?, region("us")?);
        eu.wait_for_leaves(1)?;
        us.wait_for_leaves(1)?;
        home.wait_for_leaves(2)?;
        let mut publisher = NatsConnection::connect(home.clients(), home.login(&User::Publisher)?)?;
        for kind in REQUESTS {
            publisher.subscribe(&format!("evictd.v1.{kind}.>"), Some("authority"))?;
        }
        assert_eq!(publisher.sync()?, NOTHING);
        let mut world = Self { home, eu, us, publisher, _dir: dir };
        LeafTopology::agent(&world.eu, "eu", "a1")
            .and_then(|agent| world.wait_until_received(agent, "eu"))?;
        LeafTopology::agent(&world.us, "us", "a1")
            .and_then(|agent| world.wait_until_received(agent, "us"))?;
        Ok(world)
    }

    /// Waits until the region's server forwards requests, and until none of them is in flight. It learns of
    /// subscriptions at home with a delay, and drops requests until then.
    fn wait_until_received(&mut self, mut agent: NatsConnection, region: &str) -> Result<()> {
        let subject = format!("evictd.v1.applied.{region}.a1");
        crate::wait::try_eventually("the publisher to receive", DEADLINE, || {
            agent.publish(&subject, None, b"hello?")?;
            agent.sync()?;
            self.publisher.next(Duration::from_millis(20))
        })?;
        agent.publish(&subject, None, b"over")?;
        while next(&mut self.publisher)?.payload != b"over" {}
        Ok(())
    }

    fn agent(server: &NatsServer, region: &str, agent: &str) -> Result<NatsConnection> {
        NatsConnection::connect(server.clients(), server.login(&User::agent(region, agent))?)
    }

    fn eu_leaf(&self) -> Result<NatsConnection> {
        NatsConnection::connect_leaf(self.home.leaves(), self.home.login(&User::leaf("eu"))?)
    }
}

/// A leaf connection names the chosen queue group in place of the reply subject.
const QUEUE: Option<&str> = Some("| authority");

const NOTHING: [&str; 0] = [];

type Connect = fn(SocketAddr, &Login) -> Result<NatsConnection>;

fn refused(errors: &[String], subject: &str) -> bool {
    matches!(errors, [only] if only.contains("Permissions Violation") && only.contains(&format!("\"{subject}\"")))
}

/// Publishing and subscribing cause no errors.
fn assert_allowed(bus: &mut NatsConnection, publish: &[&str], subscribe: &[&str]) -> Result<()> {
    for subject in publish {
        bus.publish(subject, None, b"x")?;
        assert_eq!(bus.sync()?, NOTHING, "publishing {subject}");
    }
    for subject in subscribe {
        bus.subscribe(subject, None)?;
        assert_eq!(bus.sync()?, NOTHING, "subscribing to {subject}");
    }
    Ok(())
}

fn assert_refused(bus: &mut NatsConnection, publish: &[&str], subscribe: &[&str]) -> Result<()> {
    for subject in publish {
        bus.publish(subject, None, b"x")?;
        assert!(refused(&bus.sync()?, subject), "publishing {subject} was not refused");
    }
    for subject in subscribe {
        bus.subscribe(subject, None)?;
        assert!(refused(&bus.sync()?, subject), "subscribing to {subject} was not refused");
    }
    Ok(())
}

fn next(bus: &mut NatsConnection) -> Result<Message> {
    bus.next(DEADLINE)?.context("an expected message never arrived")
}

#[test]
fn requests_and_answers_cross_the_leaf_connection() -> Result<()> {
    let mut world = LeafTopology::start()?;
    let mut agent = LeafTopology::agent(&world.eu, "eu", "a1")?;
    agent.subscribe("_INBOX_evictd.eu.a1.>", None)?;
    agent.subscribe("evictd.v1.live", None)?;
    assert_eq!(agent.sync()?, NOTHING);
    for kind in REQUESTS {
        let inbox = format!("_INBOX_evictd.eu.a1.{kind}");
        agent.publish(&format!("evictd.v1.{kind}.eu.a1"), Some(&inbox), b"request")?;
        let request = next(&mut world.publisher)?;
        assert_eq!(request.subject, format!("evictd.v1.{kind}.eu.a1"));
        assert_eq!(request.reply.as_deref(), Some(inbox.as_str()));
        world.publisher.publish(&inbox, None, b"answer")?;
        assert_eq!((next(&mut agent)?.subject, agent.sync()?), (inbox, vec![]));
    }
    world.publisher.publish("evictd.v1.live", None, b"news")?;
    assert_eq!(next(&mut agent)?.payload, b"news");
    Ok(())
}

#[test]
fn retries_reach_publishers_outside_the_queue_group() -> Result<()> {
    let mut world = LeafTopology::start()?;
    let mut other = NatsConnection::connect(world.home.clients(), world.home.login(&User::Publisher)?)?;
    other.subscribe("evictd.v1.probe.*.*.any", None)?;
    assert_eq!(other.sync()?, NOTHING);
    // The region's server learns of the subscription with a delay.
    let mut agent = LeafTopology::agent(&world.eu, "eu", "a1")?;
    let received = crate::wait::try_eventually("the retry", DEADLINE, || {
        agent.publish("evictd.v1.probe.eu.a1.any", None, b"retry")?;
        agent.sync()?;
        other.next(Duration::from_millis(50))
    })?;
    assert_eq!(received.subject, "evictd.v1.probe.eu.a1.any");
    assert_eq!(next(&mut world.publisher)?.subject, "evictd.v1.probe.eu.a1.any");
    Ok(())
}

#[test]
fn an_agent_sends_requests_only_in_its_own_name() -> Result<()> {
    let world = LeafTopology::start()?;
    let mut agent = LeafTopology::agent(&world.eu, "eu", "a1")?;
    for kind in REQUESTS {
        let [own, neighbor, abroad, deeper] =
            ["eu.a1", "eu.a2", "us.a1", "eu.a1.more"].map(|name| format!("evictd.v1.{kind}.{name}"));
        assert_allowed(&mut agent, &[&own], &[])?;
        assert_refused(&mut agent, &[&neighbor, &abroad, &deeper], &[])?;
    }
    for kind in ["probe", "replay", "lookup"] {
        let [own, neighbor] = ["eu.a1.any", "eu.a2.any"].map(|name| format!("evictd.v1.{kind}.{name}"));
        assert_allowed(&mut agent, &[&own], &[])?;
        assert_refused(&mut agent, &[&neighbor], &[])?;
    }
    assert_refused(&mut agent, &["evictd.v1.applied.eu.a1.any"], &[])
}

#[test]
fn an_agent_receives_only_the_live_feed_and_its_inbox() -> Result<()> {
    let world = LeafTopology::start()?;
    let mut agent = LeafTopology::agent(&world.eu, "eu", "a1")?;
    assert_allowed(&mut agent, &[], &["evictd.v1.live", "_INBOX_evictd.eu.a1.>", "_INBOX_evictd.eu.a1.x"])?;
    let forbidden = [
        "_INBOX_evictd.eu.a2.>",
        "_INBOX_evictd.us.a1.>",
        "_INBOX_evictd.eu.>",
        "_INBOX_evictd.>",
        "_INBOX.>",
        "evictd.v1.probe.eu.a1",
        "evictd.v1.lookup.>",
        "evictd.v1.publishers",
        "evictd.v1.publishers.>",
        "evictd.v1.>",
        "$SYS.>",
        ">",
    ];
    assert_refused(&mut agent, &[], &forbidden)
}

#[test]
fn only_publishers_publish_on_the_live_feed() -> Result<()> {
    let mut world = LeafTopology::start()?;
    let among_publishers = ["evictd.v1.publishers", "evictd.v1.publishers.00c0ffee.01"];
    assert_allowed(&mut world.publisher, &among_publishers, &among_publishers)?;
    assert_allowed(&mut world.publisher, &["evictd.v1.live"], &["evictd.v1.live"])?;
    let mut agent = LeafTopology::agent(&world.us, "us", "a2")?;
    assert_refused(&mut agent, &["evictd.v1.live"], &[])?;
    assert_refused(&mut agent, &among_publishers, &[])?;
    let mut leaf = world.eu_leaf()?;
    assert_leaf_is_closed(&mut leaf, "evictd.v1.live")
}

#[test]
fn a_publisher_replies_only_to_agents_inboxes() -> Result<()> {
    let mut world = LeafTopology::start()?;
    let publisher = &mut world.publisher;
    assert_allowed(publisher, &["_INBOX_evictd.eu.a1.x", "_INBOX_evictd.us.a2.y.z"], &[])?;
    // A requester could name each of these as its reply subject.
    let elsewhere =
        ["evictd.v1.probe.eu.a1", "evictd.v1.applied.us.a1", "_INBOX.x", "$SYS.REQ.SERVER.PING", "orders"];
    assert_refused(publisher, &elsewhere, &["_INBOX_evictd.>", "_INBOX.>", ">"])
}

#[test]
fn a_regions_server_sends_requests_only_of_its_agents() -> Result<()> {
    let mut world = LeafTopology::start()?;
    for kind in REQUESTS {
        let mut leaf = world.eu_leaf()?;
        leaf.send_message("LMSG", &format!("evictd.v1.{kind}.eu.a7"), QUEUE, b"x")?;
        assert_eq!(
            (leaf.sync()?, next(&mut world.publisher)?.subject),
            (vec![], format!("evictd.v1.{kind}.eu.a7"))
        );
        assert_leaf_is_closed(&mut leaf, &format!("evictd.v1.{kind}.us.a1"))?;
    }
    for subject in ["_INBOX_evictd.us.a1.x", "_INBOX_evictd.eu.a1.x", "$SYS.REQ.USER.INFO", "orders"] {
        assert_leaf_is_closed(&mut world.eu_leaf()?, subject)?;
    }
    // None of them arrived: the publisher's next message is the one that was sent after them.
    let mut leaf = world.eu_leaf()?;
    leaf.send_message("LMSG", "evictd.v1.probe.eu.last", QUEUE, b"x")?;
    assert_eq!(leaf.sync()?, NOTHING);
    assert_eq!(next(&mut world.publisher)?.subject, "evictd.v1.probe.eu.last");
    Ok(())
}

#[test]
fn a_regions_server_receives_only_for_its_agents() -> Result<()> {
    let mut world = LeafTopology::start()?;
    for pattern in [
        ">",
        "evictd.v1.live",
        "evictd.v1.>",
        "_INBOX_evictd.>",
        "_INBOX_evictd.us.>",
        "_INBOX_evictd.*.a1.>",
        "_INBOX_evictd.eu.>",
        "evictd.v1.probe.us.>",
    ] {
        // The last two are allowed. Their messages also show when all messages have arrived.
        let mut leaf = world.eu_leaf()?;
        for subject in [pattern, "evictd.v1.live", "_INBOX_evictd.eu.a1.>"] {
            leaf.send_line(&format!("LS+ {subject}"))?;
        }
        assert_eq!(leaf.sync()?, NOTHING);
        let mut us = LeafTopology::agent(&world.us, "us", "a1")?;
        us.publish("evictd.v1.probe.us.a1", None, b"x")?;
        assert_eq!(next(&mut world.publisher)?.subject, "evictd.v1.probe.us.a1");
        for subject in ["_INBOX_evictd.us.a1.x", "evictd.v1.live", "_INBOX_evictd.eu.a1.x"] {
            world.publisher.publish(subject, None, b"x")?;
        }
        world.publisher.sync()?;
        let received = [next(&mut leaf)?.subject, next(&mut leaf)?.subject];
        assert_eq!(received, ["evictd.v1.live", "_INBOX_evictd.eu.a1.x"], "after LS+ {pattern}");
        assert_eq!((leaf.sync()?, leaf.next(Duration::ZERO)?), (vec![], None), "after LS+ {pattern}");
    }
    // A forbidden subject without wildcards ends the connection.
    for subject in ["_INBOX_evictd.us.a1.x", "evictd.v1.probe.us.a1", "evictd.v1.lookup.eu.a1"] {
        let mut leaf = world.eu_leaf()?;
        leaf.send_line(&format!("LS+ {subject}"))?;
        let error = leaf.sync().err().with_context(|| format!("LS+ {subject} was not refused"))?.to_string();
        let expected = format!("Permissions Violation for Subscription to \"{subject}\"");
        assert!(error.contains(&expected), "{error}");
    }
    Ok(())
}

#[test]
fn a_refused_agent_does_not_disconnect_its_region() -> Result<()> {
    // Home closes the connection of a leaf that breaks its permissions (see above). So a region's server must not
    // forward such messages: otherwise one bad agent could cut off its whole region.
    let mut world = LeafTopology::start()?;
    let mut bad = LeafTopology::agent(&world.eu, "eu", "a2")?;
    assert_refused(&mut bad, &["evictd.v1.live", "evictd.v1.probe.us.a1"], &["_INBOX_evictd.us.>", ">"])?;
    // NATS doesn't check reply subjects; the publisher must.
    bad.publish("evictd.v1.probe.eu.a2", Some("_INBOX_evictd.us.a1.x"), b"x")?;
    assert_eq!(next(&mut world.publisher)?.reply.as_deref(), Some("_INBOX_evictd.us.a1.x"));
    let mut good = LeafTopology::agent(&world.eu, "eu", "a1")?;
    good.publish("evictd.v1.probe.eu.a1", None, b"x")?;
    assert_eq!(next(&mut world.publisher)?.subject, "evictd.v1.probe.eu.a1");
    world.eu.wait_for_leaves(1)?;
    assert!(!world.eu.log_tail().contains("Leafnode connection closed"), "{}", world.eu.log_tail());
    Ok(())
}

#[test]
fn each_kind_of_login_works_only_where_it_belongs() -> Result<()> {
    let world = LeafTopology::start()?;
    let (clients, leaves) = (world.home.clients(), world.home.leaves());
    let publisher = world.home.login(&User::Publisher)?.clone();
    let leaf = world.home.login(&User::leaf("eu"))?.clone();
    let agent = world.eu.login(&User::agent("eu", "a1"))?.clone();
    let none = Login { user: String::new(), password: String::new() };
    let wrong = Login { user: publisher.user.clone(), password: leaf.password.clone() };

    let attempts: [(&str, Connect, SocketAddr, &Login, bool); 9] = [
        ("a publisher at home", NatsConnection::connect, clients, &publisher, true),
        ("a region's server at home", NatsConnection::connect_leaf, leaves, &leaf, true),
        ("an agent at its region's server", NatsConnection::connect, world.eu.clients(), &agent, true),
        ("a client without a login", NatsConnection::connect, clients, &none, false),
        ("a leaf without a login", NatsConnection::connect_leaf, leaves, &none, false),
        ("a wrong password", NatsConnection::connect, clients, &wrong, false),
        ("a publisher as a leaf", NatsConnection::connect_leaf, leaves, &publisher, false),
        ("a region's server as a client", NatsConnection::connect, clients, &leaf, false),
        ("an agent in another region", NatsConnection::connect, world.us.clients(), &agent, false),
    ];
    for (user, connect, server, login, is_allowed) in attempts {
        match connect(server, login) {
            Ok(_) => assert!(is_allowed, "{user} could connect"),
            Err(failure) => {
                let text = format!("{failure:#}");
                assert!(!is_allowed && text.contains("Authorization Violation"), "{user}: {text}");
            }
        }
    }
    Ok(())
}

/// The server refuses `subject` by ending the leaf connection.
fn assert_leaf_is_closed(leaf: &mut NatsConnection, subject: &str) -> Result<()> {
    leaf.send_message("LMSG", subject, QUEUE, b"x")?;
    let error = leaf.sync().err().with_context(|| format!("{subject} was not refused"))?;
    let expected = format!("Permissions Violation for Publish to \"{subject}\"");
    assert!(error.to_string().contains(&expected), "{error}");
    Ok(())
}
