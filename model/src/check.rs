//! Runs the checker on a world.

use std::fmt::Debug;
use std::hash::Hash;
use std::time::{Duration, Instant};

use stateright::{Checker, CheckerBuilder, Expectation, HasDiscoveries, Model};

use crate::defect::Defect;

#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// Steps taken, to whatever state.
    pub steps: usize,
    pub states: usize,
    /// The length of the longest of the shortest ways.
    pub depth: usize,
    pub took: Duration,
    /// A property that doesn't hold, by name, and a way to a state in which it doesn't.
    pub violated: Option<(&'static str, Vec<String>)>,
    /// What should be possible and never happened: then the world proves too little.
    pub never: Vec<&'static str>,
}

/// A world that this checker can visit.
pub trait Checkable:
    Model<
        State: Clone + PartialEq + Debug + Hash + Send + Sync,
        Action: Clone + PartialEq + Debug + Send + Sync,
    > + Copy
    + Send
    + Sync
    + 'static
{
    fn name(&self) -> &'static str;
    /// What meets in the world.
    fn about(&self) -> &'static str;
    /// The same world with a defect. Recovery isn't tried in it.
    #[must_use]
    fn with(self, defect: Defect) -> Self;
}

/// The property that is no rule: once faults stop, every agent becomes live again.
pub(crate) const RECOVERS: &str = "recovers";

/// Visits all states of `world`, on so many threads; ends at a violation.
pub fn exhaust(world: impl Checkable, threads: usize) -> CheckOutcome {
    run(world.checker().threads(threads))
}

pub fn shortest_violation(world: impl Checkable) -> CheckOutcome {
    let started = Instant::now();
    // The checker goes breadth first, but looks for violations only now and then.
    let mut best = run(world.checker());
    while let Some((_, way)) = &best.violated {
        // A way of n steps ends at depth n + 1, and a state at the target depth isn't checked.
        let shorter = run(world.checker().target_max_depth(way.len() + 1));
        if shorter.violated.is_none() {
            break;
        }
        best = shorter;
    }
    best.took = started.elapsed();
    best
}

fn run<M: Checkable>(checker: CheckerBuilder<M>) -> CheckOutcome {
    let started = Instant::now();
    let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let discoveries = checker.discoveries();
    let properties = checker.model().properties();
    let expects = |name: &str, expectation: Expectation| {
        properties.iter().any(|property| property.name == name && property.expectation == expectation)
    };
    let never = properties.iter().filter(|property| expects(property.name, Expectation::Sometimes));
    let never = never.map(|property| property.name).filter(|name| !discoveries.contains_key(name)).collect();
    let violated = discoveries.into_iter().filter(|(name, _)| expects(name, Expectation::Always));
    let violated = violated.map(|(name, path)| (name, path.into_actions())).min_by_key(|(_, way)| way.len());
    CheckOutcome {
        steps: checker.state_count(),
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        took: started.elapsed(),
        violated: violated.map(|(name, way)| (name, way.iter().map(|step| format!("{step:?}")).collect())),
        never,
    }
}
