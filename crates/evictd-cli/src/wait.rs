//! `--wait`: shows how far a change has propagated, region by region, until its receipt is final.
//!
//! The change itself was answered before. A few queries for its receipt follow, with growing pauses. The
//! durations are the publisher's own, so the pauses do not blur them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use evictd_wire::api::envelope::Success;
use evictd_wire::api::propagation::{Propagation, RegionPropagation};
use evictd_wire::api::requests::GetReceipt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::value::RawValue;

use crate::call::{ApiAnswer, ApiCall, Repeat, Transport};
use crate::print::printable;

/// The exit code if the change is committed, but not proven in force in every region: the wait timed out, or an
/// agent serves stale records by policy.
pub(crate) const UNPROVEN: u8 = 3;

/// The pause before the second query; each further one is half as long again.
const FIRST_PAUSE: Duration = Duration::from_millis(25);

const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Where the state of the regions is shown.
pub(crate) enum WaitDisplay {
    /// Nowhere: the whole answer will contain it.
    Silent,
    /// In a pipe: a line per region once it is settled.
    Lines { settled: BTreeSet<String> },
    /// On a terminal: a line per region, redrawn.
    Live { bar: ProgressBar, colors: bool },
}

impl WaitDisplay {
    pub(crate) fn lines() -> Self {
        Self::Lines { settled: BTreeSet::new() }
    }

    pub(crate) fn live(terminal: ProgressDrawTarget, colors: bool) -> Self {
        let style = ProgressStyle::with_template("{msg}").expect("a constant template");
        Self::Live { bar: ProgressBar::with_draw_target(None, terminal).with_style(style), colors }
    }

    /// Shows a receipt. Returns the text to print.
    fn update(&mut self, receipt: &Propagation) -> String {
        match self {
            Self::Silent => {}
            Self::Lines { settled } => {
                let is_new = |region: &&RegionPropagation| {
                    region.state != "pending" && settled.insert(region.region.clone())
                };
                return receipt.regions.iter().filter(is_new).map(|region| line(region, 0) + "\n").collect();
            }
            Self::Live { bar, colors } => bar.set_message(marked_lines(receipt, *colors)),
        }
        String::new()
    }

    /// Returns the last text to print: the lines that are missing, and the outcome.
    fn conclude(&self, receipt: &Propagation) -> String {
        let lines: String = match self {
            Self::Silent => return String::new(),
            Self::Lines { settled } => {
                let missing = receipt.regions.iter().filter(|region| !settled.contains(&region.region));
                missing.map(|region| line(region, 0) + "\n").collect()
            }
            Self::Live { bar, colors } => {
                // The terminal may be too low for all regions while it is redrawn.
                bar.finish_and_clear();
                let lines = marked_lines(receipt, *colors);
                if lines.is_empty() { lines } else { lines + "\n" }
            }
        };
        lines + &outcome(receipt)
    }
}

/// Returns a line per region with a mark, in color.
fn marked_lines(receipt: &Propagation, colors: bool) -> String {
    let width = receipt.regions.iter().map(|region| region.region.len()).max().unwrap_or_default();
    let marked = |region: &RegionPropagation| {
        let (mark, color) = match &*region.state {
            "confirmed" => ('✓', "\x1b[32m"),
            "elapsed" => ('✓', "\x1b[33m"),
            "unproven" => ('✗', "\x1b[31m"),
            "absent" => ('-', "\x1b[2m"),
            _ => ('…', "\x1b[2m"),
        };
        let (on, off) = if colors { (color, "\x1b[0m") } else { ("", "") };
        format!("{on}{mark} {}{off}", line(region, width))
    };
    receipt.regions.iter().map(marked).collect::<Vec<_>>().join("\n")
}

/// Describes the outcome in a sentence.
fn outcome(receipt: &Propagation) -> String {
    let after = receipt.final_after_ms.map(|ms| format!(" after {}", duration(ms))).unwrap_or_default();
    match &*receipt.state {
        "confirmed" if receipt.position.is_none() && receipt.regions.is_empty() => {
            "confirmed: no agent has it cached\n".to_owned()
        }
        "confirmed" if met_no_agent(receipt) => format!("final{after}: there is no agent to confirm it\n"),
        "confirmed" => format!("confirmed{after}\n"),
        "elapsed" => format!(
            "elapsed{after}: not every agent confirmed, but the bound has elapsed, and no agent answers from an older \
             state\n"
        ),
        "unproven" => {
            format!("unproven{after}: an agent that did not confirm serves stale records by policy\n")
        }
        _ => format!(
            "pending: the publisher continues; show the receipt with\n  \
             evictd api propagation get-receipt --request-id={}\n",
            printable(&receipt.request_id)
        ),
    }
}

/// Describes the outcome in a word or two.
pub(crate) fn brief_outcome(receipt: &Propagation) -> String {
    let after = receipt.final_after_ms.map(|ms| format!(" after {}", duration(ms))).unwrap_or_default();
    match &*receipt.state {
        "confirmed" if met_no_agent(receipt) => "no agent".to_owned(),
        state => format!("{state}{after}"),
    }
}

/// Returns whether a change is final, and no region had an agent to confirm it.
fn met_no_agent(receipt: &Propagation) -> bool {
    let is_empty = receipt.regions.iter().all(|region| region.instances == 0);
    receipt.r#final && receipt.position.is_some() && is_empty
}

/// Returns a warning if no agent exists. The change is in force then, but a setup without agents is hardly meant.
pub(crate) fn warning(receipt: &Propagation) -> Option<String> {
    if !met_no_agent(receipt) {
        return None;
    }
    let regions: Vec<_> = receipt.regions.iter().map(|region| region.region.as_str()).collect();
    let place = match &regions[..] {
        [] => "in any region".to_owned(),
        regions => format!("in {}", regions.join(", ")),
    };
    Some(format!(
        "warning: the publisher has no agent {place}, so none has confirmed. If agents should be running, their \
         /readyz says what they wait for.\n"
    ))
}

/// `eu-central-1  confirmed  4.2ms`
fn line(region: &RegionPropagation, width: usize) -> String {
    let mut text = format!("{:width$}  {}", region.region, region.state);
    if let Some(ms) = region.confirmed_after_ms {
        let _ = write!(text, "  {}", duration(ms));
    }
    if region.missing_count > 0 && region.state != "confirmed" {
        let names: Vec<_> =
            region.missing.iter().map(|missing| format!("{}/{}", missing.agent, missing.instance)).collect();
        let (more, names) = (region.missing_count.saturating_sub(names.len()), names.join(", "));
        let _ = match (names.is_empty(), more) {
            (true, _) => write!(text, "  waiting for {more} agents"),
            (false, 0) => write!(text, "  waiting for {names}"),
            (false, _) => write!(text, "  waiting for {names} and {more} more"),
        };
    }
    if region.duplicate_names {
        text.push_str("  (several processes under one name)");
    }
    printable(&text)
}

fn duration(ms: f64) -> String {
    if ms < 1_000.0 { format!("{ms:.1}ms") } else { format!("{:.2}s", ms / 1_000.0) }
}

/// Queries the receipt of a change until it is final or `limit` has passed. Returns `None` if the answer to the
/// change has no receipt, and none arrived.
pub(crate) fn wait_for_regions(
    transport: &mut impl Transport,
    answer: &ApiAnswer,
    limit: Duration,
    display: &mut WaitDisplay,
    print: &mut impl FnMut(&str),
) -> Option<Propagation> {
    let success: Success<&RawValue> = serde_json::from_slice(&answer.body).ok()?;
    let request_id = success.meta.request_id;
    let mut latest = success.meta.propagation.map(|receipt| *receipt);
    let call = ApiCall::new(GetReceipt::PATH, &GetReceipt { request_id }, Repeat::Harmless).ok()?;
    let (deadline, mut pause) = (transport.elapsed() + limit, FIRST_PAUSE);
    loop {
        if let Some(receipt) = &latest {
            print(&display.update(receipt));
            if receipt.r#final {
                break;
            }
        }
        let left = deadline.saturating_sub(transport.elapsed());
        if left.is_zero() || !transport.rest(pause.min(left)) {
            break;
        }
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
        // A publisher that is restarting is queried again, because the receipt survives the restart.
        if let Ok(answer) = transport.attempt(&call) {
            if let Ok(Success { data, .. }) = serde_json::from_slice::<Success<Propagation>>(&answer.body) {
                latest = Some(data);
            }
            pause = answer.retry_after.unwrap_or(pause);
        }
    }
    if let Some(receipt) = &latest {
        print(&display.conclude(receipt));
    }
    latest
}

/// Returns whether the change is proven to be in force in every region.
pub(crate) fn is_proven(receipt: &Propagation) -> bool {
    receipt.r#final && matches!(&*receipt.state, "confirmed" | "elapsed")
}

/// Returns the whole answer with the latest receipt.
pub(crate) fn with_receipt(answer: &ApiAnswer, receipt: &Propagation) -> Option<Vec<u8>> {
    let mut success: Success<&RawValue> = serde_json::from_slice(&answer.body).ok()?;
    success.meta.propagation = Some(Box::new(receipt.clone()));
    Some(success.to_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use evictd_wire::api::propagation::MissingInstance;
    use indicatif::InMemoryTerm;

    use super::*;
    use crate::call::{Delivery, NoAnswer};

    fn region(name: &str, state: &'static str, after: Option<f64>) -> RegionPropagation {
        RegionPropagation {
            region: name.to_owned(),
            state: state.into(),
            instances: 1,
            confirmed_after_ms: after,
            missing: Vec::new(),
            missing_count: 0,
            lag_ms: None,
            exposure: None,
            duplicate_names: false,
        }
    }

    fn receipt(state: &'static str, regions: &[RegionPropagation]) -> Propagation {
        let bound = Duration::from_secs(30);
        Propagation {
            state: state.into(),
            r#final: state != "pending",
            final_after_ms: (state != "pending").then_some(12.34),
            regions: regions.to_vec(),
            ..Propagation::waiting("req_1", None, None, bound)
        }
    }

    /// A publisher that answers with these receipts, one after the other; `None` is a lost connection.
    struct ReceiptTransport {
        receipts: VecDeque<Option<Propagation>>,
        now: Duration,
        queries: usize,
    }

    impl ReceiptTransport {
        fn new(receipts: impl IntoIterator<Item = Option<Propagation>>) -> Self {
            Self { receipts: receipts.into_iter().collect(), now: Duration::ZERO, queries: 0 }
        }
    }

    impl Transport for ReceiptTransport {
        fn attempt(&mut self, call: &ApiCall) -> Result<ApiAnswer, NoAnswer> {
            assert_eq!(call.path, GetReceipt::PATH);
            assert_eq!(call.body, br#"{"requestId":"req_1"}"#);
            self.queries += 1;
            let next = if self.receipts.len() > 1 {
                self.receipts.pop_front()
            } else {
                self.receipts.front().cloned()
            };
            match next.unwrap() {
                Some(receipt) => Ok(answer(Success::new("req_2", receipt).to_bytes())),
                None => Err(NoAnswer { delivery: Delivery::NotSent, cause: "refused".into() }),
            }
        }

        fn elapsed(&self) -> Duration {
            self.now
        }

        fn pause(&mut self, _: Duration, _: &str) {
            unreachable!("the publisher has answered");
        }

        fn rest(&mut self, pause: Duration) -> bool {
            self.now += pause;
            true
        }
    }

    fn answer(body: Vec<u8>) -> ApiAnswer {
        ApiAnswer { status: 200, body, retry_after: None }
    }

    fn changed(receipt: Option<Propagation>) -> ApiAnswer {
        let mut success = Success::new("req_1", serde_json::json!({}));
        success.meta.propagation = receipt.map(Box::new);
        answer(success.to_bytes())
    }

    /// Waits for 30 s. Returns what was printed and the last receipt.
    fn wait(transport: &mut ReceiptTransport, display: &mut WaitDisplay) -> (String, Propagation) {
        let mut printed = String::new();
        let (answer, limit) = (changed(Some(receipt("pending", &[]))), Duration::from_secs(30));
        let print = &mut |text: &str| printed.push_str(text);
        let latest = wait_for_regions(transport, &answer, limit, display, print).unwrap();
        (printed, latest)
    }

    #[test]
    fn pipe_gets_a_line_per_settled_region() {
        let (eu, us) = (region("eu", "confirmed", Some(4.25)), region("us", "confirmed", Some(12.0)));
        let waiting = region("us", "pending", None);
        let mut transport = ReceiptTransport::new([
            Some(receipt("pending", &[eu.clone(), waiting.clone()])),
            None,
            Some(receipt("pending", &[eu.clone(), waiting])),
            Some(receipt("confirmed", &[eu, us])),
        ]);
        let (printed, latest) = wait(&mut transport, &mut WaitDisplay::lines());
        assert_eq!(printed, "eu  confirmed  4.2ms\nus  confirmed  12.0ms\nconfirmed after 12.3ms\n");
        assert!(is_proven(&latest));
        assert_eq!(transport.queries, 4);
    }

    #[test]
    fn terminal_redraws_a_line_per_region() {
        let (eu, waiting) = (region("eu-1", "confirmed", Some(4.0)), region("us", "pending", None));
        let terminal = InMemoryTerm::new(10, 80);
        let target = || ProgressDrawTarget::term_like(Box::new(terminal.clone()));
        let mut display = WaitDisplay::live(target(), true);
        let pending = receipt("pending", &[eu.clone(), waiting]);
        assert_eq!(
            marked_lines(&pending, true),
            "\x1b[32m✓ eu-1  confirmed  4.0ms\x1b[0m\n\x1b[2m… us    pending\x1b[0m"
        );
        assert_eq!(display.update(&pending), "");
        assert_eq!(terminal.contents(), "✓ eu-1  confirmed  4.0ms\n… us    pending");
        let confirmed = receipt("confirmed", &[eu, region("us", "confirmed", Some(9.0))]);
        display.update(&confirmed);
        assert_eq!(terminal.contents(), "✓ eu-1  confirmed  4.0ms\n✓ us    confirmed  9.0ms");

        let mut plain = WaitDisplay::live(target(), false);
        plain.update(&confirmed);
        let last = plain.conclude(&confirmed);
        assert_eq!(last, "✓ eu-1  confirmed  4.0ms\n✓ us    confirmed  9.0ms\nconfirmed after 12.3ms\n");
    }

    /// Failure: a terminal with fewer lines than regions hides some of them for good.
    #[test]
    fn low_terminal_gets_all_regions_in_the_end() {
        let regions: Vec<_> = (0..20).map(|n| region(&format!("r{n:02}"), "confirmed", None)).collect();
        let terminal = InMemoryTerm::new(5, 80);
        let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
        let mut display = WaitDisplay::live(target, false);
        let confirmed = receipt("confirmed", &regions);
        display.update(&confirmed);
        let last = display.conclude(&confirmed);
        assert_eq!((last.lines().count(), terminal.contents().as_str()), (21, ""));
    }

    #[test]
    fn timed_out_wait_names_the_command_and_queries_seldom() {
        let mut waiting = region("eu", "pending", None);
        waiting.missing_count = 2;
        let settled = region("us", "confirmed", Some(4.0));
        let mut transport = ReceiptTransport::new([Some(receipt("pending", &[waiting, settled]))]);
        let (printed, latest) = wait(&mut transport, &mut WaitDisplay::lines());
        let expected =
            "us  confirmed  4.0ms\neu  pending  waiting for 2 agents\npending: the publisher continues";
        assert!(printed.starts_with(expected), "{printed}");
        assert!(
            printed.ends_with("\n  evictd api propagation get-receipt --request-id=req_1\n"),
            "{printed}"
        );
        assert!(!is_proven(&latest));
        assert_eq!(transport.now, Duration::from_secs(30));
        assert!(transport.queries < 45, "{}", transport.queries);
    }

    #[test]
    fn change_without_agents_does_not_look_confirmed() {
        let mut absent = region("eu", "absent", None);
        absent.instances = 0;
        for (regions, place) in [(vec![absent.clone()], "in eu,"), (Vec::new(), "in any region,")] {
            let unmet = Propagation { position: Some(7), ..receipt("confirmed", &regions) };
            assert!(outcome(&unmet).contains("no agent to confirm"), "{}", outcome(&unmet));
            assert!(warning(&unmet).unwrap().contains(place));
            assert_eq!(brief_outcome(&unmet), "no agent");
            // The change is in force nevertheless.
            assert!(is_proven(&unmet));
        }
        let met = [absent, region("us", "confirmed", Some(1.0))];
        assert_eq!(warning(&Propagation { position: Some(7), ..receipt("confirmed", &met) }), None);
        assert_eq!(warning(&receipt("confirmed", &[])), None, "nothing to confirm");
    }

    #[test]
    fn missing_agents_are_named() {
        let mut elapsed = region("eu", "elapsed", None);
        elapsed.missing_count = 3;
        elapsed.missing = vec![MissingInstance { agent: "edge".to_owned(), instance: "00ff".to_owned() }];
        assert_eq!(line(&elapsed, 0), "eu  elapsed  waiting for edge/00ff and 2 more");
        assert!(is_proven(&receipt("elapsed", &[elapsed.clone()])));
        assert!(!is_proven(&receipt("unproven", &[elapsed])));
    }

    #[test]
    fn whole_answer_contains_the_latest_receipt() {
        let body = with_receipt(&changed(None), &receipt("confirmed", &[])).unwrap();
        let success: Success<serde_json::Value> = serde_json::from_slice(&body).unwrap();
        assert_eq!(success.meta.propagation.unwrap().state, "confirmed");
        assert_eq!((success.meta.request_id.as_str(), success.data), ("req_1", serde_json::json!({})));
    }
}
