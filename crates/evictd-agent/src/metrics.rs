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
use evictd_ops::metrics::{ByLabel, LATENCY_BUCKETS, MetricKind, PROPAGATION_BUCKETS, Registry};
use evictd_ops::reload::{self, ReloadOutcome};
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
        "The bound: no answer is based on anything older.";
    LEASE_REMAINING = "evictd_agent_lease_remaining_seconds", GAUGE, SECONDS, [],
        "How long cached entries are still served without a new proof; 0 when the lease has expired.";
    MODE = "evictd_agent_mode", GAUGE, None, ["mode"],
        "1 for the current mode: starting, live or expired.";
    APPLIED = "evictd_agent_applied_position", GAUGE, None, [],
        "Everything up to this log position is applied here.";
    HEAD = "evictd_agent_head_position", GAUGE, None, [],
        "The highest log position that this agent has received.";
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
        "Replays requested, by what showed the gap.";
    FLUSHES = "evictd_agent_flushes_total", COUNTER, COUNT, ["reason"],
        "Flushes of the whole cache, by reason.";
    FLOORS_MERGED = "evictd_agent_floors_merged_total", COUNTER, COUNT, [],
        "Floors that were merged into wider ones to bound memory; each costs reloads.";
    VERIFICATIONS = "evictd_agent_verifications_total", COUNTER, COUNT, ["code"],
        "Verifications answered, by code; UNAVAILABLE counts those denied because no fresh record could be had.";
    REQUESTS = "evictd_agent_requests_total", COUNTER, COUNT, ["status"],
        "Answers of the verify API by HTTP status, refusals among them; `other` is every status without a series of its own. 401: the gateway's root key is unknown or was revoked; 403: it has expired or was disabled.";
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
        "Loads from the authority: ok, busy (shed there), shed (too many here), timeout, unsent (NATS not connected) or no_publisher (no publisher subscribes there).";
    DATABASE_READS = "evictd_agent_database_reads_total", COUNTER, COUNT, ["outcome"],
        "Records read from the database, where the agent may (`loads.origin`): ok, too_old (older than a change known here) or failed, retries after a failure among them. Unless it is ok, the record was loaded from the authority.";
    LOAD_SECONDS = "evictd_agent_load_seconds", LOAD, SECONDS, [],
        "How long successful loads took.";
    STALE_LOADS = "evictd_agent_stale_loads_rejected_total", COUNTER, COUNT, [],
        "Loads that were not cached, because a floor had risen above them meanwhile.";
    IGNORED = "evictd_agent_ignored_messages_total", COUNTER, COUNT, ["subject", "reason"],
        "Messages from the bus that were ignored: malformed, or unasked (an answer to no open request).";
    RIVAL_MESSAGES = "evictd_agent_rival_messages_total", COUNTER, COUNT, [],
        "Messages from another home store, or another history of it, than the one that this agent follows. They have no effect. A few are normal after a publisher restarts; many mean that two home stores are active on one bus.";
    NATS_CONNECTED = "evictd_agent_nats_connected", GAUGE, None, ["connection"],
        "1 while connected to a NATS server: lease (the live feed, probes, repairs and announcements) and lookups.";
    NATS_CONNECTS = "evictd_agent_nats_connects_total", COUNTER, COUNT, ["connection"],
        "Connections made to NATS servers, reconnects included.";
    NATS_ERRORS = "evictd_agent_nats_errors_total", COUNTER, COUNT, ["connection", "kind"],
        "Errors of a NATS connection: slow_consumer (messages dropped here) or server (as the server reports, permission violations among them).";
}

evictd_core::labels! {
    /// The scope of a change, as the lag is labeled.
    enum LagScope { Key = "key", Api = "api", Workspace = "workspace", All = "all" }

    enum CacheKind { Found = "found", NotFound = "not_found" }

    /// The statuses that have a series each, and one for all others.
    enum StatusLabel {
        Ok = "200",
        BadRequest = "400",
        Unauthorized = "401",
        Forbidden = "403",
        NotFound = "404",
        MethodNotAllowed = "405",
        RequestTimeout = "408",
        PayloadTooLarge = "413",
        TooManyRequests = "429",
        InternalServerError = "500",
        ServiceUnavailable = "503",
        Other = "other",
    }

    /// The outcome of a load from the authority.
    pub(crate) enum LoadOutcome {
        Ok = "ok",
        Busy = "busy",
        Shed = "shed",
        Timeout = "timeout",
        Unsent = "unsent",
        NoPublisher = "no_publisher",
    }

    /// The outcome of a read from the database.
    pub(crate) enum DatabaseOutcome { Ok = "ok", TooOld = "too_old", Failed = "failed" }

    /// What an incoming message claims to be.
    pub(crate) enum Incoming { Live = "live", Probe = "probe", Replay = "replay", Lookup = "lookup" }

    /// Why an incoming message was ignored.
    enum IgnoreReason { Malformed = "malformed", Unasked = "unasked" }
}

impl From<StatusCode> for StatusLabel {
    fn from(status: StatusCode) -> Self {
        Self::ALL.into_iter().find(|known| known.label() == status.as_str()).unwrap_or(Self::Other)
    }
}

/// The handles, made once.
#[derive(Debug)]
pub struct AgentMetrics {
    lag: ByLabel<LagScope, Histogram>,
    exposure: Histogram,
    breaches: Counter,
    bound: Gauge,
    lease_remaining: Gauge,
    mode: ByLabel<Mode, Gauge>,
    applied: Gauge,
    head: Gauge,
    epoch: Gauge,
    clock_offset: Gauge,
    clock_error: Gauge,
    feed_silent: Gauge,
    invalidations: ByLabel<Via, Counter>,
    repairs: ByLabel<RepairCause, Counter>,
    flushes: ByLabel<FlushReason, Counter>,
    floors_merged: Counter,
    verdicts: ByLabel<Verdict, Counter>,
    stale_answers: ByLabel<Verdict, Counter>,
    unavailable: Counter,
    requests: ByLabel<StatusLabel, Counter>,
    /// Records answered from the cache.
    pub(crate) hits: Counter,
    /// Records that had to be loaded.
    pub(crate) misses: Counter,
    cache_entries: ByLabel<CacheKind, Gauge>,
    cache_bytes: Gauge,
    loads: ByLabel<LoadOutcome, Counter>,
    database_reads: ByLabel<DatabaseOutcome, Counter>,
    load_seconds: Histogram,
    /// Loads older than a floor that rose meanwhile.
    pub(crate) stale_loads: Counter,
    rival_messages: Counter,
    ignored: ByLabel<Incoming, ByLabel<IgnoreReason, Counter>>,
    pub(crate) nats_lease: BusMetrics,
    pub(crate) nats_lookups: BusMetrics,
    pub(crate) invariants: Invariants,
    pub(crate) config_reloads: ByLabel<ReloadOutcome, Counter>,
}

impl AgentMetrics {
    /// Makes the handles.
    pub fn new(registry: &Registry) -> Self {
        Self {
            config_reloads: registry.handle(&reload::SPEC),
            lag: registry.handle(&PROPAGATION_LAG),
            exposure: registry.handle(&EXPOSURE),
            breaches: registry.handle(&BREACHES),
            bound: registry.handle(&PROPAGATION_BOUND),
            lease_remaining: registry.handle(&LEASE_REMAINING),
            mode: registry.handle(&MODE),
            applied: registry.handle(&APPLIED),
            head: registry.handle(&HEAD),
            epoch: registry.handle(&EPOCH),
            clock_offset: registry.handle(&CLOCK_OFFSET),
            clock_error: registry.handle(&CLOCK_ERROR),
            feed_silent: registry.handle(&FEED_SILENT),
            invalidations: registry.handle(&INVALIDATIONS),
            repairs: registry.handle(&REPAIRS),
            flushes: registry.handle(&FLUSHES),
            floors_merged: registry.handle(&FLOORS_MERGED),
            verdicts: registry.handle(&VERIFICATIONS),
            stale_answers: registry.handle(&STALE_ANSWERS),
            unavailable: registry.counter(&VERIFICATIONS, &["UNAVAILABLE"]),
            requests: registry.handle(&REQUESTS),
            hits: registry.handle(&CACHE_HITS),
            misses: registry.handle(&CACHE_MISSES),
            cache_entries: registry.handle(&CACHE_ENTRIES),
            cache_bytes: registry.handle(&CACHE_BYTES),
            loads: registry.handle(&LOADS),
            database_reads: registry.handle(&DATABASE_READS),
            load_seconds: registry.handle(&LOAD_SECONDS),
            stale_loads: registry.handle(&STALE_LOADS),
            rival_messages: registry.handle(&RIVAL_MESSAGES),
            ignored: registry.handle(&IGNORED),
            nats_lease: bus_metrics(registry, "lease"),
            nats_lookups: bus_metrics(registry, "lookups"),
            invariants: Invariants::new(registry),
        }
    }

    /// A change was applied; its lag, if it is known.
    pub(crate) fn applied(&self, scope: &Scope, via: Via, lag: Option<Duration>) {
        let lag_scope = match scope {
            Scope::Key { .. } => LagScope::Key,
            Scope::Api(_) => LagScope::Api,
            Scope::Workspace(_) => LagScope::Workspace,
            Scope::All => LagScope::All,
        };
        if let Some(lag) = lag {
            self.lag.get(lag_scope).record(lag.as_secs_f64());
        }
        self.invalidations.get(via).increment(1);
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
        self.flushes.get(reason).increment(1);
    }

    pub(crate) fn repair(&self, cause: RepairCause) {
        self.repairs.get(cause).increment(1);
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
        self.mode.set_only(mode);
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
        self.verdicts.get(verdict).increment(1);
        if stale {
            self.stale_answers.get(verdict).increment(1);
        }
    }

    pub(crate) fn unavailable(&self) {
        self.unavailable.increment(1);
    }

    /// The verify API has answered a request.
    pub(crate) fn answered(&self, status: StatusCode) {
        self.requests.get(status.into()).increment(1);
    }

    pub(crate) fn cache(&self, found: u64, not_found: u64, bytes: u64) {
        self.cache_entries.get(CacheKind::Found).set(found as f64);
        self.cache_entries.get(CacheKind::NotFound).set(not_found as f64);
        self.cache_bytes.set(bytes as f64);
    }

    pub(crate) fn loaded(&self, outcome: LoadOutcome) {
        self.loads.get(outcome).increment(1);
    }

    pub(crate) fn read_from_database(&self, outcome: DatabaseOutcome) {
        self.database_reads.get(outcome).increment(1);
    }

    pub(crate) fn load_took(&self, duration: Duration) {
        self.load_seconds.record(duration.as_secs_f64());
    }

    pub(crate) fn rival_message(&self) {
        self.rival_messages.increment(1);
    }

    pub(crate) fn malformed(&self, incoming: Incoming) {
        self.ignored.get(incoming).get(IgnoreReason::Malformed).increment(1);
    }

    pub(crate) fn unasked(&self, incoming: Incoming) {
        self.ignored.get(incoming).get(IgnoreReason::Unasked).increment(1);
    }
}

/// The handles of one of the connections.
fn bus_metrics(registry: &Registry, connection: &str) -> BusMetrics {
    let error = |kind| registry.counter(&NATS_ERRORS, &[connection, kind]);
    BusMetrics {
        connected: registry.gauge(&NATS_CONNECTED, &[connection]),
        connects: registry.counter(&NATS_CONNECTS, &[connection]),
        slow_consumer: error("slow_consumer"),
        server_errors: error("server"),
    }
}
