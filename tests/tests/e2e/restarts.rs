//! Daemons and NATS servers are killed, stopped and restarted around deletions. Keys are deleted before, while the
//! process is down, and right after.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use evictd_tests::bus::NatsConnection;
use evictd_tests::nats_server::User;
use evictd_tests::process::Daemon;
use evictd_tests::topology::{Node, Plan, Servers};
use evictd_tests::wait::{eventually, throughout, try_eventually};
use serde_json::{Value, json};

use crate::world::{
    ApiClient, Key, SOON, World, assert_bounded, connects, count, flushes, plan, wait_for_count,
    wait_for_mode, wait_for_readiness, wait_for_warning, wait_until_applied, wait_until_settled, with_bound,
};

/// How a process ends.
#[derive(Clone, Copy, Debug)]
enum ProcessEnd {
    /// SIGKILL.
    Killed,
    /// SIGTERM.
    Stopped,
}

impl ProcessEnd {
    const ALL: [Self; 2] = [Self::Killed, Self::Stopped];

    fn apply_to(self, daemon: &mut Daemon) -> Result<()> {
        match self {
            Self::Killed => daemon.kill().map(drop),
            Self::Stopped => {
                let status = daemon.stop(SOON)?;
                ensure!(status.success(), "{} ended with {status}\n{}", daemon.name(), daemon.log_tail());
                Ok(())
            }
        }
    }
}

/// Failure: a restarted agent uses a cache, or a position, from before its restart.
#[test]
fn restarted_agent_serves_nothing_deleted() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    for end in ProcessEnd::ALL {
        let [before, meanwhile, after, good] =
            [world.create_key()?, world.create_key()?, world.create_key()?, world.create_key()?];
        world.cache_everywhere(&[&before, &meanwhile, &after, &good])?;

        world.delete(&before)?;
        end.apply_to(&mut world.agent_mut(0).daemon)?;
        world.delete(&meanwhile)?;
        world.wait_for_code(world.agent(1), &meanwhile, "NOT_FOUND")?;
        world.agent_mut(0).restart()?;
        world.delete(&after)?;

        let code = world.code(world.agent(0), &meanwhile)?;
        assert_eq!(code, "NOT_FOUND", "deleted while it was down ({end:?})");
        world.assert_gone(&[&before, &meanwhile, &after])?;
        world.wait_for_codes(&[&good], "VALID")?;
        assert_eq!(flushes(world.agent(1))?, 0, "the other region must not flush");
    }
    world.assert_works()
}

/// Failure: a deletion that was committed but not numbered, or numbered but not published, is lost.
#[test]
fn deletion_right_before_publisher_exit_reaches_every_region() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    for end in ProcessEnd::ALL {
        let [numbered, last, unnumbered, after] =
            [world.create_key()?, world.create_key()?, world.create_key()?, world.create_key()?];
        let doomed = [&numbered, &last, &unnumbered, &after];
        world.cache_everywhere(&doomed)?;

        world.delete(&numbered)?;
        wait_until_applied(world.agent(0), &numbered.id, "deleted")?;
        world.delete(&last)?;
        end.apply_to(&mut world.topology.publisher.daemon)?;
        // A deletion that was committed right before the exit leaves this: a row of the log without a position.
        world.sql(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'", unnumbered.id))?;
        ensure!(
            world.sql("SELECT count(*) FROM invalidations WHERE position IS NULL")? != "0",
            "no row is left for the next publisher to number"
        );
        world.topology.publisher.restart()?;
        world.delete(&after)?;

        world.assert_gone(&doomed)?;
        world.wait_until_caught_up()?;
        wait_for_count(world.publisher(), "evictd_publisher_unnumbered_rows", &[], 0)?;
        for agent in world.topology.agents() {
            assert_eq!(flushes(agent)?, 0, "a restart of the publisher must not flush agents ({end:?})");
        }
    }
    world.assert_works()
}

/// Failure: a deletion that was answered with success is lost when the publisher is killed between commit, numbering
/// and publication.
#[test]
fn answered_deletions_survive_a_kill_of_the_publisher() -> Result<()> {
    const KEYS: usize = 120;
    const THREADS: usize = 4;
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let keys: Vec<Key> = (0..KEYS).map(|_| world.create_key()).collect::<Result<_>>()?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

    let caller = ApiClient::new(&world, world.publisher());
    let answers = AtomicUsize::new(0);
    let answered: Vec<Vec<&Key>> = thread::scope(|scope| {
        let deleting: Vec<_> = keys
            .chunks(KEYS / THREADS)
            .map(|keys| {
                let (caller, answers) = (caller.clone(), &answers);
                scope.spawn(move || delete_until_it_fails(&caller, keys, answers))
            })
            .collect();
        eventually("deletions to be under way", SOON, || {
            (answers.load(Ordering::Relaxed) >= KEYS / 4).then_some(())
        })?;
        world.topology.publisher.daemon.kill()?;
        let deleted = deleting.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a panic")));
        deleted.collect::<Result<_>>()
    })?;
    let answered: Vec<&Key> = answered.into_iter().flatten().collect();
    ensure!(answered.len() < KEYS, "the publisher was killed too late to interrupt anything");

    world.topology.publisher.restart()?;
    world.assert_gone(&answered)?;
    // A deletion without an answer may be committed or not, but every region agrees.
    world.wait_until_caught_up()?;
    for key in &keys {
        let [eu, us] = [0, 1].map(|region| world.code(world.agent(region), key));
        assert_eq!(eu?, us?, "{}", key.id);
    }
    world.assert_works()
}

/// Deletes `keys` until one deletion fails. Returns the keys whose deletion succeeded.
fn delete_until_it_fails<'k>(caller: &ApiClient, keys: &'k [Key], answers: &AtomicUsize) -> Vec<&'k Key> {
    let delete = |key: &&Key| {
        let answer = caller.call("keys.deleteKey", &json!({ "keyId": key.id }));
        answers.fetch_add(1, Ordering::Relaxed);
        answer.is_ok_and(|answer| answer.status == 200)
    };
    keys.iter().take_while(delete).collect()
}

/// Failure: a deletion fails because NATS is down, or is lost because its message wasn't sent. Or a region that
/// receives nothing goes on serving from its cache.
#[test]
fn deletions_succeed_without_nats_and_arrive_when_it_is_back() -> Result<()> {
    let bound = Duration::from_secs(3);
    let plan = Plan { servers: Servers::PerRegion, ..plan(&["eu", "us"]) };
    let mut world = World::start(&with_bound(bound, plan))?;
    for end in ProcessEnd::ALL {
        let [before, meanwhile, after, good] =
            [world.create_key()?, world.create_key()?, world.create_key()?, world.create_key()?];
        let doomed = [&before, &meanwhile, &after];
        world.cache_everywhere(&doomed)?;
        world.cache_everywhere(&[&good])?;

        world.delete(&before)?;
        match end {
            ProcessEnd::Killed => world.topology.home.kill()?,
            ProcessEnd::Stopped => world.topology.home.stop()?,
        };
        world.delete(&meanwhile)?;
        let deleted_at = Instant::now();
        // The regions' own servers run, so the agents stay connected, to servers that receive nothing.
        throughout(bound * 2, || {
            for agent in world.topology.agents() {
                let asked_at = Instant::now();
                assert_bounded(asked_at, deleted_at, bound, &world.code(agent, &meanwhile)?)?;
            }
            Ok(())
        })?;
        for agent in world.topology.agents() {
            wait_for_mode(agent, "expired")?;
            world.wait_for_code(agent, &good, crate::world::UNAVAILABLE)?;
        }

        world.topology.home.restart()?;
        world.delete(&after)?;
        world.assert_gone(&doomed)?;
        world.wait_for_codes(&[&good], "VALID")?;
        for agent in world.topology.agents() {
            wait_for_mode(agent, "live")?;
            assert_eq!(flushes(agent)?, 0, "a gap must be repaired without a flush");
        }
        wait_for_readiness(world.publisher(), 200)?;
    }
    world.assert_works()
}

/// Failure: the failure of one region's server affects other regions, or loses messages for good.
#[test]
fn restart_of_a_regional_nats_server_affects_only_its_region() -> Result<()> {
    let bound = Duration::from_secs(3);
    let plan = Plan { servers: Servers::PerRegion, ..plan(&["eu", "us"]) };
    let mut world = World::start(&with_bound(bound, plan))?;
    for end in ProcessEnd::ALL {
        let [meanwhile, after, good] = [world.create_key()?, world.create_key()?, world.create_key()?];
        world.cache_everywhere(&[&meanwhile, &after, &good])?;

        let nats = world.topology.regions[0].nats.as_mut().ok_or_else(|| anyhow!("eu has no server"))?;
        match end {
            ProcessEnd::Killed => nats.kill()?,
            ProcessEnd::Stopped => nats.stop()?,
        };
        world.delete(&meanwhile)?;
        let deleted_at = Instant::now();
        world.wait_for_code(world.agent(1), &meanwhile, "NOT_FOUND")?;
        throughout(bound * 2, || {
            let asked_at = Instant::now();
            assert_bounded(asked_at, deleted_at, bound, &world.code(world.agent(0), &meanwhile)?)
        })?;
        wait_for_mode(world.agent(0), "expired")?;
        wait_for_mode(world.agent(1), "live")?;
        world.wait_for_code(world.agent(1), &good, "VALID")?;

        let nats = world.topology.regions[0].nats.as_mut().ok_or_else(|| anyhow!("eu has no server"))?;
        nats.restart()?;
        world.delete(&after)?;
        world.assert_gone(&[&meanwhile, &after])?;
        wait_for_mode(world.agent(0), "live")?;
        world.wait_for_codes(&[&good], "VALID")?;
        assert_eq!(flushes(world.agent(0))?, 0);
    }
    world.assert_works()
}

/// Failure: the restart of the only server leaves a daemon without subscriptions.
#[test]
fn all_daemons_recover_from_a_kill_of_the_only_nats_server() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let [meanwhile, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&meanwhile, &good])?;
    let connected: Vec<u64> = world.topology.agents().map(connects).collect::<Result<_>>()?;
    for node in [world.agent(0), world.agent(1), world.publisher()] {
        wait_until_settled(node)?;
    }
    world.topology.home.kill()?;
    world.delete(&meanwhile)?;
    // Agents and publisher still work, so no load balancer must take them out of service.
    for node in [world.agent(0), world.agent(1), world.publisher()] {
        wait_for_warning(node, "a connection to nats://")?;
    }
    // This is longer than ticks may be missing. The warning must name the connection, not a publisher or a permission.
    throughout(Duration::from_secs(4), || {
        for agent in world.topology.agents() {
            // The lease outlives the outage: the default bound is longer than a restart takes.
            assert_eq!(world.code(agent, &good)?, "VALID");
            let ready = wait_for_readiness(agent, 200)?;
            ensure!(!ready["warnings"].to_string().contains("\"feed\""), "{ready}");
        }
        Ok(())
    })?;

    world.topology.home.restart()?;
    world.assert_gone(&[&meanwhile])?;
    world.wait_for_codes(&[&good], "VALID")?;
    for (agent, connected) in world.topology.agents().zip(connected) {
        wait_for_count(agent, "evictd_agent_nats_connected", &[], connected)?;
        assert_eq!((connects(agent)?, flushes(agent)?), (2 * connected, 0));
    }
    let ready: Value = wait_for_readiness(world.publisher(), 200)?;
    assert_eq!(ready["ready"], true);
    world.assert_works()
}

/// Failure: an agent that was paused when its subscriptions ended goes on without them.
#[test]
fn agent_paused_during_a_nats_restart_receives_the_feed_again() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let [meanwhile, after, good] = [world.create_key()?, world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&meanwhile, &after, &good])?;
    world.agent_mut(0).daemon.pause()?;
    world.topology.home.kill()?;
    world.topology.home.restart()?;
    world.delete(&meanwhile)?;
    world.wait_for_code(world.agent(1), &meanwhile, "NOT_FOUND")?;
    world.agent_mut(0).daemon.resume()?;
    world.wait_for_code(world.agent(0), &meanwhile, "NOT_FOUND")?;
    // The next deletion must arrive by the live feed, and not by a replay.
    wait_for_count(world.agent(0), "evictd_agent_feed_silent", &[], 0)?;
    let live = |agent: &Node| count(agent, "evictd_agent_invalidations_total", &[("via", "live")]);
    let before = live(world.agent(0))?;
    world.delete(&after)?;
    world.assert_gone(&[&meanwhile, &after])?;
    assert_eq!(live(world.agent(0))?, before + 1);
    world.wait_for_codes(&[&good], "VALID")?;
    assert_eq!(flushes(world.agent(0))?, 0);
    world.assert_works()
}

/// Returns how many connections NATS has from the first agent.
fn connections(world: &World) -> Result<usize> {
    let connections = world.topology.home.connections()?;
    let names = connections.iter().filter_map(|connection| connection["name"].as_str());
    Ok(names.filter(|name| name.starts_with("evictd agent eu")).count())
}

/// Failure: NATS disconnects a slow consumer, and the agent loses the messages that were on their way.
#[test]
fn agent_disconnected_as_a_slow_consumer_misses_nothing() -> Result<()> {
    // More than a server buffers for one client (64 MiB) and the sockets hold.
    const MESSAGES: usize = 240;
    const BYTES: usize = 512 * 1024;
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let [doomed, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&doomed, &good])?;
    let (connected, connected_to_nats) = (connects(world.agent(0))?, connections(&world)?);
    world.agent_mut(0).daemon.pause()?;
    let login = world.topology.home.login(&User::Publisher)?.clone();
    let mut flood = NatsConnection::connect(world.topology.home.clients(), &login)?;
    let garbage = vec![b'x'; BYTES];
    for _ in 0..MESSAGES {
        flood.publish("evictd.v1.live", None, &garbage)?;
        // One at a time, so that the other region keeps up.
        flood.sync()?;
    }
    world.delete(&doomed)?;
    world.wait_for_code(world.agent(1), &doomed, "NOT_FOUND")?;
    let gone = || Ok((connections(&world)? < connected_to_nats).then_some(()));
    try_eventually("the server to disconnect the agent", SOON, gone)?;

    world.agent_mut(0).daemon.resume()?;
    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")?;
    wait_for_mode(world.agent(0), "live")?;
    // Only the connection with the live feed was too slow.
    assert_eq!((connects(world.agent(0))?, flushes(world.agent(0))?), (connected + 1, 0));
    world.assert_works()
}
