//! A world: what can happen in it, and how often.

use std::time::Duration;

use evictd_core::floors::FloorLimits;
use evictd_core::lease::Bound;
use evictd_core::protection::Protection;
use evictd_core::time::LeaseTime;

use crate::defect::{Defect, Flaw};
use crate::script::Script;

/// A reading of the world's clock, which all processes share: the margin covers drifting clocks, and the model has
/// none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Tick(pub u64);

impl Tick {
    pub const LENGTH: Duration = Duration::from_secs(1);

    pub fn lease_time(self) -> LeaseTime {
        LeaseTime(1_000_000_000).after(self.duration())
    }

    pub fn duration(self) -> Duration {
        Self::LENGTH * self.0 as u32
    }

    /// How many ticks ago `earlier` was.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

/// What can happen, and how often.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each says whether one kind of thing happens")]
pub struct SmallWorld {
    pub name: &'static str,
    pub about: &'static str,
    pub script: Script,
    pub agents: usize,
    /// The clock stops there.
    pub ticks: u64,
    /// The ticks that a proof is trusted; no answer may be based on an older state.
    pub trust: u64,
    /// How many loads each agent process may send.
    pub loads: u8,
    pub restarts: u8,
    /// How often a standby takes over that may lack the last transactions.
    pub failovers: u8,
    /// Loads may come from the standby.
    pub replica: bool,
    /// The standby is promoted by mistake: loads still come from it, and its log is ahead of home's.
    pub stray: bool,
    /// After a fail-over, the old primary still answers reads. The standby is a synchronous one, then.
    pub demoted: bool,
    /// The log is purged up to its head.
    pub purges: bool,
    /// One publisher keeps its probes in the core's rounds; the rounds of others are one step each.
    pub rounds: bool,
    pub floors: FloorLimits,
    /// Whether recovery is tried from each state.
    pub tries_recovery: bool,
    pub defect: Option<Defect>,
}

impl SmallWorld {
    /// A world in which one key is deleted, to be varied.
    pub const fn plain(name: &'static str, about: &'static str, script: Script) -> Self {
        Self {
            name,
            about,
            script,
            agents: 1,
            ticks: 1,
            trust: 1,
            loads: 1,
            restarts: 0,
            failovers: 0,
            replica: false,
            stray: false,
            demoted: false,
            purges: false,
            rounds: false,
            floors: FloorLimits { keys: 8, scopes: 8 },
            tries_recovery: true,
            defect: None,
        }
    }

    /// The core's bound: its trust is the world's, since all clocks run alike.
    pub fn bound(&self) -> Bound {
        let trust = Tick::LENGTH * self.trust as u32;
        Bound::new(trust * 2, trust)
            .unwrap_or_else(|error| unreachable!("half of a bound is allowed: {error}"))
    }

    pub fn has(&self, flaw: Flaw) -> bool {
        self.defect == Some(Defect::With(flaw))
    }

    pub fn is_without(&self, protection: Protection) -> bool {
        self.defect == Some(Defect::Without(protection))
    }
}
