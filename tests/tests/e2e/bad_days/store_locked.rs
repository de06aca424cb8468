//! Somebody else's transaction locks the store, for a moment or for longer than a change waits.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::wait::throughout;
use serde_json::json;

use super::{DeletionRequest, ClientHistory, DeleteAnswer, wait_for_log};
use crate::world::{Caller, Key, World, count, plan, wait_for_readiness};

/// How long the publisher waits for somebody else's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Somebody who has begun to write to the store and doesn't end. Dropping it ends it, with nothing written.
pub(super) struct Lock(Child);

impl Lock {
    pub(super) fn take(world: &World) -> Result<Self> {
        // It ends with its input, and so with this process in any case.
        const SCRIPT: &str = "import sqlite3, sys\n\
            store = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)\n\
            store.execute('BEGIN IMMEDIATE')\n\
            print('locked', flush=True)\n\
            sys.stdin.read()\n\
            store.execute('ROLLBACK')";
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).arg(world.store()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("running python3, which stands for somebody else's SQL")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let lock = Self(child);
        ensure!(line == "locked\n", "the store couldn't be locked");
        Ok(lock)
    }

    /// Lets go. When this returns, the store is free.
    pub(super) fn release(mut self) -> Result<()> {
        drop(self.0.stdin.take());
        ensure!(self.0.wait()?.success(), "whoever locked the store failed");
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Deletes `keys`, all at the same time, while `meanwhile` goes on.
fn delete_while<'k, T>(
    world: &World,
    keys: &'k [Key],
    meanwhile: impl FnOnce() -> Result<T>,
) -> Result<(ClientHistory<'k>, T)> {
    let caller = Caller::new(world, world.publisher());
    thread::scope(|scope| {
        let clients: Vec<_> = keys
            .iter()
            .map(|key| (caller.clone(), key))
            .map(|(caller, key)| scope.spawn(move || DeletionRequest::of(&caller, key)))
            .collect();
        let outcome = meanwhile();
        let asked =
            clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        let story = ClientHistory(asked.collect::<Result<_>>()?);
        Ok((story, outcome?))
    })
}

/// Failure: a backup, or somebody's SQL, makes changes fail that could have waited for it.
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
    ensure!(story.0.iter().all(|asked| asked.took >= Duration::from_millis(900)), "nobody had to wait");
    println!("locked for {locked:?}");
    assert_eq!(count(world.publisher(), "evictd_publisher_requests_total", &[("class", "5xx")])?, 0);
    story.check(&world)?;
    world.assert_works()
}

/// Failure: who waits too long for the store is not answered at all, or is told that it was done; what only reads
/// waits too; the publisher looks well although nothing can be changed.
#[test]
fn changes_are_refused_during_a_long_lock_on_the_store() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let (keys, uncached) = (world.create_keys(4)?, world.create_key()?);
    let all: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&all)?;
    let lock = Lock::take(&world)?;
    let (story, ()) = delete_while(&world, &keys, || {
        // What only reads doesn't wait.
        world.call("keys.getKey", &json!({ "keyId": uncached.id }))?;
        world.wait_for_codes(&[&uncached], "VALID")?;
        let unready = wait_for_readiness(world.publisher(), 503)?;
        let told = unready["waitingFor"][0]["detail"].as_str().unwrap_or_default();
        ensure!(unready["waitingFor"][0]["condition"] == "store" && told.contains("locked"), "{unready}");
        world.wait_for_codes(&all, "VALID")?;
        lock.release()
    })?;
    // The first one has waited in vain. Those behind it have their own time.
    let refused = story.keys(DeleteAnswer::Unchanged);
    println!("{} were refused, {} done when it was free", refused.len(), story.count(DeleteAnswer::Deleted));
    ensure!(!refused.is_empty(), "nobody was refused");
    assert_eq!(refused.len() + story.count(DeleteAnswer::Deleted), keys.len());
    ensure!(
        story.0.iter().all(|asked| asked.took >= BUSY_TIMEOUT),
        "it was locked, and somebody didn't wait"
    );
    wait_for_log(&world, "database is locked")?;
    wait_for_readiness(world.publisher(), 200)?;
    let caller = Caller::new(&world, world.publisher());
    let again = refused.into_iter().map(|key| DeletionRequest::of(&caller, key)).collect::<Result<Vec<_>>>()?;
    ensure!(again.iter().all(|asked| asked.answer == DeleteAnswer::Deleted), "it is free, and somebody was refused");
    ClientHistory(story.0.into_iter().chain(again).collect()).check(&world)?;
    world.assert_works()
}
