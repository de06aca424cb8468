//! What remains of an erased key after the log is purged and PostgreSQL has cleaned up.

use anyhow::{Context, Result};
use evictd_postgres_server::Postgres;

use super::Site;
use crate::erasure::{leave_only_ids, with_short_log};
use crate::rivals::BOUND;
use crate::world::{plan, with_bound};

/// PostgreSQL's own maintenance: it rewrites tables and indexes, removes the old write-ahead log, and updates the
/// planner's statistics.
fn clean_up(server: &Postgres) -> Result<()> {
    // One query each: VACUUM can't run inside a transaction.
    for step in ["VACUUM FULL", "SELECT pg_switch_wal()", "CHECKPOINT", "ANALYZE", "CHECKPOINT"] {
        server.query(step)?;
    }
    Ok(())
}

/// Failure: erased data remains in a table, an index, the planner's statistics, the write-ahead log or the server's
/// log.
///
/// All files of the server are searched, including the write-ahead log. Here each checkpoint removes what recovery no
/// longer needs. In production it is overwritten in time; archives and standbys are for their owner to clear.
#[test]
fn only_the_id_of_an_erased_key_is_left_after_a_purge() -> Result<()> {
    let server = Postgres::start()?;
    server.set("wal_keep_size = 0")?;
    server.set("wal_recycle = off")?;
    // VACUUM FULL begins an epoch, so for one bound no receipt is final early.
    let mut site = Site::start_on(server, 1, with_short_log(with_bound(BOUND, plan(&["eu", "us"]))))?;
    let data = site.server.data_dir();
    // The server's files, its log beside them, and all other files of the deployment.
    let places = [data.parent().context("a root")?.to_path_buf(), site.world.dir().to_path_buf()];
    let Site { world, server } = &mut site;
    leave_only_ids(world, |_| clean_up(server), &places)?;
    site.assert_no_rule_was_broken()
}
