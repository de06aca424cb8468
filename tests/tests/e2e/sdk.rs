//! Unkey's own clients, as published, against real deployments. The suites are in `tests/sdk`.
//!
//! Each suite is a program in the client's own language. It gets two deployments: one that works, and one whose store
//! is broken. The test then checks in the stores what the suite changed.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use evictd_postgres_server::python_package::profile_dir;
use evictd_tests::process::{Daemon, Launch, evictd_command};
use evictd_tests::topology::{Node, Plan};
use serde_json::Value;
use toml::toml;

use crate::world::{Key, World, plan};

/// How long a suite may take on a busy machine. Ten seconds of it are a client that keeps retrying.
const SUITE_DEADLINE: Duration = Duration::from_mins(5);

/// The rate limit of one of the workspaces.
const REQUESTS_PER_MINUTE: &str = "20";

/// The actions on an API that a root key can have a permission for, except creating one.
const ACTIONS: [&str; 7] =
    ["read_api", "delete_api", "create_key", "read_key", "update_key", "delete_key", "verify_key"];

const PYTHON: Suite = Suite {
    name: "sdk-python",
    interpreter: "python3",
    needs: "Python 3.10 or newer, with pip (Debian: python3-pip)",
    sources: &[
        ("suite.py", include_str!("../../sdk/python/suite.py")),
        ("lossy_proxy.py", include_str!("../../sdk/python/lossy_proxy.py")),
    ],
    packages: &[("requirements.txt", include_str!("../../sdk/python/requirements.txt"))],
};

const TYPESCRIPT: Suite = Suite {
    name: "sdk-typescript",
    interpreter: "node",
    needs: "Node.js 18 or newer, with npm (Debian: nodejs and npm)",
    sources: &[
        ("suite.mjs", include_str!("../../sdk/typescript/suite.mjs")),
        ("lossy-proxy.mjs", include_str!("../../sdk/typescript/lossy-proxy.mjs")),
    ],
    packages: &[
        ("package.json", include_str!("../../sdk/typescript/package.json")),
        ("package-lock.json", include_str!("../../sdk/typescript/package-lock.json")),
    ],
};

/// A program that tests a client, and the files that pin the client.
struct Suite {
    name: &'static str,
    interpreter: &'static str,
    /// What to install where the interpreter is missing.
    needs: &'static str,
    /// The program's files. The first one is run.
    sources: &'static [(&'static str, &'static str)],
    /// The files that pin the client and its dependencies.
    packages: &'static [(&'static str, &'static str)],
}

#[test]
fn unkeys_python_client_supports_every_operation_and_error() -> Result<()> {
    let site = install(&PYTHON, pip_install)?;
    let stage = Stage::start()?;
    let launch = stage.launch(&PYTHON)?.args(["suite.py"]).env("PYTHONPATH", site.display().to_string());
    stage.run(&PYTHON, launch, "Ran {} tests")
}

#[test]
fn unkeys_typescript_client_supports_every_operation_and_error() -> Result<()> {
    let installed = install(&TYPESCRIPT, npm_ci)?;
    let stage = Stage::start()?;
    // Node looks for packages beside the program.
    symlink(installed.join("node_modules"), stage.working.dir().join("node_modules"))?;
    let launch = stage.launch(&TYPESCRIPT)?.args(["--test-reporter=spec", "suite.mjs"]);
    stage.run(&TYPESCRIPT, launch, "tests {}")
}

#[test]
fn both_suites_have_the_same_tests() {
    let [python, typescript] = [&PYTHON, &TYPESCRIPT].map(Suite::tests);
    assert_eq!(python, typescript);
    assert!(python.len() > 30, "{python:?}");
}

impl Suite {
    /// Returns the names of its tests, as sentences.
    fn tests(&self) -> BTreeSet<String> {
        let lines = self.sources[0].1.lines().map(str::trim_start);
        let names = lines.filter_map(|line| {
            let python = line.strip_prefix("def test_").and_then(|rest| rest.split_once('('));
            let typescript = line.strip_prefix("test(\"").and_then(|rest| rest.split_once('"'));
            Some(python.or(typescript)?.0.replace('_', " "))
        });
        names.collect()
    }
}

/// The deployments that a suite runs against.
struct Stage {
    /// Two regions without faults.
    working: World,
    /// One region, and a store that lacks a table.
    broken: World,
    /// A key of `broken`, created before its store broke.
    broken_key: Key,
    /// The number of rows in the audit log of `broken` when its store broke.
    broken_audit: String,
}

const AUDITED: &str = "SELECT count(*) FROM audit_log";

impl Stage {
    fn start() -> Result<Self> {
        let limits = toml! {
            rate_limit = { workspaces = { ws_limited = REQUESTS_PER_MINUTE, ws_silenced = "0" } }
        };
        let working = World::start(&Plan { publisher: limits, ..plan(&["eu", "us"]) })?;
        let broken = World::start(&plan(&["eu"]))?;
        let broken_key = broken.create_key()?;
        let broken_audit = broken.sql(AUDITED)?;
        broken.sql("ALTER TABLE apis RENAME TO apis_elsewhere")?;
        Ok(Self { working, broken, broken_key, broken_audit })
    }

    /// Writes the files of `suite` to the directory of the first deployment. Returns a launch with the common settings.
    fn launch(&self, suite: &Suite) -> Result<Launch> {
        let dir = self.working.dir();
        for (name, text) in suite.sources {
            fs::write(dir.join(name), text).with_context(|| format!("writing {name}"))?;
        }
        let launch = Launch::new(suite.name, suite.interpreter, dir);
        // An HTTP proxy of this machine must not be used for local addresses.
        let launch = launch.env("NO_PROXY", "127.0.0.1").env("PYTHONDONTWRITEBYTECODE", "1");
        let settings = self.settings()?;
        Ok(settings.into_iter().fold(launch, |launch, (name, value)| launch.env(name, value)))
    }

    /// Runs `suite` to its end. `counted` is its output for the number of tests that it ran.
    fn run(&self, suite: &Suite, launch: Launch, counted: &str) -> Result<()> {
        let mut program = Daemon::start(launch)?;
        let status = program.wait_exit(SUITE_DEADLINE)?;
        let output = program.stdout()? + &program.stderr()?;
        ensure!(status.success(), "{} failed ({status}):\n{output}", suite.name);
        println!("{output}");
        let counted = counted.replace("{}", &suite.tests().len().to_string());
        ensure!(output.contains(&counted), "the suite didn't run all of its tests:\n{output}");
        self.assert_nothing_was_done_twice()
    }

    /// Returns the environment variables that the suites read.
    fn settings(&self) -> Result<Vec<(&'static str, String)>> {
        let Self { working, broken, broken_key, .. } = self;
        let protected = working.create_api()?;
        evictd(working, &["delete-protection", "on", "--api-id", &protected])?;
        let scoped: Vec<_> =
            ACTIONS.iter().map(|action| format!("--permission=api.{}.{action}", working.api)).collect();
        let scoped: Vec<_> = scoped.iter().map(String::as_str).collect();
        let agents: Vec<_> = working.topology.agents().map(url).collect();
        let almighty =
            |workspace: &str| Ok::<_, anyhow::Error>(root_key(working, &["--workspace", workspace])?.1);
        let (disabled_id, disabled) = root_key(working, &[])?;
        working.sql(&format!("UPDATE root_keys SET enabled = 0 WHERE id = '{disabled_id}'"))?;
        let (revoked_id, revoked) = root_key(working, &[])?;
        evictd(working, &["root-key", "revoke", "--root-key-id", &revoked_id])?;
        let closed = almighty("ws_closed")?;
        working.sql("UPDATE workspaces SET enabled = 0 WHERE id = 'ws_closed'")?;
        Ok(vec![
            ("EVICTD_PUBLISHER_URL", url(working.publisher())),
            ("EVICTD_AGENT_URLS", agents.join(",")),
            ("EVICTD_ROOT_KEY", working.topology.root_key().to_owned()),
            ("EVICTD_VERIFIER_ROOT_KEY", root_key(working, &["--permission=api.*.verify_key"])?.1),
            (
                "EVICTD_POWERLESS_ROOT_KEY",
                root_key(working, &["--permission=api.api_elsewhere.verify_key"])?.1,
            ),
            ("EVICTD_SCOPED_ROOT_KEY", root_key(working, &scoped)?.1),
            ("EVICTD_SCOPED_API_ID", working.api.clone()),
            ("EVICTD_STRANGER_ROOT_KEY", almighty("ws_elsewhere")?),
            ("EVICTD_EXPIRED_ROOT_KEY", root_key(working, &["--expires=1ms"])?.1),
            ("EVICTD_DISABLED_ROOT_KEY", disabled),
            ("EVICTD_REVOKED_ROOT_KEY", revoked),
            ("EVICTD_CLOSED_ROOT_KEY", closed),
            ("EVICTD_PROTECTED_API_ID", protected),
            ("EVICTD_REQUESTS_PER_MINUTE", REQUESTS_PER_MINUTE.to_owned()),
            ("EVICTD_LIMITED_ROOT_KEY", almighty("ws_limited")?),
            ("EVICTD_SILENCED_ROOT_KEY", almighty("ws_silenced")?),
            ("EVICTD_BROKEN_URL", url(broken.publisher())),
            ("EVICTD_BROKEN_AGENT_URL", url(broken.agent(0))),
            ("EVICTD_BROKEN_ROOT_KEY", broken.topology.root_key().to_owned()),
            ("EVICTD_BROKEN_API_ID", broken.api.clone()),
            ("EVICTD_BROKEN_KEY_ID", broken_key.id.clone()),
            ("EVICTD_BROKEN_KEY", broken_key.text.clone()),
        ])
    }

    /// Asserts that each key and each API was deleted once, despite retries, and that requests answered 500 changed
    /// nothing.
    fn assert_nothing_was_done_twice(&self) -> Result<()> {
        let deletions = "SELECT count(*) AS times FROM audit_log WHERE event IN ('key.delete', 'api.delete') \
                         GROUP BY event, json_extract(targets, '$[0].id')";
        let twice = self.working.sql(&format!("SELECT count(*) || ' ' || max(times) FROM ({deletions})"))?;
        let (deleted, times) = twice.split_once(' ').context("two numbers")?;
        ensure!(
            deleted.parse::<u32>()? > 10 && times == "1",
            "{deleted} were deleted, one of them {times} times"
        );
        ensure!(self.broken.sql(AUDITED)? == self.broken_audit, "a failed operation was recorded");
        let alive =
            format!("SELECT count(*) FROM keys WHERE deleted_at_m IS NULL AND id = '{}'", self.broken_key.id);
        ensure!(self.broken.sql(&alive)? == "1", "a failed operation was carried out");
        Ok(())
    }
}

fn url(node: &Node) -> String {
    format!("http://{}", node.http)
}

/// Creates a root key, by default of the first workspace and with all permissions. Returns its id and its text.
fn root_key(world: &World, options: &[&str]) -> Result<(String, String)> {
    let created = evictd(world, &[&["root-key", "create"], options].concat())?;
    let text =
        |member: &str| created[member].as_str().map(str::to_owned).with_context(|| format!("no {member}"));
    Ok((text("rootKeyId")?, text("rootKey")?))
}

/// Runs `evictd <line>` on the store of `world`, as an operator does, and returns what it printed.
fn evictd(world: &World, line: &[&str]) -> Result<Value> {
    let mut command = evictd_command()?;
    command.args(line).args(["--output=json", "--config"]).arg(&world.publisher().config);
    let output = command.output().with_context(|| format!("running {line:?}"))?;
    ensure!(output.status.success(), "{line:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).with_context(|| format!("{line:?} printed no JSON"))
}

/// Installs the client of `suite` into cargo's target directory, once for each interpreter and set of packages.
/// Concurrent callers wait for each other. Returns the directory.
fn install(suite: &Suite, fill: fn(&Path) -> Command) -> Result<PathBuf> {
    let version = Command::new(suite.interpreter).arg("--version").output();
    let version =
        version.with_context(|| format!("{} is missing: install {}", suite.interpreter, suite.needs))?;
    let mut contents = DefaultHasher::new();
    (version.stdout, suite.packages).hash(&mut contents);
    let profile = profile_dir()?;
    let target = profile.parent().unwrap_or(&profile);
    let home = target.join(format!("{}-{:016x}", suite.name, contents.finish()));
    let lock = target.join(format!("{}.lock", suite.name));
    let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    lock.lock().with_context(|| format!("waiting for another installation of {}", suite.name))?;
    if home.is_dir() {
        return Ok(home);
    }
    // Installed beside its final place and renamed when complete, so that the name stands for a complete installation.
    let staging = tempfile::Builder::new().prefix(suite.name).tempdir_in(target)?;
    for (name, text) in suite.packages {
        fs::write(staging.path().join(name), text).with_context(|| format!("writing {name}"))?;
    }
    let mut command = fill(staging.path());
    let advice = format!("{command:?} must work: install {}", suite.needs);
    let output = command.output().with_context(|| advice.clone())?;
    if !output.status.success() {
        bail!("{advice}\n{}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    fs::rename(staging.keep(), &home).with_context(|| format!("moving it to {}", home.display()))?;
    Ok(home)
}

fn pip_install(dir: &Path) -> Command {
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]);
    command.args(["--only-binary", ":all:", "--require-hashes", "--requirement"]);
    command.arg(dir.join("requirements.txt")).arg("--target").arg(dir);
    command
}

fn npm_ci(dir: &Path) -> Command {
    let mut command = Command::new("npm");
    command
        .args(["ci", "--ignore-scripts", "--engine-strict", "--no-audit", "--no-fund", "--prefix"])
        .arg(dir);
    command
}
