//! The publisher's side: when a round of probes runs, how old its reads are, and when a publisher
//! must leave its queue groups (R7, R8, R14).

use std::time::Duration;

use crate::protection::Protection;
use crate::time::LeaseTime;

/// The probes that wait for a round. Rounds start at most every `spacing`, one at a time. Probes
/// that arrive meanwhile share the next round, so that the store's load doesn't grow with the
/// agents.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rounds<P> {
    spacing: Duration,
    waiting: Vec<P>,
    waiting_max: usize,
    running_since: Option<LeaseTime>,
    last_start: Option<LeaseTime>,
    oldest_waiting: Option<LeaseTime>,
    failing_since: Option<LeaseTime>,
}

impl<P> Rounds<P> {
    /// Without probes. More than `waiting_max` at once are refused.
    pub fn new(spacing: Duration, waiting_max: usize) -> Self {
        Self {
            spacing,
            waiting: Vec::new(),
            waiting_max,
            running_since: None,
            last_start: None,
            oldest_waiting: None,
            failing_since: None,
        }
    }

    /// Adds a probe, or returns it as the error when too many wait.
    pub fn add(&mut self, probe: P, now: LeaseTime) -> Result<(), P> {
        if self.waiting.len() >= self.waiting_max {
            return Err(probe);
        }
        self.waiting.push(probe);
        self.oldest_waiting.get_or_insert(now);
        Ok(())
    }

    /// Starts a round if one is due, and returns the probes that it answers: exactly those that
    /// arrived before it.
    pub fn start(&mut self, now: LeaseTime) -> Option<Vec<P>> {
        if self.start_at().is_none_or(|due| now < due) {
            return None;
        }
        self.running_since = Some(now);
        self.last_start = Some(now);
        self.oldest_waiting = None;
        Some(std::mem::take(&mut self.waiting))
    }

    /// The running round ended.
    pub fn finish(&mut self, succeeded: bool) {
        let since = self.running_since.take();
        self.failing_since = if succeeded { None } else { self.failing_since.or(since) };
    }

    pub fn waiting(&self) -> &[P] {
        &self.waiting
    }

    /// When the next round is due; `None` while one runs or no probe waits.
    pub fn start_at(&self) -> Option<LeaseTime> {
        if self.running_since.is_some() || self.waiting.is_empty() {
            return None;
        }
        Some(self.last_start.map_or(LeaseTime(0), |last| last.after(self.spacing)))
    }

    /// Whether a probe has waited longer than `patience` for a round that succeeds. Then the
    /// publisher must leave the queue group, or probes would reach it instead of a publisher that
    /// can answer (R14). Probes to all publishers still arrive, and a round that succeeds ends the
    /// stall.
    pub fn stalled(&self, now: LeaseTime, patience: Duration) -> bool {
        let waits = [self.running_since, self.oldest_waiting, self.failing_since];
        Protection::StalledPublishersKeepSilent.holds()
            && waits.into_iter().flatten().any(|since| now.since(since) >= patience)
    }
}

/// Returns how old the last round is, which began at `began`. A read proves nothing about a later
/// moment, because its server may have been demoted since (R8). Without a round it is decades.
pub fn fence_age(began: Option<LeaseTime>, now: LeaseTime) -> Duration {
    if Protection::LookupsCarryTheFenceAge.holds() {
        now.since(began.unwrap_or_default())
    } else {
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACING: Duration = Duration::from_millis(250);

    fn ms(ms: u64) -> LeaseTime {
        LeaseTime(1_000_000 + ms * 1000)
    }

    #[test]
    fn ten_thousand_probes_share_one_round() {
        let mut rounds = Rounds::new(SPACING, 20_000);
        rounds.add(0, ms(0)).unwrap();
        assert_eq!(rounds.start(ms(0)), Some(vec![0]));
        for probe in 1..=10_000 {
            rounds.add(probe, ms(1)).unwrap();
        }
        assert_eq!(rounds.start(ms(2)), None, "a round is running");
        rounds.finish(true);
        assert_eq!(rounds.start(ms(249)), None, "rounds are spaced");
        assert_eq!(rounds.start(ms(250)).map(|probes| probes.len()), Some(10_000));
        rounds.finish(true);
        assert_eq!(rounds.start(ms(900)), None, "no probe waits");
    }

    #[test]
    fn probe_during_a_round_waits_for_the_next_one() {
        let mut rounds = Rounds::new(SPACING, 10);
        rounds.add("early", ms(0)).unwrap();
        assert_eq!(rounds.start(ms(0)), Some(vec!["early"]));
        rounds.add("late", ms(1)).unwrap();
        rounds.finish(true);
        assert_eq!(rounds.start(ms(250)), Some(vec!["late"]));
    }

    #[test]
    fn probes_above_the_limit_are_refused() {
        let mut rounds = Rounds::new(SPACING, 1);
        rounds.add(1, ms(0)).unwrap();
        assert_eq!(rounds.add(2, ms(0)), Err(2));
    }

    #[test]
    fn round_that_does_not_finish_counts_as_stalled() {
        let patience = Duration::from_secs(2);
        let mut rounds = Rounds::new(SPACING, 10);
        assert!(!rounds.stalled(ms(60_000), patience), "no probe arrived");
        rounds.add(1, ms(0)).unwrap();
        rounds.start(ms(0)).unwrap();
        assert!(!rounds.stalled(ms(1_999), patience));
        assert!(rounds.stalled(ms(2_000), patience));
        rounds.finish(true);
        assert!(!rounds.stalled(ms(2_000), patience));
    }

    #[test]
    fn failing_rounds_count_as_stalled_until_one_succeeds() {
        let patience = Duration::from_secs(2);
        let mut rounds = Rounds::new(SPACING, 10);
        for at in [0, 1_000, 2_000] {
            rounds.add(1, ms(at)).unwrap();
            rounds.start(ms(at)).unwrap();
            rounds.finish(false);
        }
        assert!(rounds.stalled(ms(2_000), patience));
        rounds.add(1, ms(3_000)).unwrap();
        rounds.start(ms(3_000)).unwrap();
        rounds.finish(true);
        assert!(!rounds.stalled(ms(3_000), patience));
    }
}
