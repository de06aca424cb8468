//! One deletion, watched from every region at once.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use evictd_tests::http::Client;
use evictd_tests::topology::{Node, Topology};
use evictd_tests::wait::eventually;
use serde_json::json;

use crate::demo::BOUND;
use crate::demo::keys::{DemoKey, verify};

/// A deletion, as measured in one region. All times but the eviction's start at the request for the deletion.
pub(crate) struct RegionTimes {
    pub(crate) region: String,
    /// Until the control API answered.
    pub(crate) answered_after: Duration,
    /// From the commit until the agent had applied it, as the agent reports.
    pub(crate) evicted_after: Duration,
    /// Until a client of this region, which verified without pause, first got NOT_FOUND.
    pub(crate) not_found_after: Duration,
}

/// Calls `operation`, which deletes what has this id, while one client per region verifies `watched` without pause.
pub(crate) fn watch(
    deployment: &Topology,
    operation: &str,
    (parameter, id): (&str, &str),
    watched: &DemoKey,
) -> anyhow::Result<Vec<RegionTimes>> {
    let agents: Vec<&Node> = deployment.agents().collect();
    let ready = Barrier::new(agents.len() + 1);
    let failed = AtomicBool::new(false);
    let watcher = |agent: &Node| {
        let client = Client::new();
        let first = verify(&client, deployment, agent, watched);
        ready.wait();
        ensure!(first? == "VALID", "{} is not valid before its deletion", watched.id);
        let deadline = Instant::now() + BOUND * 2;
        loop {
            let code = verify(&client, deployment, agent, watched)?;
            let now = Instant::now();
            if code == "NOT_FOUND" {
                return Ok(now);
            }
            if now > deadline || failed.load(Ordering::Relaxed) {
                bail!("{} is still {code}", watched.id);
            }
        }
    };
    let (requested, answered, gone_at) = std::thread::scope(|scope| {
        let watchers: Vec<_> = agents.iter().map(|agent| scope.spawn(|| watcher(agent))).collect();
        ready.wait();
        let requested = Instant::now();
        let answer = deployment.call(&deployment.publisher, operation, &json!({ parameter: id }));
        let answered = requested.elapsed();
        let deleted = answer.and_then(|answer| {
            ensure!(answer.status == 200, "the deletion was refused: {}", answer.text);
            Ok(())
        });
        failed.store(deleted.is_err(), Ordering::Relaxed);
        let gone_at: Vec<_> = watchers
            .into_iter()
            .map(|watcher| watcher.join().unwrap_or_else(|_| bail!("a watcher panicked")))
            .collect();
        deleted.map(|()| (requested, answered, gone_at))
    })?;
    let mut seen = Vec::new();
    for ((site, agent), gone_at) in deployment.regions.iter().zip(&agents).zip(gone_at) {
        seen.push(RegionTimes {
            region: site.name.clone(),
            answered_after: answered,
            evicted_after: evicted_after(agent, id)?,
            not_found_after: gone_at.with_context(|| site.name.clone())?.duration_since(requested),
        });
    }
    Ok(seen)
}

/// Reads the lag of the deletion of `id` from the agent's `/status`.
fn evicted_after(agent: &Node, id: &str) -> anyhow::Result<Duration> {
    eventually("the deletion to show in the agent's status", BOUND, || {
        let status = agent.status().ok()?;
        let row = status["recent"]
            .as_array()?
            .iter()
            .find(|row| row["id"].as_str() == Some(id) && row["cause"].as_str() == Some("deleted"))?;
        row["lagMs"].as_f64().map(|lag| Duration::from_secs_f64(lag / 1000.0))
    })
}
