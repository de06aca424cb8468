//! Every metric of the publisher: declared once, and recorded as events.

use std::time::Duration;

use evictd_core::follower::ReplayOutcome;
use evictd_core::position::LogPosition;
use evictd_core::receipts::RegionState;
use evictd_core::service::Standing;
use evictd_ops::bus::BusMetrics;
use evictd_ops::metric_specs;
use evictd_ops::metrics::{LATENCY_BUCKETS, MetricKind, MetricSpec, PROPAGATION_BUCKETS, Registry};
use evictd_store::StoreError;
use evictd_store::audit::Purged;
use evictd_store::log::Backlog;
use evictd_wire::api::requests::Endpoint;
use evictd_wire::subject::MessageKind;
use hyper::StatusCode;
use metrics::{Counter, Gauge, Histogram, Unit};

use crate::store_failures::StoreFailures;

const COUNTER: MetricKind = MetricKind::Counter;
const GAUGE: MetricKind = MetricKind::Gauge;
const CONFIRMED_KIND: MetricKind = MetricKind::Histogram { buckets: PROPAGATION_BUCKETS };
const ROUND_KIND: MetricKind = MetricKind::Histogram { buckets: LATENCY_BUCKETS };
const SECONDS: Option<Unit> = Some(Unit::Seconds);
const COUNT: Option<Unit> = Some(Unit::Count);

metric_specs! {
    pub(crate) CONFIRMED = "evictd_publisher_confirmed_seconds", CONFIRMED_KIND, SECONDS, ["region"],
        "From the request of a deletion to the moment when every agent of the region had confirmed it, on this machine's clock; from when it was first seen, for what was deleted past the API.";
    pub(crate) AGENTS = "evictd_publisher_agents", GAUGE, COUNT, ["region", "state"],
        "Agent processes in the roster: live (a message received within the bound), silent (none), duplicate (live, and another live process has its name); absent is 1 for a configured region without any.";
    RECEIPTS = "evictd_publisher_receipts_total", COUNTER, COUNT, ["state"],
        "Receipts that became final: confirmed by every agent, elapsed (not by all, and the bound has passed), or unproven (the same, with an agent that serves stale records).";
    HEAD = "evictd_publisher_head_position", GAUGE, None, [],
        "The highest log position given.";
    EPOCH = "evictd_publisher_epoch", GAUGE, None, [],
        "The log's epoch; it rises when the home store may have gone back.";
    UNNUMBERED_ROWS = "evictd_publisher_unnumbered_rows", GAUGE, COUNT, [],
        "Committed changes that have no position yet.";
    UNNUMBERED_OLDEST = "evictd_publisher_unnumbered_oldest_seconds", GAUGE, SECONDS, [],
        "The age of the oldest of them.";
    UNCONFIRMED = "evictd_publisher_unconfirmed_deletions", GAUGE, COUNT, [],
        "Deletions whose receipt isn't final, and that not every agent has confirmed.";
    LIVE_MESSAGES = "evictd_publisher_live_messages_total", COUNTER, COUNT, ["outcome"],
        "Messages with invalidations for the live feed: sent, or unsent (NATS not connected; agents request what they miss).";
    ROUNDS = "evictd_publisher_rounds_total", COUNTER, COUNT, ["outcome"],
        "Probe rounds, the store transactions that leases rest on: ok or failed.";
    ROUND_SECONDS = "evictd_publisher_round_seconds", ROUND_KIND, SECONDS, [],
        "How long probe rounds took.";
    PROBES = "evictd_publisher_probes_total", COUNTER, COUNT, [],
        "Probes that took part in a round.";
    STALLED = "evictd_publisher_stalled", GAUGE, None, [],
        "1 while this publisher leaves queries to others because a round doesn't finish.";
    REPLAYS = "evictd_publisher_replays_total", COUNTER, COUNT, ["outcome"],
        "Replays answered: rows, or refused (the agent flushes).";
    LOOKUPS = "evictd_publisher_lookups_total", COUNTER, COUNT, ["outcome"],
        "Lookups: answered, busy (shed) or failed.";
    ANNOUNCEMENTS = "evictd_publisher_announcements_total", COUNTER, COUNT, [],
        "Announcements of progress received from agents.";
    REFUSED = "evictd_publisher_refused_messages_total", COUNTER, COUNT, ["subject", "reason"],
        "Messages from agents that were refused: malformed, reply (the answer would not go into the requester's own inbox), subject, overload (too many of one agent wait, or run), ahead (it claims to have applied more than the log holds), bound (its bound exceeds receipts.bound), unproved (this home store didn't give out what it claims to have seen), or unknown_past (a newer copy of this home store gave it out).";
    STANDING = "evictd_publisher_standing", GAUGE, None, ["standing"],
        "1 for how this publisher stands among all on the bus: asking (a newcomer), serving, yielding (silent, because a publisher of another home store serves), conflicting (silent, because one of another home store served as well), or behind (silent, because its home store is an older copy).";
    SILENT_RIVALS = "evictd_publisher_silent_rivals", GAUGE, None, [],
        "1 while a publisher of another home store is on the bus and silent, because this one serves.";
    REQUESTS = "evictd_publisher_requests_total", COUNTER, COUNT, ["endpoint", "class"],
        "Control API requests answered, by class of status.";
    PURGED = "evictd_publisher_purged_rows_total", COUNTER, COUNT, ["kind"],
        "Rows of the home store that were deleted because they had been kept long enough: log, receipts or audit.";
    STORE_FAILURES = "evictd_publisher_store_failures_total", COUNTER, COUNT, [],
        "Calls of the home store that failed. Each kind of failure is logged twice a minute at most.";
    NATS_CONNECTED = "evictd_publisher_nats_connected", GAUGE, None, [],
        "1 while connected to a NATS server.";
    NATS_CONNECTS = "evictd_publisher_nats_connects_total", COUNTER, COUNT, [],
        "Connections made to NATS servers, reconnects included.";
    NATS_ERRORS = "evictd_publisher_nats_errors_total", COUNTER, COUNT, ["kind"],
        "Errors of the NATS connection: slow_consumer (messages dropped here) or server (as the server reports, permission violations among them).";
}

/// How receipts end.
const FINAL_STATES: [RegionState; 3] = [RegionState::Confirmed, RegionState::Elapsed, RegionState::Unproven];

/// Why a message from an agent was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    Malformed,
    Reply,
    Subject,
    Overload,
    Ahead,
    Bound,
    Unproved,
    UnknownPast,
}

/// How a lookup ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LookupEnd {
    Answered,
    Busy,
    Failed,
}

/// How an agent process stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AgentState {
    Live,
    Silent,
    Duplicate,
    Absent,
}

impl AgentState {
    pub(crate) const ALL: [Self; 4] = [Self::Live, Self::Silent, Self::Duplicate, Self::Absent];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Silent => "silent",
            Self::Duplicate => "duplicate",
            Self::Absent => "absent",
        }
    }
}

/// The handles, made once.
#[derive(Debug)]
pub struct Metrics {
    head: Gauge,
    epoch: Gauge,
    unnumbered_rows: Gauge,
    unnumbered_oldest: Gauge,
    unconfirmed: Gauge,
    live_sent: Counter,
    live_unsent: Counter,
    rounds_ok: Counter,
    rounds_failed: Counter,
    round_seconds: Histogram,
    probes: Counter,
    stalled: Gauge,
    silent_rivals: Gauge,
    standing: [Gauge; Standing::ALL.len()],
    replays_rows: Counter,
    replays_refused: Counter,
    lookups: [Counter; 3],
    announcements: Counter,
    refused: [[Counter; 8]; 4],
    requests: [[Counter; 3]; Endpoint::ALL.len()],
    receipts: [Counter; 3],
    purged: [Counter; 3],
    store_failures: StoreFailures,
    pub(crate) nats: BusMetrics,
}

impl Metrics {
    /// Makes the handles.
    pub fn new(registry: &Registry) -> Self {
        let counter = |spec: &MetricSpec, label, value| registry.counter(spec, &[(label, value)]);
        let gauge = |spec: &MetricSpec| registry.gauge(spec, &[]);
        let refused = |kind: MessageKind| {
            ["malformed", "reply", "subject", "overload", "ahead", "bound", "unproved", "unknown_past"]
                .map(|reason| registry.counter(&REFUSED, &[("subject", kind.token()), ("reason", reason)]))
        };
        let requests = |endpoint: Endpoint| {
            let name = endpoint.path().trim_start_matches("/v2/");
            ["2xx", "4xx", "5xx"]
                .map(|class| registry.counter(&REQUESTS, &[("endpoint", name), ("class", class)]))
        };
        Self {
            head: gauge(&HEAD),
            epoch: gauge(&EPOCH),
            unnumbered_rows: gauge(&UNNUMBERED_ROWS),
            unnumbered_oldest: gauge(&UNNUMBERED_OLDEST),
            unconfirmed: gauge(&UNCONFIRMED),
            live_sent: counter(&LIVE_MESSAGES, "outcome", "sent"),
            live_unsent: counter(&LIVE_MESSAGES, "outcome", "unsent"),
            rounds_ok: counter(&ROUNDS, "outcome", "ok"),
            rounds_failed: counter(&ROUNDS, "outcome", "failed"),
            round_seconds: registry.histogram(&ROUND_SECONDS, &[]),
            probes: registry.counter(&PROBES, &[]),
            stalled: gauge(&STALLED),
            silent_rivals: gauge(&SILENT_RIVALS),
            standing: Standing::ALL
                .map(|standing| registry.gauge(&STANDING, &[("standing", standing.label())])),
            replays_rows: counter(&REPLAYS, "outcome", "rows"),
            replays_refused: counter(&REPLAYS, "outcome", "refused"),
            lookups: ["answered", "busy", "failed"].map(|outcome| counter(&LOOKUPS, "outcome", outcome)),
            announcements: registry.counter(&ANNOUNCEMENTS, &[]),
            refused: MessageKind::ALL.map(refused),
            requests: Endpoint::ALL.map(requests),
            receipts: FINAL_STATES.map(|state| counter(&RECEIPTS, "state", state.label())),
            purged: ["log", "receipts", "audit"].map(|kind| counter(&PURGED, "kind", kind)),
            store_failures: StoreFailures::new(registry.counter(&STORE_FAILURES, &[])),
            nats: BusMetrics {
                connected: gauge(&NATS_CONNECTED),
                connects: registry.counter(&NATS_CONNECTS, &[]),
                slow_consumer: counter(&NATS_ERRORS, "kind", "slow_consumer"),
                server_errors: counter(&NATS_ERRORS, "kind", "server"),
            },
        }
    }

    pub(crate) fn head(&self, head: LogPosition) {
        self.head.set(head.position() as f64);
        self.epoch.set(f64::from(head.epoch()));
    }

    pub(crate) fn backlog(&self, backlog: Backlog) {
        self.unnumbered_rows.set(backlog.rows as f64);
        self.unnumbered_oldest.set(backlog.oldest.as_secs_f64());
    }

    pub(crate) fn unconfirmed(&self, deletions: usize) {
        self.unconfirmed.set(deletions as f64);
    }

    /// A receipt became final.
    pub(crate) fn receipt(&self, state: RegionState) {
        if let Some(index) = FINAL_STATES.iter().position(|candidate| *candidate == state) {
            self.receipts[index].increment(1);
        }
    }

    pub(crate) fn live_message(&self, sent: bool) {
        let counter = if sent { &self.live_sent } else { &self.live_unsent };
        counter.increment(1);
    }

    pub(crate) fn round(&self, ok: bool, took: Duration, probes: usize) {
        let counter = if ok { &self.rounds_ok } else { &self.rounds_failed };
        counter.increment(1);
        self.round_seconds.record(took.as_secs_f64());
        self.probes.increment(probes as u64);
    }

    pub(crate) fn standing(&self, standing: Standing) {
        for (gauge, candidate) in self.standing.iter().zip(Standing::ALL) {
            gauge.set(if candidate == standing { 1.0 } else { 0.0 });
        }
    }

    pub(crate) fn silent_rivals(&self, any: bool) {
        self.silent_rivals.set(if any { 1.0 } else { 0.0 });
    }

    pub(crate) fn stalled(&self, stalled: bool) {
        self.stalled.set(if stalled { 1.0 } else { 0.0 });
    }

    pub(crate) fn replayed(&self, outcome: &ReplayOutcome) {
        match outcome {
            ReplayOutcome::Rows(_) => self.replays_rows.increment(1),
            ReplayOutcome::Refused { .. } => self.replays_refused.increment(1),
        }
    }

    pub(crate) fn looked_up(&self, end: LookupEnd) {
        self.lookups[end as usize].increment(1);
    }

    pub(crate) fn announced(&self) {
        self.announcements.increment(1);
    }

    pub(crate) fn refused(&self, kind: MessageKind, refusal: Refusal) {
        self.refused[kind as usize][refusal as usize].increment(1);
    }

    pub(crate) fn answered(&self, endpoint: Endpoint, status: StatusCode) {
        let class = match status.as_u16() {
            ..400 => 0,
            400..500 => 1,
            _ => 2,
        };
        self.requests[endpoint as usize][class].increment(1);
    }

    pub(crate) fn purged(&self, purged: Purged) {
        for (counter, rows) in self.purged.iter().zip([purged.log, purged.receipts, purged.audit]) {
            counter.increment(rows);
        }
    }

    /// Counts and logs a failed call of the home store. To be called once, by the part that made the call.
    pub(crate) fn store_failed(&self, error: &StoreError) {
        self.store_failures.note(error);
    }

    /// Returns how many failures of the home store were not logged, now that it works again.
    pub(crate) fn store_works_again(&self) -> u64 {
        self.store_failures.take_unlogged()
    }
}
