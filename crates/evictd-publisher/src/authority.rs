//! Probe rounds: what an agent's lease rests on (R7, R14).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::ids::Identity;
use evictd_core::limits::PROBES_WAITING_PER_AGENT_MAX;
use evictd_core::position::LogPosition;
use evictd_core::roster::Instance;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_store::log::Round;
use evictd_store::{HomeStore, StoreError};
use evictd_wire::probe::{ProbeAnswer, ProbeRequest};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::auth::store_failed;
use crate::bus::{Heard, Intake};
use crate::config::AuthorityConfig;
use crate::live_feed::LiveFeed;
use crate::metrics::{Metrics, Refusal};

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

    fn raised(&self, began: LeaseTime) {
        self.0.fetch_max(began.0, Ordering::AcqRel);
    }
}

pub(crate) struct Authority {
    pub(crate) config: AuthorityConfig,
    pub(crate) store: Arc<dyn HomeStore>,
    pub(crate) feed: LiveFeed,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) fence: Fence,
}

struct Probe {
    heard: Heard,
    request: ProbeRequest,
    arrived: LeaseTime,
}

struct Running {
    probes: Vec<Probe>,
    began: LeaseTime,
    round: JoinHandle<Result<Round, StoreError>>,
}

impl Authority {
    /// Runs rounds until `shutdown`. `probes` come through the queue group; `any` to every publisher.
    pub(crate) async fn run(self, mut probes: Intake, mut any: Intake, shutdown: CancellationToken) {
        let patience = Duration::from(self.config.round_patience);
        let mut rounds = Rounds::new(self.config.round_spacing.into(), self.config.probes_waiting_max);
        let mut running: Option<Running> = None;
        loop {
            let now = clock::lease_now();
            if running.is_none() {
                running = rounds.start(now).map(|probes| self.begin(probes, now));
            }
            self.keep_silent(&mut probes, rounds.stalled(now, patience)).await;
            let wait = match rounds.start_at() {
                Some(due) => due.since(now),
                None => patience,
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                done = finished(&mut running) => {
                    rounds.finish(done.1.is_some());
                    self.finish(done).await;
                }
                Some(heard) = probes.next() => self.add(&mut rounds, heard, &probes),
                Some(heard) = any.next() => self.add(&mut rounds, heard, &any),
                () = tokio::time::sleep(wait) => {}
            }
        }
        if running.is_some() {
            // What it numbers is sent by nobody else.
            let done = finished(&mut running).await;
            self.finish(done).await;
            self.feed.bus.flush().await;
        }
    }

    async fn keep_silent(&self, probes: &mut Intake, stalled: bool) {
        self.metrics.stalled(stalled);
        if let Err(error) = probes.set_serving(!stalled).await {
            tracing::warn!(%error, "couldn't join the queue group of authorities");
        }
    }

    fn add(&self, rounds: &mut Rounds<Probe>, heard: Heard, intake: &Intake) {
        let arrived = clock::lease_now();
        match ProbeRequest::decode(&heard.payload) {
            Ok(request) => {
                let of_speaker = rounds.waiting().iter().filter(|probe| probe.heard.speaker == heard.speaker);
                if of_speaker.count() >= PROBES_WAITING_PER_AGENT_MAX {
                    return intake.refuse(Refusal::Overload);
                }
                self.feed.confirmations.probed(&identity(&heard, &request), request.policy);
                if rounds.add(Probe { heard, request, arrived }, arrived).is_err() {
                    intake.refuse(Refusal::Overload);
                }
            }
            Err(error) => {
                tracing::debug!(%error, speaker = %heard.speaker, "ignored a probe");
                intake.refuse(Refusal::Malformed);
            }
        }
    }

    /// The round is a task of its own, so that probes are taken in while it runs.
    fn begin(&self, probes: Vec<Probe>, began: LeaseTime) -> Running {
        let seen: Vec<LogPosition> = probes.iter().map(|probe| probe.request.seen).collect();
        let instances: Vec<Instance> = probes
            .iter()
            .map(|probe| Instance {
                identity: identity(&probe.heard, &probe.request),
                policy: probe.request.policy,
                bound: probe.request.bound,
            })
            .collect();
        let store = self.store.clone();
        let round = tokio::spawn(async move { store.round(&instances, &seen).await });
        Running { probes, began, round }
    }

    async fn finish(&self, (Running { probes, began, .. }, done): (Running, Option<Round>)) {
        let took = clock::lease_now().since(began);
        self.metrics.round(done.is_some(), took, probes.len());
        // Without a round nobody is answered: the agents ask again, and perhaps somebody else.
        let Some(round) = done else { return };
        self.fence.raised(began);
        let head = round.numbered.head;
        if round.epoch_began {
            tracing::warn!(
                %head,
                "a new epoch began: an agent had seen more of the log than the home store holds; agents flush once"
            );
        }
        // First what the answers speak of, or every agent would find a gap in it.
        self.feed.confirmations.head(head);
        self.feed.send(&round.numbered.rows).await;
        self.metrics.head(head);
        for probe in probes {
            let held = clock::lease_now().since(probe.arrived);
            let answer =
                ProbeAnswer { nonce: probe.request.nonce, head, store_time: round.store_time_now(), held };
            self.feed.bus.answer(probe.heard.reply, answer.encode()).await;
        }
    }
}

fn identity(heard: &Heard, request: &ProbeRequest) -> Identity {
    Identity {
        region: heard.speaker.region.clone(),
        agent: heard.speaker.agent.clone(),
        instance: request.instance,
    }
}

/// The running round's end, `None` if it failed; never, while none runs.
async fn finished(running: &mut Option<Running>) -> (Running, Option<Round>) {
    let done = match running.as_mut() {
        Some(current) => (&mut current.round).await,
        None => std::future::pending().await,
    };
    let round = match done {
        Ok(Ok(round)) => Some(round),
        Ok(Err(error)) => {
            store_failed(&error);
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
