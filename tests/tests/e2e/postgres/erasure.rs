//! What is left of a key that was erased, when the log was purged and PostgreSQL has cleaned up.

use anyhow::{Context, Result};
use evictd_postgres_server::Postgres;

use super::Site;
use crate::erasure::{with_short_log, leave_only_ids};
use crate::rivals::BOUND;
use crate::world::{plan, with_bound};

/// PostgreSQL's own housekeeping, as it comes in a night: tables and indexes are written anew, the write-ahead log
/// from before is removed, and the planner's statistics are taken.
fn clean_up(server: &Postgres) -> Result<()> {
    // Each on its own: VACUUM runs in no transaction with others.
    for step in ["VACUUM FULL", "SELECT pg_switch_wal()", "CHECKPOINT", "ANALYZE", "CHECKPOINT"] {
        server.query(step)?;
    }
    Ok(())
}

/// Failure: what was erased can be read off a table, an index, the planner's statistics, the write-ahead log or the
/// server's log.
///
/// All files of the server are searched, the write-ahead log too: what isn't needed for recovery any more is removed
/// here at each checkpoint. Elsewhere it is overwritten in time, and kept in archives and standbys, which are their
/// owner's to clear.
#[test]
fn only_the_id_remains_of_an_erased_key_after_a_purge() -> Result<()> {
    let server = Postgres::start()?;
    server.set("wal_keep_size = 0")?;
    server.set("wal_recycle = off")?;
    // VACUUM FULL begins an epoch, and for a bound no receipt is final early.
    let mut site = Site::start_on(server, 1, with_short_log(with_bound(BOUND, plan(&["eu", "us"]))))?;
    let data = site.server.data_dir();
    // The server's files, its log beside them, and whatever else the deployment writes.
    let places = [data.parent().context("a root")?.to_path_buf(), site.world.dir().to_path_buf()];
    let Site { world, server } = &mut site;
    leave_only_ids(world, |_| clean_up(server), &places)?;
    site.assert_no_rule_was_broken()
}
