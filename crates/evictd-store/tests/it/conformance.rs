//! One suite for every implementation of [`HomeStore`].

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use evictd_core::history::{BeginCause, Milestone, Past, RoundToken};
use evictd_core::ids::{KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::limits::EPOCH_MAX;
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState};
use evictd_core::roster::{Instance, PartitionPolicy, RosterEntry};
use evictd_core::time::StoreTime;
use evictd_store::HomeStore;
use evictd_store::audit::{AuditQuery, AuditTarget, Purge, Purged};
use evictd_store::change::{Actor, ChangeError, DeleteMode, Edit, KeyUpdate, NewApi, NewKey, Reroll};
use evictd_store::log::{Numbered, NumberedRequest, Replay, RoundRequest};
use evictd_store::receipt::{FinalReceipt, OpenRow, StoredOutcome};
use evictd_store::record::{Api, KeyDetails, KeyQuery};

use crate::fixture::{
    PostgresFixture, SqliteFixture, actor, api_id, asking, end, instance, key, key_scope, new_api, news,
    operator, populate, receipt, root_key, run_round, said, workspace,
};

/// Makes a test of every function of the suite, each on a store of its own.
macro_rules! conformance {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test]
                async fn $name() {
                    let fixture = super::SqliteFixture::new().await;
                    super::$name(&fixture.store).await;
                    super::HomeStore::close(&fixture.store).await;
                }
            )*
        }

        mod postgres {
            $(
                #[tokio::test]
                async fn $name() {
                    let fixture = super::PostgresFixture::new().await;
                    super::$name(&fixture.store).await;
                    super::HomeStore::close(&fixture.store).await;
                }
            )*
        }
    };
}

conformance!(
    a_new_store_is_empty,
    changes_get_dense_positions_in_the_order_of_their_commits,
    a_limit_leaves_the_rest_for_the_next_call,
    the_rows_of_one_request_are_numbered_together,
    concurrent_numbering_gives_each_position_once,
    a_round_numbers_everything_and_stays_in_its_epoch,
    epoch_that_agents_have_seen_begins_none,
    a_new_stores_history_begins_with_its_creation,
    every_batch_has_a_token_of_its_own,
    the_tokens_of_the_last_rounds_are_found,
    a_replay_gives_the_range_or_a_prefix_of_it,
    a_replay_that_cannot_begin_is_refused,
    a_lookup_knows_every_state_of_a_key,
    a_lookup_finds_root_keys_and_says_how_new_the_answer_is,
    expiry_becomes_a_change_once,
    a_deleted_key_is_not_found_a_second_time,
    existence_is_judged_before_permission,
    a_permanently_deleted_key_leaves_room_for_the_same_text_anew,
    a_soft_deleted_key_keeps_its_hash_taken,
    a_deleted_api_is_one_row_and_takes_its_keys_along,
    another_workspace_sees_nothing_and_changes_nothing,
    a_refused_change_leaves_no_trace_in_the_log,
    root_keys_are_listed_newest_first_without_deleted_ones,
    changes_are_dated_by_the_stores_clock,
    the_version_changes_with_every_commit_and_only_then,
    the_backlog_counts_what_waits,
    triggers_are_in_place,
    roster_returns_what_changed_since_a_revision,
    an_instance_that_asks_twice_in_one_round_is_as_it_said_last,
    touched_instances_do_not_enter_the_roster,
    instance_is_removed_unless_it_was_seen_since,
    departure_is_reported_until_the_instance_returns,
    numbered_rows_say_which_request_wrote_them,
    a_request_is_open_until_its_receipt_is_recorded,
    request_without_change_differs_from_a_refused_one,
    the_first_receipt_of_a_request_stays,
    receipts_are_recorded_together_or_not_at_all,
    receipt_of_a_change_that_was_lost_is_not_kept,
    open_requests_are_those_numbered_and_without_a_receipt,
    open_requests_go_on_through_a_new_epoch,
    an_operators_new_epoch_goes_on_from_the_head,
    declared_epoch_is_part_of_the_history,
    an_update_changes_what_it_names_and_nothing_else,
    an_end_in_the_future_makes_an_expired_key_live_again,
    update_that_changes_nothing_is_not_logged,
    rerolled_key_expires_and_the_new_one_has_its_settings,
    rerolled_key_ends_with_its_minute_or_earlier,
    updates_and_rerolls_judge_existence_before_permission,
    keys_are_listed_page_by_page_without_deleted_ones,
    a_protected_api_is_not_deleted_until_that_is_lifted,
    a_revoked_root_key_is_an_invalidation_like_any_other,
    every_change_has_its_audit_record,
    audit_records_are_found_by_what_was_changed,
    old_rows_are_purged_from_the_beginning_of_the_log_only,
    a_receipt_that_was_purged_is_not_taken_for_none,
);

fn at(epoch: u32, position: u64) -> LogPosition {
    LogPosition::new(epoch, position).unwrap()
}

fn wall_clock() -> StoreTime {
    StoreTime(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as i64)
}

async fn state(store: &dyn HomeStore, n: u8) -> Option<RecordState> {
    match store.lookup(KeyHash([n; 32])).await.unwrap().record {
        Record::Key(key) => Some(key.state),
        Record::Absent => None,
        Record::RootKey(root_key) => panic!("a key was expected: {root_key:?}"),
    }
}

async fn delete(store: &dyn HomeStore, n: u8, mode: DeleteMode) -> Result<(), ChangeError> {
    store.delete_key(&actor(), &key(n).id, mode, &|_| true).await
}

async fn a_new_store_is_empty(store: &dyn HomeStore) {
    assert_eq!(end(store).await, at(1, 0));
    assert_eq!(store.number(10).await.unwrap().rows, []);
    assert_eq!(store.backlog().await.unwrap().rows, 0);
    assert_eq!(store.root_keys().await.unwrap(), []);
    let lookup = store.lookup(KeyHash([1; 32])).await.unwrap();
    assert_eq!((lookup.as_of, lookup.record), (at(1, 0), Record::Absent));
}

async fn changes_get_dense_positions_in_the_order_of_their_commits(store: &dyn HomeStore) {
    store.create_root_key(&operator(), root_key()).await.unwrap();
    store.create_api(&actor(), new_api()).await.unwrap();
    store.create_key(&actor(), key(1)).await.unwrap();
    store.create_key(&actor(), key(2)).await.unwrap();
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    let numbered = store.number(100).await.unwrap();
    let root = Scope::Key { hash: KeyHash([255; 32]), key_id: Some(KeyId::new("root_1")), api_id: None };
    assert_eq!(
        said(&numbered.rows),
        [
            (root, Cause::Created),
            (key_scope(1), Cause::Created),
            (key_scope(2), Cause::Created),
            (key_scope(1), Cause::Deleted),
        ]
    );
    let positions: Vec<_> = numbered.rows.iter().map(|row| row.position).collect();
    assert_eq!(positions, [at(1, 1), at(1, 2), at(1, 3), at(1, 4)]);
    assert_eq!(numbered.head.at, at(1, 4));
    assert_eq!(store.head().await.unwrap(), numbered.head);
    assert_eq!(store.number(100).await.unwrap().rows, [], "a row is numbered once");
}

async fn a_limit_leaves_the_rest_for_the_next_call(store: &dyn HomeStore) {
    populate(store, 0).await;
    let start = end(store).await.position();
    for n in 1..=5 {
        store.create_key(&asking(&format!("req_{n}")), key(n)).await.unwrap();
    }
    let first = store.number(3).await.unwrap();
    assert_eq!((first.rows.len(), first.head.at), (3, at(1, start + 3)));
    assert_eq!(store.backlog().await.unwrap().rows, 2);
    let second = store.number(3).await.unwrap();
    assert_eq!((second.rows.len(), second.head.at), (2, at(1, start + 5)));
}

async fn the_rows_of_one_request_are_numbered_together(store: &dyn HomeStore) {
    populate(store, 2).await;
    let reroll = Reroll {
        key: key(1).id,
        grace: Duration::ZERO,
        new_id: KeyId::new("key_new"),
        hash: KeyHash([77; 32]),
        start: "abcd".to_owned(),
    };
    store.reroll_key(&asking("req_reroll"), reroll, &|_| true).await.unwrap();
    store.delete_key(&asking("req_delete"), &key(2).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let first = store.number(1).await.unwrap().requests;
    assert_eq!(first.iter().map(|row| &*row.request_id).collect::<Vec<_>>(), ["req_reroll", "req_reroll"]);
    let second = store.number(1).await.unwrap().requests;
    assert_eq!(second.iter().map(|row| &*row.request_id).collect::<Vec<_>>(), ["req_delete"]);
}

async fn concurrent_numbering_gives_each_position_once(store: &dyn HomeStore) {
    populate(store, 0).await;
    let start = end(store).await.position();
    let positions = Mutex::new(Vec::new());
    let number = async || {
        for _ in 0..10 {
            let rows = store.number(2).await.unwrap().rows;
            positions.lock().unwrap().extend(rows.iter().map(|row| row.position.position()));
        }
    };
    let change = async || {
        for n in 1..=20 {
            store.create_key(&actor(), key(n)).await.unwrap();
        }
    };
    let probe = async || {
        for _ in 0..5 {
            let rows = run_round(store, &[instance(1)]).await.numbered.rows;
            positions.lock().unwrap().extend(rows.iter().map(|row| row.position.position()));
        }
    };
    tokio::join!(number(), change(), number(), probe(), number());
    let rest = store.number(usize::MAX).await.unwrap().rows;
    let mut positions = positions.into_inner().unwrap();
    positions.extend(rest.iter().map(|row| row.position.position()));
    positions.sort_unstable();
    assert_eq!(positions, (start + 1..=start + 20).collect::<Vec<_>>());
}

async fn a_round_numbers_everything_and_stays_in_its_epoch(store: &dyn HomeStore) {
    populate(store, 3).await;
    let head = end(store).await;
    delete(store, 2, DeleteMode::Soft).await.unwrap();
    let before = wall_clock();
    let round = run_round(store, &[instance(1), instance(2)]).await;
    assert_eq!(said(&round.numbered.rows), [(key_scope(2), Cause::Deleted)]);
    assert_eq!((round.numbered.head.at, round.began), (head.next().unwrap(), None));
    assert!(before <= round.clock.store_time && round.clock.store_time <= wall_clock());
    let again = run_round(store, &[instance(1)]).await;
    assert_eq!((again.numbered.head.at, again.began), (round.numbered.head.at, None));
}

async fn epoch_that_agents_have_seen_begins_none(store: &dyn HomeStore) {
    populate(store, 1).await;
    let head = end(store).await;
    for seen_epoch in [1, 2, EPOCH_MAX, u32::MAX] {
        let round = store.round(RoundRequest { seen_epoch, ..RoundRequest::default() }).await.unwrap();
        assert_eq!((round.numbered.head.at, round.began), (head, None));
    }
    assert_eq!(store.history().await.unwrap().begins().len(), 1);
}

async fn a_new_stores_history_begins_with_its_creation(store: &dyn HomeStore) {
    let history = store.history().await.unwrap();
    let head = store.head().await.unwrap();
    let [begin] = history.begins() else { panic!("{history:?}") };
    assert_eq!((begin.cause, begin.after, begin.at), (BeginCause::Created, LogPosition::ZERO, at(1, 0)));
    assert_eq!((begin.incarnation, &begin.evidence), (head.incarnation, &None));
    assert!((wall_clock().0 - begin.time.0).abs() < 60_000_000, "{begin:?}");
    let numbers = [history.store().0, head.incarnation.0, head.token.0, head.round.0];
    assert!(!numbers.contains(&0), "0 stands for none: {numbers:?}");
    assert_eq!(HashSet::from(numbers).len(), 4, "each is drawn for itself");
    assert_eq!(store.row_token(begin.at).await.unwrap(), Some(head.token), "that of its beginning");
    assert_eq!(store.voucher_key().await.unwrap(), store.voucher_key().await.unwrap());
}

async fn every_batch_has_a_token_of_its_own(store: &dyn HomeStore) {
    let beginning = store.head().await.unwrap().token;
    populate(store, 0).await;
    let root_key = store.head().await.unwrap();
    for n in 1..=3 {
        store.create_key(&asking(&format!("req_{n}")), key(n)).await.unwrap();
    }
    let one = store.number(2).await.unwrap().head;
    let other = run_round(store, &[]).await.numbered.head;
    let nothing = run_round(store, &[]).await.numbered.head;
    assert_eq!((nothing.at, nothing.token), (other.at, other.token), "a round without rows has none");
    let drawn = HashSet::from([beginning, root_key.token, one.token, other.token]);
    assert_eq!(drawn.len(), 4);

    let mut tokens = Vec::new();
    for position in 0..=5 {
        tokens.push(store.row_token(at(1, position)).await.unwrap());
    }
    let [beginning, root_key, one, other] = [beginning, root_key.token, one.token, other.token].map(Some);
    assert_eq!(tokens, [beginning, root_key, one, one, other, None]);
    assert_eq!(store.row_token(at(2, 1)).await.unwrap(), None, "another epoch's");
    for (to, token) in [(1, root_key), (3, one), (4, other), (9, other)] {
        let replay = store.replay(1, 1, to, 10).await.unwrap();
        assert!(
            matches!(replay, Replay::Rows { token: last, .. } if Some(last) == token),
            "{to}: {replay:?}"
        );
    }
    let lookup = store.lookup(KeyHash([1; 32])).await.unwrap();
    assert_eq!((lookup.as_of, Some(lookup.token)), (nothing.at, other));
    assert_eq!(lookup.provenance, store.history().await.unwrap().provenance());
}

async fn the_tokens_of_the_last_rounds_are_found(store: &dyn HomeStore) {
    populate(store, 1).await;
    let mut drawn = vec![store.head().await.unwrap().round];
    for _ in 0..3 {
        let round = run_round(store, &[]).await.numbered.head.round;
        assert_eq!(store.head().await.unwrap().round, round);
        drawn.push(round);
    }
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    assert_eq!(store.number(10).await.unwrap().head.round, drawn[3], "numbering alone is no round");
    for token in &drawn {
        assert!(store.has_round_token(*token).await.unwrap());
    }
    assert_eq!(drawn.iter().collect::<HashSet<_>>().len(), 4);
    assert!(!store.has_round_token(RoundToken(drawn[3].0 ^ 1)).await.unwrap());
    assert!(!store.has_round_token(RoundToken::default()).await.unwrap());
}

async fn a_replay_gives_the_range_or_a_prefix_of_it(store: &dyn HomeStore) {
    store.create_root_key(&operator(), root_key()).await.unwrap();
    store.create_api(&actor(), new_api()).await.unwrap();
    for n in 1..=9 {
        store.create_key(&actor(), key(n)).await.unwrap();
    }
    let all = store.number(100).await.unwrap().rows;
    let token = store.head().await.unwrap().token;
    let rows = |from: usize, to: usize| Replay::Rows { rows: all[from - 1..to].to_vec(), token };
    assert_eq!(store.replay(1, 1, 10, 100).await.unwrap(), rows(1, 10));
    assert_eq!(store.replay(1, 4, 6, 100).await.unwrap(), rows(4, 6));
    assert_eq!(store.replay(1, 4, 10, 2).await.unwrap(), rows(4, 5), "a prefix within the limit");
    assert_eq!(store.replay(1, 8, u64::MAX, 100).await.unwrap(), rows(8, 10), "a prefix up to the head");
}

async fn a_replay_that_cannot_begin_is_refused(store: &dyn HomeStore) {
    populate(store, 3).await;
    let head = store.head().await.unwrap();
    let refused = Replay::Refused { head };
    let head = head.at;
    assert_eq!(store.replay(1, 0, 3, 10).await.unwrap(), refused, "there is no position 0");
    assert_eq!(store.replay(1, head.position() + 1, head.position() + 2, 10).await.unwrap(), refused);
    assert_eq!(store.replay(1, u64::MAX, u64::MAX, 10).await.unwrap(), refused);
    assert_eq!(store.replay(2, 1, 3, 10).await.unwrap(), refused, "an epoch that never began");

    let Replay::Rows { rows: old, .. } = store.replay(1, 1, head.position(), 10).await.unwrap() else {
        panic!("{refused:?}")
    };
    let head = store.begin_epoch(&operator()).await.unwrap();
    assert_eq!(store.replay(1, 1, 3, 10).await.unwrap(), Replay::Refused { head }, "an epoch that is over");
    assert_eq!(store.replay(2, 1, 3, 10).await.unwrap(), Replay::Refused { head }, "rows of an older epoch");
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    let Numbered { head, rows: new, .. } = store.number(10).await.unwrap();
    assert_eq!(new[0].position.position(), old.last().unwrap().position.position() + 1);
    let replayed = store.replay(2, new[0].position.position(), u64::MAX, 10).await.unwrap();
    assert_eq!(replayed, Replay::Rows { rows: new, token: head.token });
}

async fn a_lookup_knows_every_state_of_a_key(store: &dyn HomeStore) {
    populate(store, 2).await;
    let soon = StoreTime(wall_clock().0 + 3_600_000_000);
    let keys = [
        NewKey { enabled: false, ..key(3) },
        NewKey { expires_at: Some(StoreTime::from_millis(1)), ..key(4) },
        NewKey { expires_at: Some(soon), name: None, meta: None, ..key(5) },
        NewKey { enabled: false, expires_at: Some(StoreTime::from_millis(1)), ..key(6) },
    ];
    for key in keys {
        store.create_key(&actor(), key).await.unwrap();
    }
    delete(store, 2, DeleteMode::Soft).await.unwrap();

    let Record::Key(active) = store.lookup(KeyHash([1; 32])).await.unwrap().record else { panic!("no key") };
    assert_eq!((active.key_id, active.api_id, active.workspace_id), (key(1).id, api_id(), workspace()));
    assert_eq!((active.state, active.expires_at), (RecordState::Active, None));
    assert_eq!(active.name.as_deref(), Some("billing"));
    assert_eq!(active.meta.as_deref(), Some(r#"{"plan": "pro"}"#), "byte for byte");

    let Record::Key(deleted) = store.lookup(KeyHash([2; 32])).await.unwrap().record else { panic!("no key") };
    assert_eq!((deleted.state, deleted.name, deleted.meta), (RecordState::Deleted, None, None));
    assert_eq!((deleted.key_id, deleted.api_id), (key(2).id, api_id()), "floors must reach it");

    assert_eq!(state(store, 3).await, Some(RecordState::Disabled));
    assert_eq!(state(store, 4).await, Some(RecordState::Expired), "before it is marked");
    assert_eq!(state(store, 5).await, Some(RecordState::Active));
    assert_eq!(state(store, 6).await, Some(RecordState::Disabled), "disabled comes first");
    assert_eq!(state(store, 7).await, None);

    let details = store.key(&workspace(), &key(5).id).await.unwrap().unwrap();
    assert_eq!(details.expires_at.unwrap().as_millis(), soon.as_millis());
    assert_eq!((details.name, details.updated_at), (None, None));
}

async fn a_lookup_finds_root_keys_and_says_how_new_the_answer_is(store: &dyn HomeStore) {
    populate(store, 1).await;
    let lookup = store.lookup(root_key().hash).await.unwrap();
    assert_eq!(lookup.as_of, end(store).await);
    let Record::RootKey(record) = lookup.record else { panic!("no root key") };
    assert_eq!((&record.root_key_id, &record.workspace_id), (&root_key().id, &workspace()));
    assert_eq!(record.state, RecordState::Active);
    assert!(record.allows("api_1", "delete_key") && !record.allows("api_2", "delete_key"));
    assert_eq!(store.root_key(root_key().hash).await.unwrap(), Some(record));
    assert_eq!(store.root_key(KeyHash([1; 32])).await.unwrap(), None, "a key is no root key");
}

async fn expiry_becomes_a_change_once(store: &dyn HomeStore) {
    populate(store, 0).await;
    let past = Some(StoreTime::from_millis(1_000));
    for n in 1..=3 {
        store.create_key(&actor(), NewKey { expires_at: past, ..key(n) }).await.unwrap();
    }
    store.create_key(&actor(), NewKey { expires_at: Some(StoreTime(i64::MAX)), ..key(4) }).await.unwrap();
    delete(store, 3, DeleteMode::Soft).await.unwrap();
    news(store).await;

    assert_eq!(store.expire(1).await.unwrap(), 1);
    assert_eq!(store.expire(10).await.unwrap(), 1);
    assert_eq!(store.expire(10).await.unwrap(), 0, "an end comes once, and not for deleted keys");
    let mut expired = news(store).await;
    expired.sort_by_key(|(scope, _)| *scope != key_scope(1));
    assert_eq!(expired, [(key_scope(1), Cause::Expired), (key_scope(2), Cause::Expired)]);

    let ended = evictd_store::operator::NewRootKey {
        id: KeyId::new("root_2"),
        hash: KeyHash([254; 32]),
        expires_at: past,
        ..root_key()
    };
    store.create_root_key(&operator(), ended).await.unwrap();
    assert_eq!(store.expire(10).await.unwrap(), 1);
    let record = store.root_key(KeyHash([254; 32])).await.unwrap().unwrap();
    assert_eq!(record.state, RecordState::Expired);
}

async fn a_deleted_key_is_not_found_a_second_time(store: &dyn HomeStore) {
    populate(store, 2).await;
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    assert!(matches!(delete(store, 1, DeleteMode::Soft).await, Err(ChangeError::KeyNotFound)));
    assert!(matches!(delete(store, 1, DeleteMode::Permanent).await, Err(ChangeError::KeyNotFound)));
    delete(store, 2, DeleteMode::Permanent).await.unwrap();
    assert!(matches!(delete(store, 2, DeleteMode::Permanent).await, Err(ChangeError::KeyNotFound)));
    assert_eq!(store.key(&workspace(), &key(1).id).await.unwrap(), None);
    assert_eq!(news(store).await, [(key_scope(1), Cause::Deleted), (key_scope(2), Cause::Erased)]);
}

async fn existence_is_judged_before_permission(store: &dyn HomeStore) {
    populate(store, 2).await;
    delete(store, 2, DeleteMode::Soft).await.unwrap();
    let delete =
        |id: KeyId| async move { store.delete_key(&actor(), &id, DeleteMode::Soft, &|_| false).await };
    assert!(matches!(delete(KeyId::new("key_none")).await, Err(ChangeError::KeyNotFound)));
    assert!(matches!(delete(key(2).id).await, Err(ChangeError::KeyNotFound)));
    assert!(matches!(delete(key(1).id).await, Err(ChangeError::Forbidden { api }) if api == api_id()));
    assert_eq!(state(store, 1).await, Some(RecordState::Active));
}

async fn a_permanently_deleted_key_leaves_room_for_the_same_text_anew(store: &dyn HomeStore) {
    populate(store, 1).await;
    delete(store, 1, DeleteMode::Permanent).await.unwrap();
    assert_eq!(state(store, 1).await, None);
    let anew = NewKey { id: KeyId::new("key_anew"), ..key(1) };
    store.create_key(&actor(), anew).await.unwrap();
    assert_eq!(state(store, 1).await, Some(RecordState::Active));
    let scope =
        Scope::Key { hash: KeyHash([1; 32]), key_id: Some(KeyId::new("key_anew")), api_id: Some(api_id()) };
    assert_eq!(news(store).await, [(key_scope(1), Cause::Erased), (scope, Cause::Created)]);
}

async fn a_soft_deleted_key_keeps_its_hash_taken(store: &dyn HomeStore) {
    populate(store, 1).await;
    let same_text = NewKey { id: KeyId::new("key_2"), ..key(1) };
    assert!(matches!(store.create_key(&actor(), same_text.clone()).await, Err(ChangeError::KeyExists)));
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    assert!(matches!(store.create_key(&actor(), same_text).await, Err(ChangeError::KeyExists)));
}

async fn a_deleted_api_is_one_row_and_takes_its_keys_along(store: &dyn HomeStore) {
    populate(store, 3).await;
    assert_eq!(
        store.api(&workspace(), &api_id()).await.unwrap(),
        Some(Api { id: api_id(), name: "payments".to_owned() })
    );
    store.delete_api(&actor(), &api_id()).await.unwrap();
    assert_eq!(news(store).await, [(Scope::Api(api_id()), Cause::Deleted)]);
    assert_eq!(state(store, 1).await, Some(RecordState::Deleted));
    assert_eq!(store.api(&workspace(), &api_id()).await.unwrap(), None);
    assert_eq!(store.key(&workspace(), &key(1).id).await.unwrap(), None);
    assert!(matches!(store.delete_api(&actor(), &api_id()).await, Err(ChangeError::ApiNotFound)));
    assert!(matches!(delete(store, 1, DeleteMode::Soft).await, Err(ChangeError::KeyNotFound)));
    assert!(matches!(store.create_key(&actor(), key(9)).await, Err(ChangeError::ApiNotFound)));
}

async fn another_workspace_sees_nothing_and_changes_nothing(store: &dyn HomeStore) {
    populate(store, 1).await;
    let foreign = WorkspaceId::new("ws_2");
    let stranger = Actor { workspace_id: foreign.clone(), ..actor() };
    let root = evictd_store::operator::NewRootKey {
        id: KeyId::new("root_2"),
        workspace_id: foreign.clone(),
        hash: KeyHash([254; 32]),
        ..root_key()
    };
    store.create_root_key(&operator(), root).await.unwrap();
    assert_eq!(store.key(&foreign, &key(1).id).await.unwrap(), None);
    assert_eq!(store.api(&foreign, &api_id()).await.unwrap(), None);
    let deletion = store.delete_key(&stranger, &key(1).id, DeleteMode::Permanent, &|_| true).await;
    assert!(matches!(deletion, Err(ChangeError::KeyNotFound)));
    assert!(matches!(store.delete_api(&stranger, &api_id()).await, Err(ChangeError::ApiNotFound)));
    assert!(matches!(store.create_key(&stranger, key(2)).await, Err(ChangeError::ApiNotFound)));
    assert_eq!(state(store, 1).await, Some(RecordState::Active));
}

async fn a_refused_change_leaves_no_trace_in_the_log(store: &dyn HomeStore) {
    populate(store, 1).await;
    let twice = NewApi { id: api_id(), name: "again".to_owned() };
    store.create_api(&actor(), twice).await.unwrap_err();
    store.create_key(&actor(), NewKey { hash: KeyHash([2; 32]), ..key(1) }).await.unwrap_err();
    store.create_key(&actor(), key(1)).await.unwrap_err();
    store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| false).await.unwrap_err();
    assert_eq!(news(store).await, []);
}

async fn root_keys_are_listed_newest_first_without_deleted_ones(store: &dyn HomeStore) {
    store.create_root_key(&operator(), root_key()).await.unwrap();
    let listed = store.root_keys().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0].id, &listed[0].start), (&root_key().id, &root_key().start));
    assert_eq!((&listed[0].name, &listed[0].permissions), (&root_key().name, &root_key().permissions));
    assert!(listed[0].enabled);
    let second = evictd_store::operator::NewRootKey {
        id: KeyId::new("root_2"),
        hash: KeyHash([254; 32]),
        ..root_key()
    };
    store.create_root_key(&operator(), second).await.unwrap();
    let listed = store.root_keys().await.unwrap();
    assert_eq!(listed.len(), 2);
    assert!(listed[0].created_at >= listed[1].created_at);
}

async fn changes_are_dated_by_the_stores_clock(store: &dyn HomeStore) {
    populate(store, 1).await;
    let before = wall_clock();
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    let after = wall_clock();
    let rows = store.number(1).await.unwrap().rows;
    assert!(before <= rows[0].committed_at && rows[0].committed_at <= after);
}

async fn the_version_changes_with_every_commit_and_only_then(store: &dyn HomeStore) {
    populate(store, 1).await;
    let version = store.version().await.unwrap();
    store.number(10).await.unwrap();
    store.expire(10).await.unwrap();
    store.lookup(KeyHash([1; 32])).await.unwrap();
    assert_eq!(store.version().await.unwrap(), version, "nothing was committed");
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    assert_ne!(store.version().await.unwrap(), version);
}

async fn the_backlog_counts_what_waits(store: &dyn HomeStore) {
    populate(store, 2).await;
    let before = wall_clock();
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    delete(store, 2, DeleteMode::Soft).await.unwrap();
    let backlog = store.backlog().await.unwrap();
    assert_eq!(backlog.rows, 2);
    assert!(backlog.oldest.as_micros() as i64 <= wall_clock().0 - before.0);
    news(store).await;
    assert_eq!(store.backlog().await.unwrap().rows, 0);
}

async fn triggers_are_in_place(store: &dyn HomeStore) {
    store.check_triggers().await.unwrap();
}

async fn roster_returns_what_changed_since_a_revision(store: &dyn HomeStore) {
    assert_eq!(store.roster(0).await.unwrap().entries, []);
    let seen = run_round(store, &[instance(1), instance(u64::MAX)]).await.clock.store_time;
    let entry = |instance: Instance, last_seen| RosterEntry { instance, last_seen, departed: false };
    let both = [entry(instance(1), seen), entry(instance(u64::MAX), seen)];
    let first = store.roster(0).await.unwrap();
    assert_eq!(first.entries, both);

    run_round(store, &[instance(1)]).await;
    let same = store.roster(first.revision).await.unwrap();
    assert_eq!((same.revision, same.entries), (first.revision, vec![]), "known instances are no news");

    let stale = Instance { policy: PartitionPolicy::ServeStale, ..instance(1) };
    let seen_stale = run_round(store, &[stale.clone(), instance(2)]).await.clock.store_time;
    let second = store.roster(first.revision).await.unwrap();
    assert!(second.revision > first.revision);
    assert_eq!(second.entries, [entry(stale.clone(), seen_stale), entry(instance(2), seen_stale)]);

    let patient = Instance { bound: Duration::from_mins(1), ..stale };
    run_round(store, std::slice::from_ref(&patient)).await;
    let third = store.roster(second.revision).await.unwrap();
    assert_eq!(third.entries.iter().map(|entry| &entry.instance).collect::<Vec<_>>(), [&patient]);
    assert_eq!(store.roster(third.revision).await.unwrap().entries, []);
    assert_eq!(store.roster(0).await.unwrap().entries.len(), 3);
    assert_eq!(store.roster(u64::MAX).await.unwrap().revision, third.revision);
}

async fn an_instance_that_asks_twice_in_one_round_is_as_it_said_last(store: &dyn HomeStore) {
    let stale = Instance { policy: PartitionPolicy::ServeStale, ..instance(1) };
    for presented in [[instance(1), stale.clone()], [stale.clone(), instance(1)]] {
        run_round(store, &presented).await;
        let known = store.roster(0).await.unwrap().entries;
        assert_eq!(known.iter().map(|entry| &entry.instance).collect::<Vec<_>>(), [&presented[1]]);
    }
}

async fn touched_instances_do_not_enter_the_roster(store: &dyn HomeStore) {
    run_round(store, &[instance(1)]).await;
    let before = store.roster(0).await.unwrap();
    let touched = [instance(1).identity, instance(2).identity];
    store.round(RoundRequest { touched: &touched, ..RoundRequest::default() }).await.unwrap();
    assert_eq!(store.roster(0).await.unwrap(), before, "nor is what was just noted written again");
}

async fn instance_is_removed_unless_it_was_seen_since(store: &dyn HomeStore) {
    let seen = run_round(store, &[instance(1), instance(2), instance(3)]).await.clock.store_time;
    let earlier = StoreTime(seen.0 - 1);
    let gone = [(instance(1).identity, seen), (instance(2).identity, earlier), (instance(9).identity, seen)];
    store.remove_instances(&gone).await.unwrap();
    store.remove_instances(&[]).await.unwrap();
    let left = store.roster(0).await.unwrap();
    let identities = |entries: &[RosterEntry]| -> Vec<_> {
        entries.iter().map(|entry| entry.instance.identity.clone()).collect()
    };
    assert_eq!(identities(&left.entries), [instance(2).identity, instance(3).identity]);

    run_round(store, &[instance(1)]).await;
    let back = store.roster(left.revision).await.unwrap();
    assert_eq!(identities(&back.entries), [instance(1).identity], "who comes back is news");
}

async fn departure_is_reported_until_the_instance_returns(store: &dyn HomeStore) {
    run_round(store, &[instance(1), instance(2)]).await;
    let before = store.roster(0).await.unwrap();
    store.mark_departed(&[instance(1).identity, instance(9).identity]).await.unwrap();
    store.mark_departed(&[]).await.unwrap();
    let news = store.roster(before.revision).await.unwrap();
    let [RosterEntry { instance: gone, departed: true, last_seen }] = &news.entries[..] else {
        panic!("{news:?}")
    };
    assert_eq!((gone, *last_seen), (&instance(1), before.entries[0].last_seen));
    assert!(news.revision > before.revision);
    store.mark_departed(&[instance(1).identity]).await.unwrap();
    assert_eq!(store.roster(0).await.unwrap().revision, news.revision, "it is known");

    run_round(store, &[instance(1)]).await;
    let back = store.roster(news.revision).await.unwrap().entries;
    assert!(matches!(&back[..], [RosterEntry { departed: false, .. }]), "{back:?}");
}

async fn numbered_rows_say_which_request_wrote_them(store: &dyn HomeStore) {
    store.create_root_key(&operator(), root_key()).await.unwrap();
    store.create_api(&asking("req_api"), new_api()).await.unwrap();
    store.create_key(&asking("req_b"), key(1)).await.unwrap();
    store.delete_key(&asking("req_a"), &key(1).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    let numbered = store.number(100).await.unwrap();
    let expected = |request: &str, row: usize, cause| NumberedRequest {
        request_id: request.to_owned(),
        workspace_id: workspace(),
        position: numbered.rows[row].position,
        cause,
        committed_at: numbered.rows[row].committed_at,
    };
    let requests = [
        expected("req_operator", 0, Cause::Created),
        expected("req_b", 1, Cause::Created),
        expected("req_a", 2, Cause::Erased),
    ];
    assert_eq!(numbered.rows.len(), 3);
    assert_eq!(numbered.requests, requests);
    assert_eq!(store.number(100).await.unwrap().requests, []);

    store.delete_api(&asking("req_c"), &api_id()).await.unwrap();
    let requests = run_round(store, &[]).await.numbered.requests;
    assert_eq!(requests.iter().map(|request| request.request_id.as_str()).collect::<Vec<_>>(), ["req_c"]);
}

async fn a_request_is_open_until_its_receipt_is_recorded(store: &dyn HomeStore) {
    populate(store, 1).await;
    let recorded = async |request: &str| store.receipt(&workspace(), request).await.unwrap();
    assert_eq!(recorded("req_d").await, None);
    store.delete_key(&asking("req_d"), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let Some(StoredOutcome::Open(waiting)) = recorded("req_d").await else { panic!("it is open") };
    let [OpenRow { position: None, cause: Cause::Deleted, committed_at }] = waiting[..] else {
        panic!("{waiting:?}")
    };
    let row = store.number(100).await.unwrap().requests.remove(0);
    assert_eq!(row.committed_at, committed_at);
    let numbered = OpenRow { position: Some(row.position), cause: Cause::Deleted, committed_at };
    assert_eq!(recorded("req_d").await, Some(StoredOutcome::Open(vec![numbered])));

    let body = "{\"regions\": {\"eu\":  \"confirmed\"}, \"text\": \"\\u0000 \\n ü 🗝\"}";
    store.record_receipts(&[receipt("req_d", row.position, body)]).await.unwrap();
    store.record_receipts(&[]).await.unwrap();
    assert_eq!(
        recorded("req_d").await,
        Some(StoredOutcome::Final { body: body.to_owned() }),
        "byte for byte"
    );
    assert_eq!(
        store.receipt(&WorkspaceId::new("ws_2"), "req_d").await.unwrap(),
        None,
        "another workspace can't read it"
    );
}

async fn request_without_change_differs_from_a_refused_one(store: &dyn HomeStore) {
    store.create_root_key(&operator(), root_key()).await.unwrap();
    store.create_api(&asking("req_api"), new_api()).await.unwrap();
    assert_eq!(store.receipt(&workspace(), "req_api").await.unwrap(), Some(StoredOutcome::Nothing));
    assert_eq!(store.receipt(&WorkspaceId::new("ws_2"), "req_api").await.unwrap(), None);
    store.delete_key(&asking("req_no"), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap_err();
    assert_eq!(store.receipt(&workspace(), "req_no").await.unwrap(), None);
}

async fn the_first_receipt_of_a_request_stays(store: &dyn HomeStore) {
    populate(store, 0).await;
    store.create_key(&asking("req_1"), key(1)).await.unwrap();
    store.create_key(&asking("req_2"), key(2)).await.unwrap();
    let rows = store.number(10).await.unwrap().rows;
    let [one, two] = [rows[0].position, rows[1].position];
    let (first, second) = (receipt("req_1", one, "{\"n\":1}"), receipt("req_1", one, "{\"n\":2}"));
    assert_eq!(store.record_receipts(std::slice::from_ref(&first)).await.unwrap(), HashSet::new());
    let had_one = store.record_receipts(&[second, receipt("req_2", two, "{}")]).await.unwrap();
    assert_eq!(had_one, HashSet::from(["req_1".to_owned()]));
    let recorded = async |request: &str| store.receipt(&workspace(), request).await.unwrap();
    assert_eq!(recorded("req_1").await, Some(StoredOutcome::Final { body: first.body }));
    assert_eq!(
        recorded("req_2").await,
        Some(StoredOutcome::Final { body: "{}".to_owned() }),
        "the others are kept"
    );
}

async fn receipts_are_recorded_together_or_not_at_all(store: &dyn HomeStore) {
    populate(store, 2).await;
    let before = end(store).await;
    store.delete_key(&asking("req_d"), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    store.delete_key(&asking("req_e"), &key(2).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let rows = store.number(10).await.unwrap().rows;
    let half = [receipt("req_d", rows[0].position, "{}"), receipt("req_e", rows[1].position, "not JSON")];
    store.record_receipts(&half).await.unwrap_err();
    assert!(matches!(store.receipt(&workspace(), "req_d").await.unwrap(), Some(StoredOutcome::Open(_))));
    assert_eq!(store.open_requests(before, 10).await.unwrap().len(), 2);
}

async fn receipt_of_a_change_that_was_lost_is_not_kept(store: &dyn HomeStore) {
    populate(store, 1).await;
    let lost = end(store).await.next().unwrap();
    let receipts = [receipt("req_lost", lost, "{}"), receipt("req_1", lost, "{}")];
    let not_kept = store.record_receipts(&receipts).await.unwrap();
    assert_eq!(not_kept, HashSet::from(["req_lost".to_owned(), "req_1".to_owned()]));
    assert_eq!(store.receipt(&workspace(), "req_lost").await.unwrap(), None);
    // Another change is at that position meanwhile.
    store.delete_key(&asking("req_new"), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    assert_eq!(store.number(10).await.unwrap().head.at, lost);
    store.record_receipts(&receipts).await.unwrap();
    assert_eq!(store.receipt(&workspace(), "req_lost").await.unwrap(), None);
}

async fn open_requests_are_those_numbered_and_without_a_receipt(store: &dyn HomeStore) {
    store.create_root_key(&operator(), root_key()).await.unwrap();
    store.create_api(&asking("req_api"), new_api()).await.unwrap();
    for n in 1..=5 {
        store.create_key(&asking(&format!("req_{n}")), key(n)).await.unwrap();
    }
    assert_eq!(
        store.open_requests(LogPosition::ZERO, 10).await.unwrap(),
        [],
        "what waits comes with its number"
    );
    let requests = store.number(100).await.unwrap().requests;
    assert_eq!(requests.len(), 6, "the root key's is one");
    assert_eq!(store.open_requests(LogPosition::ZERO, 10).await.unwrap(), requests);
    assert_eq!(store.open_requests(LogPosition::ZERO, 2).await.unwrap(), requests[..2]);
    assert_eq!(store.open_requests(requests[1].position, 2).await.unwrap(), requests[2..4]);

    let done: Vec<FinalReceipt> =
        requests[1..4].iter().map(|row| receipt(&row.request_id, row.position, "{}")).collect();
    store.record_receipts(&done).await.unwrap();
    let open = store.open_requests(LogPosition::ZERO, 10).await.unwrap();
    assert_eq!(open, [requests[0].clone(), requests[4].clone(), requests[5].clone()]);
    assert_eq!(store.open_requests(LogPosition::NEVER, 10).await.unwrap(), []);
}

async fn open_requests_go_on_through_a_new_epoch(store: &dyn HomeStore) {
    populate(store, 2).await;
    let old = at(1, 1_000); // As far as a publisher got before the store was put back.
    let head = store.begin_epoch(&operator()).await.unwrap().at;
    store.delete_key(&asking("req_d"), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let requests = store.number(10).await.unwrap().requests;
    assert!(requests[0].position > head && requests[0].position.position() < old.position());
    assert_eq!(store.open_requests(old, 10).await.unwrap(), requests);
}

async fn an_operators_new_epoch_goes_on_from_the_head(store: &dyn HomeStore) {
    populate(store, 2).await;
    let before = store.head().await.unwrap();
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    let began = store.begin_epoch(&operator()).await.unwrap();
    assert_eq!(began.at, at(2, before.at.position()));
    assert!(began.incarnation != before.incarnation && began.token != before.token);
    assert_eq!(store.head().await.unwrap(), began);
    assert_eq!(store.row_token(began.at).await.unwrap(), Some(began.token), "that of its beginning");
    assert_eq!(store.row_token(before.at).await.unwrap(), Some(before.token));
    let Numbered { head, rows, .. } = store.number(10).await.unwrap();
    assert_eq!(rows[0].position, at(2, began.at.position() + 1), "what waited belongs to the new epoch");
    let refused = Replay::Refused { head };
    assert_eq!(store.replay(1, 1, 2, 10).await.unwrap(), refused, "agents of the old one start over");
    assert_eq!(run_round(store, &[]).await.began, None);
    assert!(!store.roster(0).await.unwrap().is_complete);

    let by = operator();
    let (here, there) = tokio::join!(store.begin_epoch(&by), store.begin_epoch(&by));
    let mut began = [here.unwrap().at.epoch(), there.unwrap().at.epoch()];
    began.sort_unstable();
    assert_eq!(began, [3, 4], "each operator's command is one epoch");
}

async fn declared_epoch_is_part_of_the_history(store: &dyn HomeStore) {
    let known = Milestone {
        provenance: store.history().await.unwrap().provenance(),
        at: at(1, 0),
        token: store.head().await.unwrap().token,
    };
    populate(store, 2).await;
    let before = end(store).await;
    let began = store.begin_epoch(&operator()).await.unwrap();
    let history = store.history().await.unwrap();
    let [_, begin] = history.begins() else { panic!("{history:?}") };
    assert_eq!(begin.incarnation, began.incarnation);
    assert_eq!((begin.after, begin.at), (before, began.at));
    assert_eq!((begin.cause, begin.evidence.as_deref()), (BeginCause::Declared, Some("ops")));
    assert_eq!(store.lookup(KeyHash([1; 32])).await.unwrap().provenance, history.provenance());

    let judge = |at| history.judge(&Milestone { at, ..known }, began.at);
    assert_eq!(judge(known.at), Past::Known);
    assert_eq!(judge(before), Past::Known);
    assert_eq!(judge(before.next().unwrap()), Past::Superseded, "it was lost, which the operator knows");
}

/// A key as it should be read back, but for its times.
async fn details(store: &dyn HomeStore, n: u8) -> KeyDetails {
    store.key(&workspace(), &key(n).id).await.unwrap().unwrap()
}

async fn update(store: &dyn HomeStore, n: u8, update: KeyUpdate) -> Result<(), ChangeError> {
    store.update_key(&actor(), &key(n).id, update, &|_| true).await
}

/// NUL as JSON writes it is text like any other, on PostgreSQL too.
const NUL_IN_META: &str = r#"{"a\u0000":  {"b": "\u0000"}}"#;

async fn an_update_changes_what_it_names_and_nothing_else(store: &dyn HomeStore) {
    populate(store, 1).await;
    let before = details(store, 1).await;
    assert_eq!(before.updated_at, None);
    let rights = vec!["docs.delete".to_owned()];
    let change = KeyUpdate {
        name: Edit::Set("reports".to_owned()),
        meta: Edit::Clear,
        permissions: Some(rights.clone()),
        ..KeyUpdate::default()
    };
    update(store, 1, change).await.unwrap();
    let after = details(store, 1).await;
    assert!(after.updated_at.is_some());
    let expected = KeyDetails {
        name: Some("reports".to_owned()),
        meta: None,
        permissions: rights,
        updated_at: after.updated_at,
        ..before
    };
    assert_eq!(after, expected);

    let change = KeyUpdate {
        name: Edit::Clear,
        meta: Edit::Set(NUL_IN_META.to_owned()),
        external_id: Edit::Clear,
        enabled: Some(false),
        ..KeyUpdate::default()
    };
    update(store, 1, change).await.unwrap();
    let after = details(store, 1).await;
    assert_eq!((after.name, after.meta.as_deref(), after.external_id), (None, Some(NUL_IN_META), None));
    assert_eq!(state(store, 1).await, Some(RecordState::Disabled));
    assert_eq!(news(store).await, [(key_scope(1), Cause::Changed), (key_scope(1), Cause::Changed)]);
}

async fn an_end_in_the_future_makes_an_expired_key_live_again(store: &dyn HomeStore) {
    populate(store, 1).await;
    let ends = |end| KeyUpdate { expires_at: end, ..KeyUpdate::default() };
    update(store, 1, ends(Edit::Set(StoreTime::from_millis(1)))).await.unwrap();
    assert_eq!(state(store, 1).await, Some(RecordState::Expired));
    assert_eq!(store.expire(10).await.unwrap(), 0, "the change said it already");
    update(store, 1, ends(Edit::Set(StoreTime::from_millis(4_102_444_800_000)))).await.unwrap();
    assert_eq!(state(store, 1).await, Some(RecordState::Active));
    update(store, 1, ends(Edit::Set(StoreTime::from_millis(1)))).await.unwrap();
    update(store, 1, ends(Edit::Clear)).await.unwrap();
    assert_eq!(state(store, 1).await, Some(RecordState::Active));
    assert_eq!(details(store, 1).await.expires_at, None);
}

async fn update_that_changes_nothing_is_not_logged(store: &dyn HomeStore) {
    populate(store, 1).await;
    let same = KeyUpdate { name: Edit::Set("billing".to_owned()), ..KeyUpdate::default() };
    store.update_key(&asking("req_same"), &key(1).id, same, &|_| true).await.unwrap();
    assert_eq!(news(store).await, []);
    assert_eq!(store.receipt(&workspace(), "req_same").await.unwrap(), Some(StoredOutcome::Nothing));
}

fn reroll(n: u8, grace: Duration) -> Reroll {
    let NewKey { id, hash, start, .. } = key(n + 100);
    Reroll { key: key(n).id, grace, new_id: id, hash, start }
}

async fn rerolled_key_expires_and_the_new_one_has_its_settings(store: &dyn HomeStore) {
    populate(store, 1).await;
    let old = details(store, 1).await;
    store.reroll_key(&actor(), reroll(1, Duration::ZERO), &|_| true).await.unwrap();
    assert_eq!(state(store, 1).await, Some(RecordState::Expired));
    assert_eq!(state(store, 101).await, Some(RecordState::Active));
    let new = details(store, 101).await;
    let expected = KeyDetails { id: key(101).id, start: key(101).start, created_at: new.created_at, ..old };
    assert_eq!(new, expected);
    let mut logged = news(store).await;
    logged.sort_by_key(|(_, cause)| cause.label());
    assert_eq!(logged, [(key_scope(101), Cause::Created), (key_scope(1), Cause::Expired)]);

    let taken = Reroll { key: key(101).id, new_id: KeyId::new("key_third"), ..reroll(1, Duration::ZERO) };
    let refused = store.reroll_key(&actor(), taken, &|_| true).await;
    assert!(matches!(refused, Err(ChangeError::KeyExists)), "the text is another key's");
}

async fn rerolled_key_ends_with_its_minute_or_earlier(store: &dyn HomeStore) {
    populate(store, 2).await;
    let grace = Duration::from_hours(1);
    let before = wall_clock();
    store.reroll_key(&actor(), reroll(1, grace), &|_| true).await.unwrap();
    let end = details(store, 1).await.expires_at.unwrap();
    assert_eq!(state(store, 1).await, Some(RecordState::Active));
    assert_eq!(end.as_millis() % 60_000, 0);
    let (least, most) = (before.as_millis() + 3_600_000, wall_clock().as_millis() + 3_660_000);
    assert!((least..=most).contains(&end.as_millis()), "{least} <= {end:?} <= {most}");

    let soon = StoreTime::from_millis(before.as_millis() + 1_800_000);
    let ends = KeyUpdate { expires_at: Edit::Set(soon), ..KeyUpdate::default() };
    update(store, 2, ends).await.unwrap();
    store.reroll_key(&actor(), reroll(2, grace), &|_| true).await.unwrap();
    assert_eq!(details(store, 2).await.expires_at, Some(soon), "grace takes away and never gives");
}

async fn updates_and_rerolls_judge_existence_before_permission(store: &dyn HomeStore) {
    populate(store, 2).await;
    delete(store, 2, DeleteMode::Soft).await.unwrap();
    news(store).await;
    let stranger = Actor { workspace_id: WorkspaceId::new("ws_2"), ..actor() };
    for (who, n) in [(&stranger, 1), (&actor(), 2), (&actor(), 9)] {
        let updated = store.update_key(who, &key(n).id, KeyUpdate::default(), &|_| false).await;
        assert!(matches!(updated, Err(ChangeError::KeyNotFound)), "{n}: {updated:?}");
        let rerolled = store.reroll_key(who, reroll(n, Duration::ZERO), &|_| false).await;
        assert!(matches!(rerolled, Err(ChangeError::KeyNotFound)), "{n}: {rerolled:?}");
    }
    let updated = store.update_key(&actor(), &key(1).id, KeyUpdate::default(), &|_| false).await;
    assert!(matches!(updated, Err(ChangeError::Forbidden { .. })));
    let rerolled = store.reroll_key(&actor(), reroll(1, Duration::ZERO), &|_| false).await;
    assert!(matches!(rerolled, Err(ChangeError::Forbidden { .. })));
    assert_eq!(news(store).await, []);
}

async fn keys_are_listed_page_by_page_without_deleted_ones(store: &dyn HomeStore) {
    populate(store, 5).await;
    delete(store, 3, DeleteMode::Soft).await.unwrap();
    let other = KeyUpdate { external_id: Edit::Set("customer-2".to_owned()), ..KeyUpdate::default() };
    update(store, 4, other).await.unwrap();
    let list = async |external_id: Option<&str>, from, limit| {
        let external_id = external_id.map(str::to_owned);
        let list = KeyQuery { api_id: api_id(), external_id, from, limit };
        let page = store.list_keys(&workspace(), list).await.unwrap().unwrap();
        (page.keys.iter().map(|key| key.id.to_string()).collect::<Vec<_>>(), page.next)
    };
    let first = list(None, None, 2).await;
    assert_eq!(first, (vec!["key_1".to_owned(), "key_2".to_owned()], Some(KeyId::new("key_4"))));
    let second = list(None, first.1, 2).await;
    assert_eq!(second, (vec!["key_4".to_owned(), "key_5".to_owned()], None));
    assert_eq!(list(Some("customer-2"), None, 100).await.0, ["key_4"]);
    assert_eq!(list(Some("customer-none"), None, 100).await.0, [""; 0]);
    let one = KeyQuery { api_id: api_id(), external_id: None, from: None, limit: 1 };
    let page = store.list_keys(&workspace(), one.clone()).await.unwrap().unwrap();
    assert_eq!(page.keys, [details(store, 1).await]);

    let nowhere = KeyQuery { api_id: evictd_core::ids::ApiId::new("api_none"), ..one.clone() };
    assert_eq!(store.list_keys(&workspace(), nowhere).await.unwrap(), None);
    assert_eq!(store.list_keys(&WorkspaceId::new("ws_2"), one).await.unwrap(), None);
}

async fn a_protected_api_is_not_deleted_until_that_is_lifted(store: &dyn HomeStore) {
    populate(store, 1).await;
    assert!(store.protect_api(&operator(), &api_id(), true).await.unwrap());
    assert!(matches!(store.delete_api(&actor(), &api_id()).await, Err(ChangeError::Protected)));
    assert_eq!(state(store, 1).await, Some(RecordState::Active));
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    assert!(store.protect_api(&operator(), &api_id(), false).await.unwrap());
    store.delete_api(&actor(), &api_id()).await.unwrap();
    assert!(!store.protect_api(&operator(), &api_id(), true).await.unwrap(), "it is gone");
}

async fn a_revoked_root_key_is_an_invalidation_like_any_other(store: &dyn HomeStore) {
    populate(store, 0).await;
    let root = root_key();
    assert!(store.revoke_root_key(&operator(), &root.id).await.unwrap());
    let record = store.root_key(root.hash).await.unwrap().unwrap();
    assert_eq!(record.state, RecordState::Deleted);
    let scope = Scope::Key { hash: root.hash, key_id: Some(root.id.clone()), api_id: None };
    assert_eq!(news(store).await, [(scope, Cause::Deleted)]);
    assert!(!store.revoke_root_key(&operator(), &root.id).await.unwrap());
    assert!(!store.revoke_root_key(&operator(), &KeyId::new("root_none")).await.unwrap());
    assert_eq!(news(store).await, []);
}

async fn audited(store: &dyn HomeStore, query: AuditQuery) -> Vec<String> {
    let records = store.audit(&AuditQuery { limit: 100, ..query }).await.unwrap();
    records.into_iter().rev().map(|record| record.description).collect()
}

async fn every_change_has_its_audit_record(store: &dyn HomeStore) {
    populate(store, 3).await;
    update(store, 1, KeyUpdate { enabled: Some(false), ..KeyUpdate::default() }).await.unwrap();
    store.reroll_key(&actor(), reroll(2, Duration::ZERO), &|_| true).await.unwrap();
    delete(store, 1, DeleteMode::Soft).await.unwrap();
    delete(store, 3, DeleteMode::Permanent).await.unwrap();
    delete(store, 3, DeleteMode::Permanent).await.unwrap_err();
    store.protect_api(&operator(), &api_id(), true).await.unwrap();
    store.delete_api(&actor(), &api_id()).await.unwrap_err();
    store.protect_api(&operator(), &api_id(), false).await.unwrap();
    store.delete_api(&actor(), &api_id()).await.unwrap();
    store.revoke_root_key(&operator(), &root_key().id).await.unwrap();
    let mut expected = vec!["Created root key root_1", "Created API api_1"];
    expected.extend(["Created key key_1 in API api_1", "Created key key_2 in API api_1"]);
    expected.extend(["Created key key_3 in API api_1", "Updated key key_1", "Rerolled key key_2 to key_102"]);
    expected.extend(["Deleted key key_1", "Permanently deleted key key_3", "Protected API api_1"]);
    expected.extend(["Lifted the protection of API api_1", "Deleted API api_1", "Revoked root key root_1"]);
    assert_eq!(audited(store, AuditQuery::default()).await, expected);

    let all = store.audit(&AuditQuery { limit: 100, ..AuditQuery::default() }).await.unwrap();
    let mut expected =
        vec!["root_key.create", "api.create", "key.create", "key.create", "key.create", "key.update"];
    expected.extend(["key.reroll", "key.delete", "key.delete", "api.update", "api.update", "api.delete"]);
    expected.push("root_key.delete");
    assert_eq!(all.iter().rev().map(|record| &*record.event).collect::<Vec<_>>(), expected);
    let erased = all.iter().find(|record| record.description.starts_with("Permanently deleted")).unwrap();
    assert_eq!(erased.targets, [AuditTarget { kind: "key".to_owned(), id: "key_3".to_owned() }]);
    for record in all.iter().filter(|record| record.actor_type == "rootkey") {
        let author = (&*record.actor_id, record.actor_name.as_deref(), record.request_id.as_deref());
        assert_eq!(author, ("root_1", Some("ops"), Some("req_1")), "{record:?}");
    }

    let newest = store.audit(&AuditQuery { limit: 2, ..AuditQuery::default() }).await.unwrap();
    let [by_operator, by_root_key] = &newest[..] else { panic!("{newest:?}") };
    assert_eq!((&*by_operator.actor_type, &*by_operator.actor_id), ("system", "ops"));
    assert_eq!(by_operator.request_id.as_deref(), Some("req_operator"));
    assert_eq!((&*by_operator.event, &*by_root_key.event), ("root_key.delete", "api.delete"));
    assert_eq!((&*by_root_key.actor_type, &*by_root_key.actor_id), ("rootkey", "root_1"));
    assert_eq!(by_root_key.actor_name.as_deref(), Some("ops"));
    assert_eq!(by_root_key.remote_ip.as_deref(), Some("192.0.2.1"));
    assert_eq!((by_root_key.peer_ip.as_deref(), by_operator.peer_ip.as_deref()), (Some("10.0.0.1"), None));
    assert_eq!(by_root_key.user_agent.as_deref(), Some("test"));
    assert_eq!(by_root_key.workspace_id, Some(workspace()));
    assert!(by_root_key.event_id.starts_with("log_"));
}

async fn audit_records_are_found_by_what_was_changed(store: &dyn HomeStore) {
    populate(store, 2).await;
    store.delete_key(&asking("req_d"), &key(2).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    let of_key = AuditQuery { target: Some("key_2".to_owned()), ..AuditQuery::default() };
    let descriptions = ["Created key key_2 in API api_1", "Permanently deleted key key_2"];
    assert_eq!(audited(store, of_key).await, descriptions);
    let of_request = AuditQuery { request_id: Some("req_d".to_owned()), ..AuditQuery::default() };
    assert_eq!(audited(store, of_request).await, descriptions[1..]);
    let of_another = AuditQuery { workspace_id: Some(WorkspaceId::new("ws_2")), ..AuditQuery::default() };
    assert_eq!(audited(store, of_another).await, [""; 0]);
    let later = StoreTime(wall_clock().0 + 60_000_000);
    assert_eq!(audited(store, AuditQuery { since: Some(later), ..AuditQuery::default() }).await, [""; 0]);
}

/// Keeps nothing for any time.
const EVERYTHING: Purge = Purge { log: Duration::ZERO, receipts: Duration::ZERO, audit: None, limit: 100 };

async fn old_rows_are_purged_from_the_beginning_of_the_log_only(store: &dyn HomeStore) {
    populate(store, 2).await;
    let head = store.number(10).await.unwrap().head;
    let end = head.at.position();
    let open = store.open_requests(LogPosition::ZERO, 10).await.unwrap();
    assert_eq!(open.len() as u64, end, "each change was a request");
    assert_eq!(store.purge(EVERYTHING).await.unwrap(), Purged::default(), "no receipt is final yet");

    let done: Vec<_> = [0, 2].map(|n| receipt(&open[n].request_id, open[n].position, "{}")).into();
    // The second one belongs to every row that the same request wrote.
    store.record_receipts(&done[..1]).await.unwrap();
    let rows = store.open_requests(LogPosition::ZERO, 10).await.unwrap();
    let gone = store.purge(Purge { receipts: Duration::MAX, ..EVERYTHING }).await.unwrap();
    assert_eq!(gone, Purged { log: open.len() as u64 - rows.len() as u64, ..Purged::default() });
    assert!(gone.log > 0);
    let replayed = store.replay(1, 1, end, 10).await.unwrap();
    assert_eq!(replayed, Replay::Refused { head }, "what is gone is never passed over");
    let rest = store.replay(1, gone.log + 1, end, 10).await.unwrap();
    assert!(matches!(rest, Replay::Rows { rows: kept, .. } if kept.len() == rows.len()));

    store.delete_key(&asking("req_d"), &key(2).id, DeleteMode::Soft, &|_| true).await.unwrap();
    assert_eq!(store.backlog().await.unwrap().rows, 1);
    store.purge(EVERYTHING).await.unwrap();
    assert_eq!(store.backlog().await.unwrap().rows, 1, "what waits for its number stays");
    let next = store.number(10).await.unwrap();
    assert_eq!(next.rows[0].position.position(), end + 1);
}

async fn a_receipt_that_was_purged_is_not_taken_for_none(store: &dyn HomeStore) {
    populate(store, 1).await;
    store.delete_key(&asking("req_d"), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let position = store.number(10).await.unwrap().head.at;
    let done = FinalReceipt { final_at: wall_clock(), ..receipt("req_d", position, "{}") };
    store.record_receipts(&[done]).await.unwrap();
    assert!(matches!(store.receipt(&workspace(), "req_d").await.unwrap(), Some(StoredOutcome::Final { .. })));
    let purged = store.purge(EVERYTHING).await.unwrap();
    assert_eq!(purged.receipts, 1);
    let outcome = store.receipt(&workspace(), "req_d").await.unwrap();
    assert!(!matches!(outcome, Some(StoredOutcome::Nothing)), "{outcome:?}");
    assert_eq!(audited(store, AuditQuery::default()).await.len(), 4, "its audit record stays");
    let all = Purge { audit: Some(Duration::ZERO), ..EVERYTHING };
    assert_eq!(store.purge(all).await.unwrap().audit, 4);
}
