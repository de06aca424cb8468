//! Receives the triggers' `NOTIFY evictd_log`, sent for changes made outside the control API.
//!
//! Notifications without a listener are lost, so this only saves the wait for the next poll. Each new connection signals a
//! change, because there may have been one before.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::Executor;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::errors::timed_out;
use super::options::PostgresOptions;

const CHANNEL: &str = "evictd_log";

/// After this time without a notification the connection is tested.
const QUIET_MAX: Duration = Duration::from_secs(15);

/// How long connecting and testing may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The pause between two attempts to connect: doubled from the first up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Listens from the first call of [`Listener::notified`] on.
#[derive(Debug, Default)]
pub(super) struct Listener {
    changed: Arc<Notify>,
    task: OnceLock<JoinHandle<()>>,
}

impl Listener {
    /// Completes when there may have been a change since the last call.
    pub(super) async fn notified(&self, options: &PostgresOptions) {
        self.task.get_or_init(|| tokio::spawn(listen(options.clone(), self.changed.clone())));
        self.changed.notified().await;
    }

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

async fn listen(options: PostgresOptions, changed: Arc<Notify>) {
    let (shortest, longest) = PAUSE;
    let mut pause = shortest;
    loop {
        let connected = timeout(PATIENCE, connect(&options)).await.unwrap_or_else(|_| Err(timed_out()));
        let error = match connected {
            Ok(mut listener) => {
                pause = shortest;
                receive(&mut listener, &changed).await
            }
            Err(error) => error,
        };
        tracing::debug!(%error, "cannot listen to the home store; polling it");
        sleep(pause).await;
        pause = longest.min(pause * 2);
    }
}

/// Names no table, so the search path doesn't matter.
async fn connect(options: &PostgresOptions) -> sqlx::Result<PgListener> {
    // A new pool each time: the connection of the last one may be stuck.
    let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options.driver().await?);
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.eager_reconnect(false);
    listener.listen(CHANNEL).await?;
    Ok(listener)
}

/// Signals changes until the connection is lost.
async fn receive(listener: &mut PgListener, changed: &Notify) -> sqlx::Error {
    changed.notify_one();
    loop {
        match timeout(QUIET_MAX, listener.try_recv()).await {
            Ok(Ok(Some(_))) => changed.notify_one(),
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
