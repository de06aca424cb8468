//! Changes run side by side, and each finds what the others left.

use std::sync::Arc;

use evictd_core::ids::{KeyHash, KeyId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::record::Record;
use evictd_store::change::{ChangeError, DeleteMode, Edit, KeyUpdate, NewKey, Reroll};
use evictd_store::log::{Replay, RoundRequest};
use evictd_store::postgres::PostgresStore;
use evictd_store::{ChangeStore, HomeStore, LogStore, ReceiptStore, RecordStore, RosterStore};
use sqlx::Executor;

use super::{connect, populated, stranger, wait_for_waiters};
use crate::fixture::{actor, api_id, asking, key, news, workspace};

/// What becomes of the same change, made by `count` callers at once.
async fn all<T: Send + 'static>(
    count: usize,
    change: impl Fn(usize) -> tokio::task::JoinHandle<T>,
) -> Vec<T> {
    let changes: Vec<_> = (0..count).map(change).collect();
    let mut outcomes = Vec::new();
    for change in changes {
        outcomes.push(change.await.unwrap());
    }
    outcomes
}

async fn store_with(keys: u8) -> Arc<PostgresStore> {
    let fixture = populated(keys).await;
    fixture.store.close().await;
    Arc::new(connect(&fixture.url).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_hundred_deletions_of_one_key_exactly_one_succeeds() {
    for mode in [DeleteMode::Soft, DeleteMode::Permanent] {
        let store = store_with(1).await;
        let outcomes = all(100, |n| {
            let store = store.clone();
            tokio::spawn(async move {
                store.delete_key(&asking(&format!("req_{n}")), &key(1).id, mode, &|_| true).await
            })
        })
        .await;
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{mode:?}");
        let refused = outcomes.iter().filter(|outcome| matches!(outcome, Err(ChangeError::KeyNotFound)));
        assert_eq!(refused.count(), 99, "{mode:?}");
        assert_eq!(news(&*store).await.len(), 1);
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_keys_with_one_text_exactly_one_is_created() {
    let store = store_with(0).await;
    let outcomes = all(40, |n| {
        let (store, id) = (store.clone(), KeyId::new(format!("key_{n}")));
        tokio::spawn(async move { store.create_key(&actor(), NewKey { id, ..key(1) }).await })
    })
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(outcomes.iter().filter(|outcome| matches!(outcome, Err(ChangeError::KeyExists))).count(), 39);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_created_in_an_api_that_is_deleted_meanwhile() {
    let fixture = populated(1).await;
    let store = Arc::new(connect(&fixture.url).await);
    let server = evictd_postgres_server::shared().unwrap();

    // A creation that has found its API goes first.
    let mut gate = stranger(&fixture.url).await;
    gate.execute("BEGIN; LOCK TABLE keys IN EXCLUSIVE MODE").await.unwrap();
    let creation = tokio::spawn({
        let store = store.clone();
        async move { store.create_key(&actor(), key(2)).await }
    });
    wait_for_waiters(server, &fixture.url, 1);
    let deletion = tokio::spawn({
        let store = store.clone();
        async move { store.delete_api(&actor(), &api_id()).await }
    });
    wait_for_waiters(server, &fixture.url, 2);
    gate.execute("COMMIT").await.unwrap();
    creation.await.unwrap().unwrap();
    deletion.await.unwrap().unwrap();
    let causes: Vec<_> = news(&*store).await.into_iter().map(|(_, cause)| cause).collect();
    assert_eq!(causes, [Cause::Created, Cause::Deleted]);

    // And one that waited for the deletion finds none.
    gate.execute("UPDATE apis SET deleted_at_m = NULL").await.unwrap();
    gate.execute("BEGIN; SELECT FROM apis FOR UPDATE; UPDATE apis SET deleted_at_m = 1").await.unwrap();
    let outcomes = all(3, |n| {
        let store = store.clone();
        let reroll = Reroll {
            key: key(1).id,
            grace: std::time::Duration::ZERO,
            new_id: KeyId::new("key_new"),
            hash: KeyHash([77; 32]),
            start: "abcd".to_owned(),
        };
        tokio::spawn(async move {
            match n {
                0 => store.create_key(&actor(), key(3)).await,
                1 => store.reroll_key(&actor(), reroll, &|_| true).await,
                _ => store.delete_api(&actor(), &api_id()).await,
            }
        })
    });
    let (outcomes, ()) = tokio::join!(outcomes, async {
        wait_for_waiters(server, &fixture.url, 3);
        gate.execute("COMMIT").await.unwrap();
    });
    assert!(
        matches!(
            outcomes[..],
            [Err(ChangeError::ApiNotFound), Err(ChangeError::KeyNotFound), Err(ChangeError::ApiNotFound)]
        ),
        "{outcomes:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_of_different_properties_at_once_are_all_kept() {
    let store = store_with(1).await;
    let updates = [
        KeyUpdate { name: Edit::Set("other".to_owned()), ..KeyUpdate::default() },
        KeyUpdate { external_id: Edit::Clear, ..KeyUpdate::default() },
        KeyUpdate { enabled: Some(false), ..KeyUpdate::default() },
        KeyUpdate { permissions: Some(vec!["docs.read".to_owned()]), ..KeyUpdate::default() },
    ];
    let outcomes = all(40, |n| {
        let (store, update) = (store.clone(), updates[n % 4].clone());
        tokio::spawn(async move { store.update_key(&actor(), &key(1).id, update, &|_| true).await })
    })
    .await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let Record::Key(record) = store.lookup(KeyHash([1; 32])).await.unwrap().record else { panic!("a key") };
    assert_eq!((record.name.as_deref(), record.external_id), (Some("other"), None));
    assert_eq!(record.permissions, ["docs.read".into()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_of_different_keys_need_not_wait_for_each_other() {
    let store = store_with(8).await;
    let gates = Arc::new(tokio::sync::Barrier::new(8));
    // Each is in the middle of its transaction when all the others are.
    let outcomes = all(8, |n| {
        let (store, gates) = (store.clone(), gates.clone());
        tokio::spawn(async move {
            let permission = tokio::runtime::Handle::current();
            let all_are_here = move |_: &_| {
                tokio::task::block_in_place(|| permission.block_on(gates.wait()));
                true
            };
            store.delete_key(&actor(), &key(n as u8 + 1).id, DeleteMode::Soft, &all_are_here).await
        })
    })
    .await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(news(&*store).await.len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_wait_neither_for_lookups_nor_for_the_control_api() {
    let fixture = populated(2).await;
    fixture.store.close().await;
    let mut options = super::options(&fixture.url);
    options.connections = 9;
    let store = Arc::new(PostgresStore::connect(options).await.unwrap());
    let server = evictd_postgres_server::shared().unwrap();
    let mut gate = stranger(&fixture.url).await;
    gate.execute("BEGIN; LOCK TABLE keys, root_keys IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let stuck: Vec<_> = (0..30)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                match n % 3 {
                    0 => drop(store.lookup(KeyHash([1; 32])).await.unwrap()),
                    1 => drop(store.key(&workspace(), &key(1).id).await.unwrap()),
                    _ => store.create_key(&actor(), key(n + 10)).await.unwrap(),
                }
            })
        })
        .collect();
    wait_for_waiters(server, &fixture.url, 3);
    store.round(RoundRequest::default()).await.unwrap();
    store.number(10).await.unwrap();
    assert!(matches!(store.replay(1, 1, 2, 10).await.unwrap(), Replay::Rows { rows, .. } if rows.len() == 2));
    assert_eq!(store.roster(0).await.unwrap().entries, []);
    store.open_requests(evictd_core::position::LogPosition::ZERO, 10).await.unwrap();
    gate.execute("COMMIT").await.unwrap();
    for task in stuck {
        task.await.unwrap();
    }
    assert!(news(&*store).await.iter().all(|(scope, _)| matches!(scope, Scope::Key { .. })));
}
