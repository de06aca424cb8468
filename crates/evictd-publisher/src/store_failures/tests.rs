use std::io;

use super::*;

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
fn each_kind_of_failure_is_logged() {
    let limit = LogLimit::new(1);
    let unknown = |action| {
        let StoreError::Database { source, .. } = silent(action) else { unreachable!() };
        StoreError::Unknown { action, source }
    };
    for error in [silent("delete a key"), silent("read a key"), unknown("delete a key")] {
        assert!(limit.admit(kind(&error)).is_some(), "{error}");
        assert!(limit.admit(kind(&error)).is_none(), "{error}");
    }
}
