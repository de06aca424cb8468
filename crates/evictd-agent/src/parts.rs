//! The parts of an agent, before they run: what they share, and how each is made of it.

use std::sync::Arc;

use evictd_core::follower::Follower;
use evictd_core::ids::{Identity, InstanceId};
use evictd_core::roster::PartitionPolicy;
use evictd_ops::admin::Admin;
use evictd_ops::metrics::Registry;
use evictd_ops::readiness::{Condition, Readiness};

use crate::StartError;
use crate::cache::Cache;
use crate::config::AgentConfig;
use crate::database::{Database, Replica};
use crate::follow::Follow;
use crate::knowledge::Knowledge;
use crate::loads::Loads;
use crate::metrics::{self, Metrics};
use crate::origin::Authority;
use crate::policy::Policies;
use crate::status::{self, Recent};
use crate::verify::Verifier;

/// What the parts share.
pub(crate) struct Common {
    pub(crate) config: AgentConfig,
    pub(crate) identity: Identity,
    pub(crate) registry: Registry,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) readiness: Readiness,
    pub(crate) knowledge: Arc<Knowledge>,
    pub(crate) cache: Arc<Cache>,
    policies: Arc<Policies>,
    recent: Recent,
}

impl Common {
    /// A new instance, which knows nothing yet (R11).
    pub(crate) fn new(config: AgentConfig) -> Result<Self, StartError> {
        let requester = config.requester();
        let instance = InstanceId(getrandom::u64()?.max(1));
        let identity = Identity { region: requester.region, agent: requester.agent, instance };
        let labels = [("region", config.region.clone()), ("agent", config.agent.clone())];
        let registry = Registry::new(metrics::SPECS, &labels)?;
        let follower = Follower::new(config.follower(), getrandom::u64()?);
        Ok(Self {
            identity,
            metrics: Arc::new(Metrics::new(&registry)),
            registry,
            readiness: Readiness::new(),
            knowledge: Arc::new(Knowledge::new(follower, config.bound())),
            cache: Arc::new(Cache::new(&config.cache)),
            policies: Arc::new(Policies::new(&config.partition)),
            recent: Recent::default(),
            config,
        })
    }

    pub(crate) fn replica(&self, database: Arc<dyn Database>) -> Replica {
        let remark = self.readiness.remark("database");
        Replica::new(database, self.config.postgres.timeout.into(), self.metrics.clone(), remark)
    }

    /// Loads come from `replica` if there is one, and from `origin` otherwise.
    pub(crate) fn verifier(&self, replica: Option<Replica>, origin: &Authority) -> Verifier {
        let loads = Loads::new(
            &self.config.loads,
            replica,
            Arc::new(origin.clone()),
            self.knowledge.clone(),
            self.cache.clone(),
            self.metrics.clone(),
        );
        Verifier::new(
            self.knowledge.clone(),
            self.cache.clone(),
            loads,
            self.policies.clone(),
            self.metrics.clone(),
        )
    }

    pub(crate) fn follow(&self) -> Follow {
        Follow {
            identity: self.identity.clone(),
            bound: self.config.bound(),
            knowledge: self.knowledge.clone(),
            cache: self.cache.clone(),
            metrics: self.metrics.clone(),
            policies: self.policies.clone(),
            lease: self.lease(),
            feed: self.readiness.remark("feed"),
            history: self.readiness.remark("history"),
            recent: self.recent.clone(),
        }
    }

    /// Without a lease an agent denies, and gets no traffic; unless policy has it answer from old records: then it is
    /// of use as soon as it has some.
    fn lease(&self) -> Condition {
        let (name, waiting_for) = ("lease", "the first proof from a publisher that nothing was missed");
        match self.policies.of_agent() {
            PartitionPolicy::Deny => self.readiness.condition(name, waiting_for),
            PartitionPolicy::ServeStale => self.readiness.condition_at_start(name, waiting_for),
        }
    }

    /// `watched`: whether the kernel tells of it when this machine's clock can't be trusted.
    pub(crate) fn admin(&self, watched: bool) -> Admin {
        let Self { config, identity, knowledge, cache, recent, .. } = self;
        Admin {
            metrics: self.registry.clone(),
            readiness: self.readiness.clone(),
            status: status::status(identity, config, knowledge, cache, recent.clone(), watched),
        }
    }
}
