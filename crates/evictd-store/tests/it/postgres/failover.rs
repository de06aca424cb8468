//! R2, R7: a fail-over that may have lost commits begins a new epoch, and no two histories share one.

use evictd_core::ids::KeyHash;
use evictd_core::invalidation::Cause;
use evictd_core::record::{Record, RecordState};
use evictd_postgres_server::{Mode, Postgres};
use evictd_store::change::DeleteMode;
use evictd_store::log::{Replay, RoundRequest};
use evictd_store::postgres::PostgresReader;
use evictd_store::{HomeStore, StoreError};

use super::{at, connect, head, options, populated, run, wait_for};
use crate::fixture::{actor, instance, key, key_scope, news, operator, populate, run_round, said};

async fn delete(store: &dyn HomeStore, n: u8) {
    store.delete_key(&actor(), &key(n).id, DeleteMode::Soft, &|_| true).await.unwrap();
}

/// A primary with records, and a standby that has all of them.
async fn pair() -> (Postgres, Postgres) {
    let primary = Postgres::start().unwrap();
    let store = connect(&primary.url()).await;
    populate(&store, 3).await;
    let standby = primary.standby().unwrap();
    wait_until_received(&primary, &standby);
    (primary, standby)
}

fn wait_until_received(primary: &Postgres, standby: &Postgres) {
    let written = primary.query("SELECT pg_current_wal_flush_lsn()").unwrap();
    wait_for(standby, &format!("SELECT pg_last_wal_replay_lsn() >= '{written}'"), "t");
}

/// From now on the standby hears nothing of its primary.
fn cut_off(standby: &Postgres) {
    standby.set("primary_conninfo = ''").unwrap();
    wait_for(standby, "SELECT count(*) FROM pg_stat_wal_receiver", "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_takes_over_begins_an_epoch_even_if_nothing_was_lost() {
    let (mut primary, standby) = pair().await;
    let before = head(&connect(&primary.url()).await).await;
    primary.stop(Mode::Immediate).unwrap();
    standby.promote().unwrap();
    let store = connect(&standby.url()).await;
    assert_eq!(head(&store).await, before, "to look changes nothing");
    let round = run_round(&store, &[instance(1)], &[before]).await;
    let began = round.numbered.head;
    assert_eq!((began.epoch(), round.epoch_began), (257, true));
    assert!(began.position() >= before.position());
    assert!(!store.roster(0).await.unwrap().is_complete);
    let round = run_round(&store, &[instance(1)], &[before, began]).await;
    assert!(!round.epoch_began, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_standbys_that_take_over_from_the_same_primary_have_no_position_in_common() {
    let (mut primary, first) = pair().await;
    let second = primary.standby().unwrap();
    primary.stop(Mode::Immediate).unwrap();
    let mut logs = Vec::new();
    for standby in [&first, &second] {
        standby.promote().unwrap();
        let store = connect(&standby.url()).await;
        delete(&store, 1).await;
        logs.push((store.number(10).await.unwrap().head, store));
    }
    let [(one, _), (other, store)] = &logs[..] else { panic!("{logs:?}") };
    assert_eq!((one.epoch(), other.epoch()), (257, 257), "they have the same timeline");
    assert!(one.position().abs_diff(other.position()) > 1, "once in a billion runs they meet");
    let asked = store.replay(257, one.position(), one.position(), 1).await.unwrap();
    assert_eq!(asked, Replay::Refused { head: *other });
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_that_a_lost_commit_had_are_given_in_another_epoch() {
    let (mut primary, standby) = pair().await;
    let lost = connect(&primary.url()).await;
    cut_off(&standby);
    delete(&lost, 1).await;
    // Two epochs of an operator's, of which the standby never heard.
    lost.begin_epoch(&operator()).await.unwrap();
    lost.begin_epoch(&operator()).await.unwrap();
    delete(&lost, 2).await;
    let seen = lost.number(10).await.unwrap().head;
    assert_eq!(seen.epoch(), 3);
    primary.kill().unwrap();
    standby.promote().unwrap();

    // The sequencer comes first, and has heard of nothing that was seen.
    let store = connect(&standby.url()).await;
    delete(&store, 3).await;
    let numbered = store.number(10).await.unwrap();
    assert_eq!(said(&numbered.rows), [(key_scope(3), Cause::Deleted)]);
    assert_eq!(numbered.head.epoch(), 257);
    assert!(numbered.head > seen);
    assert!(!run_round(&store, &[], &[seen]).await.epoch_began, "what was seen before is older");

    // A second fail-over, which loses the beginning of that epoch's successor, too.
    let second = standby.standby().unwrap();
    wait_until_received(&standby, &second);
    cut_off(&second);
    let seen = store.begin_epoch(&operator()).await.unwrap();
    assert_eq!(seen.epoch(), 258);
    second.promote().unwrap();
    let store = connect(&second.url()).await;
    let round = run_round(&store, &[], &[seen]).await;
    assert_eq!((round.numbered.head.epoch(), round.epoch_began), (513, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_primary_that_must_replicate_can_do_no_round() {
    let (primary, standby) = pair().await;
    let mut options = options(&primary.url());
    options.statement_timeout = std::time::Duration::from_millis(200);
    let store = evictd_store::postgres::PostgresStore::connect(options).await.unwrap();
    primary.set("synchronous_standby_names = '*'").unwrap();
    run_round(&store, &[], &[]).await;
    cut_off(&standby);
    let round = store.round(RoundRequest::default()).await;
    assert!(matches!(round, Err(StoreError::Unknown { .. })), "{round:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_standby_nor_a_server_that_only_reads_can_do_a_round() {
    let (primary, standby) = pair().await;
    let on_standby = connect(&standby.url()).await;
    let round = on_standby.round(RoundRequest::default()).await;
    assert!(matches!(round, Err(StoreError::Database { .. })), "{round:?}");
    standby.promote().unwrap();
    run_round(&on_standby, &[], &[]).await;

    let store = connect(&primary.url()).await;
    run_round(&store, &[], &[]).await;
    primary.set("default_transaction_read_only = on").unwrap();
    let round = store.round(RoundRequest::default()).await;
    assert!(matches!(round, Err(StoreError::Database { .. })), "{round:?}");
    primary.set("default_transaction_read_only = off").unwrap();
    run_round(&store, &[], &[]).await;
}

#[tokio::test]
async fn records_that_were_moved_to_another_cluster_begin_an_epoch() {
    let fixture = populated(2).await;
    run(&fixture.url, "UPDATE log_head SET system_identifier = 1").await;
    run(&fixture.url, "DELETE FROM keys WHERE id = 'key_1'").await;
    let numbered = fixture.store.number(10).await.unwrap();
    assert_eq!((numbered.head.epoch(), numbered.rows.len()), (2, 1));
    assert!(!run_round(&fixture.store, &[], &[]).await.epoch_began, "once");
}

#[tokio::test]
async fn a_primary_that_came_back_believes_what_was_seen_of_the_timelines_after_it() {
    let fixture = populated(1).await;
    let round = run_round(&fixture.store, &[], &[at(513, 9)]).await;
    assert_eq!((round.numbered.head.epoch(), round.epoch_began), (514, true));
}

#[tokio::test]
async fn the_last_epoch_is_not_exceeded() {
    let fixture = populated(0).await;
    run(&fixture.url, "UPDATE log_head SET epoch = 1048575").await;
    let error = fixture.store.begin_epoch(&operator()).await.unwrap_err();
    assert!(matches!(error, StoreError::EpochsUsedUp), "{error:?}");
    run(&fixture.url, "UPDATE log_head SET timeline = 7; UPDATE keys SET enabled = false").await;
    let error = fixture.store.round(RoundRequest::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::EpochsUsedUp), "no proof rather than a wrong one: {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_reads_from_a_standby_as_a_user_who_may_do_nothing_else_and_sees_how_old_it_is() {
    let (primary, standby) = pair().await;
    primary
        .query(
            "CREATE ROLE agent LOGIN;
             GRANT SELECT ON log_head, keys, root_keys, apis, workspaces, _sqlx_migrations TO agent",
        )
        .unwrap();
    wait_until_received(&primary, &standby);
    let reader = PostgresReader::connect(options(&standby.url_as("agent"))).await.unwrap();
    let store = connect(&primary.url()).await;
    let before = head(&store).await;
    standby.pause_replay().unwrap();
    delete(&store, 1).await;
    let now = store.number(10).await.unwrap().head;
    let state = async || {
        let lookup = reader.lookup(KeyHash([1; 32])).await.unwrap();
        let Record::Key(key) = lookup.record else { panic!("a key") };
        (lookup.as_of, key.state)
    };
    assert_eq!(state().await, (before, RecordState::Active), "old, and said to be");
    standby.resume_replay().unwrap();
    wait_until_received(&primary, &standby);
    assert_eq!(state().await, (now, RecordState::Deleted));
    assert_eq!(reader.lookup(KeyHash([99; 32])).await.unwrap().record, Record::Absent);
    reader.close().await;
    assert!(matches!(reader.lookup(KeyHash([1; 32])).await, Err(StoreError::Database { .. })));
    assert_eq!(news(&store).await, []);
}
