//! The servers do what tests of a store rely on, and leave nothing behind.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use evictd_postgres_server::wait::eventually;
use evictd_postgres_server::{Postgres, StopMode, shared};

const DEADLINE: Duration = Duration::from_mins(1);

fn wait_for(server: &Postgres, sql: &str, expected: &str) -> Result<()> {
    eventually(sql, DEADLINE, || (server.query(sql).ok()? == expected).then_some(()))
}

#[test]
fn tests_share_a_server_with_a_database_each() -> Result<()> {
    let server = shared()?;
    assert_eq!(server.port(), shared()?.port());
    assert_eq!(server.query("SELECT current_user, current_database()")?, "evictd|evictd");
    let url = server.create_database("a_test_of_its_own")?;
    assert_eq!(url, format!("postgres://evictd@127.0.0.1:{}/a_test_of_its_own", server.port()));
    assert!(server.create_database("a_test_of_its_own").is_err());
    let honest = "SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings
        WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes', 'wal_level')";
    let settings = "fsync=on full_page_writes=on synchronous_commit=on wal_level=replica";
    assert_eq!(server.query(honest)?, settings);
    Ok(())
}

#[test]
fn a_standby_follows_lags_and_is_promoted() -> Result<()> {
    let mut primary = Postgres::start()?;
    primary.query("CREATE TABLE t (n int); INSERT INTO t VALUES (1)")?;
    let standby = primary.standby()?;
    let timeline = "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)";
    let count = "SELECT count(*) FROM t";
    assert_eq!(standby.query(count)?, "1");
    assert!(standby.query("INSERT INTO t VALUES (0)").is_err(), "a standby takes no writes");
    primary.query("INSERT INTO t VALUES (2)")?;
    wait_for(&standby, count, "2")?;

    standby.pause_replay()?;
    // The commit waits until the standby has received it, not until it has replayed it.
    primary.set("synchronous_standby_names = '*'")?;
    primary.query("INSERT INTO t VALUES (3)")?;
    assert_eq!(standby.query(count)?, "2");
    standby.resume_replay()?;
    wait_for(&standby, count, "3")?;

    assert_eq!(primary.query(timeline)?, "00000001");
    primary.stop(StopMode::Immediate)?;
    standby.promote()?;
    assert_eq!(standby.query(timeline)?, "00000002");
    assert_eq!(standby.query(count)?, "3");
    // It has the primary's settings, and no standby that could confirm its commits.
    standby.set("synchronous_standby_names = ''")?;
    standby.query("INSERT INTO t VALUES (4)")?;

    primary.start_again()?;
    assert_eq!(primary.query(timeline)?, "00000001", "the old primary is on the old timeline");
    Ok(())
}

#[test]
fn a_killed_server_restarts_with_all_committed_data() -> Result<()> {
    let mut server = Postgres::start()?;
    let url = server.url();
    server.query("CREATE TABLE t (n int); INSERT INTO t VALUES (1)")?;
    server.kill()?;
    assert!(server.query("SELECT 1").is_err());
    server.start_again()?;
    assert_eq!(server.query("SELECT n FROM t")?, "1");
    assert!(server.log().contains("was not properly shut down"), "{}", server.log());

    assert!(server.start_again().is_err(), "it is already running");
    server.set("max_connections = 50")?;
    assert_eq!(server.query("SHOW max_connections")?, "100");
    server.restart(StopMode::Fast)?;
    assert_eq!(server.query("SHOW max_connections")?, "50");
    assert_eq!(server.url(), url);
    Ok(())
}

#[test]
fn a_frozen_server_answers_only_when_thawed() -> Result<()> {
    let server = Postgres::start()?;
    server.freeze()?;
    // The kernel accepts the connection. The bytes are the protocol's TLS request, which this server answers with N.
    let mut stream = TcpStream::connect(("127.0.0.1", server.port()))?;
    stream.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f])?;
    let mut answer = [0];
    stream.set_read_timeout(Some(Duration::from_millis(300)))?;
    assert_eq!(stream.read(&mut answer).unwrap_err().kind(), ErrorKind::WouldBlock);
    server.thaw()?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"N");
    Ok(())
}

#[test]
fn a_dropped_server_leaves_nothing_behind() -> Result<()> {
    for frozen_or_killed in [false, true] {
        let mut server = Postgres::start()?;
        if frozen_or_killed {
            server.freeze()?;
            server.kill()?;
        }
        let data = server.data_dir();
        drop(server);
        assert!(!data.parent().context("its home")?.exists());
    }
    Ok(())
}

/// The child process of the next test. Does nothing otherwise; there it never returns.
#[test]
fn a_child_of_the_test_below() -> Result<()> {
    let Some(dir) = std::env::var_os("POSTGRES_TEST_ORPHAN").map(PathBuf::from) else { return Ok(()) };
    let server = shared()?;
    server.freeze()?;
    let note = server.data_dir();
    fs::write(dir.join("new"), note.to_str().context("a path that is no text")?)?;
    fs::rename(dir.join("new"), dir.join("data"))?;
    loop {
        std::thread::park();
    }
}

#[test]
fn a_frozen_server_of_a_killed_test_leaves_nothing_behind() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut test = Command::new(std::env::current_exe()?)
        .args(["--exact", "a_child_of_the_test_below"])
        .env("POSTGRES_TEST_ORPHAN", dir.path())
        .stdout(Stdio::null())
        .spawn()?;
    let data = eventually("the server to run", DEADLINE, || fs::read_to_string(dir.path().join("data")).ok());
    test.kill()?;
    test.wait()?;
    let data = PathBuf::from(data?);
    let home = data.parent().context("its home")?;
    eventually("the server's files to be gone", DEADLINE, || (!home.exists()).then_some(()))?;
    assert!(!works_in(&data)?, "its processes are gone before its files");
    Ok(())
}

/// Whether a process still works in a directory, which may have been removed.
fn works_in(dir: &Path) -> Result<bool> {
    let dir = dir.to_string_lossy();
    for entry in fs::read_dir("/proc")? {
        let cwd = fs::read_link(entry?.path().join("cwd")).unwrap_or_default();
        if cwd.to_string_lossy().starts_with(dir.as_ref()) {
            return Ok(true);
        }
    }
    Ok(false)
}
