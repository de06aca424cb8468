//! What people and gateways do: changes of all kinds, and verifications, at random and where it hurts.

use evictd_core::invalidation::Cause;
use evictd_core::record::RecordState;

use crate::ctx::Ctx;
use crate::queue::{Event, Node};
use crate::store::{ApiNumber, KeyNumber, KeyRow, Plan, Store, Target, WorkspaceNumber};
use crate::time::{MS, Micros, Moment, SECOND};

/// Somebody asks for something.
#[derive(Clone, Copy, Debug)]
pub enum WorkEvent {
    /// Choose a key to change soon, and warm it up.
    Choose,
    /// Change it now.
    Change(KeyNumber),
    /// Change an API or a workspace now.
    Wide(Target),
    /// Delete many keys of one API at once, by direct SQL.
    Bulk,
    /// Verify a key at an agent.
    Verify(Node, KeyNumber),
    /// Verify keys at an agent at random, and go on.
    Traffic(Node),
}

/// Keys that are verified, and changed, far more often than others.
const HOT_KEYS: usize = 24;

/// How long before its change a key is warmed up.
const WARM_UP: Micros = 400 * MS;

/// Schedules the first of everything.
pub fn begin(ctx: &mut Ctx) {
    ctx.queue.push(Moment(50 * MS), Event::Work(WorkEvent::Choose));
    for agent in 0..ctx.settings.agents {
        ctx.queue.push(Moment(60 * MS), Event::Work(WorkEvent::Traffic(Node(agent))));
    }
    if ctx.settings.bulk_every > 0 {
        ctx.queue.push(Moment(ctx.settings.bulk_every), Event::Work(WorkEvent::Bulk));
    }
}

/// A key that has nothing to do with the time of day: hot ones more often.
fn any_key(ctx: &mut Ctx, hot_permille: u32) -> KeyNumber {
    let size = ctx.settings.size;
    let hot = ctx.dice.permille(hot_permille);
    KeyNumber(ctx.dice.index(if hot { HOT_KEYS.min(size.keys) } else { size.keys }))
}

/// Chooses what is changed soon, and when it is verified.
pub fn choose(ctx: &mut Ctx) {
    let next = ctx.now.after(ctx.dice.span(SECOND / ctx.settings.changes_per_second));
    ctx.queue.push(next, Event::Work(WorkEvent::Choose));
    if ctx.dice.permille(4) {
        return choose_wide(ctx);
    }
    let key = any_key(ctx, 50);
    let at = ctx.now.after(WARM_UP);
    ctx.queue.push(at, Event::Work(WorkEvent::Change(key)));
    for agent in (0..ctx.settings.agents).map(Node) {
        if !ctx.dice.permille(600) {
            continue;
        }
        // Before, right around, soon after, and at the bound.
        let warm = ctx.now.after(ctx.dice.below(WARM_UP));
        let around = at.after(ctx.dice.below(30 * MS));
        let soon = at.after(ctx.dice.below(2 * SECOND));
        for moment in [warm, around, soon] {
            ctx.queue.push(moment, Event::Work(WorkEvent::Verify(agent, key)));
        }
        if ctx.dice.permille(250) {
            let bound = ctx.settings.bound.as_micros() as u64;
            let end = at.after(bound).after(ctx.dice.below(SECOND));
            ctx.queue.push(end, Event::Work(WorkEvent::Verify(agent, key)));
        }
    }
}

fn choose_wide(ctx: &mut Ctx) {
    let size = ctx.settings.size;
    let target = if ctx.dice.permille(150) {
        Target::Workspace(WorkspaceNumber(ctx.dice.index(size.workspaces)))
    } else {
        Target::Api(ApiNumber(ctx.dice.index(size.apis)))
    };
    // Deleted now, and back before long: what is deleted for good tests nothing any more.
    let back = ctx.now.after(ctx.dice.between(SECOND / 10, 3 * SECOND));
    ctx.queue.push(ctx.now, Event::Work(WorkEvent::Wide(target)));
    ctx.queue.push(back, Event::Work(WorkEvent::Wide(target)));
}

/// What is done to a key, given how it stands.
pub fn plan_key(ctx: &mut Ctx, store: &Store, key: KeyNumber) -> Plan {
    let size = ctx.settings.size;
    let row = store.row(key);
    let other_api = ApiNumber(ctx.dice.index(size.apis));
    let with = |api: ApiNumber, state: RecordState| Some(KeyRow { api, state });
    let (row, cause) = match row {
        // The same text again, perhaps in another API.
        None => (with(other_api, RecordState::Active), Cause::Created),
        Some(KeyRow { api, state: RecordState::Deleted }) => {
            if ctx.dice.permille(300) {
                (None, Cause::Erased)
            } else {
                (with(api, RecordState::Active), Cause::Restored)
            }
        }
        Some(KeyRow {
            api,
            state: RecordState::Disabled | RecordState::Expired | RecordState::WorkspaceDisabled,
        }) => {
            if ctx.dice.permille(400) {
                (with(api, RecordState::Deleted), Cause::Deleted)
            } else {
                (with(api, RecordState::Active), Cause::Changed)
            }
        }
        Some(KeyRow { api, state: RecordState::Active }) => match ctx.dice.below(20) {
            0..=8 => (with(api, RecordState::Deleted), Cause::Deleted),
            9..=15 => (None, Cause::Erased),
            16 => (with(api, RecordState::Disabled), Cause::Changed),
            17 => (with(api, RecordState::Expired), Cause::Expired),
            18 => (with(other_api, RecordState::Active), Cause::Changed),
            _ => (with(api, RecordState::Active), Cause::Changed),
        },
    };
    Plan { target: Target::Key(key), row, cause }
}

/// What is done to an API or a workspace: deleted if it is there, restored if not.
pub fn plan_wide(store: &Store, target: Target) -> Plan {
    let is_there = match target {
        Target::Api(api) => store.api_is_there(api),
        Target::Workspace(workspace) => store.workspace_is_there(workspace),
        Target::Key(_) => false,
    };
    let there = KeyRow { api: ApiNumber(0), state: RecordState::Active };
    let (row, cause) = if is_there { (None, Cause::Deleted) } else { (Some(there), Cause::Restored) };
    Plan { target, row, cause }
}

/// How long a transaction takes: most are short, some outlast many others.
pub fn transaction_span(ctx: &mut Ctx) -> Micros {
    if ctx.dice.permille(ctx.settings.long_transactions_permille) {
        ctx.dice.between(50 * MS, 4 * SECOND)
    } else {
        ctx.dice.span(2 * MS)
    }
}

/// The keys that a bulk deletion hits: neighbours in one API.
pub fn bulk_keys(ctx: &mut Ctx) -> Vec<KeyNumber> {
    let next = ctx.now.after(ctx.dice.span(2 * ctx.settings.bulk_every));
    ctx.queue.push(next, Event::Work(WorkEvent::Bulk));
    let size = ctx.settings.size;
    let api = ctx.dice.index(size.apis);
    let count = ctx.dice.between(20, 200) as usize;
    let first = ctx.dice.index(size.keys / size.apis);
    let keys = (first..first + count).map(|n| n * size.apis + api);
    keys.filter(|key| *key < size.keys && *key >= size.root_keys).map(KeyNumber).collect()
}

/// One step of an agent's traffic.
pub fn traffic(ctx: &mut Ctx, agent: Node) -> KeyNumber {
    let next = ctx.now.after(ctx.dice.span(SECOND / ctx.settings.verifications_per_second));
    ctx.queue.push(next, Event::Work(WorkEvent::Traffic(agent)));
    any_key(ctx, 500)
}
