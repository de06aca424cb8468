//! What every test run can afford; `cargo xtask model` does the rest.

use evictd_model::{check, worlds};

#[test]
fn no_state_of_the_smallest_world_breaks_a_law() {
    let outcome = check::exhaust(worlds::SMALLEST, 2);
    assert_eq!(outcome.violated, None);
    assert_eq!(outcome.never, [""; 0], "the world proves too little");
    assert!(outcome.states > 5_000, "so few states prove too little: {}", outcome.states);
}
