//! The embedded store, on SQLite.
//!
//! One connection writes: every change is a `BEGIN IMMEDIATE` transaction on it, so that "the rows of
//! this transaction" and "the order of commits" are exact. Read-only connections answer everything else from
//! WAL snapshots and never wait for the writer.
//!
//! The schema and its triggers are in `migrations/sqlite`. In reading order:
//!
//! * `connections`: which there are, and who may hold up whom (R10).
//! * `exclusive`: one publisher per file.
//! * `place`: notices that the file is no longer where it was opened.
//! * `write`: a write transaction, and a COMMIT that a dropped caller can't cancel (R4).
//! * `log`: numbering, rounds, replays, incarnations (R1, R2, R5, R7, R15).
//! * `schema`: whether triggers are in place, and whether they always were (R3).
//! * `roster`: who may hold a lease (R11).
//! * `receipts`: what became of a request, and which requests are open (R12).
//! * `records`: what is read of keys, root keys and APIs (R6).
//! * `changes`: what the control API and operators change, with their audit records.
//! * `audit`: these, and deleting what is old enough to go.
//! * `checkpoint`: empties the write-ahead log after that.

mod audit;
mod changes;
mod checkpoint;
mod connections;
mod exclusive;
mod log;
mod place;
mod receipts;
mod records;
mod roster;
mod schema;
mod write;

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use evictd_core::history::{BeginCause, History, LogToken, RoundToken};
use evictd_core::ids::{ApiId, Identity, KeyHash, KeyId, WorkspaceId};
use evictd_core::position::LogPosition;
use evictd_core::record::{Lookup, RootKeyRecord};
use evictd_core::time::StoreTime;
use sqlx::Connection;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnection, SqlitePool};

use self::connections::Connections;
use self::exclusive::Exclusive;
use self::place::Place;
use self::schema::{Look, Triggers};
use self::write::{Write, failed};
use crate::audit::{AuditQuery, AuditRecord, Purge, Purged};
use crate::change::{
    Actor, Api, Authorize, ChangeError, DeleteMode, KeyDetails, KeyPage, KeyUpdate, ListKeys, NewApi, NewKey,
    NewRootKey, Operator, Reroll, RootKeyInfo,
};
use crate::history::VoucherKey;
use crate::log::{Backlog, Head, Numbered, NumberedRequest, Reading, Replay, Round, RoundRequest};
use crate::receipt::{FinalReceipt, Recorded};
use crate::roster::Roster;
use crate::rows::{AuditEntry, Author, sql_limit};
use crate::{HomeStore, StoreError};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// The home store in one SQLite file. Safe to share; other processes may use the file at the same time.
#[derive(Debug)]
pub struct SqliteStore {
    connections: Connections,
    /// The triggers as the migrations create them, by name.
    triggers: Triggers,
    exclusive: Option<Exclusive>,
    /// Whether the write-ahead log may hold traces of what was erased and purged.
    has_traces: AtomicBool,
}

impl SqliteStore {
    /// The version of the schema of the store at `path`, if there is a store. Makes none, and changes none.
    pub async fn schema_version(path: &Path) -> Result<Option<i64>, StoreError> {
        let refused = refused(path);
        let file = std::path::absolute(path).map_err(|source| refused(source.into()))?;
        if !file.try_exists().map_err(|source| refused(source.into()))? {
            return Ok(None);
        }
        connections::schema_version(&file).await.map_err(refused)
    }

    /// Opens the store at `path` for a tool, whoever else uses it: for all that doesn't number the log.
    ///
    /// Creates the file (readable by its owner only) where there is none, and brings its schema up to date.
    /// The directory must exist and be writable: SQLite keeps its log beside the file.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let file = existing(path)?;
        Self::connect(path, &file, None).await
    }

    /// As [`SqliteStore::open`], for a publisher: begins an incarnation. [`StoreError::InUse`] while another one has it
    /// open, until [`SqliteStore::close`] or the end of that process.
    pub async fn open_exclusively(path: &Path) -> Result<Self, StoreError> {
        let file = existing(path)?;
        let exclusive = Exclusive::take(&file).map_err(|source| refused(path)(source.into()))?;
        let exclusive = exclusive.ok_or_else(|| StoreError::InUse { path: path.to_owned() })?;
        let store = Self::connect(path, &file, Some(exclusive)).await?;
        store.begin_incarnation().await?;
        Ok(store)
    }

    async fn connect(path: &Path, file: &Path, exclusive: Option<Exclusive>) -> Result<Self, StoreError> {
        let mut connections = Connections::open(file).await.map_err(refused(path))?;
        migrate(&connections.writer.pool, path).await?;
        let place = Place::of(file).map_err(|source| refused(path)(source.into()))?;
        connections.writer.place = Some(Arc::new(place));
        let triggers = intended_triggers().await?;
        // Whoever had it open before may have left some.
        let has_traces = AtomicBool::new(true);
        Ok(Self { connections, triggers, exclusive, has_traces })
    }
}

/// The store couldn't be opened.
fn refused(path: &Path) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Open { place: path.display().to_string(), advice: advice(&source), source }
}

/// The file at `path`, created where there is none. Made absolute, because SQLite takes ":memory:" and
/// "file:..." for something else than names.
fn existing(path: &Path) -> Result<PathBuf, StoreError> {
    let create = || {
        let file = std::path::absolute(path)?;
        create_private(&file)?;
        Ok(file)
    };
    create().map_err(|source: std::io::Error| refused(path)(source.into()))
}

/// Creates the file with its final permissions, before SQLite could create it with the process's own.
fn create_private(file: &Path) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(file) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// What to do about a store that can't be opened.
fn advice(error: &sqlx::Error) -> &'static str {
    const NO_DIRECTORY: &str = "its directory doesn't exist; create it or configure another path";
    const NOT_WRITABLE: &str = "the file and its directory must be writable by the user that runs evictd";
    match error {
        sqlx::Error::Io(error) => match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => NO_DIRECTORY,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => NOT_WRITABLE,
            _ => "see the cause, or configure another path",
        },
        _ => match write::result_code(error) {
            Some(write::READONLY | write::CANTOPEN | write::PERM) => NOT_WRITABLE,
            Some(write::NOTADB) => {
                "the file isn't an SQLite database; configure another path, or move it away"
            }
            Some(write::CORRUPT) => "the file is damaged; restore it from a backup",
            Some(write::BUSY) => "another process keeps it locked; stop that process",
            _ => "see the cause",
        },
    }
}

/// Brings the schema up to date, in one transaction: of two processes that open a new file or an older one, one
/// does it and the other finds it done.
async fn migrate(writer: &SqlitePool, path: &Path) -> Result<(), StoreError> {
    let mut whole = writer.begin_with("BEGIN IMMEDIATE").await.map_err(refused(path))?;
    let was_known = schema::is_known(&mut whole).await.map_err(refused(path))?;
    MIGRATIONS.run(&mut *whole).await.map_err(StoreError::Migrate)?;
    if was_known {
        schema::note(&mut whole).await.map_err(refused(path))?;
    }
    whole.commit().await.map_err(refused(path))
}

/// What the triggers should look like: what the migrations make in an empty database.
async fn intended_triggers() -> Result<Triggers, StoreError> {
    let mut scratch =
        SqliteConnection::connect("sqlite::memory:").await.map_err(failed("read its triggers"))?;
    MIGRATIONS.run(&mut scratch).await.map_err(StoreError::Migrate)?;
    let triggers = schema::intended(&mut scratch).await?;
    scratch.close().await.map_err(failed("read its triggers"))?;
    Ok(triggers)
}

/// The store's clock: this host's. SQLite has no other.
fn now() -> StoreTime {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    StoreTime::default().after(since_1970)
}

/// The same, and when that was.
fn read_clock() -> Reading {
    let (asked, store_time, read_by) = (Instant::now(), now(), Instant::now());
    Reading { store_time, read_by, within: read_by.duration_since(asked) }
}

#[async_trait]
impl HomeStore for SqliteStore {
    fn is_exclusive(&self) -> bool {
        self.exclusive.is_some()
    }

    async fn close(&self) {
        self.connections.close().await;
        if let Some(exclusive) = &self.exclusive {
            exclusive.release();
        }
    }

    async fn number(&self, limit: usize) -> Result<Numbered, StoreError> {
        if let Some(head) = log::head_if_idle(&self.connections.log).await? {
            return Ok(Numbered { head, rows: Vec::new(), requests: Vec::new() });
        }
        let mut write = Write::begin(&self.connections.writer, "number its log").await?;
        let numbered = log::number(&mut write, sql_limit(limit)).await?;
        write.commit().await?;
        Ok(numbered)
    }

    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError> {
        // An epoch that begins by itself would begin above it; here none does.
        let RoundRequest { instances, touched, seen_epoch: _ } = request;
        let mut write = Write::begin(&self.connections.writer, "commit a probe round").await?;
        let clock = read_clock();
        roster::update(&mut write, instances, touched, clock.store_time).await?;
        log::draw_round_token(&mut write).await?;
        let Look { changed, fault: schema_fault } = schema::compare(&mut write, &self.triggers).await?;
        let began = changed.then_some(BeginCause::SchemaChanged);
        if let Some(cause) = began {
            log::begin(&mut write, cause, Some("tables or triggers were altered")).await?;
        }
        let numbered = log::number(&mut write, i64::MAX).await?;
        write.commit().await?;
        Ok(Round { numbered, clock, began, schema_fault })
    }

    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError> {
        let mut write = Write::begin(&self.connections.writer, "begin a new epoch").await?;
        let head = log::begin(&mut write, BeginCause::Declared, Some(&operator.name)).await?;
        let by = Author::operator(operator, None);
        audit::record(&mut write, by, &AuditEntry::epoch_begun(head.at)).await?;
        write.commit().await?;
        tracing::warn!(head = %head.at, "a new epoch begins because an operator said so; agents flush once");
        Ok(head)
    }

    async fn begin_incarnation(&self) -> Result<Head, StoreError> {
        let mut write = Write::begin(&self.connections.writer, "begin an incarnation").await?;
        let head = log::begin(&mut write, BeginCause::Opened, None).await?;
        write.commit().await?;
        Ok(head)
    }

    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = Write::begin(&self.connections.writer, "note a lost epoch").await?;
        log::note_lost_epoch(&mut write, epoch).await?;
        write.commit().await
    }

    async fn roster(&self, since: u64) -> Result<Roster, StoreError> {
        roster::changed(&self.connections.log, since).await
    }

    async fn trust_roster(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = Write::begin(&self.connections.writer, "trust its roster").await?;
        roster::trust(&mut write, epoch).await?;
        write.commit().await
    }

    async fn part_with_instances(&self, departed: &[Identity]) -> Result<(), StoreError> {
        if departed.is_empty() {
            return Ok(());
        }
        let mut write = Write::begin(&self.connections.writer, "part with instances").await?;
        roster::part(&mut write, departed).await?;
        write.commit().await
    }

    async fn forget_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let mut write = Write::begin(&self.connections.writer, "forget instances").await?;
        roster::forget(&mut write, gone).await?;
        write.commit().await
    }

    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError> {
        log::replay(&self.connections.replays, epoch, from, to, sql_limit(limit)).await
    }

    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        records::lookup(&self.connections.lookups, hash).await
    }

    async fn head(&self) -> Result<Head, StoreError> {
        log::head(&self.connections.log).await
    }

    async fn history(&self) -> Result<History, StoreError> {
        log::history(&self.connections.log).await
    }

    async fn voucher_key(&self) -> Result<VoucherKey, StoreError> {
        log::voucher_key(&self.connections.log).await
    }

    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
        log::row_token(&self.connections.log, at).await
    }

    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError> {
        log::has_round_token(&self.connections.log, token).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        log::backlog(&self.connections.log).await
    }

    async fn expire(&self, limit: usize) -> Result<u64, StoreError> {
        let now = now();
        if !records::any_to_expire(&self.connections.log, now).await? {
            return Ok(0);
        }
        let (mut write, _turn) = self.connections.change("expire keys").await?;
        let expired = changes::expire(&mut write, now, sql_limit(limit)).await?;
        write.commit_change(None).await?;
        Ok(expired)
    }

    fn writable(&self) -> Result<(), StoreError> {
        self.connections.writer.check()
    }

    async fn version(&self) -> Result<i64, StoreError> {
        sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&self.connections.watcher)
            .await
            .map_err(failed("tell whether it changed"))
    }

    async fn told_of_a_change(&self) {
        std::future::pending::<()>().await;
    }

    async fn check_triggers(&self) -> Result<(), StoreError> {
        let mut reader = self.connections.log.acquire().await.map_err(failed("read its triggers"))?;
        schema::check(&mut reader, &self.triggers).await
    }

    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError> {
        records::root_key(&self.connections.records, hash).await
    }

    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError> {
        let (mut write, _turn) = self.connections.change("store a root key").await?;
        changes::create_root_key(&mut write, operator, &root_key).await?;
        write.commit_change(Some(&operator.request_id)).await
    }

    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError> {
        let (mut write, _turn) = self.connections.change("revoke a root key").await?;
        let revoked = changes::revoke_root_key(&mut write, operator, id).await?;
        write.commit_change(Some(&operator.request_id)).await?;
        Ok(revoked)
    }

    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError> {
        let (mut write, _turn) = self.connections.change("protect an API").await?;
        let found = changes::protect_api(&mut write, operator, api, protect).await?;
        write.commit_change(Some(&operator.request_id)).await?;
        Ok(found)
    }

    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
        audit::audit(&self.connections.records, query).await
    }

    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError> {
        let (mut write, turn) = self.connections.change("purge old rows").await?;
        let purged = audit::purge(&mut write, purge, now()).await?;
        write.commit().await?;
        drop(turn);
        if purged.log > 0 {
            self.has_traces.store(true, Ordering::Relaxed);
        }
        let is_last = purged.log < purge.limit as u64;
        if is_last && self.has_traces.load(Ordering::Relaxed) {
            // The rows are gone either way; what is left of them is tried again at the next sweep.
            match checkpoint::empty_log(&self.connections.checkpoints).await {
                Ok(emptied) => self.has_traces.store(!emptied, Ordering::Relaxed),
                Err(error) => tracing::warn!(%error, "the write-ahead log wasn't emptied"),
            }
        }
        Ok(purged)
    }

    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError> {
        if receipts.is_empty() {
            return Ok(HashSet::new());
        }
        let mut write = Write::begin(&self.connections.writer, "record receipts").await?;
        let had_one = receipts::record(&mut write, receipts).await?;
        write.commit().await?;
        Ok(had_one)
    }

    async fn receipt(
        &self,
        workspace: &WorkspaceId,
        request_id: &str,
    ) -> Result<Option<Recorded>, StoreError> {
        receipts::receipt(&self.connections.records, workspace, request_id).await
    }

    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError> {
        receipts::open_requests(&self.connections.log, after, sql_limit(limit)).await
    }

    async fn has_root_keys(&self) -> Result<bool, StoreError> {
        records::has_root_keys(&self.connections.records).await
    }

    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError> {
        records::root_keys(&self.connections.records).await
    }

    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError> {
        let (mut write, _turn) = self.connections.change("create an API").await?;
        changes::create_api(&mut write, actor, &api).await?;
        write.commit_change(Some(&actor.request_id)).await
    }

    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
        records::api(&self.connections.records, workspace, api).await
    }

    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("create a key").await?;
        changes::create_key(&mut write, actor, &key).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError> {
        records::key(&self.connections.records, workspace, key).await
    }

    async fn list_keys(
        &self,
        workspace: &WorkspaceId,
        list: ListKeys,
    ) -> Result<Option<KeyPage>, StoreError> {
        records::list_keys(&self.connections.records, workspace, &list).await
    }

    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("update a key").await?;
        changes::update_key(&mut write, actor, key, &update, authorize).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("reroll a key").await?;
        changes::reroll_key(&mut write, actor, &reroll, authorize).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("delete a key").await?;
        changes::delete_key(&mut write, actor, key, mode, authorize).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("delete an API").await?;
        changes::delete_api(&mut write, actor, api).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::pin::{Pin, pin};
    use std::sync::Arc;
    use std::task::Poll;

    use super::*;

    /// Takes all connections of a pool, as if each were busy.
    async fn occupy(pool: &SqlitePool) -> Vec<sqlx::pool::PoolConnection<sqlx::Sqlite>> {
        let mut taken = Vec::new();
        for _ in 0..pool.options().get_max_connections() {
            taken.push(pool.acquire().await.unwrap());
        }
        taken
    }

    /// Goes as far as it can without anybody else doing something.
    async fn waits(future: &mut (impl Future + Unpin)) -> bool {
        poll_fn(|context| Poll::Ready(Pin::new(&mut *future).poll(context).is_pending())).await
    }

    fn operator() -> Operator {
        Operator { name: "ops".to_owned(), request_id: "req_operator".to_owned() }
    }

    fn root_key(n: u8) -> NewRootKey {
        NewRootKey {
            id: KeyId::new(format!("root_{n}")),
            workspace_id: WorkspaceId::new("ws_1"),
            hash: KeyHash([n; 32]),
            start: "unkey_".to_owned(),
            name: None,
            permissions: Vec::new(),
            expires_at: None,
        }
    }

    async fn new_store() -> (tempfile::TempDir, Arc<SqliteStore>) {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        (directory, Arc::new(store))
    }

    #[tokio::test]
    async fn when_lookups_are_stuck_everything_else_goes_on() {
        let (_directory, store) = new_store().await;
        let _stuck = occupy(&store.connections.lookups).await;
        let mut lookup = pin!(store.lookup(KeyHash([1; 32])));
        assert!(waits(&mut lookup).await);

        store.create_root_key(&operator(), root_key(1)).await.unwrap();
        assert!(store.root_key(KeyHash([1; 32])).await.unwrap().is_some());
        assert_eq!(store.number(10).await.unwrap().rows.len(), 1);
        store.round(RoundRequest::default()).await.unwrap();
        assert!(
            matches!(store.replay(1, 1, 1, 10).await.unwrap(), Replay::Rows { rows, .. } if rows.len() == 1)
        );
    }

    #[tokio::test]
    async fn when_lookups_and_the_control_api_are_stuck_replays_and_the_log_go_on() {
        let (_directory, store) = new_store().await;
        store.create_root_key(&operator(), root_key(1)).await.unwrap();
        store.number(10).await.unwrap();
        let connections = &store.connections;
        let _stuck = (occupy(&connections.lookups).await, occupy(&connections.records).await);
        let _change = connections.change("test").await.unwrap();
        assert!(waits(&mut pin!(store.root_key(KeyHash([1; 32])))).await);
        assert!(waits(&mut pin!(store.create_root_key(&operator(), root_key(2)))).await);

        assert!(
            matches!(store.replay(1, 1, 1, 10).await.unwrap(), Replay::Rows { rows, .. } if rows.len() == 1)
        );
        assert_eq!(store.number(10).await.unwrap().head, store.head().await.unwrap());
        assert_eq!(store.roster(0).await.unwrap().entries, []);
    }

    #[tokio::test]
    async fn when_replays_are_stuck_rounds_and_numbering_go_on() {
        let (_directory, store) = new_store().await;
        let _stuck = occupy(&store.connections.replays).await;
        assert!(waits(&mut pin!(store.replay(1, 1, 1, 10))).await);
        store.create_root_key(&operator(), root_key(1)).await.unwrap();
        assert_eq!(store.number(10).await.unwrap().rows.len(), 1);
        store.round(RoundRequest::default()).await.unwrap();
    }

    #[tokio::test]
    async fn a_round_waits_for_the_change_under_way_and_for_no_other() {
        let (_directory, store) = new_store().await;
        let under_way = store.connections.change("test").await.unwrap();
        let mut changes: Vec<_> = (1..=20)
            .map(|n| {
                let store = store.clone();
                Box::pin(async move { store.create_root_key(&operator(), root_key(n)).await })
            })
            .collect();
        for change in &mut changes {
            assert!(waits(change).await);
        }
        let mut round = pin!(store.round(RoundRequest::default()));
        assert!(waits(&mut round).await);

        let changes: Vec<_> = changes.into_iter().map(tokio::spawn).collect();
        drop(under_way);
        assert_eq!(round.await.unwrap().numbered.rows, [], "it came before all that had waited longer");
        for change in changes {
            change.await.unwrap().unwrap();
        }
        assert_eq!(store.number(100).await.unwrap().rows.len(), 20);
    }

    /// By the error and not by trying: a test that runs as root may write anywhere.
    #[test]
    fn a_place_that_cannot_be_written_is_explained() {
        for kind in [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem] {
            assert!(advice(&sqlx::Error::Io(kind.into())).contains("must be writable"));
        }
    }
}
