//! Reading rows of the log, of its head and of its history, and what each store makes of them alike.

use evictd_core::history::{
    Begin, BeginCause, History, Incarnation, LogToken, Provenance, RoundToken, StoreId,
};
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::limits::ID_BYTES_MAX;
use evictd_core::log;
use evictd_core::position::LogPosition;

use crate::error::StoreError;
use crate::log::{Head, Numbered, NumberedRequest, Replay};
use crate::rows::Columns;

/// Above this many waiting key rows, an API gets one row for all of them: numbering a bulk deletion by direct SQL
/// must not delay the proofs of agents.
pub(crate) const MERGE_ABOVE: i64 = 1_000;

/// The table `log_head` has no row.
pub(crate) fn no_head() -> StoreError {
    StoreError::Corrupt { what: "log_head", value: "no row".to_owned() }
}

/// Reads the columns `epoch`, `head`, `incarnation`, `token` and `round`.
pub(crate) fn head(row: Option<&impl Columns>) -> Result<Head, StoreError> {
    let row = row.ok_or_else(no_head)?;
    Ok(Head {
        at: row.position("epoch", "head")?,
        incarnation: Incarnation(row.bits("incarnation")?),
        token: LogToken(row.bits("token")?),
        round: RoundToken(row.bits("round")?),
    })
}

/// Reads the columns `store_id` and `incarnation`.
pub(crate) fn provenance(row: &impl Columns) -> Result<Provenance, StoreError> {
    Ok(Provenance {
        store: StoreId(row.bits("store_id")?),
        incarnation: Incarnation(row.bits("incarnation")?),
    })
}

/// Reads all rows of the history, each with the column `store_id`.
pub(crate) fn history(rows: &[impl Columns]) -> Result<History, StoreError> {
    let corrupt = || StoreError::Corrupt { what: "history", value: "no row".to_owned() };
    let store = StoreId(rows.first().ok_or_else(corrupt)?.bits("store_id")?);
    let begins = rows.iter().map(begin).collect::<Result<_, _>>()?;
    History::new(store, begins).ok_or_else(corrupt)
}

fn begin(row: &impl Columns) -> Result<Begin, StoreError> {
    let cause = row.text("cause")?;
    Ok(Begin {
        incarnation: Incarnation(row.bits("incarnation")?),
        after: row.position("after_epoch", "after_position")?,
        at: row.position("epoch", "position")?,
        cause: BeginCause::from_label(cause)
            .ok_or_else(|| StoreError::Corrupt { what: "cause in its history", value: cause.to_owned() })?,
        time: row.time("time")?,
        evidence: row.optional_text("evidence")?.map(Box::from),
    })
}

/// The columns of a log row that name its scope; `None` where one can't be read. Direct SQL on SQLite can store
/// text that isn't UTF-8.
#[derive(Clone, Copy)]
pub(crate) struct ScopeColumns<'a> {
    pub(crate) scope: Option<&'a str>,
    pub(crate) key_hash: Option<&'a [u8]>,
    pub(crate) key_id: Option<&'a str>,
    pub(crate) api_id: Option<&'a str>,
    pub(crate) workspace_id: Option<&'a str>,
}

impl<'a> ScopeColumns<'a> {
    pub(crate) fn read(row: &'a impl Columns) -> Self {
        let text = |name| row.optional_text(name).ok().flatten();
        Self {
            scope: text("scope"),
            key_hash: row.optional_bytes("key_hash").ok().flatten(),
            key_id: text("key_id"),
            api_id: text("api_id"),
            workspace_id: text("workspace_id"),
        }
    }

    /// What agents evict because of the row. A row that isn't precise (a blanked hash, an id too long for the wire)
    /// gets a wider scope. It is never dropped: one bad row must neither be lost nor stop the log.
    pub(crate) fn scope(&self) -> Scope {
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

/// Why a row was written. It decides nothing, so an unknown label stops nothing.
pub(crate) fn cause(row: &impl Columns) -> Cause {
    row.optional_text("cause").ok().flatten().and_then(Cause::from_label).unwrap_or(Cause::Changed)
}

/// The position of a row; `None` if it waits for one.
pub(crate) fn position(row: &impl Columns) -> Result<Option<LogPosition>, StoreError> {
    match row.optional_integer("position")? {
        None => Ok(None),
        Some(_) => row.position("epoch", "position").map(Some),
    }
}

fn invalidation(row: &impl Columns, position: LogPosition) -> Result<Invalidation, StoreError> {
    Ok(Invalidation {
        position,
        scope: ScopeColumns::read(row).scope(),
        cause: cause(row),
        committed_at: row.time("committed_at")?,
    })
}

/// Which request wrote the row at `position`; `None` if none did.
pub(crate) fn request(
    row: &impl Columns,
    position: LogPosition,
) -> Result<Option<NumberedRequest>, StoreError> {
    let text = |name| row.optional_text(name).ok().flatten();
    let (Some(request_id), Some(workspace_id)) = (text("request_id"), text("workspace_id")) else {
        return Ok(None);
    };
    Ok(Some(NumberedRequest {
        request_id: request_id.to_owned(),
        workspace_id: WorkspaceId::new(workspace_id),
        position,
        cause: cause(row),
        committed_at: row.time("committed_at")?,
    }))
}

/// The result of numbering `rows`.
pub(crate) fn numbered<R: Columns>(head: Head, rows: &[(LogPosition, &R)]) -> Result<Numbered, StoreError> {
    let requests = rows.iter().filter_map(|(at, row)| request(*row, *at).transpose());
    Ok(Numbered {
        head,
        rows: rows.iter().map(|(at, row)| invalidation(*row, *at)).collect::<Result<_, _>>()?,
        requests: requests.collect::<Result<_, _>>()?,
    })
}

/// The answer to a replay from `first` on. Each of `found` has the columns of the head; without a log row, there is
/// one with these alone.
pub(crate) fn replay(found: &[impl Columns], first: LogPosition) -> Result<Replay, StoreError> {
    let head = head(found.first())?;
    let places = found.iter().map_while(|row| position(row).transpose());
    let places = places.collect::<Result<Vec<_>, _>>()?;
    let covered = log::covered(head.at, first, places.iter().copied());
    let Some(last) = found[..covered].last() else { return Ok(Replay::Refused { head }) };
    let rows = places[..covered].iter().zip(found).map(|(at, row)| invalidation(row, *at));
    Ok(Replay::Rows { rows: rows.collect::<Result<_, _>>()?, token: LogToken(last.bits("row_token")?) })
}
