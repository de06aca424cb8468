//! The server is down, silent, locked or out of connections. Clients get answers that they can act on, in bounded time.
//! No change is lost or invented, and publishers recover without an operator.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use evictd_postgres_server::{Postgres, StopMode};
use evictd_tests::http::Client;
use evictd_tests::sql::Session;
use evictd_tests::wait::{eventually, throughout, try_eventually};
use serde_json::json;

use super::Site;
use crate::bad_days::{ClientHistory, DeleteAnswer, DeletionRequest};
use crate::world::{
    ApiClient, Key, SOON, UNAVAILABLE, World, count, flushes, plan, wait_for_readiness, wait_until_applied,
    with_bound,
};

/// A statement's timeout of five seconds and two of grace, or five to connect, with time for a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(14);

/// A fault of the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outage {
    Restarted,
    Crashed,
    Killed,
    Frozen,
}

impl Outage {
    fn begins(self, server: &mut Postgres) -> Result<()> {
        match self {
            Self::Restarted => server.stop(StopMode::Fast),
            Self::Crashed => server.stop(StopMode::Immediate),
            Self::Killed => server.kill(),
            Self::Frozen => server.freeze(),
        }
    }

    fn ends(self, server: &mut Postgres) -> Result<()> {
        if self == Self::Frozen { server.thaw() } else { server.start_again() }
    }
}

/// Clients that delete keys one after the other at all publishers, until they are stopped or have no keys left.
struct Load<'k> {
    keys: &'k [Key],
    story: Mutex<ClientHistory<'k>>,
    over: AtomicBool,
}

impl<'k> Load<'k> {
    fn new(keys: &'k [Key]) -> Self {
        Self { keys, story: Mutex::default(), over: AtomicBool::new(false) }
    }

    fn count(&self, answer: Option<DeleteAnswer>) -> Result<usize> {
        let story = self.story.lock().map_err(|_| anyhow!("a client panicked"))?;
        Ok(answer.map_or(story.0.len(), |answer| story.count(answer)))
    }

    /// Waits until `more` further deletions got success.
    fn wait_for_more(&self, more: usize) -> Result<()> {
        let before = self.count(Some(DeleteAnswer::Deleted))?;
        try_eventually("deletions to succeed", SOON, || {
            Ok((self.count(Some(DeleteAnswer::Deleted))? >= before + more).then_some(()))
        })
    }

    /// Runs clients while `meanwhile` runs, and then until their requests in flight are answered.
    fn run<T>(&self, world: &World, meanwhile: impl FnOnce() -> Result<T>) -> Result<T> {
        const CLIENTS: usize = 6;
        let publishers: Vec<ApiClient> =
            world.topology.publishers().map(|node| ApiClient::new(world, node)).collect();
        thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|client| {
                    let publisher = &publishers[client % publishers.len()];
                    scope
                        .spawn(move || self.delete(publisher, self.keys.iter().skip(client).step_by(CLIENTS)))
                })
                .collect();
            let outcome = meanwhile();
            self.over.store(true, Ordering::Relaxed);
            for client in clients {
                client.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            outcome
        })
    }

    /// Deletes `keys`, and retries refused deletions after a moment.
    fn delete(&self, publisher: &ApiClient, keys: impl Iterator<Item = &'k Key>) -> Result<()> {
        for key in keys {
            loop {
                if self.over.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let request = DeletionRequest::of(publisher, key)?;
                let answer = request.answer;
                ensure!(request.took < ANSWERED_WITHIN, "{answer:?} after {:?}", request.took);
                self.story.lock().map_err(|_| anyhow!("a client panicked"))?.0.push(request);
                if answer != DeleteAnswer::Unchanged {
                    break;
                }
                throughout(Duration::from_millis(20), || Ok(()))?;
            }
        }
        Ok(())
    }

    fn into_history(self) -> Result<ClientHistory<'k>> {
        self.story.into_inner().map_err(|_| anyhow!("a client panicked"))
    }
}

/// Deletes each of `keys` by its own client, at all publishers in turn, while `meanwhile` runs. Checks that each is
/// answered in bounded time.
fn delete_at_once<'k>(
    world: &World,
    keys: &'k [Key],
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<ClientHistory<'k>> {
    let publishers = world.topology.publishers().map(|node| ApiClient::new(world, node)).collect::<Vec<_>>();
    thread::scope(|scope| {
        let clients: Vec<_> = keys
            .iter()
            .zip(publishers.iter().cycle())
            .map(|(key, publisher)| scope.spawn(move || DeletionRequest::of(publisher, key)))
            .collect();
        let outcome = meanwhile();
        let mut story = ClientHistory::default();
        for client in clients {
            let request = client.join().map_err(|_| anyhow!("a client panicked"))??;
            ensure!(request.took < ANSWERED_WITHIN, "{:?} after {:?}", request.answer, request.took);
            story.0.push(request);
        }
        outcome.map(|()| story)
    })
}

/// Runs the outages one after the other while clients of two publishers delete keys, and checks every answer.
fn run_outages(outages: &[Outage]) -> Result<()> {
    let mut site = Site::start(2, plan(&["eu", "us"]))?;
    let keys = site.world.create_keys(2_000)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    let sample: Vec<&Key> = doomed.iter().step_by(100).chain([good]).collect();
    site.world.cache_everywhere(&sample)?;
    let load = Load::new(doomed);
    let (world, server) = (&site.world, &mut site.server);
    load.run(world, || {
        for outage in outages {
            load.wait_for_more(30)?;
            outage.begins(server).with_context(|| format!("{outage:?}"))?;
            let refused = load.count(None)? - load.count(Some(DeleteAnswer::Deleted))?;
            if *outage != Outage::Frozen {
                try_eventually("clients to be refused", SOON, || {
                    let now = load.count(None)? - load.count(Some(DeleteAnswer::Deleted))?;
                    Ok((now > refused + 6).then_some(()))
                })?;
            }
            // Agents answer as long as their lease runs.
            throughout(Duration::from_millis(1_500), || world.wait_for_codes(&[good], "VALID"))?;
            outage.ends(server).with_context(|| format!("{outage:?}"))?;
        }
        load.wait_for_more(30)
    })?;
    let story = load.into_history()?;
    let counts =
        [DeleteAnswer::Deleted, DeleteAnswer::Unchanged, DeleteAnswer::Unknown, DeleteAnswer::NotFound]
            .map(|answer| story.count(answer));
    println!("deleted, unchanged, unknown, not found: {counts:?}");
    assert_eq!(counts[3], 0, "no other client deletes keys");
    for publisher in world.topology.publishers() {
        wait_for_readiness(publisher, 200)?;
    }
    story.check(world)?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: clients of requests in flight get no answer, or a wrong one. Or publishers never reconnect.
#[test]
fn server_restarts_and_kills_under_load_lose_no_deletion() -> Result<()> {
    run_outages(&[Outage::Restarted, Outage::Crashed, Outage::Killed])
}

/// Failure: publishers don't detect that the server is silent, and all clients wait.
#[test]
fn a_frozen_server_under_load_loses_no_deletion() -> Result<()> {
    run_outages(&[Outage::Frozen, Outage::Frozen])
}

/// Returns the values of the log field `name`, one for each line that has it.
fn fields<'l>(log: &'l str, name: &str) -> Vec<&'l str> {
    let (quoted, plain) = (format!(" {name}=\""), format!(" {name}="));
    let field = |line: &'l str| {
        if let Some((_, rest)) = line.split_once(&quoted) {
            return rest.split('"').next();
        }
        line.split_once(&plain)?.1.split_whitespace().next()
    };
    log.lines().filter_map(field).collect()
}

/// Failure: each request during an outage logs a line, and the log is too long to read. Or a line repeats itself.
#[test]
fn an_outage_logs_a_few_lines_and_counts_the_rest() -> Result<()> {
    const REQUESTS: usize = 400;
    const LINES_MAX: usize = 40;
    let mut site = Site::start(1, plan(&["eu"]))?;
    let key = site.world.create_key()?;
    site.server.kill()?;
    let refused = site.world.by_all_clients(&[(); REQUESTS], |caller, ()| {
        let answer = caller.call("keys.getKey", &json!({ "keyId": key.id }))?;
        ensure!(answer.status == 500, "without a server the answer is {}: {}", answer.status, answer.text);
        Ok(())
    });
    refused.context("requests without a server")?;
    site.server.start_again()?;
    let publisher = site.world.publisher();
    wait_for_readiness(publisher, 200)?;
    let log = try_eventually("the log to show the outage's end", SOON, || {
        let log = publisher.daemon.stdout()? + &publisher.daemon.stderr()?;
        Ok(log.contains("home store works again").then_some(log))
    })?;

    let logged: Vec<&str> = log.lines().filter(|line| line.contains(": home store failed error=")).collect();
    println!("{}", logged.join("\n"));
    ensure!(!logged.is_empty() && logged.len() <= LINES_MAX, "{} lines", logged.len());
    for error in fields(&logged.join("\n"), "error") {
        let causes: Vec<&str> = error.split(": ").collect();
        ensure!(causes.windows(2).all(|pair| pair[0] != pair[1]), "an error repeats itself: {error}");
        ensure!(causes.last().is_some_and(|cause| !cause.is_empty()), "an error without a cause: {error}");
    }
    let unlogged =
        fields(&log, "unlogged_failures").into_iter().map(str::parse::<usize>).sum::<Result<usize, _>>()?;
    ensure!(logged.len() + unlogged >= REQUESTS, "{} lines and {unlogged} unlogged", logged.len());
    ensure!(count(publisher, "evictd_publisher_store_failures_total", &[])? >= REQUESTS as u64);
    site.world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: the publisher is ready while it fails every change, or stays unready for ever once it gets no requests.
#[test]
fn publisher_that_fails_changes_is_unready_until_they_work() -> Result<()> {
    let site = Site::start(1, plan(&["eu"]))?;
    let publisher = site.world.publisher();
    site.world.create_key()?;
    let faults = [
        (
            "SELECT setval(pg_get_serial_sequence('invalidations', 'id'), 9223372036854775807)",
            "SELECT setval(pg_get_serial_sequence('invalidations', 'id'), 1000)",
        ),
        (
            "ALTER TABLE audit_log ADD CONSTRAINT none CHECK (false) NOT VALID",
            "ALTER TABLE audit_log DROP CONSTRAINT none",
        ),
    ];
    for (fault, remedy) in faults {
        site.server.query(fault)?;
        let body = json!({ "apiId": site.world.api });
        let answer = site.world.topology.call(publisher, "keys.createKey", &body)?;
        assert!(answer.status >= 500, "{}", answer.text);
        let readyz = wait_for_readiness(publisher, 503)?;
        ensure!(readyz.to_string().contains("changes that succeed; the last one failed"), "{readyz}");
        // No request comes any more.
        site.server.query(remedy)?;
        wait_for_readiness(publisher, 200)?;
        site.world.create_key()?;
    }
    site.world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: clients and agents wait without a limit for a silent server.
#[test]
fn a_long_silent_server_refuses_changes_and_expires_leases() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(3);
    let site = Site::start(2, with_bound(BOUND, plan(&["eu", "us"])))?;
    let world = &site.world;
    let keys = world.create_keys(5)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    site.server.freeze()?;
    let story = delete_at_once(world, doomed, || {
        for agent in world.topology.agents() {
            world.wait_for_code(agent, good, UNAVAILABLE)?;
        }
        for publisher in world.topology.publishers() {
            wait_for_readiness(publisher, 503)?;
        }
        Ok(())
    })?;
    assert_eq!(story.count(DeleteAnswer::Unchanged) + story.count(DeleteAnswer::Unknown), doomed.len());
    site.server.thaw()?;
    for publisher in world.topology.publishers() {
        wait_for_readiness(publisher, 200)?;
    }
    world.wait_for_codes(&[good], "VALID")?;
    story.check(world)?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a migration locks a table, and thereby delays the proofs that every lease needs (R10).
#[test]
fn a_long_lock_on_keys_refuses_changes_and_keeps_agents_live() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(3);
    let site = Site::start(2, with_bound(BOUND, plan(&["eu", "us"])))?;
    let world = &site.world;
    let keys = world.create_keys(5)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    let other_api = world.create_api()?;
    let other = world.create_key_with(json!({ "apiId": other_api }))?;
    world.cache_everywhere(&keys.iter().chain([&other]).collect::<Vec<_>>())?;
    let mut lock = site.session()?;
    lock.query("BEGIN; LOCK TABLE keys")?;
    let story = delete_at_once(world, doomed, || {
        // Agents answer from their caches throughout: three bounds are longer than any lease.
        throughout(BOUND * 3, || {
            for agent in world.topology.agents() {
                assert_eq!(count(agent, "evictd_agent_feed_silent", &[])?, 0, "no publisher sends the head");
                ensure!(agent.status()?["mode"] == "live", "{}", agent.daemon.log_tail());
                assert_eq!(world.code(agent, good)?, "VALID");
            }
            Ok(())
        })
    })?;
    assert_eq!(story.count(DeleteAnswer::Unchanged), doomed.len());
    // Changes that don't use the table succeed.
    world.call("apis.deleteApi", &json!({ "apiId": other_api }))?;
    let deleted = Instant::now();
    for agent in world.topology.agents() {
        wait_until_applied(agent, &other_api, "deleted")?;
    }
    ensure!(deleted.elapsed() < BOUND, "an API's deletion took {:?}", deleted.elapsed());

    lock.query("COMMIT")?;
    world.assert_gone(&[&other])?;
    let publisher = ApiClient::new(world, world.publisher());
    let again = doomed.iter().map(|key| DeletionRequest::of(&publisher, key)).collect::<Result<Vec<_>>>()?;
    let all_deleted = again.iter().all(|request| request.answer == DeleteAnswer::Deleted);
    ensure!(all_deleted, "the table is free, and a deletion was refused");
    for publisher in world.topology.publishers() {
        wait_for_readiness(publisher, 200)?;
    }
    ClientHistory(story.0.into_iter().chain(again).collect()).check(world)?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Opens sessions until the server has no connections left.
fn take_all_connections(site: &Site) -> Result<Vec<Session>> {
    let mut sessions = Vec::new();
    loop {
        match site.session() {
            Ok(session) => sessions.push(session),
            Err(refused) if format!("{refused:#}").contains("53300") => return Ok(sessions),
            Err(failure) => return Err(failure),
        }
        ensure!(sessions.len() < 1_000, "the server has no limit");
    }
}

/// Failure: publishers wait forever for a server without free connections, or need a restart when it has some.
#[test]
fn changes_are_refused_while_the_server_has_no_connections() -> Result<()> {
    let mut server = Postgres::start()?;
    server.set("max_connections = 60")?;
    server.restart(StopMode::Fast)?;
    let site = Site::start_on(server, 2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let keys = world.create_keys(30)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let mut sessions = take_all_connections(&site)?;
    let Some(session) = sessions.first_mut() else { bail!("there was no free connection from the start") };
    // Publishers keep their open connections. Now they lose them, and the test takes them first.
    session.query(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'evictd'",
    )?;
    sessions.extend(take_all_connections(&site)?);
    let mut story = ClientHistory::default();
    let publishers: Vec<ApiClient> =
        world.topology.publishers().map(|node| ApiClient::new(world, node)).collect();
    for (n, key) in doomed.iter().take(6).enumerate() {
        story.0.push(DeletionRequest::of(&publishers[n % 2], key)?);
    }
    println!("refused: {} of 6", story.count(DeleteAnswer::Unchanged));
    ensure!(story.count(DeleteAnswer::Unchanged) > 0, "no deletion was refused");
    for request in &story.0 {
        ensure!(request.took < ANSWERED_WITHIN, "it was answered after {:?}", request.took);
    }
    world.wait_for_codes(&[good], "VALID")?;
    drop(sessions);
    for (n, key) in doomed.iter().skip(6).enumerate() {
        let publisher = &publishers[n % 2];
        story.0.push(try_eventually("a deletion to succeed", SOON, || {
            let request = DeletionRequest::of(publisher, key)?;
            Ok((request.answer == DeleteAnswer::Deleted).then_some(request))
        })?);
    }
    for publisher in world.topology.publishers() {
        wait_for_readiness(publisher, 200)?;
        ensure!(
            count(publisher, "evictd_publisher_requests_total", &[("class", "5xx")])? > 0,
            "the failures aren't counted"
        );
    }
    story.check(world)?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a change that only one server has is answered with success. Or it is answered with "nothing was changed",
/// and takes effect.
#[test]
fn without_its_only_standby_changes_are_unknown_leases_expire() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(3);
    const COMMITTING: &str = "FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid)
        WHERE wait_event = 'SyncRep' AND relation = 'keys'::regclass AND mode = 'RowExclusiveLock'";
    let server = Postgres::start()?;
    let mut standby = server.standby()?;
    server.set("synchronous_standby_names = '*'")?;
    let site = Site::start_on(server, 2, with_bound(BOUND, plan(&["eu", "us"])))?;
    let world = &site.world;
    let keys = world.create_keys(4)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    standby.kill()?;
    let story = delete_at_once(world, doomed, || {
        try_eventually("all of them to commit", SOON, || {
            Ok((site.server.query(&format!("SELECT count(*) {COMMITTING}"))? == "3").then_some(()))
        })?;
        // An operator who cancels one doesn't make it durable.
        site.server.query(&format!("SELECT pg_cancel_backend(pid) {COMMITTING} LIMIT 1"))?;
        for agent in world.topology.agents() {
            world.wait_for_code(agent, good, UNAVAILABLE)?;
        }
        Ok(())
    })?;
    assert_eq!(story.count(DeleteAnswer::Unknown), doomed.len());
    ensure!(
        story.0.iter().any(|request| request.took < Duration::from_secs(5)),
        "no publisher detected the cancelled commit"
    );
    standby.start_again()?;
    for publisher in world.topology.publishers() {
        wait_for_readiness(publisher, 200)?;
    }
    world.assert_gone(&doomed.iter().collect::<Vec<_>>())?;
    world.wait_for_codes(&[good], "VALID")?;
    story.check(world)?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a client gets an error because the server or a middlebox has closed an idle connection.
#[test]
fn cut_idle_connections_are_replaced_unnoticed() -> Result<()> {
    let site = Site::start(2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let keys = world.create_keys(20)?;
    let doomed: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&doomed)?;
    site.server.set("idle_session_timeout = '60ms'")?;
    let publishers: Vec<ApiClient> =
        world.topology.publishers().map(|node| ApiClient::new(world, node)).collect();
    let mut story = ClientHistory::default();
    for (key, publisher) in keys.iter().zip(publishers.iter().cycle()) {
        throughout(Duration::from_millis(100), || Ok(()))?;
        story.0.push(DeletionRequest::of(publisher, key)?);
    }
    assert_eq!(story.count(DeleteAnswer::Deleted), keys.len());
    // The listening connection is cut as well; the publisher polls.
    let by_sql = world.create_key()?;
    world.cache_everywhere(&[&by_sql])?;
    world.sql(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'", by_sql.id))?;
    world.assert_gone(&[&by_sql])?;
    story.check(world)?;
    for publisher in world.topology.publishers() {
        assert_eq!(count(publisher, "evictd_publisher_store_failures_total", &[])?, 0);
        assert_eq!(count(publisher, "evictd_publisher_requests_total", &[("class", "5xx")])?, 0);
    }
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a default of the database for its sessions changes what publishers rely on.
#[test]
fn session_defaults_of_the_database_change_nothing() -> Result<()> {
    const SETTINGS: [&str; 10] = [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_deferrable = on",
        "synchronous_commit = off",
        "session_replication_role = 'replica'",
        "bytea_output = 'escape'",
        "client_min_messages = 'error'",
        "lock_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "extra_float_digits = 0",
        "plan_cache_mode = 'force_generic_plan'",
    ];
    let server = Postgres::start()?;
    for setting in SETTINGS {
        server.query(&format!("ALTER DATABASE evictd SET {setting}"))?;
    }
    let site = Site::start_on(server, 2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let keys = world.create_keys(40)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let story = delete_at_once(world, doomed, || Ok(()))?;
    assert_eq!(story.count(DeleteAnswer::Deleted), doomed.len());
    world.sql(&format!("UPDATE keys SET enabled = false WHERE id = '{}'", good.id))?;
    world.wait_for_codes(&[good], "DISABLED")?;
    story.check(world)?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a publisher that starts before its server exits, and its supervisor gives it up. Or it waits without saying
/// why.
#[test]
fn publisher_waits_for_its_server_at_the_start() -> Result<()> {
    const ADVICE: &str = "no server listens there; start it, or correct host and port";
    let mut site = Site::start(1, plan(&["eu"]))?;
    let key = site.world.create_key()?;
    site.server.kill()?;
    site.world.topology.publisher.daemon.restart()?;
    let publisher = site.world.publisher();
    let readyz = format!("http://{}/readyz", publisher.admin);
    let unready = eventually("/readyz to say why", SOON, || {
        let answer = Client::new().get(&readyz).ok()?;
        answer.text.contains(ADVICE).then_some(answer)
    })?;
    ensure!(unready.status == 503 && unready.text.contains(r#""condition":"store""#), "{}", unready.text);
    let answer = site.world.topology.call(publisher, "keys.deleteKey", &json!({ "keyId": key.id }))?;
    ensure!(answer.status == 503 && answer.header("retry-after") == Some("1"), "{answer:?}");
    ensure!(answer.text.contains("nothing was changed"), "{}", answer.text);
    ensure!(publisher.status()?["role"] == "publisher");
    let log = publisher.daemon.stdout()? + &publisher.daemon.stderr()?;
    ensure!(log.contains(ADVICE), "{log}");
    site.server.start_again()?;
    wait_for_readiness(publisher, 200)?;
    site.world.assert_works()?;
    site.assert_no_rule_was_broken()
}
