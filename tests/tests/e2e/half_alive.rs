//! A region's wire that passes some messages and drops others. The messages that pass must not vouch for those that
//! don't: a lease depends on what was delivered, not on the connection.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evictd_tests::proxy::{Proxy, WireMode};
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::throughout;
use evictd_wire::live::{Live, LiveEvent};
use toml::toml;

use crate::world::{
    ApiClient, Key, UNAVAILABLE, World, assert_bounded, breakable, connects, count, flushes, repairs,
    wait_for_count, wait_for_mode, wait_until_applied, with_bound,
};

const BOUND: Duration = Duration::from_secs(2);
const LIVE: &str = "evictd.v1.live";
const PROBE_ANSWERS: &str = "_INBOX_evictd.eu.agent-1.*.probe";
const REPLAY_ANSWERS: &str = "_INBOX_evictd.eu.agent-1.*.replay";

/// Two regions: `eu`, whose wire drops some messages, and `us`, which receives all of them.
struct Half {
    world: World,
    good: Key,
    doomed: Key,
    /// The number of connections that `eu` had made before its wire dropped anything.
    connects: u64,
}

impl Half {
    /// Starts with both keys cached in both regions.
    fn start() -> Result<Self> {
        let world = World::start(&with_bound(BOUND, breakable(&["eu", "us"])))?;
        let [good, doomed] = [world.create_key()?, world.create_key()?];
        world.cache_everywhere(&[&good, &doomed])?;
        world.wait_until_caught_up()?;
        let connects = connects(world.agent(0))?;
        Ok(Self { world, good, doomed, connects })
    }

    fn eu(&self) -> &Node {
        self.world.agent(0)
    }

    fn wire(&self) -> Result<&Proxy> {
        self.eu().wire.as_ref().context("the wire is direct")
    }

    /// Deletes the doomed key, and checks for three bounds that `eu` keeps the bound. Until then, `eu` must answer
    /// VALID or `wanted` for the good key. At the end it must answer `wanted`.
    fn delete_and_watch(&self, wanted: &str) -> Result<()> {
        self.world.delete(&self.doomed)?;
        let deleted_at = Instant::now();
        self.world.wait_for_code(self.world.agent(1), &self.doomed, "NOT_FOUND")?;
        let eu = ApiClient::new(&self.world, self.eu());
        throughout(BOUND * 3, || {
            let asked_at = Instant::now();
            assert_bounded(asked_at, deleted_at, BOUND, &eu.code(&self.doomed)?)?;
            let code = eu.code(&self.good)?;
            ensure!(["VALID", wanted].contains(&code.as_str()), "the good key is {code}");
            Ok(())
        })?;
        assert_eq!(eu.code(&self.good)?, wanted);
        // The connection was open all the time, and proved nothing.
        assert_eq!(count(self.eu(), "evictd_agent_nats_connected", &[])?, self.connects);
        Ok(())
    }

    /// Removes all rules from the wire. Asserts that `eu` recovers without a flush.
    fn assert_recovers(&self) -> Result<()> {
        self.wire()?.clear_rules();
        wait_for_mode(self.eu(), "live")?;
        self.world.wait_until_caught_up()?;
        self.world.assert_gone(&[&self.doomed])?;
        self.world.wait_for_codes(&[&self.good], "VALID")?;
        assert_eq!(connects(self.eu())?, self.connects);
        assert_eq!(flushes(self.eu())?, 0);
        self.world.assert_works()
    }
}

fn is_invalidation(payload: &[u8]) -> bool {
    Live::decode(payload).is_ok_and(|live| matches!(live.event, LiveEvent::Invalidations(_)))
}

fn is_tick(payload: &[u8]) -> bool {
    Live::decode(payload).is_ok_and(|live| matches!(live.event, LiveEvent::Tick(_)))
}

/// Failure: a connection that answers pings counts as one that delivers.
#[test]
fn a_connection_on_which_only_pings_pass_proves_nothing() -> Result<()> {
    let half = Half::start()?;
    half.wire()?.drop_messages(">", usize::MAX);
    half.delete_and_watch(UNAVAILABLE)?;
    wait_for_mode(half.eu(), "expired")?;
    wait_for_count(half.eu(), "evictd_agent_feed_silent", &[], 1)?;
    half.assert_recovers()
}

/// Failure: heartbeats renew the lease of an agent that misses rows.
#[test]
fn ticks_and_proofs_renew_no_lease_while_rows_are_missing() -> Result<()> {
    let half = Half::start()?;
    half.wire()?.drop_chosen(LIVE, usize::MAX, is_invalidation);
    half.wire()?.drop_messages(REPLAY_ANSWERS, usize::MAX);
    // As long as no row is missing, the agent needs only ticks and probe answers.
    throughout(BOUND * 2, || {
        ensure!(half.eu().status()?["mode"] == "live", "nothing is missing yet");
        Ok(())
    })?;
    half.delete_and_watch("VALID")?;
    wait_for_mode(half.eu(), "expired")?;
    assert_eq!(count(half.eu(), "evictd_agent_feed_silent", &[])?, 0, "ticks have arrived");
    ensure!(repairs(half.eu(), "tick")? + repairs(half.eu(), "probe")? > 0, "the agent noticed no gap");
    half.assert_recovers()
}

/// Failure: received deletions count as a proof that none is missing.
#[test]
fn received_deletions_do_not_prove_that_none_is_missing() -> Result<()> {
    let half = Half::start()?;
    half.wire()?.drop_chosen(LIVE, usize::MAX, is_tick);
    half.wire()?.drop_messages(PROBE_ANSWERS, usize::MAX);
    half.wire()?.drop_messages(REPLAY_ANSWERS, usize::MAX);
    wait_for_mode(half.eu(), "expired")?;
    half.delete_and_watch("VALID")?;
    // The agent applies the deletion all the same: it evicts an entry that its own read still allowed.
    wait_until_applied(half.eu(), &half.doomed.id, "deleted")?;
    wait_for_mode(half.eu(), "expired")?;
    half.assert_recovers()
}

/// Failure: without invalidations the agent is worse than a cache with a time to live, or it denies although a load
/// would succeed.
#[test]
fn expired_agent_with_working_loads_caches_for_the_bound() -> Result<()> {
    let half = Half::start()?;
    for subject in [LIVE, PROBE_ANSWERS, REPLAY_ANSWERS] {
        half.wire()?.drop_messages(subject, usize::MAX);
    }
    wait_for_mode(half.eu(), "expired")?;
    let eu = ApiClient::new(&half.world, half.eu());
    // Loads fresh entries, so that the deletion has something to evict.
    assert_eq!([eu.code(&half.good)?, eu.code(&half.doomed)?], ["VALID", "VALID"]);
    let before = (count(half.eu(), "evictd_agent_loads_total", &[("outcome", "ok")])?, Instant::now());
    half.delete_and_watch("VALID")?;
    half.world.wait_for_code(half.eu(), &half.doomed, "NOT_FOUND")?;
    let loads = count(half.eu(), "evictd_agent_loads_total", &[("outcome", "ok")])? - before.0;
    // The good key and the root key are loaded once per life, and "not found" three times.
    let lives = before.1.elapsed().as_secs_f64() / (BOUND * 9 / 10).as_secs_f64();
    let most = (lives + 1.0) * 2.0 + (lives * 3.0 + 1.0);
    ensure!(loads >= 4, "only {loads} loads in {lives:.1} lives");
    ensure!((loads as f64) <= most * 1.5, "{loads} loads in {lives:.1} lives: nothing was cached");
    wait_for_mode(half.eu(), "expired")?;
    half.assert_recovers()
}

/// Failure: deletions or leases work only close to the publisher.
#[test]
fn deletions_over_a_150_ms_wire_take_as_long_without_flaps() -> Result<()> {
    const DELAY: Duration = Duration::from_millis(150);
    const LAG: &str = "evictd_agent_propagation_lag_seconds";
    let agents = toml! { lease = { probe_interval = "500ms" } };
    let world = World::start(&Plan { agents, ..breakable(&["far", "near"]) })?;
    let far = world.agent(0);
    let connected = connects(far)?;
    let wire = far.wire.as_ref().context("the wire is direct")?;
    wire.set(WireMode::Delay(DELAY));
    // Everything from here on is measured on the slow wire.
    let keys: Vec<Key> = (0..12).map(|_| world.create_key()).collect::<Result<_>>()?;
    let (lost, keys) = keys.split_first().context("no keys")?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    world.cache_everywhere(&[lost])?;
    world.wait_until_caught_up()?;
    let lag = |agent: &Node| Ok::<_, anyhow::Error>(agent.metrics()?.histogram(LAG, &[]));
    let before = lag(far)?.context("no lag")?;

    for key in keys {
        world.delete(key)?;
        let deleted_at = Instant::now();
        world.wait_for_code(far, key, "NOT_FOUND")?;
        // Part of the delay had passed when the publisher answered.
        ensure!(deleted_at.elapsed() > DELAY / 2, "{:?} is faster than the wire", deleted_at.elapsed());
        ensure!(far.status()?["mode"] == "live", "the lease lapsed");
    }
    let after = lag(far)?.context("no lag")?;
    let mean = (after.sum - before.sum) / (after.count - before.count);
    println!("on a wire of {DELAY:?}, deletions took {:.0} ms", mean * 1e3);
    assert_eq!((after.count - before.count) as usize, keys.len());
    ensure!(mean >= DELAY.as_secs_f64() * 0.6, "the reported lag is only {mean} s");
    ensure!(mean <= DELAY.as_secs_f64() * 4.0, "the lag is {mean} s");

    wire.drop_chosen(LIVE, 1, is_invalidation);
    world.delete(lost)?;
    world.assert_gone(&[lost])?;
    ensure!(count(far, "evictd_agent_repairs_total", &[])? >= 1, "no row was replayed");
    assert_eq!((flushes(far)?, connects(far)?), (0, connected));
    assert_eq!(count(far, "evictd_agent_loads_total", &[("outcome", "timeout")])?, 0);
    world.assert_works()
}
