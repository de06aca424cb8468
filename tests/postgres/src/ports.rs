//! Loopback ports for servers that tests start, kill and start again.
//!
//! A port from `bind(0)` is not good enough: once its server is killed, the kernel may give the port to any outgoing
//! connection, even to one that dials this very port and so connects to itself. These ports lie below the usual
//! ephemeral range, and a file lock keeps concurrent test processes apart.
//!
//! Whether a port is in use is read from the kernel's tables. Binding it would be no test: a child process that is
//! forked meanwhile inherits the socket, and holds the port until it executes its program.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

/// Below 32768, where Linux begins to number outgoing connections, and above what services use.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// The locks of the ports handed out by this process. They live as long as it does, and the kernel
/// releases them however it ends.
static TAKEN: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Returns a free loopback address on which nothing listens. It is returned only once, in this process and in all
/// others that use this function.
pub fn free() -> Result<SocketAddr> {
    let locks = std::env::temp_dir().join("evictd-test-ports");
    fs::create_dir_all(&locks).with_context(|| format!("creating {}", locks.display()))?;
    let start = getrandom::u32().context("drawing a random port")?;
    for step in 0..u32::from(COUNT) {
        let offset = (start.wrapping_add(step) % u32::from(COUNT)) as u16;
        if let Some(address) = take(&locks, FIRST + offset)? {
            return Ok(address);
        }
    }
    bail!("no free port on 127.0.0.1 between {FIRST} and {}", FIRST + COUNT)
}

/// Takes `port` unless another process holds its lock or listens on it.
fn take(locks: &Path, port: u16) -> Result<Option<SocketAddr>> {
    let path = locks.join(port.to_string());
    let lock = File::options().create(true).append(true).open(&path);
    let lock = lock.with_context(|| format!("opening {}", path.display()))?;
    if lock.try_lock().is_err() {
        return Ok(None);
    }
    if is_in_use(port)? {
        return Ok(None);
    }
    TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(lock);
    Ok(Some(SocketAddr::from((Ipv4Addr::LOCALHOST, port))))
}

/// Whether any TCP socket has this local port.
fn is_in_use(port: u16) -> Result<bool> {
    let suffix = format!(":{port:04X}");
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let sockets = match fs::read_to_string(table) {
            // A machine without IPv6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            sockets => sockets.with_context(|| format!("reading {table}"))?,
        };
        let mut local = sockets.lines().filter_map(|line| line.split_whitespace().nth(1));
        if local.any(|address| address.ends_with(&suffix)) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn ports_are_free_and_never_handed_out_twice() -> Result<()> {
        let mut seen = BTreeSet::new();
        for _ in 0..100 {
            let address = free()?;
            assert!(seen.insert(address), "{address} came twice");
            TcpListener::bind(address)?;
        }
        Ok(())
    }

    #[test]
    fn a_port_in_use_or_locked_is_skipped() -> Result<()> {
        let locks = tempfile::tempdir()?;
        let in_use = TcpListener::bind("127.0.0.1:0")?;
        assert_eq!(take(locks.path(), in_use.local_addr()?.port())?, None);

        let address = free()?;
        let held = File::create(locks.path().join(address.port().to_string()))?;
        held.lock()?;
        assert_eq!(take(locks.path(), address.port())?, None);
        held.unlock()?;
        assert_eq!(take(locks.path(), address.port())?, Some(address));
        Ok(())
    }
}
