//! Two copies of a home store on one bus (R15). Of two publishers with different histories, agents follow at most one.
//! What was deleted there stays deleted until an operator declares the other store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_core::limits::EPOCH_MAX;
use evictd_tests::home_store::{HomeStoreAddress, SqliteBackup};
use evictd_tests::http::Client;
use evictd_tests::nats_server::{Listen, NatsServer, User};
use evictd_tests::process::evictd_command;
use evictd_tests::proxy::{Proxy, WireMode};
use evictd_tests::topology::Node;
use evictd_tests::wait::{throughout, try_eventually};
use evictd_wire::subject::PUBLISHERS;
use serde_json::json;

use crate::command_line::Outcome;
use crate::world::{
    ApiClient, Key, SOON, World, breakable, count, flushes, wait_for_count, wait_for_mode,
    wait_for_readiness, wait_for_warning, with_bound,
};

/// Long enough for leases that outlive a restart, short enough to wait for.
pub(crate) const BOUND: Duration = Duration::from_secs(6);

/// One client per agent. Each verifies the same key continuously until the watch is dropped.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    key: String,
    clients: Vec<(String, JoinHandle<Vec<TimedAnswer>>)>,
}

/// When a verification began, and its code, if there was an answer.
struct TimedAnswer {
    asked_at: Instant,
    code: Option<String>,
}

impl Watch {
    pub(crate) fn start(world: &World, key: &Key) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let client = |agent: &Node| {
            let (caller, key, over) = (ApiClient::new(world, agent), key.clone(), over.clone());
            let watch = move || {
                let mut answers = Vec::new();
                // The only failure is the end of the watch.
                let _ = throughout(Duration::from_mins(10), || {
                    let asked_at = Instant::now();
                    answers.push(TimedAnswer { asked_at, code: caller.code(&key).ok() });
                    ensure!(!over.load(Ordering::Relaxed));
                    Ok(())
                });
                answers
            };
            (agent.daemon.name().to_owned(), std::thread::spawn(watch))
        };
        let clients = world.topology.agents().map(client).collect();
        Self { over, key: key.id.clone(), clients }
    }

    /// Ends the watch. Asserts that every agent answered verifications that began at `since` or later, none with VALID.
    pub(crate) fn assert_none_valid_since(mut self, since: Instant) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        for (agent, client) in self.clients.drain(..) {
            let answers = client.join().map_err(|_| anyhow!("a client panicked"))?;
            let later = || answers.iter().filter(|answer| answer.asked_at >= since);
            ensure!(later().any(|answer| answer.code.is_some()), "{agent} answered nothing");
            let valid: Vec<Duration> = later()
                .filter(|answer| answer.code.as_deref() == Some("VALID"))
                .map(|answer| answer.asked_at - since)
                .collect();
            ensure!(
                valid.is_empty(),
                "{agent} answered VALID for {} in {} of {} verifications, {:?} to {:?} after its deletion was confirmed",
                self.key,
                valid.len(),
                later().count(),
                valid.first(),
                valid.last()
            );
        }
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Deletes `key` at `publisher` and waits until each region has confirmed. Returns when that was.
pub(crate) fn delete_confirmed(world: &World, publisher: &Node, key: &Key) -> Result<Instant> {
    let body = json!({ "keyId": key.id });
    let answer = world.topology.call_with(publisher, "keys.deleteKey", &body, &[("Prefer", "wait=30")])?;
    ensure!(answer.status == 200, "the answer was {}: {}", answer.status, answer.text);
    let receipt = &answer.body["meta"]["propagation"];
    ensure!(receipt["state"] == "confirmed", "{receipt}\n{}", publisher.daemon.log_tail());
    Ok(Instant::now())
}

/// Copies the world's store as it is now, for another host.
fn snapshot(world: &mut World) -> Result<PathBuf> {
    let copy = world.dir().join("host-2.db");
    // As in a snapshot of a disk, all files are of the same moment.
    world.topology.publisher.daemon.pause()?;
    let backup = SqliteBackup::take(&world.store());
    world.topology.publisher.daemon.resume()?;
    backup?.put(&copy)?;
    Ok(copy)
}

/// Runs `evictd new-epoch` on the store at `path`, as an operator does.
pub(crate) fn declare(path: &Path) -> Result<Outcome> {
    let setting = format!("store.path={}", path.display());
    let output = evictd_command()?.args(["new-epoch", "--yes", "--set", &setting]).output()?;
    Ok(Outcome {
        exit: output.status.code(),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

pub(crate) fn declare_successfully(path: &Path) -> Result<()> {
    let declared = declare(path)?;
    ensure!(declared.exit == Some(0), "{}", declared.stderr);
    Ok(())
}

/// Starts another wire to the world's only NATS server.
pub(crate) fn wire(world: &World) -> Result<Proxy> {
    Proxy::start(world.topology.home.clients())
}

/// Starts a publisher with another store on the world's bus, and doesn't wait until it is ready.
pub(crate) fn start_rival(world: &World, store: &HomeStoreAddress, wire: Proxy) -> Result<Node> {
    let login = world.topology.home.login(&User::Publisher)?;
    world.topology.start_rival(world.dir(), "host-2", store, wire, login)
}

/// Starts host 2 with the copy at `path`.
fn start_host_2(world: &World, path: &Path) -> Result<Node> {
    start_rival(world, &HomeStoreAddress::Sqlite(path.to_owned()), wire(world)?)
}

/// Returns the texts with which a publisher that is silent because of `other` must name it.
pub(crate) fn names_of(other: &Node) -> Result<Vec<String>> {
    let status = other.status()?;
    let text = |name: &str| status[name].as_str().map(str::to_owned).with_context(|| format!("no {name}"));
    Ok(vec![
        format!(
            "another home store is active on this bus: store {}, incarnation {}, publisher ",
            text("homeStore")?,
            text("incarnation")?
        ),
        format!("({}), since ", other.http),
        "stop one of them, or give each its own NATS account".to_owned(),
    ])
}

/// Waits until the publisher `node` has this `standing`, with these words in its readiness and status.
pub(crate) fn wait_until_silent(node: &Node, standing: &str, words: &[String]) -> Result<()> {
    let what = format!("{} to be {standing}, with {words:?}", node.daemon.name());
    let mut last = String::new();
    let outcome = try_eventually(&what, SOON, || {
        // No answers until the daemon listens.
        let Ok(ready) = Client::new().get(&format!("http://{}/readyz", node.admin)) else { return Ok(None) };
        let Ok(status) = node.status() else { return Ok(None) };
        let reason = status["silentBecause"].as_str().unwrap_or_default();
        last = format!("{} {}; {}: {reason}", ready.status, ready.text, status["standing"]);
        let says = |text: &str| words.iter().all(|words| text.contains(words));
        Ok((ready.status == 503 && status["standing"] == standing && says(&ready.text) && says(reason))
            .then_some(()))
    });
    outcome.with_context(|| format!("the last report was {last}\n{}", node.daemon.log_tail()))?;
    wait_for_count(node, "evictd_publisher_standing", &[("standing", standing)], 1)?;
    let log = node.daemon.stdout()? + &node.daemon.stderr()?;
    ensure!(log.contains("publisher fell silent"), "{}", node.daemon.log_tail());
    Ok(())
}

/// Waits until `node` has logged that it yielded for a whole bound.
pub(crate) fn wait_until_yielded(node: &Node) -> Result<()> {
    try_eventually("the publisher to have yielded for a bound", SOON, || {
        let log = node.daemon.stdout()? + &node.daemon.stderr()?;
        Ok(log.contains("yielded for a bound").then_some(()))
    })
}

/// Waits until `node` names the silent publisher `rival` in its readiness and status.
pub(crate) fn wait_until_named(node: &Node, rival: &Node, standing: &str) -> Result<()> {
    let state = format!("is {standing} on this bus");
    let words: Vec<String> =
        names_of(rival)?.iter().map(|words| words.replace("is active on this bus", &state)).collect();
    try_eventually("the serving publisher to name the silent one", SOON, || {
        let (ready, status) = (wait_for_readiness(node, 200)?.to_string(), node.status()?);
        let silent = status["silentRival"].as_str().unwrap_or_default();
        Ok(words.iter().all(|words| ready.contains(words) && silent.contains(words)).then_some(()))
    })?;
    wait_for_count(node, "evictd_publisher_silent_rivals", &[], 1)
}

/// Asserts that the silent publisher `node` rejects a deletion, and says that nothing was changed.
pub(crate) fn assert_refuses_changes(world: &World, node: &Node, key: &Key) -> Result<()> {
    let answer = world.topology.call(node, "keys.deleteKey", &json!({ "keyId": key.id }))?;
    ensure!(answer.status == 503, "the answer was {}: {}", answer.status, answer.text);
    ensure!(answer.text.contains("Nothing was changed"), "{}", answer.text);
    Ok(())
}

/// What a rival must not change: each agent's epoch, and how often it flushed.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Footing(Vec<[u64; 2]>);

impl Footing {
    pub(crate) fn of(world: &World) -> Result<Self> {
        let agent = |agent: &Node| Ok([count(agent, "evictd_agent_epoch", &[])?, flushes(agent)?]);
        Ok(Self(world.topology.agents().map(agent).collect::<Result<_>>()?))
    }
}

/// Asserts for two bounds that every agent is live, with an unchanged footing, and accepts `good`.
pub(crate) fn assert_untouched(world: &World, footing: &Footing, good: &Key) -> Result<()> {
    throughout(BOUND * 2, || {
        for agent in world.topology.agents() {
            ensure!(agent.status()?["mode"] == "live", "{}", agent.daemon.log_tail());
            assert_eq!(world.code(agent, good)?, "VALID");
        }
        assert_eq!(Footing::of(world)?, *footing);
        Ok(())
    })
}

pub(crate) fn rival_messages(agent: &Node) -> Result<u64> {
    count(agent, "evictd_agent_rival_messages_total", &[])
}

/// Asserts that no process panicked or counted a broken invariant, and that no agent breached the bound.
pub(crate) fn assert_no_rule_was_broken(world: &World, rival: &Node) -> Result<()> {
    for node in world.topology.publishers().chain(world.topology.agents()).chain([rival]) {
        let log = node.daemon.stdout()? + &node.daemon.stderr()?;
        ensure!(!log.contains("panicked"), "{}", node.daemon.log_tail());
        // A process that was stopped has no metrics.
        let Ok(metrics) = node.metrics() else { continue };
        for name in ["evictd_invariant_violations_total", "evictd_agent_bound_breaches_total"] {
            let broken = metrics.value(name, &[]).unwrap_or(0.0);
            ensure!(
                broken == 0.0,
                "{name} of {} is {broken}\n{}",
                node.daemon.name(),
                node.daemon.log_tail()
            );
        }
    }
    Ok(())
}

/// Restarts the world's publisher and starts a rival. Both query the bus before either has answered.
pub(crate) fn start_together(world: &mut World, store: &HomeStoreAddress) -> Result<Node> {
    world.topology.publisher.daemon.kill()?;
    let other = wire(world)?;
    let own = world.topology.publisher.wire.as_ref().context("the wire is direct")?;
    for wire in [own, &other] {
        wire.set(WireMode::Cut);
        wire.hold_messages(PUBLISHERS);
    }
    world.topology.publisher.daemon.restart()?;
    let rival = start_rival(world, store, other)?;
    let (one, two) = (&world.topology.publisher, &rival);
    for node in [one, two] {
        try_eventually("a publisher to have done a round", SOON, || {
            // No answers until the daemon listens.
            let status = node.status().unwrap_or_default();
            Ok((!status["lastRoundMsAgo"].is_null()).then_some(()))
        })
        .with_context(|| node.daemon.log_tail())?;
    }
    let wires = || [one, two].into_iter().filter_map(|node| node.wire.as_ref());
    wires().for_each(|wire| wire.set(WireMode::Pass));
    try_eventually("both publishers to query the bus", SOON, || {
        Ok(wires().all(|wire| wire.held() > 0).then_some(()))
    })?;
    wires().for_each(Proxy::release);
    Ok(rival)
}

fn start() -> Result<(World, Key, Key)> {
    let world = World::start(&with_bound(BOUND, breakable(&["eu", "us"])))?;
    let [doomed, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&doomed, &good])?;
    world.wait_until_caught_up()?;
    Ok((world, doomed, good))
}

pub(crate) fn wait_for_epoch(world: &World, epoch: u64) -> Result<()> {
    for agent in world.topology.agents() {
        wait_for_count(agent, "evictd_agent_epoch", &[], epoch)?;
        wait_for_mode(agent, "live")?;
    }
    Ok(())
}

/// Kills host 1. An operator declares the copy, which then serves at the returned node.
fn move_to_host_2(world: &mut World) -> Result<Node> {
    let copy = snapshot(world)?;
    world.topology.publisher.daemon.kill()?;
    declare_successfully(&copy)?;
    let mut rival = start_host_2(world, &copy)?;
    rival.wait_until_ready()?;
    wait_for_epoch(world, 2)?;
    Ok(rival)
}

/// Waits until the publisher `node` serves.
pub(crate) fn wait_until_serving(node: &Node) -> Result<()> {
    wait_for_readiness(node, 200)?;
    wait_for_count(node, "evictd_publisher_standing", &[("standing", "serving")], 1)
}

/// Failure: host 1 boots again with its old file while the restored copy serves on host 2. Each takes the other's
/// positions for its own lost commits and begins epochs. What was deleted on host 2 is VALID again.
#[test]
fn old_copy_that_returns_beside_the_restored_one_stays_silent() -> Result<()> {
    let (mut world, doomed, good) = start()?;
    let mut host_2 = move_to_host_2(&mut world)?;
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, &host_2, &doomed)?;
    let footing = Footing::of(&world)?;

    world.topology.publisher.daemon.restart()?;
    let host_1 = world.publisher();
    wait_until_silent(host_1, "yielding", &names_of(&host_2)?)?;
    assert_refuses_changes(&world, host_1, &good)?;
    assert_untouched(&world, &footing, &good)?;
    wait_until_silent(host_1, "yielding", &names_of(&host_2)?)?;
    wait_until_serving(&host_2)?;

    // Host 2 is gone for good. Only an operator may decide to go on without its deletions.
    ensure!(host_2.daemon.stop(SOON)?.success());
    let older = ["this home store is an older copy: ", "run `evictd new-epoch` on this one"];
    wait_until_silent(host_1, "behind", &older.map(str::to_owned))?;
    assert_refuses_changes(&world, host_1, &good)?;
    throughout(BOUND + BOUND / 2, || {
        assert_eq!(host_1.status()?["standing"], "behind");
        assert_eq!(Footing::of(&world)?, footing);
        Ok(())
    })?;
    watch.assert_none_valid_since(confirmed_at)?;
    declare_successfully(&world.store())?;
    wait_until_serving(host_1)?;
    wait_for_epoch(&world, 3)?;
    // With the declaration, the operator has undone what was deleted on host 2.
    world.wait_for_codes(&[&doomed, &good], "VALID")?;
    world.assert_works()?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 2, "one flush for each declaration");
    }
    assert_no_rule_was_broken(&world, &host_2)
}

/// Failure: staging is started from a copy of production's store, on production's NATS, and takes over its agents.
#[test]
fn staging_on_productions_bus_yields_and_production_goes_on() -> Result<()> {
    let (mut world, doomed, good) = start()?;
    let footing = Footing::of(&world)?;
    let copy = snapshot(&mut world)?;
    let staging = start_host_2(&world, &copy)?;
    wait_until_silent(&staging, "yielding", &names_of(world.publisher())?)?;
    assert_refuses_changes(&world, &staging, &good)?;
    wait_until_named(world.publisher(), &staging, "yielding")?;
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, world.publisher(), &doomed)?;
    assert_untouched(&world, &footing, &good)?;
    watch.assert_none_valid_since(confirmed_at)?;
    wait_until_serving(world.publisher())?;
    for agent in world.topology.agents() {
        assert_eq!(rival_messages(agent)?, 0, "a yielding publisher sent messages to agents");
        let ready = wait_for_readiness(agent, 200)?;
        ensure!(!ready["warnings"].to_string().contains("\"history\""), "{ready}");
    }
    world.assert_works()?;
    assert_no_rule_was_broken(&world, &staging)
}

/// Failure: of two copies that start at once, chance decides which one agents follow.
#[test]
fn copies_that_start_together_fall_silent_until_one_is_stopped() -> Result<()> {
    let (mut world, doomed, good) = start()?;
    let copy = snapshot(&mut world)?;
    let mut host_2 = start_together(&mut world, &HomeStoreAddress::Sqlite(copy))?;
    let host_1 = world.publisher();
    wait_until_silent(host_1, "conflicting", &names_of(&host_2)?)?;
    wait_until_silent(&host_2, "conflicting", &names_of(host_1)?)?;
    for node in [host_1, &host_2] {
        assert_refuses_changes(&world, node, &good)?;
    }
    throughout(BOUND, || {
        for node in [host_1, &host_2] {
            assert_eq!(node.status()?["standing"], "conflicting");
        }
        Ok(())
    })?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "expired")?;
        assert_eq!(rival_messages(agent)?, 0);
    }

    ensure!(host_2.daemon.stop(SOON)?.success());
    wait_until_serving(host_1)?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "live")?;
        assert_eq!(flushes(agent)?, 0);
    }
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, host_1, &doomed)?;
    world.assert_works()?;
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(&world, &host_2)
}

/// Deletes `key` at the world's publisher and pauses it, before a paused agent has applied the deletion. Returns the
/// request's id. Its receipt is open.
pub(crate) fn delete_and_pause(world: &mut World, key: &Key) -> Result<String> {
    world.agent_mut(1).daemon.pause()?;
    let answer = world.topology.call(world.publisher(), "keys.deleteKey", &json!({ "keyId": key.id }))?;
    ensure!(answer.status == 200, "the answer was {}: {}", answer.status, answer.text);
    world.topology.publisher.daemon.pause()?;
    world.agent_mut(1).daemon.resume()?;
    Ok(answer.body["meta"]["requestId"].as_str().context("no request id")?.to_owned())
}

/// Asserts that the receipt is open, however much time has passed: agents follow the other store, and accept the key
/// again.
pub(crate) fn assert_receipt_is_open(world: &World, request: &str) -> Result<()> {
    let body = json!({ "requestId": request });
    let answer = world.topology.call(world.publisher(), "propagation.getReceipt", &body)?;
    let receipt = &answer.body["data"];
    ensure!(receipt["state"] == "pending" && receipt["final"] == false, "{}", answer.text);
    Ok(())
}

/// Failure: a publisher that was paused goes on as before. It vouches for records that a successor has changed, or
/// reports receipts as final although agents follow the successor.
#[test]
fn resumed_publisher_checks_for_rivals_before_it_serves() -> Result<()> {
    let (mut world, doomed, good) = start()?;
    let undone = world.create_key()?;
    let copy = snapshot(&mut world)?;
    let request = delete_and_pause(&mut world, &undone)?;
    declare_successfully(&copy)?;
    let mut host_2 = start_host_2(&world, &copy)?;
    host_2.wait_until_ready()?;
    wait_for_epoch(&world, 2)?;
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, &host_2, &doomed)?;
    let (footing, received) = (Footing::of(&world)?, rival_messages(world.agent(0))?);

    world.topology.publisher.daemon.resume()?;
    wait_until_silent(world.publisher(), "yielding", &names_of(&host_2)?)?;
    assert_refuses_changes(&world, world.publisher(), &good)?;
    assert_untouched(&world, &footing, &good)?;
    world.wait_for_codes(&[&undone], "VALID")?;
    assert_receipt_is_open(&world, &request)?;
    watch.assert_none_valid_since(confirmed_at)?;
    assert_eq!(
        rival_messages(world.agent(0))?,
        received,
        "it sent messages to agents before it queried the bus"
    );
    wait_until_serving(&host_2)?;
    assert_no_rule_was_broken(&world, &host_2)
}

/// Adds a second server to the world's bus, cuts the wire between the servers, and starts a publisher with a copy of the
/// store at the second one. No agent has followed it.
pub(crate) fn split_off(
    world: &mut World,
    copy: impl FnOnce(&mut World) -> Result<HomeStoreAddress>,
) -> Result<(NatsServer, Proxy, Node)> {
    let home = &world.topology.home;
    let link = Proxy::start(home.leaves())?;
    let login = home.login(&User::Site)?;
    let site = NatsServer::start_site(world.dir(), Listen::free()?, link.address(), login)?;
    world.topology.home.wait_for_leaves(1)?;
    link.set(WireMode::Cut);
    world.topology.home.wait_for_leaves(0)?;
    let store = copy(world)?;
    let wire = Proxy::start(site.clients())?;
    let login = site.login(&User::Publisher)?;
    let mut host_2 = world.topology.start_rival(world.dir(), "host-2", &store, wire, login)?;
    host_2.wait_until_ready()?;
    wait_until_serving(&host_2)?;
    Ok((site, link, host_2))
}

fn split() -> Result<(World, Key, Key, NatsServer, Proxy, Node)> {
    let (mut world, doomed, good) = start()?;
    let (site, link, host_2) = split_off(&mut world, |world| snapshot(world).map(HomeStoreAddress::Sqlite))?;
    Ok((world, doomed, good, site, link, host_2))
}

/// Heals the bus. Publishers meet before probes of agents pass `link`. The caller releases these.
pub(crate) fn heal(link: &Proxy) {
    link.hold_messages("evictd.v1.probe.>");
    link.set(WireMode::Pass);
}

/// Failure: two copies have served on the halves of a bus. When it heals, one of them wins by chance, and undoes the
/// other's deletions.
#[test]
fn copies_that_meet_after_a_partition_both_fall_silent() -> Result<()> {
    let (world, doomed, good, _site, link, mut host_2) = split()?;
    let host_1 = world.publisher();
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, host_1, &doomed)?;
    let footing = Footing::of(&world)?;

    heal(&link);
    wait_until_silent(host_1, "conflicting", &names_of(&host_2)?)?;
    wait_until_silent(&host_2, "conflicting", &names_of(host_1)?)?;
    link.release();
    for node in [host_1, &host_2] {
        assert_refuses_changes(&world, node, &good)?;
    }
    // Agents deny rather than follow the other store.
    for agent in world.topology.agents() {
        wait_for_mode(agent, "expired")?;
    }
    assert_eq!(Footing::of(&world)?, footing);

    ensure!(host_2.daemon.stop(SOON)?.success());
    wait_until_serving(host_1)?;
    world.topology.agents().try_for_each(|agent| wait_for_mode(agent, "live"))?;
    assert_eq!(Footing::of(&world)?, footing);
    world.wait_for_codes(&[&good], "VALID")?;
    world.assert_works()?;
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(&world, &host_2)
}

/// Failure: after a partition between two copies, the one that agents follow is stopped. The other takes them over
/// although it lacks what they have seen.
#[test]
fn unfollowed_copy_needs_a_declaration_after_a_partition() -> Result<()> {
    let (mut world, doomed, _, _site, link, host_2) = split()?;
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, world.publisher(), &doomed)?;
    let footing = Footing::of(&world)?;
    heal(&link);
    wait_until_silent(world.publisher(), "conflicting", &names_of(&host_2)?)?;
    wait_until_silent(&host_2, "conflicting", &names_of(world.publisher())?)?;
    link.release();

    ensure!(world.topology.publisher.daemon.stop(SOON)?.success());
    wait_until_silent(&host_2, "behind", &["this home store is an older copy: ".to_owned()])?;
    assert_eq!(Footing::of(&world)?, footing);
    for agent in world.topology.agents() {
        wait_for_mode(agent, "expired")?;
    }
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(&world, &host_2)
}

/// Failure: after a partition, a copy that no agent has followed silences the store that all of them follow.
#[test]
fn copy_that_no_agent_followed_is_behind_and_the_other_serves() -> Result<()> {
    let (world, doomed, good, _site, link, host_2) = split()?;
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, world.publisher(), &doomed)?;
    let footing = Footing::of(&world)?;
    link.set(WireMode::Pass);
    // Agents whose probes go unanswered send them to all publishers.
    wait_until_silent(&host_2, "behind", &["this home store is an older copy: ".to_owned()])?;
    wait_until_serving(world.publisher())?;
    world.topology.agents().try_for_each(|agent| wait_for_mode(agent, "live"))?;
    assert_untouched(&world, &footing, &good)?;
    assert_eq!(host_2.status()?["standing"], "behind");
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(&world, &host_2)
}

/// Failure: an agent applies messages of another store, or doesn't report them.
#[test]
fn agents_report_a_rival_and_keep_their_own_history() -> Result<()> {
    let (world, doomed, good, _site, link, host_2) = split()?;
    let host_1 = world.publisher();
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, host_1, &doomed)?;
    let footing = Footing::of(&world)?;
    // The rival's ticks pass, but its messages to publishers don't.
    link.hold_messages(PUBLISHERS);
    link.hold_messages("evictd.v1.publishers.>");
    link.set(WireMode::Pass);
    for agent in world.topology.agents() {
        wait_for_warning(agent, "another home store")?;
        ensure!(rival_messages(agent)? > 0);
    }
    assert_untouched(&world, &footing, &good)?;
    watch.assert_none_valid_since(confirmed_at)?;
    link.set(WireMode::Cut);
    assert_no_rule_was_broken(&world, &host_2)
}

/// Failure: the serving copy is restarted. Host 1 boots meanwhile, finds no other publisher, and serves from then on.
#[test]
fn old_copy_booted_during_the_restored_ones_restart_is_behind() -> Result<()> {
    let (mut world, doomed, good) = start()?;
    let mut host_2 = move_to_host_2(&mut world)?;
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, &host_2, &doomed)?;
    let footing = Footing::of(&world)?;

    host_2.daemon.kill()?;
    world.topology.publisher.daemon.restart()?;
    wait_until_silent(world.publisher(), "behind", &["this home store is an older copy: ".to_owned()])?;
    host_2.restart()?;
    wait_until_serving(&host_2)?;
    world.topology.agents().try_for_each(|agent| wait_for_mode(agent, "live"))?;
    // Once the killed incarnation counts as ended, agents accept answers of the next one.
    world.wait_for_codes(&[&good], "VALID")?;
    assert_refuses_changes(&world, world.publisher(), &good)?;
    assert_untouched(&world, &footing, &good)?;
    assert_eq!(world.publisher().status()?["standing"], "behind");
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(&world, &host_2)
}

/// Failure: a store is declared while another one serves. Days later, that one is restarted, and its deletions are
/// undone.
#[test]
fn declaration_ends_when_its_publisher_yields() -> Result<()> {
    let (mut world, doomed, good) = start()?;
    let path = snapshot(&mut world)?;
    let watch = Watch::start(&world, &doomed);
    let confirmed_at = delete_confirmed(&world, world.publisher(), &doomed)?;
    declare_successfully(&path)?;
    let host_2 = start_host_2(&world, &path)?;
    wait_until_silent(&host_2, "yielding", &names_of(world.publisher())?)?;
    wait_until_yielded(&host_2)?;
    let footing = Footing::of(&world)?;

    ensure!(world.topology.publisher.daemon.stop(SOON)?.success());
    wait_until_silent(&host_2, "behind", &["this home store is an older copy: ".to_owned()])?;
    world.topology.publisher.restart()?;
    wait_until_serving(world.publisher())?;
    // Their leases of the incarnation that has ended run out meanwhile.
    let incarnation = world.publisher().status()?["incarnation"].clone();
    for agent in world.topology.agents() {
        try_eventually("the agent to follow the publisher again", SOON, || {
            let status = agent.status()?;
            Ok((status["incarnation"] == incarnation && status["mode"] == "live").then_some(()))
        })?;
    }
    assert_untouched(&world, &footing, &good)?;
    watch.assert_none_valid_since(confirmed_at)?;

    // Declared again, it is followed.
    ensure!(world.topology.publisher.daemon.stop(SOON)?.success());
    declare_successfully(&path)?;
    wait_until_serving(&host_2)?;
    world.wait_for_codes(&[&doomed, &good], "VALID")?;
    assert_no_rule_was_broken(&world, &host_2)
}

/// Failure: a store that has used up its epochs goes on in the last one, and agents keep entries that a new epoch would
/// have flushed.
#[test]
fn used_up_epochs_fail_closed_with_the_way_out() -> Result<()> {
    const USED_UP: &str = "the home store has used up its 1048575 epochs, so that none can begin";
    let (mut world, doomed, good) = start()?;
    ensure!(world.topology.publisher.daemon.stop(SOON)?.success());
    world.sql(&format!("UPDATE log_head SET epoch = {EPOCH_MAX}"))?;
    world.topology.publisher.restart()?;
    wait_for_epoch(&world, u64::from(EPOCH_MAX))?;
    let refused = declare(&world.store())?;
    refused.assert_failed(USED_UP);
    refused.assert_failed("copy workspaces, root_keys, apis and keys into a new store");
    // Deletions that need no new epoch still work.
    world.wait_for_codes(&[&good], "VALID")?;
    world.assert_works()?;

    // A deletion that bypassed the triggers needs a new epoch.
    let trigger = world.sql("SELECT sql FROM sqlite_master WHERE name = 'keys_after_delete'")?;
    for statement in
        ["DROP TRIGGER keys_after_delete", &format!("DELETE FROM keys WHERE id = '{}'", doomed.id), &trigger]
    {
        world.sql(statement)?;
    }
    world.assert_gone_within(&doomed, Instant::now(), BOUND)?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "expired")?;
    }
    wait_for_readiness(world.publisher(), 503)?;
    let log = world.publisher().daemon.stdout()? + &world.publisher().daemon.stderr()?;
    ensure!(log.contains(USED_UP), "{}", world.publisher().daemon.log_tail());
    Ok(())
}
