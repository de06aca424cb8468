//! `evictd new-epoch`: an operator declares that this home store is the one to follow (R15).
//!
//! A store that was put back to an older state, or a copy that replaces a store that was lost, lacks changes that
//! agents have seen. To go on without them is an operator's decision.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use serde_json::json;

use crate::daemon::ConfigArgs;
use crate::home_store::Place;
use crate::output_format::{OutputFormat, print_line};
use crate::root_key::operator;

#[derive(Args, Debug)]
pub(crate) struct NewEpochArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Begins without asking.
    #[arg(long)]
    yes: bool,
    /// `json` prints one JSON object.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

pub(crate) fn run(args: &NewEpochArgs) -> anyhow::Result<()> {
    let place = Place::existing(&args.config)?;
    eprintln!(
        "This begins a new epoch in the home store {place}, and declares that agents are to follow it.\n\
         What was changed in a newer copy and is missing here counts as undone: a key that was deleted there is valid \
         again.\n\
         Do it once, after the store was put back to an older state, or when a copy replaces a store that was lost.\n\
         Each agent flushes its cache once, and loads each record again when it is asked for."
    );
    if !args.yes {
        anyhow::ensure!(
            std::io::stdin().is_terminal(),
            "nothing was done: say --yes where nobody can be asked"
        );
        anyhow::ensure!(is_confirmed(std::io::stdin().lock())?, "nothing was done");
    }
    let operator = operator();
    let head = place
        .with(async |store| Ok(store.begin_epoch(&operator).await?))
        .map_err(|error| error.context(format!("couldn't begin a new epoch in {place}")))?;
    match args.output {
        OutputFormat::Json => {
            let began = json!({
                "epoch": head.at.epoch(),
                "headPosition": head.at.position(),
                "requestId": operator.request_id
            });
            print_line(&began.to_string());
        }
        OutputFormat::Text => {
            print_line(&format!("epoch {} began at position {}", head.at.epoch(), head.at.position()));
            eprintln!(
                "Each agent flushes when it hears of it: at once while a publisher runs, and otherwise when one does. \
                 Until then it answers from its cache for at most the bound. `/status` of an agent shows its epoch, \
                 evictd_agent_flushes_total{{reason=\"new_epoch\"}} counts."
            );
        }
    }
    Ok(())
}

fn is_confirmed(mut from: impl BufRead) -> anyhow::Result<bool> {
    eprint!("Begin a new epoch? [y/N] ");
    std::io::stderr().flush()?;
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

    fn args(path: &std::path::Path) -> NewEpochArgs {
        NewEpochArgs {
            config: ConfigArgs::default().and_set("store.path", path.display().to_string()),
            yes: true,
            output: OutputFormat::Json,
        }
    }

    #[test]
    fn each_call_begins_one_epoch_also_beside_a_publisher() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let error = run(&args(&path)).unwrap_err().to_string();
        assert!(error.contains("start the publisher"), "{error}");
        assert!(!path.exists());

        let runtime = crate::daemon::runtime().unwrap();
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
    fn only_a_yes_is_a_yes() {
        for (answer, expected) in
            [("y\n", true), ("YES\n", true), ("\n", false), ("no\n", false), ("", false)]
        {
            assert_eq!(is_confirmed(answer.as_bytes()).unwrap(), expected, "{answer:?}");
        }
    }
}
