//! The policy for entries without a lease, when the authority doesn't answer.

use std::collections::HashMap;

use evictd_core::ids::ApiId;
use evictd_core::record::Record;
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use parking_lot::RwLock;

use crate::config::PartitionConfig;

/// The policies in force, which can change while the agent runs.
///
/// Receipts end as the policy in the roster says (R12). So a policy that permits more has to be in the roster first: it is
/// reported from [`Policies::change`] on, and in force once a probe that reported it was answered. One that permits less is
/// in force at once.
#[derive(Debug)]
pub(crate) struct Policies(RwLock<PolicyState>);

#[derive(Debug)]
struct PolicyState {
    current: PolicyTable,
    /// The policies that were configured since then, until a publisher has them.
    next: Option<(PolicyTable, LeaseTime)>,
}

/// The agent's policy, and those of single APIs.
#[derive(Clone, Debug)]
struct PolicyTable {
    agent: PartitionPolicy,
    apis: HashMap<ApiId, PartitionPolicy>,
    widest: PartitionPolicy,
}

impl PolicyTable {
    fn new(config: &PartitionConfig) -> Self {
        let agent = config.policy.into();
        let apis: HashMap<_, _> =
            config.apis.iter().map(|(api, policy)| (ApiId::new(api.clone()), (*policy).into())).collect();
        let widest =
            std::iter::once(&agent).chain(apis.values()).fold(PartitionPolicy::Deny, |a, b| a.max(*b));
        Self { agent, apis, widest }
    }

    fn of_api(&self, api: &ApiId) -> PartitionPolicy {
        self.apis.get(api).copied().unwrap_or(self.agent)
    }

    /// A root key may be stale if any record may be: every API of its workspace needs it, and an API's own policy would
    /// otherwise have no effect.
    fn of(&self, record: &Record) -> PartitionPolicy {
        match record {
            Record::Absent => self.agent,
            Record::Key(key) => self.of_api(&key.api_id),
            Record::RootKey(_) => self.widest,
        }
    }
}

impl PolicyState {
    /// The narrower of the current and the next policy.
    fn in_force(&self, policy: impl Fn(&PolicyTable) -> PartitionPolicy) -> PartitionPolicy {
        let current = policy(&self.current);
        self.next.as_ref().map_or(current, |(next, _)| current.min(policy(next)))
    }
}

impl Policies {
    pub(crate) fn new(config: &PartitionConfig) -> Self {
        Self(RwLock::new(PolicyState { current: PolicyTable::new(config), next: None }))
    }

    /// Changes the policies. Probes report the widest of the old and the new ones from now on.
    pub(crate) fn change(&self, config: &PartitionConfig) {
        let mut state = self.0.write();
        // Read under the lock: a probe that is sent later reports the new policies.
        state.next = Some((PolicyTable::new(config), clock::lease_now()));
    }

    /// A probe that was sent at `probe_sent_at` has been answered, so a publisher has what it reported.
    pub(crate) fn proven(&self, probe_sent_at: LeaseTime) {
        let is_next =
            |state: &PolicyState| state.next.as_ref().is_some_and(|(_, since)| probe_sent_at > *since);
        if is_next(&self.0.read()) {
            let mut state = self.0.write();
            if let Some((next, _)) = state.next.take() {
                state.current = next;
            }
        }
    }

    /// Returns the policy for a cached record.
    pub(crate) fn of(&self, record: &Record) -> PartitionPolicy {
        self.0.read().in_force(|policies| policies.of(record))
    }

    pub(crate) fn of_api(&self, api: &ApiId) -> PartitionPolicy {
        self.0.read().in_force(|policies| policies.of_api(api))
    }

    /// Returns the policy for APIs without one of their own.
    pub(crate) fn of_agent(&self) -> PartitionPolicy {
        self.0.read().in_force(|policies| policies.agent)
    }

    /// Returns whether any record may be stale now or after the next proof, as the agent reports it to publishers.
    pub(crate) fn widest(&self) -> PartitionPolicy {
        let state = self.0.read();
        state.next.as_ref().map_or(state.current.widest, |(next, _)| state.current.widest.max(next.widest))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
    fn wider_policy_is_reported_before_it_is_in_force() {
        use PartitionPolicy::{Deny, ServeStale};
        let policies = policies(&[]);
        let before = clock::lease_now();
        policies.change(&config(&[("partition.policy", "serve_stale")]).partition);
        assert_eq!((policies.widest(), policies.of_agent()), (ServeStale, Deny));
        policies.proven(before);
        assert_eq!(policies.of_agent(), Deny, "that probe reported the old policy");
        policies.proven(clock::lease_now().after(Duration::from_micros(1)));
        assert_eq!((policies.widest(), policies.of_agent()), (ServeStale, ServeStale));
    }

    #[test]
    fn narrower_policy_is_in_force_before_it_is_reported() {
        use PartitionPolicy::{Deny, ServeStale};
        let policies = policies(&[("partition.policy", "serve_stale")]);
        policies.change(&config(&[]).partition);
        assert_eq!((policies.widest(), policies.of_agent()), (ServeStale, Deny));
        policies.proven(clock::lease_now().after(Duration::from_micros(1)));
        assert_eq!((policies.widest(), policies.of_agent()), (Deny, Deny));
    }

    #[test]
    fn last_of_several_changes_counts() {
        let policies = policies(&[]);
        policies.change(&config(&[("partition.policy", "serve_stale")]).partition);
        policies.change(&config(&[]).partition);
        policies.proven(clock::lease_now().after(Duration::from_micros(1)));
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
