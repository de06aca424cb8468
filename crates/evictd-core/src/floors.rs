//! What an agent remembers of invalidations (R6).
//!
//! A floor is a position: whatever is older than the floor of its scope is not served. Floors only
//! rise, so the order, repetition and batching of invalidations don't matter (they form a
//! join-semilattice), and forgetting one is safe as long as something wider rises in its place.
//!
//! Floors of APIs, workspaces and of everything ([`Floors::horizon`]) are shared cells: a cached entry
//! holds those it depends on as [`Anchors`], and the hot path reads them without a lock or a look-up.
//! Floors of single keys need no cell: raising one goes with removing the entry from the cache.

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

/// One floor that many entries share.
#[derive(Debug)]
pub struct FloorCell(AtomicU64);

impl FloorCell {
    /// A cell that starts at `position`.
    pub fn new(position: LogPosition) -> Self {
        Self(AtomicU64::new(position.to_bits()))
    }

    /// The floor now.
    pub fn get(&self) -> LogPosition {
        LogPosition::from_bits(self.0.load(Ordering::Acquire))
    }

    /// Raises the floor to `position` if it is lower.
    pub fn raise(&self, position: LogPosition) {
        self.0.fetch_max(position.to_bits(), Ordering::AcqRel);
    }
}

/// The shared floors that an entry depends on, besides the horizon.
#[derive(Clone, Debug)]
pub struct Anchors {
    /// The API's floor; for what has no API, the floor of "not found" or of the workspace.
    api: Arc<FloorCell>,
    /// The workspace's floor, or the same cell again.
    workspace: Arc<FloorCell>,
}

impl Anchors {
    /// The higher of the two.
    pub fn floor(&self) -> LogPosition {
        self.api.get().max(self.workspace.get())
    }
}

/// How many floors are kept before they are merged.
#[derive(Clone, Copy, Debug)]
pub struct FloorLimits {
    /// Floors of single keys.
    pub keys: usize,
    /// Floors of APIs and workspaces.
    pub scopes: usize,
}

impl Default for FloorLimits {
    fn default() -> Self {
        Self { keys: limits::KEY_FLOORS_MAX, scopes: limits::SCOPE_FLOORS_MAX }
    }
}

/// What had to be forgotten to stay within the limits; each is safe, and costs reloads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FloorsMerged {
    /// The floors of one API's keys became the API's floor.
    Api {
        /// Which.
        api: ApiId,
        /// How many were merged.
        merged: usize,
    },
    /// Floors were dropped, and the horizon rose in their place.
    Horizon {
        /// How many were dropped.
        dropped: usize,
    },
}

impl FloorsMerged {
    /// How many floors were given up.
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
    /// The API that all invalidations of this hash named, so that its floor can stand in for this one.
    api: Option<ApiId>,
}

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum ScopeId {
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
    /// No floors; the horizon lets nothing pass until a base position is known.
    pub fn new(limits: FloorLimits) -> Self {
        Self {
            limits,
            horizon: Arc::new(FloorCell::new(LogPosition::ZERO)),
            absent: Arc::new(FloorCell::new(LogPosition::ZERO)),
            keys: HashMap::new(),
            scopes: HashMap::new(),
        }
    }

    /// The floor of everything. The cell never changes its identity.
    pub fn horizon(&self) -> &Arc<FloorCell> {
        &self.horizon
    }

    /// How many key floors and scope floors are kept.
    pub fn counts(&self) -> (usize, usize) {
        (self.keys.len(), self.scopes.len())
    }

    /// Applies one invalidation: from now on nothing older than `position` in `scope` is served.
    pub fn raise(&mut self, scope: &Scope, position: LogPosition) -> Option<FloorsMerged> {
        match scope {
            Scope::Key { hash, api_id, .. } => {
                let floor =
                    self.keys.entry(*hash).or_insert_with(|| KeyFloor { position, api: api_id.clone() });
                floor.position = floor.position.max(position);
                if floor.api != *api_id {
                    // The hash moved between APIs: neither API's floor could stand in for this one.
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

    /// Forgets all floors below `position`: the horizon stands in for them. Entries anchored to a
    /// forgotten cell die with it.
    pub fn flush(&mut self, position: LogPosition) {
        self.raise_horizon(position);
        self.keys.retain(|_, floor| floor.position > position);
        self.drop_scopes(|cell| cell.get() > position);
    }

    /// The shared floors that an entry for `record` depends on, and what had to be forgotten to make
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
        let widened = self.make_room_for_scopes();
        (anchors, widened)
    }

    /// The highest floor that an entry for `hash` with these anchors must meet.
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

    /// Merges the floors of the API that has most of them into that API's floor. When no API stands
    /// out, merging would free too little for its cost, and the older half goes into the horizon.
    fn merge_keys(&mut self) -> FloorsMerged {
        let mut counts: HashMap<&ApiId, usize> = HashMap::new();
        for api in self.keys.values().filter_map(|floor| floor.api.as_ref()) {
            *counts.entry(api).or_default() += 1;
        }
        // Ties are broken by name, so that every run of the same history forgets the same.
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
                    // "Not found" has no API and was covered by the floors that just went.
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

    /// Drops cells that no entry holds: first those that the horizon covers anyway, then all, the
    /// horizon rising in their place. Cells that are still held stay, unless even they are too many:
    /// then everything starts over.
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

    /// Forgets cells. Entries that still hold a forgotten one would miss its later rises, so the cell
    /// is raised out of reach first.
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
    fn an_api_floor_reaches_entries_that_hold_its_cell_already() {
        let mut floors = Floors::new(FloorLimits::default());
        let (anchors, _) = floors.anchors(&record("api_a"));
        let (others, _) = floors.anchors(&record("api_b"));
        floors.raise(&Scope::Api(ApiId::new("api_a")), at(5));
        assert_eq!(anchors.floor(), at(5));
        assert_eq!(others.floor(), LogPosition::ZERO);
    }

    #[test]
    fn a_flush_kills_what_was_anchored_before_it() {
        let mut floors = Floors::new(FloorLimits::default());
        let (anchors, _) = floors.anchors(&record("api_a"));
        floors.flush(at(9));
        assert_eq!(floors.horizon().get(), at(9));
        assert_eq!(anchors.floor(), LogPosition::NEVER);
        let (fresh, _) = floors.anchors(&record("api_a"));
        assert_eq!(floors.floor(&hash(1), &fresh), at(9));
    }

    #[test]
    fn a_bulk_deletion_becomes_one_api_floor_and_spares_other_tenants() {
        let mut floors = Floors::new(FloorLimits { keys: 20, scopes: 16 });
        floors.raise(&key_scope(200, "api_small"), at(1));
        let mut widened = None;
        for n in 0..20 {
            widened = widened.or(floors.raise(&key_scope(n, "api_big"), at(10 + u64::from(n))));
        }
        assert_eq!(widened, Some(FloorsMerged::Api { api: ApiId::new("api_big"), merged: 20 }));
        assert_eq!(floor(&mut floors, 0, &record("api_big")), at(29));
        assert_eq!(floor(&mut floors, 200, &record("api_small")), at(1));
        assert_eq!(floor(&mut floors, 0, &Record::Absent), at(29), "a cached `not found` lost its key floor");
        assert_eq!(floors.horizon().get(), LogPosition::ZERO);
    }

    #[test]
    fn floors_without_a_common_api_go_into_the_horizon_oldest_first() {
        let mut floors = Floors::new(FloorLimits { keys: 20, scopes: 64 });
        for n in 0..=20 {
            floors.raise(&key_scope(n, &format!("api_{n}")), at(1 + u64::from(n)));
        }
        assert_eq!(floors.horizon().get(), at(11));
        assert_eq!(floor(&mut floors, 20, &record("api_20")), at(21));
        assert_eq!(floors.counts().0, 10);
    }

    #[test]
    fn a_hash_that_moved_between_apis_keeps_its_own_floor() {
        let mut floors = Floors::new(FloorLimits { keys: 4, scopes: 16 });
        floors.raise(&key_scope(9, "api_a"), at(1));
        floors.raise(&key_scope(9, "api_b"), at(2));
        for n in 0..4 {
            floors.raise(&key_scope(n, "api_a"), at(10 + u64::from(n)));
        }
        assert_eq!(floor(&mut floors, 9, &record("api_b")), at(2), "merging api_a must not take it along");
    }

    #[test]
    fn unheld_cells_go_first_and_held_ones_keep_hearing_of_their_api() {
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
    fn when_even_held_cells_are_too_many_everything_starts_over() {
        let mut floors = Floors::new(FloorLimits { keys: 8, scopes: 8 });
        let held: Vec<_> = (0..9).map(|n| floors.anchors(&record(&format!("api_{n}"))).0).collect();
        assert!(held[0].floor() == LogPosition::NEVER);
        assert!(floors.counts().1 <= 8);
    }

    /// A key stays in its API; one that moves is named by rows for both, see
    /// `a_hash_that_moved_between_apis_keeps_its_own_floor`.
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
        fn forgetting_never_lowers_a_floor(history in history()) {
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
