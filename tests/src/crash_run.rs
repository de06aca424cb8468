//! [`run`]: many deletions by many clients, while publishers are killed every few seconds. In the end each
//! deletion has exactly one audit record and a final receipt, no agent accepts a deleted key, and whatever
//! nobody deleted is valid still.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::http::{Client, Response};
use crate::process::evictd_command;
use crate::topology::{Plan, Topology};
use crate::wait::try_eventually;

/// How long a client tries to get a definite answer about one key.
const PATIENCE: Duration = Duration::from_mins(2);

/// Of so many keys, one stays: a deletion must not take anything else along.
const ONE_STAYS_OF: usize = 20;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct CrashRun {
    /// How many keys to create; nineteen of twenty are deleted.
    pub keys: usize,
    /// How many clients delete them.
    pub clients: usize,
    /// How long a publisher lives before it, or another one, is killed.
    pub kill_every: Duration,
}

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Keys that were deleted.
    pub deleted: usize,
    /// Of these, how many a client learned of only when it asked again and was told that there is no such key.
    pub learned_late: usize,
    /// Publishers killed.
    pub kills: usize,
    /// How long the deletions took.
    pub deleting: Duration,
    /// Receipts that every agent confirmed; all others are final too.
    pub confirmed: usize,
}

/// Carries out the run on a new deployment of `plan` with its files in `dir`.
///
/// # Errors
///
/// Anything lost, invented or done twice.
pub fn run(dir: &Path, plan: &Plan, run: CrashRun) -> Result<Report> {
    let mut topology = Topology::start(dir, plan)?;
    let keys = create_keys(&topology, run)?;
    let (staying, doomed): (Vec<_>, Vec<_>) =
        keys.into_iter().enumerate().partition(|(index, _)| index % ONE_STAYS_OF == 0);
    let (staying, doomed): (Vec<Key>, Vec<Key>) =
        (staying.into_iter().map(|(_, key)| key).collect(), doomed.into_iter().map(|(_, key)| key).collect());
    // Agents must have something to forget.
    expect_everywhere(&topology, run.clients, doomed.iter().step_by(50), "VALID")?;

    let mut report = delete_under_fire(&mut topology, run, &doomed)?;
    for node in topology.publishers_mut() {
        node.wait_until_ready()?;
    }
    expect_everywhere(&topology, run.clients, doomed.iter(), "NOT_FOUND")?;
    expect_everywhere(&topology, run.clients, staying.iter(), "VALID")?;
    let requests = audited_deletions(&topology, &doomed)?;
    report.confirmed = final_receipts(&topology, run.clients, &requests)?;
    Ok(report)
}

#[derive(Clone, Debug)]
struct Key {
    id: String,
    text: String,
}

/// Does `work` for every item on so many threads; the results come in no order.
fn shared_among<T: Sync, R: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(&Client, &T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let client = Client::with_timeout(Duration::from_secs(10));
                    while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = work(&client, item)?;
                        done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(result);
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(worked) => worked,
            Err(_) => bail!("a client panicked"),
        })
    })?;
    Ok(done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn post(client: &Client, to: SocketAddr, root_key: &str, operation: &str, body: &Value) -> Result<Response> {
    client.post_json(&format!("http://{to}/v2/{operation}"), Some(root_key), body, &[])
}

fn create_keys(topology: &Topology, run: CrashRun) -> Result<Vec<Key>> {
    let publisher = topology.publisher.http;
    let api = topology.call(&topology.publisher, "apis.createApi", &json!({ "name": "crash run" }))?;
    let body = json!({ "apiId": api.body["data"]["apiId"] });
    shared_among(run.clients, &vec![(); run.keys], |client, ()| {
        let answer = post(client, publisher, topology.root_key(), "keys.createKey", &body)?;
        let text = |member: &str| Some(answer.body["data"][member].as_str()?.to_owned());
        let key = text("keyId").zip(text("key")).map(|(id, text)| Key { id, text });
        key.with_context(|| format!("createKey answered {}: {}", answer.status, answer.text))
    })
}

/// How the deletion of one key ended for its client.
enum Ended {
    /// It was told so.
    Told,
    /// It asked again after an answer that never came or was no definite one, and there was no such key.
    LearnedLate,
}

/// Deletes `doomed` by all clients, while a publisher is killed and started again every few seconds.
fn delete_under_fire(topology: &mut Topology, run: CrashRun, doomed: &[Key]) -> Result<Report> {
    let root_key = topology.root_key().to_owned();
    let addresses: Vec<SocketAddr> = topology.publishers().map(|node| node.http).collect();
    let over = AtomicBool::new(false);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let deleting = scope.spawn(|| {
            let ended =
                shared_among(run.clients, doomed, |client, key| delete(client, &addresses, &root_key, key));
            over.store(true, Ordering::Relaxed);
            ended.map(|ended| (ended, began.elapsed()))
        });
        let killed = kill_in_turn(topology, run.kill_every, &over);
        let (ended, deleting) = deleting.join().map_err(|_| anyhow::anyhow!("the clients panicked"))??;
        Ok(Report {
            deleted: ended.len(),
            learned_late: ended.iter().filter(|ended| matches!(ended, Ended::LearnedLate)).count(),
            kills: killed?,
            deleting,
            confirmed: 0,
        })
    })
}

fn kill_in_turn(topology: &mut Topology, every: Duration, over: &AtomicBool) -> Result<usize> {
    let mut kills = 0;
    let mut turn = 0;
    while !over.load(Ordering::Relaxed) {
        let until = Instant::now() + every;
        while Instant::now() < until && !over.load(Ordering::Relaxed) {
            std::thread::park_timeout(Duration::from_millis(50));
        }
        let count = topology.publishers().count();
        let node = topology.publishers_mut().nth(turn % count).context("there is no publisher")?;
        // Started at once, and not waited for: another one may be killed before this one is ready.
        node.daemon.restart()?;
        (kills, turn) = (kills + 1, turn + 1);
    }
    Ok(kills)
}

/// Asks until the answer is definite. What failed may have been done all the same.
fn delete(client: &Client, addresses: &[SocketAddr], root_key: &str, key: &Key) -> Result<Ended> {
    let deadline = Instant::now() + PATIENCE;
    let body = json!({ "keyId": key.id });
    let mut tries = 0;
    loop {
        let address = addresses[(tries + key.id.len()) % addresses.len()];
        let answer = post(client, address, root_key, "keys.deleteKey", &body);
        match &answer {
            Ok(answer) if answer.status == 200 => return Ok(Ended::Told),
            Ok(answer) if answer.status == 404 && tries > 0 => return Ok(Ended::LearnedLate),
            Ok(answer) if answer.status < 500 => {
                bail!("the deletion of {} was answered {}: {}", key.id, answer.status, answer.text)
            }
            _ if Instant::now() > deadline => {
                bail!("no definite answer about {} within {PATIENCE:?}: {answer:?}", key.id)
            }
            _ => {}
        }
        tries += 1;
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Waits until every agent says `code` of every key.
fn expect_everywhere<'a>(
    topology: &Topology,
    threads: usize,
    keys: impl Iterator<Item = &'a Key>,
    code: &str,
) -> Result<()> {
    let agents: Vec<SocketAddr> = topology.agents().map(|agent| agent.http).collect();
    let questions: Vec<(SocketAddr, &Key)> =
        keys.flat_map(|key| agents.iter().map(move |agent| (*agent, key))).collect();
    let asked = shared_among(threads, &questions, |client, (agent, key)| {
        let mut last = String::new();
        let told = try_eventually("the verdict", Duration::from_mins(1), || {
            let body = json!({ "key": key.text });
            let answer = post(client, *agent, topology.root_key(), "keys.verifyKey", &body)?;
            last = answer.text;
            Ok((answer.body["data"]["code"] == code).then_some(()))
        });
        told.with_context(|| format!("{agent} about {}, which should be {code}, said last: {last}", key.id))
    });
    asked.map(drop)
}

/// The requests that deleted `doomed`: one for each, and none for anything else.
fn audited_deletions(topology: &Topology, doomed: &[Key]) -> Result<Vec<String>> {
    let mut command = evictd_command()?;
    command.args(["audit", "--limit", "10000000", "--output", "json", "--config"]);
    let output = command.arg(&topology.publisher.config).output().context("running `evictd audit`")?;
    ensure!(output.status.success(), "`evictd audit` failed: {}", String::from_utf8_lossy(&output.stderr));
    let records = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    let records = records.collect::<Result<Vec<_>, _>>().context("reading the audit records")?;
    let doomed: HashSet<&str> = doomed.iter().map(|key| key.id.as_str()).collect();
    let mut requests = HashMap::new();
    for record in records.iter().filter(|record| record["event"] == "key.delete") {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let key = text(&record["targets"][0]["id"]).context("an audit record without a target")?;
        let request = text(&record["correlation_id"]).context("an audit record without a request")?;
        ensure!(doomed.contains(key.as_str()), "{key} was deleted, and nobody asked for that");
        let twice = requests.insert(key.clone(), request);
        ensure!(twice.is_none(), "{key} was deleted twice");
    }
    ensure!(requests.len() == doomed.len(), "{} deletions, {} audited", doomed.len(), requests.len());
    let distinct: HashSet<&String> = requests.values().collect();
    ensure!(distinct.len() == requests.len(), "two deletions share a request");
    Ok(requests.into_values().collect())
}

/// Waits until all receipts are final. Returns how many of them every agent confirmed.
fn final_receipts(topology: &Topology, threads: usize, requests: &[String]) -> Result<usize> {
    let publishers: Vec<SocketAddr> = topology.publishers().map(|node| node.http).collect();
    let receipts = shared_among(threads, requests, |client, request| {
        let address = publishers[request.len() % publishers.len()];
        let mut last = String::new();
        let receipt = try_eventually("the receipt", Duration::from_mins(2), || {
            let body = json!({ "requestId": request });
            let answer = post(client, address, topology.root_key(), "propagation.getReceipt", &body)?;
            last = answer.text;
            let receipt = &answer.body["data"];
            let done = answer.status == 200 && receipt["final"] == true;
            Ok(done.then(|| (receipt["state"].clone(), receipt["position"].as_u64())))
        });
        let (state, position) =
            receipt.with_context(|| format!("the receipt of {request} is last: {last}"))?;
        let position = position.with_context(|| format!("{request} has no place in the log"))?;
        ensure!(state == "confirmed" || state == "fenced", "{request} ended as {state}");
        Ok((position, state == "confirmed"))
    })?;
    let places: HashSet<u64> = receipts.iter().map(|(position, _)| *position).collect();
    ensure!(places.len() == requests.len(), "two deletions share a place in the log");
    Ok(receipts.iter().filter(|(_, confirmed)| *confirmed).count())
}
