//! The store's data, as the other parts of the world refer to it.

use std::rc::Rc;
use std::time::Duration;

use evictd_core::history::{Incarnation, LogToken, Provenance, RoundToken};
use evictd_core::ids::{AgentName, Identity, InstanceId, KeyHash, Region};
use evictd_core::invalidation::{Cause, Invalidation};
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState};
use evictd_core::roster::{Instance, PartitionPolicy};

use crate::node::{Life, NodeNumber};
use crate::time::Moment;

/// Names a commit; they follow each other in the order of becoming visible.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Lsn(pub u64);

/// Which of the two stores that a world can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreSite {
    /// The one that agents must follow.
    Home,
    /// A copy of it, with a history of its own from some commit of home's on.
    Copy {
        /// The last commit that they share.
        of: Lsn,
    },
}

/// Names a key's text. Deleted and created again, it is the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyNumber(pub usize);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ApiNumber(pub usize);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WorkspaceNumber(pub usize);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyRow {
    /// The key's API. It means nothing for root keys, APIs and workspaces.
    pub api: ApiNumber,
    /// As `RecordState`, without what API and workspace add.
    pub state: RecordState,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChangeNumber(pub u32);

/// A row of the store. An API or a workspace exists while it has one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ChangeTarget {
    Key(KeyNumber),
    Api(ApiNumber),
    Workspace(WorkspaceNumber),
}

/// Where a record was read. Only the checker uses it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadPlace {
    pub lsn: Lsn,
    /// The rows that the record depends on: its key, and the key's API and workspace in this snapshot.
    pub targets: [Option<ChangeTarget>; 3],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChangePlan {
    pub target: ChangeTarget,
    /// What the row becomes; `None` if it is deleted.
    pub row: Option<KeyRow>,
    pub cause: Cause,
}

#[derive(Clone, Debug)]
pub struct Transaction {
    pub plan: ChangePlan,
    /// Drawn when its statement ran: ids don't follow the order of commits.
    pub rows: [u64; 2],
    /// The publisher that waits for the outcome; `None` for direct SQL.
    pub reply_to: Option<(NodeNumber, Life)>,
    pub generation: u32,
}

/// Numbering under way: by a sequencer, or as part of a round.
#[derive(Clone, Debug)]
pub struct Numbering {
    pub publisher: NodeNumber,
    pub life: Life,
    /// The statement saw what was visible then.
    pub visible: Moment,
    pub generation: u32,
    pub on_demoted: bool,
    /// The probes' part, if it is a round.
    pub round: Option<RoundInput>,
}

/// What a round takes along.
#[derive(Clone, Debug)]
pub struct RoundInput {
    /// The highest epoch that an agent has proved to have seen.
    pub seen_epoch: u32,
    pub instances: Vec<(NodeNumber, Life)>,
}

#[derive(Clone, Debug)]
pub struct NumberedBatch {
    pub head: SimHead,
    pub rows: Rc<[Invalidation]>,
}

/// Rows of one epoch, both ends included.
#[derive(Clone, Copy, Debug)]
pub struct RowRange {
    pub epoch: u32,
    pub first: u64,
    pub last: u64,
}

/// The head of the log with its tokens, which distinguish it from a copy's. It is one row.
#[derive(Clone, Copy, Debug)]
pub struct SimHead {
    /// The last position that was given.
    pub at: LogPosition,
    /// The present incarnation.
    pub incarnation: Incarnation,
    /// Of the row at this position, or of the incarnation's beginning.
    pub token: LogToken,
    /// Of the newest round.
    pub round: RoundToken,
    /// The timeline that the incarnation was begun on (R2).
    pub timeline: u32,
}

#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its position for the protocol.
    pub as_of: LogPosition,
    /// Whose log that is.
    pub provenance: Provenance,
    /// Of the row at `as_of`.
    pub token: LogToken,
    pub record: Record,
    pub place: ReadPlace,
}

/// What a publisher's connections reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attached {
    Primary,
    /// The one that was primary before: it answers reads and can't commit.
    Demoted,
    Nowhere,
}

/// The first keys are root keys.
pub const ROOT_KEYS: usize = 12;

pub const APIS: usize = 7;

pub const WORKSPACES: usize = 2;

/// The hash under which a key's text is cached.
pub fn hash(key: KeyNumber) -> KeyHash {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&(key.0 as u32).to_be_bytes());
    KeyHash(bytes)
}

pub fn key_of(hash: &KeyHash) -> KeyNumber {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&hash.0[..4]);
    KeyNumber(u32::from_be_bytes(bytes) as usize)
}

/// An agent process, as its probes identify it.
pub fn instance(node: NodeNumber, life: Life, bound: Duration) -> Instance {
    Instance {
        identity: Identity {
            region: Region::new(format!("region-{}", node.0 / 2)),
            agent: AgentName::new(format!("agent-{}", node.0)),
            instance: InstanceId(u64::from(life.0) + 1),
        },
        policy: PartitionPolicy::Deny,
        bound,
    }
}
