//! `evictd epochs`: what became of the home store, as its history tells (R15, R16).

use std::fmt::Write as _;

use clap::Args;
use evictd_core::history::Begin;
use evictd_core::position::LogPosition;
use serde_json::json;

use crate::daemon::ConfigArgs;
use crate::home_store::Place;
use crate::output_format::{OutputFormat, print_line, shown};
use crate::when;

/// Shows the epochs of the home store, the newest first: when each began, why, on whose evidence, and from what position.
///
/// A new epoch makes every agent flush its cache once. One that an operator declared may have undone deletions.
#[derive(Args, Debug)]
pub(crate) struct EpochsArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Shows also the incarnations that began no epoch: a publisher opened an SQLite store, or was alone at a PostgreSQL one.
    #[arg(long)]
    all: bool,
    /// `json` prints one JSON object per line.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

pub(crate) fn run(args: &EpochsArgs) -> anyhow::Result<()> {
    let place = Place::existing(&args.config)?;
    let history = place.with(async |store| Ok(store.history().await?))?;
    for begin in history.begins().iter().rev().filter(|begin| args.all || is_epoch(begin)) {
        print_line(&match args.output {
            OutputFormat::Json => line(begin),
            OutputFormat::Text => text(begin),
        });
    }
    Ok(())
}

fn is_epoch(begin: &Begin) -> bool {
    begin.at.epoch() > begin.after.epoch()
}

fn line(begin: &Begin) -> String {
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
    .to_string()
}

/// `2026-08-21T12:34:56.789Z  epoch 2 from position 105  declared (ops)  incarnation 00c0ffee00c0ffee`
fn text(begin: &Begin) -> String {
    let mut text = format!(
        "{}  epoch {} from position {}  {}",
        when::written(begin.time),
        begin.at.epoch(),
        begin.at.position(),
        begin.cause.label(),
    );
    // Writing to a String can't fail.
    if let Some(evidence) = &begin.evidence {
        _ = write!(text, " ({})", shown(evidence));
    }
    _ = write!(text, "  incarnation {}", begin.incarnation);
    text
}

#[cfg(test)]
mod tests {
    use evictd_core::history::{BeginCause, Incarnation};
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
        assert!(is_epoch(&begin) && !is_epoch(&Begin { after: at(2), ..begin }));
    }
}
