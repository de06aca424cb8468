//! The store's clock, as agents measure it. The offset is right however long the server takes to answer.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use evictd_core::offset::{ClockOffset, Measurement};
use evictd_core::time::{LeaseTime, StoreTime};

use super::{populated, run};
use crate::fixture::run_round;

/// What the server's clock shows: it is this machine's.
fn true_time() -> StoreTime {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    StoreTime(i64::try_from(since_1970.as_micros()).unwrap())
}

#[tokio::test]
async fn late_answer_makes_no_clock_wrong() {
    let fixture = populated(1).await;
    // It has read its clock by then.
    run(
        &fixture.url,
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END';
         CREATE TRIGGER dawdling AFTER UPDATE OF written_by ON log_head FOR EACH STATEMENT EXECUTE FUNCTION dawdle();
         ALTER TABLE log_head DISABLE TRIGGER dawdling",
    )
    .await;
    let start = Instant::now();
    let now = || LeaseTime(1 << 50).after(start.elapsed());
    let mut offset = ClockOffset::default();
    let mut longest = Duration::ZERO;
    for probe in 0..12 {
        let dawdling = if probe % 3 == 2 { "ENABLE" } else { "DISABLE" };
        run(&fixture.url, &format!("ALTER TABLE log_head {dawdling} TRIGGER dawdling")).await;
        let sent_at = now();
        let round = run_round(&fixture.store, &[]).await;
        // As an authority does, to which the way took no time.
        let held = now().since(sent_at).saturating_sub(round.clock.within);
        let (earliest, truth) = (round.clock.store_time_now(), true_time());
        assert!(earliest <= truth, "probe {probe}: {earliest:?} {truth:?}");
        longest = longest.max(round.clock.within);
        let (received_at, store_time, head) = (now(), earliest, round.numbered.head.at);
        let contradicts = offset.measured(Measurement { sent_at, received_at, held, store_time, head });
        assert!(!contradicts, "probe {probe}: no clock was set");
        let (low, high) = offset.bounds(received_at).unwrap();
        let (before, lease, after) = (true_time(), now(), true_time());
        let lease = i64::try_from(lease.0).unwrap();
        assert!(low <= after.0 - lease && before.0 - lease <= high, "probe {probe}: {low}..{high}");
    }
    assert!(longest >= Duration::from_millis(50), "the answers came at once");
}
