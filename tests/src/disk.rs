//! Disks that are small, and disks that can no longer be written to.
//!
//! Both need rights that a test should not use on the machine at large. So a small disk exists only in a mount
//! namespace of the test's own ([`in_private_mounts`]), which ends with its processes.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{Daemon, Launch};

/// How long a test may take that runs in a process of its own.
const TEST_DEADLINE: Duration = Duration::from_mins(2);

/// Set in the process that runs a test in mounts of its own.
const INSIDE: &str = "HARNESS_PRIVATE_MOUNTS";

/// Runs `body`, which is all of the test named `test` (as `--exact` takes it), where nothing that it mounts is
/// seen by anybody else: in a second process of this test binary. As root, or where users may have name spaces
/// of their own.
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
    // Only the end of its output is shown, where what it says matters more than where that came from.
    let launch = launch.args(["--exact", test, "--nocapture"]).env("RUST_LIB_BACKTRACE", "0");
    let mut launch = launch.env(INSIDE, "1");
    // What the harness is told by its environment counts inside as well; daemons don't get it, there as here.
    for (name, value) in std::env::vars_os() {
        if let (Some(name), Some(value)) = (name.to_str(), value.to_str())
            && name.starts_with("EVICTD_")
        {
            launch = launch.env(name, value);
        }
    }
    let mut inside = Daemon::start(launch).context("running the test in mounts of its own")?;
    let ended = inside.wait_exit(TEST_DEADLINE)?;
    ensure!(ended.success(), "it failed in mounts of its own ({ended})\n{}", inside.log_tail());
    ensure!(inside.stdout()?.contains("1 passed"), "there is no test {test}\n{}", inside.log_tail());
    print!("{}", inside.stdout()?);
    Ok(())
}

/// A file system in memory, to be used [`in_private_mounts`].
pub struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Mounts one that holds `kibibytes` at `dir`, which is created.
    pub fn mount(dir: &Path, kibibytes: u32) -> Result<Self> {
        // Everybody else's mounts would be changed.
        ensure!(std::env::var_os(INSIDE).is_some(), "small disks belong into `in_private_mounts`");
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let size = format!("size={kibibytes}k");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "small-disk"]).arg(dir))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes what is left of it, to the last byte.
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

    /// Gives back what [`SmallDisk::fill`] took.
    pub fn make_room(&self) -> Result<()> {
        fs::remove_file(self.ballast()).context("making room on the disk")
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join("ballast")
    }
}

/// Files that nobody may write to any more, not even root, and not even who has them open: what becomes of all
/// files when a kernel that has met an error makes their file system read-only. Dropping it gives them back.
pub struct ReadOnly {
    paths: Vec<PathBuf>,
}

impl ReadOnly {
    /// Makes `paths` read-only; for a directory that means that nothing is created or removed in it.
    pub fn make(paths: &[PathBuf]) -> Result<Self> {
        let open: Vec<(File, &PathBuf)> = paths
            .iter()
            .filter(|path| path.is_file())
            .map(|path| Ok((File::options().read(true).write(true).open(path)?, path)))
            .collect::<Result<_>>()
            .context("opening what shall become read-only")?;
        let made = Self { paths: paths.to_vec() };
        run(Command::new("chattr").arg("+i").args(paths))?;
        for (file, path) in open {
            let mut first = [0];
            // Written over with itself, should that succeed.
            if file.read_at(&mut first, 0)? == 1 && file.write_at(&first, 0).is_ok() {
                bail!("{} is written to all the same: set TMPDIR to a directory on ext4", path.display());
            }
        }
        Ok(made)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        // Whoever goes on with them notices.
        drop(run(Command::new("chattr").arg("-i").args(&self.paths)));
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", complaint.trim_end());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_disk_that_nobody_else_sees_is_full_and_has_room_again() -> Result<()> {
        in_private_mounts(
            "disk::tests::a_small_disk_that_nobody_else_sees_is_full_and_has_room_again",
            || {
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
            },
        )
    }

    /// The other half of the next test: fails only where that test runs it.
    #[test]
    fn a_failure_for_the_test_below() -> Result<()> {
        ensure!(std::env::var_os(INSIDE).is_none(), "on purpose");
        Ok(())
    }

    #[test]
    fn what_fails_in_mounts_of_its_own_fails_and_so_does_what_does_not_exist() {
        let failure = |test: &str| in_private_mounts(test, || Ok(())).unwrap_err().to_string();
        let text = failure("disk::tests::a_failure_for_the_test_below");
        assert!(text.contains("on purpose"), "{text}");
        let text = failure("disk::tests::no_such_test");
        assert!(text.contains("there is no test"), "{text}");
    }

    #[test]
    fn a_read_only_file_is_given_back() -> Result<()> {
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
