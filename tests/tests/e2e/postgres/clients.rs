//! Clients that create and delete keys at all publishers, and verify them at all agents, while a test injects faults.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;

use super::Publishers;
use crate::world::{ApiClient, Key, World, assert_bounded};

/// The number of clients that create and delete keys. Besides, one client per agent verifies keys.
const CHANGING: usize = 3;

/// A key's history.
#[derive(Clone)]
struct KeyHistory {
    key: Key,
    /// A client has requested its deletion.
    doomed: bool,
    /// When the deletion was answered.
    deleted_at: Option<Instant>,
}

/// The histories of all keys.
pub(super) struct Fates(Vec<KeyHistory>);

impl Fates {
    pub(super) fn doomed(&self) -> Vec<&Key> {
        self.0.iter().filter(|fate| fate.doomed).map(|fate| &fate.key).collect()
    }

    pub(super) fn good(&self) -> Vec<&Key> {
        self.0.iter().filter(|fate| !fate.doomed).map(|fate| &fate.key).collect()
    }
}

/// The clients' shared state, and the bound that agents must keep.
pub(super) struct Clients {
    publishers: Publishers,
    agents: Vec<ApiClient>,
    api: String,
    bound: Duration,
    fates: Mutex<Vec<KeyHistory>>,
    over: AtomicBool,
}

impl Clients {
    pub(super) fn new(world: &World, bound: Duration) -> Self {
        Self {
            publishers: Publishers::of(world),
            agents: world.topology.agents().map(|agent| ApiClient::new(world, agent)).collect(),
            api: world.api.clone(),
            bound,
            fates: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Runs the clients while `meanwhile` runs. Fails if `meanwhile` does, or if a client got a wrong answer.
    pub(super) fn work_while<T>(&self, meanwhile: impl FnOnce() -> Result<T>) -> Result<T> {
        let (outcome, answers) = thread::scope(|scope| {
            let changing: Vec<_> =
                (0..CHANGING).map(|client| scope.spawn(move || self.create_and_delete(client))).collect();
            let verifying: Vec<_> =
                self.agents.iter().map(|agent| scope.spawn(|| self.verify(agent))).collect();
            let outcome = meanwhile();
            self.over.store(true, Ordering::Relaxed);
            // An error of `meanwhile` explains the clients' errors, so it comes first.
            let outcome = outcome?;
            for client in changing {
                client.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            let mut answers = 0;
            for client in verifying {
                answers += client.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            Ok::<_, anyhow::Error>((outcome, answers))
        })?;
        let fates = self.fates()?;
        let doomed = fates.doomed().len();
        println!("{} keys, {doomed} of them deleted; {answers} answers", fates.0.len());
        ensure!(doomed > 50 && answers > 500, "too little has happened for a test");
        Ok(outcome)
    }

    pub(super) fn fates(&self) -> Result<Fates> {
        self.with_fates(|fates| Fates(fates.clone()))
    }

    fn with_fates<T>(&self, work: impl FnOnce(&mut Vec<KeyHistory>) -> T) -> Result<T> {
        Ok(work(&mut *self.fates.lock().map_err(|_| anyhow!("a client panicked"))?))
    }

    /// Creates keys, and deletes three of four a moment later, when agents may have cached them.
    fn create_and_delete(&self, client: usize) -> Result<()> {
        let mut mine = Vec::new();
        for turn in 0.. {
            if self.over.load(Ordering::Relaxed) {
                break;
            }
            let key = self.publishers.create_key(client + turn, &self.api)?;
            mine.push(self.with_fates(|fates| {
                fates.push(KeyHistory { key, doomed: false, deleted_at: None });
                fates.len() - 1
            })?);
            let earlier = mine.len().checked_sub(3).map(|at| mine[at]);
            if let Some(index) = earlier.filter(|_| turn % 4 != 0) {
                self.delete(client + turn, index)?;
            }
        }
        Ok(())
    }

    fn delete(&self, first: usize, index: usize) -> Result<()> {
        let id = self.with_fates(|fates| {
            fates[index].doomed = true;
            fates[index].key.id.clone()
        })?;
        let answer = self.publishers.call(first, "keys.deleteKey", &json!({ "keyId": id }), &[])?;
        // 404: an earlier try without an answer was carried out.
        ensure!([200, 404].contains(&answer.status), "{id} was answered {}: {}", answer.status, answer.text);
        self.with_fates(|fates| fates[index].deleted_at = Some(Instant::now()))
    }

    /// Verifies the newest keys at one agent repeatedly, and checks each answer against the bound (G1). Returns the
    /// number of answers.
    fn verify(&self, agent: &ApiClient) -> Result<usize> {
        let mut answers = 0;
        while !self.over.load(Ordering::Relaxed) {
            let newest = self.with_fates(|fates| fates.iter().rev().take(60).cloned().collect::<Vec<_>>())?;
            for fate in newest {
                let sent_at = Instant::now();
                let Ok(code) = agent.code(&fate.key) else { continue };
                answers += 1;
                if let Some(deleted_at) = fate.deleted_at {
                    assert_bounded(sent_at, deleted_at, self.bound, &code).context(fate.key.id.clone())?;
                }
            }
        }
        Ok(answers)
    }
}
