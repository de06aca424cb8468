//! The agent processes, and what each promises (R11).

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::Identity;
use crate::time::{StoreTime, micros};

/// How old `last_seen` may get before it is written again. Without it, each round would write a row
/// per agent.
pub const ROSTER_REFRESH: Duration = Duration::from_mins(1);

/// An agent process as it presents itself to the authority.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instance {
    pub identity: Identity,
    pub policy: PartitionPolicy,
    pub bound: Duration,
}

/// What an agent answers when neither its lease nor the authority vouches for an entry. A greater one permits more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PartitionPolicy {
    Deny,
    /// The agent answers from the old entry, and marks and counts the answer.
    ServeStale,
}

labels!(PartitionPolicy { Deny = "deny", ServeStale = "serve_stale" });

/// An instance in the roster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RosterEntry {
    pub instance: Instance,
    /// When its last message arrived, on the store's clock: up to [`ROSTER_REFRESH`] too early.
    pub last_seen: StoreTime,
    /// It announced its shutdown: it holds no lease, and answers nothing any more.
    pub departed: bool,
}

impl RosterEntry {
    /// Whether it may hold a lease, so that receipts wait for it.
    pub fn may_hold_lease(&self) -> bool {
        !self.departed
    }

    fn is_due(&self, now: StoreTime) -> bool {
        // The store's clock may also have been set back.
        self.last_seen.0.abs_diff(now.0) >= micros(ROSTER_REFRESH)
    }
}

/// What a round writes into the roster.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RosterUpdate {
    /// Entries to write in full.
    pub entries: Vec<RosterEntry>,
    /// Entries of which only `last_seen` is written.
    pub seen: Vec<Identity>,
}

/// Returns what a round writes. Its probes came from the instances `probing`, other messages from
/// those `seen`, and `known` are their entries so far. Of two probes of one instance, the later one
/// counts.
///
/// An instance that was only seen gets no entry: it has no lease.
pub fn update(
    known: &[RosterEntry],
    probing: &[Instance],
    seen: &[Identity],
    now: StoreTime,
) -> RosterUpdate {
    let known: BTreeMap<&Identity, &RosterEntry> =
        known.iter().map(|entry| (&entry.instance.identity, entry)).collect();
    let probing: BTreeMap<&Identity, &Instance> =
        probing.iter().map(|instance| (&instance.identity, instance)).collect();
    let needs_write = |instance: &Instance| {
        known
            .get(&instance.identity)
            .is_none_or(|known| known.instance != *instance || known.departed || known.is_due(now))
    };
    let entry =
        |instance: &Instance| RosterEntry { instance: instance.clone(), last_seen: now, departed: false };
    let entries =
        probing.values().filter(|instance| needs_write(instance)).map(|instance| entry(instance)).collect();
    let is_due = |identity: &&Identity| {
        !probing.contains_key(identity) && known.get(identity).is_some_and(|known| known.is_due(now))
    };
    RosterUpdate { entries, seen: seen.iter().filter(is_due).cloned().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AgentName, InstanceId, Region};

    const NOW: StoreTime = StoreTime(1_000_000_000);

    fn instance(number: u64) -> Instance {
        let identity = Identity {
            region: Region::new("eu"),
            agent: AgentName::new("edge"),
            instance: InstanceId(number),
        };
        Instance { identity, policy: PartitionPolicy::Deny, bound: Duration::from_secs(30) }
    }

    fn entry(number: u64, age: Duration) -> RosterEntry {
        RosterEntry { instance: instance(number), last_seen: NOW.before(age), departed: false }
    }

    const JUST_NOW: Duration = Duration::from_secs(59);

    #[test]
    fn only_new_instances_are_written() {
        let update = update(&[entry(1, JUST_NOW)], &[instance(1), instance(2)], &[], NOW);
        assert_eq!(update.entries, [entry(2, Duration::ZERO)]);
    }

    #[test]
    fn changed_and_departed_instances_are_written() {
        let stale = Instance { policy: PartitionPolicy::ServeStale, ..instance(1) };
        let entries = update(&[entry(1, JUST_NOW)], std::slice::from_ref(&stale), &[], NOW).entries;
        assert_eq!(entries, [RosterEntry { instance: stale, ..entry(1, Duration::ZERO) }]);
        let departed = RosterEntry { departed: true, ..entry(1, JUST_NOW) };
        assert!(!departed.may_hold_lease());
        assert_eq!(update(&[departed], &[instance(1)], &[], NOW).entries, [entry(1, Duration::ZERO)]);
    }

    #[test]
    fn later_of_two_probes_counts() {
        let stale = Instance { policy: PartitionPolicy::ServeStale, ..instance(1) };
        let entries = update(&[], &[stale, instance(1)], &[], NOW).entries;
        assert_eq!(entries, [entry(1, Duration::ZERO)]);
    }

    #[test]
    fn last_seen_is_refreshed_once_a_minute() {
        for known in [
            entry(1, ROSTER_REFRESH),
            RosterEntry { last_seen: NOW.after(ROSTER_REFRESH), ..entry(1, JUST_NOW) },
        ] {
            let known = [known];
            assert_eq!(update(&known, &[instance(1)], &[], NOW).entries, [entry(1, Duration::ZERO)]);
            assert_eq!(update(&known, &[], &[instance(1).identity], NOW).seen, [instance(1).identity]);
        }
        assert_eq!(update(&[entry(1, JUST_NOW)], &[], &[instance(1).identity], NOW), RosterUpdate::default());
    }

    #[test]
    fn instance_without_a_probe_gets_no_entry() {
        assert_eq!(update(&[], &[], &[instance(1).identity], NOW), RosterUpdate::default());
    }
}
