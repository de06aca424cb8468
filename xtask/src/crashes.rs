//! `cargo xtask crashes`: [`crash_run`] at any size, on either store.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use evictd_tests::crash_run::{self, CrashRun};
use evictd_tests::topology::{Plan, Servers, StoreKind};

use crate::steps;

#[derive(Args, Debug)]
pub(crate) struct CrashArgs {
    /// The home store. On PostgreSQL, three publishers share it.
    #[arg(long, value_enum, default_value_t = StoreName::Sqlite)]
    store: StoreName,
    /// Keys to create; nineteen of twenty are deleted.
    #[arg(long, default_value_t = 20_000)]
    keys: usize,
    /// Clients that delete them.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Seconds between two kills.
    #[arg(long, default_value_t = 3)]
    kill_every: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum StoreName {
    Sqlite,
    Postgres,
}

pub(crate) fn run(args: &CrashArgs) -> Result<()> {
    steps::build_evictd()?;
    let dir = tempfile::tempdir()?;
    let postgres = match args.store {
        StoreName::Sqlite => None,
        StoreName::Postgres => Some(evictd_postgres_server::Postgres::start()?),
    };
    let plan = Plan { servers: Servers::Single, ..Plan::new(&["eu", "us"]) };
    let plan = match &postgres {
        None => plan,
        Some(server) => Plan { store: StoreKind::Postgres(server.url()), publishers: 3, ..plan },
    };
    let run =
        CrashRun { keys: args.keys, clients: args.clients, kill_every: Duration::from_secs(args.kill_every) };
    let report = crash_run::run(dir.path(), &plan, run)?;
    let each = |counts: &[usize]| counts.iter().map(usize::to_string).collect::<Vec<_>>().join(" + ");
    println!(
        "{} keys deleted by {} clients in {:.1} s ({} by each publisher), publishers killed {} times: each has \
         one audit record, one position in the log and a final receipt ({} confirmed, {} elapsed), no agent accepts it, \
         and every other key is valid ({} requests got no answer; {} deletions were confirmed by a repeated request)",
        report.deleted,
        args.clients,
        report.deleting.as_secs_f64(),
        each(&report.answered),
        each(&report.kills),
        report.confirmed,
        report.deleted - report.confirmed,
        report.unanswered,
        report.learned_late,
    );
    Ok(())
}
