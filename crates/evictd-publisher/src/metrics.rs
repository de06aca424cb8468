//! Every metric of the publisher: declared once, and recorded as events.

use std::time::Duration;

use evictd_core::follower::ReplayOutcome;
use evictd_core::position::LogPosition;
use evictd_core::receipts::RegionState;
use evictd_core::service::Standing;
use evictd_ops::bus::BusMetrics;
use evictd_ops::logging::Unlogged;
use evictd_ops::metric_specs;
use evictd_ops::metrics::{ByLabel, LATENCY_BUCKETS, MetricKind, PROPAGATION_BUCKETS, Registry};
use evictd_ops::reload::{self, ReloadOutcome};
use evictd_store::StoreError;
use evictd_store::audit::Purged;
use evictd_store::log::{Backlog, StoreFiles};
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
        "From the request of a deletion until every agent of the region has confirmed it, on this machine's clock. For a deletion past the API, from when the publisher first saw it.";
    pub(crate) AGENTS = "evictd_publisher_agents", GAUGE, COUNT, ["region", "state"],
        "Agent processes in the roster: live (announced itself within the bound), silent (did not), duplicate (live, under the name of another live one); absent is 1 for a configured region without any.";
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
        "1 while this publisher leaves requests to others because a round doesn't finish.";
    REPLAYS = "evictd_publisher_replays_total", COUNTER, COUNT, ["outcome"],
        "Replays answered: rows, or refused (the agent flushes).";
    LOOKUPS = "evictd_publisher_lookups_total", COUNTER, COUNT, ["outcome"],
        "Lookups: answered, busy (shed) or failed.";
    ANNOUNCEMENTS = "evictd_publisher_announcements_total", COUNTER, COUNT, [],
        "Announcements of progress received from agents.";
    REFUSED = "evictd_publisher_refused_messages_total", COUNTER, COUNT, ["subject", "reason"],
        "Messages from agents that were refused: malformed, reply (the answer would not go into the requester's own inbox), subject, overload (too many of one agent wait or run), ahead (the agent claims to have applied more than the log holds), bound (its bound is longer than receipts.bound), unproved (this home store did not issue what the agent claims to have seen), or unknown_past (a newer copy of this home store issued it).";
    STANDING = "evictd_publisher_standing", GAUGE, None, ["standing"],
        "1 for the standing of this publisher among all on the bus: asking (a newcomer), serving, yielding (silent, because a publisher of another home store serves), conflicting (silent, because a publisher of another home store served as well), or behind (silent, because its home store is an older copy).";
    SILENT_RIVALS = "evictd_publisher_silent_rivals", GAUGE, None, [],
        "1 while a publisher of another home store is on the bus and silent, because this one serves.";
    REQUESTS = "evictd_publisher_requests_total", COUNTER, COUNT, ["endpoint", "class"],
        "Control API requests answered, by class of status.";
    PURGED = "evictd_publisher_purged_rows_total", COUNTER, COUNT, ["kind"],
        "Rows of the home store that were deleted after their retention: log, receipts or audit.";
    STORE_FAILURES = "evictd_publisher_store_failures_total", COUNTER, COUNT, [],
        "Calls of the home store that failed. Each kind of failure is logged twice a minute at most.";
    STORE_FILE_BYTES = "evictd_publisher_store_file_bytes", GAUGE, Some(Unit::Bytes), ["file"],
        "The sizes of the home store's files on SQLite: database, and write_ahead_log, which grows while a reader of any process keeps an old snapshot.";
    NATS_CONNECTED = "evictd_publisher_nats_connected", GAUGE, None, [],
        "1 while connected to a NATS server.";
    NATS_CONNECTS = "evictd_publisher_nats_connects_total", COUNTER, COUNT, [],
        "Connections made to NATS servers, reconnects included.";
    NATS_ERRORS = "evictd_publisher_nats_errors_total", COUNTER, COUNT, ["kind"],
        "Errors of the NATS connection: slow_consumer (messages dropped here) or server (as the server reports, permission violations among them).";
}

evictd_core::labels! {
    /// The states in which receipts are final.
    enum FinalState {
        Confirmed = RegionState::Confirmed.label(),
        Elapsed = RegionState::Elapsed.label(),
        Unproven = RegionState::Unproven.label(),
    }

    enum SendOutcome { Sent = "sent", Unsent = "unsent" }

    enum RoundOutcome { Ok = "ok", Failed = "failed" }

    enum ReplayResult { Rows = "rows", Refused = "refused" }

    pub(crate) enum LookupEnd { Answered = "answered", Busy = "busy", Failed = "failed" }

    /// Why a message from an agent was refused.
    pub(crate) enum Refusal {
        Malformed = "malformed",
        Reply = "reply",
        Subject = "subject",
        Overload = "overload",
        Ahead = "ahead",
        Bound = "bound",
        Unproved = "unproved",
        UnknownPast = "unknown_past",
    }

    /// A class of HTTP status.
    enum StatusClass { Success = "2xx", ClientError = "4xx", ServerError = "5xx" }

    enum StoreFile { Database = "database", WriteAheadLog = "write_ahead_log" }

    enum PurgedKind { Log = "log", Receipts = "receipts", Audit = "audit" }

    /// The state of an agent process.
    pub(crate) enum AgentPresence {
        Live = "live",
        Silent = "silent",
        Duplicate = "duplicate",
        Absent = "absent",
    }
}

/// The handles, made once.
#[derive(Debug)]
pub struct PublisherMetrics {
    head: Gauge,
    epoch: Gauge,
    unnumbered_rows: Gauge,
    unnumbered_oldest: Gauge,
    unconfirmed: Gauge,
    live_messages: ByLabel<SendOutcome, Counter>,
    rounds: ByLabel<RoundOutcome, Counter>,
    round_seconds: Histogram,
    probes: Counter,
    stalled: Gauge,
    silent_rivals: Gauge,
    standing: ByLabel<Standing, Gauge>,
    replays: ByLabel<ReplayResult, Counter>,
    lookups: ByLabel<LookupEnd, Counter>,
    announcements: Counter,
    refused: ByLabel<MessageKind, ByLabel<Refusal, Counter>>,
    requests: ByLabel<Endpoint, ByLabel<StatusClass, Counter>>,
    receipts: ByLabel<FinalState, Counter>,
    purged: ByLabel<PurgedKind, Counter>,
    store_failures: StoreFailures,
    pub(crate) config_reloads: ByLabel<ReloadOutcome, Counter>,
    store_files: ByLabel<StoreFile, Gauge>,
    pub(crate) nats: BusMetrics,
}

impl PublisherMetrics {
    /// Makes the handles.
    pub fn new(registry: &Registry) -> Self {
        let requests = |endpoint: Endpoint| {
            let name = endpoint.path().trim_start_matches("/v2/");
            ByLabel::new(|class: StatusClass| registry.counter(&REQUESTS, &[name, class.label()]))
        };
        Self {
            head: registry.handle(&HEAD),
            epoch: registry.handle(&EPOCH),
            unnumbered_rows: registry.handle(&UNNUMBERED_ROWS),
            unnumbered_oldest: registry.handle(&UNNUMBERED_OLDEST),
            unconfirmed: registry.handle(&UNCONFIRMED),
            live_messages: registry.handle(&LIVE_MESSAGES),
            rounds: registry.handle(&ROUNDS),
            round_seconds: registry.handle(&ROUND_SECONDS),
            probes: registry.handle(&PROBES),
            stalled: registry.handle(&STALLED),
            silent_rivals: registry.handle(&SILENT_RIVALS),
            standing: registry.handle(&STANDING),
            replays: registry.handle(&REPLAYS),
            lookups: registry.handle(&LOOKUPS),
            announcements: registry.handle(&ANNOUNCEMENTS),
            refused: registry.handle(&REFUSED),
            requests: ByLabel::new(requests),
            receipts: registry.handle(&RECEIPTS),
            purged: registry.handle(&PURGED),
            store_failures: StoreFailures::new(registry.handle(&STORE_FAILURES)),
            config_reloads: registry.handle(&reload::SPEC),
            store_files: registry.handle(&STORE_FILE_BYTES),
            nats: BusMetrics {
                connected: registry.handle(&NATS_CONNECTED),
                connects: registry.handle(&NATS_CONNECTS),
                slow_consumer: registry.counter(&NATS_ERRORS, &["slow_consumer"]),
                server_errors: registry.counter(&NATS_ERRORS, &["server"]),
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

    pub(crate) fn store_files(&self, files: StoreFiles) {
        let StoreFiles { database, write_ahead_log } = files;
        self.store_files.get(StoreFile::Database).set(database as f64);
        self.store_files.get(StoreFile::WriteAheadLog).set(write_ahead_log as f64);
    }

    pub(crate) fn unconfirmed(&self, deletions: usize) {
        self.unconfirmed.set(deletions as f64);
    }

    /// A receipt became final.
    pub(crate) fn receipt(&self, state: RegionState) {
        let state = match state {
            RegionState::Confirmed => FinalState::Confirmed,
            RegionState::Elapsed => FinalState::Elapsed,
            RegionState::Unproven => FinalState::Unproven,
            RegionState::Pending | RegionState::Absent => return,
        };
        self.receipts.get(state).increment(1);
    }

    pub(crate) fn live_message(&self, sent: bool) {
        let outcome = if sent { SendOutcome::Sent } else { SendOutcome::Unsent };
        self.live_messages.get(outcome).increment(1);
    }

    pub(crate) fn round(&self, ok: bool, took: Duration, probes: usize) {
        let outcome = if ok { RoundOutcome::Ok } else { RoundOutcome::Failed };
        self.rounds.get(outcome).increment(1);
        self.round_seconds.record(took.as_secs_f64());
        self.probes.increment(probes as u64);
    }

    pub(crate) fn standing(&self, standing: Standing) {
        self.standing.set_only(standing);
    }

    pub(crate) fn silent_rivals(&self, any: bool) {
        self.silent_rivals.set(if any { 1.0 } else { 0.0 });
    }

    pub(crate) fn stalled(&self, stalled: bool) {
        self.stalled.set(if stalled { 1.0 } else { 0.0 });
    }

    pub(crate) fn replayed(&self, outcome: &ReplayOutcome) {
        let outcome = match outcome {
            ReplayOutcome::Rows(_) => ReplayResult::Rows,
            ReplayOutcome::Refused { .. } => ReplayResult::Refused,
        };
        self.replays.get(outcome).increment(1);
    }

    pub(crate) fn looked_up(&self, outcome: LookupEnd) {
        self.lookups.get(outcome).increment(1);
    }

    pub(crate) fn announced(&self) {
        self.announcements.increment(1);
    }

    pub(crate) fn refused(&self, kind: MessageKind, refusal: Refusal) {
        self.refused.get(kind).get(refusal).increment(1);
    }

    pub(crate) fn answered(&self, endpoint: Endpoint, status: StatusCode) {
        let class = match status.as_u16() {
            ..400 => StatusClass::Success,
            400..500 => StatusClass::ClientError,
            _ => StatusClass::ServerError,
        };
        self.requests.get(endpoint).get(class).increment(1);
    }

    pub(crate) fn purged(&self, purged: Purged) {
        for (kind, counter) in self.purged.iter() {
            counter.increment(match kind {
                PurgedKind::Log => purged.log,
                PurgedKind::Receipts => purged.receipts,
                PurgedKind::Audit => purged.audit,
            });
        }
    }

    /// Counts and logs a failed call of the home store. To be called once, by the part that made the call.
    pub(crate) fn store_failed(&self, error: &StoreError) {
        self.store_failures.note(error);
    }

    /// Returns how many failures of the home store were not logged, now that it works again.
    pub(crate) fn store_works_again(&self) -> Unlogged {
        self.store_failures.take_unlogged()
    }
}
