//! A store without a world, compared with the stores that ship: it executes one statement at a time.

use std::time::Duration;

use evictd_core::follower::ReplayOutcome;
use evictd_core::history::{BeginCause, History, LogToken, RoundToken};
use evictd_core::invalidation::Cause;
use evictd_core::position::LogPosition;
use evictd_core::record::RecordState;
use evictd_core::roster::Instance;

use crate::ctx::Ctx;
use crate::event::{PublisherEvent, SimEvent};
use crate::node::{Life, NodeNumber};
use crate::rng::Dice;
use crate::rows::{
    APIS, ApiNumber, ChangePlan, ChangeTarget, KeyNumber, KeyRow, NumberedBatch, ROOT_KEYS, RoundInput,
    RowRange, SimHead, Snapshot,
};
use crate::scenario::{Scenario, SimSettings};
use crate::store::SimStore;
use crate::trace::SimTrace;

/// A store and one publisher, without faults.
#[derive(Debug)]
pub struct LoneStore {
    ctx: Ctx,
    store: SimStore,
    publisher: NodeNumber,
}

impl Default for LoneStore {
    fn default() -> Self {
        let mut dice = Dice::new(0, 0);
        let mut settings = SimSettings::draw(Scenario::Calm, &mut dice);
        (settings.publishers, settings.exclusive, settings.unknown_permille) = (1, true, 0);
        settings.retention = Duration::MAX;
        let publisher = NodeNumber(settings.agents);
        let mut ctx = Ctx::new(settings, dice, SimTrace::Off);
        Self { store: SimStore::new(&mut ctx), ctx, publisher }
    }
}

impl LoneStore {
    /// Runs all scheduled events. Returns the outcome of a numbering.
    fn finish(&mut self) -> Option<NumberedBatch> {
        let mut outcome = None;
        while let Some((at, event)) = self.ctx.queue.pop() {
            self.ctx.now = at.max(self.ctx.now);
            match event {
                SimEvent::Store(_, event) => {
                    self.store.on_event(&mut self.ctx, event);
                }
                SimEvent::Publisher(_, _, PublisherEvent::Numbered { numbered, .. }) => outcome = numbered,
                _ => {}
            }
        }
        outcome
    }

    /// Changes the row of key `n`; `None` deletes it.
    pub fn change_key(&mut self, n: u8, state: Option<RecordState>, cause: Cause) {
        let row = state.map(|state| KeyRow { api: api(n), state });
        self.change(ChangePlan { target: ChangeTarget::Key(key(n)), row, cause });
    }

    /// Deletes the API of key `n`.
    pub fn delete_api_of(&mut self, n: u8) {
        self.change(ChangePlan { target: ChangeTarget::Api(api(n)), row: None, cause: Cause::Deleted });
    }

    fn change(&mut self, plan: ChangePlan) {
        self.store.begin(&mut self.ctx, plan, None, 1);
        self.finish();
    }

    pub fn number(&mut self) -> Option<NumberedBatch> {
        self.store.number(&mut self.ctx, self.publisher, Life::default(), None);
        self.finish()
    }

    /// A round for the probes of so many agents.
    pub fn round(&mut self, agents: usize) -> Option<NumberedBatch> {
        let instances = (0..agents).map(|agent| (NodeNumber(agent), Life(1))).collect();
        let round = RoundInput { seen_epoch: 0, instances };
        self.store.number(&mut self.ctx, self.publisher, Life::default(), Some(round));
        self.finish()
    }

    /// Purges every row that may be purged.
    pub fn purge(&mut self) {
        self.ctx.now = self.ctx.now.after(1);
        self.store.purge(&self.ctx, Duration::ZERO);
    }

    /// Acts as `evictd new-epoch`.
    pub fn declare(&mut self) {
        self.store.begin_incarnation(&mut self.ctx, BeginCause::Declared, 0);
    }

    pub fn replay(&self, epoch: u32, first: u64, last: u64) -> Option<ReplayOutcome> {
        self.store.replay(&self.ctx, self.publisher, RowRange { epoch, first, last })
    }

    /// Reads key `n`.
    pub fn read(&self, n: u8) -> Option<Snapshot> {
        self.store.read(&self.ctx, self.publisher, key(n))
    }

    pub fn head(&self) -> Option<SimHead> {
        self.store.head(&self.ctx, self.publisher)
    }

    pub fn history(&self) -> Option<History> {
        self.store.history(&self.ctx, self.publisher)
    }

    pub fn roster(&self) -> Option<Vec<Instance>> {
        self.store.roster(&self.ctx, self.publisher)
    }

    pub fn row_token(&self, at: LogPosition) -> Option<LogToken> {
        self.store.row_token(&self.ctx, self.publisher, at)
    }

    /// Whether one of the last rounds drew it.
    pub fn has_round_token(&self, token: RoundToken) -> bool {
        self.store.has_round_token(&self.ctx, self.publisher, token).unwrap_or(false)
    }
}

/// The first keys are root keys, and in no API.
fn key(n: u8) -> KeyNumber {
    KeyNumber(ROOT_KEYS + usize::from(n))
}

fn api(n: u8) -> ApiNumber {
    ApiNumber(key(n).0 % APIS)
}
