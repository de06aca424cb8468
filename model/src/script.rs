//! The changes of a small world: two keys of one API, and what happens to them.

use std::fmt;
use std::sync::LazyLock;

use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Record, RecordState};
use evictd_core::time::StoreTime;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ModelKey {
    /// The one that agents verify.
    A,
    /// Its neighbor in the same API.
    B,
}

impl ModelKey {
    /// What it is cached under.
    pub fn key_hash(self) -> KeyHash {
        KeyHash([self as u8 + 1; 32])
    }
}

/// A change of the home store. Each of a script commits once, in the script's order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ScriptChange {
    /// The key didn't exist before.
    Create(ModelKey),
    /// A soft deletion: the record stays, and grants nothing.
    Delete(ModelKey),
    /// The API is deleted, both keys with it.
    DeleteApi,
    /// Another API is deleted, none of whose keys is verified.
    DeleteOtherApi,
}

static API: LazyLock<ApiId> = LazyLock::new(|| ApiId::new("api"));
static OTHER_API: LazyLock<ApiId> = LazyLock::new(|| ApiId::new("other"));
static WORKSPACE: LazyLock<WorkspaceId> = LazyLock::new(|| WorkspaceId::new("ws"));
static KEY: LazyLock<KeyId> = LazyLock::new(|| KeyId::new("key"));

impl ScriptChange {
    /// The row of the log that it writes, once it has a position.
    pub fn row(self, position: LogPosition) -> Invalidation {
        let (scope, cause) = match self {
            Self::Create(key) => (key_scope(key), Cause::Created),
            Self::Delete(key) => (key_scope(key), Cause::Deleted),
            Self::DeleteApi => (Scope::Api(API.clone()), Cause::Deleted),
            Self::DeleteOtherApi => (Scope::Api(OTHER_API.clone()), Cause::Deleted),
        };
        Invalidation { position, scope, cause, committed_at: StoreTime(0) }
    }
}

const CREATE: ScriptChange = ScriptChange::Create(ModelKey::A);

const DELETE: ScriptChange = ScriptChange::Delete(ModelKey::A);

fn key_scope(key: ModelKey) -> Scope {
    Scope::Key { hash: key.key_hash(), key_id: None, api_id: Some(API.clone()) }
}

/// The number of a change in its script.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChangeId(pub u8);

/// A set of changes: those that a snapshot of the store includes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct View(u8);

impl View {
    pub fn includes(self, change: ChangeId) -> bool {
        self.0 & (1 << change.0) != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What this one includes and `other` doesn't.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl FromIterator<ChangeId> for View {
    fn from_iter<I: IntoIterator<Item = ChangeId>>(changes: I) -> Self {
        Self(changes.into_iter().fold(0, |bits, change| bits | 1 << change.0))
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((0..8).filter(|bit| self.0 & (1 << bit) != 0)).finish()
    }
}

/// The changes of a world, in the order of their commits.
#[derive(Clone, Copy, Debug)]
pub struct Script(pub &'static [ScriptChange]);

impl Script {
    pub fn change(self, id: ChangeId) -> ScriptChange {
        self.0[usize::from(id.0)]
    }

    /// The changes that a verification reads.
    pub fn verified(self) -> View {
        self.ids()
            .filter(|id| matches!(self.change(*id), CREATE | DELETE | ScriptChange::DeleteApi))
            .collect()
    }

    /// The record in a snapshot with these changes.
    pub fn record(self, view: View) -> Record {
        let has = |wanted: ScriptChange| self.ids().any(|id| self.change(id) == wanted && view.includes(id));
        if self.0.contains(&CREATE) && !has(CREATE) {
            return Record::Absent;
        }
        let deleted = has(DELETE) || has(ScriptChange::DeleteApi);
        Record::Key(KeyRecord {
            key_id: KEY.clone(),
            api_id: API.clone(),
            workspace_id: WORKSPACE.clone(),
            state: if deleted { RecordState::Deleted } else { RecordState::Active },
            name: None,
            meta: None,
            external_id: None,
            permissions: Vec::new(),
            expires_at: None,
        })
    }

    fn ids(self) -> impl Iterator<Item = ChangeId> {
        (0..self.0.len() as u8).map(ChangeId)
    }
}
