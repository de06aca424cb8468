//! `evictd new-epoch`: an operator declares that this home store is the one to follow (R15).
//!
//! A store that was restored to an older state, or a copy that replaces a lost store, lacks changes that agents have
//! applied. Continuing without them is an operator's decision.

use std::io::{BufRead, IsTerminal};

use clap::Args;
use evictd_cli::print::{OutputFormat, note, prompt};
use serde_json::json;

use crate::operator::{OperatorArgs, operator};

#[derive(Args, Debug)]
pub(crate) struct NewEpochArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Begins the epoch without a confirmation.
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(args: &NewEpochArgs) -> anyhow::Result<()> {
    let store = args.operator.store()?;
    note(&format!(
        "This begins a new epoch in the home store {store}, and declares that agents must follow this store.\n\
         Changes that a newer copy has and this store lacks are undone: a key that was deleted there is valid again.\n\
         Do it once, after the store was restored to an older state, or when a copy replaces a lost store. Stop\n\
         publishers of other copies first: this store stays silent while one serves, and after a bound the\n\
         declaration no longer counts.\n\
         Each agent flushes its cache once, and loads each record again at the next verification."
    ));
    if !args.yes {
        anyhow::ensure!(
            std::io::stdin().is_terminal(),
            "nothing was done; use --yes where standard input is no terminal"
        );
        anyhow::ensure!(is_confirmed(std::io::stdin().lock())?, "nothing was done");
    }
    let operator = operator();
    let head = store
        .with(async |store| Ok(store.begin_epoch(&operator).await?))
        .map_err(|error| error.context(format!("cannot begin a new epoch in {store}")))?;
    let (epoch, position) = (head.at.epoch(), head.at.position());
    let json = json!({ "epoch": epoch, "headPosition": position, "requestId": operator.request_id });
    args.operator.output.print_line(&json, &format!("epoch {epoch} began at position {position}"))?;
    if args.operator.output == OutputFormat::Text {
        note(
            "Each agent flushes its cache when it receives the new epoch: at once if a publisher runs, otherwise when \
             one starts. Until then it serves from its cache for at most the bound. `/status` of an agent shows its \
             epoch; evictd_agent_flushes_total{reason=\"new_epoch\"} counts the flushes.",
        );
    }
    Ok(())
}

fn is_confirmed(mut from: impl BufRead) -> anyhow::Result<bool> {
    prompt("Begin a new epoch? [y/N] ");
    let mut answer = String::new();
    from.read_line(&mut answer)?;
    Ok(["y", "yes"].iter().any(|yes| answer.trim().eq_ignore_ascii_case(yes)))
}

#[cfg(test)]
mod tests {
    use evictd_store::audit::AuditQuery;
    use evictd_store::sqlite::SqliteStore;
    use evictd_store::{LogStore as _, OperatorStore as _};

    use super::*;
    use crate::operator::test_args;

    fn args(path: &std::path::Path) -> NewEpochArgs {
        NewEpochArgs { operator: test_args(path), yes: true }
    }

    #[test]
    fn each_run_begins_one_epoch_beside_a_publisher() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let error = run(&args(&path)).unwrap_err().to_string();
        assert!(error.contains("start the publisher"), "{error}");
        assert!(!path.exists());

        let runtime = crate::runtime::new().unwrap();
        let publisher = runtime.block_on(SqliteStore::open_exclusively(&path)).unwrap();
        let before = runtime.block_on(publisher.head()).unwrap();
        run(&args(&path)).unwrap();
        let after = runtime.block_on(publisher.head()).unwrap();
        assert_eq!((after.at.epoch(), after.at.position()), (before.at.epoch() + 1, before.at.position()));
        let query = AuditQuery { limit: 10, ..AuditQuery::default() };
        let records = runtime.block_on(publisher.audit(&query)).unwrap();
        let [record] = &records[..] else { panic!("one change: {records:?}") };
        assert_eq!((&*record.event, record.actor_id.as_str()), ("store.new_epoch", &*operator().name));
    }

    #[test]
    fn only_yes_confirms() {
        for (answer, expected) in
            [("y\n", true), ("YES\n", true), ("\n", false), ("no\n", false), ("", false)]
        {
            assert_eq!(is_confirmed(answer.as_bytes()).unwrap(), expected, "{answer:?}");
        }
    }
}
