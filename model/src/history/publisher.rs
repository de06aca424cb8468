//! A publisher process: the core's own `Service`, and what its shell keeps for it.

use std::collections::BTreeSet;
use std::time::Duration;

use evictd_core::history::Provenance;
use evictd_core::service::{ABSENT_AFTER, ANSWER_PATIENCE, Connectivity, Peer, Service, Standing};
use evictd_core::time::{LeaseTime, StoreTime};

/// Each process has a clock of its own, which is set back to this after every step.
const NOW: LeaseTime = LeaseTime(1_000_000_000);

/// After so long without an answer, a rival is gone.
const BOUND: Duration = ABSENT_AFTER;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerAnswer {
    /// The publisher that gave it.
    pub from: usize,
    pub standing: Standing,
    provenance: Provenance,
    /// It found its round's token in the same store.
    colleague: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, and a state has any of them")]
pub struct PublisherProcess {
    service: Service,
    /// It is frozen, and sends nothing.
    pub frozen: bool,
    /// Whether it waits for answers.
    queries: bool,
    /// For how long answers to the newest query still count.
    open_for: Duration,
    /// The publishers whose answers to the newest query arrived.
    pub received: BTreeSet<usize>,
    /// Answers to the newest query that are under way.
    pub answers: BTreeSet<PeerAnswer>,
    /// A rival has answered that it serves.
    pub has_met: bool,
    /// It has called the deletion's receipt final, without having been away or silent since.
    pub is_final: bool,
}

impl PublisherProcess {
    /// Starts, connects, and queries other publishers.
    pub fn start(is_shared: bool) -> Self {
        let mut process = Self {
            service: Service::new(BOUND, is_shared, 1, NOW),
            frozen: false,
            queries: false,
            open_for: Duration::ZERO,
            received: BTreeSet::new(),
            answers: BTreeSet::new(),
            has_met: false,
            is_final: false,
        };
        process.pass(Duration::ZERO);
        process
    }

    pub fn service(&self) -> &Service {
        &self.service
    }

    pub fn standing(&self) -> Standing {
        self.service.standing()
    }

    /// Whether its messages are valid now.
    pub fn vouches(&self) -> bool {
        !self.frozen && self.service.may_vouch(NOW)
    }

    /// Whether it may call receipts final.
    pub fn may_finalize(&self) -> bool {
        !self.frozen && self.service.may_finalize(NOW)
    }

    /// Whether it waits for answers that may still change its state.
    pub fn waits(&self) -> bool {
        self.queries && self.standing() != Standing::Behind
    }

    /// So much time passes, at the end of which it is present.
    pub fn pass(&mut self, pause: Duration) {
        let now = NOW.after(pause);
        self.open_for = self.open_for.saturating_sub(pause);
        if self.open_for.is_zero() {
            self.close_query();
        }
        let query = self.service.poll(Connectivity::Connected, now);
        self.note_query(query.is_some());
        self.settle(now);
    }

    /// It waits in vain for answers, and serves.
    pub fn settle_in(&mut self) {
        while self.standing() == Standing::Asking && !self.service.wants_incarnation() {
            self.wait();
        }
        self.close_query();
    }

    /// Something happens to it at once.
    pub fn update(&mut self, step: impl FnOnce(&mut Service)) {
        step(&mut self.service);
        self.settle(NOW);
    }

    /// As long as it waits for answers.
    pub fn wait(&mut self) {
        self.pass(ANSWER_PATIENCE / 2);
        self.pass(ANSWER_PATIENCE / 2);
    }

    /// It continues after a freeze for so long that others may have replaced it.
    pub fn thaw(&mut self) {
        self.frozen = false;
        self.pass(ABSENT_AFTER);
    }

    /// The bus reports that no other publisher is there.
    pub fn receive_no_responders(&mut self) {
        let newest = self.newest();
        self.update(|service| service.on_no_responders(newest, NOW));
    }

    /// Its answer to a query, after a durable round.
    pub fn answer(&self, from: usize, provenance: Provenance, colleague: bool) -> PeerAnswer {
        PeerAnswer { from, standing: self.standing(), provenance, colleague }
    }

    pub fn receive(&mut self, answer: PeerAnswer) {
        self.answers.remove(&answer);
        self.received.insert(answer.from);
        let PeerAnswer { standing, provenance, colleague, .. } = answer;
        if colleague {
            self.service.on_same_history(self.newest(), standing, NOW);
        } else {
            self.has_met |= standing == Standing::Serving;
            let peer = Peer { publisher: "".into(), provenance, since: StoreTime(0), standing };
            self.service.on_rival(self.newest(), peer, NOW);
        }
        self.settle(NOW);
    }

    /// Something of another history arrives: a tick, or its publisher's query.
    pub fn receive_foreign(&mut self) {
        let query = self.service.on_foreign(NOW);
        self.note_query(query.is_some());
        self.settle(NOW);
    }

    pub fn resolve_past(&mut self) {
        self.service.on_past_resolved();
        self.pass(Duration::ZERO);
    }

    /// Answers to older queries count as lost.
    fn newest(&self) -> u64 {
        self.service.newest_query().unwrap_or_default()
    }

    fn note_query(&mut self, is_sent: bool) {
        if is_sent {
            self.close_query();
            self.queries = true;
            self.open_for = ANSWER_PATIENCE;
        }
    }

    fn close_query(&mut self) {
        self.queries = false;
        self.open_for = Duration::ZERO;
        self.received.clear();
        self.answers.clear();
    }

    fn settle(&mut self, now: LeaseTime) {
        self.service = self.service.clone().rebased(now, NOW);
        if self.standing() == Standing::Behind {
            self.close_query();
        }
        if self.standing() != Standing::Serving {
            self.is_final = false;
        }
    }
}
