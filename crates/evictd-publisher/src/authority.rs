//! Probe rounds: what an agent's lease rests on (R7, R14).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::history::Claim;
use evictd_core::ids::Identity;
use evictd_core::limits::{DUPLICATE_INSTANCES_MAX, PROBES_WAITING_PER_AGENT_MAX};
use evictd_core::position::LogPosition;
use evictd_core::roster::Instance;
use evictd_core::service::Standing;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::readiness::Condition;
use evictd_store::log::{Head, Round, RoundRequest};
use evictd_store::{LogStore, StoreError};
use evictd_wire::probe::{ProbeAnswer, ProbeRequest};
use evictd_wire::subject::{Kind, Speaker};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::bus::{Heard, Intake};
use crate::config::AuthorityConfig;
use crate::live_feed::LiveFeed;
use crate::metrics::{Metrics, Refusal};
use crate::rounds::{Fence, RoundWish};
use crate::sequencer::Wake;

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
    pub(crate) store: Arc<dyn LogStore>,
    pub(crate) feed: LiveFeed,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) fence: Fence,
    pub(crate) rounds: RoundWish,
    pub(crate) wake: Wake,
    /// Whether this publisher takes its share of questions: rounds succeed, and it may vouch.
    pub(crate) serving: watch::Sender<bool>,
    /// Whether rounds succeed.
    pub(crate) succeeding: watch::Sender<bool>,
    /// When agents were last complained of.
    pub(crate) complaints: Mutex<Complaints>,
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

/// When each agent was last complained of: one that lies must not fill the log.
#[derive(Debug, Default)]
pub(crate) struct Complaints(HashMap<Speaker, LeaseTime>);

impl Complaints {
    const EVERY: Duration = Duration::from_mins(1);
    const AGENTS_MAX: usize = 1024;

    fn is_due(&mut self, speaker: &Speaker, now: LeaseTime) -> bool {
        if self.0.len() >= Self::AGENTS_MAX {
            self.0.retain(|_, told| now.since(*told) < Self::EVERY);
        }
        let is_due = self.0.get(speaker).is_none_or(|told| now.since(*told) >= Self::EVERY);
        if is_due && self.0.len() < Self::AGENTS_MAX {
            self.0.insert(speaker.clone(), now);
        }
        is_due
    }
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
        let mut standing = self.feed.vouching.watch();
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
            let takes_part = !stalled && self.feed.vouching.standing() == Standing::Serving;
            set(&self.succeeding, !stalled);
            set(&self.serving, takes_part);
            probes.set_serving(takes_part).await;
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
                // Whoever tells of it outlives this task.
                Ok(()) = standing.changed() => {}
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
        if receipts.duplicate_instances(identity) >= DUPLICATE_INSTANCES_MAX {
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
        let history = &self.feed.history;
        let proved = probes.iter().filter_map(|probe| probe.request.seen.as_ref());
        let proved = proved.filter(|seen| history.is_authentic(seen)).map(|seen| seen.milestone.at.epoch());
        let seen_epoch = proved.max().unwrap_or(0);
        let instances: Vec<Instance> =
            probes.iter().map(|probe| instance(&probe.heard, &probe.request)).collect();
        let touched = self.feed.receipts.take_heard();
        let store = self.store.clone();
        let round = tokio::spawn(async move {
            store.round(RoundRequest { instances: &instances, touched: &touched, seen_epoch }).await
        });
        Running { probes, began, known, round }
    }

    async fn finish(&self, (Running { probes, began, known, .. }, done): (Running, Option<Round>)) {
        let took = clock::lease_now().since(began);
        self.metrics.round(done.is_some(), took, probes.len());
        // Without a round nobody is answered: the agents ask again, and perhaps somebody else.
        let Some(round) = done else { return };
        self.condition.met();
        let head = round.numbered.head;
        if let Some(cause) = round.began {
            tracing::warn!(
                head = %head.at, cause = cause.label(), incarnation = %head.incarnation,
                "a new epoch began; agents flush once"
            );
        }
        if round.began.is_some() || round.schema_fault.is_some() {
            self.wake.schema_suspect();
        }
        // First what the answers speak of, or every agent would find a gap in it.
        self.feed.send(known, &round.numbered).await;
        // What isn't in the log can't be vouched for (R3). Agents go on without a lease, by lookups.
        let is_proof = round.schema_fault.is_none();
        // Whoever takes it for a sign of life sees what the round led to.
        self.fence.raised(began, head.round);
        let mut admitted = Vec::with_capacity(probes.len());
        for probe in probes {
            if self.admits_past(&probe, &head).await {
                admitted.push(probe);
            }
        }
        if !self.feed.vouching.is_allowed() {
            return;
        }
        let voucher = self.feed.history.voucher(&head, head.at);
        for probe in admitted {
            // The round lay within this time, and the store's clock was read somewhere in a part of it: what that
            // leaves open must stay with the agent's ways.
            let held = clock::lease_now().since(probe.arrived).saturating_sub(round.clock.within);
            let store_time = round.clock.store_time_now();
            let answer =
                ProbeAnswer { nonce: probe.request.nonce, head: voucher, store_time, held, is_proof };
            self.feed.bus.answer(probe.heard.reply, answer.encode()).await;
        }
    }

    /// Whether the store knows what this agent has seen (R15, R16). If the store gave it out and doesn't know it, this
    /// publisher falls silent.
    async fn admits_past(&self, probe: &Probe, head: &Head) -> bool {
        let speaker = &probe.heard.speaker;
        let seen = probe.request.seen.as_ref();
        let refusal = match self.feed.history.judge(seen, head).await {
            Ok(Claim::Admitted) => return true,
            Ok(Claim::Unproved) => {
                if self.complaints.lock().is_due(speaker, clock::lease_now()) {
                    tracing::warn!(
                        %speaker,
                        "refused an agent: what it claims to have seen was not given out by this home store. It \
                         follows another store, or it forges; if this store replaces that one, restart the agent"
                    );
                }
                Refusal::Unproved
            }
            Ok(Claim::Unknown) => {
                if let Some(seen) = seen {
                    self.feed.vouching.unknown_past(seen.milestone, &speaker.to_string());
                    if let Err(error) = self.store.note_lost_epoch(seen.milestone.at.epoch()).await {
                        self.metrics.store_failed(&error);
                    }
                }
                Refusal::UnknownPast
            }
            Err(error) => {
                self.metrics.store_failed(&error);
                return false;
            }
        };
        self.metrics.refused(Kind::Probe, refusal);
        false
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

fn set(flag: &watch::Sender<bool>, value: bool) {
    flag.send_if_modified(|flag| std::mem::replace(flag, value) != value);
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
