//! What is printed of many deletions: a line for each on standard output; progress, notes and the sum on standard
//! error.

use std::fmt::Write as _;
use std::io::Write;
use std::time::Instant;

use evictd_wire::api::propagation::Propagation;
use serde::Serialize;

use super::super::{print, wait};
use super::{DRAW_EVERY, Fate, Order};

/// How wide the bar of the progress is, in characters.
const BAR_WIDTH: usize = 30;

/// Back to the beginning of the line, which becomes empty.
const CLEAR: &str = "\r\x1b[K";

/// Keeps count, and prints.
pub(super) struct Report<'a> {
    ids: &'a [String],
    json: bool,
    /// For pipes.
    out: Box<dyn Write + 'a>,
    /// For people.
    err: Box<dyn Write + 'a>,
    /// Ids that have their line.
    reported: Vec<bool>,
    count: Count,
    /// Regions without an agent, and the like: told once.
    warning: Option<String>,
    last_note: String,
    /// When the progress was drawn; `None` where nobody would see it.
    drawn: Option<Instant>,
}

/// How many fared how.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Count {
    deleted: usize,
    not_found: usize,
    failed: usize,
    not_started: usize,
    /// Of the deleted ones: those that not all regions are known to have forgotten.
    unproven: usize,
}

/// The line of an id for scripts.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
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

const MAYBE_NOW: &str = "an earlier attempt got no answer, and may have deleted it";

impl<'a> Report<'a> {
    /// Prints to the first of the two what pipes want, and to the second what people want. Progress is drawn where
    /// there is a time when it was drawn last.
    pub(super) fn new(
        ids: &'a [String],
        json: bool,
        (out, err): (Box<dyn Write + 'a>, Box<dyn Write + 'a>),
        drawn: Option<Instant>,
    ) -> Self {
        let (reported, count) = (vec![false; ids.len()], Count::default());
        Self { ids, json, out, err, reported, count, warning: None, last_note: String::new(), drawn }
    }

    /// Prints the line of the id at this place of the list.
    pub(super) fn done(&mut self, at: usize, fate: &Fate) {
        let Some((id, reported)) = self.ids.get(at).zip(self.reported.get_mut(at)) else { return };
        *reported = true;
        self.count.add(fate);
        if let Fate::Deleted { reached: Some(reached), .. } = fate {
            self.warning = self.warning.take().or_else(|| wait::warning(reached));
        }
        let line = line(id, fate, self.json);
        self.clear();
        print(&mut self.out, &line);
    }

    /// Tells people something, once.
    pub(super) fn note(&mut self, note: &str) {
        if self.last_note != note {
            note.clone_into(&mut self.last_note);
            self.clear();
            print(&mut self.err, &format!("{note}\n"));
        }
    }

    /// Shows how far it has come, now and then.
    pub(super) fn draw(&mut self) {
        let Some(drawn) = &mut self.drawn else { return };
        if drawn.elapsed() >= DRAW_EVERY {
            *drawn = Instant::now();
            print(&mut self.err, &format!("{CLEAR}{}", self.count.progress(self.ids.len())));
        }
    }

    fn clear(&mut self) {
        if self.drawn.is_some() {
            print(&mut self.err, CLEAR);
        }
    }

    /// Prints what wasn't started, and the sum. Returns the exit code.
    pub(super) fn conclude(mut self, order: &Order) -> u8 {
        let rest: Vec<_> = (0..self.ids.len()).filter(|at| !self.reported[*at]).collect();
        for at in rest {
            self.done(at, &Fate::NotStarted);
        }
        self.clear();
        let warning = self.warning.unwrap_or_default();
        print(&mut self.err, &format!("{warning}{}", self.count.sum(order)));
        self.count.exit_code(order)
    }
}

/// `key_1  deleted  req_1`, or one JSON object.
fn line(id: &str, fate: &Fate, json: bool) -> String {
    let empty = Line { key_id: id, result: "", request_id: None, error: None, note: None, propagation: None };
    let (text, line) = match fate {
        Fate::Deleted { request_id, reached } => {
            let reached = reached.as_deref();
            let brief = reached.map(|reached| format!("  {}", wait::in_brief(reached))).unwrap_or_default();
            let request_id = request_id.as_str();
            (
                format!("deleted  {request_id}{brief}"),
                Line { result: "deleted", request_id: Some(request_id), propagation: reached, ..empty },
            )
        }
        Fate::NotFound { maybe_now: false } => ("not found".to_owned(), Line { result: "notFound", ..empty }),
        Fate::NotFound { maybe_now: true } => {
            (format!("not found  ({MAYBE_NOW})"), Line { result: "notFound", note: Some(MAYBE_NOW), ..empty })
        }
        Fate::Failed(why) => (format!("failed: {why}"), Line { result: "failed", error: Some(why), ..empty }),
        Fate::NotStarted => ("not started".to_owned(), Line { result: "notStarted", ..empty }),
    };
    // Nothing in it can fail to become JSON: neither maps nor numbers that aren't finite.
    let json = json.then(|| serde_json::to_string(&line).unwrap_or_default());
    format!("{}\n", json.unwrap_or_else(|| format!("{id}  {text}")))
}

impl Count {
    fn add(&mut self, fate: &Fate) {
        match fate {
            Fate::Deleted { reached, .. } => {
                self.deleted += 1;
                let proven = reached.as_deref().is_some_and(wait::is_proven);
                self.unproven += usize::from(!proven);
            }
            Fate::NotFound { .. } => self.not_found += 1,
            Fate::Failed(_) => self.failed += 1,
            Fate::NotStarted => self.not_started += 1,
        }
    }

    /// `[=========>                    ] 150/500, 2 not found`
    fn progress(self, total: usize) -> String {
        let done = self.deleted + self.not_found + self.failed;
        let filled = done * BAR_WIDTH / total.max(1);
        let tip = if filled < BAR_WIDTH { ">" } else { "" };
        let mut text = format!("[{:BAR_WIDTH$}] {done}/{total}", "=".repeat(filled) + tip);
        for (count, what) in [(self.not_found, "not found"), (self.failed, "failed")] {
            if count > 0 {
                let _ = write!(text, ", {count} {what}");
            }
        }
        text
    }

    /// What it comes to, and what to do about it.
    fn sum(self, order: &Order) -> String {
        let Self { deleted, not_found, failed, not_started, unproven } = self;
        let total = deleted + not_found + failed + not_started;
        if total == 0 {
            return "standard input names no keys: nothing to delete\n".to_owned();
        }
        let mut text = format!(
            "{total} keys: {deleted} deleted, {not_found} not found, {failed} failed, {not_started} not started\n"
        );
        if not_found > 0 {
            text.push_str(
                "Not found means deleted before, or never there: look whether you expected each of those.\n",
            );
        }
        if order.wait.is_some() && unproven > 0 {
            let _ = writeln!(
                text,
                "Of {unproven} deleted keys not every region is known to have forgotten them; \
                 `evictd api propagation get-receipt` tells more."
            );
        }
        if failed + not_started > 0 {
            text.push_str(
                "Run it again with the same list to go on: what is gone will be told as not found.\n",
            );
        }
        text
    }

    fn exit_code(self, order: &Order) -> u8 {
        if self.failed + self.not_started > 0 || order.strict && self.not_found > 0 {
            1
        } else if order.wait.is_some() && self.unproven > 0 {
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

    fn order(wait: bool, strict: bool) -> Order {
        Order { permanent: false, concurrency: 8, strict, wait: wait.then_some(Duration::from_secs(30)) }
    }

    fn reached(state: &'static str) -> Propagation {
        let mut propagation = Propagation::nothing("req_1", Duration::from_secs(30));
        propagation.state = state.into();
        propagation.r#final = state != "pending";
        propagation.final_after_ms = propagation.r#final.then_some(4.25);
        propagation
    }

    fn deleted(reached: Option<Propagation>) -> Fate {
        Fate::Deleted { request_id: "req_1".to_owned(), reached: reached.map(Box::new) }
    }

    #[test]
    fn each_fate_has_its_line() {
        for (fate, text, json) in [
            (deleted(None), "deleted  req_1", r#""result":"deleted","requestId":"req_1"}"#),
            (Fate::NotFound { maybe_now: false }, "not found", r#""result":"notFound"}"#),
            (
                Fate::NotFound { maybe_now: true },
                "not found  (an earlier attempt got no answer, and may have deleted it)",
                r#""result":"notFound","note":"an earlier attempt got no answer, and may have deleted it"}"#,
            ),
            (Fate::Failed("no".to_owned()), "failed: no", r#""result":"failed","error":"no"}"#),
            (Fate::NotStarted, "not started", r#""result":"notStarted"}"#),
        ] {
            assert_eq!(line("key_1", &fate, false), format!("key_1  {text}\n"));
            assert_eq!(line("key_1", &fate, true), format!("{{\"keyId\":\"key_1\",{json}\n"));
        }
        let confirmed = deleted(Some(reached("confirmed")));
        assert_eq!(line("key_1", &confirmed, false), "key_1  deleted  req_1  confirmed after 4.2ms\n");
        assert!(line("key_1", &confirmed, true).contains(r#""propagation":{"requestId":"req_1""#));
    }

    #[test]
    fn the_exit_code_tells_whether_all_are_gone() {
        let count = |fates: &[Fate]| {
            let mut count = Count::default();
            for fate in fates {
                count.add(fate);
            }
            count
        };
        let not_found = || Fate::NotFound { maybe_now: false };
        let (lenient, strict, waiting) = (order(false, false), order(false, true), order(true, false));
        assert_eq!(count(&[]).exit_code(&lenient), 0);
        assert_eq!(count(&[deleted(None), not_found()]).exit_code(&lenient), 0);
        assert_eq!(count(&[deleted(None), not_found()]).exit_code(&strict), 1);
        assert_eq!(count(&[deleted(None), Fate::NotStarted]).exit_code(&lenient), 1);
        assert_eq!(count(&[deleted(Some(reached("elapsed")))]).exit_code(&waiting), 0);
        for open in [None, Some(reached("pending")), Some(reached("unproven"))] {
            assert_eq!(count(&[deleted(open)]).exit_code(&waiting), 3);
        }
        assert_eq!(count(&[deleted(None), Fate::Failed(String::new())]).exit_code(&waiting), 1);
    }

    #[test]
    fn the_sum_says_what_to_look_at() {
        let count = Count { deleted: 3, not_found: 2, failed: 1, not_started: 4, unproven: 3 };
        let sum = count.sum(&order(false, false));
        assert!(sum.starts_with("10 keys: 3 deleted, 2 not found, 1 failed, 4 not started\n"), "{sum}");
        assert!(
            sum.contains("never there") && sum.contains("Run it again") && !sum.contains("region"),
            "{sum}"
        );
        assert!(count.sum(&order(true, false)).contains("Of 3 deleted keys"));
        let all = Count { deleted: 3, ..Count::default() };
        let sum = all.sum(&order(false, false));
        assert_eq!(sum, "3 keys: 3 deleted, 0 not found, 0 failed, 0 not started\n");
        assert!(Count::default().sum(&order(false, false)).contains("nothing to delete"));
    }

    #[test]
    fn the_progress_fills_its_bar() {
        let progress = |deleted| Count { deleted, ..Count::default() }.progress(500);
        assert_eq!(progress(0), format!("[>{}] 0/500", " ".repeat(29)));
        assert_eq!(progress(250), format!("[{}>{}] 250/500", "=".repeat(15), " ".repeat(14)));
        assert_eq!(progress(500), format!("[{}] 500/500", "=".repeat(30)));
        let count = Count { deleted: 1, not_found: 2, failed: 3, ..Count::default() };
        assert!(count.progress(10).ends_with("6/10, 2 not found, 3 failed"));
    }
}
