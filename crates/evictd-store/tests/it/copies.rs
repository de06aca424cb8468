//! R15: copies of an SQLite file, put back or started beside the one that goes on.

use std::path::Path;

use evictd_core::history::{BeginCause, Past};
use evictd_store::change::DeleteMode;
use evictd_store::sqlite::SqliteStore;
use evictd_store::{ChangeStore, HomeStore, LogStore, OperatorStore, RosterStore};

use crate::fixture::{actor, end, judgment, key, milestone, operator, populate, run_round};

async fn publisher(path: &Path) -> SqliteStore {
    SqliteStore::open_exclusively(path).await.unwrap()
}

/// Changes something and gives it a position.
async fn go_on(store: &SqliteStore, deleted: u8) {
    store.delete_key(&actor(), &key(deleted).id, DeleteMode::Soft, &|_| true).await.unwrap();
    store.number(usize::MAX).await.unwrap();
}

/// A store with records in `directory`, and a copy of it from a time when no process had it open.
async fn copied(directory: &Path) -> [std::path::PathBuf; 2] {
    let [path, copy] = ["home.db", "copy.db"].map(|name| directory.join(name));
    let store = publisher(&path).await;
    populate(&store, 3).await;
    run_round(&store, &[]).await;
    store.close().await;
    std::fs::copy(&path, &copy).unwrap();
    [path, copy]
}

#[tokio::test]
async fn a_publishers_opening_begins_an_incarnation_a_tools_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    let first = publisher(&path).await;
    populate(&first, 2).await;
    let before = first.head().await.unwrap();
    let past = milestone(&first).await;
    let tool = SqliteStore::open(&path).await.unwrap();
    assert_eq!(tool.head().await.unwrap(), before);
    tool.close().await;
    first.close().await;

    let second = publisher(&path).await;
    let now = second.head().await.unwrap();
    assert_eq!((now.at, now.token, now.round), (before.at, before.token, before.round));
    assert!(second.roster(0).await.unwrap().is_complete);
    let history = second.history().await.unwrap();
    let [created, opened, again] = history.begins() else { panic!("{history:?}") };
    assert_eq!(
        [created.cause, opened.cause, again.cause],
        [BeginCause::Created, BeginCause::Opened, BeginCause::Opened]
    );
    assert_eq!((opened.incarnation, again.incarnation), (before.incarnation, now.incarnation));
    assert_eq!((again.after, again.at), (before.at, before.at));
    assert_eq!(judgment(&second, &past).await, Past::Known, "a restart costs no flush");
    second.close().await;
}

/// Failure: a restored file gives positions out again, catches up with what agents have seen, and takes its new rows
/// for old news.
#[tokio::test]
async fn a_file_that_is_put_back_does_not_know_what_it_lost() {
    let directory = tempfile::tempdir().unwrap();
    let [path, copy] = copied(directory.path()).await;
    let store = publisher(&path).await;
    let opened = milestone(&store).await;
    go_on(&store, 1).await;
    let lost = milestone(&store).await;
    let lost_round = run_round(&store, &[]).await.numbered.head.round;
    store.close().await;

    std::fs::copy(&copy, &path).unwrap();
    let store = publisher(&path).await;
    assert_eq!(end(&store).await.epoch(), 1, "to undo deletions is an operator's decision");
    assert!(!store.has_round_token(lost_round).await.unwrap());
    for deleted in [2, 3] {
        assert_eq!(judgment(&store, &lost).await, Past::Unknown);
        assert_eq!(judgment(&store, &opened).await, Past::Unknown, "nor what it may have given out at once");
        go_on(&store, deleted).await;
    }
    assert!(end(&store).await > lost.at, "however far it gets");
    store.begin_epoch(&operator()).await.unwrap();
    assert_eq!(judgment(&store, &lost).await, Past::Superseded);
    store.close().await;
}

#[tokio::test]
async fn two_copies_that_go_on_are_distinguished() {
    let directory = tempfile::tempdir().unwrap();
    let [path, copy] = copied(directory.path()).await;
    let before = SqliteStore::open(&path).await.unwrap();
    let common = milestone(&before).await;
    before.close().await;
    let (one, other) = (publisher(&path).await, publisher(&copy).await);
    assert_eq!(one.voucher_key().await.unwrap(), other.voucher_key().await.unwrap());
    for store in [&one, &other] {
        go_on(store, 1).await;
    }
    let (mine, theirs) = (milestone(&one).await, milestone(&other).await);
    assert_eq!((mine.at, mine.provenance.store), (theirs.at, theirs.provenance.store));
    assert!(mine.provenance.incarnation != theirs.provenance.incarnation && mine.token != theirs.token);
    for (store, theirs) in [(&one, theirs), (&other, mine)] {
        assert_eq!(judgment(store, &common).await, Past::Known);
        assert_eq!(judgment(store, &theirs).await, Past::Unknown);
    }
    let round = run_round(&one, &[]).await.numbered.head.round;
    assert!(one.has_round_token(round).await.unwrap() && !other.has_round_token(round).await.unwrap());
    one.close().await;
    other.close().await;
}
