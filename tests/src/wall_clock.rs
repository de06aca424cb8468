//! [`WallClock`]: a wrong wall clock for one daemon, which can be set while the daemon runs.
//!
//! It is libfaketime, loaded into the process. Only the wall clock is changed: the clocks that count since
//! boot go on, as they do on a machine whose date is set.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process::Daemon;
use crate::python_package::{self, PythonPackage};

/// What is installed when there is no library on this machine.
const PACKAGE: PythonPackage = PythonPackage {
    name: "libfaketime",
    version: "3.0.1",
    dir: "libfaketime-3.0.1",
    file: "libfaketime/vendor/libfaketime/src/libfaketime.so.1",
};

/// A daemon's wall clock, this far from this machine's.
pub struct WallClock {
    /// Where the library reads how wrong it has to be.
    file: PathBuf,
}

impl WallClock {
    /// From `daemon`'s next start on, its clock is its own: wrong by `seconds`, until it is set anew.
    /// What it needs is kept in `dir`.
    pub fn give_to(daemon: &mut Daemon, dir: &Path, seconds: i64) -> Result<Self> {
        let library = find_library()?;
        let clock = Self { file: dir.join(format!("{}.wall-clock", daemon.name())) };
        clock.set(seconds)?;
        let file = clock.file.to_str().context("a path that is no text")?;
        let settings = [
            ("LD_PRELOAD", library.to_str().context("a path that is no text")?),
            ("FAKETIME_TIMESTAMP_FILE", file),
            // Look into the file once a second.
            ("FAKETIME_CACHE_DURATION", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ];
        for (name, value) in settings {
            daemon.set_env(name, value);
        }
        Ok(clock)
    }

    /// Sets it to `seconds` after (or, if negative, before) this machine's. The daemon sees it within
    /// about a second.
    pub fn set(&self, seconds: i64) -> Result<()> {
        // Renamed into place, so that nobody reads half a number.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{seconds:+}\n")).with_context(|| format!("writing {}", new.display()))?;
        fs::rename(&new, &self.file).with_context(|| format!("writing {}", self.file.display()))
    }
}

/// The library: `EVICTD_LIBFAKETIME`, else the pinned Python package, installed into cargo's target
/// directory. Not the one that a distribution may have installed: version 0.9.10 breaks sleeping when it is
/// told to leave the monotonic clock alone.
fn find_library() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("EVICTD_LIBFAKETIME") {
        let path = std::path::absolute(path).context("reading EVICTD_LIBFAKETIME")?;
        // A library that can't be loaded is a warning to the dynamic linker, and the test would test nothing.
        if !path.is_file() {
            bail!("EVICTD_LIBFAKETIME names {}, which is no file", path.display());
        }
        return Ok(path);
    }
    python_package::install(&PACKAGE).context(
        "libfaketime is missing: set EVICTD_LIBFAKETIME to a libfaketime.so.1 of version 0.9.11 or newer",
    )
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::process::Launch;
    use crate::wait::eventually;

    const DEADLINE: Duration = Duration::from_secs(20);

    #[test]
    fn a_daemons_wall_clock_is_wrong_and_can_be_set_while_its_other_clocks_go_on() -> Result<()> {
        const SCRIPT: &str = "import time\nwhile True:\n    \
            print(int(time.time()), int(time.clock_gettime(time.CLOCK_MONOTONIC)), flush=True)\n    \
            time.sleep(0.05)";
        let dir = tempfile::tempdir()?;
        let mut daemon = Daemon::start(Launch::new("clock", "python3", dir.path()).args(["-c", SCRIPT]))?;
        let started = last_reading(&mut daemon, |_| true)?;
        let clock = WallClock::give_to(&mut daemon, dir.path(), 3600)?;
        daemon.restart()?;
        let ahead = last_reading(&mut daemon, |(wall, _)| wall > true_now() + 3000)?;
        clock.set(-3600)?;
        let behind = last_reading(&mut daemon, |(wall, _)| wall < true_now() - 3000)?;
        assert!(started.1 <= ahead.1 && ahead.1 <= behind.1, "{started:?} {ahead:?} {behind:?}");
        assert!(behind.1 - started.1 < 60, "{started:?} {behind:?}");
        Ok(())
    }

    fn true_now() -> i64 {
        UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() as i64)
    }

    /// The wall clock and the monotonic one, in seconds, as soon as they are as `wanted`.
    fn last_reading(daemon: &mut Daemon, wanted: fn((i64, i64)) -> bool) -> Result<(i64, i64)> {
        eventually("such a reading", DEADLINE, || {
            let log = daemon.stdout().ok()?;
            // The log is read while it is written, and the last line may be half of one.
            let (complete, _) = log.rsplit_once('\n')?;
            let (wall, monotonic) = complete.lines().last()?.split_once(' ')?;
            Some((wall.parse().ok()?, monotonic.parse().ok()?)).filter(|reading| wanted(*reading))
        })
    }
}
