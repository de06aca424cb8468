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
fn a_cause_that_the_error_tells_itself_is_not_told_twice() {
    assert_eq!(
        with_causes(&silent("number its log")),
        "the home store failed to number its log: error communicating with database: the server didn't answer in time"
    );
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Layer(&'static str, #[source] Option<Box<Self>>);

#[test]
fn causes_that_say_something_new_are_told_in_order() {
    let cause = |text, source| Some(Box::new(Layer(text, source)));
    let error = Layer("top", cause("middle: bottom", cause("bottom", cause("rock", None))));
    assert_eq!(with_causes(&error), "top: middle: bottom: rock");
}

#[test]
fn the_first_failure_is_told_at_once_and_later_ones_of_its_kind_are_counted() {
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
fn failures_of_another_kind_are_told_apart() {
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
fn what_was_left_out_is_told_at_the_end_and_then_forgotten() {
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
