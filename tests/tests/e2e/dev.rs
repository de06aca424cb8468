//! `evictd dev`: one command starts an installation, and nothing is left of it after any exit.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use evictd_tests::http::{Client, Response};
use evictd_tests::nats_server::find_or_install;
use evictd_tests::process::{Daemon, Launch, evictd_binary};
use evictd_tests::wait::{eventually, throughout};
use serde_json::{Value, json};

use crate::world::{A_WHILE, SOON};

/// A running `evictd dev`.
struct Dev {
    daemon: Daemon,
    /// The JSON that it printed at the start.
    printed: Value,
    /// The process id of its NATS server.
    nats: u32,
}

impl Dev {
    /// Starts it with log files named after `run`. Its temporary files go to `<dir>/tmp`, so that the test can see
    /// leftovers.
    fn start(dir: &Path, run: &str, args: &[&str]) -> Result<Self> {
        let temporary = dir.join("tmp");
        fs::create_dir_all(&temporary)?;
        let nats_server = find_or_install()?;
        let launch = Launch::new(run, evictd_binary()?, dir)
            .args(["dev", "--ports", "auto", "--output", "json", "--regions", "eu,us", "--nats-server"])
            .args([nats_server])
            .args(args.iter().copied())
            .env("TMPDIR", temporary.to_str().context("the path isn't UTF-8")?);
        let mut daemon = Daemon::start(launch)?;
        let log = dir.join(format!("{run}.stdout"));
        let line = daemon.wait_until("its first line", SOON * 3, || {
            let text = fs::read_to_string(&log).ok()?;
            text.split_once('\n').map(|(line, _)| line.to_owned())
        })?;
        let printed = serde_json::from_str(&line).with_context(|| format!("no JSON: {line}"))?;
        let nats = child_of(daemon.pid())?;
        Ok(Self { daemon, printed, nats })
    }

    fn text(&self, pointer: &str) -> Result<&str> {
        let found = self.printed.pointer(pointer).and_then(Value::as_str);
        found.with_context(|| format!("no {pointer} in {}", self.printed))
    }

    fn call(&self, url: &str, operation: &str, body: &Value) -> Result<Response> {
        Client::new().post_json(&format!("{url}/v2/{operation}"), Some(self.text("/rootKey")?), body, &[])
    }

    fn control(&self, operation: &str, body: &Value) -> Result<Value> {
        let answer = self.call(self.text("/publisher/url")?, operation, body)?;
        ensure!(answer.status == 200, "{operation}: {}", answer.text);
        Ok(answer.body["data"].clone())
    }

    /// Creates a key in an API of its own. Returns its id and its text.
    fn create_key(&self) -> Result<(String, String)> {
        let api = self.control("apis.createApi", &json!({ "name": "demo" }))?;
        let key = self.control("keys.createKey", &json!({ "apiId": api["apiId"] }))?;
        let text = |member: &str| key[member].as_str().map(str::to_owned).context("no text");
        Ok((text("keyId")?, text("key")?))
    }

    /// Verifies `key` in each region. Returns the codes.
    fn codes(&self, key: &str) -> Result<Vec<String>> {
        let agents = self.printed["agents"].as_array().context("no agents")?;
        ensure!(agents.len() == 2 && agents[0]["region"] == "eu" && agents[1]["region"] == "us");
        let code = |agent: &Value| {
            let url = agent["url"].as_str().context("an agent without a URL")?;
            let answer = self.call(url, "keys.verifyKey", &json!({ "key": key }))?;
            let code = answer.body["data"]["code"].as_str();
            Ok(code.with_context(|| format!("no code: {}", answer.text))?.to_owned())
        };
        agents.iter().map(code).collect()
    }

    fn assert_codes(&self, key: &str, code: &str) -> Result<()> {
        eventually(&format!("{code} everywhere"), SOON, || {
            self.codes(key).ok()?.iter().all(|own| own == code).then_some(())
        })
    }

    /// Creates a key, verifies it in each region, and deletes it.
    fn assert_works(&self) -> Result<()> {
        let (id, key) = self.create_key()?;
        self.assert_codes(&key, "VALID")?;
        self.control("keys.deleteKey", &json!({ "keyId": id }))?;
        self.assert_codes(&key, "NOT_FOUND")?;
        throughout(A_WHILE, || {
            let codes = self.codes(&key)?;
            ensure!(codes == ["NOT_FOUND", "NOT_FOUND"], "{codes:?}");
            Ok(())
        })
    }

    fn assert_nothing_runs(&self) -> Result<()> {
        let nats = format!("/proc/{}/cmdline", self.nats);
        // A process that wasn't reaped yet has an empty command line.
        eventually("the NATS server to end", SOON, || {
            fs::read(&nats).unwrap_or_default().is_empty().then_some(())
        })
    }
}

/// The one child process of `parent`.
fn child_of(parent: u32) -> Result<u32> {
    let mut children = Vec::new();
    for process in fs::read_dir("/proc")? {
        let Some(pid) = process?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // `<pid> (<name>) <state> <parent> ..`, where the name may contain anything.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
        if after_name.split(' ').nth(1) == Some(&parent.to_string()) {
            children.push(pid);
        }
    }
    match children[..] {
        [child] => Ok(child),
        _ => bail!("evictd dev has the children {children:?}, not one NATS server"),
    }
}

/// Failure: Ctrl-C or a closed terminal leaves a server or a directory behind, or the exit takes too long.
#[test]
fn installation_starts_works_and_exits_without_leftovers() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for signal in ["SIGTERM", "SIGINT", "SIGHUP"] {
        let mut dev = Dev::start(dir.path(), signal, &[])?;
        dev.assert_works()?;
        let status = match signal {
            "SIGTERM" => dev.daemon.stop(SOON / 2)?,
            "SIGINT" => dev.daemon.interrupt(SOON / 2)?,
            _ => {
                dev.daemon.hang_up()?;
                dev.daemon.wait_exit(SOON / 2)?
            }
        };
        assert_eq!(status.code(), Some(0), "{}", dev.daemon.log_tail());
        dev.assert_nothing_runs()?;
        let left: Vec<_> = fs::read_dir(dir.path().join("tmp"))?.collect();
        assert!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

/// Failure: before the port in use, the output blames a task that did not fail.
#[test]
fn port_in_use_is_the_only_error_reported() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // The second agent's port. If another process has it already, it is in use all the same.
    let _holder = TcpListener::bind("127.0.0.1:7180");
    let launch = Launch::new("taken", evictd_binary()?, dir.path())
        .args(["dev", "--regions", "eu,us", "--nats-server"])
        .args([find_or_install()?]);
    let mut daemon = Daemon::start(launch)?;
    let status = eventually("it to end", SOON, || daemon.exit_status().ok()?)?;
    let stderr = daemon.stderr()?;
    ensure!(status.code() == Some(1) && stderr.contains("can't listen on 127.0.0.1:7"), "{status}: {stderr}");
    ensure!(!stderr.contains("ERROR") && !stderr.contains("exited unexpectedly"), "{stderr}");
    Ok(())
}

/// Failure: the NATS server outlives a killed `evictd dev`.
#[test]
fn a_killed_installation_leaves_nothing_running() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut dev = Dev::start(dir.path(), "killed", &[])?;
    dev.daemon.kill()?;
    dev.assert_nothing_runs()
}

/// Failure: an installation with `--data-dir` restarts with another root key, without its keys, or with deleted keys.
#[test]
fn a_kept_installation_comes_back_as_it_was() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    let args = ["--data-dir", data.to_str().context("the path isn't UTF-8")?];

    let mut dev = Dev::start(dir.path(), "first", &args)?;
    let root_key = dev.text("/rootKey")?.to_owned();
    let (good, doomed, last) = (dev.create_key()?, dev.create_key()?, dev.create_key()?);
    for key in [&good, &doomed, &last] {
        dev.assert_codes(&key.1, "VALID")?;
    }
    dev.control("keys.deleteKey", &json!({ "keyId": doomed.0 }))?;
    assert_eq!(dev.daemon.stop(SOON / 2)?.code(), Some(0), "{}", dev.daemon.log_tail());

    let mut dev = Dev::start(dir.path(), "second", &args)?;
    assert_eq!(dev.text("/rootKey")?, root_key);
    dev.assert_codes(&good.1, "VALID")?;
    dev.assert_codes(&doomed.1, "NOT_FOUND")?;
    dev.control("keys.deleteKey", &json!({ "keyId": last.0 }))?;
    dev.daemon.kill()?;
    dev.assert_nothing_runs()?;

    let dev = Dev::start(dir.path(), "third", &args)?;
    dev.assert_codes(&good.1, "VALID")?;
    dev.assert_codes(&last.1, "NOT_FOUND")?;
    dev.assert_works()
}
