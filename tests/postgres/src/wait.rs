//! Waiting for something to become true, with a deadline. The only place that sleeps.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The pause between two checks: short against anything measured, long enough to leave the cores to the daemons.
const POLL: Duration = Duration::from_millis(5);

/// Polls until `check` returns something. After `deadline` it fails with an error that names `what`.
pub fn eventually<T>(what: &str, deadline: Duration, mut check: impl FnMut() -> Option<T>) -> Result<T> {
    try_eventually(what, deadline, || Ok(check()))
}

/// As [`eventually`], for a check that can fail. An error ends the wait.
pub fn try_eventually<T>(
    what: &str,
    deadline: Duration,
    mut check: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    let mut looks = 0_u32;
    loop {
        looks += 1;
        if let Some(found) = check()? {
            return Ok(found);
        }
        if started.elapsed() >= deadline {
            bail!("still waiting after {deadline:?} ({looks} looks) for {what}");
        }
        thread::sleep(POLL);
    }
}

/// Polls for `duration`, and fails as soon as `check` fails. For things that must not happen.
pub fn throughout(duration: Duration, mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    loop {
        check()?;
        if started.elapsed() >= duration {
            return Ok(());
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn value_that_appears_later_is_returned() -> Result<()> {
        let mut looks = 0;
        let found = eventually("the third look", Duration::from_secs(5), || {
            looks += 1;
            (looks == 3).then_some("here")
        })?;
        assert_eq!(found, "here");
        Ok(())
    }

    #[test]
    fn timeout_error_names_what_was_awaited() {
        let failure = eventually::<()>("a miracle", Duration::from_millis(20), || None).unwrap_err();
        assert!(failure.to_string().contains("a miracle"), "{failure}");
    }

    #[test]
    fn throughout_checks_until_the_end() -> Result<()> {
        let started = Instant::now();
        let mut looks = 0;
        throughout(Duration::from_millis(30), || {
            looks += 1;
            Ok(())
        })?;
        assert!(looks > 1 && started.elapsed() >= Duration::from_millis(30));

        let failure = throughout(Duration::from_mins(10), || bail!("it happened"));
        assert_eq!(failure.unwrap_err().to_string(), "it happened");
        assert!(started.elapsed() < Duration::from_mins(1));
        Ok(())
    }

    #[test]
    fn an_error_ends_the_wait_at_once() {
        let started = Instant::now();
        let failure = try_eventually::<()>("anything", Duration::from_mins(10), || Err(anyhow!("it died")));
        assert_eq!(failure.unwrap_err().to_string(), "it died");
        assert!(started.elapsed() < Duration::from_mins(1));
    }
}
