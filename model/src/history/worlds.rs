//! The worlds that are checked, each with the faults that meet in it.

use evictd_core::service::Standing;

use super::world::{Budget, DatabaseKind, HistoryWorld, Occurrence};

pub const ALL: &[HistoryWorld] = &[
    FORGED,
    RESTARTED,
    DECLARED,
    TWO_COPIES,
    PHYSICAL_COPY,
    BACKUP,
    LOYAL,
    TOGETHER,
    CUT,
    HANDOVER,
    COLLEAGUES,
];

const BEHIND: Occurrence = ("a publisher is behind", |_, state| state.has_one(Standing::Behind));
const YIELDS: Occurrence = ("a publisher yields", |_, state| state.has_one(Standing::Yielding));
const CONFLICT: Occurrence = ("publishers conflict", |_, state| state.has_one(Standing::Conflicting));

/// A copy of the store is started beside home or instead of it, and its positions catch up.
pub const TWO_COPIES: HistoryWorld = HistoryWorld {
    occurs: &[BEHIND],
    ..HistoryWorld::plain(
        "two copies",
        "an old copy is started, its positions catch up",
        Budget { starts: 2, others: 1, deletions: 2, ..Budget::NONE },
    )
};

/// One of the two is declared, perhaps without need.
pub const DECLARED: HistoryWorld = HistoryWorld {
    occurs: &[BEHIND],
    tries_recovery: true,
    ..HistoryWorld::plain(
        "an operator's word",
        "a store is declared",
        Budget { starts: 2, declarations: 1, ..Budget::NONE },
    )
};

/// The copy is made at any moment, also of a store that was declared, or put in place of the original.
pub const BACKUP: HistoryWorld = HistoryWorld {
    occurs: &[BEHIND],
    ..HistoryWorld::plain(
        "a backup",
        "a backup is taken at any moment, and started or restored",
        Budget { starts: 1, copies: 1, declarations: 1, ..Budget::NONE },
    )
};

/// The agent restarts, and has no past.
pub const RESTARTED: HistoryWorld = HistoryWorld {
    occurs: &[BEHIND],
    agents: 2,
    ..HistoryWorld::plain(
        "no past",
        "one of two agents restarts",
        Budget { starts: 1, restarts: 1, ..Budget::NONE },
    )
};

/// Publishers freeze, crash and restart, and reach each other meanwhile.
pub const HANDOVER: HistoryWorld = HistoryWorld {
    talks: true,
    prompt: true,
    receipts: true,
    deleting: &[0],
    occurs: &[YIELDS],
    ..HistoryWorld::plain(
        "newcomers",
        "publishers freeze and restart beside each other",
        Budget { starts: 1, stalls: 1, ..Budget::NONE },
    )
};

/// Two serve while they are cut off from each other, and meet.
pub const CUT: HistoryWorld = HistoryWorld {
    talks: true,
    prompt: true,
    receipts: true,
    begins_cut: true,
    deleting: &[0],
    occurs: &[YIELDS, CONFLICT],
    ..HistoryWorld::plain("rivals", "two that serve meet after a cut", Budget { starts: 1, ..Budget::NONE })
};

/// An agent that reaches home keeps following it, although a copy serves.
pub const LOYAL: HistoryWorld = HistoryWorld {
    talks: true,
    prompt: true,
    receipts: true,
    begins_cut: true,
    steady: &[0],
    silence: false,
    ..HistoryWorld::plain("loyal", "a cut-off copy serves beside home", Budget { starts: 1, ..Budget::NONE })
};

/// Claims that no store gave out.
pub const FORGED: HistoryWorld = HistoryWorld {
    forges: true,
    ..HistoryWorld::plain(
        "forged",
        "an agent's login claims what it never received",
        Budget { starts: 1, ..Budget::NONE },
    )
};

/// A physical copy has the incarnation of the original.
pub const PHYSICAL_COPY: HistoryWorld = HistoryWorld {
    database: DatabaseKind::Postgres,
    occurs: &[BEHIND],
    ..HistoryWorld::plain(
        "a copied server",
        "a copy with the same incarnation is started",
        Budget { starts: 1, others: 1, deletions: 2, ..Budget::NONE },
    )
};

/// Two colleagues on one server, and a publisher on its copy.
pub const COLLEAGUES: HistoryWorld = HistoryWorld {
    database: DatabaseKind::Postgres,
    publishers: &[0, 0, 1],
    steady: &[0, 1],
    silence: false,
    talks: true,
    prompt: true,
    receipts: true,
    deleting: &[0],
    occurs: &[YIELDS],
    ..HistoryWorld::plain(
        "colleagues",
        "two on one server, one on its copy",
        Budget { starts: 1, ..Budget::NONE },
    )
};

/// Publishers come and go together, and one must be able to serve in the end.
pub const TOGETHER: HistoryWorld = HistoryWorld {
    talks: true,
    prompt: true,
    tries_recovery: true,
    silence: false,
    occurs: &[YIELDS, CONFLICT],
    ..HistoryWorld::plain(
        "together",
        "two start at once, freeze, end",
        Budget { starts: 1, stalls: 1, deletions: 0, ..Budget::NONE },
    )
};
