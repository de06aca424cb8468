//! The agent processes that receipts wait for (R11).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::ids::{AgentName, Identity, InstanceId, Region};
use crate::limits::COUNTED_REPORTS_MAX;
use crate::position::LogPosition;
use crate::roster::{Instance, PartitionPolicy};
use crate::time::LeaseTime;

/// After so long without a message, a process that serves stale records counts as gone. Until then
/// its receipts are unproven: it may be cut off and serving, which looks the same as its death.
const STALE_SILENCE: Duration = Duration::from_hours(24);

/// A process that was silent for so long doesn't count as alive where two share a name.
const LIVE_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct InstanceProgress {
    pub(super) applied: LogPosition,
    /// When its last message arrived, here or at another publisher, as the roster says.
    pub(super) contact_at: LeaseTime,
    /// When its first and its last message arrived here.
    contacts: Option<(LeaseTime, LeaseTime)>,
    pub(super) policy: PartitionPolicy,
    /// Changes whose report was counted: each report is sent several times.
    counted: VecDeque<LogPosition>,
}

impl InstanceProgress {
    pub(super) fn record_contact(&mut self, now: LeaseTime) {
        let first = self.contacts.map_or(now, |(first, _)| first);
        (self.contact_at, self.contacts) = (now, Some((first, now)));
    }

    /// Counts a report, and returns whether it is the first of this change.
    pub(super) fn count_report(&mut self, position: LogPosition) -> bool {
        if self.counted.contains(&position) {
            return false;
        }
        if self.counted.len() == COUNTED_REPORTS_MAX {
            self.counted.pop_front();
        }
        self.counted.push_back(position);
        true
    }
}

#[derive(Debug, Default)]
pub(super) struct Instances(pub(super) BTreeMap<Identity, InstanceProgress>);

impl Instances {
    /// Takes in an entry of the roster, and returns whether the process is new.
    pub(super) fn register(&mut self, Instance { identity, policy, .. }: &Instance, now: LeaseTime) -> bool {
        if let Some(known) = self.0.get_mut(identity) {
            (known.policy, known.contact_at) = (*policy, now);
            return false;
        }
        let new = InstanceProgress {
            applied: LogPosition::ZERO,
            contact_at: now,
            contacts: None,
            policy: *policy,
            counted: VecDeque::new(),
        };
        self.0.insert(identity.clone(), new);
        true
    }

    /// The processes that count as gone: silent for `run_out`, so that whatever they hold has run
    /// out.
    pub(super) fn silent(&self, run_out: Duration, now: LeaseTime) -> Vec<Identity> {
        let is_gone = |progress: &InstanceProgress| {
            let silence = now.since(progress.contact_at);
            match progress.policy {
                PartitionPolicy::Deny => silence >= run_out,
                // Stale records don't run out.
                PartitionPolicy::ServeStale => silence >= run_out.max(STALE_SILENCE),
            }
        };
        self.0
            .iter()
            .filter(|(_, progress)| is_gone(progress))
            .map(|(identity, _)| identity.clone())
            .collect()
    }

    /// How many other processes sent a message within `bound` under the agent's name of this one.
    pub(super) fn duplicates_of(&self, identity: &Identity, bound: Duration, now: LeaseTime) -> usize {
        let first = Identity { instance: InstanceId(0), ..identity.clone() };
        self.0
            .range(first..)
            .take_while(|(other, _)| other.region == identity.region && other.agent == identity.agent)
            .filter(|(other, progress)| *other != identity && now.since(progress.contact_at) < bound)
            .count()
    }

    /// The names that several processes use at once, and how many. Each of those sent a message
    /// after all of them had begun to: a killed process and its successor never both did, however
    /// soon the second came.
    pub(super) fn duplicate_names(&self, now: LeaseTime) -> BTreeMap<(Region, AgentName), usize> {
        let live = self.0.iter().filter_map(|(identity, progress)| {
            let (first, last) = progress.contacts?;
            (now.since(last) < LIVE_WITHIN).then_some(((&identity.region, &identity.agent), first, last))
        });
        // Instances of one name are adjacent.
        let live: Vec<_> = live.collect();
        live.chunk_by(|(one, ..), (other, ..)| one == other)
            .filter_map(|processes| {
                let begun = processes.iter().map(|(_, first, _)| *first).max()?;
                let together = processes.iter().filter(|(.., last)| *last >= begun).count();
                let ((region, agent), ..) = processes[0];
                (together > 1).then(|| ((region.clone(), agent.clone()), together))
            })
            .collect()
    }
}
