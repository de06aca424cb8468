//! `cargo xtask monitoring`: checks the shipped Prometheus files with promtool and a running Prometheus.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use evictd_tests::http::Client;
use evictd_tests::ports;
use evictd_tests::process::{Daemon, Launch};
use evictd_tests::topology::{Plan, Topology, Where};
use evictd_tests::wait::try_eventually;
use serde_json::Value;

use crate::demo::REGIONS;
use crate::steps;

/// More than two scrape intervals.
const SCRAPED_WITHIN: Duration = Duration::from_secs(30);

pub(crate) fn run() -> anyhow::Result<()> {
    let files = steps::root().join("deploy/prometheus");
    for (what, kind, file) in [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ] {
        let checked = Command::new("promtool")
            .args([what, kind])
            .arg(files.join(file))
            .status()
            .context("cannot run promtool; install it, on Debian with `apt-get install prometheus`")?;
        ensure!(checked.success(), "promtool reports errors in deploy/prometheus/{file}");
    }
    steps::build_evictd()?;
    let dir = tempfile::tempdir()?;
    let plan = Plan { listen: Where::DocumentedPorts, ..Plan::new(&REGIONS) };
    let _deployment = Topology::start(dir.path(), &plan)?;
    let listen = ports::free()?;
    let launch = Launch::new("prometheus", "prometheus", dir.path())
        .args([format!("--config.file={}", files.join("prometheus.yml").display())])
        .args([format!("--storage.tsdb.path={}", dir.path().join("tsdb").display())])
        .args([format!("--web.listen-address={listen}")]);
    let mut prometheus = Daemon::start(launch)?;
    let url = format!("http://{listen}/api/v1/targets?state=active");
    let client = Client::with_timeout(Duration::from_secs(5));
    let mut last = BTreeMap::new();
    let up = try_eventually("every target to be up", SCRAPED_WITHIN, || {
        if let Some(status) = prometheus.exit_status()? {
            bail!("prometheus ended ({status}):\n{}", prometheus.log_tail());
        }
        last = client.get(&url).map(|answer| health(&answer.body)).unwrap_or_default();
        let ours = last.keys().filter(|target| target.contains("evictd")).count();
        let all_up = last.values().all(|health| health == "up");
        Ok((ours == 1 + REGIONS.len() && all_up).then_some(()))
    });
    up.with_context(|| format!("targets: {last:?}"))?;
    for (target, health) in &last {
        println!("{target}  {health}");
    }
    Ok(())
}

/// Maps each target (job and instance) to its health.
fn health(targets: &Value) -> BTreeMap<String, String> {
    let active = targets["data"]["activeTargets"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    active
        .iter()
        .map(|target| {
            let labels = &target["labels"];
            (format!("{} {}", text(&labels["job"]), text(&labels["instance"])), text(&target["health"]))
        })
        .collect()
}
