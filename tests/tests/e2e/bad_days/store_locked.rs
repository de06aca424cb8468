//! Another process's transaction locks the store, for a moment or for longer than a change waits.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::json;

use super::{ClientHistory, DeleteAnswer, DeletionRequest, wait_for_log};
use crate::world::{ApiClient, Key, SOON, World, count, plan, wait_for_readiness};

/// How long the publisher waits for another process's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// An open write transaction of another process. Dropping it rolls it back.
pub(super) struct Lock(Child);

impl Lock {
    pub(super) fn take(world: &World) -> Result<Self> {
        // It ends with its input, and so with this process.
        const SCRIPT: &str = "import sqlite3, sys\n\
            store = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)\n\
            store.execute('BEGIN IMMEDIATE')\n\
            print('locked', flush=True)\n\
            sys.stdin.read()\n\
            store.execute('ROLLBACK')";
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).arg(world.store()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("running python3")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let lock = Self(child);
        ensure!(line == "locked\n", "the store couldn't be locked");
        Ok(lock)
    }

    /// Releases the lock. When this returns, the store is free.
    pub(super) fn release(mut self) -> Result<()> {
        drop(self.0.stdin.take());
        ensure!(self.0.wait()?.success(), "the locking process failed");
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Deletes `keys` concurrently while `meanwhile` runs.
fn delete_while<'k, T>(
    world: &World,
    keys: &'k [Key],
    meanwhile: impl FnOnce() -> Result<T>,
) -> Result<(ClientHistory<'k>, T)> {
    let caller = ApiClient::new(world, world.publisher());
    thread::scope(|scope| {
        let clients: Vec<_> = keys
            .iter()
            .map(|key| (caller.clone(), key))
            .map(|(caller, key)| scope.spawn(move || DeletionRequest::of(&caller, key)))
            .collect();
        let outcome = meanwhile();
        let requests =
            clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        let story = ClientHistory(requests.collect::<Result<_>>()?);
        Ok((story, outcome?))
    })
}

/// Failure: a backup or another process's SQL makes changes fail that could have waited.
#[test]
fn changes_wait_for_a_short_lock_on_the_store() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let keys = world.create_keys(16)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let lock = Lock::take(&world)?;
    let ((story, ()), locked) = {
        let began = Instant::now();
        let done = delete_while(&world, &keys, || {
            throughout(Duration::from_secs(1), || world.wait_for_codes(&[&keys[0]], "VALID"))?;
            lock.release()
        })?;
        (done, began.elapsed())
    };
    assert_eq!(story.count(DeleteAnswer::Deleted), 16);
    let waited = story.0.iter().all(|request| request.took >= Duration::from_millis(900));
    ensure!(waited, "a deletion didn't wait for the lock");
    println!("locked for {locked:?}");
    assert_eq!(count(world.publisher(), "evictd_publisher_requests_total", &[("class", "5xx")])?, 0);
    story.check(&world)?;
    world.assert_works()
}

/// Failure: a change that waits too long gets no answer, or success. Or reads wait as well. Or the publisher looks
/// ready although it can't change anything.
#[test]
fn changes_are_refused_during_a_long_lock_on_the_store() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let (keys, uncached) = (world.create_keys(4)?, world.create_key()?);
    let all: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&all)?;
    let lock = Lock::take(&world)?;
    let (story, ()) = delete_while(&world, &keys, || {
        // Reads don't wait.
        world.call("keys.getKey", &json!({ "keyId": uncached.id }))?;
        world.wait_for_codes(&[&uncached], "VALID")?;
        // A round that takes too long may be named before.
        try_eventually("the publisher to name its store", SOON, || {
            let unready = wait_for_readiness(world.publisher(), 503)?;
            let first = &unready["waitingFor"][0];
            let detail = first["detail"].as_str().unwrap_or_default();
            Ok((first["condition"] == "store" && detail.contains("locked")).then_some(()))
        })?;
        world.wait_for_codes(&all, "VALID")?;
        lock.release()
    })?;
    // The first one has timed out. The others wait with their own timeouts, and may succeed.
    let refused = story.keys(DeleteAnswer::Unchanged);
    println!("{} were refused, {} done when it was free", refused.len(), story.count(DeleteAnswer::Deleted));
    ensure!(!refused.is_empty(), "no deletion was refused");
    assert_eq!(refused.len() + story.count(DeleteAnswer::Deleted), keys.len());
    ensure!(
        story.0.iter().all(|request| request.took >= BUSY_TIMEOUT),
        "a deletion didn't wait for the lock"
    );
    wait_for_log(&world, "database is locked")?;
    wait_for_readiness(world.publisher(), 200)?;
    let caller = ApiClient::new(&world, world.publisher());
    let again =
        refused.into_iter().map(|key| DeletionRequest::of(&caller, key)).collect::<Result<Vec<_>>>()?;
    let all_deleted = again.iter().all(|request| request.answer == DeleteAnswer::Deleted);
    ensure!(all_deleted, "the store is free, and a deletion was refused");
    ClientHistory(story.0.into_iter().chain(again).collect()).check(&world)?;
    world.assert_works()
}
