//! [`run`]: many deletions by many clients, while publishers are killed every few seconds.
//!
//! At the end, each deletion has exactly one audit record, one position in the log and a final receipt with that
//! position. No agent accepts a deleted key, and all other keys are still valid.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::home_store::{HomeStoreAddress, check_plain_log, wait_for_receipts};
use crate::http::{Client, Response};
use crate::process::evictd_command;
use crate::topology::{Plan, Topology};
use crate::wait::{eventually, try_eventually};

/// How long a client retries for a definite answer about one key.
const PATIENCE: Duration = Duration::from_mins(2);

/// How long the store may take to hold a receipt that is final.
const STORED: Duration = Duration::from_secs(20);

/// Of this many keys, one is not deleted: it must stay valid.
const ONE_STAYS_OF: usize = 20;

/// The size of a run.
#[derive(Clone, Copy, Debug)]
pub struct CrashRun {
    /// How many keys to create; nineteen of twenty are deleted.
    pub keys: usize,
    /// How many clients delete them.
    pub clients: usize,
    /// The time between two kills. Publishers are killed in turn.
    pub kill_every: Duration,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Keys that were deleted.
    pub deleted: usize,
    /// Of these, how many got no success answer: the client retried, and the answer was that the key doesn't exist.
    pub learned_late: usize,
    /// Requests that got no answer because their publisher was killed, carried out or not.
    pub unanswered: usize,
    /// How often each publisher was killed.
    pub kills: Vec<usize>,
    /// How many deletions each publisher answered with success.
    pub answered: Vec<usize>,
    /// How long the deletions took.
    pub deleting: Duration,
    /// Receipts that every agent confirmed. All others have elapsed.
    pub confirmed: usize,
}

impl Report {
    /// Fails if too few deletions met a kill: then the run shows nothing.
    fn ensure_enough_happened(&self) -> Result<()> {
        // Clients and kills go to the publishers in turn, so that each gets about the same share of both.
        let even_share = self.deleted / self.answered.len();
        let quiet = if self.kills.contains(&0) {
            "a publisher was never killed"
        } else if self.answered.iter().any(|answered| *answered < even_share / 3) {
            "a publisher has deleted next to nothing"
        } else if self.unanswered == 0 {
            "no request met a kill"
        } else {
            // Agents aren't killed, so only a publisher's absence delays a receipt.
            ensure!(self.confirmed > self.deleted / 2, "few deletions were confirmed: {self:?}");
            return Ok(());
        };
        bail!("{quiet}: use more keys or clients, or kill more often: {self:?}")
    }
}

/// Runs it on a new deployment of `plan` with its files in `dir`.
///
/// # Errors
///
/// If a deletion was lost, invented or done twice, or if the run met too few kills to show that.
pub fn run(dir: &Path, plan: &Plan, run: CrashRun) -> Result<Report> {
    let mut topology = Topology::start(dir, plan)?;
    let keys = create_keys(&topology, run)?;
    let (staying, doomed): (Vec<_>, Vec<_>) =
        keys.into_iter().enumerate().partition(|(index, _)| index % ONE_STAYS_OF == 0);
    let (staying, doomed): (Vec<CreatedKey>, Vec<CreatedKey>) =
        (staying.into_iter().map(|(_, key)| key).collect(), doomed.into_iter().map(|(_, key)| key).collect());
    // Agents must have cached keys to evict.
    expect_everywhere(&topology, run.clients, doomed.iter().step_by(50), "VALID")?;

    let mut events = delete_under_fire(&mut topology, run, &doomed)?;
    for node in topology.publishers_mut() {
        node.wait_until_ready()?;
    }
    expect_everywhere(&topology, run.clients, doomed.iter(), "NOT_FOUND")?;
    expect_everywhere(&topology, run.clients, staying.iter(), "VALID")?;
    let requests = audited_deletions(&topology, &doomed)?;
    for (key, request) in &events.answered {
        ensure!(requests.get(key) == Some(request), "{request} got success, but didn't delete {key}");
    }
    let requests: Vec<String> = requests.into_values().collect();
    events.report.confirmed = final_receipts(&topology, run.clients, &requests)?;
    let store = HomeStoreAddress::of(&topology.publisher.config)?;
    wait_for_receipts(STORED, |statement| store.read(statement))?;
    check_plain_log(|statement| store.read(statement))?;
    events.report.ensure_enough_happened()?;
    Ok(events.report)
}

#[derive(Clone, Debug)]
struct CreatedKey {
    id: String,
    text: String,
}

/// Runs `work` for every item on `threads` threads, and returns the results in no particular order. `work` also gets a
/// turn: a number that starts at the thread's index and rises by one with each of its items. Callers choose a server by
/// it, so that all servers get about the same load.
fn shared_among<'i, T: Sync, R: Send>(
    threads: usize,
    items: &'i [T],
    work: impl Fn(&Client, usize, &'i T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let labour = |first_turn: usize| {
        let client = Client::with_timeout(Duration::from_secs(10));
        for turn in first_turn.. {
            let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let result = work(&client, turn, item)?;
            done.lock().unwrap_or_else(PoisonError::into_inner).push(result);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || labour(thread))).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(worked) => worked,
            Err(_) => bail!("a client panicked"),
        })
    })?;
    Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn post(client: &Client, to: SocketAddr, root_key: &str, operation: &str, body: &Value) -> Result<Response> {
    client.post_json(&format!("http://{to}/v2/{operation}"), Some(root_key), body, &[])
}

fn publishers(topology: &Topology) -> Vec<SocketAddr> {
    topology.publishers().map(|node| node.http).collect()
}

fn create_keys(topology: &Topology, run: CrashRun) -> Result<Vec<CreatedKey>> {
    let publishers = publishers(topology);
    let api = topology.call(&topology.publisher, "apis.createApi", &json!({ "name": "crash run" }))?;
    let body = json!({ "apiId": api.body["data"]["apiId"] });
    shared_among(run.clients, &vec![(); run.keys], |client, turn, ()| {
        let publisher = publishers[turn % publishers.len()];
        let answer = post(client, publisher, topology.root_key(), "keys.createKey", &body)?;
        let text = |member: &str| Some(answer.body["data"][member].as_str()?.to_owned());
        let key = text("keyId").zip(text("key")).map(|(id, text)| CreatedKey { id, text });
        key.with_context(|| format!("createKey answered {}: {}", answer.status, answer.text))
    })
}

/// The result of one key's deletion for its client.
struct Ended {
    /// The publisher that answered with success, and the request id. None if an earlier try got no definite answer, and
    /// a retry found no such key.
    success: Option<(usize, String)>,
    /// Requests that were sent and got no answer.
    unanswered: usize,
}

/// The deletions and the kills.
struct Events {
    report: Report,
    /// Keys, and the requests to which a publisher answered with success.
    answered: Vec<(String, String)>,
}

/// Deletes `doomed` by all clients, while a publisher is killed and started again every few seconds.
fn delete_under_fire(topology: &mut Topology, run: CrashRun, doomed: &[CreatedKey]) -> Result<Events> {
    let root_key = topology.root_key().to_owned();
    let publishers = publishers(topology);
    let over = AtomicBool::new(false);
    let began = Instant::now();
    let (ended, deleting, kills) = std::thread::scope(|scope| {
        let deleting = scope.spawn(|| {
            let ended = shared_among(run.clients, doomed, |client, turn, key| {
                let ended = delete(client, &publishers, turn, &root_key, key);
                ended.with_context(|| format!("deleting {}", key.id)).map(|ended| (key, ended))
            });
            over.store(true, Ordering::Relaxed);
            ended.map(|ended| (ended, began.elapsed()))
        });
        let kills = kill_in_turn(topology, run.kill_every, &over);
        let deleted = deleting.join().map_err(|_| anyhow!("the clients panicked"))?;
        // A publisher that doesn't start again is the cause of its clients' errors, so its error comes first.
        let kills = kills?;
        deleted.map(|(ended, deleting)| (ended, deleting, kills))
    })?;
    let mut per_publisher = vec![0; publishers.len()];
    let mut unanswered = 0;
    let mut answered = Vec::with_capacity(ended.len());
    let deleted = ended.len();
    for (key, ended) in ended {
        unanswered += ended.unanswered;
        if let Some((publisher, request)) = ended.success {
            per_publisher[publisher] += 1;
            answered.push((key.id.clone(), request));
        }
    }
    let learned_late = deleted - answered.len();
    let report =
        Report { deleted, learned_late, unanswered, kills, answered: per_publisher, deleting, confirmed: 0 };
    Ok(Events { report, answered })
}

/// Kills publishers in turn until the deletions are `over`. Returns how often each was killed.
fn kill_in_turn(topology: &mut Topology, every: Duration, over: &AtomicBool) -> Result<Vec<usize>> {
    let mut kills = vec![0; topology.publishers().count()];
    let is_over = || over.load(Ordering::Relaxed).then_some(());
    for victim in (0..kills.len()).cycle() {
        if eventually("the deletions to be over", every, is_over).is_ok() {
            break;
        }
        let node = topology.publishers_mut().nth(victim).context("a publisher is missing")?;
        // Not waited for: another one may be killed before this one is ready.
        node.daemon.restart()?;
        kills[victim] += 1;
    }
    Ok(kills)
}

/// Sends the deletion to publishers in turn until the answer is definite. A request that failed may still have been
/// carried out.
fn delete(
    client: &Client,
    publishers: &[SocketAddr],
    turn: usize,
    root_key: &str,
    key: &CreatedKey,
) -> Result<Ended> {
    let body = json!({ "keyId": key.id });
    let mut turns = turn..;
    let (mut unanswered, mut maybe_done) = (0, false);
    let mut last = String::new();
    let success = try_eventually("a definite answer", PATIENCE, || {
        let publisher = turns.next().context("there are no more turns")? % publishers.len();
        let answer = post(client, publishers[publisher], root_key, "keys.deleteKey", &body);
        match &answer {
            Ok(answer) if answer.status == 200 => {
                let request = answer.body["meta"]["requestId"].as_str().context("an answer without an id")?;
                return Ok(Some(Some((publisher, request.to_owned()))));
            }
            // Without an earlier try that may have deleted it, a 404 is wrong.
            Ok(answer) if answer.status == 404 && maybe_done => return Ok(Some(None)),
            Ok(answer) if answer.status < 500 => bail!("it was answered {}: {}", answer.status, answer.text),
            Ok(answer) => maybe_done |= !answer.text.contains("nothing was changed"),
            Err(failure) if is_refused(failure) => {}
            Err(_) => (unanswered, maybe_done) = (unanswered + 1, true),
        }
        last = format!("{answer:?}");
        Ok(None)
    });
    let success = success.with_context(|| format!("the last answer was {last}"))?;
    Ok(Ended { success, unanswered })
}

/// Whether the connection was refused, so that the request was never sent.
fn is_refused(failure: &anyhow::Error) -> bool {
    let cause = failure.downcast_ref::<ureq::Error>();
    matches!(cause, Some(ureq::Error::Io(cause)) if cause.kind() == ErrorKind::ConnectionRefused)
}

/// Waits until every agent answers `code` for every key.
fn expect_everywhere<'a>(
    topology: &Topology,
    threads: usize,
    keys: impl Iterator<Item = &'a CreatedKey>,
    code: &str,
) -> Result<()> {
    let agents: Vec<SocketAddr> = topology.agents().map(|agent| agent.http).collect();
    let pairs: Vec<(SocketAddr, &CreatedKey)> =
        keys.flat_map(|key| agents.iter().map(move |agent| (*agent, key))).collect();
    let verified = shared_among(threads, &pairs, |client, _, (agent, key)| {
        let mut last = String::new();
        let answered = try_eventually("the code", Duration::from_mins(1), || {
            let body = json!({ "key": key.text });
            let answer = post(client, *agent, topology.root_key(), "keys.verifyKey", &body)?;
            last = answer.text;
            Ok((answer.body["data"]["code"] == code).then_some(()))
        });
        answered.with_context(|| format!("last answer of {agent} about {}, expected {code}: {last}", key.id))
    });
    verified.map(drop)
}

/// Returns the keys of `doomed` with the requests that deleted them. Each has exactly one, and no other key has any.
fn audited_deletions(topology: &Topology, doomed: &[CreatedKey]) -> Result<HashMap<String, String>> {
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
        ensure!(doomed.contains(key.as_str()), "{key} was deleted without a request");
        let twice = requests.insert(key.clone(), request);
        ensure!(twice.is_none(), "{key} was deleted twice");
    }
    ensure!(requests.len() == doomed.len(), "{} deletions, {} audited", doomed.len(), requests.len());
    let distinct: HashSet<&String> = requests.values().collect();
    ensure!(distinct.len() == requests.len(), "two deletions share a request");
    Ok(requests)
}

/// Waits until all receipts are final. Returns how many of them every agent confirmed.
fn final_receipts(topology: &Topology, threads: usize, requests: &[String]) -> Result<usize> {
    let publishers = publishers(topology);
    let receipts = shared_among(threads, requests, |client, turn, request| {
        let address = publishers[turn % publishers.len()];
        let mut last = String::new();
        let receipt = try_eventually("the receipt", Duration::from_mins(2), || {
            let body = json!({ "requestId": request });
            let answer = post(client, address, topology.root_key(), "propagation.getReceipt", &body)?;
            last = answer.text;
            let receipt = &answer.body["data"];
            let done = answer.status == 200 && receipt["final"] == true;
            Ok(done.then(|| (receipt["state"].clone(), receipt["position"].as_u64())))
        });
        let (state, position) = receipt.with_context(|| format!("the last receipt of {request}: {last}"))?;
        let position = position.with_context(|| format!("{request} has no position in the log"))?;
        ensure!(state == "confirmed" || state == "elapsed", "{request} ended as {state}");
        Ok((position, state == "confirmed"))
    })?;
    let positions: HashSet<u64> = receipts.iter().map(|(position, _)| *position).collect();
    ensure!(positions.len() == requests.len(), "two deletions share a position in the log");
    Ok(receipts.iter().filter(|(_, confirmed)| *confirmed).count())
}
