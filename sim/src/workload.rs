//! The workload: changes of all kinds and verifications, at random and at critical moments.

use evictd_core::invalidation::Cause;
use evictd_core::record::RecordState;

use crate::ctx::Ctx;
use crate::event::{SimEvent, WorkEvent};
use crate::node::NodeNumber;
use crate::rows::{
    APIS, ApiNumber, ChangePlan, ChangeTarget, KeyNumber, KeyRow, ROOT_KEYS, WORKSPACES, WorkspaceNumber,
};
use crate::store::SimStore;
use crate::time::{MS, Micros, Moment, SECOND};

/// Keys that are verified, and changed, far more often than others.
const HOT_KEYS: usize = 24;

/// The time from the first verifications of a key to its change.
const WARM_UP: Micros = 400 * MS;

/// Schedules the first of everything.
pub fn begin(ctx: &mut Ctx) {
    ctx.queue.push(Moment(50 * MS), SimEvent::Work(WorkEvent::Choose));
    for agent in 0..ctx.settings.agents {
        ctx.queue.push(Moment(60 * MS), SimEvent::Work(WorkEvent::Traffic(NodeNumber(agent))));
    }
    if ctx.settings.bulk_every > 0 {
        ctx.queue.push(Moment(ctx.settings.bulk_every), SimEvent::Work(WorkEvent::Bulk));
    }
}

/// A random key. Hot ones are drawn more often.
fn any_key(ctx: &mut Ctx, hot_permille: u32) -> KeyNumber {
    let hot = ctx.dice.permille(hot_permille);
    KeyNumber(ctx.dice.index(if hot { HOT_KEYS.min(ctx.settings.keys) } else { ctx.settings.keys }))
}

/// Chooses what is changed soon, and when it is verified.
pub fn choose(ctx: &mut Ctx) {
    let next = ctx.now.after(ctx.dice.span(SECOND / ctx.settings.changes_per_second));
    ctx.queue.push(next, SimEvent::Work(WorkEvent::Choose));
    if ctx.dice.permille(4) {
        return choose_wide(ctx);
    }
    let key = any_key(ctx, 50);
    let at = ctx.now.after(WARM_UP);
    ctx.queue.push(at, SimEvent::Work(WorkEvent::Change(key)));
    for agent in (0..ctx.settings.agents).map(NodeNumber) {
        if !ctx.dice.permille(600) {
            continue;
        }
        // Before, right around, soon after, and at the bound.
        let warm = ctx.now.after(ctx.dice.below(WARM_UP));
        let around = at.after(ctx.dice.below(30 * MS));
        let soon = at.after(ctx.dice.below(2 * SECOND));
        for moment in [warm, around, soon] {
            ctx.queue.push(moment, SimEvent::Work(WorkEvent::Verify(agent, key)));
        }
        if ctx.dice.permille(250) {
            let bound = ctx.settings.bound.as_micros() as u64;
            let end = at.after(bound).after(ctx.dice.below(SECOND));
            ctx.queue.push(end, SimEvent::Work(WorkEvent::Verify(agent, key)));
        }
    }
}

fn choose_wide(ctx: &mut Ctx) {
    let target = if ctx.dice.permille(150) {
        ChangeTarget::Workspace(WorkspaceNumber(ctx.dice.index(WORKSPACES)))
    } else {
        ChangeTarget::Api(ApiNumber(ctx.dice.index(APIS)))
    };
    // Deleted now, and back before long: what is deleted for good tests nothing any more.
    let back = ctx.now.after(ctx.dice.between(SECOND / 10, 3 * SECOND));
    ctx.queue.push(ctx.now, SimEvent::Work(WorkEvent::Wide(target)));
    ctx.queue.push(back, SimEvent::Work(WorkEvent::Wide(target)));
}

/// Draws a change of a key, given its present row.
pub fn plan_key(ctx: &mut Ctx, store: &SimStore, key: KeyNumber) -> ChangePlan {
    let row = store.row(ChangeTarget::Key(key));
    let other_api = ApiNumber(ctx.dice.index(APIS));
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
    ChangePlan { target: ChangeTarget::Key(key), row, cause }
}

/// Plans a change of an API or a workspace: a deletion if it exists, otherwise its restoration.
pub fn plan_wide(store: &SimStore, target: ChangeTarget) -> ChangePlan {
    let there = KeyRow { api: ApiNumber(0), state: RecordState::Active };
    let (row, cause) = match store.row(target) {
        Some(_) => (None, Cause::Deleted),
        None => (Some(there), Cause::Restored),
    };
    ChangePlan { target, row, cause }
}

/// Draws the time of a transaction: most are short, some outlast many others.
pub fn transaction_span(ctx: &mut Ctx) -> Micros {
    if ctx.dice.permille(ctx.settings.long_transactions_permille) {
        ctx.dice.between(50 * MS, 4 * SECOND)
    } else {
        ctx.dice.span(2 * MS)
    }
}

/// The keys of a bulk deletion: neighbors in one API.
pub fn bulk_keys(ctx: &mut Ctx) -> Vec<KeyNumber> {
    let next = ctx.now.after(ctx.dice.span(2 * ctx.settings.bulk_every));
    ctx.queue.push(next, SimEvent::Work(WorkEvent::Bulk));
    let api = ctx.dice.index(APIS);
    let count = ctx.dice.between(20, 200) as usize;
    let first = ctx.dice.index(ctx.settings.keys / APIS);
    let keys = (first..first + count).map(|n| n * APIS + api);
    keys.filter(|key| *key < ctx.settings.keys && *key >= ROOT_KEYS).map(KeyNumber).collect()
}

/// One step of an agent's traffic.
pub fn traffic(ctx: &mut Ctx, agent: NodeNumber) -> KeyNumber {
    let next = ctx.now.after(ctx.dice.span(SECOND / ctx.settings.verifications_per_second));
    ctx.queue.push(next, SimEvent::Work(WorkEvent::Traffic(agent)));
    any_key(ctx, 500)
}
