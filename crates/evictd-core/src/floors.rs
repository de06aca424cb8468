//! The positions below which nothing is served (R6).
//!
//! A floor belongs to a scope: a key, an API, a workspace, or everything. An entry that is older
//! than a floor of one of its scopes is not served. Floors only rise, so the order, repetition and
//! batching of invalidations don't matter: they form a join-semilattice. A floor may be dropped
//! when a wider one rises in its place.
//!
//! The floors of APIs, workspaces and everything ([`Floors::horizon`]) are shared cells. A cached
//! entry holds the cells that it depends on as [`Anchors`], so the hot path reads them without a
//! lock or a lookup. The floor of a single key needs no cell: when it rises, the entry is evicted.

use std::collections::HashMap;
use std::sync::Arc;

use crate::ids::{ApiId, KeyHash, WorkspaceId};
use crate::invalidation::Scope;
use crate::limits;
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::record::Record;
use crate::sync::{AtomicU64, Ordering};

#[cfg(any(test, feature = "fork"))]
pub mod fork;

/// A floor that many entries share.
#[derive(Debug)]
pub struct FloorCell(AtomicU64);

impl FloorCell {
    pub fn new(position: LogPosition) -> Self {
        Self(AtomicU64::new(position.to_bits()))
    }

    pub fn get(&self) -> LogPosition {
        LogPosition::from_bits(self.0.load(Ordering::Acquire))
    }

    /// Raises the floor to `position`, unless it is higher.
    pub fn raise(&self, position: LogPosition) {
        self.0.fetch_max(position.to_bits(), Ordering::AcqRel);
    }
}

/// The shared floors that an entry depends on, besides the horizon.
#[derive(Clone, Debug)]
pub struct Anchors {
    /// The API's floor. Root keys have that of their workspace here, and "not found" a floor of its
    /// own.
    api: Arc<FloorCell>,
    /// The workspace's floor; that of "not found" for "not found".
    workspace: Arc<FloorCell>,
}

impl Anchors {
    /// Returns the higher one.
    pub fn floor(&self) -> LogPosition {
        self.api.get().max(self.workspace.get())
    }
}

/// How many floors are kept before they are merged.
#[derive(Clone, Copy, Debug)]
pub struct FloorLimits {
    pub keys: usize,
    /// Of APIs and workspaces.
    pub scopes: usize,
}

impl Default for FloorLimits {
    fn default() -> Self {
        Self { keys: limits::KEY_FLOORS_MAX, scopes: limits::SCOPE_FLOORS_MAX }
    }
}

/// Floors that were merged into a wider one to stay within the limits. It is safe, and costs
/// reloads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FloorsMerged {
    /// The floors of one API's keys, into the API's floor.
    Api { api: ApiId, merged: usize },
    /// Into the horizon.
    Horizon { dropped: usize },
}

impl FloorsMerged {
    /// How many floors were merged.
    pub fn floors(&self) -> usize {
        match self {
            Self::Api { merged, .. } => *merged,
            Self::Horizon { dropped } => *dropped,
        }
    }
}

#[derive(Clone, Debug)]
struct KeyFloor {
    position: LogPosition,
    /// The API of all invalidations of this hash: its floor can replace this one. `None` if they
    /// named several.
    api: Option<ApiId>,
}

/// A scope between a single key and everything.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) enum ScopeId {
    Api(ApiId),
    Workspace(WorkspaceId),
}

/// All floors of one agent.
#[derive(Debug)]
pub struct Floors {
    limits: FloorLimits,
    horizon: Arc<FloorCell>,
    absent: Arc<FloorCell>,
    keys: HashMap<KeyHash, KeyFloor>,
    scopes: HashMap<ScopeId, Arc<FloorCell>>,
}

impl Floors {
    pub fn new(limits: FloorLimits) -> Self {
        Self {
            limits,
            horizon: Arc::new(FloorCell::new(LogPosition::ZERO)),
            absent: Arc::new(FloorCell::new(LogPosition::ZERO)),
            keys: HashMap::new(),
            scopes: HashMap::new(),
        }
    }

    /// The floor of everything: always the same cell.
    pub fn horizon(&self) -> &Arc<FloorCell> {
        &self.horizon
    }

    /// How many floors of keys, and of APIs and workspaces, are kept.
    pub fn counts(&self) -> (usize, usize) {
        (self.keys.len(), self.scopes.len())
    }

    /// Raises the floor of `scope` to `position`. May merge floors.
    pub fn raise(&mut self, scope: &Scope, position: LogPosition) -> Option<FloorsMerged> {
        match scope {
            Scope::Key { hash, api_id, .. } => {
                let floor =
                    self.keys.entry(*hash).or_insert_with(|| KeyFloor { position, api: api_id.clone() });
                floor.position = floor.position.max(position);
                if floor.api != *api_id {
                    // The hash moved between APIs, so neither API's floor can replace this one.
                    floor.api = None;
                }
                if self.keys.len() > self.limits.keys { Some(self.merge_keys()) } else { None }
            }
            Scope::Api(id) => self.raise_scope(ScopeId::Api(id.clone()), position),
            Scope::Workspace(id) => self.raise_scope(ScopeId::Workspace(id.clone()), position),
            Scope::All => {
                self.raise_horizon(position);
                None
            }
        }
    }

    /// Raises the horizon to `position`, and drops the floors below it. Entries that are anchored
    /// to a dropped cell become void.
    pub fn flush(&mut self, position: LogPosition) {
        self.raise_horizon(position);
        self.keys.retain(|_, floor| floor.position > position);
        self.drop_scopes(|cell| cell.get() > position);
    }

    /// Returns the shared floors that an entry for `record` depends on. May merge floors to make
    /// room for them.
    pub fn anchors(&mut self, record: &Record) -> (Anchors, Option<FloorsMerged>) {
        let anchors = match record {
            Record::Absent => Anchors { api: self.absent.clone(), workspace: self.absent.clone() },
            Record::Key(key) => Anchors {
                api: self.cell(ScopeId::Api(key.api_id.clone())),
                workspace: self.cell(ScopeId::Workspace(key.workspace_id.clone())),
            },
            Record::RootKey(root) => {
                let workspace = self.cell(ScopeId::Workspace(root.workspace_id.clone()));
                Anchors { api: workspace.clone(), workspace }
            }
        };
        let merged = self.make_room_for_scopes();
        (anchors, merged)
    }

    /// Returns the highest floor that an entry for `hash` with these anchors must meet.
    pub fn floor(&self, hash: &KeyHash, anchors: &Anchors) -> LogPosition {
        let key = self.keys.get(hash).map_or(LogPosition::ZERO, |floor| floor.position);
        key.max(anchors.floor()).max(self.horizon.get())
    }

    fn raise_horizon(&self, position: LogPosition) {
        if Protection::DroppedFloorsLiveOn.holds() {
            self.horizon.raise(position);
        }
    }

    fn cell(&mut self, id: ScopeId) -> Arc<FloorCell> {
        self.scopes.entry(id).or_insert_with(|| Arc::new(FloorCell::new(LogPosition::ZERO))).clone()
    }

    fn raise_scope(&mut self, id: ScopeId, position: LogPosition) -> Option<FloorsMerged> {
        self.cell(id).raise(position);
        self.make_room_for_scopes()
    }

    /// Merges the key floors of the API that has most of them into that API's floor. If no API has
    /// many, that would free too little for its cost: then the older half is merged into the
    /// horizon.
    fn merge_keys(&mut self) -> FloorsMerged {
        let mut counts: HashMap<&ApiId, usize> = HashMap::new();
        for api in self.keys.values().filter_map(|floor| floor.api.as_ref()) {
            *counts.entry(api).or_default() += 1;
        }
        // Ties are broken by name, so that each run of one history merges the same floors.
        let largest = counts.into_iter().max_by_key(|(api, count)| (*count, std::cmp::Reverse(*api)));
        match largest.map(|(api, count)| (api.clone(), count)) {
            Some((api, merged)) if merged * 16 >= self.keys.len() => {
                let mut highest = LogPosition::ZERO;
                self.keys.retain(|_, floor| {
                    let merge = floor.api.as_ref() == Some(&api);
                    if merge {
                        highest = highest.max(floor.position);
                    }
                    !merge
                });
                if Protection::DroppedFloorsLiveOn.holds() {
                    self.cell(ScopeId::Api(api.clone())).raise(highest);
                    // "Not found" has no API: the key floors that are gone covered it.
                    self.absent.raise(highest);
                }
                FloorsMerged::Api { api, merged }
            }
            _ => self.drop_older_keys(),
        }
    }

    fn drop_older_keys(&mut self) -> FloorsMerged {
        let mut positions: Vec<_> = self.keys.values().map(|floor| floor.position).collect();
        let middle = positions.len() / 2;
        let (_, median, _) = positions.select_nth_unstable(middle);
        let horizon = *median;
        let before = self.keys.len();
        self.keys.retain(|_, floor| floor.position > horizon);
        self.raise_horizon(horizon);
        FloorsMerged::Horizon { dropped: before - self.keys.len() }
    }

    /// Drops cells that no entry holds: first those below the horizon, then all of them, and the
    /// horizon rises in their place. If the cells that entries hold are too many as well, all cells
    /// are dropped.
    fn make_room_for_scopes(&mut self) -> Option<FloorsMerged> {
        if self.scopes.len() <= self.limits.scopes {
            return None;
        }
        let before = self.scopes.len();
        let horizon = self.horizon.get();
        self.scopes.retain(|_, cell| Arc::strong_count(cell) > 1 || cell.get() > horizon);
        if self.scopes.len() * 2 <= self.limits.scopes {
            return None;
        }
        let mut highest = horizon;
        self.scopes.retain(|_, cell| {
            let held = Arc::strong_count(cell) > 1;
            if !held {
                highest = highest.max(cell.get());
            }
            held
        });
        self.raise_horizon(highest);
        if self.scopes.len() * 2 > self.limits.scopes {
            let above_all = self.scopes.values().map(|cell| cell.get()).max().unwrap_or(highest).max(highest);
            self.raise_horizon(above_all);
            self.drop_scopes(|_| false);
        }
        Some(FloorsMerged::Horizon { dropped: before - self.scopes.len() })
    }

    /// Drops cells. Entries that hold a dropped cell would miss later invalidations, so the cell is
    /// raised above every position first: they become void.
    fn drop_scopes(&mut self, keep: impl Fn(&FloorCell) -> bool) {
        self.scopes.retain(|_, cell| {
            let kept = keep(cell);
            if !kept {
                cell.raise(LogPosition::NEVER);
            }
            kept
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::KeyId;
    use crate::record::{KeyRecord, RecordState};

    fn at(position: u64) -> LogPosition {
        LogPosition::new(1, position).unwrap()
    }

    fn hash(n: u8) -> KeyHash {
        KeyHash([n; 32])
    }

    fn key_scope(n: u8, api: &str) -> Scope {
        Scope::Key { hash: hash(n), key_id: None, api_id: Some(ApiId::new(api)) }
    }

    fn record(api: &str) -> Record {
        Record::Key(KeyRecord {
            key_id: KeyId::new("key"),
            api_id: ApiId::new(api),
            workspace_id: WorkspaceId::new("ws"),
            state: RecordState::Active,
            name: None,
            meta: None,
            external_id: None,
            permissions: Vec::new(),
            expires_at: None,
        })
    }

    fn floor(floors: &mut Floors, n: u8, record: &Record) -> LogPosition {
        let (anchors, _) = floors.anchors(record);
        floors.floor(&hash(n), &anchors)
    }

    #[test]
    fn api_floor_reaches_entries_that_hold_its_cell() {
        let mut floors = Floors::new(FloorLimits::default());
        let (anchors, _) = floors.anchors(&record("api_a"));
        let (others, _) = floors.anchors(&record("api_b"));
        floors.raise(&Scope::Api(ApiId::new("api_a")), at(5));
        assert_eq!(anchors.floor(), at(5));
        assert_eq!(others.floor(), LogPosition::ZERO);
    }

    #[test]
    fn flush_voids_entries_that_were_anchored_before_it() {
        let mut floors = Floors::new(FloorLimits::default());
        let (anchors, _) = floors.anchors(&record("api_a"));
        floors.flush(at(9));
        assert_eq!(floors.horizon().get(), at(9));
        assert_eq!(anchors.floor(), LogPosition::NEVER);
        let (fresh, _) = floors.anchors(&record("api_a"));
        assert_eq!(floors.floor(&hash(1), &fresh), at(9));
    }

    #[test]
    fn bulk_deletion_is_merged_into_one_api_floor() {
        let mut floors = Floors::new(FloorLimits { keys: 20, scopes: 16 });
        floors.raise(&key_scope(200, "api_small"), at(1));
        let mut merged = None;
        for n in 0..20 {
            merged = merged.or(floors.raise(&key_scope(n, "api_big"), at(10 + u64::from(n))));
        }
        assert_eq!(merged, Some(FloorsMerged::Api { api: ApiId::new("api_big"), merged: 20 }));
        assert_eq!(floor(&mut floors, 0, &record("api_big")), at(29));
        assert_eq!(floor(&mut floors, 200, &record("api_small")), at(1));
        assert_eq!(floor(&mut floors, 0, &Record::Absent), at(29), "of a cached `not found`");
        assert_eq!(floors.horizon().get(), LogPosition::ZERO);
    }

    #[test]
    fn older_floors_without_a_common_api_go_into_the_horizon() {
        let mut floors = Floors::new(FloorLimits { keys: 20, scopes: 64 });
        for n in 0..=20 {
            floors.raise(&key_scope(n, &format!("api_{n}")), at(1 + u64::from(n)));
        }
        assert_eq!(floors.horizon().get(), at(11));
        assert_eq!(floor(&mut floors, 20, &record("api_20")), at(21));
        assert_eq!(floors.counts().0, 10);
    }

    #[test]
    fn hash_that_moved_between_apis_keeps_its_own_floor() {
        let mut floors = Floors::new(FloorLimits { keys: 4, scopes: 16 });
        floors.raise(&key_scope(9, "api_a"), at(1));
        floors.raise(&key_scope(9, "api_b"), at(2));
        for n in 0..4 {
            floors.raise(&key_scope(n, "api_a"), at(10 + u64::from(n)));
        }
        assert_eq!(floor(&mut floors, 9, &record("api_b")), at(2), "not merged with api_a");
    }

    #[test]
    fn cells_that_entries_hold_are_kept() {
        let mut floors = Floors::new(FloorLimits { keys: 8, scopes: 8 });
        let (held, _) = floors.anchors(&record("api_held"));
        for n in 0..20 {
            floors.raise(&Scope::Api(ApiId::new(format!("api_{n}"))), at(n + 1));
        }
        assert!(floors.counts().1 <= 8);
        floors.raise(&Scope::Api(ApiId::new("api_held")), at(99));
        assert_eq!(held.floor(), at(99));
    }

    #[test]
    fn all_cells_are_dropped_when_entries_hold_too_many() {
        let mut floors = Floors::new(FloorLimits { keys: 8, scopes: 8 });
        let held: Vec<_> = (0..9).map(|n| floors.anchors(&record(&format!("api_{n}"))).0).collect();
        assert!(held[0].floor() == LogPosition::NEVER);
        assert!(floors.counts().1 <= 8);
    }

    /// A key stays in its API; one that moves is named by rows for both, see
    /// `hash_that_moved_between_apis_keeps_its_own_floor`.
    fn api_of(n: u8) -> String {
        format!("api_{}", n % 4)
    }

    fn any_scope() -> impl Strategy<Value = Scope> {
        prop_oneof![
            8 => (0u8..24).prop_map(|n| key_scope(n, &api_of(n))),
            2 => (0u8..4).prop_map(|n| Scope::Api(ApiId::new(format!("api_{n}")))),
            1 => Just(Scope::Workspace(WorkspaceId::new("ws"))),
            1 => Just(Scope::All),
        ]
    }

    fn history() -> impl Strategy<Value = Vec<(Scope, u64)>> {
        prop::collection::vec(any_scope(), 1..60).prop_map(|scopes| scopes.into_iter().zip(1..).collect())
    }

    /// Every floor that any entry could have to meet.
    fn observe(floors: &mut Floors) -> Vec<LogPosition> {
        let mut seen = Vec::new();
        for n in 0..24 {
            seen.push(floor(floors, n, &record(&api_of(n))));
            seen.push(floor(floors, n, &Record::Absent));
        }
        seen
    }

    proptest! {
        #[test]
        fn order_and_repetition_of_invalidations_do_not_matter(
            (history, shuffled) in history().prop_flat_map(|h| (Just(h.clone()), Just(h).prop_shuffle())),
            repeat in 0usize..20,
        ) {
            let (mut one, mut other) = (Floors::new(FloorLimits::default()), Floors::new(FloorLimits::default()));
            for (scope, position) in &history {
                one.raise(scope, at(*position));
            }
            for (scope, position) in shuffled.iter().chain(shuffled.iter().take(repeat)) {
                other.raise(scope, at(*position));
            }
            prop_assert_eq!(observe(&mut one), observe(&mut other));
        }

        #[test]
        fn merging_never_lowers_a_floor(history in history()) {
            let mut tight = Floors::new(FloorLimits { keys: 6, scopes: 3 });
            let mut roomy = Floors::new(FloorLimits::default());
            for (scope, position) in &history {
                tight.raise(scope, at(*position));
                roomy.raise(scope, at(*position));
            }
            for (tight, roomy) in observe(&mut tight).into_iter().zip(observe(&mut roomy)) {
                prop_assert!(tight >= roomy);
            }
        }
    }
}
