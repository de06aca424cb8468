//! What the stores read out of their rows alike, and write alike.

use std::collections::HashMap;
use std::time::Duration;

use evictd_core::history::{Begin, BeginCause, History, Incarnation, StoreId};
use evictd_core::ids::{AgentName, ApiId, Identity, InstanceId, KeyHash, KeyId, Region, WorkspaceId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::limits::ID_BYTES_MAX;
use evictd_core::position::LogPosition;
use evictd_core::record::RecordState;
use evictd_core::roster::{Instance, PartitionPolicy, RosterEntry};
use evictd_core::time::StoreTime;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::audit::AuditTarget;
use crate::change::{Actor, DeleteMode, Edit, Reroll};
use crate::error::StoreError;
use crate::history::VoucherKey;
use crate::operator::Operator;

/// Above so many waiting key rows, an API gets one row for all of them: a bulk deletion by direct SQL must
/// not hold up every agent's proof.
pub(crate) const MERGE_ABOVE: i64 = 1_000;

/// For LIMIT, where "as many as there are" is as good as any number that doesn't fit.
pub(crate) fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

/// A span of time in the unit of the store's clock; as good as for ever if it doesn't fit.
pub(crate) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

/// A place in the log, out of two columns.
pub(crate) fn log_position(epoch: i64, position: i64) -> Result<LogPosition, StoreError> {
    u32::try_from(epoch)
        .ok()
        .zip(u64::try_from(position).ok())
        .and_then(|(epoch, position)| LogPosition::new(epoch, position))
        .ok_or_else(|| StoreError::Corrupt { what: "log position", value: format!("{epoch}.{position}") })
}

/// The columns of a row of the history.
pub(crate) struct BeginColumns<'a> {
    pub(crate) incarnation: i64,
    pub(crate) after: (i64, i64),
    pub(crate) at: (i64, i64),
    pub(crate) cause: &'a str,
    pub(crate) time: i64,
    pub(crate) evidence: Option<&'a str>,
}

impl BeginColumns<'_> {
    pub(crate) fn read(&self) -> Result<Begin, StoreError> {
        let Self { incarnation, after, at, cause, time, evidence } = *self;
        Ok(Begin {
            incarnation: Incarnation(incarnation.cast_unsigned()),
            after: log_position(after.0, after.1)?,
            at: log_position(at.0, at.1)?,
            cause: BeginCause::from_label(cause).ok_or_else(|| StoreError::Corrupt {
                what: "cause in its history",
                value: cause.to_owned(),
            })?,
            time: StoreTime(time),
            evidence: evidence.map(Box::from),
        })
    }
}

/// The history of the store, out of its rows.
pub(crate) fn history(store: Option<i64>, begins: Vec<Begin>) -> Result<History, StoreError> {
    store
        .and_then(|store| History::new(StoreId(store.cast_unsigned()), begins))
        .ok_or_else(|| StoreError::Corrupt { what: "history", value: "no row".to_owned() })
}

/// The key of the store's vouchers, out of its row.
pub(crate) fn voucher_key(key: Option<&[u8]>) -> Result<VoucherKey, StoreError> {
    key.and_then(|key| key.try_into().ok())
        .map(VoucherKey)
        .ok_or_else(|| StoreError::Corrupt { what: "voucher key", value: "absent or too short".to_owned() })
}

/// Why a row was written. It decides nothing, so that one that nobody knows stops nothing.
pub(crate) fn cause(label: Option<&str>) -> Cause {
    label.and_then(Cause::from_label).unwrap_or(Cause::Changed)
}

/// The columns of a log row that say what it makes forgotten; `None` for what can't be read.
#[derive(Clone, Copy)]
pub(crate) struct ScopeColumns<'a> {
    pub(crate) scope: Option<&'a str>,
    pub(crate) key_hash: Option<&'a [u8]>,
    pub(crate) key_id: Option<&'a str>,
    pub(crate) api_id: Option<&'a str>,
    pub(crate) workspace_id: Option<&'a str>,
}

impl ScopeColumns<'_> {
    /// What the row makes forgotten. A row that doesn't say it precisely (a blanked hash, an id that wouldn't
    /// fit on the wire) is widened, never dropped: one bad row must neither be lost nor stop the log.
    pub(crate) fn read(&self) -> Scope {
        let fits = |id: &&str| (1..=ID_BYTES_MAX).contains(&id.len());
        let hash = self.key_hash.and_then(|hash| <[u8; 32]>::try_from(hash).ok()).map(KeyHash);
        let api_id = self.api_id.filter(fits);
        match (self.scope, hash, api_id, self.workspace_id.filter(fits)) {
            (Some("key"), Some(hash), ..) => Scope::Key {
                hash,
                key_id: self.key_id.filter(fits).map(KeyId::new),
                api_id: api_id.map(ApiId::new),
            },
            (Some("key" | "api"), _, Some(api_id), _) => Scope::Api(ApiId::new(api_id)),
            (Some("key" | "api" | "workspace"), _, _, Some(workspace_id)) => {
                Scope::Workspace(WorkspaceId::new(workspace_id))
            }
            _ => Scope::All,
        }
    }
}

/// A record's state on the store's clock, out of four columns: whether it, or what it belongs to, is deleted or gone;
/// whether its workspace and it itself are enabled; whether its end was marked as come. What weighs most comes
/// first.
pub(crate) fn record_state(
    flag: impl Fn(&'static str) -> sqlx::Result<bool>,
    [deleted, workspace_enabled, enabled, expired]: [&'static str; 4],
    expires_at: Option<StoreTime>,
    now: StoreTime,
) -> sqlx::Result<RecordState> {
    Ok(if flag(deleted)? {
        RecordState::Deleted
    } else if !flag(workspace_enabled)? {
        RecordState::WorkspaceDisabled
    } else if !flag(enabled)? {
        RecordState::Disabled
    } else if flag(expired)? || expires_at.is_some_and(|end| end <= now) {
        RecordState::Expired
    } else {
        RecordState::Active
    })
}

/// The permissions of the key or root key `id`.
pub(crate) fn permissions<T: for<'a> Deserialize<'a>>(id: &str, list: &str) -> Result<Vec<T>, StoreError> {
    serde_json::from_str(list)
        .map_err(|_| StoreError::Corrupt { what: "permission list of a key", value: id.to_owned() })
}

/// The columns of a roster row.
pub(crate) struct RosterColumns<'a> {
    pub(crate) region: &'a str,
    pub(crate) agent: &'a str,
    pub(crate) instance: &'a str,
    pub(crate) policy: &'a str,
    pub(crate) bound_ms: i64,
    pub(crate) last_seen: i64,
    pub(crate) departed: bool,
}

impl RosterColumns<'_> {
    /// The instance. A row that makes no sense is an error and not left out: receipts must not do without
    /// anybody who may hold a lease (G4).
    pub(crate) fn read(&self) -> Result<RosterEntry, StoreError> {
        let Self { region, agent, instance, policy, bound_ms, last_seen, departed } = *self;
        let corrupt = || StoreError::Corrupt { what: "instance in its roster", value: instance.to_owned() };
        let policies = [PartitionPolicy::Deny, PartitionPolicy::ServeStale];
        Ok(RosterEntry {
            instance: Instance {
                identity: Identity {
                    region: Region::new(region),
                    agent: AgentName::new(agent),
                    instance: InstanceId(u64::from_str_radix(instance, 16).map_err(|_| corrupt())?),
                },
                policy: policies.into_iter().find(|p| p.label() == policy).ok_or_else(corrupt)?,
                bound: Duration::from_millis(u64::try_from(bound_ms).map_err(|_| corrupt())?),
            },
            last_seen: StoreTime(last_seen),
            departed,
        })
    }
}

/// Whether a property is to be set, and to what.
pub(crate) fn edit<T>(edit: &Edit<T>) -> (bool, Option<&T>) {
    match edit {
        Edit::Keep => (false, None),
        Edit::Clear => (true, None),
        Edit::Set(value) => (true, Some(value)),
    }
}

/// Who makes a change, as an audit record tells it.
#[derive(Clone, Copy)]
pub(crate) struct Author<'a> {
    /// `None`: it is about the whole store.
    pub(crate) workspace: Option<&'a WorkspaceId>,
    pub(crate) actor_type: &'static str,
    pub(crate) actor_id: &'a str,
    pub(crate) request_id: &'a str,
    pub(crate) remote_ip: Option<&'a str>,
    pub(crate) user_agent: Option<&'a str>,
}

impl<'a> Author<'a> {
    /// A root key, through the control API.
    pub(crate) fn root_key(actor: &'a Actor) -> Self {
        Self {
            workspace: Some(&actor.workspace_id),
            actor_type: "rootkey",
            actor_id: actor.root_key_id.as_str(),
            request_id: &actor.request_id,
            remote_ip: actor.remote_ip.as_deref(),
            user_agent: actor.user_agent.as_deref(),
        }
    }

    /// An operator, in a workspace that he has no key of.
    pub(crate) fn operator(operator: &'a Operator, workspace: Option<&'a WorkspaceId>) -> Self {
        Self {
            workspace,
            actor_type: "system",
            actor_id: &operator.name,
            request_id: &operator.request_id,
            remote_ip: None,
            user_agent: None,
        }
    }
}

/// What an audit record says of a change. Ids only, because the record outlives a permanent deletion, and a name
/// might say more than may remain.
pub(crate) struct AuditEntry {
    pub(crate) event: String,
    pub(crate) description: String,
    targets: Vec<AuditTarget>,
}

impl AuditEntry {
    fn new(event: impl Into<String>, description: String, targets: &[(&str, &str)]) -> Self {
        let target = |&(kind, id): &(&str, &str)| AuditTarget { kind: kind.to_owned(), id: id.to_owned() };
        Self { event: event.into(), description, targets: targets.iter().map(target).collect() }
    }

    pub(crate) fn root_key_created(id: &KeyId) -> Self {
        Self::new("root_key.create", format!("Created root key {id}"), &[("rootkey", id.as_str())])
    }

    pub(crate) fn root_key_revoked(id: &KeyId) -> Self {
        Self::new("root_key.delete", format!("Revoked root key {id}"), &[("rootkey", id.as_str())])
    }

    pub(crate) fn api_created(id: &ApiId) -> Self {
        Self::new("api.create", format!("Created API {id}"), &[("api", id.as_str())])
    }

    pub(crate) fn api_protected(id: &ApiId, protect: bool) -> Self {
        let did = if protect { "Protected API" } else { "Lifted the protection of API" };
        Self::new("api.update", format!("{did} {id}"), &[("api", id.as_str())])
    }

    pub(crate) fn api_deleted(id: &ApiId) -> Self {
        Self::new("api.delete", format!("Deleted API {id}"), &[("api", id.as_str())])
    }

    pub(crate) fn key_created(id: &KeyId, api: &ApiId) -> Self {
        let targets = [("key", id.as_str()), ("api", api.as_str())];
        Self::new("key.create", format!("Created key {id} in API {api}"), &targets)
    }

    pub(crate) fn key_updated(id: &KeyId, api: &ApiId) -> Self {
        let targets = [("key", id.as_str()), ("api", api.as_str())];
        Self::new("key.update", format!("Updated key {id}"), &targets)
    }

    pub(crate) fn key_rerolled(Reroll { key, new_id, .. }: &Reroll, api: &ApiId) -> Self {
        let targets = [("key", new_id.as_str()), ("key", key.as_str()), ("api", api.as_str())];
        Self::new("key.reroll", format!("Rerolled key {key} to {new_id}"), &targets)
    }

    pub(crate) fn key_deleted(id: &KeyId, mode: DeleteMode) -> Self {
        let did = match mode {
            DeleteMode::Soft => "Deleted",
            DeleteMode::Permanent => "Permanently deleted",
        };
        Self::new("key.delete", format!("{did} key {id}"), &[("key", id.as_str())])
    }

    pub(crate) fn epoch_begun(head: LogPosition) -> Self {
        let description = format!("Began epoch {} at position {}", head.epoch(), head.position());
        Self::new("store.new_epoch", description, &[])
    }

    /// The targets as they are stored.
    pub(crate) fn targets(&self) -> Value {
        self.targets
            .iter()
            .map(|AuditTarget { kind, id }| json!({ "type": kind, "id": id, "name": id }))
            .collect()
    }
}

/// A log row that no request wrote: direct SQL did, or an end came by itself. Its transaction left no audit record,
/// so that the one which numbers it does.
#[derive(Clone, Copy)]
pub(crate) struct UnrequestedRow<'a> {
    pub(crate) position: LogPosition,
    pub(crate) columns: ScopeColumns<'a>,
    pub(crate) cause: Cause,
    pub(crate) committed_at: StoreTime,
    /// Of how many keys' rows it took the place.
    pub(crate) merged: Option<i64>,
}

/// The audit records of such rows, in the order of the log. More than [`MERGE_ABOVE`] at once have one for all keys of an
/// API, or all root keys of a workspace, that suffered the same: a record each for a million of them would take
/// the transaction, on which all agents wait, longer than they may.
pub(crate) fn audit_records(mut rows: Vec<UnrequestedRow<'_>>) -> Vec<Value> {
    rows.sort_unstable_by_key(|row| row.position);
    if rows.len() as i64 <= MERGE_ABOVE {
        return rows.iter().map(UnrequestedRow::audit_record).collect();
    }
    let mut crowds: HashMap<_, UnrequestedRow<'_>> = HashMap::new();
    let mut records = Vec::new();
    for row in rows {
        let ScopeColumns { scope, api_id, workspace_id, .. } = row.columns;
        if scope == Some("key") || row.merged.is_some() {
            let crowd = crowds.entry((api_id, workspace_id, row.cause)).or_insert(UnrequestedRow {
                columns: ScopeColumns { key_id: None, ..row.columns },
                merged: Some(0),
                ..row
            });
            crowd.merged = crowd.merged.map(|keys| keys.saturating_add(row.merged.unwrap_or(1)));
            crowd.committed_at = crowd.committed_at.max(row.committed_at);
        } else {
            records.push(row);
        }
    }
    records.extend(crowds.into_values());
    records.sort_unstable_by_key(|row| row.position);
    records.iter().map(UnrequestedRow::audit_record).collect()
}

impl UnrequestedRow<'_> {
    /// Its audit record, by the names of the columns.
    fn audit_record(&self) -> Value {
        let entry = self.entry();
        let (actor_type, actor_id) = match self.cause {
            Cause::Expired => ("system", "expiry"),
            _ => ("database", "sql"),
        };
        json!({
            "time": self.committed_at.as_millis(),
            "workspace_id": self.columns.workspace_id,
            "event": entry.event,
            "description": entry.description,
            "actor_type": actor_type,
            "actor_id": actor_id,
            "targets": entry.targets(),
        })
    }

    fn entry(&self) -> AuditEntry {
        let ScopeColumns { scope, key_id, api_id, workspace_id, .. } = self.columns;
        let [key, api, workspace] = [key_id, api_id, workspace_id].map(|id| id.unwrap_or("unknown"));
        // A root key belongs to no API.
        let (kind, what, targets) = match (scope, self.merged) {
            (_, Some(keys)) if api_id.is_some() => {
                ("key", format!("{keys} keys of API {api}"), vec![("api", api_id)])
            }
            (_, Some(keys)) => {
                let what = format!("{keys} root keys of workspace {workspace}");
                ("root_key", what, vec![("workspace", workspace_id)])
            }
            (Some("key"), _) if api_id.is_none() => {
                ("root_key", format!("root key {key}"), vec![("rootkey", key_id)])
            }
            (Some("key"), _) => ("key", format!("key {key}"), vec![("key", key_id), ("api", api_id)]),
            (Some("api"), _) => ("api", format!("API {api}"), vec![("api", api_id)]),
            (Some("workspace"), _) => {
                ("workspace", format!("workspace {workspace}"), vec![("workspace", workspace_id)])
            }
            _ => ("store", "all records of a table".to_owned(), Vec::new()),
        };
        let (verb, did) = match self.cause {
            Cause::Created => ("create", "Created"),
            Cause::Changed => ("update", "Updated"),
            Cause::Deleted => ("delete", "Deleted"),
            Cause::Erased => ("delete", "Permanently deleted"),
            Cause::Restored => ("restore", "Restored"),
            Cause::Expired => ("expire", "Expired"),
        };
        let known: Vec<_> = targets.into_iter().filter_map(|(kind, id)| Some((kind, id?))).collect();
        AuditEntry::new(format!("{kind}.{verb}"), format!("{did} {what}"), &known)
    }
}

/// Reads targets back.
pub(crate) fn parse_audit_targets(event_id: &str, targets: &str) -> Result<Vec<AuditTarget>, StoreError> {
    #[derive(Deserialize)]
    struct Target {
        r#type: String,
        id: String,
    }
    let targets: Vec<Target> = serde_json::from_str(targets).map_err(|_| StoreError::Corrupt {
        what: "target list of an audit record",
        value: event_id.to_owned(),
    })?;
    Ok(targets.into_iter().map(|Target { r#type, id }| AuditTarget { kind: r#type, id }).collect())
}
