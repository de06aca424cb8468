//! The home store as the rest sees it: transactions, the log, snapshots, and what can go wrong with them.
//!
//! A world may have a second one that began as a copy of it. Only the first one is judged.
//!
//! Every commit has a number, and everything keeps its history, so that a replica, a demoted primary or a
//! restored copy can be read as it was. A regression (a fail-over that lost commits, a restored copy) is a
//! commit of its own that puts back what the lost ones changed.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::Duration;

use evictd_core::epochs;
use evictd_core::follower::ReplayOutcome;
use evictd_core::history::{
    Begin, BeginCause, History, Incarnation, LogToken, Mac, Milestone, Provenance, RoundToken, StoreId,
    Voucher,
};
use evictd_core::ids::{ApiId, Identity, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::limits::{POSITION_MAX, REPLAY_BATCH_MAX};
use evictd_core::log::{self, LoggedRow};
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Record, RecordState, RootKeyRecord};
use evictd_core::roster::{self, Instance, RosterEntry};
use evictd_core::time::StoreTime;

use crate::assumption::Assumption;
use crate::checker::Checker;
use crate::ctx::Ctx;
use crate::event::{PublisherEvent, SimEvent, StoreEvent};
use crate::node::{Life, NodeNumber};
use crate::rows::{
    APIS, ApiNumber, Attached, ChangeNumber, ChangePlan, ChangeTarget, KeyNumber, KeyRow, Lsn, NumberedBatch,
    Numbering, ROOT_KEYS, ReadPlace, RoundInput, RowRange, SimHead, Snapshot, StoreSite, Transaction,
    WORKSPACES, WorkspaceNumber, hash, instance,
};
use crate::time::{MS, Micros, Moment, SECOND};
use crate::trace::trace;

#[derive(Clone, Debug)]
struct Versions<T>(Vec<(Lsn, T)>);

impl<T: Copy> Versions<T> {
    fn new(first: T) -> Self {
        Self(vec![(Lsn(0), first)])
    }

    fn now(&self) -> T {
        self.0[self.0.len() - 1].1
    }

    fn at(&self, lsn: Lsn) -> T {
        let later = self.0.partition_point(|(of, _)| *of <= lsn);
        self.0[later.saturating_sub(1)].1
    }

    fn push(&mut self, lsn: Lsn, value: T) {
        self.0.push((lsn, value));
    }
}

#[derive(Clone, Debug)]
struct SimRow {
    id: u64,
    /// `None` in a copy.
    change: Option<ChangeNumber>,
    scope: Scope,
    cause: Cause,
    committed: Moment,
    lsn: Lsn,
}

#[derive(Clone, Debug)]
struct NumberedRow {
    row: SimRow,
    position: LogPosition,
    token: LogToken,
    numbered: Lsn,
}

/// A changed row, and which change it was; `None` in a copy.
type JournalEntry = (ChangeTarget, Option<ChangeNumber>);

#[derive(Clone, Debug)]
pub struct SimStore {
    pub site: StoreSite,
    lsn: Lsn,
    rows: HashMap<ChangeTarget, Versions<Option<KeyRow>>>,
    head: Versions<SimHead>,
    id: StoreId,
    /// What its code is made with (R16).
    key: u64,
    begins: Vec<(Lsn, Begin)>,
    /// Tokens of the last rounds.
    rounds: Vec<(Lsn, RoundToken)>,
    /// Every commit: its time, and the change; `None` if it changed no row.
    journal: Vec<(Moment, Option<JournalEntry>)>,
    unnumbered: BTreeMap<u64, SimRow>,
    log: Vec<NumberedRow>,
    /// The number of purged rows.
    purged: usize,
    /// And when each process was entered.
    roster: BTreeMap<Identity, (RosterEntry, Lsn)>,
    next_row: u64,
    highest_numbered_row: u64,
    /// Changes at each regression: transactions of an earlier one are gone.
    generation: u32,
    timeline: u32,
    /// Where the present branch begins.
    branch: Lsn,
    epoch_since: Option<Moment>,
    lock_free: Moment,
    /// The primary that was demoted, as it answers reads.
    demoted: Option<Box<SimStore>>,
    /// Nothing is answered until then.
    pub down_until: Moment,
    /// The factor of all times.
    pub slowness: u64,
    /// By publisher of this store.
    attached: Vec<Attached>,
    first_publisher: NodeNumber,
    api_ids: Vec<ApiId>,
    workspace_ids: Vec<WorkspaceId>,
    key_id: KeyId,
}

/// However slow the store is, a statement doesn't take longer.
const STATEMENT_MAX: Micros = 3 * SECOND;

/// Rows numbered in one transaction.
const BATCH: usize = 1024;

const ROUND_TOKENS_KEPT: usize = 512;

/// How far above the head an epoch may begin that the server's history is the cause of.
const BRANCH_LEAP: u64 = 1 << 34;

impl SimStore {
    /// A store in which every key is active, and `agents` + publishers are numbered as in the network.
    pub fn new(ctx: &mut Ctx) -> Self {
        let publishers = ctx.settings.publishers;
        let keys =
            (0..ctx.settings.keys).map(|key| (ChangeTarget::Key(KeyNumber(key)), ApiNumber(key % APIS)));
        let apis = (0..APIS).map(|api| (ChangeTarget::Api(ApiNumber(api)), ApiNumber(api)));
        let workspaces = (0..WORKSPACES).map(|ws| ChangeTarget::Workspace(WorkspaceNumber(ws)));
        let all = keys.chain(apis).chain(workspaces.map(|workspace| (workspace, ApiNumber(0))));
        let active = |api| Versions::new(Some(KeyRow { api, state: RecordState::Active }));
        let at = LogPosition::new(1, 0).unwrap_or(LogPosition::ZERO);
        let (incarnation, token) = (Incarnation(ctx.dice.any()), LogToken(ctx.dice.any()));
        let head = SimHead { at, incarnation, token, round: RoundToken(0), timeline: 1 };
        let after = LogPosition::ZERO;
        let created =
            Begin { incarnation, after, at, cause: BeginCause::Created, time: StoreTime(0), evidence: None };
        ctx.checker.incarnation_began(ctx.now, &created);
        Self {
            site: StoreSite::Home,
            lsn: Lsn(0),
            id: StoreId(ctx.dice.any()),
            key: ctx.dice.any(),
            begins: vec![(Lsn(0), created)],
            rounds: Vec::new(),
            rows: all.map(|(target, api)| (target, active(api))).collect(),
            head: Versions::new(head),
            journal: vec![(Moment(0), None)],
            unnumbered: BTreeMap::new(),
            log: Vec::new(),
            purged: 0,
            roster: BTreeMap::new(),
            next_row: 1,
            highest_numbered_row: 0,
            generation: 0,
            timeline: 1,
            branch: Lsn(0),
            epoch_since: None,
            lock_free: Moment(0),
            demoted: None,
            down_until: Moment(0),
            slowness: 1,
            attached: vec![Attached::Primary; publishers],
            first_publisher: NodeNumber(ctx.settings.agents),
            api_ids: (0..APIS).map(|api| ApiId::new(format!("api_{api}"))).collect(),
            workspace_ids: (0..WORKSPACES).map(|ws| WorkspaceId::new(format!("ws_{ws}"))).collect(),
            key_id: KeyId::new("key"),
        }
    }

    /// Makes a copy with publishers of its own, without the transactions under way.
    #[must_use]
    pub fn copy(&self, ctx: &Ctx) -> Self {
        let attached = vec![Attached::Primary; ctx.settings.copies];
        let first_publisher = NodeNumber(self.first_publisher.0 + self.attached.len());
        let site = StoreSite::Copy { of: self.lsn };
        Self { site, attached, first_publisher, lock_free: ctx.now, ..self.clone() }
    }

    /// The checker. `None` for a copy, which isn't judged.
    fn checker<'c>(&self, ctx: &'c mut Ctx) -> Option<&'c mut Checker> {
        (self.site == StoreSite::Home).then_some(&mut ctx.checker)
    }

    fn later(&self, ctx: &mut Ctx, at: Moment, event: StoreEvent) {
        ctx.queue.push(at, SimEvent::Store(self.site, event));
    }

    /// The present row; `None` if it is deleted.
    pub fn row(&self, target: ChangeTarget) -> Option<KeyRow> {
        self.rows[&target].now()
    }

    fn put(&mut self, target: ChangeTarget, row: Option<KeyRow>) {
        self.rows.entry(target).or_insert_with(|| Versions::new(None)).push(self.lsn, row);
    }

    /// Whether rows wait for a position.
    pub fn has_unnumbered(&self) -> bool {
        !self.unnumbered.is_empty()
    }

    /// What a publisher's connections reach now.
    pub fn attached(&self, ctx: &Ctx, publisher: NodeNumber) -> Attached {
        let attached = self.attached[publisher.0 - self.first_publisher.0];
        if attached == Attached::Primary && ctx.now < self.down_until { Attached::Nowhere } else { attached }
    }

    /// What answers a publisher's reads now.
    fn reached(&self, ctx: &Ctx, publisher: NodeNumber) -> Option<&Self> {
        match self.attached(ctx, publisher) {
            Attached::Primary => Some(self),
            Attached::Demoted => self.demoted.as_deref(),
            Attached::Nowhere => None,
        }
    }

    pub fn attach(&mut self, publisher: NodeNumber, attached: Attached) {
        self.attached[publisher.0 - self.first_publisher.0] = attached;
    }

    /// When the last numbering that is under way will be over.
    pub fn busy_until(&self) -> Moment {
        self.lock_free
    }

    pub fn statement(&self, ctx: &mut Ctx) -> Micros {
        (ctx.dice.span(MS / 2) * self.slowness).min(STATEMENT_MAX)
    }

    /// Begins a change; it commits after `span`.
    pub fn begin(
        &mut self,
        ctx: &mut Ctx,
        plan: ChangePlan,
        reply_to: Option<(NodeNumber, Life)>,
        span: Micros,
    ) {
        let rows = [self.next_row, self.next_row + 1];
        self.next_row += 2;
        let transaction = Transaction { plan, rows, reply_to, generation: self.generation };
        // Changes lock single rows; only numbering locks the log's one row.
        let at = ctx.now.after(span * self.slowness.min(50));
        self.later(ctx, at, StoreEvent::Commit(Box::new(transaction)));
    }

    /// Returns whether a change was committed.
    pub fn on_event(&mut self, ctx: &mut Ctx, event: StoreEvent) -> bool {
        match event {
            StoreEvent::Commit(transaction) => return self.commit(ctx, &transaction),
            StoreEvent::Number(numbering) => self.finish_numbering(ctx, &numbering),
            StoreEvent::Register(instances) => self.register(ctx, &instances),
        }
        false
    }

    /// Ends a change's transaction: it commits, unless its primary is gone. Returns whether it committed.
    fn commit(&mut self, ctx: &mut Ctx, transaction: &Transaction) -> bool {
        let gone = transaction.generation != self.generation || ctx.now < self.down_until;
        let change = if gone { None } else { self.apply(ctx, transaction) };
        if let Some((publisher, life)) = transaction.reply_to {
            // A commit that failed, or whose answer was lost, is unknown (R4).
            let unknown = ctx.settings.unknown_permille;
            let known = !gone && !ctx.dice.permille(unknown);
            let success = known || ctx.lacks(Assumption::UnknownIsNotSuccess);
            let at = ctx.now.after(ctx.dice.span(MS / 4));
            ctx.queue.push(
                at,
                SimEvent::Publisher(publisher, life, PublisherEvent::Committed { change, success }),
            );
        }
        !gone
    }

    fn apply(&mut self, ctx: &mut Ctx, transaction: &Transaction) -> Option<ChangeNumber> {
        let ChangePlan { target, row, cause } = transaction.plan;
        self.lsn.0 += 1;
        let lsn = self.lsn;
        let scopes = match target {
            ChangeTarget::Key(key) => {
                // A key that moves has a row for both APIs.
                let mut apis: Vec<ApiNumber> =
                    [self.row(target), row].iter().flatten().map(|row| row.api).collect();
                apis.dedup();
                apis.resize(apis.len().max(1), ApiNumber(0));
                apis.into_iter().map(|api| self.key_scope(key, api)).collect()
            }
            ChangeTarget::Api(api) => vec![Scope::Api(self.api_ids[api.0].clone())],
            ChangeTarget::Workspace(workspace) => {
                vec![Scope::Workspace(self.workspace_ids[workspace.0].clone())]
            }
        };
        self.put(target, row);
        let now = ctx.now;
        let judged = self.checker(ctx);
        let change = judged.map(|checker| checker.committed(now, lsn, target, cause, scopes.len()));
        self.journal.push((ctx.now, Some((target, change))));
        trace!(ctx, "commit {} {target:?} {cause:?} {row:?} ({change:?})", lsn.0);
        let unseen = transaction.reply_to.is_none() && ctx.lacks(Assumption::EveryChangeWritesItsRow);
        if !unseen {
            for (id, scope) in transaction.rows.into_iter().zip(scopes) {
                let committed = ctx.now;
                self.unnumbered.insert(id, SimRow { id, change, scope, cause, committed, lsn });
            }
        }
        change
    }

    fn key_scope(&self, key: KeyNumber, api: ApiNumber) -> Scope {
        let api_id = (key.0 >= ROOT_KEYS).then(|| self.api_ids[api.0].clone());
        Scope::Key { hash: hash(key), key_id: None, api_id }
    }

    /// Begins to number, for a sequencer or a round. The outcome comes as [`PublisherEvent::Numbered`].
    pub fn number(&mut self, ctx: &mut Ctx, publisher: NodeNumber, life: Life, round: Option<RoundInput>) {
        let attached = self.attached(ctx, publisher);
        let (visible, generation) = (ctx.now, self.generation);
        let on_demoted = attached == Attached::Demoted;
        let mut numbering = Numbering { publisher, life, visible, generation, on_demoted, round };
        if attached == Attached::Nowhere {
            return numbering.report(ctx, 200 * MS, None);
        }
        numbering.visible = ctx.now.after(self.statement(ctx)).max(self.lock_free);
        let at = numbering.visible.after(self.statement(ctx));
        if !on_demoted {
            // One row lock: numbering is serial.
            self.lock_free = at;
        }
        self.later(ctx, at, StoreEvent::Number(Box::new(numbering)));
    }

    fn finish_numbering(&mut self, ctx: &mut Ctx, numbering: &Numbering) {
        let is_round = numbering.round.is_some();
        let gone = numbering.generation != self.generation || ctx.now < self.down_until;
        if numbering.on_demoted || gone {
            // Where rounds don't write, a demoted primary answers them.
            let answers = is_round && ctx.lacks(Assumption::RoundsAreWrites);
            let head = self.demoted.as_deref().unwrap_or(self).head.now();
            let numbered = answers.then(|| NumberedBatch { head, rows: Rc::from([]) });
            return numbering.report(ctx, 0, numbered);
        }
        self.begin_epoch_if_due(ctx, numbering.round.as_ref().map_or(0, |round| round.seen_epoch));
        if let Some(RoundInput { instances, .. }) = &numbering.round {
            if ctx.lacks(Assumption::RosterPrecedesHead) {
                let late = ctx.now.after(ctx.dice.span(100 * MS));
                self.later(ctx, late, StoreEvent::Register(instances.clone()));
            } else {
                self.register(ctx, instances);
            }
        }
        let numbered = self.give_positions(ctx, numbering.visible, is_round);
        // It is committed, but the publisher may not learn it.
        let is_known = !ctx.dice.permille(ctx.settings.unknown_permille);
        let span = if is_known { ctx.dice.span(MS / 4) } else { 0 };
        numbering.report(ctx, span, is_known.then_some(numbered));
    }

    /// Begins a new epoch if the server's history is another one than that of the head (R2). Returns whether it did.
    fn begin_epoch_if_due(&mut self, ctx: &mut Ctx, seen_epoch: u32) -> bool {
        let is_due = epochs::is_branched(&self.head.now().timeline, &self.timeline);
        if is_due {
            self.begin_incarnation(ctx, BeginCause::Branched, seen_epoch);
        }
        is_due
    }

    /// Begins an incarnation as a publisher requests it, for a cause that begins no epoch; first the
    /// epoch that is due. `false` if the publisher can't write.
    pub fn open(&mut self, ctx: &mut Ctx, publisher: NodeNumber, cause: BeginCause) -> bool {
        let can_write = self.attached(ctx, publisher) == Attached::Primary;
        if can_write && (!self.begin_epoch_if_due(ctx, 0) || cause != BeginCause::Opened) {
            self.begin_incarnation(ctx, cause, 0);
        }
        can_write
    }

    /// Begins an incarnation, and an epoch if its cause begins one.
    pub fn begin_incarnation(&mut self, ctx: &mut Ctx, cause: BeginCause, seen_epoch: u32) {
        let mut head = self.head.now();
        let after = head.at;
        if cause.begins_epoch() {
            let leap = if head.timeline == self.timeline { 0 } else { ctx.dice.below(BRANCH_LEAP) };
            let epoch = epochs::next_epoch(self.timeline, head.at.epoch(), seen_epoch);
            let Some(at) = LogPosition::new(epoch, head.at.position() + leap) else { return };
            (head.at, head.token, head.timeline) = (at, LogToken(ctx.dice.any()), self.timeline);
            self.epoch_since = Some(ctx.now);
        }
        head.incarnation = Incarnation(ctx.dice.any());
        self.commit_other(ctx);
        self.head.push(self.lsn, head);
        let time = ctx.now.store_time();
        let begin = Begin { incarnation: head.incarnation, after, at: head.at, cause, time, evidence: None };
        trace!(ctx, "incarnation {} begins at {}: {}", begin.incarnation, begin.at, cause.label());
        let now = ctx.now;
        if let Some(checker) = self.checker(ctx) {
            checker.incarnation_began(now, &begin);
        }
        self.begins.push((self.lsn, begin));
    }

    fn commit_other(&mut self, ctx: &Ctx) {
        self.lsn.0 += 1;
        self.journal.push((ctx.now, None));
    }

    /// Gives the rows that were visible then the next positions.
    fn give_positions(&mut self, ctx: &mut Ctx, visible: Moment, is_round: bool) -> NumberedBatch {
        let after =
            if ctx.lacks(Assumption::LateCommitsAreFound) { self.highest_numbered_row + 1 } else { 0 };
        let limit = if is_round { usize::MAX } else { BATCH };
        let found = self.unnumbered.range(after..).filter(|(_, row)| row.committed <= visible);
        let waiting: Vec<SimRow> = found.map(|(_, row)| row.clone()).take(limit).collect();
        let mut head = self.head.now();
        let mut rows = Vec::with_capacity(waiting.len());
        self.commit_other(ctx);
        let token = LogToken(ctx.dice.any());
        for (position, row) in log::number(head.at, waiting).unwrap_or_default() {
            self.unnumbered.remove(&row.id);
            (head.at, head.token) = (position, token);
            self.highest_numbered_row = self.highest_numbered_row.max(row.id);
            let now = ctx.now;
            if let Some((checker, change)) = self.checker(ctx).zip(row.change) {
                checker.numbered(now, head.incarnation, change, position);
            }
            let numbered = NumberedRow { row, position, token, numbered: self.lsn };
            rows.push(numbered.invalidation());
            self.log.push(numbered);
        }
        if is_round {
            self.purge(ctx, ctx.settings.retention);
            head.round = RoundToken(ctx.dice.any());
            self.rounds.push((self.lsn, head.round));
            if self.rounds.len() > ROUND_TOKENS_KEPT {
                self.rounds.remove(0);
            }
        }
        if is_round || !rows.is_empty() {
            self.head.push(self.lsn, head);
        }
        if !rows.is_empty() {
            trace!(ctx, "numbered {} rows up to {}", rows.len(), head.at);
        }
        NumberedBatch { head, rows: rows.into() }
    }

    /// Deletes of the log what is older than `kept`. Requests and their receipts aren't kept here.
    pub fn purge(&mut self, ctx: &Ctx, kept: Duration) {
        let logged = self.log[self.purged..]
            .iter()
            .map(|row| LoggedRow { committed_at: row.row.committed.store_time(), awaits_receipt: false });
        self.purged += log::purgeable(logged, ctx.now.store_time(), kept);
    }

    /// Writes instances into the roster (R11).
    fn register(&mut self, ctx: &Ctx, instances: &[(NodeNumber, Life)]) {
        let presented = instances.iter().map(|(node, life)| instance(*node, *life, ctx.settings.bound));
        let presented: Vec<Instance> = presented.collect();
        let known = presented.iter().filter_map(|instance| self.roster.get(&instance.identity));
        let known: Vec<RosterEntry> = known.map(|(entry, _)| entry.clone()).collect();
        for entry in roster::update(&known, &presented, &[], ctx.now.store_time()).entries {
            let entered = self.roster.get(&entry.instance.identity).map_or(self.lsn, |(_, lsn)| *lsn);
            self.roster.insert(entry.instance.identity.clone(), (entry, entered));
        }
    }

    /// The roster, as a publisher reads it; `None` if it can't.
    pub fn roster(&self, ctx: &Ctx, publisher: NodeNumber) -> Option<Vec<Instance>> {
        let reaches = self.attached(ctx, publisher) == Attached::Primary;
        let counted = || self.roster.values().filter(|(entry, _)| entry.may_hold_lease());
        reaches.then(|| counted().map(|(entry, _)| entry.instance.clone()).collect())
    }

    /// How long ago the present epoch began; `None` for the first one.
    pub fn epoch_age(&self, ctx: &Ctx) -> Option<Duration> {
        self.epoch_since.map(|since| Duration::from_micros(ctx.now.since(since)))
    }

    /// The head, read alone.
    pub fn head(&self, ctx: &Ctx, publisher: NodeNumber) -> Option<SimHead> {
        self.reached(ctx, publisher).map(|store| store.head.now())
    }

    /// Its incarnations, as a publisher reads them.
    pub fn history(&self, ctx: &Ctx, publisher: NodeNumber) -> Option<History> {
        let store = self.reached(ctx, publisher)?;
        History::new(store.id, store.begins.iter().map(|(_, begin)| begin.clone()).collect())
    }

    /// Whether one of its last rounds drew `token`, as a publisher finds it.
    pub fn has_round_token(&self, ctx: &Ctx, publisher: NodeNumber, token: RoundToken) -> Option<bool> {
        let store = self.reached(ctx, publisher)?;
        Some(store.rounds.iter().any(|(_, drawn)| *drawn == token))
    }

    /// The token of the row at `at`, or of the incarnation that began there, as a publisher finds it.
    pub fn row_token(&self, ctx: &Ctx, publisher: NodeNumber, at: LogPosition) -> Option<LogToken> {
        let store = self.reached(ctx, publisher).unwrap_or(self);
        if let Ok(index) = store.log.binary_search_by_key(&at, |row| row.position) {
            return Some(store.log[index].token);
        }
        let (began, _) = store.begins.iter().find(|(_, begin)| begin.at == at)?;
        Some(store.head.at(*began).token)
    }

    /// A milestone with the store's code over it (R16). Only the store and its copies have the key.
    pub fn voucher(&self, head: &SimHead, at: LogPosition) -> Voucher {
        let provenance = Provenance { store: self.id, incarnation: head.incarnation };
        let milestone = Milestone { provenance, at, token: head.token };
        Voucher { milestone, mac: self.code(&milestone) }
    }

    /// Whether this store, or a copy of it, issued the voucher.
    pub fn is_authentic(&self, voucher: &Voucher) -> bool {
        voucher.mac == self.code(&voucher.milestone)
    }

    /// Stands for a keyed hash, which can't be guessed without the key.
    fn code(&self, milestone: &Milestone) -> Mac {
        let mut hasher = DefaultHasher::new();
        (self.key, milestone).hash(&mut hasher);
        u128::from(hasher.finish()).to_be_bytes()
    }

    /// A lookup by a publisher's connection.
    pub fn read(&self, ctx: &Ctx, publisher: NodeNumber, key: KeyNumber) -> Option<Snapshot> {
        self.reached(ctx, publisher).map(|store| store.read_at(key, store.lsn))
    }

    /// A lookup at a replica that is behind by `lag`.
    pub fn read_replica(&self, now: Moment, lag: Micros, key: KeyNumber) -> Snapshot {
        let then = Moment(now.0.saturating_sub(lag));
        let later = self.journal.partition_point(|(at, _)| *at <= then);
        self.read_at(key, Lsn(later.saturating_sub(1) as u64))
    }

    fn read_at(&self, key: KeyNumber, lsn: Lsn) -> Snapshot {
        let row_of = |target| self.rows[&target].at(lsn);
        let row = row_of(ChangeTarget::Key(key));
        let SimHead { at: as_of, incarnation, token, .. } = self.head.at(lsn);
        let provenance = Provenance { store: self.id, incarnation };
        let is_root = key.0 < ROOT_KEYS;
        let api = row.filter(|_| !is_root).map(|row| ChangeTarget::Api(row.api));
        let of = if is_root { key.0 } else { row.map_or(0, |row| row.api.0) };
        let workspace = WorkspaceNumber(of % WORKSPACES);
        let workspace_id = self.workspace_ids[workspace.0].clone();
        let workspace = ChangeTarget::Workspace(workspace);
        let gone = api.into_iter().chain([workspace]).any(|target| row_of(target).is_none());
        let state = |row: KeyRow| if gone { RecordState::Deleted } else { row.state };
        let record = match row {
            None => Record::Absent,
            Some(row) if is_root => Record::RootKey(RootKeyRecord {
                root_key_id: self.key_id.clone(),
                workspace_id,
                state: state(row),
                permissions: Vec::new(),
                expires_at: None,
            }),
            Some(row) => Record::Key(KeyRecord {
                key_id: self.key_id.clone(),
                api_id: self.api_ids[row.api.0].clone(),
                workspace_id,
                state: state(row),
                name: None,
                meta: None,
                external_id: None,
                permissions: Vec::new(),
                expires_at: None,
            }),
        };
        // Commits of a copy are not judged.
        let lsn = match self.site {
            StoreSite::Home => lsn,
            StoreSite::Copy { of } => lsn.min(of),
        };
        let targets = [Some(ChangeTarget::Key(key)), api, row.map(|_| workspace)];
        Snapshot { as_of, provenance, token, record, place: ReadPlace { lsn, targets } }
    }

    /// The answer to a replay; `None` if the store can't be reached.
    pub fn replay(&self, ctx: &Ctx, publisher: NodeNumber, range: RowRange) -> Option<ReplayOutcome> {
        let RowRange { epoch, first, last } = range;
        let store = self.reached(ctx, publisher)?;
        let (head, log) = (store.head.now(), &store.log[store.purged..]);
        let refused = || ReplayOutcome::Refused { head: self.voucher(&head, head.at) };
        let last = LogPosition::new(epoch, last.min(POSITION_MAX));
        let Some((first, last)) = LogPosition::new(epoch, first).zip(last) else { return Some(refused()) };
        let found = log.partition_point(|row| row.position < first);
        let found = log[found..].iter().take_while(|row| row.position <= last).take(REPLAY_BATCH_MAX);
        let covered = log::covered(head.at, first, found.clone().map(|row| row.position));
        if covered == 0 {
            return Some(refused());
        }
        Some(ReplayOutcome::Rows(found.take(covered).map(NumberedRow::invalidation).collect()))
    }

    /// Another primary takes over, which lacks the last `lost` commits. It writes another timeline, and the old
    /// one still answers reads.
    pub fn fail_over(&mut self, ctx: &mut Ctx, lost: u64) {
        self.demoted = None;
        self.demoted = Some(Box::new(self.clone()));
        self.timeline += 1;
        self.go_back(ctx, lost);
    }

    /// Replaces the store by a copy that lacks the last `lost` commits. Nothing in it shows that.
    pub fn restore(&mut self, ctx: &mut Ctx, lost: u64) {
        self.demoted = None;
        self.go_back(ctx, lost);
    }

    fn go_back(&mut self, ctx: &mut Ctx, lost: u64) {
        let last = self.lsn;
        // What happened before the last regression can't be lost by another one.
        let cut = Lsn(last.0.saturating_sub(lost)).max(self.branch);
        self.generation += 1;
        let undone: Vec<_> =
            self.journal[cut.0 as usize + 1..].iter().filter_map(|(_, change)| *change).collect();
        self.commit_other(ctx);
        let lsn = self.lsn;
        trace!(ctx, "the store goes back from {} to {}, timeline {}", last.0, cut.0, self.timeline);
        for (target, change) in undone {
            self.put(target, self.rows[&target].at(cut));
            let now = ctx.now;
            if let Some((checker, change)) = self.checker(ctx).zip(change) {
                checker.lost(now, change, lsn, target);
            }
        }
        self.branch = lsn;
        self.head.push(lsn, self.head.at(cut));
        self.begins.retain(|(began, _)| *began <= cut);
        self.rounds.retain(|(drawn, _)| *drawn <= cut);
        self.unnumbered.retain(|_, row| row.lsn <= cut);
        // Rows whose numbering is among what was lost wait again.
        let kept = self.log.partition_point(|row| row.numbered <= cut);
        self.purged = self.purged.min(kept);
        for numbered in self.log.split_off(kept) {
            if numbered.row.lsn <= cut {
                if let Some((checker, change)) = self.checker(ctx).zip(numbered.row.change) {
                    checker.unnumbered(change, numbered.position);
                }
                self.unnumbered.insert(numbered.row.id, numbered.row);
            }
        }
        self.roster.retain(|_, (_, registered)| *registered <= cut);
        if let Some(checker) = self.checker(ctx) {
            checker.regressed();
        }
        self.lock_free = ctx.now;
        self.highest_numbered_row = self.log.last().map_or(0, |row| row.row.id);
    }
}

impl NumberedRow {
    fn invalidation(&self) -> Invalidation {
        Invalidation {
            position: self.position,
            scope: self.row.scope.clone(),
            cause: self.row.cause,
            committed_at: self.row.committed.store_time(),
        }
    }
}

impl Numbering {
    /// Sends the outcome to the publisher, so much later. `None` if it failed, or is unknown.
    fn report(&self, ctx: &mut Ctx, span: Micros, numbered: Option<NumberedBatch>) {
        let outcome = PublisherEvent::Numbered { numbered, is_round: self.round.is_some() };
        ctx.queue.push(ctx.now.after(span), SimEvent::Publisher(self.publisher, self.life, outcome));
    }
}
