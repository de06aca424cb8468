//! What is told to the publishers of each change that was applied here.
//!
//! Announcements may get lost, so each apply report goes with three of them: the one that first covers its change,
//! and the next two.

use std::collections::VecDeque;

use evictd_core::exposure::ApplyReport;
use evictd_core::limits::APPLY_REPORTS_MAX;
use evictd_core::position::LogPosition;

/// With how many announcements an apply report goes.
const TELLINGS: u8 = 3;

/// Apply reports that wait. Of more, the oldest are given up: receipts then lack this agent's measurements.
const WAITING_MAX: usize = 16 * APPLY_REPORTS_MAX;

/// The apply reports that are still to be told, in their turn.
#[derive(Debug, Default)]
pub(crate) struct ApplyReportQueue(VecDeque<Waiting>);

#[derive(Debug)]
struct Waiting {
    apply_report: ApplyReport,
    tellings: u8,
}

impl ApplyReportQueue {
    pub(crate) fn push(&mut self, apply_report: ApplyReport) {
        if self.0.len() == WAITING_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Waiting { apply_report, tellings: 0 });
    }

    /// The apply reports for an announcement of `applied`, at most as many as fit, those first that were told least.
    /// What isn't covered yet waits; what belongs to an older epoch is of no use to anybody.
    pub(crate) fn told_with(&mut self, applied: LogPosition) -> Vec<ApplyReport> {
        self.0.retain(|Waiting { apply_report, tellings }| {
            *tellings < TELLINGS && apply_report.position.epoch() >= applied.epoch()
        });
        self.0.make_contiguous().sort_by_key(|waiting| waiting.tellings);
        let is_covered = |apply_report: &ApplyReport| {
            apply_report.position <= applied && apply_report.position.epoch() == applied.epoch()
        };
        let covered =
            self.0.iter_mut().filter(|waiting| is_covered(&waiting.apply_report)).take(APPLY_REPORTS_MAX);
        covered
            .map(|waiting| {
                waiting.tellings += 1;
                waiting.apply_report
            })
            .collect()
    }

    /// The announcement that these went with wasn't sent.
    pub(crate) fn unsent(&mut self, told: &[ApplyReport]) {
        for waiting in self.0.iter_mut().filter(|waiting| told.contains(&waiting.apply_report)) {
            waiting.tellings = waiting.tellings.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use evictd_core::exposure::Exposure;
    use evictd_core::offset::DurationRange;

    use super::*;

    fn apply_report(epoch: u32, position: u64) -> ApplyReport {
        let position = LogPosition::new(epoch, position).unwrap();
        ApplyReport { position, lag: DurationRange::default(), exposure: Exposure::default() }
    }

    fn told(apply_reports: &mut ApplyReportQueue, epoch: u32, applied: u64) -> Vec<u64> {
        let told = apply_reports.told_with(LogPosition::new(epoch, applied).unwrap());
        told.iter().map(|apply_report| apply_report.position.position()).collect()
    }

    #[test]
    fn apply_report_is_sent_in_three_announcements() {
        let mut apply_reports = ApplyReportQueue::default();
        apply_reports.push(apply_report(1, 5));
        apply_reports.push(apply_report(1, 7));
        assert_eq!(told(&mut apply_reports, 1, 4), [0; 0]);
        assert_eq!(told(&mut apply_reports, 1, 5), [5]);
        assert_eq!(told(&mut apply_reports, 1, 7), [7, 5], "first what nobody was told yet");
        assert_eq!(told(&mut apply_reports, 1, 7), [7, 5]);
        assert_eq!(told(&mut apply_reports, 1, 7), [7]);
        assert_eq!(told(&mut apply_reports, 1, 7), [0; 0]);
    }

    #[test]
    fn what_was_not_sent_goes_with_later_ones() {
        let mut apply_reports = ApplyReportQueue::default();
        apply_reports.push(apply_report(1, 5));
        for _ in 0..5 {
            let told = apply_reports.told_with(LogPosition::new(1, 5).unwrap());
            assert_eq!(told.len(), 1);
            apply_reports.unsent(&told);
        }
        for _ in 0..TELLINGS {
            assert_eq!(told(&mut apply_reports, 1, 5), [5]);
        }
        assert_eq!(told(&mut apply_reports, 1, 5), [0; 0]);
    }

    #[test]
    fn of_many_all_get_their_turn_and_the_oldest_are_given_up() {
        let mut apply_reports = ApplyReportQueue::default();
        let all = 2 * WAITING_MAX as u64;
        (1..=all).for_each(|position| apply_reports.push(apply_report(1, position)));
        let mut seen = Vec::new();
        for _ in 0..usize::from(TELLINGS) * WAITING_MAX / APPLY_REPORTS_MAX {
            let now = told(&mut apply_reports, 1, all);
            assert_eq!(now.len(), APPLY_REPORTS_MAX);
            seen.extend(now);
        }
        assert_eq!(told(&mut apply_reports, 1, all), [0; 0]);
        seen.sort_unstable();
        let expected = (all - WAITING_MAX as u64 + 1..=all).flat_map(|position| [position; 3]);
        assert_eq!(seen, expected.collect::<Vec<_>>());
    }

    #[test]
    fn what_belongs_to_an_older_epoch_is_dropped() {
        let mut apply_reports = ApplyReportQueue::default();
        apply_reports.push(apply_report(1, 5));
        apply_reports.push(apply_report(2, 6));
        assert_eq!(told(&mut apply_reports, 2, 5), [0; 0]);
        assert_eq!(told(&mut apply_reports, 2, 6), [6]);
    }
}
