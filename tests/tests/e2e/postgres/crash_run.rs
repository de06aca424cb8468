//! A small crash run: each deletion is accounted for although publishers are killed all the time. `cargo xtask crashes`
//! runs a large one.

use std::time::Duration;

use anyhow::{Result, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::crash_run::{CrashRun, run};
use evictd_tests::topology::{Plan, StoreKind};

use crate::world::plan;

const SMALL: CrashRun = CrashRun { keys: 3_000, clients: 8, kill_every: Duration::from_millis(300) };

fn run_small(plan: &Plan) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let report = run(dir.path(), plan, SMALL)?;
    println!("{report:?}");
    ensure!(report.deleted == SMALL.keys * 19 / 20, "{report:?}");
    Ok(())
}

#[test]
fn deletions_survive_publisher_kills_on_sqlite() -> Result<()> {
    run_small(&plan(&["eu", "us"]))
}

#[test]
fn deletions_survive_publisher_kills_on_postgresql() -> Result<()> {
    let server = Postgres::start()?;
    run_small(&Plan { store: StoreKind::Postgres(server.url()), publishers: 3, ..plan(&["eu", "us"]) })
}
