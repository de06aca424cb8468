//! Operators' commands on the home store: root keys, audit records, delete protection and the schema.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::process::evictd_command;
use evictd_tests::topology::{Plan, StoreKind};
use evictd_tests::wait::eventually;
use serde_json::{Value, json};

use crate::command_line::{Outcome, evictd};
use crate::world::{SOON, World, plan, wall_millis};

/// Runs an operator's command on the world's store.
fn operate(world: &World, line: &str) -> Result<Outcome> {
    evictd(world, "", &format!("{line} --config={}", world.publisher().config.display()))
}

fn data(world: &World, root_key: &str, line: &str) -> Result<Value> {
    let outcome = evictd(world, root_key, &format!("api {line} --output=json"))?;
    ensure!(outcome.exit == Some(0), "{line}: {}", outcome.stderr);
    Ok(outcome.json()?["data"].clone())
}

/// Failure: a revoked root key still works at an agent or at the publisher.
#[test]
fn a_revoked_root_key_is_refused_by_publisher_and_agents() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let created = operate(&world, "root-key create --name=ci --output=json")?.json()?;
    let text = |member: &str| created[member].as_str().map(str::to_owned).context("no text");
    let (id, doomed) = (text("rootKeyId")?, text("rootKey")?);
    let verify = format!("keys verify-key --key={}", key.text);
    assert_eq!(data(&world, &doomed, &verify)?["code"], "VALID");

    let revoked = operate(&world, &format!("root-key revoke --root-key-id={id}"))?;
    assert_eq!(revoked.exit, Some(0), "{}", revoked.stderr);
    let request =
        revoked.stdout.trim().strip_prefix(&format!("{id} is revoked  ")).context("no request id")?;
    assert!(revoked.stderr.contains(&format!("get-receipt --request-id={request}")), "{}", revoked.stderr);

    // Another root key of the workspace can read the receipt, as the output says.
    let state = || {
        let line = format!("propagation get-receipt --request-id={request}");
        let receipt = data(&world, world.topology.root_key(), &line).ok()?;
        (receipt["state"] == "confirmed").then_some(())
    };
    eventually("the revocation to be confirmed", SOON, state)?;
    evictd(&world, &doomed, &format!("api {verify}"))?.assert_failed("Authentication failed");
    evictd(&world, &doomed, "api apis create-api --name=more")?.assert_failed("Authentication failed");

    let again = operate(&world, &format!("root-key revoke --root-key-id={id}"))?;
    again.assert_failed("there is no root key");
    let list = operate(&world, "root-key list")?.stdout;
    assert!(!list.contains(&id) && list.contains("never expires"), "{list}");
    Ok(())
}

#[test]
fn root_key_expires_at_the_given_time() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let create =
        |expires: &str| operate(&world, &format!("root-key create --output=json --expires={expires}"));
    let created = create("90d")?.json()?;
    let in_90_days = wall_millis()? + 90 * 86_400_000;
    let expires = created["expires"].as_i64().context("no expiry")?;
    assert!((in_90_days - 600_000..=in_90_days).contains(&expires), "{expires}");
    assert_eq!(create("2099-01-31T12:00:00+00:00")?.json()?["expires"], 4_073_544_000_000_i64);
    create("2020-01-31T12:00:00Z")?.assert_failed("in the past");
    let list = operate(&world, "root-key list")?.stdout;
    assert!(list.contains("  expires 2099-01-31T12:00:00.000Z  "), "{list}");

    let brief = create("2s")?.json()?["rootKey"].as_str().context("no root key")?.to_owned();
    eventually("the root key to expire", SOON, || {
        let outcome = evictd(&world, &brief, "api apis get-api --api-id=api_unknown").ok()?;
        outcome.stderr.starts_with("Permission denied").then_some(())
    })
}

#[test]
fn audit_shows_who_changed_what() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let (key, other) = (world.create_key()?, world.create_key()?);
    let deleted = format!("api keys delete-key --key-id={} --output=json", key.id);
    let deleted = evictd(&world, world.topology.root_key(), &deleted)?.json()?;
    let request = deleted["meta"]["requestId"].as_str().context("no request id")?;
    world.delete_permanently(&other)?;

    let audit = |filter: &str| -> Result<Vec<Value>> {
        let outcome = operate(&world, &format!("audit --output=json {filter}"))?;
        ensure!(outcome.exit == Some(0), "{}", outcome.stderr);
        Ok(outcome.stdout.lines().map(serde_json::from_str).collect::<serde_json::Result<_>>()?)
    };
    let events = |records: &[Value]| -> Vec<String> {
        records.iter().map(|record| record["event"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let records = audit(&format!("--key-id={}", key.id))?;
    assert_eq!(events(&records), ["key.delete", "key.create"], "the newest first");
    let record = &records[0];
    assert_eq!(record["targets"], json!([{ "type": "key", "id": key.id }]));
    assert_eq!(record["correlation_id"], request);
    assert_eq!(
        (&record["actor"]["type"], &record["workspace_id"]),
        (&json!("rootkey"), &json!("ws_default"))
    );
    assert!(record["event_id"].as_str().is_some_and(|id| id.starts_with("log_")), "{record}");
    assert_eq!((&record["remote_ip"], &record["peer_ip"]), (&json!("127.0.0.1"), &json!("127.0.0.1")));
    assert!(record["user_agent"].as_str().is_some_and(|agent| agent.starts_with("evictd/")), "{record}");
    assert!(record["time"].as_i64().is_some_and(|time| time > 1_700_000_000_000), "{record}");

    assert_eq!(audit(&format!("--request-id={request}"))?, records[..1]);
    assert_eq!(events(&audit(&format!("--api-id={} --limit=1", world.api))?).len(), 1);
    assert_eq!(audit("--since=2099-01-31T12:00:00Z")?, Vec::<Value>::new());
    let all: BTreeSet<_> = events(&audit("--since=1h")?).into_iter().collect();
    assert!(all.is_superset(
        &["api.create", "key.create", "key.delete", "root_key.create"].map(str::to_owned).into()
    ));

    let lines = operate(&world, &format!("audit --key-id={}", other.id))?.stdout;
    let newest = lines.lines().next().context("no line")?;
    assert!(newest.contains("Permanently deleted") && newest.contains("  by rootkey root_"), "{newest}");
    assert!(!lines.contains(&other.text) && !lines.contains(world.topology.root_key()), "{lines}");
    Ok(())
}

#[test]
fn a_protected_api_is_not_deleted() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let api = &world.api;
    let on = operate(&world, &format!("delete-protection on --api-id={api}"))?;
    assert_eq!(on.stdout, format!("{api} is protected from deletion\n"), "{}", on.stderr);
    let delete = || evictd(&world, world.topology.root_key(), &format!("api apis delete-api --api-id={api}"));
    delete()?.assert_failed("Resource is protected (412)");
    world.wait_for_codes(&[&key], "VALID")?;

    assert_eq!(operate(&world, &format!("delete-protection off --api-id={api}"))?.exit, Some(0));
    assert_eq!(delete()?.exit, Some(0));
    world.assert_gone(&[&key])?;
    operate(&world, &format!("delete-protection on --api-id={api}"))?.assert_failed("there is no API");
    Ok(())
}

/// Failure: a name forges rows of the list, a disabled root key looks like an enabled one, or a name that is too long
/// fails with the store's raw error.
#[test]
fn root_keys_are_listed_as_they_are() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let create = |name: &str| -> Result<Outcome> {
        let mut command = crate::command_line::command(&world, "", "root-key create --output=json")?;
        let config = world.publisher().config.display().to_string();
        let output = command.args(["--config", &config, &format!("--name={name}")]).output()?;
        let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        Ok(Outcome { exit: output.status.code(), stdout, stderr })
    };
    create(&"n".repeat(2000))?.assert_failed("--name may be 1024 bytes long, not 2000");
    let unnamed = create("")?.json()?["rootKeyId"].clone();
    let forger = create("a\nroot_1  unkey_")?.json()?["rootKeyId"].as_str().context("no id")?.to_owned();
    world.sql(&format!("UPDATE root_keys SET enabled = 0 WHERE id = '{forger}'"))?;

    let listed = operate(&world, "root-key list --output=json")?.json()?;
    let listed = listed.as_array().context("no list")?;
    let unnamed = listed.iter().find(|key| key["rootKeyId"] == unnamed).context("not listed")?;
    assert!(unnamed["name"].is_null() && unnamed["enabled"] == true, "{unnamed}");
    assert_eq!(listed.iter().filter(|key| key["enabled"] == false).count(), 1);
    let rows = operate(&world, "root-key list")?.stdout;
    assert_eq!(rows.lines().count(), listed.len(), "{rows}");
    let row = rows.lines().find(|row| row.starts_with(&forger)).context("not listed")?;
    assert!(row.contains("  disabled, never expires  "), "{row}");
    Ok(())
}

/// Failure: `check-config` accepts a configuration with which the daemon doesn't start.
#[test]
fn a_configuration_is_checked_with_the_files_that_it_names() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let check = |settings: &str| operate(&world, &format!("check-config publisher {settings}"));
    check("--set nats.password= --set nats.password_file=/nope")?
        .assert_failed("nats.password_file: cannot read /nope");
    check("--set store.url_file=/nope")?.assert_failed("store.url_file: cannot read /nope");
    check("--set store.url=postgres://u@db.internal")?.assert_failed("store.url: it must name a database");
    check("--set http.listen=127.0.0.1:7000 --set admin.listen=127.0.0.1:7000")?
        .assert_failed("admin.listen");
    check("--set http.listen=localhost:7070")?
        .assert_failed("an IP address and a port, as in 127.0.0.1:7070");
    let password = world.dir().join("password");
    std::fs::write(&password, "hunter2")?;
    let good = check(&format!("--set nats.password= --set nats.password_file={}", password.display()))?;
    assert_eq!(good.exit, Some(0), "{}", good.stderr);
    assert_eq!(good.stderr, format!("nats.password_file: {} can be read\n", password.display()));
    Ok(())
}

/// The newest migration of both stores.
const SCHEMA_VERSION: u32 = 6;

/// Failure: a command damages a store of another version, or refuses it without a way out.
#[test]
fn migrate_runs_in_advance_and_refuses_a_foreign_schema() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let migrate = |world: &World| operate(world, "migrate");
    let done = migrate(&world)?;
    assert_eq!(done.exit, Some(0), "while a publisher runs: {}", done.stderr);
    let up_to_date = format!("the home store {} is up to date: ", world.store().display());
    let detail = done.stdout.strip_prefix(&up_to_date);
    let unchanged = format!("it had version {SCHEMA_VERSION} of the schema already, nothing was changed\n");
    assert_eq!(detail, Some(unchanged.as_str()), "{}", done.stdout);

    let elsewhere = world.dir().join("new.db");
    let fresh = evictd_command()?
        .args(["migrate", "--set"])
        .arg(format!("store.path={}", elsewhere.display()))
        .output()?;
    assert!(fresh.status.success() && elsewhere.exists());
    let printed = String::from_utf8(fresh.stdout)?;
    let made = format!(": it was made, with version {SCHEMA_VERSION} of the schema\n");
    assert!(printed.ends_with(&made), "{printed}");

    world.topology.publisher.daemon.stop(SOON)?;
    world.sql("UPDATE _sqlx_migrations SET checksum = x'00' WHERE version = 1")?;
    let keys = "SELECT group_concat(hex(checksum)) FROM _sqlx_migrations";
    let before = world.sql(keys)?;
    for command in ["migrate", "publisher", "audit", "root-key list"] {
        operate(&world, command)?.assert_failed("was made by another version of evictd");
    }
    assert_eq!(world.sql(keys)?, before);
    Ok(())
}

/// Failure: a command works on SQLite only.
#[test]
fn the_same_commands_work_on_postgresql() -> Result<()> {
    let server = Postgres::start()?;
    let mut world =
        World::start(&Plan { store: StoreKind::Postgres(server.url()), publishers: 2, ..plan(&["eu"]) })?;
    let server_url = format!("postgres://127.0.0.1:{}/", server.port());
    let migrated = operate(&world, "migrate")?;
    assert!(migrated.stdout.starts_with(&format!("the home store {server_url}")), "{}", migrated.stderr);
    assert!(migrated.stdout.ends_with(" already, nothing was changed\n"), "{}", migrated.stdout);

    let created = operate(&world, "root-key create --expires=90d --output=json")?.json()?;
    let text = |member: &str| created[member].as_str().map(str::to_owned).context("no text");
    let (id, doomed) = (text("rootKeyId")?, text("rootKey")?);
    assert!(operate(&world, "root-key list")?.stdout.contains(&format!("{id}  unkey_")));
    let get = format!("api apis get-api --api-id={}", world.api);
    assert_eq!(evictd(&world, &doomed, &get)?.exit, Some(0));
    let revoked = operate(&world, &format!("root-key revoke --root-key-id={id} --output=json"))?.json()?;
    evictd(&world, &doomed, &get)?.assert_failed("Authentication failed");
    let request = revoked["requestId"].as_str().context("no request id")?;
    let audit = operate(&world, &format!("audit --request-id={request} --output=json"))?.json()?;
    assert_eq!(audit["targets"], json!([{ "type": "rootkey", "id": id }]));

    let api = &world.api;
    assert_eq!(operate(&world, &format!("delete-protection on --api-id={api}"))?.exit, Some(0));
    let delete = format!("api apis delete-api --api-id={api}");
    evictd(&world, world.topology.root_key(), &delete)?.assert_failed("Resource is protected (412)");
    let begun = operate(&world, "new-epoch --yes")?;
    assert!(begun.stdout.starts_with("epoch 2 began at position "), "{}{}", begun.stdout, begun.stderr);
    world.assert_works()?;

    for publisher in [&mut world.topology.publisher].into_iter().chain(&mut world.topology.more_publishers) {
        publisher.daemon.stop(SOON)?;
    }
    server.query("UPDATE _sqlx_migrations SET checksum = '\\x00' WHERE version = 1")?;
    for command in ["migrate", "publisher", "audit"] {
        operate(&world, command)?.assert_failed("was made by another version of evictd");
    }
    Ok(())
}

#[test]
fn new_epoch_prints_what_happens_next() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let begun = operate(&world, "new-epoch --yes")?;
    assert_eq!(begun.exit, Some(0), "{}", begun.stderr);
    assert!(begun.stdout.starts_with("epoch 2 began at position "), "{}", begun.stdout);
    assert!(
        begun.stderr.contains("Each agent flushes its cache when it receives the new epoch"),
        "{}",
        begun.stderr
    );
    world.assert_works()
}

#[test]
fn completions_and_man_pages_come_from_the_program_itself() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let script = evictd_command()?.args(["completions", "bash"]).output()?;
    assert!(script.status.success());
    let checked = std::process::Command::new("bash")
        .args(["-c", "source /dev/stdin && complete -p evictd"])
        .stdin(file_of(dir.path(), &script.stdout)?)
        .output()?;
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let pages = dir.path().join("man1");
    assert!(evictd_command()?.args(["man", "--dir"]).arg(&pages).status()?.success());
    let page = std::fs::read_to_string(pages.join("evictd-root-key-revoke.1"))?;
    assert!(page.contains("Revokes a root key"), "{page}");
    Ok(())
}

fn file_of(dir: &std::path::Path, text: &[u8]) -> Result<std::fs::File> {
    let path = dir.join("script");
    std::fs::write(&path, text)?;
    Ok(std::fs::File::open(path)?)
}
