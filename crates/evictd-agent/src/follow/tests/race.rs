//! A load, an invalidation and a verification race on threads of their own (G2).
//!
//! `loom` checks every interleaving of the core's steps. This checks that the agent's code takes those steps.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash};
use evictd_core::record::{KeyRecord, Record};
use tokio::runtime::{Builder, Handle};

use super::*;
use crate::cache::CachedRecord;
use crate::fixture::loaded;
use crate::loads::Loads;
use crate::metrics::LoadOutcome;
use crate::origin::LoadError;
use crate::origin::{LoadedRecord, Origin};
use crate::verify::Verifier;

const TRIALS: u64 = 20_000;

/// The largest shift between load and invalidation. Each trial has another one.
const SHIFT_MAX: u64 = 200;

/// A home region with one key that changes all the time. Its name is the position as of which it was read.
#[derive(Debug)]
struct RacingHome {
    head: AtomicU64,
    /// The load of a trial is about to read. Its other loads are not delayed.
    expected: AtomicBool,
    has_read: AtomicBool,
}

#[async_trait]
impl Origin for RacingHome {
    async fn lookup(&self, _: KeyHash) -> Result<LoadedRecord, (LoadOutcome, LoadError)> {
        let read_at = clock::lease_now();
        let head = self.head.load(Ordering::SeqCst);
        if self.expected.swap(false, Ordering::SeqCst) {
            self.has_read.store(true, Ordering::SeqCst);
            spin(head * 7 % SHIFT_MAX);
        }
        let name = Some(head.to_string().into_boxed_str());
        let record = Record::Key(KeyRecord { name, ..key("key_1") });
        Ok(loaded(at(head), record, read_at))
    }
}

fn spin(rounds: u64) {
    (0..rounds).for_each(|_| spin_loop());
}

fn position_of(entry: &CachedRecord) -> u64 {
    match &entry.record {
        Record::Key(key) => key.name.as_deref().unwrap_or_default().parse().unwrap(),
        other => panic!("not the key: {other:?}"),
    }
}

/// Completed trials of each thread. No thread waits for one that failed.
#[derive(Default)]
struct RaceProgress {
    loads: AtomicU64,
    invalidations: AtomicU64,
    verifications: AtomicU64,
    failed: AtomicBool,
}

impl RaceProgress {
    fn wait_until(&self, met: impl Fn() -> bool) {
        while !met() {
            assert!(!self.failed.load(Ordering::SeqCst), "another thread failed");
            thread::yield_now();
        }
    }

    /// Runs `each` for the position of each trial, after all threads completed the trial before. Counts in `own`.
    fn trials(&self, own: &AtomicU64, mut each: impl FnMut(u64)) {
        let _attendance = Attendance(self);
        for done in 0..TRIALS {
            let all = [&self.loads, &self.invalidations, &self.verifications];
            self.wait_until(|| all.iter().all(|count| count.load(Ordering::SeqCst) >= done));
            each(BASE + 1 + done);
            own.fetch_add(1, Ordering::SeqCst);
        }
    }
}

struct Attendance<'a>(&'a RaceProgress);

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.failed.store(true, Ordering::SeqCst);
        }
    }
}

struct Race {
    agent: TestAgent,
    home: Arc<RacingHome>,
    loads: Loads,
    verifier: Verifier,
    progress: RaceProgress,
}

impl Race {
    fn new() -> Self {
        let agent = TestAgent::live();
        let home = Arc::new(RacingHome {
            head: AtomicU64::new(BASE),
            expected: AtomicBool::new(true),
            has_read: AtomicBool::new(false),
        });
        let loads = agent.parts.loads(None, home.clone());
        let verifier = agent.parts.verifier(loads.clone());
        Self { agent, home, loads, verifier, progress: RaceProgress::default() }
    }

    fn load(&self, runtime: &Handle) {
        self.progress.trials(&self.progress.loads, |_| {
            let began = self.agent.serving.begin();
            runtime.block_on(self.loads.load(hash("alice"), began)).unwrap();
        });
    }

    fn invalidate(&self, feed: &Feed, runtime: &Handle) {
        let mut task = task(&self.agent);
        self.progress.trials(&self.progress.invalidations, |position| {
            // A key is evicted; an API only has a floor, which the hot path must check.
            let scope = match position % 2 {
                0 => key_scope(hash("alice")),
                _ => Scope::Api(ApiId::new("api_1")),
            };
            let payload = live(&[row(at(position), scope)]);
            self.progress.wait_until(|| self.home.has_read.swap(false, Ordering::SeqCst));
            spin(position * 11 % SHIFT_MAX);
            self.home.head.store(position, Ordering::SeqCst);
            task.on_live(&payload);
            runtime.block_on(task.poll_and_perform(feed));
        });
    }

    /// Counts verifications that began after the confirmation of a position and returned an older record.
    fn verify(&self, runtime: &Handle) -> usize {
        let mut stale = 0;
        self.progress.trials(&self.progress.verifications, |position| {
            // Some begin while the load completes, some after it.
            if position % 4 < 2 {
                let trial = position - BASE;
                self.progress.wait_until(|| self.progress.loads.load(Ordering::SeqCst) == trial);
            }
            self.progress.wait_until(|| self.agent.serving.applied() >= at(position));
            let entry = runtime.block_on(self.verifier.entry(hash("alice"))).unwrap().entry;
            stale += usize::from(position_of(&entry) < position);
            self.home.expected.store(true, Ordering::SeqCst);
        });
        stale
    }
}

#[test]
fn no_verification_after_the_confirmation_gets_the_old_record() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (race, handle) = (Race::new(), runtime.handle());
    let feed = handle.block_on(disconnected_feed(&race.agent));
    let stale = thread::scope(|scope| {
        scope.spawn(|| race.load(handle));
        scope.spawn(|| race.invalidate(&feed, handle));
        scope.spawn(|| race.verify(handle)).join().unwrap()
    });
    assert_eq!(stale, 0, "of {TRIALS} trials");
    assert_eq!(race.agent.serving.applied(), at(BASE + TRIALS));
}
