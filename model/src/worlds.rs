//! The worlds that are checked, each with the faults that meet in it.

use evictd_core::floors::FloorLimits;

use crate::script::ModelKey::{A, B};
use crate::script::Script;
use crate::script::ScriptChange::{Create, Delete, DeleteApi, DeleteOtherApi};
use crate::world::SmallWorld;

/// Small enough for every test run.
pub const SMALLEST: SmallWorld =
    SmallWorld::plain("one deletion", "loss, repetition, delay", Script(&[Delete(A)]));

/// All of them, cheapest first.
pub const ALL: &[SmallWorld] = &[
    SMALLEST,
    TWO_CHANGES,
    SmallWorld {
        trust: 2,
        ticks: 2,
        ..SmallWorld::plain("long lease", "a lease outlives the tick of its probe", Script(&[Delete(A)]))
    },
    FEW_KEY_FLOORS,
    FEW_API_FLOORS,
    RESTART,
    PURGE,
    REPLICA,
    STRAY,
    FAIL_OVER,
    TWO_FAIL_OVERS,
    DEMOTED,
    ROUNDS,
    RECEIPTS,
];

/// Of a key, then of its API, with loads that arrive late.
pub const TWO_CHANGES: SmallWorld = SmallWorld {
    loads: 2,
    ..SmallWorld::plain(
        "two changes",
        "a key's, then its API's; gaps; late loads",
        Script(&[Delete(A), DeleteApi]),
    )
};

/// One floor of a key: a second one makes them the API's.
pub const FEW_KEY_FLOORS: SmallWorld = SmallWorld {
    floors: FloorLimits { keys: 1, scopes: 8 },
    ..SmallWorld::plain("few key floors", "floors are merged", Script(&[Create(A), Delete(B)]))
};

/// Room for the floors of one entry and no more.
pub const FEW_API_FLOORS: SmallWorld = SmallWorld {
    floors: FloorLimits { keys: 8, scopes: 2 },
    ..SmallWorld::plain("few API floors", "floors are dropped", Script(&[DeleteApi, DeleteOtherApi]))
};

/// Replays can't be covered, and agents flush.
pub const PURGE: SmallWorld = SmallWorld {
    purges: true,
    ticks: 0,
    ..SmallWorld::plain("purge", "replays are refused, agents flush", Script(&[Delete(A), Delete(B)]))
};

/// Loads read from a replica that lags.
pub const REPLICA: SmallWorld = SmallWorld {
    replica: true,
    ..SmallWorld::plain("replica", "loads read from a replica that lags", Script(&[Delete(A)]))
};

/// Loads read from a standby that was promoted by mistake, whose log looks newer than home's.
pub const STRAY: SmallWorld = SmallWorld {
    replica: true,
    stray: true,
    ..SmallWorld::plain("stray standby", "agents read a standby promoted by mistake", Script(&[Delete(A)]))
};

/// A standby that lacks the last transactions takes over. Without a clock, which the next worlds have.
pub const FAIL_OVER: SmallWorld = SmallWorld {
    failovers: 1,
    ticks: 0,
    ..SmallWorld::plain("fail-over", "commits are lost, an epoch begins", Script(&[Delete(B), Delete(A)]))
};

/// It happens again, and the beginning of the epoch may be lost too.
pub const TWO_FAIL_OVERS: SmallWorld = SmallWorld {
    failovers: 2,
    ticks: 0,
    ..SmallWorld::plain("two fail-overs", "an epoch's beginning is lost", Script(&[Delete(A)]))
};

/// After a fail-over, the old primary still answers reads.
pub const DEMOTED: SmallWorld = SmallWorld {
    failovers: 1,
    demoted: true,
    // Recovery is tried in the other worlds.
    tries_recovery: false,
    ..SmallWorld::plain("demoted primary", "the old primary still answers loads", Script(&[Delete(A)]))
};

/// A publisher whose rounds take time, and that crashes at any moment, beside one whose rounds are one step.
pub const ROUNDS: SmallWorld = SmallWorld {
    rounds: true,
    // What agents do with the answers is checked in the other worlds.
    tries_recovery: false,
    ..SmallWorld::plain(
        "rounds",
        "a round under way at one publisher, its crash; another one",
        Script(&[Delete(A)]),
    )
};

/// Two agents, and what a publisher may conclude from their announcements.
pub const RECEIPTS: SmallWorld = SmallWorld {
    agents: 2,
    ticks: 0,
    ..SmallWorld::plain("receipts", "two agents confirm, one may be starting", Script(&[Delete(A)]))
};

/// An agent restarts; answers to its past arrive.
pub const RESTART: SmallWorld = SmallWorld {
    restarts: 1,
    ..SmallWorld::plain("restart", "an agent restarts, answers to its past arrive", Script(&[Delete(A)]))
};
