//! Small disks and read-only disks.
//!
//! A small disk is a mount, which must not be visible to the rest of the machine. So it exists only in the test's own
//! mount namespace ([`in_private_mounts`]), which ends with its processes.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{Daemon, Launch};

/// How long a test in private mounts may take.
const TEST_DEADLINE: Duration = Duration::from_mins(2);

/// Set in the process that runs a test in private mounts.
const INSIDE: &str = "HARNESS_PRIVATE_MOUNTS";

/// Runs `body` in a second process of this test binary, whose mounts no other process sees. `body` must be the whole
/// test, and `test` its name for `--exact`. Needs root or unprivileged user namespaces.
pub fn in_private_mounts(test: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let dir = tempfile::tempdir()?;
    let mut args = vec!["--mount", "--propagation", "private"];
    if !rustix::process::geteuid().is_root() {
        args.push("--map-root-user");
    }
    args.push("--");
    let launch = Launch::new("test", "unshare", dir.path()).args(args).args([std::env::current_exe()?]);
    // A failure shows only the end of the output; without a backtrace that is the error message.
    let launch = launch.args(["--exact", test, "--nocapture"]).env("RUST_LIB_BACKTRACE", "0");
    let mut launch = launch.env(INSIDE, "1");
    // The harness in the second process needs the same settings. Daemons don't get them there either.
    for (name, value) in std::env::vars_os() {
        if let (Some(name), Some(value)) = (name.to_str(), value.to_str())
            && name.starts_with("EVICTD_")
        {
            launch = launch.env(name, value);
        }
    }
    let mut inside = Daemon::start(launch).context("running the test in private mounts")?;
    let ended = inside.wait_exit(TEST_DEADLINE)?;
    ensure!(ended.success(), "it failed in private mounts ({ended})\n{}", inside.log_tail());
    ensure!(inside.stdout()?.contains("1 passed"), "there is no test {test}\n{}", inside.log_tail());
    print!("{}", inside.stdout()?);
    Ok(())
}

/// A small file system in memory, for tests [`in_private_mounts`].
pub struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Creates `dir`, and mounts a file system of `kibibytes` there.
    pub fn mount(dir: &Path, kibibytes: u32) -> Result<Self> {
        // Elsewhere the mount would be visible to every process.
        ensure!(std::env::var_os(INSIDE).is_some(), "small disks are only for `in_private_mounts`");
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let size = format!("size={kibibytes}k");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "small-disk"]).arg(dir))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Returns its mount point.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Fills it to the last byte.
    pub fn fill(&self) -> Result<()> {
        let mut ballast = File::create(self.ballast()).context("filling the disk")?;
        loop {
            match ballast.write(&[0; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error).context("filling the disk"),
            }
        }
    }

    /// Frees the space that [`SmallDisk::fill`] took.
    pub fn make_room(&self) -> Result<()> {
        fs::remove_file(self.ballast()).context("making room on the disk")
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join("ballast")
    }
}

/// Files that no process can write to, not even root's, and not even through an open file. A kernel makes a file system
/// read-only in this way after an error. Dropping it makes the files writable again.
pub struct ReadOnly {
    paths: Vec<PathBuf>,
}

impl ReadOnly {
    /// Makes `paths` read-only. In a read-only directory nothing can be created or removed.
    pub fn make(paths: &[PathBuf]) -> Result<Self> {
        let open: Vec<(File, &PathBuf)> = paths
            .iter()
            .filter(|path| path.is_file())
            .map(|path| Ok((File::options().read(true).write(true).open(path)?, path)))
            .collect::<Result<_>>()
            .context("opening the files before they become read-only")?;
        let made = Self { paths: paths.to_vec() };
        run(Command::new("chattr").arg("+i").args(paths))?;
        for (file, path) in open {
            let mut first = [0];
            // If the write succeeds, it leaves the content as it was.
            if file.read_at(&mut first, 0)? == 1 && file.write_at(&first, 0).is_ok() {
                bail!("{} can still be written to; set TMPDIR to a directory on ext4", path.display());
            }
        }
        Ok(made)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        // If this fails, the next write to the files does.
        drop(run(Command::new("chattr").arg("-i").args(&self.paths)));
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", stderr.trim_end());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_disk_is_private_fills_up_and_is_freed() -> Result<()> {
        in_private_mounts("disk::tests::a_small_disk_is_private_fills_up_and_is_freed", || {
            let dir = tempfile::tempdir()?;
            let disk = SmallDisk::mount(dir.path(), 256)?;
            let file = disk.dir().join("file");
            disk.fill()?;
            assert_eq!(fs::write(&file, "x").unwrap_err().kind(), ErrorKind::StorageFull);
            disk.make_room()?;
            fs::write(&file, vec![0; 100 * 1024])?;
            let mounts = |whose: &str| fs::read_to_string(format!("/proc/{whose}/mounts"));
            let path = dir.path().to_string_lossy().into_owned();
            let outside = rustix::process::getppid().context("no parent")?.as_raw_nonzero().to_string();
            assert!(mounts("self")?.contains(&path) && !mounts(&outside)?.contains(&path));
            Ok(())
        })
    }

    /// The child process of the next test. Fails only there.
    #[test]
    fn a_failure_for_the_test_below() -> Result<()> {
        ensure!(std::env::var_os(INSIDE).is_none(), "on purpose");
        Ok(())
    }

    #[test]
    fn failing_and_missing_tests_fail_in_private_mounts() {
        let failure = |test: &str| in_private_mounts(test, || Ok(())).unwrap_err().to_string();
        let text = failure("disk::tests::a_failure_for_the_test_below");
        assert!(text.contains("on purpose"), "{text}");
        let text = failure("disk::tests::no_such_test");
        assert!(text.contains("there is no test"), "{text}");
    }

    #[test]
    fn a_read_only_file_becomes_writable_again() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file");
        fs::write(&path, "x")?;
        let open = File::options().write(true).open(&path)?;
        let read_only = ReadOnly::make(&[path.clone(), dir.path().to_owned()])?;
        assert!(open.write_at(b"y", 0).is_err() && fs::write(dir.path().join("other"), "y").is_err());
        drop(read_only);
        open.write_at(b"y", 0)?;
        fs::write(dir.path().join("other"), "y")?;
        assert_eq!(fs::read_to_string(&path)?, "y");
        Ok(())
    }
}
