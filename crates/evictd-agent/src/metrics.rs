//! Every metric of the agent: declared once, and recorded as events.

use std::time::Duration;

use evictd_core::follower::{FlushReason, RepairCause, Via};
use evictd_core::invalidation::Scope;
use evictd_core::lease::Mode;
use evictd_core::record::Verdict;
use evictd_ops::bus::BusMetrics;
use evictd_ops::http::StatusCode;
use evictd_ops::invariants::Invariants;
use evictd_ops::metric_specs;
use evictd_ops::metrics::{LATENCY_BUCKETS, MetricKind, MetricSpec, PROPAGATION_BUCKETS, Registry};
use evictd_wire::subject::MessageKind;
use metrics::{Counter, Gauge, Histogram, Unit};

const COUNTER: MetricKind = MetricKind::Counter;
const GAUGE: MetricKind = MetricKind::Gauge;
const LAG: MetricKind = MetricKind::Histogram { buckets: PROPAGATION_BUCKETS };
const LOAD: MetricKind = MetricKind::Histogram { buckets: LATENCY_BUCKETS };
const SECONDS: Option<Unit> = Some(Unit::Seconds);
const COUNT: Option<Unit> = Some(Unit::Count);
const BYTES: Option<Unit> = Some(Unit::Bytes);

metric_specs! {
    PROPAGATION_LAG = "evictd_agent_propagation_lag_seconds", LAG, SECONDS, ["scope"],
        "From the commit of a change at home to its application here: the middle of the interval in which it lies (see evictd_agent_clock_offset_error_seconds).";
    EXPOSURE = "evictd_agent_exposure_seconds", LAG, SECONDS, [],
        "How long after the commit of a change the old state was last answered from, at most; 0 if it never was.";
    BREACHES = "evictd_agent_bound_breaches_total", COUNTER, COUNT, [],
        "Changes whose old state was answered from for longer than the bound. 0, unless policy serves stale records.";
    PROPAGATION_BOUND = "evictd_agent_propagation_bound_seconds", GAUGE, SECONDS, [],
        "The promise: no answer is based on anything older.";
    LEASE_REMAINING = "evictd_agent_lease_remaining_seconds", GAUGE, SECONDS, [],
        "How long cached entries are still trusted without a new proof; 0 when the lease has run out.";
    MODE = "evictd_agent_mode", GAUGE, None, ["mode"],
        "1 for the current mode: starting, live or expired.";
    APPLIED = "evictd_agent_applied_position", GAUGE, None, [],
        "Everything up to this log position is applied here.";
    HEAD = "evictd_agent_head_position", GAUGE, None, [],
        "The highest log position this agent has heard of.";
    EPOCH = "evictd_agent_epoch", GAUGE, None, [],
        "The log's epoch; it rises when the home store may have gone back.";
    CLOCK_OFFSET = "evictd_agent_clock_offset_seconds", GAUGE, SECONDS, [],
        "The home store's clock less this machine's wall clock, as measured by probes. It can end a key that expires early, never late.";
    CLOCK_ERROR = "evictd_agent_clock_offset_error_seconds", GAUGE, SECONDS, [],
        "By how much the measured clock offset, and with it the lag, may be off in either direction.";
    FEED_SILENT = "evictd_agent_feed_silent", GAUGE, None, [],
        "1 when three ticks of the live feed are missing: changes arrive by repair only.";
    INVALIDATIONS = "evictd_agent_invalidations_total", COUNTER, COUNT, ["via"],
        "Invalidations applied, by how they arrived: live or replay.";
    REPAIRS = "evictd_agent_repairs_total", COUNTER, COUNT, ["cause"],
        "Replays asked for, by what showed the gap.";
    FLUSHES = "evictd_agent_flushes_total", COUNTER, COUNT, ["reason"],
        "Times everything cached was forgotten.";
    FLOORS_MERGED = "evictd_agent_floors_merged_total", COUNTER, COUNT, [],
        "Floors that were merged into wider ones to bound memory; each costs reloads.";
    VERIFICATIONS = "evictd_agent_verifications_total", COUNTER, COUNT, ["code"],
        "Verifications answered, by code; UNAVAILABLE counts those denied because no fresh record could be had.";
    REQUESTS = "evictd_agent_requests_total", COUNTER, COUNT, ["status"],
        "Answers of the verify surface by HTTP status, refusals among them; `other` is every status without a series of its own. 401: the gateway's root key is unknown or was revoked; 403: it has expired or was disabled.";
    STALE_ANSWERS = "evictd_agent_stale_answers_total", COUNTER, COUNT, ["code"],
        "Verifications answered, by policy, from records that are older than the bound allows; they count in evictd_agent_verifications_total as well.";
    CACHE_HITS = "evictd_agent_cache_hits_total", COUNTER, COUNT, [],
        "Records answered from the cache.";
    CACHE_MISSES = "evictd_agent_cache_misses_total", COUNTER, COUNT, [],
        "Records that had to be loaded: not cached, below a floor, or too old.";
    CACHE_ENTRIES = "evictd_agent_cache_entries", GAUGE, COUNT, ["kind"],
        "Entries in the cache: found and not_found. Entries below a floor count until they are read or replaced.";
    CACHE_BYTES = "evictd_agent_cache_bytes", GAUGE, BYTES, [],
        "Estimated memory of the cached records.";
    LOADS = "evictd_agent_loads_total", COUNTER, COUNT, ["outcome"],
        "Loads from the authority: ok, busy (shed there), shed (too many here), timeout, unsent (NATS not connected) or no_publisher (nobody listens there).";
    DATABASE_READS = "evictd_agent_database_reads_total", COUNTER, COUNT, ["outcome"],
        "Records read from the database, where the agent may (`loads.origin`): ok, too_old (older than a change known here) or failed, each attempt to find out whether it works again among them. Where it isn't ok, the authority was asked.";
    LOAD_SECONDS = "evictd_agent_load_seconds", LOAD, SECONDS, [],
        "How long successful loads took.";
    STALE_LOADS = "evictd_agent_stale_loads_rejected_total", COUNTER, COUNT, [],
        "Loads that arrived older than a floor that had risen meanwhile, and so were not cached.";
    IGNORED = "evictd_agent_ignored_messages_total", COUNTER, COUNT, ["subject", "reason"],
        "Messages from the bus that were ignored: malformed, or unasked (an answer to no open question).";
    RIVAL_MESSAGES = "evictd_agent_rival_messages_total", COUNTER, COUNT, [],
        "Messages that came from another home store, or another history of it, than the one that this agent follows. They move nothing; some come when a publisher was restarted, and many when two home stores are active on one bus.";
    NATS_CONNECTED = "evictd_agent_nats_connected", GAUGE, None, ["connection"],
        "1 while connected to a NATS server: lease (the live feed, probes, repairs and announcements) and lookups.";
    NATS_CONNECTS = "evictd_agent_nats_connects_total", COUNTER, COUNT, ["connection"],
        "Connections made to NATS servers, reconnects included.";
    NATS_ERRORS = "evictd_agent_nats_errors_total", COUNTER, COUNT, ["connection", "kind"],
        "Errors of a NATS connection: slow_consumer (messages dropped here) or server (as the server reports, permission violations among them).";
}

/// The statuses that have a series each; the last one is for all others.
const STATUSES: [&str; 12] =
    ["200", "400", "401", "403", "404", "405", "408", "413", "429", "500", "503", "other"];

/// The handles, made once.
#[derive(Debug)]
pub struct Metrics {
    lag: [Histogram; 4],
    exposure: Histogram,
    breaches: Counter,
    bound: Gauge,
    lease_remaining: Gauge,
    mode: [Gauge; 3],
    applied: Gauge,
    head: Gauge,
    epoch: Gauge,
    clock_offset: Gauge,
    clock_error: Gauge,
    feed_silent: Gauge,
    live: Counter,
    replayed: Counter,
    repairs: [Counter; 3],
    flushes: [Counter; 4],
    floors_merged: Counter,
    verdicts: [Counter; Verdict::ALL.len()],
    stale_answers: [Counter; Verdict::ALL.len()],
    unavailable: Counter,
    requests: [Counter; STATUSES.len()],
    /// Records answered from the cache.
    pub(crate) hits: Counter,
    /// Records that had to be loaded.
    pub(crate) misses: Counter,
    entries_found: Gauge,
    entries_not_found: Gauge,
    cache_bytes: Gauge,
    loads: [Counter; 6],
    database_reads: [Counter; 3],
    load_seconds: Histogram,
    /// Loads older than a floor that rose meanwhile.
    pub(crate) stale_loads: Counter,
    rival_messages: Counter,
    malformed: [Counter; 4],
    unasked: [Counter; 4],
    pub(crate) nats_lease: BusMetrics,
    pub(crate) nats_lookups: BusMetrics,
    pub(crate) invariants: Invariants,
}

/// What came of a load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LoadOutcome {
    Ok,
    Busy,
    Shed,
    Timeout,
    Unsent,
    NoPublisher,
}

/// What came of a read from the database.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DatabaseOutcome {
    Ok,
    TooOld,
    Failed,
}

/// What an incoming message pretends to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Incoming {
    Live,
    Answer(MessageKind),
}

impl Incoming {
    const LABELS: [&'static str; 4] = ["live", "probe", "replay", "lookup"];

    fn index(self) -> usize {
        match self {
            Self::Live | Self::Answer(MessageKind::Applied) => 0,
            Self::Answer(MessageKind::Probe) => 1,
            Self::Answer(MessageKind::Replay) => 2,
            Self::Answer(MessageKind::Lookup) => 3,
        }
    }
}

impl Metrics {
    /// Makes the handles.
    pub fn new(registry: &Registry) -> Self {
        let counter = |spec: &MetricSpec, label, value| registry.counter(spec, &[(label, value)]);
        let gauge = |spec: &MetricSpec| registry.gauge(spec, &[]);
        let ignored = |reason| {
            Incoming::LABELS
                .map(|subject| registry.counter(&IGNORED, &[("subject", subject), ("reason", reason)]))
        };
        Self {
            lag: ["key", "api", "workspace", "all"]
                .map(|scope| registry.histogram(&PROPAGATION_LAG, &[("scope", scope)])),
            exposure: registry.histogram(&EXPOSURE, &[]),
            breaches: registry.counter(&BREACHES, &[]),
            bound: gauge(&PROPAGATION_BOUND),
            lease_remaining: gauge(&LEASE_REMAINING),
            mode: Mode::ALL.map(|mode| registry.gauge(&MODE, &[("mode", mode.label())])),
            applied: gauge(&APPLIED),
            head: gauge(&HEAD),
            epoch: gauge(&EPOCH),
            clock_offset: gauge(&CLOCK_OFFSET),
            clock_error: gauge(&CLOCK_ERROR),
            feed_silent: gauge(&FEED_SILENT),
            live: counter(&INVALIDATIONS, "via", "live"),
            replayed: counter(&INVALIDATIONS, "via", "replay"),
            repairs: RepairCause::ALL.map(|cause| counter(&REPAIRS, "cause", cause.label())),
            flushes: FlushReason::ALL.map(|reason| counter(&FLUSHES, "reason", reason.label())),
            floors_merged: registry.counter(&FLOORS_MERGED, &[]),
            verdicts: Verdict::ALL.map(|verdict| counter(&VERIFICATIONS, "code", verdict.code())),
            stale_answers: Verdict::ALL.map(|verdict| counter(&STALE_ANSWERS, "code", verdict.code())),
            unavailable: counter(&VERIFICATIONS, "code", "UNAVAILABLE"),
            requests: STATUSES.map(|status| counter(&REQUESTS, "status", status)),
            hits: registry.counter(&CACHE_HITS, &[]),
            misses: registry.counter(&CACHE_MISSES, &[]),
            entries_found: registry.gauge(&CACHE_ENTRIES, &[("kind", "found")]),
            entries_not_found: registry.gauge(&CACHE_ENTRIES, &[("kind", "not_found")]),
            cache_bytes: gauge(&CACHE_BYTES),
            loads: ["ok", "busy", "shed", "timeout", "unsent", "no_publisher"]
                .map(|outcome| counter(&LOADS, "outcome", outcome)),
            database_reads: ["ok", "too_old", "failed"]
                .map(|outcome| counter(&DATABASE_READS, "outcome", outcome)),
            load_seconds: registry.histogram(&LOAD_SECONDS, &[]),
            stale_loads: registry.counter(&STALE_LOADS, &[]),
            rival_messages: registry.counter(&RIVAL_MESSAGES, &[]),
            malformed: ignored("malformed"),
            unasked: ignored("unasked"),
            nats_lease: bus_metrics(registry, "lease"),
            nats_lookups: bus_metrics(registry, "lookups"),
            invariants: Invariants::new(registry),
        }
    }

    /// A change was applied; its lag, if it is known.
    pub(crate) fn applied(&self, scope: &Scope, via: Via, lag: Option<Duration>) {
        let index = match scope {
            Scope::Key { .. } => 0,
            Scope::Api(_) => 1,
            Scope::Workspace(_) => 2,
            Scope::All => 3,
        };
        if let Some(lag) = lag {
            self.lag[index].record(lag.as_secs_f64());
        }
        match via {
            Via::Live => self.live.increment(1),
            Via::Replay => self.replayed.increment(1),
        }
    }

    /// What was answered from the state before a change, after its commit.
    pub(crate) fn exposed(&self, at_most: Duration) {
        self.exposure.record(at_most.as_secs_f64());
    }

    /// Something was answered from a state older than the bound.
    pub(crate) fn breached(&self) {
        self.breaches.increment(1);
    }

    pub(crate) fn flushed(&self, reason: FlushReason) {
        let index = FlushReason::ALL.iter().position(|known| *known == reason);
        self.flushes[index.unwrap_or(0)].increment(1);
    }

    pub(crate) fn repair(&self, cause: RepairCause) {
        let index = RepairCause::ALL.iter().position(|known| *known == cause);
        self.repairs[index.unwrap_or(0)].increment(1);
    }

    pub(crate) fn floors_merged(&self, floors: usize) {
        self.floors_merged.increment(floors as u64);
    }

    pub(crate) fn progress(&self, epoch: u32, applied: u64, head: u64) {
        self.epoch.set(f64::from(epoch));
        self.applied.set(applied as f64);
        self.head.set(head as f64);
    }

    pub(crate) fn lease(&self, bound: Duration, remaining: Duration, mode: Mode) {
        self.bound.set(bound.as_secs_f64());
        self.lease_remaining.set(remaining.as_secs_f64());
        for (gauge, known) in self.mode.iter().zip(Mode::ALL) {
            gauge.set(if known == mode { 1.0 } else { 0.0 });
        }
    }

    /// The lowest and highest that the store's clock less this machine's can be, in microseconds.
    pub(crate) fn clock(&self, low: i64, high: i64) {
        let (low, high) = (low as f64 / 1e6, high as f64 / 1e6);
        self.clock_offset.set(f64::midpoint(low, high));
        self.clock_error.set((high - low) / 2.0);
    }

    pub(crate) fn feed_silent(&self, silent: bool) {
        self.feed_silent.set(if silent { 1.0 } else { 0.0 });
    }

    pub(crate) fn verified(&self, verdict: Verdict, stale: bool) {
        let index = Verdict::ALL.iter().position(|known| *known == verdict).unwrap_or(0);
        self.verdicts[index].increment(1);
        if stale {
            self.stale_answers[index].increment(1);
        }
    }

    pub(crate) fn unavailable(&self) {
        self.unavailable.increment(1);
    }

    /// The verify surface has answered something.
    pub(crate) fn answered(&self, status: StatusCode) {
        let index = STATUSES.iter().position(|known| *known == status.as_str());
        self.requests[index.unwrap_or(STATUSES.len() - 1)].increment(1);
    }

    pub(crate) fn cache(&self, found: u64, not_found: u64, bytes: u64) {
        self.entries_found.set(found as f64);
        self.entries_not_found.set(not_found as f64);
        self.cache_bytes.set(bytes as f64);
    }

    pub(crate) fn loaded(&self, outcome: LoadOutcome) {
        self.loads[outcome as usize].increment(1);
    }

    pub(crate) fn read_from_database(&self, outcome: DatabaseOutcome) {
        self.database_reads[outcome as usize].increment(1);
    }

    pub(crate) fn load_took(&self, duration: Duration) {
        self.load_seconds.record(duration.as_secs_f64());
    }

    pub(crate) fn rival_message(&self) {
        self.rival_messages.increment(1);
    }

    pub(crate) fn malformed(&self, incoming: Incoming) {
        self.malformed[incoming.index()].increment(1);
    }

    pub(crate) fn unasked(&self, incoming: Incoming) {
        self.unasked[incoming.index()].increment(1);
    }
}

/// The handles of one of the connections.
fn bus_metrics(registry: &Registry, connection: &str) -> BusMetrics {
    let error = |kind| registry.counter(&NATS_ERRORS, &[("connection", connection), ("kind", kind)]);
    BusMetrics {
        connected: registry.gauge(&NATS_CONNECTED, &[("connection", connection)]),
        connects: registry.counter(&NATS_CONNECTS, &[("connection", connection)]),
        slow_consumer: error("slow_consumer"),
        server_errors: error("server"),
    }
}
