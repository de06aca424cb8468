//! Hears that somebody changed something past the control API: the triggers send `NOTIFY evictd_log`.
//!
//! What is said while nobody listens is lost, so this only saves the wait for the next poll. Whenever it begins to
//! listen, it tells of a change: there may have been one.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::Executor;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::PostgresOptions;
use super::connections::timed_out;

const CHANNEL: &str = "evictd_log";

/// How long it may be quiet until the connection is tried.
const QUIET_MAX: Duration = Duration::from_secs(15);

/// How long connecting, and an answer to that, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two attempts to connect: doubled up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Listens from the first time that somebody asks.
#[derive(Debug, Default)]
pub(super) struct Listener {
    told: Arc<Notify>,
    task: OnceLock<JoinHandle<()>>,
}

impl Listener {
    /// Returns when there may have been a change since the last time.
    pub(super) async fn told(&self, options: &PostgresOptions) {
        self.task.get_or_init(|| tokio::spawn(listen(options.clone(), self.told.clone())));
        self.told.notified().await;
    }

    /// Ends it.
    pub(super) fn stop(&self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn listen(options: PostgresOptions, told: Arc<Notify>) {
    let (shortest, longest) = PAUSE;
    let mut pause = shortest;
    loop {
        let connected = timeout(PATIENCE, connect(&options)).await.unwrap_or_else(|_| Err(timed_out()));
        let error = match connected {
            Ok(mut listener) => {
                pause = shortest;
                hear(&mut listener, &told).await
            }
            Err(error) => error,
        };
        tracing::debug!(%error, "not listening to the home store; it is polled");
        sleep(pause).await;
        pause = longest.min(pause * 2);
    }
}

/// It names no table, so that its search path doesn't matter.
async fn connect(options: &PostgresOptions) -> sqlx::Result<PgListener> {
    // A pool of its own each time: the connection of the last one may be stuck.
    let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options.driver().clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.eager_reconnect(false);
    listener.listen(CHANNEL).await?;
    Ok(listener)
}

/// Tells of changes until the connection is lost.
async fn hear(listener: &mut PgListener, told: &Notify) -> sqlx::Error {
    told.notify_one();
    loop {
        match timeout(QUIET_MAX, listener.try_recv()).await {
            Ok(Ok(Some(_))) => told.notify_one(),
            Ok(Ok(None)) => return sqlx::Error::Io(std::io::ErrorKind::ConnectionAborted.into()),
            Ok(Err(error)) => return error,
            Err(_) => match timeout(PATIENCE, listener.execute("SELECT 1")).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return error,
                Err(_) => return timed_out(),
            },
        }
    }
}
