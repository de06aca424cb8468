//! The policy for entries without a lease, when the authority doesn't answer.

use std::collections::HashMap;

use evictd_core::ids::ApiId;
use evictd_core::record::Record;
use evictd_core::roster::PartitionPolicy;

use crate::config::PartitionConfig;

/// The agent's policy, and those of single APIs.
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

    /// Returns the policy for a cached record. A root key may be stale if any record may be: every API of its
    /// workspace needs it, and an API's own policy would otherwise have no effect.
    pub(crate) fn of(&self, record: &Record) -> PartitionPolicy {
        match record {
            Record::Absent => self.agent,
            Record::Key(key) => self.of_api(&key.api_id),
            Record::RootKey(_) => self.widest,
        }
    }

    pub(crate) fn of_api(&self, api: &ApiId) -> PartitionPolicy {
        self.apis.get(api).copied().unwrap_or(self.agent)
    }

    /// Returns the policy for APIs without one of their own.
    pub(crate) fn of_agent(&self) -> PartitionPolicy {
        self.agent
    }

    /// Returns whether any record may be stale, as the agent reports it to publishers.
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
    fn the_default_policy_is_deny() {
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
