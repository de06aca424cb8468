//! Probe rounds: what an agent's lease rests on (R7, R14).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::history::Claim;
use evictd_core::limits::PROBES_WAITING_PER_AGENT_MAX;
use evictd_core::position::LogPosition;
use evictd_core::roster::Instance;
use evictd_core::service::Standing;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::readiness::Condition;
use evictd_store::log::{Head, Round, RoundRequest};
use evictd_store::{LogStore, StoreError};
use evictd_wire::probe::{ProbeAnswer, ProbeRequest};
use evictd_wire::subject::{MessageKind, Requester};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::bus::{Bus, Envelope, Subscription};
use crate::config::AuthorityConfig;
use crate::log_output::LogOutput;
use crate::metrics::{PublisherMetrics, Refusal};
use crate::receipts::Membership;
use crate::shared::Shared;

pub(crate) struct Authority {
    pub(crate) config: AuthorityConfig,
    pub(crate) store: Arc<dyn LogStore>,
    pub(crate) bus: Bus,
    pub(crate) output: LogOutput,
    pub(crate) membership: Membership,
    /// Whether this publisher takes its share of queries: rounds succeed, and it may vouch.
    pub(crate) serving: watch::Sender<bool>,
    /// Whether rounds succeed.
    pub(crate) succeeding: watch::Sender<bool>,
    pub(crate) refusal_log: Mutex<RefusalLog>,
    /// Met from the first round that succeeds until rounds stall: changes are refused then, or not announced.
    pub(crate) condition: Condition,
    pub(crate) shared: Shared,
}

/// What waits for a round.
enum RoundClient {
    Agent(ReceivedProbe),
    /// This publisher itself, which gets no answer.
    Publisher,
}

struct ReceivedProbe {
    envelope: Envelope,
    request: ProbeRequest,
    arrived: LeaseTime,
}

struct RunningRound {
    probes: Vec<ReceivedProbe>,
    began: LeaseTime,
    /// The log's head when the round began.
    before: LogPosition,
    round: JoinHandle<Result<Round, StoreError>>,
}

/// What waits for the next round, and how many probes of each agent.
struct WaitingClients {
    rounds: Rounds<RoundClient>,
    of_agent: HashMap<Requester, usize>,
}

/// When each agent's refusal was last logged: one that forges claims must not fill the log.
#[derive(Debug, Default)]
pub(crate) struct RefusalLog(HashMap<Requester, LeaseTime>);

impl RefusalLog {
    const EVERY: Duration = Duration::from_mins(1);
    const AGENTS_MAX: usize = 1024;

    fn is_due(&mut self, requester: &Requester, now: LeaseTime) -> bool {
        if self.0.len() >= Self::AGENTS_MAX {
            self.0.retain(|_, logged| now.since(*logged) < Self::EVERY);
        }
        let is_due = self.0.get(requester).is_none_or(|logged| now.since(*logged) >= Self::EVERY);
        if is_due && self.0.len() < Self::AGENTS_MAX {
            self.0.insert(requester.clone(), now);
        }
        is_due
    }
}

impl Authority {
    /// Runs rounds until `shutdown`.
    pub(crate) async fn run(self, mut probes: Subscription, shutdown: CancellationToken) {
        let patience = Duration::from(self.config.round_patience);
        let rounds = Rounds::new(self.config.round_spacing.into(), self.config.probes_waiting_max);
        let mut waiting = WaitingClients { rounds, of_agent: HashMap::new() };
        let mut running: Option<RunningRound> = None;
        let mut standing = self.shared.vouching.watch();
        loop {
            let now = clock::lease_now();
            if running.is_none()
                && let Some(clients) = waiting.rounds.start(now)
            {
                waiting.of_agent.clear();
                running = Some(self.begin(clients, now));
            }
            let stalled = waiting.rounds.stalled(now, patience);
            self.shared.metrics.stalled(stalled);
            if stalled {
                self.condition.unmet("a probe round that succeeds; see the log for why they fail");
            }
            let takes_part = !stalled && self.shared.vouching.standing() == Standing::Serving;
            self.succeeding.send_if_modified(|flag| std::mem::replace(flag, !stalled) == stalled);
            self.serving.send_if_modified(|flag| std::mem::replace(flag, takes_part) != takes_part);
            probes.set_serving(takes_part).await;
            if (stalled || self.shared.fence.last().is_none()) && running.is_none() {
                // A publisher that left the queue groups may get no probe that would start a round. One that has just
                // started finds out whether it could answer.
                waiting.add_own(now);
            }
            let wait = waiting.rounds.start_at().map_or(patience, |due| due.since(now));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                done = finished(&mut running, &self.shared.metrics) => {
                    waiting.rounds.finish(done.1.is_some());
                    self.finish(done).await;
                }
                // Its sender outlives this task.
                Ok(()) = standing.changed() => {}
                () = self.shared.rounds.requested() => waiting.add_own(clock::lease_now()),
                Some(envelope) = probes.next() => {
                    if let Err(refusal) = self.add(&mut waiting, envelope).await {
                        probes.refuse(refusal);
                    }
                }
                () = tokio::time::sleep(wait) => {}
            }
        }
        if running.is_some() {
            // No other publisher sends the rows that it numbers.
            let done = finished(&mut running, &self.shared.metrics).await;
            self.finish(done).await;
            self.bus.flush().await;
        }
    }

    async fn add(&self, waiting: &mut WaitingClients, envelope: Envelope) -> Result<(), Refusal> {
        let arrived = clock::lease_now();
        let request = ProbeRequest::decode(&envelope.payload).map_err(|error| {
            tracing::debug!(%error, requester = %envelope.requester, "ignored a malformed probe");
            Refusal::Malformed
        })?;
        let of_agent = waiting.of_agent.entry(envelope.requester.clone()).or_default();
        if *of_agent >= PROBES_WAITING_PER_AGENT_MAX {
            return Err(Refusal::Overload);
        }
        self.membership.admit(&instance(&envelope, &request)).await?;
        *of_agent += 1;
        let probe = RoundClient::Agent(ReceivedProbe { envelope, request, arrived });
        waiting.rounds.add(probe, arrived).map_err(|_| Refusal::Overload)
    }

    /// Begins a round as a task of its own, so that probes are received while it runs.
    fn begin(&self, clients: Vec<RoundClient>, began: LeaseTime) -> RunningRound {
        let probes: Vec<ReceivedProbe> = clients
            .into_iter()
            .filter_map(|client| match client {
                RoundClient::Agent(probe) => Some(probe),
                RoundClient::Publisher => None,
            })
            .collect();
        let proved = probes.iter().filter_map(|probe| probe.request.seen.as_ref());
        let proved = proved.filter(|seen| self.shared.history.is_authentic(seen));
        let seen_epoch = proved.map(|seen| seen.milestone.at.epoch()).max().unwrap_or(0);
        let instances: Vec<Instance> =
            probes.iter().map(|probe| instance(&probe.envelope, &probe.request)).collect();
        let (store, membership) = (self.store.clone(), self.membership.clone());
        let round = tokio::spawn(async move {
            let seen = membership.take_seen().await;
            store.round(RoundRequest { instances: &instances, touched: &seen, seen_epoch }).await
        });
        RunningRound { probes, began, before: self.shared.head.current(), round }
    }

    async fn finish(&self, (running, done): (RunningRound, Option<Round>)) {
        let RunningRound { probes, began, before, .. } = running;
        let took = clock::lease_now().since(began);
        self.shared.metrics.round(done.is_some(), took, probes.len());
        // Without a round no probe is answered: the agents send it again, perhaps to another publisher.
        let Some(round) = done else { return };
        self.condition.met();
        let head = round.numbered.head;
        if let Some(cause) = round.began {
            tracing::warn!(
                head = %head.at, cause = cause.label(), incarnation = %head.incarnation,
                "new epoch began; agents flush once"
            );
        }
        if round.began.is_some() || round.schema_fault.is_some() {
            self.shared.wake.schema_suspect();
        }
        // First the rows up to the head that the answers name, or every agent would find a gap.
        self.output.numbered(before, &round.numbered).await;
        // Changes may go past the log, so nothing is proven (R3). Agents go on without a lease, by lookups.
        let is_proof = round.schema_fault.is_none();
        // Those that wait for the fence see what the round led to.
        self.shared.fence.raise(began, head.round);
        let mut admitted = Vec::with_capacity(probes.len());
        for probe in probes {
            if self.admits_past(&probe, &head).await {
                admitted.push(probe);
            }
        }
        if !self.shared.vouching.is_allowed() {
            return;
        }
        let voucher = self.shared.history.voucher(&head, head.at);
        for probe in admitted {
            // The round lay within this time, and the store's clock was read somewhere in a part of it. The rest counts
            // as time that the messages took.
            let held = clock::lease_now().since(probe.arrived).saturating_sub(round.clock.within);
            let store_time = round.clock.store_time_now();
            let answer =
                ProbeAnswer { nonce: probe.request.nonce, head: voucher, store_time, held, is_proof };
            self.bus.answer(probe.envelope.reply, answer.encode()).await;
        }
    }

    /// Returns whether the store holds what this agent has seen (R15, R16). If the store gave it out and doesn't hold it,
    /// this publisher falls silent.
    async fn admits_past(&self, probe: &ReceivedProbe, head: &Head) -> bool {
        let requester = &probe.envelope.requester;
        let seen = probe.request.seen.as_ref();
        let refusal = match self.shared.history.judge(seen, head).await {
            Ok(Claim::Admitted) => return true,
            Ok(Claim::Unproved) => {
                if self.refusal_log.lock().is_due(requester, clock::lease_now()) {
                    tracing::warn!(
                        %requester,
                        "refused an agent: this home store didn't give out what the agent claims to have seen. It \
                         follows another store, or forges the claim; if this store replaces that one, restart the agent"
                    );
                }
                Refusal::Unproved
            }
            Ok(Claim::Unknown) => {
                if let Some(seen) = seen {
                    self.shared.vouching.unknown_past(seen.milestone, &requester.to_string());
                    if let Err(error) = self.store.note_lost_epoch(seen.milestone.at.epoch()).await {
                        self.shared.metrics.store_failed(&error);
                    }
                }
                Refusal::UnknownPast
            }
            Err(error) => {
                self.shared.metrics.store_failed(&error);
                return false;
            }
        };
        self.shared.metrics.refused(MessageKind::Probe, refusal);
        false
    }
}

impl WaitingClients {
    /// Adds this publisher itself, unless something waits already: that round will do.
    fn add_own(&mut self, now: LeaseTime) {
        if self.rounds.waiting().is_empty() {
            // There is room when nothing waits.
            drop(self.rounds.add(RoundClient::Publisher, now));
        }
    }
}

fn instance(envelope: &Envelope, request: &ProbeRequest) -> Instance {
    let identity = envelope.identity(request.instance);
    Instance { identity, policy: request.policy, bound: request.bound }
}

/// Completes when the running round has ended, with `None` if it failed. Never completes while none runs.
async fn finished(
    running: &mut Option<RunningRound>,
    metrics: &PublisherMetrics,
) -> (RunningRound, Option<Round>) {
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
            tracing::error!(%error, "probe round panicked");
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
