use std::io;

use super::*;

fn at(seconds: u64) -> LeaseTime {
    LeaseTime((1_000 + seconds) * 1_000_000)
}

fn silent(action: &'static str) -> StoreError {
    let source = io::Error::new(io::ErrorKind::TimedOut, "the server didn't answer in time").into();
    StoreError::Database { action, source }
}

#[test]
fn a_cause_that_the_error_contains_is_not_repeated() {
    assert_eq!(
        with_causes(&silent("number its log")),
        "the home store failed to number its log: error communicating with database: the server didn't answer in time"
    );
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Layer(&'static str, #[source] Option<Box<Self>>);

#[test]
fn further_causes_are_logged_in_order() {
    let cause = |text, source| Some(Box::new(Layer(text, source)));
    let error = Layer("top", cause("middle: bottom", cause("bottom", cause("rock", None))));
    assert_eq!(with_causes(&error), "top: middle: bottom: rock");
}

#[test]
fn the_first_failure_of_a_kind_is_logged_and_later_ones_counted() {
    let mut throttle = Throttle::default();
    let numbering = kind(&silent("number its log"));
    assert_eq!(throttle.admit(numbering, at(0)), Some(0));
    for second in 1..30 {
        assert_eq!(throttle.admit(numbering, at(second)), None, "after {second} s");
    }
    assert_eq!(throttle.admit(numbering, at(30)), Some(29));
    assert_eq!(throttle.admit(numbering, at(31)), None);
    assert_eq!(throttle.admit(numbering, at(60)), Some(1), "each is counted once");
}

#[test]
fn each_kind_of_failure_is_logged() {
    let mut throttle = Throttle::default();
    let unknown = |action| {
        let StoreError::Database { source, .. } = silent(action) else { unreachable!() };
        StoreError::Unknown { action, source }
    };
    for error in [silent("delete a key"), silent("read a key"), unknown("delete a key")] {
        assert_eq!(throttle.admit(kind(&error), at(0)), Some(0), "{error}");
        assert_eq!(throttle.admit(kind(&error), at(1)), None, "{error}");
    }
}

#[test]
fn unlogged_failures_are_reported_once() {
    let mut throttle = Throttle::default();
    let kinds = [kind(&silent("delete a key")), kind(&silent("read a key"))];
    for kind in kinds {
        for second in 0..3 {
            throttle.admit(kind, at(second));
        }
    }
    assert_eq!(throttle.take_unlogged(), 4);
    assert_eq!(throttle.take_unlogged(), 0);
    // A store that fails and works by turns is as bad for the log as one that only fails.
    assert_eq!(throttle.admit(kinds[0], at(4)), None);
    assert_eq!(throttle.admit(kinds[0], at(30)), Some(1));
}
