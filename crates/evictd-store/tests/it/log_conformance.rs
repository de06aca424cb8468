//! What a home store's log, roster and history promise the protocol: one suite for the stores that ship and for the
//! simulator's model of one, so that a simulation says something about evictd.

use evictd_core::follower::ReplayOutcome;
use evictd_core::history::{BeginCause, History, LogToken, Milestone, Past, RoundToken};
use evictd_core::ids::KeyHash;
use evictd_core::invalidation::{Cause, Invalidation};
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState};
use evictd_sim::alone::LoneStore;
use evictd_store::audit::Purge;
use evictd_store::change::DeleteMode;
use evictd_store::log::Replay;
use evictd_store::{ChangeStore, HomeStore, LogStore, ReceiptStore, RosterStore};
use std::time::Duration;

use crate::fixture::{
    PostgresFixture, SqliteFixture, actor, api_id, instance, key, operator, populate, run_round,
};

/// Where a log ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct LogEnd {
    at: LogPosition,
    token: LogToken,
    round: RoundToken,
}

/// A store with keys 1 to 3, all of them active, and nothing that waits for a position.
trait LogUnderTest {
    async fn delete(&mut self, n: u8);
    async fn erase(&mut self, n: u8);
    async fn delete_api(&mut self);
    async fn number(&mut self) -> (LogEnd, Vec<Invalidation>);
    async fn round(&mut self, agents: usize) -> (LogEnd, Vec<Invalidation>);
    async fn purge_all(&mut self);
    async fn declare(&mut self);
    /// `None` if it is refused.
    async fn replay(&mut self, epoch: u32, first: u64, last: u64) -> Option<Vec<Invalidation>>;
    /// The state of a key, unless it is absent, and the head that it was read with.
    async fn look_up(&mut self, n: u8) -> (LogPosition, LogToken, Option<RecordState>);
    async fn end(&mut self) -> LogEnd;
    async fn history(&mut self) -> History;
    async fn roster(&mut self) -> usize;
    async fn row_token(&mut self, at: LogPosition) -> Option<LogToken>;
    async fn has_round_token(&mut self, token: RoundToken) -> bool;
}

impl<S: HomeStore> LogUnderTest for &S {
    async fn delete(&mut self, n: u8) {
        self.delete_key(&actor(), &key(n).id, DeleteMode::Soft, &|_| true).await.unwrap();
    }

    async fn erase(&mut self, n: u8) {
        self.delete_key(&actor(), &key(n).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    }

    async fn delete_api(&mut self) {
        ChangeStore::delete_api(*self, &actor(), &api_id()).await.unwrap();
    }

    async fn number(&mut self) -> (LogEnd, Vec<Invalidation>) {
        let numbered = LogStore::number(*self, usize::MAX).await.unwrap();
        (numbered.head.into(), numbered.rows)
    }

    async fn round(&mut self, agents: usize) -> (LogEnd, Vec<Invalidation>) {
        let instances: Vec<_> = (1..=agents as u64).map(instance).collect();
        let numbered = run_round(*self, &instances).await.numbered;
        (numbered.head.into(), numbered.rows)
    }

    async fn purge_all(&mut self) {
        let positions = ReceiptStore::open_requests(*self, LogPosition::ZERO, 100).await.unwrap();
        let receipts: Vec<_> = positions
            .iter()
            .map(|request| crate::fixture::receipt(&request.request_id, request.position, "{}"))
            .collect();
        self.record_receipts(&receipts).await.unwrap();
        let purge = Purge { log: Duration::ZERO, receipts: Duration::MAX, audit: None, limit: 1_000 };
        self.purge(purge).await.unwrap();
    }

    async fn declare(&mut self) {
        self.begin_epoch(&operator()).await.unwrap();
    }

    async fn replay(&mut self, epoch: u32, first: u64, last: u64) -> Option<Vec<Invalidation>> {
        match LogStore::replay(*self, epoch, first, last, 1_000).await.unwrap() {
            Replay::Rows { rows, .. } => Some(rows),
            Replay::Refused { .. } => None,
        }
    }

    async fn look_up(&mut self, n: u8) -> (LogPosition, LogToken, Option<RecordState>) {
        let lookup = self.lookup(KeyHash([n; 32])).await.unwrap();
        (lookup.as_of, lookup.token, state(&lookup.record))
    }

    async fn end(&mut self) -> LogEnd {
        self.head().await.unwrap().into()
    }

    async fn history(&mut self) -> History {
        LogStore::history(*self).await.unwrap()
    }

    async fn roster(&mut self) -> usize {
        RosterStore::roster(*self, 0)
            .await
            .unwrap()
            .entries
            .iter()
            .filter(|entry| entry.may_hold_lease())
            .count()
    }

    async fn row_token(&mut self, at: LogPosition) -> Option<LogToken> {
        LogStore::row_token(*self, at).await.unwrap()
    }

    async fn has_round_token(&mut self, token: RoundToken) -> bool {
        LogStore::has_round_token(*self, token).await.unwrap()
    }
}

impl LogUnderTest for LoneStore {
    async fn delete(&mut self, n: u8) {
        self.change_key(n, Some(RecordState::Deleted), Cause::Deleted);
    }

    async fn erase(&mut self, n: u8) {
        self.change_key(n, None, Cause::Erased);
    }

    async fn delete_api(&mut self) {
        self.delete_api_of(1);
    }

    async fn number(&mut self) -> (LogEnd, Vec<Invalidation>) {
        let numbered = Self::number(self).unwrap();
        (numbered.head.into(), numbered.rows.to_vec())
    }

    async fn round(&mut self, agents: usize) -> (LogEnd, Vec<Invalidation>) {
        let numbered = Self::round(self, agents).unwrap();
        (numbered.head.into(), numbered.rows.to_vec())
    }

    async fn purge_all(&mut self) {
        self.purge();
    }

    async fn declare(&mut self) {
        Self::declare(self);
    }

    async fn replay(&mut self, epoch: u32, first: u64, last: u64) -> Option<Vec<Invalidation>> {
        match Self::replay(self, epoch, first, last).unwrap() {
            ReplayOutcome::Rows(rows) => Some(rows),
            ReplayOutcome::Refused { .. } => None,
        }
    }

    async fn look_up(&mut self, n: u8) -> (LogPosition, LogToken, Option<RecordState>) {
        let read = self.read(n).unwrap();
        (read.as_of, read.token, state(&read.record))
    }

    async fn end(&mut self) -> LogEnd {
        self.head().unwrap().into()
    }

    async fn history(&mut self) -> History {
        Self::history(self).unwrap()
    }

    async fn roster(&mut self) -> usize {
        Self::roster(self).unwrap().len()
    }

    async fn row_token(&mut self, at: LogPosition) -> Option<LogToken> {
        Self::row_token(self, at)
    }

    async fn has_round_token(&mut self, token: RoundToken) -> bool {
        Self::has_round_token(self, token)
    }
}

impl From<evictd_store::log::Head> for LogEnd {
    fn from(head: evictd_store::log::Head) -> Self {
        Self { at: head.at, token: head.token, round: head.round }
    }
}

impl From<evictd_sim::rows::SimHead> for LogEnd {
    fn from(head: evictd_sim::rows::SimHead) -> Self {
        Self { at: head.at, token: head.token, round: head.round }
    }
}

fn state(record: &Record) -> Option<RecordState> {
    match record {
        Record::Key(key) => Some(key.state),
        Record::Absent => None,
        Record::RootKey(root_key) => panic!("a key was expected: {root_key:?}"),
    }
}

macro_rules! log_conformance {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test]
                async fn $name() {
                    let fixture = super::SqliteFixture::new().await;
                    super::populate(&fixture.store, 3).await;
                    super::$name(&mut &fixture.store).await;
                    super::HomeStore::close(&fixture.store).await;
                }
            )*
        }

        mod postgres {
            $(
                #[tokio::test]
                async fn $name() {
                    let fixture = super::PostgresFixture::new().await;
                    super::populate(&fixture.store, 3).await;
                    super::$name(&mut &fixture.store).await;
                    super::HomeStore::close(&fixture.store).await;
                }
            )*
        }

        mod simulated {
            $(
                #[tokio::test]
                async fn $name() {
                    super::$name(&mut super::LoneStore::default()).await;
                }
            )*
        }
    };
}

log_conformance!(
    rows_get_the_positions_after_the_head,
    a_round_numbers_what_waits_and_draws_a_token,
    each_numbering_has_a_token,
    a_replay_gives_what_is_there_without_a_gap,
    a_replay_of_what_is_not_there_is_refused,
    what_was_purged_is_never_left_out_of_a_replay,
    a_lookup_says_how_new_it_is,
    a_change_is_visible_before_it_has_a_position,
    probing_instances_are_in_the_roster,
    declared_epoch_supersedes_what_was_lost,
);

fn after(at: LogPosition, rows: u64) -> LogPosition {
    LogPosition::new(at.epoch(), at.position() + rows).unwrap()
}

fn places(rows: &[Invalidation]) -> Vec<(LogPosition, Cause)> {
    rows.iter().map(|row| (row.position, row.cause)).collect()
}

async fn rows_get_the_positions_after_the_head(store: &mut impl LogUnderTest) {
    let start = store.end().await.at;
    store.delete(2).await;
    store.erase(1).await;
    store.delete_api().await;
    let (end, rows) = store.number().await;
    let causes = [Cause::Deleted, Cause::Erased, Cause::Deleted];
    let expected: Vec<_> = (1..).map(|n| after(start, n)).zip(causes).collect();
    assert_eq!(places(&rows), expected);
    assert_eq!((end.at, store.end().await), (after(start, 3), end));
    assert_eq!(store.number().await, (end, Vec::new()), "a row is numbered once");
}

async fn a_round_numbers_what_waits_and_draws_a_token(store: &mut impl LogUnderTest) {
    let start = store.end().await;
    store.delete(2).await;
    let (end, rows) = store.round(1).await;
    assert_eq!(places(&rows), [(after(start.at, 1), Cause::Deleted)]);
    assert_ne!(end.round, start.round);
    assert!(store.has_round_token(end.round).await);
    store.delete(1).await;
    assert_eq!(store.number().await.0.round, end.round, "numbering alone is no round");
    let (again, rows) = store.round(1).await;
    assert_eq!((again.at, rows), (after(end.at, 1), Vec::new()));
    assert_ne!(again.round, end.round);
    assert!(store.has_round_token(end.round).await, "the last ones are kept");
    assert!(!store.has_round_token(RoundToken(again.round.0 ^ 1)).await);
}

async fn each_numbering_has_a_token(store: &mut impl LogUnderTest) {
    let start = store.end().await;
    store.delete(1).await;
    store.delete(2).await;
    let one = store.number().await.0;
    store.delete(3).await;
    let other = store.round(1).await.0;
    assert_eq!(store.round(1).await.0.token, other.token, "a round that numbers nothing has none");
    let mut tokens = Vec::new();
    for row in 0..=4 {
        tokens.push(store.row_token(after(start.at, row)).await);
    }
    let expected = [Some(start.token), Some(one.token), Some(one.token), Some(other.token), None];
    assert_eq!(tokens, expected);
    assert!(start.token != one.token && one.token != other.token);
}

async fn a_replay_gives_what_is_there_without_a_gap(store: &mut impl LogUnderTest) {
    let start = store.end().await.at;
    for n in 1..=3 {
        store.delete(n).await;
    }
    let rows = store.number().await.1;
    let first = start.position() + 1;
    assert_eq!(store.replay(start.epoch(), first, first + 2).await.as_deref(), Some(&rows[..]));
    assert_eq!(store.replay(start.epoch(), first + 1, first + 1).await.as_deref(), Some(&rows[1..2]));
    for last in [first + 900, u64::MAX] {
        let beyond = store.replay(start.epoch(), first + 1, last).await;
        assert_eq!(beyond.as_deref(), Some(&rows[1..]), "a prefix, up to the head");
    }
}

async fn a_replay_of_what_is_not_there_is_refused(store: &mut impl LogUnderTest) {
    store.delete(1).await;
    let head = store.number().await.0.at;
    store.delete(2).await;
    let (epoch, next) = (head.epoch(), head.position() + 1);
    assert_eq!(store.replay(epoch, next, next).await, None, "it has no position yet");
    assert_eq!(store.replay(epoch + 1, next - 1, next - 1).await, None, "of an epoch to come");
    assert_eq!(store.replay(u32::MAX, u64::MAX, u64::MAX).await, None, "of none");
    store.declare().await;
    assert_eq!(store.replay(epoch, next - 1, next - 1).await, None, "of an older epoch");
}

async fn what_was_purged_is_never_left_out_of_a_replay(store: &mut impl LogUnderTest) {
    store.delete(1).await;
    let old = store.number().await.0.at;
    store.purge_all().await;
    store.delete(2).await;
    let rows = store.number().await.1;
    let (epoch, first) = (old.epoch(), old.position());
    assert_eq!(store.replay(epoch, first, first + 1).await, None);
    assert_eq!(store.replay(epoch, first + 1, first + 1).await, Some(rows));
}

async fn a_lookup_says_how_new_it_is(store: &mut impl LogUnderTest) {
    let start = store.end().await;
    assert_eq!(store.look_up(1).await, (start.at, start.token, Some(RecordState::Active)));
    store.delete(1).await;
    store.erase(2).await;
    let end = store.number().await.0;
    assert_eq!(store.look_up(1).await, (end.at, end.token, Some(RecordState::Deleted)));
    assert_eq!(store.look_up(2).await, (end.at, end.token, None));
}

async fn a_change_is_visible_before_it_has_a_position(store: &mut impl LogUnderTest) {
    let start = store.end().await;
    store.delete_api().await;
    assert_eq!(store.look_up(1).await, (start.at, start.token, Some(RecordState::Deleted)));
}

async fn probing_instances_are_in_the_roster(store: &mut impl LogUnderTest) {
    assert_eq!(store.roster().await, 0);
    store.round(2).await;
    assert_eq!(store.roster().await, 2);
    store.round(1).await;
    store.number().await;
    assert_eq!(store.roster().await, 2, "who doesn't ask again stays");
}

async fn declared_epoch_supersedes_what_was_lost(store: &mut impl LogUnderTest) {
    store.delete(1).await;
    let before = store.number().await.0;
    let history = store.history().await;
    let seen = |at| Milestone { provenance: history.provenance(), at, token: before.token };
    let judge = |history: &History, end: LogEnd, at| history.judge(&seen(at), end.at);
    assert_eq!(judge(&history, before, before.at), Past::Known);
    assert_eq!(judge(&history, before, after(before.at, 1)), Past::Unknown, "above the head");
    store.declare().await;
    let (declared, end) = (store.history().await, store.end().await);
    let begin = declared.current();
    assert_eq!((begin.cause, begin.after, begin.at), (BeginCause::Declared, before.at, end.at));
    let next = LogPosition::new(before.at.epoch() + 1, before.at.position());
    assert_eq!(Some(end.at), next, "positions go on");
    assert_eq!(judge(&declared, end, before.at), Past::Known);
    assert_eq!(judge(&declared, end, after(before.at, 1)), Past::Superseded, "it was lost");
    assert_ne!(declared.provenance(), history.provenance());
}
