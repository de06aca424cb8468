//! What must never be seen, counted when it is seen all the same.
//!
//! A daemon that notices that a guarantee or rule doesn't hold says so in one place: at error level in the
//! log, and in `evictd_invariant_violations_total{id}`. All ids are there from the start, at 0, so that an
//! alert needs no series to appear first.

use std::fmt;

use evictd_core::rules::Rule;
use metrics::{Counter, Unit};

use crate::metrics::{MetricKind, MetricSpec, Registry};

/// The counter. [`crate::metric_specs!`] puts it on every daemon's list.
pub const SPEC: MetricSpec = MetricSpec {
    name: "evictd_invariant_violations_total",
    kind: MetricKind::Counter,
    unit: Some(Unit::Count),
    labels: &["id"],
    help: "Times this process saw a guarantee (G) or rule (R) broken. Anything but 0 is a bug or a machine outside of what evictd is promised.",
};

/// Counts and logs what must not happen. Cheap to clone, and cheap as long as all is well.
#[derive(Clone)]
pub struct Invariants {
    violations: [Counter; Rule::ALL.len()],
}

impl Invariants {
    /// Makes the counters, of every rule there is.
    pub fn new(registry: &Registry) -> Self {
        Self { violations: Rule::ALL.map(|rule| registry.counter(&SPEC, &[("id", rule.id())])) }
    }

    /// `rule` doesn't hold; `detail` says what was seen instead. No secrets in it: it is logged.
    pub fn violated(&self, rule: Rule, detail: impl fmt::Display) {
        tracing::error!(id = rule.id(), rule = rule.statement(), %detail, "an invariant is violated");
        self.violations[rule as usize].increment(1);
    }
}

impl fmt::Debug for Invariants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invariants").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static SPECS: [MetricSpec; 1] = [SPEC];

    #[test]
    fn every_rule_has_its_series_from_the_start_and_counts_for_itself() {
        let registry = Registry::new(&SPECS, &[]).unwrap();
        let invariants = Invariants::new(&registry);
        for rule in Rule::ALL {
            let series = format!("evictd_invariant_violations_total{{id=\"{}\"}}", rule.id());
            assert!(registry.render().contains(&format!("{series} 0\n")), "{series}");
            invariants.violated(rule, "on purpose");
            assert!(registry.render().contains(&format!("{series} 1\n")), "{series}");
        }
    }
}
