//! `--wait`: shows how far a change has come, region by region, until its receipt is final.
//!
//! The change itself was answered before anything here begins. What is shown comes from a few questions for its
//! receipt, with growing pauses; the milliseconds are the publisher's, so that the pauses don't blur them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use evictd_wire::api::envelope::Success;
use evictd_wire::api::propagation::{Propagation, RegionPropagation};
use evictd_wire::api::requests::GetReceipt;
use serde_json::value::RawValue;

use super::client::{Answer, Call, Repeat, World};
use super::settings::Server;

/// The exit code when not every region is known to have forgotten the key: the wait ran out, or an agent serves
/// stale records by policy. The change itself is committed.
pub(super) const UNPROVEN: u8 = 3;

/// The pause before the second question; each further one is half as long again.
const FIRST_PAUSE: Duration = Duration::from_millis(25);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What stands in the place of a region, by its state: a sign, and the colour of a terminal.
fn sign(state: &str) -> (char, &'static str) {
    match state {
        "confirmed" => ('✓', "\x1b[32m"),
        "elapsed" => ('✓', "\x1b[33m"),
        "unproven" => ('✗', "\x1b[31m"),
        "absent" => ('-', "\x1b[2m"),
        _ => ('…', "\x1b[2m"),
    }
}

/// How the way through the regions is shown.
#[derive(Debug)]
pub(super) enum Screen {
    /// Not at all: it will stand in the whole answer.
    Silent,
    /// A line per region, when it is settled.
    Lines {
        /// Regions that have their line.
        settled: BTreeSet<String>,
    },
    /// A line per region, drawn again and again.
    Live {
        /// Lines to go back over.
        drawn: usize,
        /// Whether colours are wanted.
        colours: bool,
    },
}

impl Screen {
    /// What to print now that this is known.
    pub(super) fn update(&mut self, propagation: &Propagation) -> String {
        let mut out = String::new();
        let width = propagation.regions.iter().map(|region| region.region.len()).max().unwrap_or_default();
        match self {
            Self::Silent => {}
            Self::Lines { settled } => {
                for region in propagation.regions.iter().filter(|region| region.state != "pending") {
                    if settled.insert(region.region.clone()) {
                        let _ = writeln!(out, "{}", line(region, 0));
                    }
                }
            }
            Self::Live { drawn, colours } => {
                if *drawn > 0 {
                    let _ = write!(out, "\x1b[{drawn}A");
                }
                for region in &propagation.regions {
                    let (sign, colour) = sign(&region.state);
                    let (on, off) = if *colours { (colour, "\x1b[0m") } else { ("", "") };
                    let _ = writeln!(out, "\x1b[2K{on}{sign} {}{off}", line(region, width));
                }
                // A region that is gone leaves its line empty.
                for _ in propagation.regions.len()..*drawn {
                    out.push_str("\x1b[2K\n");
                }
                *drawn = propagation.regions.len().max(*drawn);
            }
        }
        out
    }

    /// The last lines: of a pipe the regions that it has not heard of yet, and how it ended.
    pub(super) fn conclude(&self, propagation: &Propagation) -> String {
        let mut out = String::new();
        match self {
            Self::Silent => return out,
            Self::Lines { settled } => {
                for region in propagation.regions.iter().filter(|region| !settled.contains(&region.region)) {
                    let _ = writeln!(out, "{}", line(region, 0));
                }
            }
            Self::Live { .. } => {}
        }
        out + &ending(propagation)
    }
}

/// How it ended, in a sentence.
fn ending(propagation: &Propagation) -> String {
    let after = propagation.final_after_ms.map(|ms| format!(" after {}", duration(ms))).unwrap_or_default();
    match &*propagation.state {
        "confirmed" if propagation.position.is_none() && propagation.regions.is_empty() => {
            "confirmed: no agent has it cached\n".to_owned()
        }
        "confirmed" if is_unheard(propagation) => {
            format!("final{after}: there is no agent that could confirm\n")
        }
        "confirmed" => format!("confirmed{after}\n"),
        "elapsed" => format!(
            "elapsed{after}: not every agent confirmed, but the bound has elapsed, and none answers from before\n"
        ),
        "unproven" => {
            format!("unproven{after}: an agent that didn't confirm serves stale records by policy\n")
        }
        _ => format!(
            "pending: it goes on without you; look with\n  evictd api propagation get-receipt --request-id={}\n",
            propagation.request_id
        ),
    }
}

/// Whether a change has gone through all regions without meeting a single agent.
fn is_unheard(propagation: &Propagation) -> bool {
    let nobody = propagation.regions.iter().all(|region| region.instances == 0);
    propagation.r#final && propagation.position.is_some() && nobody
}

/// What to tell people besides: a change that met no agent is in force, but that there is none is hardly meant.
pub(super) fn warning(propagation: &Propagation) -> Option<String> {
    if !is_unheard(propagation) {
        return None;
    }
    let regions: Vec<_> = propagation.regions.iter().map(|region| region.region.as_str()).collect();
    let place = match &regions[..] {
        [] => "anywhere".to_owned(),
        regions => format!("in {}", regions.join(", ")),
    };
    Some(format!(
        "warning: the publisher has heard of no agent {place}, so nobody has confirmed. If agents should be running, \
         ask their /readyz what they wait for.\n"
    ))
}

/// How it ended, in a word or two.
pub(super) fn in_brief(propagation: &Propagation) -> String {
    let after = propagation.final_after_ms.map(|ms| format!(" after {}", duration(ms))).unwrap_or_default();
    match &*propagation.state {
        "confirmed" if is_unheard(propagation) => "no agent".to_owned(),
        state => format!("{state}{after}"),
    }
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
    text
}

fn duration(ms: f64) -> String {
    if ms < 1_000.0 { format!("{ms:.1}ms") } else { format!("{:.2}s", ms / 1_000.0) }
}

/// Follows the receipt of an answered change until it is final, or until `limit` is over. `None` if the answer
/// isn't framed as evictd frames it.
pub(super) fn follow(
    world: &mut impl World,
    answer: &Answer,
    limit: Duration,
    screen: &mut Screen,
    print: &mut impl FnMut(&str),
) -> Option<Propagation> {
    let framed: Success<&RawValue> = serde_json::from_slice(&answer.body).ok()?;
    let request_id = framed.meta.request_id;
    let mut known = framed.meta.propagation.map(|propagation| *propagation);
    let body = serde_json::to_vec(&GetReceipt { request_id }).ok()?;
    let call = Call {
        path: GetReceipt::PATH,
        body,
        server: Server::Publisher,
        repeat: Repeat::Harmless,
        prefer: None,
    };
    let (until, mut pause) = (world.elapsed() + limit, FIRST_PAUSE);
    loop {
        if let Some(propagation) = &known {
            print(&screen.update(propagation));
            if propagation.r#final {
                break;
            }
        }
        let left = until.saturating_sub(world.elapsed());
        if left.is_zero() {
            break;
        }
        if !world.rest(pause.min(left)) {
            break;
        }
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
        // A publisher that is being restarted, say, is asked again: the receipt outlives it.
        if let Ok(answer) = world.attempt(&call) {
            if let Ok(Success { data, .. }) = serde_json::from_slice::<Success<Propagation>>(&answer.body) {
                known = Some(data);
            }
            pause = answer.retry_after.unwrap_or(pause);
        }
    }
    if let Some(propagation) = &known {
        print(&screen.conclude(propagation));
    }
    known
}

/// Whether the change is known to be in force everywhere.
pub(super) fn is_proven(propagation: &Propagation) -> bool {
    propagation.r#final && matches!(&*propagation.state, "confirmed" | "elapsed")
}

/// The whole answer with what is known now.
pub(super) fn with_propagation(answer: &Answer, propagation: &Propagation) -> Option<Vec<u8>> {
    let mut framed: Success<&RawValue> = serde_json::from_slice(&answer.body).ok()?;
    framed.meta.propagation = Some(Box::new(propagation.clone()));
    Some(framed.to_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::super::client::Lost;
    use super::super::client::Progress;
    use super::*;

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

    fn propagation(state: &'static str, regions: &[RegionPropagation]) -> Propagation {
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
    struct FakeWorld {
        receipts: VecDeque<Option<Propagation>>,
        now: Duration,
        asked: usize,
    }

    impl FakeWorld {
        fn telling(receipts: impl IntoIterator<Item = Option<Propagation>>) -> Self {
            Self { receipts: receipts.into_iter().collect(), now: Duration::ZERO, asked: 0 }
        }
    }

    impl World for FakeWorld {
        fn attempt(&mut self, call: &Call) -> Result<Answer, Lost> {
            assert_eq!(call.path, GetReceipt::PATH);
            assert_eq!(call.body, br#"{"requestId":"req_1"}"#);
            self.asked += 1;
            let next = if self.receipts.len() > 1 {
                self.receipts.pop_front()
            } else {
                self.receipts.front().cloned()
            };
            match next.unwrap() {
                Some(receipt) => Ok(answer(Success::new("req_2", receipt).to_bytes())),
                None => Err(Lost { progress: Progress::NotSent, why: "refused".into() }),
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

    fn answer(body: Vec<u8>) -> Answer {
        Answer { status: 200, body, retry_after: None }
    }

    fn changed(propagation: Option<Propagation>) -> Answer {
        let mut success = Success::new("req_1", serde_json::json!({}));
        success.meta.propagation = propagation.map(Box::new);
        answer(success.to_bytes())
    }

    fn following(world: &mut FakeWorld, screen: &mut Screen, limit: Duration) -> (String, Propagation) {
        let mut printed = String::new();
        let answer = changed(Some(propagation("pending", &[])));
        let reached = follow(world, &answer, limit, screen, &mut |text| printed.push_str(text)).unwrap();
        (printed, reached)
    }

    #[test]
    fn each_region_gets_its_line_when_it_is_settled() {
        let (eu, us) = (region("eu", "confirmed", Some(4.25)), region("us", "confirmed", Some(12.0)));
        let waiting = region("us", "pending", None);
        let mut world = FakeWorld::telling([
            Some(propagation("pending", &[eu.clone(), waiting.clone()])),
            None,
            Some(propagation("pending", &[eu.clone(), waiting])),
            Some(propagation("confirmed", &[eu, us])),
        ]);
        let mut screen = Screen::Lines { settled: BTreeSet::new() };
        let (printed, reached) = following(&mut world, &mut screen, Duration::from_secs(30));
        assert_eq!(printed, "eu  confirmed  4.2ms\nus  confirmed  12.0ms\nconfirmed after 12.3ms\n");
        assert!(is_proven(&reached));
        assert_eq!(world.asked, 4);
    }

    #[test]
    fn a_terminal_shows_one_line_per_region_and_draws_over_it() {
        let (eu, waiting) = (region("eu-1", "confirmed", Some(4.0)), region("us", "pending", None));
        let mut screen = Screen::Live { drawn: 0, colours: true };
        let first = screen.update(&propagation("pending", &[eu.clone(), waiting.clone()]));
        assert_eq!(
            first,
            "\x1b[2K\x1b[32m✓ eu-1  confirmed  4.0ms\x1b[0m\n\x1b[2K\x1b[2m… us    pending\x1b[0m\n"
        );
        let second = screen.update(&propagation("pending", &[eu, waiting]));
        assert!(second.starts_with("\x1b[2A"), "{second:?}");
        let mut plain = Screen::Live { drawn: 0, colours: false };
        let text = plain.update(&propagation("confirmed", &[region("eu", "confirmed", None)]));
        assert_eq!(text, "\x1b[2K✓ eu  confirmed\n");
    }

    #[test]
    fn a_wait_that_runs_out_says_how_to_go_on_and_asks_only_now_and_then() {
        let mut waiting = region("eu", "pending", None);
        waiting.missing_count = 2;
        let settled = region("us", "confirmed", Some(4.0));
        let mut world = FakeWorld::telling([Some(propagation("pending", &[waiting, settled]))]);
        let mut screen = Screen::Lines { settled: BTreeSet::new() };
        let (printed, reached) = following(&mut world, &mut screen, Duration::from_secs(30));
        let expected =
            "us  confirmed  4.0ms\neu  pending  waiting for 2 agents\npending: it goes on without you";
        assert!(printed.starts_with(expected), "{printed}");
        assert!(
            printed.ends_with("\n  evictd api propagation get-receipt --request-id=req_1\n"),
            "{printed}"
        );
        assert!(!is_proven(&reached));
        assert_eq!(world.now, Duration::from_secs(30));
        assert!(world.asked < 45, "{}", world.asked);
    }

    #[test]
    fn a_change_that_met_no_agent_does_not_look_confirmed() {
        let mut absent = region("eu", "absent", None);
        absent.instances = 0;
        for (regions, place) in [(vec![absent.clone()], "in eu,"), (Vec::new(), "anywhere,")] {
            let unheard = Propagation { position: Some(7), ..propagation("confirmed", &regions) };
            assert!(ending(&unheard).contains("no agent that could confirm"), "{}", ending(&unheard));
            assert!(warning(&unheard).unwrap().contains(place));
            assert_eq!(in_brief(&unheard), "no agent");
            // The change is in force all the same.
            assert!(is_proven(&unheard));
        }
        let heard = [absent, region("us", "confirmed", Some(1.0))];
        assert_eq!(warning(&Propagation { position: Some(7), ..propagation("confirmed", &heard) }), None);
        assert_eq!(warning(&propagation("confirmed", &[])), None, "nothing to confirm");
    }

    #[test]
    fn who_is_missing_is_named() {
        let mut elapsed = region("eu", "elapsed", None);
        elapsed.missing_count = 3;
        elapsed.missing = vec![evictd_wire::api::propagation::Missing {
            agent: "edge".to_owned(),
            instance: "00ff".to_owned(),
        }];
        assert_eq!(line(&elapsed, 0), "eu  elapsed  waiting for edge/00ff and 2 more");
        assert!(is_proven(&propagation("elapsed", &[elapsed.clone()])));
        assert!(!is_proven(&propagation("unproven", &[elapsed])));
    }

    #[test]
    fn the_whole_answer_holds_what_was_reached() {
        let body = with_propagation(&changed(None), &propagation("confirmed", &[])).unwrap();
        let framed: Success<serde_json::Value> = serde_json::from_slice(&body).unwrap();
        assert_eq!(framed.meta.propagation.unwrap().state, "confirmed");
        assert_eq!((framed.meta.request_id.as_str(), framed.data), ("req_1", serde_json::json!({})));
    }
}
