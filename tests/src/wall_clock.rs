//! [`WallClock`]: a wrong wall clock for one daemon, which can be set while the daemon runs.
//!
//! It preloads libfaketime. Only the wall clock changes. The monotonic clocks continue, as on a machine whose date is
//! set.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process::Daemon;
use crate::python_package::{self, PythonPackage};

/// The package to install if `EVICTD_LIBFAKETIME` is not set.
const PACKAGE: PythonPackage = PythonPackage {
    name: "libfaketime",
    version: "3.0.1",
    sha256: &["5eed7c17f3d4ba0f6f828de4975f69a622b06b1e792674e6c1b069c0689fab79"],
    dir: "libfaketime-3.0.1",
    file: "libfaketime/vendor/libfaketime/src/libfaketime.so.1",
};

/// A daemon's wall clock, with an offset to this machine's.
pub struct WallClock {
    /// The file from which the library reads the offset.
    file: PathBuf,
}

impl WallClock {
    /// From its next start on, `daemon` has a clock with an offset of `seconds`. The offset file lies in `dir`.
    pub fn give_to(daemon: &mut Daemon, dir: &Path, seconds: i64) -> Result<Self> {
        let library = find_library()?;
        let clock = Self { file: dir.join(format!("{}.wall-clock", daemon.name())) };
        clock.set(seconds)?;
        let file = clock.file.to_str().context("a path that is no text")?;
        let settings = [
            ("LD_PRELOAD", library.to_str().context("a path that is no text")?),
            ("FAKETIME_TIMESTAMP_FILE", file),
            // Reads the file once a second.
            ("FAKETIME_CACHE_DURATION", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ];
        for (name, value) in settings {
            daemon.set_env(name, value);
        }
        Ok(clock)
    }

    /// Sets the offset to `seconds`; a negative one is in the past. It takes effect within about a second.
    pub fn set(&self, seconds: i64) -> Result<()> {
        // Renamed into place, so that the library never reads half a number.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{seconds:+}\n")).with_context(|| format!("writing {}", new.display()))?;
        fs::rename(&new, &self.file).with_context(|| format!("writing {}", self.file.display()))
    }
}

/// Returns the library: `EVICTD_LIBFAKETIME`, or else the pinned Python package, installed into cargo's target
/// directory. A distribution's library is not used: version 0.9.10 breaks sleeping with
/// `FAKETIME_DONT_FAKE_MONOTONIC`.
fn find_library() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("EVICTD_LIBFAKETIME") {
        let path = std::path::absolute(path).context("reading EVICTD_LIBFAKETIME")?;
        // The dynamic linker only warns if it can't load a library, and the test would test nothing.
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
    fn wall_clock_is_set_without_touching_the_monotonic_one() -> Result<()> {
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

    /// Waits until the two clocks are as `wanted`. Returns the wall clock and the monotonic clock in seconds.
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
