//! The audit records that both stores write.

use std::collections::HashMap;

use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
use evictd_core::invalidation::Cause;
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;
use serde_json::{Value, json};

use crate::audit::AuditTarget;
use crate::change::{Actor, DeleteMode, Reroll};
use crate::error::StoreError;
use crate::log_rows::{MERGE_ABOVE, ScopeColumns, cause};
use crate::operator::Operator;
use crate::rows::Columns;

/// The author of a change, as audit records have it.
#[derive(Clone, Copy)]
pub(crate) struct Author<'a> {
    /// `None` if the change concerns the whole store.
    pub(crate) workspace: Option<&'a WorkspaceId>,
    pub(crate) actor_type: &'static str,
    pub(crate) actor_id: &'a str,
    pub(crate) request_id: &'a str,
    pub(crate) remote_ip: Option<&'a str>,
    pub(crate) peer_ip: Option<&'a str>,
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
            peer_ip: actor.peer_ip.as_deref(),
            user_agent: actor.user_agent.as_deref(),
        }
    }

    /// The publisher, in a transaction that it rolls back.
    pub(crate) fn trial() -> Self {
        Self {
            workspace: None,
            actor_type: "system",
            actor_id: "trial",
            request_id: TRIAL,
            remote_ip: None,
            peer_ip: None,
            user_agent: None,
        }
    }

    /// An operator with the command line.
    pub(crate) fn operator(operator: &'a Operator, workspace: Option<&'a WorkspaceId>) -> Self {
        Self {
            workspace,
            actor_type: "system",
            actor_id: &operator.name,
            request_id: &operator.request_id,
            remote_ip: None,
            peer_ip: None,
            user_agent: None,
        }
    }
}

/// The id of a key, and of a request, that exist only in a transaction that is rolled back.
pub(crate) const TRIAL: &str = "trial";

/// What an audit record says about a change. It has ids only, because it outlives a permanent deletion.
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

/// A log row that no request wrote: direct SQL or an expiry did. Its transaction wrote no audit record; the transaction
/// that numbers it does.
#[derive(Clone, Copy)]
struct UnrequestedRow<'a> {
    position: LogPosition,
    columns: ScopeColumns<'a>,
    cause: Cause,
    committed_at: StoreTime,
    /// How many keys' rows were merged into it.
    merged: Option<i64>,
}

/// The audit records of such rows, in the order of the log. More than [`MERGE_ABOVE`] rows get one record for all keys of
/// an API, or all root keys of a workspace, with the same cause. All agents wait for this transaction, and a record each
/// for a million keys would take too long.
pub(crate) fn audit_records(numbered: &[(LogPosition, &impl Columns)]) -> Result<Vec<Value>, StoreError> {
    let rows = numbered.iter().filter_map(|(at, row)| UnrequestedRow::read(*row, *at).transpose());
    let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
    rows.sort_unstable_by_key(|row| row.position);
    if rows.len() as i64 <= MERGE_ABOVE {
        return Ok(rows.iter().map(UnrequestedRow::audit_record).collect());
    }
    let mut groups: HashMap<_, UnrequestedRow<'_>> = HashMap::new();
    let mut records = Vec::new();
    for row in rows {
        let ScopeColumns { scope, api_id, workspace_id, .. } = row.columns;
        if scope == Some("key") || row.merged.is_some() {
            let group = groups.entry((api_id, workspace_id, row.cause)).or_insert(UnrequestedRow {
                columns: ScopeColumns { key_id: None, ..row.columns },
                merged: Some(0),
                ..row
            });
            group.merged = group.merged.map(|keys| keys.saturating_add(row.merged.unwrap_or(1)));
            group.committed_at = group.committed_at.max(row.committed_at);
        } else {
            records.push(row);
        }
    }
    records.extend(groups.into_values());
    records.sort_unstable_by_key(|row| row.position);
    Ok(records.iter().map(UnrequestedRow::audit_record).collect())
}

impl<'a> UnrequestedRow<'a> {
    /// Reads the row at `position`; `None` if a request wrote it.
    fn read(row: &'a impl Columns, position: LogPosition) -> Result<Option<Self>, StoreError> {
        if row.optional_text("request_id").ok().flatten().is_some() {
            return Ok(None);
        }
        Ok(Some(Self {
            position,
            columns: ScopeColumns::read(row),
            cause: cause(row),
            committed_at: row.time("committed_at")?,
            merged: row.optional_integer("merged")?,
        }))
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_targets_name_nothing_but_ids() {
        let entry = AuditEntry::key_deleted(&KeyId::new("key_2"), DeleteMode::Permanent);
        assert_eq!(entry.targets(), json!([{ "type": "key", "id": "key_2", "name": "key_2" }]));
    }
}
