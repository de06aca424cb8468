//! The checkers against small histories: each notices its own broken promise, and nothing else.

use super::*;

const BOUND: Micros = 30 * SECOND;
const KEY: KeyNumber = KeyNumber(3);
const API: ApiNumber = ApiNumber(1);

fn checker() -> Checker {
    Checker::new(Size { keys: 10, root_keys: 1, apis: 2, workspaces: 1 }, BOUND)
}

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

fn seconds(seconds: u64) -> Moment {
    Moment(seconds * SECOND)
}

/// A key's deletion at commit 5, 100 s.
fn deleted(checker: &mut Checker) -> ChangeId {
    checker.committed(seconds(100), Lsn(5), Target::Key(KEY), Cause::Deleted, 1)
}

/// The rule that an answer as of `lsn` breaks, given `started` and what was confirmed then.
fn broken(checker: &mut Checker, lsn: u64, started: Moment, confirmed: LogPosition) -> Option<Rule> {
    checker.violations.clear();
    let workspace = Some(WorkspaceNumber(0));
    let answer =
        Answer { agent: Node(0), key: KEY, started, confirmed, lsn: Lsn(lsn), api: Some(API), workspace };
    checker.answered(started, answer);
    checker.violations.first().map(|violation| violation.rule)
}

#[test]
fn an_answer_may_lack_a_change_until_the_bound_and_no_longer() {
    let mut checker = checker();
    deleted(&mut checker);
    let before_the_bound = Moment(seconds(130).0 - 1);
    assert_eq!(broken(&mut checker, 4, before_the_bound, LogPosition::ZERO), None);
    assert_eq!(broken(&mut checker, 4, seconds(130), LogPosition::ZERO), Some(Rule::G1));
    assert_eq!(broken(&mut checker, 5, seconds(130), LogPosition::ZERO), None, "it is in the answer");
    assert_eq!(checker.counts.behind, 2);
}

#[test]
fn what_an_agent_confirmed_is_in_its_later_answers() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), change, at(1));
    assert_eq!(broken(&mut checker, 4, seconds(101), LogPosition::ZERO), None);
    assert_eq!(broken(&mut checker, 4, seconds(101), at(1)), Some(Rule::G2));
}

#[test]
fn what_a_final_receipt_says_is_over_is_over_everywhere() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), change, at(1));
    checker.receipt(seconds(102), at(1), RegionState::Unproven);
    assert_eq!(broken(&mut checker, 4, seconds(103), LogPosition::ZERO), None, "it doesn't say so");
    checker.receipt(seconds(104), at(1), RegionState::Confirmed);
    assert_eq!(broken(&mut checker, 4, seconds(104), LogPosition::ZERO), None, "it began before");
    assert_eq!(broken(&mut checker, 4, seconds(105), LogPosition::ZERO), Some(Rule::G4));
}

#[test]
fn changes_of_the_api_and_the_workspace_count_for_their_keys() {
    for target in [Target::Api(API), Target::Workspace(WorkspaceNumber(0))] {
        let mut checker = checker();
        checker.committed(seconds(100), Lsn(5), target, Cause::Deleted, 1);
        assert_eq!(broken(&mut checker, 4, seconds(130), LogPosition::ZERO), Some(Rule::G1));
    }
    let mut checker = checker();
    checker.committed(seconds(100), Lsn(5), Target::Api(ApiNumber(0)), Cause::Deleted, 1);
    assert_eq!(broken(&mut checker, 4, seconds(130), LogPosition::ZERO), None, "another API");
}

#[test]
fn a_change_that_a_regression_undid_is_not_missed_but_its_reversal_is() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.lost(seconds(110), change, Lsn(6), Target::Key(KEY));
    assert_eq!(broken(&mut checker, 6, seconds(150), LogPosition::ZERO), None);
    assert_eq!(broken(&mut checker, 5, seconds(139), LogPosition::ZERO), None);
    assert_eq!(broken(&mut checker, 5, seconds(140), LogPosition::ZERO), Some(Rule::G1));
}

#[test]
fn positions_are_dense_and_given_once() {
    let rule = |second: u64| {
        let mut checker = checker();
        for (position, lsn) in [(7, 5), (second, 6)] {
            let change = checker.committed(seconds(1), Lsn(lsn), Target::Key(KEY), Cause::Changed, 1);
            checker.numbered(seconds(1), change, at(position));
        }
        checker.violations.first().map(|violation| violation.rule)
    };
    assert_eq!(rule(8), None);
    assert_eq!(rule(9), Some(Rule::R1));
    assert_eq!(rule(7), Some(Rule::R2));
}

#[test]
fn a_commit_without_a_place_in_the_log_is_found_at_the_end() {
    let mut checker = checker();
    deleted(&mut checker);
    checker.finish(seconds(101));
    assert_eq!(checker.violations_total, 0, "it is young");
    checker.finish(seconds(200));
    assert_eq!(checker.violations[0].rule, Rule::G3);
}

#[test]
fn success_for_a_change_that_is_not_there_is_found() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.told_success(seconds(100), Some(change));
    assert_eq!(checker.violations_total, 0);
    checker.told_success(seconds(100), None);
    assert_eq!(checker.violations[0].rule, Rule::G3);
}

#[test]
fn an_epoch_needs_a_regression() {
    let mut checker = checker();
    checker.regressed();
    checker.epoch_began(seconds(1), LogPosition::new(2, 0).unwrap());
    assert_eq!(checker.violations_total, 0);
    checker.epoch_began(seconds(2), LogPosition::new(3, 0).unwrap());
    assert_eq!(checker.violations[0].rule, Rule::R2);
}

#[test]
fn a_final_receipt_that_is_pending_is_none() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), change, at(1));
    checker.receipt(seconds(102), at(1), RegionState::Pending);
    assert_eq!(checker.violations[0].rule, Rule::G4);
}
