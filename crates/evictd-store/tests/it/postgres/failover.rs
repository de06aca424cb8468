//! R2, R7: a fail-over that may have lost commits begins a new epoch, and no two histories share one.

use evictd_core::history::{BeginCause, Past};
use evictd_core::ids::KeyHash;
use evictd_core::invalidation::Cause;
use evictd_core::record::{Record, RecordState};
use evictd_postgres_server::{Postgres, StopMode};
use evictd_store::change::DeleteMode;
use evictd_store::log::{Replay, RoundRequest};
use evictd_store::postgres::PostgresReader;
use evictd_store::{HomeStore, LogStore, OperatorStore, RecordStore, RosterStore, StoreError};
use sqlx::AssertSqlSafe;

use super::{connect, options, populated, run, stranger, wait_for};
use crate::fixture::{
    actor, instance, judgment, key, key_scope, milestone, news, operator, populate, run_round, said,
};

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

/// Cuts the standby off from its primary.
fn cut_off(standby: &Postgres) {
    standby.set("primary_conninfo = ''").unwrap();
    wait_for(standby, "SELECT count(*) FROM pg_stat_wal_receiver", "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn promoted_standby_begins_an_epoch_even_without_loss() {
    let (mut primary, standby) = pair().await;
    let lost = connect(&primary.url()).await;
    let (before, past) = (lost.head().await.unwrap(), milestone(&lost).await);
    primary.stop(StopMode::Immediate).unwrap();
    standby.promote().unwrap();
    let store = connect(&standby.url()).await;
    assert_eq!(store.head().await.unwrap(), before, "to look changes nothing");
    let round = run_round(&store, &[instance(1)]).await;
    let began = round.numbered.head;
    assert_eq!((began.at.epoch(), round.began), (257, Some(BeginCause::Branched)));
    assert!(began.at.position() >= before.at.position());
    assert!(began.incarnation != before.incarnation && began.token != before.token);
    assert!(!store.roster(0).await.unwrap().is_complete);
    assert_eq!(run_round(&store, &[instance(1)]).await.began, None, "once");

    let history = store.history().await.unwrap();
    let [_, begin] = history.begins() else { panic!("{history:?}") };
    assert_eq!((begin.incarnation, begin.cause), (began.incarnation, BeginCause::Branched));
    assert_eq!((begin.after, begin.at), (before.at, began.at));
    let evidence = begin.evidence.as_deref().unwrap();
    assert!(evidence.starts_with("timeline 2, system "), "{evidence}");
    assert_eq!(judgment(&store, &past).await, Past::Known, "nothing of it was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn standbys_of_one_primary_have_no_position_in_common() {
    let (mut primary, first) = pair().await;
    let second = primary.standby().unwrap();
    primary.stop(StopMode::Immediate).unwrap();
    let mut logs = Vec::new();
    for standby in [&first, &second] {
        standby.promote().unwrap();
        let store = connect(&standby.url()).await;
        delete(&store, 1).await;
        logs.push((store.number(10).await.unwrap().head, store));
    }
    let [(one, first), (other, second)] = &logs[..] else { panic!("{logs:?}") };
    assert_eq!((one.at.epoch(), other.at.epoch()), (257, 257), "they have the same timeline");
    let place = one.at.position();
    assert!(place.abs_diff(other.at.position()) > 1, "once in a billion runs they meet");
    let asked = second.replay(257, place, place, 1).await.unwrap();
    assert_eq!(asked, Replay::Refused { head: *other });
    let past = milestone(first).await;
    assert_eq!(judgment(second, &past).await, Past::Unknown, "they are rivals");
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_that_a_lost_commit_had_are_given_in_another_epoch() {
    let (mut primary, standby) = pair().await;
    let lost = connect(&primary.url()).await;
    cut_off(&standby);
    delete(&lost, 1).await;
    // An operator declares two epochs, which the standby never receives.
    lost.begin_epoch(&operator()).await.unwrap();
    lost.begin_epoch(&operator()).await.unwrap();
    delete(&lost, 2).await;
    lost.number(10).await.unwrap();
    let seen = milestone(&lost).await;
    assert_eq!(seen.at.epoch(), 3);
    primary.kill().unwrap();
    standby.promote().unwrap();

    // The sequencer numbers before any probe reports a seen position.
    let store = connect(&standby.url()).await;
    delete(&store, 3).await;
    let numbered = store.number(10).await.unwrap();
    assert_eq!(said(&numbered.rows), [(key_scope(3), Cause::Deleted)]);
    assert_eq!(numbered.head.at.epoch(), 257);
    assert_eq!(judgment(&store, &seen).await, Past::Superseded);
    assert_eq!(run_round(&store, &[]).await.began, None);

    // A second fail-over, which loses the beginning of that epoch's successor, too.
    let second = standby.standby().unwrap();
    wait_until_received(&standby, &second);
    cut_off(&second);
    assert_eq!(store.begin_epoch(&operator()).await.unwrap().at.epoch(), 258);
    let seen = milestone(&store).await;
    second.promote().unwrap();
    let store = connect(&second.url()).await;
    let round = store.round(RoundRequest { seen_epoch: 258, ..RoundRequest::default() }).await.unwrap();
    assert_eq!((round.numbered.head.at.epoch(), round.began), (513, Some(BeginCause::Branched)));
    assert_eq!(judgment(&store, &seen).await, Past::Superseded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_primary_that_must_replicate_can_do_no_round() {
    let (primary, standby) = pair().await;
    let mut options = options(&primary.url());
    options.statement_timeout = std::time::Duration::from_millis(200);
    let store = evictd_store::postgres::PostgresStore::connect(options).await.unwrap();
    primary.set("synchronous_standby_names = '*'").unwrap();
    run_round(&store, &[]).await;
    cut_off(&standby);
    let round = store.round(RoundRequest::default()).await;
    assert!(matches!(round, Err(StoreError::Unknown { .. })), "{round:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_standby_nor_a_read_only_server_can_run_a_round() {
    let (primary, standby) = pair().await;
    let on_standby = connect(&standby.url()).await;
    let round = on_standby.round(RoundRequest::default()).await;
    assert!(matches!(round, Err(StoreError::Database { .. })), "{round:?}");
    standby.promote().unwrap();
    run_round(&on_standby, &[]).await;

    let store = connect(&primary.url()).await;
    run_round(&store, &[]).await;
    primary.set("default_transaction_read_only = on").unwrap();
    let round = store.round(RoundRequest::default()).await;
    assert!(matches!(round, Err(StoreError::Database { .. })), "{round:?}");
    primary.set("default_transaction_read_only = off").unwrap();
    run_round(&store, &[]).await;
}

#[tokio::test]
async fn records_that_were_moved_to_another_cluster_begin_an_epoch() {
    let fixture = populated(2).await;
    run(&fixture.url, "UPDATE log_head SET system_identifier = 1").await;
    run(&fixture.url, "DELETE FROM keys WHERE id = 'key_1'").await;
    let numbered = fixture.store.number(10).await.unwrap();
    assert_eq!((numbered.head.at.epoch(), numbered.rows.len()), (2, 1));
    assert_eq!(run_round(&fixture.store, &[]).await.began, None, "once");
}

#[tokio::test]
async fn epoch_begins_above_those_that_agents_have_seen() {
    let fixture = populated(1).await;
    run(&fixture.url, "UPDATE log_head SET system_identifier = 1").await;
    let round =
        fixture.store.round(RoundRequest { seen_epoch: 513, ..RoundRequest::default() }).await.unwrap();
    assert_eq!((round.numbered.head.at.epoch(), round.began), (514, Some(BeginCause::Branched)));
}

#[tokio::test]
async fn an_operators_word_on_a_branch_is_one_epoch_of_his() {
    let fixture = populated(1).await;
    run(&fixture.url, "UPDATE log_head SET timeline = 7").await;
    fixture.store.begin_epoch(&operator()).await.unwrap();
    assert_eq!(run_round(&fixture.store, &[]).await.began, None);
    let history = fixture.store.history().await.unwrap();
    assert_eq!((history.begins().len(), history.current().cause), (2, BeginCause::Declared));
}

#[tokio::test]
async fn last_position_is_not_exceeded() {
    let fixture = populated(1).await;
    let last = "UPDATE log_head SET head = 17592186044415, written_by = pg_current_xact_id()::xid";
    run(&fixture.url, last).await;
    run(&fixture.url, "UPDATE keys SET enabled = false").await;
    for error in [
        fixture.store.number(10).await.unwrap_err(),
        fixture.store.round(RoundRequest::default()).await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::PositionsUsedUp), "{error:?}");
    }
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
async fn agent_reads_a_standby_with_least_rights_and_sees_its_age() {
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
    let before = store.lookup(KeyHash([99; 32])).await.unwrap();
    standby.pause_replay().unwrap();
    delete(&store, 1).await;
    let now = store.number(10).await.unwrap().head.token;
    let state = async || {
        let lookup = reader.lookup(KeyHash([1; 32])).await.unwrap();
        let Record::Key(key) = lookup.record else { panic!("a key") };
        assert_eq!(lookup.provenance, before.provenance);
        assert_eq!(store.row_token(lookup.as_of).await.unwrap(), Some(lookup.token));
        (lookup.token, key.state)
    };
    assert_eq!(state().await, (before.token, RecordState::Active), "old, and said to be");
    standby.resume_replay().unwrap();
    wait_until_received(&primary, &standby);
    assert_eq!(state().await, (now, RecordState::Deleted));
    assert_eq!(reader.lookup(KeyHash([99; 32])).await.unwrap().record, Record::Absent);
    let mut agent = stranger(&standby.url_as("agent")).await;
    for secret in ["voucher_key", "history", "round_tokens"] {
        let look = sqlx::raw_sql(AssertSqlSafe(format!("SELECT FROM {secret}"))).execute(&mut agent).await;
        assert!(look.unwrap_err().to_string().contains("permission denied"), "{secret}");
    }
    reader.close().await;
    assert!(matches!(reader.lookup(KeyHash([1; 32])).await, Err(StoreError::Database { .. })));
    assert_eq!(news(&store).await, []);
}
