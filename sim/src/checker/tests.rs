//! The checkers against small histories: each finds violations of its own rule only.

use evictd_core::time::StoreTime;

use super::*;
use crate::rows::{ApiNumber, KeyNumber, WorkspaceNumber};

const BOUND: Micros = 30 * SECOND;
const KEY: KeyNumber = KeyNumber(3);
const API: ApiNumber = ApiNumber(1);

fn checker() -> Checker {
    Checker::new(BOUND)
}

fn begin(incarnation: u64, at: LogPosition, cause: BeginCause) -> Begin {
    let incarnation = Incarnation(incarnation);
    Begin { incarnation, after: at, at, cause, time: StoreTime(0), evidence: None }
}

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

fn seconds(seconds: u64) -> Moment {
    Moment(seconds * SECOND)
}

/// A key's deletion at commit 5, 100 s.
fn deleted(checker: &mut Checker) -> ChangeNumber {
    checker.committed(seconds(100), Lsn(5), ChangeTarget::Key(KEY), Cause::Deleted, 1)
}

/// The rule that an answer as of `lsn` breaks, given `started` and what was confirmed then.
fn broken(checker: &mut Checker, lsn: u64, started: Moment, confirmed: Confirmed) -> Option<Rule> {
    checker.violations.clear();
    let workspace = ChangeTarget::Workspace(WorkspaceNumber(0));
    let targets = [ChangeTarget::Key(KEY), ChangeTarget::Api(API), workspace].map(Some);
    let place = ReadPlace { lsn: Lsn(lsn), targets };
    let answer = GivenAnswer { agent: NodeNumber(0), started, confirmed, place };
    checker.answered(started, answer);
    checker.violations.first().map(|violation| violation.rule)
}

#[test]
fn an_answer_may_lack_a_change_until_the_bound() {
    let mut checker = checker();
    deleted(&mut checker);
    let before_the_bound = Moment(seconds(130).0 - 1);
    assert_eq!(broken(&mut checker, 4, before_the_bound, Confirmed::default()), None);
    assert_eq!(broken(&mut checker, 4, seconds(130), Confirmed::default()), Some(Rule::G1));
    assert_eq!(broken(&mut checker, 5, seconds(130), Confirmed::default()), None, "it is in the answer");
    assert_eq!(checker.counts.behind, 2);
}

#[test]
fn confirmed_changes_are_in_later_answers() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), Incarnation(1), change, at(1));
    assert_eq!(broken(&mut checker, 4, seconds(101), Confirmed::default()), None);
    let confirmed = checker.confirmed(Incarnation(1), at(1));
    assert_eq!(broken(&mut checker, 4, seconds(101), confirmed), Some(Rule::G2));
}

#[test]
fn after_a_final_receipt_no_answer_lacks_the_change() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), Incarnation(1), change, at(1));
    checker.receipt(seconds(102), at(1), RegionState::Unproven);
    assert_eq!(broken(&mut checker, 4, seconds(103), Confirmed::default()), None, "it doesn't say so");
    checker.receipt(seconds(104), at(1), RegionState::Confirmed);
    assert_eq!(broken(&mut checker, 4, seconds(104), Confirmed::default()), None, "it began before");
    assert_eq!(broken(&mut checker, 4, seconds(105), Confirmed::default()), Some(Rule::G4));
}

#[test]
fn changes_of_the_api_and_the_workspace_count_for_their_keys() {
    for target in [ChangeTarget::Api(API), ChangeTarget::Workspace(WorkspaceNumber(0))] {
        let mut checker = checker();
        checker.committed(seconds(100), Lsn(5), target, Cause::Deleted, 1);
        assert_eq!(broken(&mut checker, 4, seconds(130), Confirmed::default()), Some(Rule::G1));
    }
    let mut checker = checker();
    checker.committed(seconds(100), Lsn(5), ChangeTarget::Api(ApiNumber(0)), Cause::Deleted, 1);
    assert_eq!(broken(&mut checker, 4, seconds(130), Confirmed::default()), None, "another API");
}

#[test]
fn the_reversal_of_a_lost_change_is_a_change() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.lost(seconds(110), change, Lsn(6), ChangeTarget::Key(KEY));
    assert_eq!(broken(&mut checker, 6, seconds(150), Confirmed::default()), None);
    assert_eq!(broken(&mut checker, 5, seconds(139), Confirmed::default()), None);
    assert_eq!(broken(&mut checker, 5, seconds(140), Confirmed::default()), Some(Rule::G1));
}

#[test]
fn positions_are_dense_and_given_once() {
    let rule = |second: u64| {
        let mut checker = checker();
        checker.incarnation_began(seconds(1), &begin(1, at(6), BeginCause::Created));
        for (position, lsn) in [(7, 5), (second, 6)] {
            let change = checker.committed(seconds(1), Lsn(lsn), ChangeTarget::Key(KEY), Cause::Changed, 1);
            checker.numbered(seconds(1), Incarnation(1), change, at(position));
        }
        checker.violations.first().map(|violation| violation.rule)
    };
    assert_eq!(rule(8), None);
    assert_eq!(rule(9), Some(Rule::R1));
    assert_eq!(rule(7), Some(Rule::R2));
}

#[test]
fn a_commit_without_a_position_is_found_at_the_end() {
    let mut checker = checker();
    deleted(&mut checker);
    checker.finish(seconds(101));
    assert_eq!(checker.violations, [], "it is young");
    checker.finish(seconds(200));
    assert_eq!(checker.violations[0].rule, Rule::G3);
}

#[test]
fn success_for_a_change_that_is_not_there_is_found() {
    let mut checker = checker();
    let change = deleted(&mut checker);
    checker.reported_success(seconds(100), Some(change));
    assert_eq!(checker.violations, []);
    checker.reported_success(seconds(100), None);
    assert_eq!(checker.violations[0].rule, Rule::G3);
}

#[test]
fn branched_epoch_needs_a_regression() {
    let mut checker = checker();
    let branched =
        |incarnation, epoch| begin(incarnation, LogPosition::new(epoch, 0).unwrap(), BeginCause::Branched);
    checker.regressed();
    checker.incarnation_began(seconds(1), &branched(2, 2));
    assert_eq!(checker.violations, []);
    checker.incarnation_began(seconds(2), &branched(3, 3));
    assert_eq!(checker.violations[0].rule, Rule::R2);
}

/// After a restore, another incarnation gives the same positions to other changes.
#[test]
fn position_of_a_lost_incarnation_confirms_nothing() {
    let mut checker = checker();
    checker.incarnation_began(seconds(1), &begin(1, at(0), BeginCause::Created));
    checker.incarnation_began(seconds(2), &begin(2, at(0), BeginCause::Opened));
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), Incarnation(2), change, at(1));
    let [before, after] = [1, 2].map(|incarnation| checker.confirmed(Incarnation(incarnation), at(9)));
    assert_eq!(broken(&mut checker, 4, seconds(101), before), None);
    assert_eq!(broken(&mut checker, 4, seconds(101), after), Some(Rule::G2));
}

/// A publisher can't have the agents that joined in the lost commits.
#[test]
fn receipts_of_a_restored_store_count_once_it_is_declared() {
    let mut checker = checker();
    checker.regressed();
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), Incarnation(1), change, at(1));
    checker.receipt(seconds(101), at(1), RegionState::Confirmed);
    assert_eq!(broken(&mut checker, 4, seconds(102), Confirmed::default()), None);
    checker.incarnation_began(seconds(103), &begin(2, at(1), BeginCause::Declared));
    checker.receipt(seconds(104), at(1), RegionState::Confirmed);
    assert_eq!(broken(&mut checker, 4, seconds(105), Confirmed::default()), Some(Rule::G4));
}

#[test]
fn a_final_receipt_that_is_pending_is_none() {
    let mut checker = checker();
    checker.incarnation_began(seconds(1), &begin(1, at(0), BeginCause::Created));
    let change = deleted(&mut checker);
    checker.numbered(seconds(100), Incarnation(1), change, at(1));
    checker.receipt(seconds(102), at(1), RegionState::Pending);
    assert_eq!(checker.violations[0].rule, Rule::G4);
}
