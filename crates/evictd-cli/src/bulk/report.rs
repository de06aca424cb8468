//! What is printed about many deletions: a line for each on standard output; progress, notes and the sum on
//! standard error.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::Context as _;
use evictd_wire::api::propagation::Propagation;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::deletion::{BulkDeletion, DeletionOutcome};
use crate::print::{UNPRINTED, print};
use crate::wait;

/// Counts and prints the outcomes.
pub(super) struct BulkReport<'a> {
    ids: &'a [String],
    json: bool,
    out: Box<dyn Write + 'a>,
    err: Box<dyn Write + 'a>,
    is_reported: Vec<bool>,
    tally: Tally,
    /// A warning about the regions, printed once.
    warning: Option<String>,
    last_note: String,
    bar: ProgressBar,
    /// The first failure to print a result. The deletions go on.
    printed: io::Result<()>,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Tally {
    deleted: usize,
    not_found: usize,
    failed: usize,
    not_started: usize,
    /// Deletions not proven in force in every region.
    unproven: usize,
}

/// The line of an id in JSON.
#[derive(Serialize, Default)]
#[serde(rename_all = "camelCase")]
struct ResultLine<'a> {
    key_id: &'a str,
    result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    propagation: Option<&'a Propagation>,
}

const MAYBE_DONE: &str = "an earlier attempt got no answer, and may have deleted it";

impl<'a> BulkReport<'a> {
    /// Prints results to `out`, notes to `err`, and a progress bar to `terminal`.
    pub(super) fn new(
        ids: &'a [String],
        json: bool,
        (out, err): (Box<dyn Write + 'a>, Box<dyn Write + 'a>),
        terminal: ProgressDrawTarget,
    ) -> Self {
        let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len}{msg}").expect("a constant template");
        let bar = ProgressBar::with_draw_target(Some(ids.len() as u64), terminal);
        let bar = bar.with_style(style.progress_chars("=> "));
        bar.tick();
        let (is_reported, tally) = (vec![false; ids.len()], Tally::default());
        let (last_note, printed) = (String::new(), Ok(()));
        Self { ids, json, out, err, is_reported, tally, warning: None, last_note, bar, printed }
    }

    /// Prints the line of the id at `index`.
    pub(super) fn done(&mut self, index: usize, outcome: &DeletionOutcome) {
        let Some((id, is_reported)) = self.ids.get(index).zip(self.is_reported.get_mut(index)) else {
            return;
        };
        *is_reported = true;
        self.tally.add(outcome);
        if let DeletionOutcome::Deleted { receipt: Some(receipt), .. } = outcome {
            self.warning = self.warning.take().or_else(|| wait::warning(receipt));
        }
        self.bar.set_message(self.tally.failures());
        self.bar.set_position(self.tally.finished() as u64);
        let printed = self.bar.suspend(|| print(&mut self.out, &line(id, outcome, self.json)));
        self.printed = std::mem::replace(&mut self.printed, Ok(())).and(printed);
    }

    /// Prints a note, unless it was the last one too.
    pub(super) fn note(&mut self, note: &str) {
        if self.last_note != note {
            note.clone_into(&mut self.last_note);
            self.bar.suspend(|| drop(print(&mut self.err, &format!("{note}\n"))));
        }
    }

    /// Prints the ids that were not started, and the sum. Returns the exit code.
    pub(super) fn conclude(mut self, deletion: &BulkDeletion) -> anyhow::Result<u8> {
        self.bar.finish_and_clear();
        for index in 0..self.ids.len() {
            if !self.is_reported[index] {
                self.done(index, &DeletionOutcome::NotStarted);
            }
        }
        let warning = self.warning.unwrap_or_default();
        drop(print(&mut self.err, &format!("{warning}{}", self.tally.sum(deletion))));
        self.printed.context(UNPRINTED)?;
        Ok(self.tally.exit_code(deletion))
    }
}

/// `key_1  deleted  req_1`, or a JSON object.
fn line(id: &str, outcome: &DeletionOutcome, json: bool) -> String {
    let (text, mut line) = match outcome {
        DeletionOutcome::Deleted { request_id, receipt } => {
            let propagation = receipt.as_deref();
            let brief = propagation.map(|receipt| format!("  {}", wait::brief_outcome(receipt)));
            let line = ResultLine {
                result: "deleted",
                request_id: Some(request_id),
                propagation,
                ..ResultLine::default()
            };
            (format!("deleted  {request_id}{}", brief.unwrap_or_default()), line)
        }
        DeletionOutcome::NotFound { is_maybe_done } => {
            let note = is_maybe_done.then_some(MAYBE_DONE);
            let brief = note.map(|note| format!("  ({note})")).unwrap_or_default();
            (format!("not found{brief}"), ResultLine { result: "notFound", note, ..ResultLine::default() })
        }
        DeletionOutcome::Failed(reason) => {
            let line = ResultLine { result: "failed", error: Some(reason), ..ResultLine::default() };
            (format!("failed: {reason}"), line)
        }
        DeletionOutcome::NotStarted => {
            ("not started".to_owned(), ResultLine { result: "notStarted", ..ResultLine::default() })
        }
    };
    line.key_id = id;
    // It has neither maps nor infinite numbers, so it always has a JSON form.
    let json = json.then(|| serde_json::to_string(&line).unwrap_or_default());
    format!("{}\n", json.unwrap_or_else(|| format!("{id}  {text}")))
}

impl Tally {
    fn add(&mut self, outcome: &DeletionOutcome) {
        match outcome {
            DeletionOutcome::Deleted { receipt, .. } => {
                self.deleted += 1;
                self.unproven += usize::from(!receipt.as_deref().is_some_and(wait::is_proven));
            }
            DeletionOutcome::NotFound { .. } => self.not_found += 1,
            DeletionOutcome::Failed(_) => self.failed += 1,
            DeletionOutcome::NotStarted => self.not_started += 1,
        }
    }

    fn finished(self) -> usize {
        self.deleted + self.not_found + self.failed
    }

    /// `, 2 not found, 1 failed`
    fn failures(self) -> String {
        let mut text = String::new();
        for (count, outcome) in [(self.not_found, "not found"), (self.failed, "failed")] {
            if count > 0 {
                let _ = write!(text, ", {count} {outcome}");
            }
        }
        text
    }

    /// Returns the sum, and what to do about it.
    fn sum(self, deletion: &BulkDeletion) -> String {
        let Self { deleted, not_found, failed, not_started, unproven } = self;
        let total = self.finished() + not_started;
        if total == 0 {
            return "standard input has no ids: nothing to delete\n".to_owned();
        }
        let mut text = format!(
            "{total} keys: {deleted} deleted, {not_found} not found, {failed} failed, {not_started} not started\n"
        );
        if not_found > 0 {
            text.push_str(
                "A key is not found if it was deleted before, or never existed: check that you expected it.\n",
            );
        }
        if deletion.wait.is_some() && unproven > 0 {
            let _ = writeln!(
                text,
                "{unproven} of the deleted keys are not proven gone in every region; \
                 `evictd api propagation get-receipt` shows why."
            );
        }
        if failed + not_started > 0 {
            text.push_str(
                "To continue, run it again with the same list: deleted keys will be reported as not found.\n",
            );
        }
        text
    }

    fn exit_code(self, deletion: &BulkDeletion) -> u8 {
        if self.failed + self.not_started > 0 || deletion.strict && self.not_found > 0 {
            1
        } else if deletion.wait.is_some() && self.unproven > 0 {
            wait::UNPROVEN
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn deletion(wait: bool, strict: bool) -> BulkDeletion {
        BulkDeletion {
            permanent: false,
            concurrency: 8,
            strict,
            wait: wait.then_some(Duration::from_secs(30)),
        }
    }

    fn receipt(state: &'static str) -> Propagation {
        let mut receipt = Propagation::nothing("req_1", Duration::from_secs(30));
        receipt.state = state.into();
        receipt.r#final = state != "pending";
        receipt.final_after_ms = receipt.r#final.then_some(4.25);
        receipt
    }

    fn deleted(receipt: Option<Propagation>) -> DeletionOutcome {
        DeletionOutcome::Deleted { request_id: "req_1".to_owned(), receipt: receipt.map(Box::new) }
    }

    #[test]
    fn each_outcome_has_its_line() {
        for (outcome, text, json) in [
            (deleted(None), "deleted  req_1", r#""result":"deleted","requestId":"req_1"}"#),
            (DeletionOutcome::NotFound { is_maybe_done: false }, "not found", r#""result":"notFound"}"#),
            (
                DeletionOutcome::NotFound { is_maybe_done: true },
                "not found  (an earlier attempt got no answer, and may have deleted it)",
                r#""result":"notFound","note":"an earlier attempt got no answer, and may have deleted it"}"#,
            ),
            (DeletionOutcome::Failed("no".to_owned()), "failed: no", r#""result":"failed","error":"no"}"#),
            (DeletionOutcome::NotStarted, "not started", r#""result":"notStarted"}"#),
        ] {
            assert_eq!(line("key_1", &outcome, false), format!("key_1  {text}\n"));
            assert_eq!(line("key_1", &outcome, true), format!("{{\"keyId\":\"key_1\",{json}\n"));
        }
        let confirmed = deleted(Some(receipt("confirmed")));
        assert_eq!(line("key_1", &confirmed, false), "key_1  deleted  req_1  confirmed after 4.2ms\n");
        assert!(line("key_1", &confirmed, true).contains(r#""propagation":{"requestId":"req_1""#));
    }

    #[test]
    fn exit_code_shows_whether_all_are_gone() {
        let tally = |outcomes: &[DeletionOutcome]| {
            let mut tally = Tally::default();
            for outcome in outcomes {
                tally.add(outcome);
            }
            tally
        };
        let not_found = || DeletionOutcome::NotFound { is_maybe_done: false };
        let (lenient, strict, waiting) =
            (deletion(false, false), deletion(false, true), deletion(true, false));
        assert_eq!(tally(&[]).exit_code(&lenient), 0);
        assert_eq!(tally(&[deleted(None), not_found()]).exit_code(&lenient), 0);
        assert_eq!(tally(&[deleted(None), not_found()]).exit_code(&strict), 1);
        assert_eq!(tally(&[deleted(None), DeletionOutcome::NotStarted]).exit_code(&lenient), 1);
        assert_eq!(tally(&[deleted(Some(receipt("elapsed")))]).exit_code(&waiting), 0);
        for open in [None, Some(receipt("pending")), Some(receipt("unproven"))] {
            assert_eq!(tally(&[deleted(open)]).exit_code(&waiting), 3);
        }
        assert_eq!(tally(&[deleted(None), DeletionOutcome::Failed(String::new())]).exit_code(&waiting), 1);
    }

    #[test]
    fn sum_says_what_to_check() {
        let tally = Tally { deleted: 3, not_found: 2, failed: 1, not_started: 4, unproven: 3 };
        let sum = tally.sum(&deletion(false, false));
        assert!(sum.starts_with("10 keys: 3 deleted, 2 not found, 1 failed, 4 not started\n"), "{sum}");
        assert!(
            sum.contains("never existed") && sum.contains("run it again") && !sum.contains("region"),
            "{sum}"
        );
        assert!(tally.sum(&deletion(true, false)).contains("3 of the deleted keys"));
        let all = Tally { deleted: 3, ..Tally::default() };
        let sum = all.sum(&deletion(false, false));
        assert_eq!(sum, "3 keys: 3 deleted, 0 not found, 0 failed, 0 not started\n");
        assert!(Tally::default().sum(&deletion(false, false)).contains("nothing to delete"));
    }
}
