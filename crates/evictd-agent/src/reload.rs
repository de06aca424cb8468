//! What a running agent takes over when its configuration is read again.

use std::sync::Arc;

use async_nats::Client;
use evictd_core::roster::PartitionPolicy;
use evictd_ops::bus::reconnect;
use evictd_ops::config::ConfigChanges;
use evictd_ops::logging;
use evictd_ops::metrics::ByLabel;
use evictd_ops::readiness::Condition;
use evictd_ops::reload::{Reload, ReloadOutcome};
use metrics::Counter;

use crate::config::AgentConfig;
use crate::metrics::AgentMetrics;
use crate::policy::Policies;

/// Changes the settings of a running agent.
#[derive(Clone, Debug)]
pub struct AgentReload {
    pub(crate) policies: Arc<Policies>,
    pub(crate) lease: Condition,
    pub(crate) clients: [Client; 2],
    pub(crate) metrics: Arc<AgentMetrics>,
}

impl Reload for AgentReload {
    type Config = AgentConfig;

    const KEYS: &'static [&'static str] = &["log.filter", "partition."];

    async fn reload(&self, config: AgentConfig, changes: &ConfigChanges) {
        logging::set_filter(&config.log.filter);
        self.policies.change(&config.partition);
        self.lease.set_always_needed(PartitionPolicy::from(config.partition.policy) == PartitionPolicy::Deny);
        // A database reads its URL's file for each connection.
        if changes.files.iter().any(|key| key.starts_with("nats.")) {
            for client in &self.clients {
                reconnect(client).await;
            }
        }
    }

    fn reloads(&self) -> &ByLabel<ReloadOutcome, Counter> {
        &self.metrics.config_reloads
    }
}
