//! `evictd epochs`: shows the history of the home store (R15, R16).

use std::fmt::Write as _;

use clap::Args;
use evictd_cli::print::printable;
use evictd_cli::time::format_time;
use evictd_core::history::{Begin, BeginCause};
use evictd_core::position::LogPosition;
use serde_json::{Value, json};

use crate::operator::OperatorArgs;

/// Shows the epochs of the home store, the newest first: when each began, why, on what evidence, and at what position.
///
/// A new epoch makes every agent flush its cache once. An epoch that an operator declared may have undone deletions.
/// `yielded` shows that agents followed another home store: epochs before it no longer replace what agents have seen.
/// `--output=json` prints an object per line.
#[derive(Args, Debug)]
pub(crate) struct EpochsArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Also shows incarnations without a new epoch: a publisher opened an SQLite store, or was the only one at a
    /// PostgreSQL store.
    #[arg(long)]
    all: bool,
}

pub(crate) fn run(args: &EpochsArgs) -> anyhow::Result<()> {
    let history = args.operator.store()?.with(async |store| Ok(store.history().await?))?;
    for begin in history.begins().iter().rev().filter(|begin| args.all || is_shown(begin)) {
        args.operator.output.print_line(&json(begin), &text(begin))?;
    }
    Ok(())
}

fn is_shown(begin: &Begin) -> bool {
    begin.at.epoch() > begin.after.epoch() || begin.cause == BeginCause::Yielded
}

fn json(begin: &Begin) -> Value {
    let place = |at: LogPosition| json!({ "epoch": at.epoch(), "position": at.position() });
    json!({
        "epoch": begin.at.epoch(),
        "position": begin.at.position(),
        "after": place(begin.after),
        "incarnation": begin.incarnation.to_string(),
        "time": begin.time.as_millis(),
        "cause": begin.cause.label(),
        "evidence": begin.evidence,
    })
}

/// `2026-08-21T12:34:56.789Z  epoch 2 from position 105  declared (ops)  incarnation 00c0ffee00c0ffee`
fn text(begin: &Begin) -> String {
    let mut text = format!(
        "{}  epoch {} from position {}  {}",
        format_time(begin.time),
        begin.at.epoch(),
        begin.at.position(),
        begin.cause.label(),
    );
    // Writing to a String cannot fail.
    if let Some(evidence) = &begin.evidence {
        _ = write!(text, " ({evidence})");
    }
    _ = write!(text, "  incarnation {}", begin.incarnation);
    printable(&text)
}

#[cfg(test)]
mod tests {
    use evictd_core::history::Incarnation;
    use evictd_core::time::StoreTime;

    use super::*;

    #[test]
    fn epoch_shows_its_cause_and_evidence() {
        let at = |epoch| LogPosition::new(epoch, 105).unwrap();
        let begin = Begin {
            incarnation: Incarnation(0x00c0_ffee),
            after: at(1),
            at: at(2),
            cause: BeginCause::Declared,
            time: StoreTime(0),
            evidence: Some("ops".into()),
        };
        assert_eq!(
            text(&begin),
            "1970-01-01T00:00:00.000Z  epoch 2 from position 105  declared (ops)  incarnation 0000000000c0ffee"
        );
        assert!(is_shown(&begin));
        let same_epoch = Begin { after: at(2), ..begin };
        assert!(!is_shown(&same_epoch));
        assert!(is_shown(&Begin { cause: BeginCause::Yielded, ..same_epoch }));
    }
}
