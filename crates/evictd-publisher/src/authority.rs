//! Probe rounds: what an agent's lease rests on (R7, R14).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::ids::Identity;
use evictd_core::limits::{NAMESAKES_MAX, PROBES_WAITING_PER_AGENT_MAX};
use evictd_core::position::LogPosition;
use evictd_core::roster::Instance;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::readiness::Condition;
use evictd_store::log::{Round, RoundRequest};
use evictd_store::{HomeStore, StoreError};
use evictd_wire::probe::{ProbeAnswer, ProbeRequest};
use evictd_wire::subject::Speaker;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::bus::{Heard, Intake};
use crate::config::AuthorityConfig;
use crate::live_feed::LiveFeed;
use crate::metrics::{Metrics, Refusal};
use crate::sequencer::Wake;

/// A question starts a round if the last one is older: what isn't vouched for anew is soon worth nothing.
pub(crate) const FENCE_AGE_MAX: Duration = Duration::from_secs(1);

/// How long a verification at home waits for a round.
const VOUCHING_PATIENCE: Duration = Duration::from_secs(2);

/// When the last successful round began. Lookups carry its age: what they read may come from a primary
/// that was demoted since.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fence(Arc<AtomicU64>);

impl Fence {
    /// Decades if there was no round yet: nothing is vouched for.
    pub(crate) fn age(&self) -> Duration {
        clock::lease_now().since(LeaseTime(self.0.load(Ordering::Acquire)))
    }

    /// `None` if there was no round yet.
    pub(crate) fn raised_ago(&self) -> Option<Duration> {
        (self.0.load(Ordering::Acquire) > 0).then(|| self.age())
    }

    pub(crate) fn raised(&self, began: LeaseTime) {
        self.0.fetch_max(began.0, Ordering::AcqRel);
    }
}

/// How others ask for a round: there may be nobody who probes here, and yet something that rests on rounds.
#[derive(Clone, Debug, Default)]
pub(crate) struct RoundWish(Arc<Notify>);

impl RoundWish {
    /// A round is wanted; several wishes are one round.
    pub(crate) fn want(&self) {
        self.0.notify_one();
    }

    /// Returns when one is wanted.
    pub(crate) async fn wanted(&self) {
        self.0.notified().await;
    }
}

/// What this publisher's own verifications rest on, as an agent's do on its lease: a database that was demoted, or
/// put back, goes on being readable, and alone doesn't know.
#[derive(Clone, Debug)]
pub(crate) struct Vouched {
    pub(crate) fence: Fence,
    pub(crate) rounds: RoundWish,
    /// How old the last round may be.
    pub(crate) trust: Duration,
}

impl Vouched {
    /// Whether a round is young enough to vouch for what is read from now on. Has one made if need be, and waits for
    /// it a while.
    pub(crate) async fn is_young(&self) -> bool {
        if self.fence.age() > FENCE_AGE_MAX {
            self.rounds.want();
        }
        let patience = tokio::time::Instant::now() + VOUCHING_PATIENCE;
        let mut look = tokio::time::interval(Duration::from_millis(5));
        while self.fence.age() >= self.trust {
            if tokio::time::Instant::now() >= patience {
                return false;
            }
            look.tick().await;
        }
        true
    }
}

/// Whether this publisher takes its share of questions (R14), as those see it who answer them.
#[derive(Clone, Debug)]
pub(crate) struct Serving(watch::Receiver<bool>);

impl Serving {
    /// The next message. Meanwhile the intake leaves and joins its queue group as it is told.
    pub(crate) async fn next(&mut self, intake: &mut Intake) -> Option<Heard> {
        loop {
            let serving = *self.0.borrow_and_update();
            intake.set_serving(serving).await;
            tokio::select! {
                heard = intake.next() => return heard,
                // Whoever decides it has ended at a shutdown, and then nothing changes any more.
                Ok(()) = self.0.changed() => {}
            }
        }
    }
}

pub(crate) struct Authority {
    pub(crate) config: AuthorityConfig,
    pub(crate) store: Arc<dyn HomeStore>,
    pub(crate) feed: LiveFeed,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) fence: Fence,
    pub(crate) rounds: RoundWish,
    pub(crate) wake: Wake,
    pub(crate) serving: watch::Sender<bool>,
    /// Met from the first round that succeeds, unless rounds don't any more: what changes here is refused then, or not
    /// announced.
    pub(crate) condition: Condition,
}

/// Somebody who waits for a round.
enum Asker {
    Agent(Probe),
    /// This publisher itself; nobody is answered.
    Publisher,
}

struct Probe {
    heard: Heard,
    request: ProbeRequest,
    arrived: LeaseTime,
}

struct Running {
    probes: Vec<Probe>,
    began: LeaseTime,
    /// The head as it was known before.
    known: LogPosition,
    round: JoinHandle<Result<Round, StoreError>>,
}

/// Who waits for the next round, and how many of each agent.
struct Waiting {
    rounds: Rounds<Asker>,
    of_agent: HashMap<Speaker, usize>,
}

impl Authority {
    /// The same for those who answer replays and lookups.
    pub(crate) fn serving(&self) -> Serving {
        Serving(self.serving.subscribe())
    }

    /// Runs rounds until `shutdown`.
    pub(crate) async fn run(self, mut probes: Intake, shutdown: CancellationToken) {
        let patience = Duration::from(self.config.round_patience);
        let rounds = Rounds::new(self.config.round_spacing.into(), self.config.probes_waiting_max);
        let mut waiting = Waiting { rounds, of_agent: HashMap::new() };
        let mut running: Option<Running> = None;
        loop {
            let now = clock::lease_now();
            if running.is_none()
                && let Some(askers) = waiting.rounds.start(now)
            {
                waiting.of_agent.clear();
                running = Some(self.begin(askers, now));
            }
            let stalled = waiting.rounds.stalled(now, patience);
            self.metrics.stalled(stalled);
            if stalled {
                self.condition.unmet("a probe round that succeeds; see the log for why they fail");
            }
            self.serving.send_if_modified(|serving| std::mem::replace(serving, !stalled) == stalled);
            probes.set_serving(!stalled).await;
            let never = self.fence.raised_ago().is_none();
            if (stalled || never) && running.is_none() {
                // Who left the queue groups may be asked by nobody any more, and must find back by itself. Who has
                // just started finds out whether it could answer.
                waiting.wish(now);
            }
            let wait = match waiting.rounds.start_at() {
                Some(due) => due.since(now),
                None => patience,
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                done = finished(&mut running, &self.metrics) => {
                    waiting.rounds.finish(done.1.is_some());
                    self.finish(done).await;
                }
                () = self.rounds.wanted() => waiting.wish(clock::lease_now()),
                Some(heard) = probes.next() => self.add(&mut waiting, heard, &probes),
                () = tokio::time::sleep(wait) => {}
            }
        }
        if running.is_some() {
            // What it numbers is sent by nobody else.
            let done = finished(&mut running, &self.metrics).await;
            self.finish(done).await;
            self.feed.bus.flush().await;
        }
    }

    fn add(&self, waiting: &mut Waiting, heard: Heard, intake: &Intake) {
        let arrived = clock::lease_now();
        match ProbeRequest::decode(&heard.payload) {
            Ok(request) => {
                let instance = instance(&heard, &request);
                if let Err(refusal) = self.admits(&instance) {
                    return intake.refuse(refusal);
                }
                let of_agent = waiting.of_agent.entry(heard.speaker.clone()).or_default();
                if *of_agent >= PROBES_WAITING_PER_AGENT_MAX {
                    return intake.refuse(Refusal::Overload);
                }
                *of_agent += 1;
                self.feed.receipts.probed(&instance);
                let probe = Asker::Agent(Probe { heard, request, arrived });
                if waiting.rounds.add(probe, arrived).is_err() {
                    intake.refuse(Refusal::Overload);
                }
            }
            Err(error) => {
                tracing::debug!(%error, speaker = %heard.speaker, "ignored a probe");
                intake.refuse(Refusal::Malformed);
            }
        }
    }

    /// Whether this process may have a lease: receipts have to wait for whoever has one.
    fn admits(&self, instance: &Instance) -> Result<(), Refusal> {
        let Instance { identity, bound, .. } = instance;
        let receipts = &self.feed.receipts;
        if *bound > receipts.bound() {
            tracing::warn!(
                region = %identity.region, agent = %identity.agent, ?bound, limit = ?receipts.bound(),
                "refused an agent whose lease.bound is above this publisher's receipts.bound; make one of them fit"
            );
            return Err(Refusal::Bound);
        }
        if receipts.namesakes(identity) >= NAMESAKES_MAX {
            tracing::warn!(
                region = %identity.region, agent = %identity.agent,
                "refused a process: too many run under one agent's name; give each its own"
            );
            return Err(Refusal::Overload);
        }
        Ok(())
    }

    /// The round is a task of its own, so that probes are taken in while it runs.
    fn begin(&self, askers: Vec<Asker>, began: LeaseTime) -> Running {
        let probes: Vec<Probe> = askers
            .into_iter()
            .filter_map(|asker| match asker {
                Asker::Agent(probe) => Some(probe),
                Asker::Publisher => None,
            })
            .collect();
        let known = self.feed.receipts.log_head();
        // This publisher has seen something, too: should the store be behind it, it went back (R2).
        let seen: Vec<LogPosition> = probes.iter().map(|probe| probe.request.seen).chain([known]).collect();
        let instances: Vec<Instance> =
            probes.iter().map(|probe| instance(&probe.heard, &probe.request)).collect();
        let touched = self.feed.receipts.take_heard();
        let store = self.store.clone();
        let round = tokio::spawn(async move {
            store.round(RoundRequest { instances: &instances, touched: &touched, seen: &seen }).await
        });
        Running { probes, began, known, round }
    }

    async fn finish(&self, (Running { probes, began, known, .. }, done): (Running, Option<Round>)) {
        let took = clock::lease_now().since(began);
        self.metrics.round(done.is_some(), took, probes.len());
        // Without a round nobody is answered: the agents ask again, and perhaps somebody else.
        let Some(round) = done else { return };
        self.fence.raised(began);
        self.condition.met();
        let head = round.numbered.head;
        if round.epoch_began {
            tracing::warn!(
                %head,
                "a new epoch began: more of the log had been seen than the home store holds, or its schema was \
                 altered; agents flush once"
            );
        }
        if round.epoch_began || round.schema_fault.is_some() {
            self.wake.schema_suspect();
        }
        // First what the answers speak of, or every agent would find a gap in it.
        self.feed.send(known, &round.numbered).await;
        if round.schema_fault.is_some() {
            // What isn't in the log can't be vouched for (R3). Agents go on without a lease, by lookups.
            return;
        }
        for probe in probes {
            // The round lay within this time, and the store's clock was read somewhere in a part of it: what that
            // leaves open must stay with the agent's ways.
            let held = clock::lease_now().since(probe.arrived).saturating_sub(round.clock.within);
            let store_time = round.clock.store_time_now();
            let answer = ProbeAnswer { nonce: probe.request.nonce, head, store_time, held };
            self.feed.bus.answer(probe.heard.reply, answer.encode()).await;
        }
    }
}

impl Waiting {
    /// This publisher wants a round. One that somebody waits for already will do.
    fn wish(&mut self, now: LeaseTime) {
        if self.rounds.waiting().is_empty() {
            // It is never full when nobody waits.
            drop(self.rounds.add(Asker::Publisher, now));
        }
    }
}

fn instance(heard: &Heard, request: &ProbeRequest) -> Instance {
    let identity = Identity {
        region: heard.speaker.region.clone(),
        agent: heard.speaker.agent.clone(),
        instance: request.instance,
    };
    Instance { identity, policy: request.policy, bound: request.bound }
}

/// The running round's end, `None` if it failed; never, while none runs.
async fn finished(running: &mut Option<Running>, metrics: &Metrics) -> (Running, Option<Round>) {
    let done = match running.as_mut() {
        Some(current) => (&mut current.round).await,
        None => std::future::pending().await,
    };
    let round = match done {
        Ok(Ok(round)) => Some(round),
        Ok(Err(error)) => {
            metrics.store_failed(&error);
            None
        }
        Err(error) => {
            tracing::error!(%error, "a probe round failed");
            None
        }
    };
    match running.take() {
        Some(current) => (current, round),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
