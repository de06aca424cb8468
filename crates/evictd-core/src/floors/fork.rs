//! Copies of floors, for model checking.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::{Anchors, FloorCell, Floors, ScopeId};
use crate::position::LogPosition;

/// Maps floors to their copies, for the entries that are anchored to them.
#[derive(Debug)]
pub struct ForkMap {
    /// Each cell and its copy. Cells that the floors dropped are added when an entry that holds one
    /// is copied.
    cells: Vec<(Arc<FloorCell>, Arc<FloorCell>)>,
}

impl ForkMap {
    /// Returns the copy of `anchors`.
    pub fn anchors(&mut self, anchors: &Anchors) -> Anchors {
        Anchors { api: self.cell(&anchors.api), workspace: self.cell(&anchors.workspace) }
    }

    fn cell(&mut self, original: &Arc<FloorCell>) -> Arc<FloorCell> {
        if let Some((_, copy)) = self.cells.iter().find(|(known, _)| Arc::ptr_eq(known, original)) {
            return copy.clone();
        }
        let copy = Arc::new(FloorCell::new(original.get()));
        self.cells.push((original.clone(), copy.clone()));
        copy
    }
}

impl Floors {
    /// Copies the floors, and returns the map to the copy. The copy counts a cell as held once an
    /// entry that holds it was copied, and the map was dropped.
    pub fn fork(&self) -> (Self, ForkMap) {
        let copied = |cell: &Arc<FloorCell>| (cell.clone(), Arc::new(FloorCell::new(cell.get())));
        let (horizon, absent) = (copied(&self.horizon), copied(&self.absent));
        let scopes: Vec<_> = self.scopes.iter().map(|(id, cell)| (id.clone(), copied(cell))).collect();
        let floors = Self {
            limits: self.limits,
            horizon: horizon.1.clone(),
            absent: absent.1.clone(),
            keys: self.keys.clone(),
            scopes: scopes.iter().map(|(id, (_, copy))| (id.clone(), copy.clone())).collect(),
        };
        let cells = [horizon, absent].into_iter().chain(scopes.into_iter().map(|(_, pair)| pair)).collect();
        (floors, ForkMap { cells })
    }
}

/// Hashes all that decides their behavior, except the limits and which cells are held.
impl Hash for Floors {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.horizon.get(), self.absent.get()).hash(state);
        let keys: BTreeMap<_, _> =
            self.keys.iter().map(|(hash, floor)| (hash, (floor.position, &floor.api))).collect();
        keys.hash(state);
        let scopes: BTreeMap<&ScopeId, LogPosition> =
            self.scopes.iter().map(|(id, cell)| (id, cell.get())).collect();
        scopes.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::floors::FloorLimits;
    use crate::ids::WorkspaceId;
    use crate::invalidation::Scope;
    use crate::record::{Record, RecordState, RootKeyRecord};

    #[test]
    fn copy_affects_only_its_own_entries() {
        let workspace = WorkspaceId::new("ws_1");
        let record = Record::RootKey(RootKeyRecord {
            root_key_id: crate::ids::KeyId::new("root_1"),
            workspace_id: workspace.clone(),
            state: RecordState::Active,
            permissions: Vec::new(),
            expires_at: None,
        });
        let at = |position| LogPosition::new(1, position).unwrap();
        let mut original = Floors::new(FloorLimits::default());
        let (held, _) = original.anchors(&record);
        let (mut floors, mut fork_map) = original.fork();
        let moved = fork_map.anchors(&held);
        floors.raise(&Scope::Workspace(workspace.clone()), at(3));
        assert_eq!((held.floor(), moved.floor()), (LogPosition::ZERO, at(3)));
        original.flush(at(1));
        let (mut floors, mut fork_map) = original.fork();
        let dropped = fork_map.anchors(&held);
        floors.raise(&Scope::Workspace(workspace), at(4));
        assert_eq!(dropped.floor(), LogPosition::NEVER, "the dropped cell stays dropped in the copy");
    }
}
