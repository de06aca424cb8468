//! Violations of guarantees and rules: logged at error level, and counted.
//!
//! All ids of `evictd_invariant_violations_total{id}` exist from the start, at 0, so that an alert needs no series to
//! appear first.

use std::fmt;

use evictd_core::rules::Rule;
use metrics::{Counter, Unit};

use crate::log_limit;
use crate::metrics::{ByLabel, MetricKind, MetricSpec, Registry};

/// [`crate::metric_specs!`] adds it to every daemon's list.
pub const SPEC: MetricSpec = MetricSpec {
    name: "evictd_invariant_violations_total",
    kind: MetricKind::Counter,
    unit: Some(Unit::Count),
    labels: &["id"],
    help: "Times this process saw a guarantee (G) or rule (R) broken. Anything but 0 is a bug, or a machine that breaks evictd's assumptions.",
};

/// Counts and logs violations. Cheap to clone.
#[derive(Clone)]
pub struct Invariants {
    violations: ByLabel<Rule, Counter>,
}

impl Invariants {
    pub fn new(registry: &Registry) -> Self {
        Self { violations: registry.handle(&SPEC) }
    }

    /// Reports that `rule` doesn't hold; `detail` says what was seen instead, and is logged.
    pub fn violated(&self, rule: Rule, detail: impl fmt::Display) {
        if let Some(unlogged) = log_limit!(10, rule.id()) {
            let unlogged = unlogged.field();
            tracing::error!(id = rule.id(), rule = rule.statement(), %detail, unlogged, "invariant violated");
        }
        self.violations.get(rule).increment(1);
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
    fn every_rule_has_its_own_series_from_the_start() {
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
