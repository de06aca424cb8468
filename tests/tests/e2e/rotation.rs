//! Secrets change while the daemons run, in a file that each names. No restart, and no verification fails.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::topology::{Node, Plan, StoreKind};
use evictd_tests::wait::try_eventually;
use serde_json::json;
use toml::{Table, toml};

use crate::world::{ApiClient, Key, SOON, World, count, flushes, plan, wait_for_count, wait_for_readiness};

/// Moves a secret from the daemon's configuration to a file of its own, and restarts the daemon. Returns the file.
fn move_to_file(node: &mut Node, section: &str, key: &str) -> Result<PathBuf> {
    let mut config: Table = fs::read_to_string(&node.config)?.parse()?;
    let table = config.get_mut(section).and_then(toml::Value::as_table_mut).context("no such section")?;
    let secret = table.remove(key).and_then(|value| Some(value.as_str()?.to_owned())).context("no secret")?;
    let file = node.config.with_extension(format!("{section}-{key}"));
    replace(&file, &secret)?;
    table.insert(format!("{key}_file"), file.to_string_lossy().as_ref().into());
    fs::write(&node.config, config.to_string())?;
    node.restart()?;
    Ok(file)
}

/// Replaces a file in one step, as whatever rotates secrets does.
fn replace(file: &Path, content: &str) -> Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, content)?;
    Ok(fs::rename(new, file)?)
}

/// Verifies a key at every agent without a pause while `meanwhile` runs. Each verification must be VALID.
fn verifying<T>(world: &World, key: &Key, meanwhile: impl FnOnce() -> Result<T>) -> Result<T> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = world
            .topology
            .agents()
            .map(|agent| {
                let (client, over) = (ApiClient::new(world, agent), &over);
                scope.spawn(move || -> Result<u64> {
                    let mut verified = 0;
                    while !over.load(Ordering::Relaxed) {
                        let code = client.code(key)?;
                        ensure!(code == "VALID", "after {verified} verifications: {code}");
                        verified += 1;
                    }
                    Ok(verified)
                })
            })
            .collect();
        let outcome = meanwhile();
        over.store(true, Ordering::Relaxed);
        for client in clients {
            let verified = client.join().map_err(|_| anyhow!("a client panicked"))??;
            ensure!(verified > 0, "nothing was verified");
        }
        outcome
    })
}

/// Deletes a new key, and asserts that every agent refuses it.
fn assert_deletions_work(world: &World) -> Result<()> {
    let key = world.create_key()?;
    world.call("keys.deleteKey", &json!({ "keyId": key.id }))?;
    world.wait_for_codes(&[&key], "NOT_FOUND")
}

/// A daemon whose NATS password rotates.
struct NatsUser {
    /// The place of its password among those of `users.conf`.
    index: usize,
    password_file: PathBuf,
    node: fn(&World) -> &Node,
    connects: &'static str,
    connected: &'static str,
}

/// Failure: after a rotation the daemon logs in with the old password until its lease is over.
#[test]
fn nats_passwords_rotate_under_load() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let agent = NatsUser {
        index: 0,
        password_file: move_to_file(world.agent_mut(0), "nats", "password")?,
        node: |world| world.agent(0),
        connects: "evictd_agent_nats_connects_total",
        connected: "evictd_agent_nats_connected",
    };
    let publisher = NatsUser {
        index: 1,
        password_file: move_to_file(&mut world.topology.publisher, "nats", "password")?,
        node: World::publisher,
        connects: "evictd_publisher_nats_connects_total",
        connected: "evictd_publisher_nats_connected",
    };
    let key = world.create_key()?;
    world.wait_for_codes(&[&key], "VALID")?;

    for user in [agent, publisher] {
        let node = (user.node)(&world);
        let before = count(node, user.connects, &[])?;
        verifying(&world, &key, || {
            // First the server: it refuses the login until the file has the new password.
            let variable = format!("$EVICTD_NATS_PASSWORD_{}", user.index);
            world.topology.home.edit_users(&variable, "\"rotated\"")?;
            world.topology.home.reload()?;
            wait_for_count(node, user.connected, &[], 0)?;
            replace(&user.password_file, "rotated\n")?;
            try_eventually("a login with the new password", SOON, || {
                Ok((count(node, user.connects, &[])? > before).then_some(()))
            })?;
            wait_for_readiness(node, 200)?;
            assert_deletions_work(&world)
        })?;
    }
    assert_eq!(flushes(world.agent(0))?, 0);
    Ok(())
}

/// A user of the database, who is dropped by the next one, as by a system that issues short-lived logins.
fn rotate_user(server: &Postgres, files: &[&Path], number: usize, is_revoked_first: bool) -> Result<()> {
    let (old, new) = (format!("rotated_{}", number - 1), format!("rotated_{number}"));
    server.query(&format!("CREATE ROLE {new} LOGIN SUPERUSER"))?;
    let revoke = || {
        server.query(&format!("ALTER ROLE {old} NOLOGIN"))?;
        server
            .query(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{old}'"))
    };
    if is_revoked_first {
        revoke()?;
    }
    for file in files {
        replace(file, &format!("{}\n", server.url_as(&new)))?;
    }
    if !is_revoked_first {
        revoke()?;
    }
    Ok(())
}

/// Failure: publisher and agent keep to the URL that they read at the start. The publisher is unready, and leases end.
#[test]
fn database_logins_rotate_under_load() -> Result<()> {
    let server = Postgres::start()?;
    server.query("CREATE ROLE rotated_0 LOGIN SUPERUSER")?;
    let url = server.url_as("rotated_0");
    let mut agents = toml! { loads = { origin = "postgres" } };
    agents.insert("postgres".to_owned(), Table::from_iter([("url".to_owned(), url.clone().into())]).into());
    let mut world = World::start(&Plan { store: StoreKind::Postgres(url), agents, ..plan(&["eu"]) })?;
    world.database = Some(server.url());
    let of_agent = move_to_file(world.agent_mut(0), "postgres", "url")?;
    let of_publisher = move_to_file(&mut world.topology.publisher, "store", "url")?;
    let key = world.create_key()?;
    world.wait_for_codes(&[&key], "VALID")?;

    for (number, is_revoked_first) in [(1, false), (2, true), (3, false)] {
        verifying(&world, &key, || {
            rotate_user(&server, &[&of_agent, &of_publisher], number, is_revoked_first)?;
            try_eventually("a deletion to succeed", SOON, || Ok(assert_deletions_work(&world).ok()))?;
            wait_for_readiness(world.publisher(), 200).map(drop)
        })?;
    }
    assert_eq!(flushes(world.agent(0))?, 0);
    Ok(())
}

/// Failure: a URL that names another database is used by new connections, and the first one by old ones.
#[test]
fn another_database_in_the_file_needs_a_restart() -> Result<()> {
    let server = Postgres::start()?;
    server.create_database("another")?;
    let mut world = World::start(&Plan { store: StoreKind::Postgres(server.url()), ..plan(&["eu"]) })?;
    let file = move_to_file(&mut world.topology.publisher, "store", "url")?;
    let url = fs::read_to_string(&file)?;
    let other = url.strip_suffix("/evictd").context("the database is not the last part")?;
    replace(&file, &format!("{other}/another"))?;
    server.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")?;
    let publisher = world.publisher();
    let refused = try_eventually("the publisher to refuse the other database", SOON, || {
        let answer = world.topology.call(publisher, "apis.createApi", &json!({ "name": "payments" }))?;
        let log = publisher.daemon.stdout()? + &publisher.daemon.stderr()?;
        Ok((answer.status >= 500 && log.contains("restart to use another database")).then_some(()))
    });
    refused.with_context(|| publisher.daemon.log_tail())?;
    replace(&file, &url)?;
    wait_for_readiness(publisher, 200)?;
    assert_deletions_work(&world)
}
