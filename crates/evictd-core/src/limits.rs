//! Every bound on a size, in one place, with compile-time checks of how they relate.

use std::time::Duration;

/// Bits of a [`crate::position::LogPosition`] that hold the position inside its epoch.
pub const POSITION_BITS: u32 = 44;

/// The highest position inside an epoch: 55 years at 10,000 changes per second.
pub const POSITION_MAX: u64 = (1 << POSITION_BITS) - 1;

/// The highest epoch. An epoch begins only when a store went back, so this is never reached in
/// practice.
pub const EPOCH_MAX: u32 = (1 << (64 - POSITION_BITS)) - 1;

/// Epochs of each timeline of a store that fails over. A failover begins the next timeline, and
/// skips the epochs that are left of the last one.
pub const EPOCHS_PER_TIMELINE: u32 = 256;

/// Probes of one agent that may wait for a round: retries, and those of a second process of the
/// same name.
pub const PROBES_WAITING_PER_AGENT_MAX: usize = 4;

/// Processes of one agent's name that may hold leases at once: the current one, and those that
/// restarts left behind.
pub const DUPLICATE_INSTANCES_MAX: usize = 8;

/// Longest id (key, API, workspace, region, agent) in bytes. Unkey's requests allow 255.
pub const ID_BYTES_MAX: usize = 255;

/// Longest region or agent name in bytes. Both become tokens of NATS subjects.
pub const NAME_BYTES_MAX: usize = 64;

/// Largest `meta` of a key, as JSON text, in bytes.
pub const META_BYTES_MAX: usize = 16 * 1024;

/// Most permissions of a key.
pub const PERMISSIONS_MAX: usize = 1_000;

/// Longest permission of a key, in bytes.
pub const PERMISSION_BYTES_MAX: usize = 128;

/// Longest external id of a key, in bytes.
pub const EXTERNAL_ID_BYTES_MAX: usize = 255;

/// Most invalidations in one live message.
pub const LIVE_BATCH_MAX: usize = 64;

/// Most tokens of the log that an agent keeps, to check what it reads from a database itself.
pub const LOG_TOKENS_KEPT_MAX: usize = 4096;

/// Most invalidations in one replay answer.
pub const REPLAY_BATCH_MAX: usize = 1024;

/// Longest hole that an agent repairs. It flushes over a longer one, which costs less than the
/// replay.
pub const REPAIR_SPAN_MAX: u64 = 100_000;

/// Out-of-order positions an agent keeps while it waits for a hole to close.
pub const PENDING_MAX: usize = 16_384;

/// Probes without an answer that an agent still accepts a late answer to.
pub const PROBES_OUTSTANDING_MAX: usize = 8;

/// Replays without an answer that an agent still accepts a late answer to. The pause before the
/// next replay doubles with each of them, so this also bounds the pause: to eight times the request
/// timeout.
pub const REPAIRS_OUTSTANDING_MAX: usize = 4;

/// Key floors an agent keeps before it merges them into API floors (R6).
pub const KEY_FLOORS_MAX: usize = 131_072;

/// Keys whose evicted entries an agent keeps to report exposure. Above it, the last answer of any
/// entry stands in.
pub const PAST_ANSWERS_MAX: usize = 65_536;

/// API and workspace floors an agent keeps before it drops unused ones.
pub const SCOPE_FLOORS_MAX: usize = 65_536;

/// Most changes that an announcement reports on.
pub const APPLY_REPORTS_MAX: usize = 64;

/// Changes of one agent whose report a publisher notes as counted. Each report is sent
/// three times.
pub const COUNTED_REPORTS_MAX: usize = 4 * APPLY_REPORTS_MAX;

/// The longest time that an agent's report of a change can measure, where the publisher doesn't know when the change was
/// committed.
pub const REPORTED_TIME_MAX: Duration = Duration::from_hours(30 * 24);

/// Changes whose reports a publisher keeps before it has tracked the change itself.
pub const EARLY_REPORTS_MAX: usize = 256;

/// Most names of unconfirmed agents that a receipt lists per region. It counts the others.
pub const RECEIPT_NAMES_MAX: usize = 20;

/// Largest message evictd sends over NATS, in bytes. The servers' `max_payload` must not be lower.
pub const PAYLOAD_BYTES_MAX: usize = 512 * 1024;

/// Upper bound of one encoded invalidation: a hash, at most two ids, and fixed fields, with room to
/// spare.
pub const INVALIDATION_BYTES_MAX: usize = 3 * ID_BYTES_MAX + 160;

const _: () = assert!(LIVE_BATCH_MAX * INVALIDATION_BYTES_MAX < PAYLOAD_BYTES_MAX);
const _: () = assert!(REPLAY_BATCH_MAX <= REPAIR_SPAN_MAX as usize);
const _: () = assert!(PENDING_MAX <= REPAIR_SPAN_MAX as usize);
const _: () = assert!(META_BYTES_MAX * 2 + PERMISSIONS_MAX * (PERMISSION_BYTES_MAX + 8) < PAYLOAD_BYTES_MAX);
