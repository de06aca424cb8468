//! Logs that can't be written, results that can't be printed, and what the log says.

use std::fs::File;
use std::io;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use evictd_tests::process::{LogTarget, evictd_command};
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::eventually;
use serde_json::{Value, json};
use toml::toml;

use crate::command_line::{Outcome, command, evictd};
use crate::world::{
    SOON, World, plan, wait_for_count, wait_for_readiness, wait_for_warning, wait_until_settled,
};

const DROPPED: &str = "evictd_log_lines_dropped_total";

fn dropped(node: &Node) -> Result<f64> {
    node.metrics()?.value(DROPPED, &[]).context("no count of dropped log lines")
}

/// Runs a world whose daemons log to `target` through an outage of NATS, and ends them. Returns the lines that the
/// publisher and the agent dropped.
fn survive(target: &LogTarget) -> Result<[f64; 2]> {
    let verbose = toml! { log = { filter = "debug,async_nats=off" } };
    let mut world = World::start(&Plan { publisher: verbose.clone(), agents: verbose, ..plan(&["eu"]) })?;
    for node in [&mut world.topology.publisher, &mut world.topology.regions[0].agents[0]] {
        node.daemon.set_log(target.clone());
        node.restart()?;
    }
    world.assert_works()?;
    wait_until_settled(world.publisher())?;
    world.topology.home.kill()?;
    // State changes don't wait for their log lines.
    wait_for_count(world.publisher(), "evictd_publisher_nats_connected", &[], 0)?;
    wait_for_warning(world.publisher(), "no server listens there")?;
    world.topology.home.restart()?;
    wait_for_readiness(world.publisher(), 200)?;
    wait_for_readiness(world.agent(0), 200)?;
    world.assert_works()?;
    let lost = [dropped(world.publisher())?, dropped(world.agent(0))?];
    for node in [&mut world.topology.regions[0].agents[0], &mut world.topology.publisher] {
        let status = node.daemon.stop(SOON)?;
        ensure!(status.success(), "{} ended with {status}", node.daemon.name());
    }
    Ok(lost)
}

/// Failure: a thread that logs panics, SIGTERM is ignored, or a start ends with 101.
#[test]
fn daemons_work_with_a_log_on_a_full_disk() -> Result<()> {
    let lost = survive(&LogTarget::FullDisk)?;
    ensure!(lost.iter().all(|lines| *lines > 0.0), "{lost:?}");
    Ok(())
}

#[test]
fn daemons_work_with_a_log_whose_reader_is_gone() -> Result<()> {
    let lost = survive(&LogTarget::ReaderGone)?;
    ensure!(lost.iter().all(|lines| *lines > 0.0), "{lost:?}");
    Ok(())
}

/// Failure: a request waits for the log's reader.
#[test]
fn daemons_work_with_a_log_whose_reader_is_stuck() -> Result<()> {
    survive(&LogTarget::blocked()?).map(drop)
}

#[test]
fn daemons_work_with_a_closed_log() -> Result<()> {
    survive(&LogTarget::Closed).map(drop)
}

/// Failure: a full queue holds up requests. At `trace` its four mebibytes fill within seconds.
#[test]
fn stuck_log_drops_lines_when_its_queue_is_full() -> Result<()> {
    let mut world = World::start(&Plan { publisher: toml! { log = { filter = "trace" } }, ..plan(&["eu"]) })?;
    world.topology.publisher.daemon.set_log(LogTarget::blocked()?);
    world.topology.publisher.restart()?;
    let keys = world.create_keys(50)?;
    eventually("the log's queue to be full", SOON * 3, || {
        world.create_keys(50).ok()?;
        (dropped(world.publisher()).ok()? > 0.0).then_some(())
    })?;
    world.delete(&keys[0])?;
    world.assert_gone(&[&keys[0]])?;
    let status = world.topology.publisher.daemon.stop(SOON)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Failure: the last lines of an ordinary exit are lost.
#[test]
fn log_is_flushed_at_an_ordinary_exit() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let publisher = &mut world.topology.publisher;
    ensure!(publisher.daemon.stop(SOON)?.success());
    ensure!(publisher.daemon.stderr()?.contains("shutting down"), "{}", publisher.daemon.log_tail());
    Ok(())
}

/// Runs a command with its standard output on a full disk.
fn on_full_disk(mut command: Command) -> Result<Outcome> {
    let output = command.stdout(File::options().write(true).open("/dev/full")?).output()?;
    Ok(Outcome {
        exit: output.status.code(),
        stdout: String::new(),
        stderr: String::from_utf8(output.stderr)?,
    })
}

/// Runs a command with its standard output in a pipe without a reader.
fn into_closed_pipe(mut command: Command) -> Result<Outcome> {
    let (reader, writer) = io::pipe()?;
    drop(reader);
    let output = command.stdout(writer).output()?;
    Ok(Outcome {
        exit: output.status.code(),
        stdout: String::new(),
        stderr: String::from_utf8(output.stderr)?,
    })
}

/// Failure: a command whose result is lost exits with 0.
#[test]
fn every_printing_command_fails_if_its_result_is_lost() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let [shown, deleted] = [world.create_key()?, world.create_key()?];
    let (api, config) = (&world.api, world.publisher().config.display().to_string());
    let agent = world.agent(0).config.display();
    let lists = [
        format!("audit --config={config}"),
        format!("audit --output=json --config={config}"),
        format!("root-key list --config={config}"),
        format!("root-key list --output=json --config={config}"),
        format!("epochs --config={config}"),
        format!("check-config publisher --config={config}"),
        format!("check-config agent --config={agent}"),
        format!("migrate --config={config}"),
        format!("delete-protection off --api-id={api} --config={config}"),
        format!("api apis list-keys --api-id={api}"),
        format!("api apis get-api --api-id={api} --output=json"),
        format!("api keys verify-key --key={}", shown.text),
        "version".to_owned(),
        "--version".to_owned(),
        "--help".to_owned(),
        "api --help".to_owned(),
        "completions bash".to_owned(),
        "man".to_owned(),
    ];
    let root_key = world.topology.root_key();
    for line in &lists {
        let outcome = on_full_disk(command(&world, root_key, line)?)?;
        ensure!(outcome.exit == Some(1), "{line}: {:?} {}", outcome.exit, outcome.stderr);
        ensure!(outcome.stderr.contains("No space left"), "{line}: {}", outcome.stderr);
        // A pager that was quit.
        let outcome = into_closed_pipe(command(&world, root_key, line)?)?;
        ensure!(outcome.exit == Some(0), "{line}: {:?} {}", outcome.exit, outcome.stderr);
    }
    for line in [format!("api keys delete-key --key-id={}", deleted.id), "new-epoch --yes".to_owned()] {
        let line = if line.starts_with("api") { line } else { format!("{line} --config={config}") };
        let outcome = on_full_disk(command(&world, root_key, &line)?)?;
        ensure!(outcome.exit == Some(1), "{line}: {}", outcome.stderr);
        ensure!(outcome.stderr.contains("what was changed stays changed"), "{line}: {}", outcome.stderr);
    }
    world.assert_gone(&[&deleted])
}

/// Failure: a secret is lost without a word, and stays valid.
#[test]
fn lost_secrets_are_said_with_how_to_revoke_them() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let config = world.publisher().config.display().to_string();
    let root_key = world.topology.root_key();
    let old = world.create_key()?;
    for line in [
        format!("root-key create --config={config}"),
        format!("root-key create --output=json --config={config}"),
        format!("api keys create-key --api-id={}", world.api),
        format!("api keys create-key --api-id={} --output=json", world.api),
        format!("api keys reroll-key --key-id={} --expiration=0", old.id),
    ] {
        for lose in [on_full_disk, into_closed_pipe] {
            let outcome = lose(command(&world, root_key, &line)?)?;
            ensure!(outcome.exit == Some(1), "{line}: {:?} {}", outcome.exit, outcome.stderr);
            if line.contains("reroll") && outcome.stderr.starts_with("Not found") {
                // It was rerolled the first time.
                continue;
            }
            // The command between back quotes revokes it.
            let remedy = outcome.stderr.split('`').nth(1).with_context(|| outcome.stderr.clone())?;
            let remedy = remedy.strip_prefix("evictd ").context("another program")?;
            let revoked = evictd(&world, root_key, remedy)?;
            ensure!(revoked.exit == Some(0), "{remedy}: {}", revoked.stderr);
        }
    }
    Ok(())
}

/// Failure: a note that can't be written loses the root key after it.
#[test]
fn root_key_is_printed_although_notes_are_lost() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let line = format!("root-key create --config={}", world.publisher().config.display());
    let mut create = command(&world, "", &line)?;
    let output = create.stderr(File::options().write(true).open("/dev/full")?).output()?;
    ensure!(output.status.success() && output.stdout.starts_with(b"unkey_"), "{output:?}");
    Ok(())
}

fn failed_start(args: &[&str]) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let output = evictd_command()?.args(args).stdin(Stdio::null()).current_dir(dir.path()).output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

/// Failure: a collector of JSON can't read the line that says why a daemon doesn't start.
#[test]
fn fatal_start_errors_have_the_format_of_the_log() -> Result<()> {
    let json = ["--set", "log.format=json"];
    for (daemon, cause) in [
        ("agent", ["--set", "lease.bound=soon"]),
        ("publisher", ["--set", "store.path=/no/such/directory/evictd.db"]),
        ("publisher", ["--set", "log.filter=off"]),
    ] {
        let wrong =
            if cause[1] == "log.filter=off" { ["--set", "admin.listen=203.0.113.1:1"] } else { cause };
        let stderr = failed_start(&[&[daemon], &json[..], &cause, &wrong].concat())?;
        // Lines of the start may stand before it.
        let lines = stderr.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>();
        let lines = lines.with_context(|| stderr.clone())?;
        let last = lines.last().context("nothing was logged")?;
        ensure!(last["level"] == "ERROR" && last["message"].is_string(), "{stderr}");
        let text = failed_start(&[&[daemon], &cause[..], &wrong].concat())?;
        ensure!(text.lines().last().is_some_and(|line| line.contains("ERROR evictd: ")), "{text}");
    }
    Ok(())
}

/// Returns the log lines with this message.
fn lines(node: &Node, message: &str) -> Result<Vec<Value>> {
    let log = node.daemon.stderr()?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter(|line| line["message"] == message).collect())
}

/// Failure: no log holds a request id, and deletions aren't logged.
#[test]
fn each_change_has_its_line_and_later_its_regions() -> Result<()> {
    let plain = toml! { log = { format = "json" } };
    let world = World::start(&Plan { publisher: plain, ..plan(&["eu"]) })?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let answer = world.topology.call(world.publisher(), "keys.deleteKey", &json!({ "keyId": key.id }))?;
    let request = answer.body["meta"]["requestId"].as_str().context("no request id")?;
    let of_request = |message: &str| {
        let lines = lines(world.publisher(), message).ok()?;
        lines.into_iter().find(|line| line["request_id"] == request)
    };
    let change = eventually("the change's line", SOON, || of_request("change committed"))?;
    assert_eq!((&change["operation"], &change["key_id"]), (&json!("/v2/keys.deleteKey"), &json!(key.id)));
    ensure!(change["root_key_id"].as_str().is_some_and(|id| id.starts_with("root_")), "{change}");
    let receipt = eventually("the receipt's line", SOON, || of_request("receipt final"))?;
    assert_eq!(receipt["state"], "confirmed");
    ensure!(receipt["regions"].as_str().is_some_and(|text| text.starts_with("eu=confirmed")), "{receipt}");
    ensure!(receipt["position"].is_string(), "{receipt}");
    let created = lines(world.publisher(), "change committed")?;
    ensure!(created.iter().any(|line| line["operation"] == "/v2/keys.createKey"), "{created:?}");
    ensure!(lines(world.publisher(), "answered")?.is_empty(), "the access log is off by default");
    Ok(())
}

/// Failure: a client reports the request id of a 5xx, and no log has it.
#[test]
fn each_failure_is_logged_with_request_id_and_cause() -> Result<()> {
    let logging = toml! {
        log = { format = "json" }
        http = { access_log = true }
    };
    let mut world = World::start(&Plan { publisher: logging.clone(), agents: logging, ..plan(&["eu"]) })?;
    let key = world.create_key()?;
    world.topology.publisher.daemon.kill()?;
    let agent = world.agent(0);
    let answer = world.topology.call(agent, "keys.verifyKey", &json!({ "key": format!("{}x", key.text) }))?;
    assert_eq!(answer.status, 503);
    let request = answer.body["meta"]["requestId"].as_str().context("no request id")?;
    for message in ["request failed", "answered"] {
        let line = eventually(message, SOON, || {
            lines(agent, message).ok()?.into_iter().find(|line| line["request_id"] == request)
        })?;
        assert_eq!((&line["status"], &line["operation"]), (&json!(503), &json!("/v2/keys.verifyKey")));
        ensure!(message != "request failed" || line["cause"].is_string(), "{line}");
    }
    Ok(())
}

/// Failure: an agent whose bound is too long says that it waits for a proof, and the publisher fills the log.
#[test]
fn agent_says_why_it_is_refused_and_the_log_is_limited() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    world.agent_mut(0).daemon.set_env("EVICTD_LEASE_BOUND", "60s");
    world.agent_mut(0).daemon.set_env("EVICTD_LEASE_MARGIN", "6s");
    world.agent_mut(0).daemon.restart()?;
    let said = eventually("the agent to say why", SOON, || {
        let waiting = wait_for_readiness(world.agent(0), 503).ok()?["waitingFor"].to_string();
        waiting.contains("receipts.bound").then_some(waiting)
    })?;
    ensure!(said.contains("1m") && said.contains("30s") && said.contains("lease.bound"), "{said}");
    let refused = [("subject", "probe"), ("reason", "bound")];
    eventually("some refusals", SOON, || {
        let metrics = world.publisher().metrics().ok()?;
        (metrics.value("evictd_publisher_refused_messages_total", &refused)? >= 4.0).then_some(())
    })?;
    for (node, words) in
        [(world.publisher(), "refused an agent whose"), (world.agent(0), "a publisher refuses this agent")]
    {
        let log = node.daemon.stderr()?;
        assert_eq!(log.lines().filter(|line| line.contains(words)).count(), 1, "{log}");
    }
    Ok(())
}

/// Failure: a name moves the cursor of the operator's terminal, or forges a line.
#[test]
fn names_of_others_are_shown_escaped() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let name = "a\u{1b}[2J\u{9b}31m\u{202e}b";
    let key = world.create_key_with(json!({ "name": name }))?;
    let config = world.publisher().config.display().to_string();
    let mut create = command(&world, "", "root-key create")?;
    ensure!(create.args(["--name", name, "--config", &config]).output()?.status.success());
    for line in [
        format!("api keys get-key --key-id={}", key.id),
        format!("api keys get-key --key-id={} --output=json", key.id),
        format!("root-key list --config={config}"),
        format!("root-key list --output=json --config={config}"),
    ] {
        let outcome = evictd(&world, world.topology.root_key(), &line)?;
        ensure!(outcome.stdout.contains(r"\u009b31m\u202eb"), "{line}: {}", outcome.stdout);
        ensure!(!outcome.stdout.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{line}: {}", outcome.stdout);
        if line.contains("json") {
            ensure!(
                outcome.json()?.to_string().contains(&serde_json::to_string(name)?),
                "{}",
                outcome.stdout
            );
        }
    }
    Ok(())
}
