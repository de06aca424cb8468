//! Who has to confirm, and what is waited for.

use evictd_core::ids::{AgentName, InstanceId};
use evictd_core::invalidation::{Cause, Scope};

use super::*;
use crate::metrics;

const BOUND: Duration = Duration::from_secs(30);

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

fn row(position: u64, cause: Cause) -> Invalidation {
    Invalidation { position: at(position), scope: Scope::All, cause, committed_at: clock::wall_now() }
}

/// A process of the agent `name`.
fn process(region: &str, name: &str, instance: u64) -> Identity {
    Identity { region: Region::new(region), agent: AgentName::new(name), instance: InstanceId(instance) }
}

/// Confirmations, and what operators see of them.
struct Home {
    confirmations: Confirmations,
    registry: Registry,
}

impl Home {
    fn new() -> Self {
        let registry = Registry::new(metrics::SPECS, &[]).unwrap();
        Self { confirmations: Confirmations::new(BOUND, registry.clone()), registry }
    }

    /// With these agents live, which have applied everything up to 10.
    fn with(agents: &[&Identity]) -> Self {
        let home = Self::new();
        home.confirmations.head(at(10));
        for agent in agents {
            home.applies(agent, 10);
        }
        home
    }

    fn deletes(&self, position: u64) {
        self.confirmations.numbered(&[row(position, Cause::Deleted)]);
    }

    fn applies(&self, agent: &Identity, position: u64) {
        assert!(self.confirmations.applied(agent, at(position)));
    }

    /// Lets time pass for one agent alone.
    fn is_silent_for(&self, agent: &Identity, silence: Duration) {
        let mut state = self.confirmations.state.lock();
        state.instances.get_mut(agent).unwrap().heard_at = clock::lease_now().before(silence);
        drop(state);
        self.confirmations.sweep();
    }

    /// How many deletions the region has confirmed.
    fn confirmed(&self, region: &str) -> u64 {
        self.metric(&format!("evictd_publisher_confirmed_seconds_count{{region=\"{region}\"}}"))
    }

    fn agents(&self, region: &str) -> [u64; 3] {
        self.confirmations.sweep();
        ["live", "silent", "duplicate"].map(|state| {
            self.metric(&format!("evictd_publisher_agents{{region=\"{region}\",state=\"{state}\"}}"))
        })
    }

    fn metric(&self, series: &str) -> u64 {
        let scrape = self.registry.render();
        let line = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{scrape}")).parse::<f64>().unwrap() as u64
    }
}

#[test]
fn a_deletion_is_confirmed_by_an_agent_that_has_applied_it() {
    let agent = process("eu", "a", 1);
    let home = Home::with(&[&agent]);
    home.deletes(11);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (0, 1));
    home.applies(&agent, 11);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (1, 0));
    home.applies(&agent, 11);
    assert_eq!(home.confirmed("eu"), 1, "an announcement may come twice");
}

#[test]
fn one_announcement_confirms_everything_below_it() {
    let agent = process("eu", "a", 1);
    let home = Home::with(&[&agent]);
    for position in 11..=15 {
        home.deletes(position);
    }
    home.applies(&agent, 14);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (4, 1));
}

#[test]
fn only_deletions_wait_for_confirmation() {
    let home = Home::with(&[&process("eu", "a", 1)]);
    let causes = [Cause::Created, Cause::Changed, Cause::Restored, Cause::Expired];
    let rows: Vec<_> = (11..).zip(causes).map(|(position, cause)| row(position, cause)).collect();
    home.confirmations.numbered(&rows);
    assert_eq!(home.confirmations.unconfirmed(), 0);
    home.confirmations.numbered(&[row(15, Cause::Erased)]);
    assert_eq!(home.confirmations.unconfirmed(), 1);
}

#[test]
fn a_region_has_confirmed_when_all_its_processes_have() {
    let (a, b) = (process("eu", "a", 1), process("eu", "b", 2));
    let home = Home::with(&[&a, &b]);
    home.deletes(11);
    home.applies(&a, 11);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (0, 1));
    home.applies(&b, 11);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (1, 0));
}

#[test]
fn two_processes_under_one_name_both_count() {
    let (first, second) = (process("eu", "a", 1), process("eu", "a", 2));
    let home = Home::with(&[&first, &second]);
    home.deletes(11);
    home.applies(&second, 11);
    assert_eq!(home.confirmed("eu"), 0);
    home.applies(&first, 11);
    assert_eq!(home.confirmed("eu"), 1);
    assert_eq!(home.agents("eu"), [2, 0, 2], "and are reported as an error");
}

#[test]
fn each_region_confirms_for_itself_and_all_together_end_the_wait() {
    let (eu, us) = (process("eu", "a", 1), process("us", "a", 2));
    let home = Home::with(&[&eu, &us]);
    home.deletes(11);
    home.applies(&eu, 11);
    assert_eq!((home.confirmed("eu"), home.confirmed("us")), (1, 0));
    assert_eq!(home.confirmations.unconfirmed(), 1);
    home.applies(&us, 11);
    assert_eq!((home.confirmed("eu"), home.confirmed("us")), (1, 1));
    assert_eq!(home.confirmations.unconfirmed(), 0);
}

#[test]
fn an_agent_that_only_probed_holds_its_region_back() {
    let (a, b) = (process("eu", "a", 1), process("eu", "b", 2));
    let home = Home::with(&[&a]);
    home.confirmations.probed(&b, PartitionPolicy::ServeStale);
    home.deletes(11);
    home.applies(&a, 11);
    assert_eq!(home.confirmed("eu"), 0, "b has a lease, and may serve the key");
    home.applies(&b, 11);
    assert_eq!(home.confirmed("eu"), 1);
    let policies: Vec<_> = home.confirmations.agents().iter().map(|agent| agent.partition_policy).collect();
    assert_eq!(policies, [None, Some("serve_stale")]);
}

#[test]
fn an_agent_that_fell_silent_holds_nobody_back() {
    let (a, b) = (process("eu", "a", 1), process("eu", "b", 2));
    let home = Home::with(&[&a, &b]);
    home.deletes(11);
    home.applies(&a, 11);
    assert_eq!(home.confirmed("eu"), 0);
    // Its lease has run out by now: it serves nothing old.
    home.is_silent_for(&b, BOUND);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (1, 0));
    assert_eq!(home.agents("eu"), [1, 1, 0]);
}

#[test]
fn an_agent_that_speaks_again_counts_again() {
    let (a, b) = (process("eu", "a", 1), process("eu", "b", 2));
    let home = Home::with(&[&a, &b]);
    home.is_silent_for(&b, BOUND);
    home.applies(&b, 10);
    assert_eq!(home.agents("eu"), [2, 0, 0]);
    home.deletes(11);
    home.applies(&a, 11);
    assert_eq!(home.confirmed("eu"), 0);
    home.applies(&b, 11);
    assert_eq!(home.confirmed("eu"), 1);
}

#[test]
fn an_agent_that_is_silent_for_three_bounds_is_forgotten() {
    let (a, b) = (process("eu", "a", 1), process("eu", "b", 2));
    let home = Home::with(&[&a, &b]);
    home.is_silent_for(&b, BOUND * 3);
    assert_eq!(home.agents("eu"), [1, 0, 0]);
    assert_eq!(home.confirmations.agents().len(), 1);
    home.is_silent_for(&a, BOUND * 3);
    assert_eq!(home.agents("eu"), [0, 0, 0], "the region stays on the graphs");
}

#[test]
fn what_is_over_the_bound_is_no_longer_waited_for() {
    let agent = process("eu", "a", 1);
    let home = Home::with(&[&agent]);
    let long_ago = StoreTime(clock::wall_now().0 - i64::try_from(BOUND.as_micros()).unwrap());
    home.confirmations.numbered(&[Invalidation { committed_at: long_ago, ..row(11, Cause::Deleted) }]);
    home.deletes(12);
    assert_eq!(home.confirmations.unconfirmed(), 2);
    home.confirmations.sweep();
    assert_eq!(home.confirmations.unconfirmed(), 1);
    home.applies(&agent, 12);
    assert_eq!(
        home.confirmed("eu"),
        1,
        "no agent serves the first one any more: it is fenced, not confirmed"
    );
}

#[test]
fn an_agent_that_claims_more_than_there_is_confirms_nothing() {
    let agent = process("eu", "a", 1);
    let home = Home::with(&[&agent]);
    home.deletes(11);
    assert!(!home.confirmations.applied(&agent, at(12)));
    assert!(!home.confirmations.applied(&agent, LogPosition::new(2, 1).unwrap()));
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (0, 1));
}

#[test]
fn announcements_out_of_order_take_nothing_back() {
    let agent = process("eu", "a", 1);
    let home = Home::with(&[&agent]);
    home.deletes(11);
    home.applies(&agent, 11);
    home.applies(&agent, 10);
    home.deletes(12);
    home.applies(&agent, 12);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (2, 0));
}

#[test]
fn a_new_epoch_confirms_what_an_older_one_deleted() {
    let agent = process("eu", "a", 1);
    let home = Home::with(&[&agent]);
    home.deletes(11);
    let restored = LogPosition::new(2, 12).unwrap();
    home.confirmations.head(restored);
    // Whoever enters an epoch has forgotten everything from before.
    assert!(home.confirmations.applied(&agent, restored));
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (1, 0));
}

#[test]
fn rows_that_two_tasks_numbered_may_come_in_any_order() {
    let agent = process("eu", "a", 1);
    let home = Home::with(&[&agent]);
    home.deletes(12);
    home.deletes(11);
    home.applies(&agent, 11);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (1, 1));
    home.applies(&agent, 12);
    assert_eq!((home.confirmed("eu"), home.confirmations.unconfirmed()), (2, 0));
}

#[test]
fn without_agents_a_deletion_waits_for_the_bound() {
    let home = Home::new();
    home.deletes(1);
    home.confirmations.sweep();
    assert_eq!(home.confirmations.unconfirmed(), 1);
}

#[test]
fn deletions_beyond_memory_are_dropped_oldest_first() {
    let home = Home::with(&[&process("eu", "a", 1)]);
    for position in 11..=11 + OPEN_MAX as u64 {
        home.deletes(position);
    }
    assert_eq!(home.confirmations.unconfirmed(), OPEN_MAX);
    assert_eq!(home.confirmations.state.lock().open.front().unwrap().position, at(12));
}

#[test]
fn regions_beyond_memory_are_served_but_not_watched() {
    let home = Home::with(&[]);
    for region in 0..=REGIONS_MAX {
        home.applies(&process(&format!("r{region}"), "a", 1), 10);
    }
    assert_eq!(home.confirmations.agents().len(), REGIONS_MAX);
}
