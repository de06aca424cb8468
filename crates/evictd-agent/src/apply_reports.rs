//! The queue of apply reports for the publishers.
//!
//! Announcements may be lost, so each apply report is sent in three of them: the first one that covers its change, and
//! the next two.

use std::collections::VecDeque;

use evictd_core::exposure::ApplyReport;
use evictd_core::limits::APPLY_REPORTS_MAX;
use evictd_core::position::LogPosition;

/// Announcements per apply report.
const SENDS: u8 = 3;

/// The length of the queue. Beyond it the oldest are dropped: receipts then lack this agent's measurements.
const QUEUED_MAX: usize = 16 * APPLY_REPORTS_MAX;

/// The apply reports that are still to be sent.
#[derive(Debug, Default)]
pub(crate) struct ApplyReportQueue(VecDeque<QueuedReport>);

#[derive(Debug)]
struct QueuedReport {
    apply_report: ApplyReport,
    sent: u8,
}

impl ApplyReportQueue {
    pub(crate) fn push(&mut self, apply_report: ApplyReport) {
        if self.0.len() == QUEUED_MAX {
            self.0.pop_front();
        }
        self.0.push_back(QueuedReport { apply_report, sent: 0 });
    }

    /// Returns the apply reports for an announcement of `applied`, as many as fit, those first that were sent least.
    /// Those above `applied` stay queued. Those of an older epoch are dropped.
    pub(crate) fn take_for(&mut self, applied: LogPosition) -> Vec<ApplyReport> {
        self.0.retain(|QueuedReport { apply_report, sent }| {
            *sent < SENDS && apply_report.position.epoch() >= applied.epoch()
        });
        self.0.make_contiguous().sort_by_key(|queued| queued.sent);
        let is_covered = |apply_report: &ApplyReport| {
            apply_report.position <= applied && apply_report.position.epoch() == applied.epoch()
        };
        let covered =
            self.0.iter_mut().filter(|queued| is_covered(&queued.apply_report)).take(APPLY_REPORTS_MAX);
        covered
            .map(|queued| {
                queued.sent += 1;
                queued.apply_report
            })
            .collect()
    }

    /// Takes back [`Self::take_for`]: the announcement couldn't be sent.
    pub(crate) fn unsent(&mut self, sent: &[ApplyReport]) {
        for queued in self.0.iter_mut().filter(|queued| sent.contains(&queued.apply_report)) {
            queued.sent = queued.sent.saturating_sub(1);
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

    fn sent(apply_reports: &mut ApplyReportQueue, epoch: u32, applied: u64) -> Vec<u64> {
        let sent = apply_reports.take_for(LogPosition::new(epoch, applied).unwrap());
        sent.iter().map(|apply_report| apply_report.position.position()).collect()
    }

    #[test]
    fn apply_report_is_sent_in_three_announcements() {
        let mut apply_reports = ApplyReportQueue::default();
        apply_reports.push(apply_report(1, 5));
        apply_reports.push(apply_report(1, 7));
        assert_eq!(sent(&mut apply_reports, 1, 4), [0; 0]);
        assert_eq!(sent(&mut apply_reports, 1, 5), [5]);
        assert_eq!(sent(&mut apply_reports, 1, 7), [7, 5], "those first that weren't sent yet");
        assert_eq!(sent(&mut apply_reports, 1, 7), [7, 5]);
        assert_eq!(sent(&mut apply_reports, 1, 7), [7]);
        assert_eq!(sent(&mut apply_reports, 1, 7), [0; 0]);
    }

    #[test]
    fn what_was_not_sent_goes_with_later_ones() {
        let mut apply_reports = ApplyReportQueue::default();
        apply_reports.push(apply_report(1, 5));
        for _ in 0..5 {
            let sent = apply_reports.take_for(LogPosition::new(1, 5).unwrap());
            assert_eq!(sent.len(), 1);
            apply_reports.unsent(&sent);
        }
        for _ in 0..SENDS {
            assert_eq!(sent(&mut apply_reports, 1, 5), [5]);
        }
        assert_eq!(sent(&mut apply_reports, 1, 5), [0; 0]);
    }

    #[test]
    fn of_many_all_get_their_turn_and_the_oldest_are_given_up() {
        let mut apply_reports = ApplyReportQueue::default();
        let all = 2 * QUEUED_MAX as u64;
        (1..=all).for_each(|position| apply_reports.push(apply_report(1, position)));
        let mut seen = Vec::new();
        for _ in 0..usize::from(SENDS) * QUEUED_MAX / APPLY_REPORTS_MAX {
            let now = sent(&mut apply_reports, 1, all);
            assert_eq!(now.len(), APPLY_REPORTS_MAX);
            seen.extend(now);
        }
        assert_eq!(sent(&mut apply_reports, 1, all), [0; 0]);
        seen.sort_unstable();
        let expected = (all - QUEUED_MAX as u64 + 1..=all).flat_map(|position| [position; 3]);
        assert_eq!(seen, expected.collect::<Vec<_>>());
    }

    #[test]
    fn what_belongs_to_an_older_epoch_is_dropped() {
        let mut apply_reports = ApplyReportQueue::default();
        apply_reports.push(apply_report(1, 5));
        apply_reports.push(apply_report(2, 6));
        assert_eq!(sent(&mut apply_reports, 2, 5), [0; 0]);
        assert_eq!(sent(&mut apply_reports, 2, 6), [6]);
    }
}
