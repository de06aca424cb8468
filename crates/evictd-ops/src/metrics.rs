//! Metrics: declared as data, handed out as handles, rendered in Prometheus' text format.
//!
//! Each daemon declares its metrics in one static list of [`MetricSpec`]s; the handles, the scrape and the reference
//! page all come from that list. A label with a closed set of values is a [`Label`] enum, and [`ByLabel`] holds a handle
//! for each value. A [`Registry`] belongs to one daemon instead of to the process, so that several daemons in one
//! process (`evictd dev`) don't mix their numbers.

use std::fmt::Write as _;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::labels::Label;
use metrics::{Counter, Gauge, Histogram, Key, Level, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use tokio_util::sync::CancellationToken;

use crate::time::every;

/// The declaration of one metric.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MetricSpec {
    /// The full name. Counters end in `_total`.
    pub name: &'static str,
    pub kind: MetricKind,
    /// Base units only, as the name says (`_seconds`, `_bytes`).
    pub unit: Option<Unit>,
    /// The labels that each of its series has, in the order in which handles give their values.
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

/// Declares metrics: a constant each, and `SPECS`, the list of all, with what every daemon has
/// ([`crate::invariants::SPEC`]) at its end.
#[macro_export]
macro_rules! metric_specs {
    ($(
        $visibility:vis $constant:ident = $name:literal, $kind:expr, $unit:expr, [$($label:literal),*],
        $help:literal;
    )*) => {
        $($visibility const $constant: $crate::metrics::MetricSpec = $crate::metrics::MetricSpec {
            name: $name, kind: $kind, unit: $unit, labels: &[$($label),*], help: $help,
        };)*
        /// All metrics of this daemon.
        pub const SPECS: &[$crate::metrics::MetricSpec] = &[$($constant,)* $crate::invariants::SPEC, $crate::reload::SPEC];
    };
}

/// Edges for the time that a deletion takes: 1 ms to the bound, with an exact edge at 30 s.
pub const PROPAGATION_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0,
    60.0,
];

/// Edges for requests and transactions: half a millisecond to 5 s.
pub const LATENCY_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0];

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram {
        /// Upper edges, ascending, in the metric's unit; `+Inf` is added.
        buckets: &'static [f64],
    },
}

/// Why a [`Registry`] can't be made: the declarations are wrong, which a test should find.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    #[error("the metric `{0}` is declared twice")]
    DeclaredTwice(&'static str),
    #[error(
        "the metric name `{0}` must be lower case with underscores; counters, and only they, end in `_total`"
    )]
    BadName(&'static str),
    #[error("the histogram `{name}` needs ascending buckets")]
    BadBuckets { name: &'static str, source: Option<BuildError> },
}

/// The metrics of one daemon. Clones share them.
#[derive(Clone)]
pub struct Registry {
    specs: &'static [MetricSpec],
    recorder: Arc<PrometheusRecorder>,
    scrape: PrometheusHandle,
}

/// The exporter's interface requires a target and a level, which nothing filters by.
const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

impl Registry {
    /// Makes a registry for the metrics in `specs`; every series carries `global_labels`.
    pub fn new(specs: &'static [MetricSpec], global_labels: &[(&str, String)]) -> Result<Self, MetricsError> {
        let mut builder = PrometheusBuilder::new();
        for (label, value) in global_labels {
            builder = builder.add_global_label(*label, value);
        }
        for (index, spec) in specs.iter().enumerate() {
            check(spec)?;
            if specs[..index].iter().any(|earlier| earlier.name == spec.name) {
                return Err(MetricsError::DeclaredTwice(spec.name));
            }
            if let MetricKind::Histogram { buckets } = spec.kind {
                builder = builder
                    .set_buckets_for_metric(Matcher::Full(spec.name.to_owned()), buckets)
                    .map_err(|error| MetricsError::BadBuckets { name: spec.name, source: Some(error) })?;
            }
        }
        let recorder = builder.build_recorder();
        for spec in specs {
            describe(&recorder, spec);
        }
        let scrape = recorder.handle();
        Ok(Self { specs, recorder: Arc::new(recorder), scrape })
    }

    /// Makes the handle of one series of a counter, given the values of its labels. The scrape shows it from now on,
    /// at 0.
    ///
    /// Make handles once and keep them: making one costs a hundred times as much as counting.
    pub fn counter(&self, spec: &MetricSpec, labels: &[&str]) -> Counter {
        debug_assert!(matches!(spec.kind, MetricKind::Counter), "`{}` isn't a counter", spec.name);
        self.recorder.register_counter(&self.key(spec, labels), &METADATA)
    }

    /// As [`Registry::counter`], for a gauge.
    pub fn gauge(&self, spec: &MetricSpec, labels: &[&str]) -> Gauge {
        debug_assert!(matches!(spec.kind, MetricKind::Gauge), "`{}` isn't a gauge", spec.name);
        self.recorder.register_gauge(&self.key(spec, labels), &METADATA)
    }

    /// As [`Registry::counter`], for a histogram.
    pub fn histogram(&self, spec: &MetricSpec, labels: &[&str]) -> Histogram {
        debug_assert!(matches!(spec.kind, MetricKind::Histogram { .. }), "`{}` isn't a histogram", spec.name);
        self.recorder.register_histogram(&self.key(spec, labels), &METADATA)
    }

    /// Makes the handle of a metric all of whose labels are [`Label`]s, one within the other as [`ByLabel`]s.
    pub fn handle<H: Handle>(&self, spec: &MetricSpec) -> H {
        H::register(self, spec, &[])
    }

    /// Renders all metrics in Prometheus' text format.
    pub fn render(&self) -> String {
        self.scrape.render()
    }

    /// Keeps histograms small until `token` is cancelled: the exporter stores each sample until it is drained, which
    /// may be never if there is no scrape.
    pub async fn run_upkeep(&self, token: CancellationToken) {
        let mut every_second = every(Duration::from_secs(1));
        while token.run_until_cancelled(every_second.tick()).await.is_some() {
            self.scrape.run_upkeep();
        }
    }

    fn key(&self, spec: &MetricSpec, values: &[&str]) -> Key {
        debug_assert!(
            self.specs.iter().any(|known| known.name == spec.name),
            "`{}` is missing from the list the registry was made of",
            spec.name
        );
        debug_assert_eq!(values.len(), spec.labels.len(), "`{}` has the labels {:?}", spec.name, spec.labels);
        let labels = spec.labels.iter().zip(values);
        let labels: Vec<_> =
            labels.map(|(label, value)| metrics::Label::new(*label, (*value).to_owned())).collect();
        Key::from_parts(spec.name, labels)
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("specs", &self.specs.len()).finish_non_exhaustive()
    }
}

/// A handle of a metric, or one for each value of its labels.
pub trait Handle {
    /// `values` are those of the first labels.
    fn register(registry: &Registry, spec: &MetricSpec, values: &[&str]) -> Self;
}

impl Handle for Counter {
    fn register(registry: &Registry, spec: &MetricSpec, values: &[&str]) -> Self {
        registry.counter(spec, values)
    }
}

impl Handle for Gauge {
    fn register(registry: &Registry, spec: &MetricSpec, values: &[&str]) -> Self {
        registry.gauge(spec, values)
    }
}

impl Handle for Histogram {
    fn register(registry: &Registry, spec: &MetricSpec, values: &[&str]) -> Self {
        registry.histogram(spec, values)
    }
}

impl<L: Label, H: Handle> Handle for ByLabel<L, H> {
    fn register(registry: &Registry, spec: &MetricSpec, values: &[&str]) -> Self {
        Self::new(|value: L| H::register(registry, spec, &[values, &[value.label()]].concat()))
    }
}

/// A handle, or whatever `H` is, for each value of a label.
#[derive(Clone, Debug)]
pub struct ByLabel<L, H> {
    handles: Box<[H]>,
    label: PhantomData<L>,
}

impl<L: Label, H> ByLabel<L, H> {
    pub fn new(handle: impl FnMut(L) -> H) -> Self {
        Self { handles: L::ALL.iter().copied().map(handle).collect(), label: PhantomData }
    }

    pub fn get(&self, value: L) -> &H {
        &self.handles[value.index()]
    }

    pub fn iter(&self) -> impl Iterator<Item = (L, &H)> {
        L::ALL.iter().copied().zip(&self.handles)
    }
}

impl<L: Label> ByLabel<L, Gauge> {
    /// Sets the gauge of `value` to 1 and the others to 0.
    pub fn set_only(&self, value: L) {
        for (other, gauge) in self.iter() {
            gauge.set(if other.index() == value.index() { 1.0 } else { 0.0 });
        }
    }
}

fn check(spec: &MetricSpec) -> Result<(), MetricsError> {
    let spelled_well = spec.name.starts_with(|first: char| first.is_ascii_lowercase())
        && spec.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let is_counter = matches!(spec.kind, MetricKind::Counter);
    if !spelled_well || is_counter != spec.name.ends_with("_total") {
        return Err(MetricsError::BadName(spec.name));
    }
    match spec.kind {
        MetricKind::Histogram { buckets } if !buckets.is_sorted_by(|low, high| low < high) => {
            Err(MetricsError::BadBuckets { name: spec.name, source: None })
        }
        _ => Ok(()),
    }
}

fn describe(recorder: &PrometheusRecorder, spec: &MetricSpec) {
    let help = SharedString::const_str(spec.help);
    match spec.kind {
        MetricKind::Counter => recorder.describe_counter(spec.name.into(), spec.unit, help),
        MetricKind::Gauge => recorder.describe_gauge(spec.name.into(), spec.unit, help),
        MetricKind::Histogram { .. } => recorder.describe_histogram(spec.name.into(), spec.unit, help),
    }
}

/// Renders the reference page of a list of metrics as Markdown.
pub fn reference(title: &str, specs: &[MetricSpec]) -> String {
    let mut page = format!("# {title}\n\n| name | type | labels | what |\n|---|---|---|---|\n");
    for spec in specs {
        let labels: Vec<String> = spec.labels.iter().map(|label| format!("`{label}`")).collect();
        let kind = match spec.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram { .. } => "histogram",
        };
        let help = spec.help.replace('|', "\\|");
        // Writing to a String can't fail.
        let _ = writeln!(page, "| `{}` | {kind} | {} | {help} |", spec.name, labels.join(", "));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVICTIONS: MetricSpec = MetricSpec {
        name: "test_evictions_total",
        kind: MetricKind::Counter,
        unit: Some(Unit::Count),
        labels: &["scope"],
        help: "Entries evicted, by scope | of any size.",
    };
    const ENTRIES: MetricSpec = MetricSpec {
        name: "test_entries",
        kind: MetricKind::Gauge,
        unit: None,
        labels: &[],
        help: "Entries in the cache.",
    };
    const LAG: MetricSpec = MetricSpec {
        name: "test_lag_seconds",
        kind: MetricKind::Histogram { buckets: &[0.005, 1.0, 30.0] },
        unit: Some(Unit::Seconds),
        labels: &[],
        help: "From commit to eviction.",
    };
    static SPECS: [MetricSpec; 3] = [EVICTIONS, ENTRIES, LAG];

    fn registry() -> Registry {
        Registry::new(&SPECS, &[("region", "eu".to_owned())]).unwrap()
    }

    #[test]
    fn registered_series_shows_before_its_first_event() {
        let registry = registry();
        let _ = registry.counter(&EVICTIONS, &["key"]);
        let _ = registry.gauge(&ENTRIES, &[]);
        let _ = registry.histogram(&LAG, &[]);
        let scrape = registry.render();
        for line in [
            "# HELP test_evictions_total Entries evicted, by scope | of any size.",
            "# TYPE test_evictions_total counter",
            r#"test_evictions_total{region="eu",scope="key"} 0"#,
            "# TYPE test_entries gauge",
            r#"test_entries{region="eu"} 0"#,
            "# TYPE test_lag_seconds histogram",
            r#"test_lag_seconds_bucket{region="eu",le="30"} 0"#,
            r#"test_lag_seconds_count{region="eu"} 0"#,
        ] {
            assert!(scrape.lines().any(|found| found == line), "missing {line:?} in\n{scrape}");
        }
    }

    #[test]
    fn sample_on_an_edge_counts_in_its_bucket() {
        let registry = registry();
        let lag = registry.histogram(&LAG, &[]);
        lag.record(30.0);
        lag.record(30.1);
        let scrape = registry.render();
        assert!(scrape.contains(r#"le="30"} 1"#), "{scrape}");
        assert!(scrape.contains(r#"le="+Inf"} 2"#), "{scrape}");
    }

    #[test]
    fn two_registries_do_not_mix() {
        let (one, other) = (registry(), registry());
        one.counter(&EVICTIONS, &["key"]).increment(7);
        let _ = other.counter(&EVICTIONS, &["key"]);
        assert!(one.render().contains(r#"scope="key"} 7"#));
        assert!(other.render().contains(r#"scope="key"} 0"#));
    }

    #[tokio::test(start_paused = true)]
    async fn upkeep_ends_with_its_token() {
        let token = CancellationToken::new();
        let registry = registry();
        let upkeep = tokio::spawn({
            let (registry, token) = (registry.clone(), token.clone());
            async move { registry.run_upkeep(token).await }
        });
        registry.histogram(&LAG, &[]).record(1.0);
        token.cancel();
        upkeep.await.unwrap();
        assert!(registry.render().contains(r#"le="1"} 1"#));
    }

    #[test]
    fn wrong_declarations_are_refused() {
        static TWICE: [MetricSpec; 2] = [ENTRIES, ENTRIES];
        static BARE_COUNTER: [MetricSpec; 1] = [MetricSpec { name: "test_evictions", ..EVICTIONS }];
        static NO_BUCKETS: [MetricSpec; 1] =
            [MetricSpec { kind: MetricKind::Histogram { buckets: &[] }, ..LAG }];
        static DESCENDING: [MetricSpec; 1] =
            [MetricSpec { kind: MetricKind::Histogram { buckets: &[2.0, 1.0] }, ..LAG }];
        let refusal = |specs| Registry::new(specs, &[]).unwrap_err();
        assert!(matches!(refusal(&TWICE), MetricsError::DeclaredTwice("test_entries")));
        assert!(matches!(refusal(&BARE_COUNTER), MetricsError::BadName("test_evictions")));
        assert!(matches!(refusal(&NO_BUCKETS), MetricsError::BadBuckets { source: Some(_), .. }));
        assert!(matches!(refusal(&DESCENDING), MetricsError::BadBuckets { source: None, .. }));
    }

    #[test]
    #[should_panic(expected = "has the labels")]
    #[cfg(debug_assertions)]
    fn handle_with_the_wrong_labels_panics() {
        let _ = registry().counter(&EVICTIONS, &["eu", "key"]);
    }

    /// Failure: a variant that is added in the middle shifts the labels of those behind it.
    #[test]
    fn each_value_of_a_label_counts_in_its_own_series() {
        evictd_core::labels! {
            enum EvictedScope {
                Key = "key",
                Api = "api",
                Workspace = "workspace",
            }
        }
        let registry = registry();
        let evictions: ByLabel<EvictedScope, Counter> = registry.handle(&EVICTIONS);
        for (count, scope) in (1..).zip(EvictedScope::ALL) {
            evictions.get(scope).increment(count);
        }
        let scrape = registry.render();
        for (label, count) in [("key", 1), ("api", 2), ("workspace", 3)] {
            let line = format!("test_evictions_total{{region=\"eu\",scope=\"{label}\"}} {count}");
            assert!(scrape.lines().any(|found| found == line), "missing {line:?} in\n{scrape}");
        }
    }

    #[test]
    fn reference_lists_every_metric() {
        assert_eq!(
            reference("Metrics of a test", &SPECS),
            "# Metrics of a test\n\n\
             | name | type | labels | what |\n|---|---|---|---|\n\
             | `test_evictions_total` | counter | `scope` | Entries evicted, by scope \\| of any size. |\n\
             | `test_entries` | gauge |  | Entries in the cache. |\n\
             | `test_lag_seconds` | histogram |  | From commit to eviction. |\n"
        );
    }
}
