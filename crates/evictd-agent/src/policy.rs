//! What is answered when neither the lease nor the authority vouches for an entry.

use std::collections::HashMap;

use evictd_core::ids::ApiId;
use evictd_core::record::Record;
use evictd_core::roster::PartitionPolicy;

use crate::config::PartitionConfig;

/// The agent's policy, and the APIs with one of their own.
#[derive(Clone, Debug)]
pub(crate) struct Policies {
    agent: PartitionPolicy,
    apis: HashMap<ApiId, PartitionPolicy>,
    widest: PartitionPolicy,
}

impl Policies {
    pub(crate) fn new(config: &PartitionConfig) -> Self {
        let agent = config.policy.into();
        let apis: HashMap<_, _> =
            config.apis.iter().map(|(api, policy)| (ApiId::new(api.clone()), (*policy).into())).collect();
        let any =
            std::iter::once(&agent).chain(apis.values()).any(|policy| *policy == PartitionPolicy::ServeStale);
        let widest = if any { PartitionPolicy::ServeStale } else { PartitionPolicy::Deny };
        Self { agent, apis, widest }
    }

    /// What holds for a cached record. A root key is needed for every API of its workspace: it may be stale as
    /// soon as anything may be, or an API's own policy would have no effect.
    pub(crate) fn of(&self, record: &Record) -> PartitionPolicy {
        match record {
            Record::Absent => self.agent,
            Record::Key(key) => self.of_api(&key.api_id),
            Record::RootKey(_) => self.widest,
        }
    }

    /// What holds for an API.
    pub(crate) fn of_api(&self, api: &ApiId) -> PartitionPolicy {
        self.apis.get(api).copied().unwrap_or(self.agent)
    }

    /// What holds for APIs without a policy of their own.
    pub(crate) fn of_agent(&self) -> PartitionPolicy {
        self.agent
    }

    /// What publishers are told: whether anything at all may be answered stale.
    pub(crate) fn widest(&self) -> PartitionPolicy {
        self.widest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{config, key, root_key};

    fn policies(settings: &[(&str, &str)]) -> Policies {
        Policies::new(&config(settings).partition)
    }

    #[test]
    fn by_default_everything_is_denied() {
        let policies = policies(&[]);
        for record in [Record::Absent, Record::Key(key("key_1")), Record::RootKey(root_key(&[]))] {
            assert_eq!(policies.of(&record), PartitionPolicy::Deny);
        }
        assert_eq!(policies.widest(), PartitionPolicy::Deny);
    }

    #[test]
    fn an_api_may_differ_from_its_agent_in_both_directions() {
        use PartitionPolicy::{Deny, ServeStale};
        for (agent, own, of_own) in [("deny", "serve_stale", ServeStale), ("serve_stale", "deny", Deny)] {
            let policies = policies(&[("partition.policy", agent), ("partition.apis.api_1", own)]);
            assert_eq!(policies.of(&Record::Key(key("key_1"))), of_own);
            assert_ne!(policies.of_api(&ApiId::new("api_2")), of_own);
            assert_eq!(policies.of(&Record::RootKey(root_key(&[]))), ServeStale, "one API needs it");
            assert_eq!(policies.widest(), ServeStale);
        }
    }
}
