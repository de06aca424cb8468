//! Bad days: a disk, a lock, NATS, a client or a shutdown disturbs evictd while clients delete keys.
//!
//! Each test checks the same guarantees ([`ClientHistory::check`]):
//!
//! * Each client gets an answer that it can act on.
//! * A deletion that was answered with success is in force everywhere and has a final receipt.
//! * A key whose deletion was answered with "nothing was changed" is VALID everywhere.
//! * The log has one row, and the audit log one record, for each change and for nothing else.
//!
//! Readiness, metrics and logs show the cause. Afterwards evictd recovers without an operator.
//!
//! * [`store_full`], [`store_locked`], [`store_read_only`], [`store_moved`]: faults of the store's disk.
//! * [`nats_gone`]: an outage under load, and its backlog.
//! * [`contention`]: many clients delete the same key.
//! * [`clients`]: large requests, slow requests and idle connections.
//! * [`shutdown`]: a shutdown under load.
//! * [`killed`]: repeated kills under load.

mod clients;
mod contention;
mod killed;
mod nats_gone;
mod shutdown;
mod store_full;
mod store_locked;
mod store_moved;
mod store_read_only;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use evictd_tests::home_store;
use evictd_tests::http::Response;
use evictd_tests::topology::Plan;
use evictd_tests::wait::try_eventually;
use serde_json::json;
use toml::Table;

use crate::world::{ApiClient, Key, SOON, World, plan};

/// The meaning of the answer to a deletion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DeleteAnswer {
    /// 200: it is deleted, durably.
    Deleted,
    /// 404: it doesn't exist, or another client has deleted it.
    NotFound,
    /// 500 or 503: the store failed or was busy, and nothing was changed.
    Unchanged,
    /// 500: the store failed, and it is unknown whether it was deleted.
    Unknown,
}

impl DeleteAnswer {
    /// Parses an answer in Unkey's form. Any other answer is an error.
    fn by(answer: &Response) -> Result<Self> {
        let text = |pointer: &str| answer.body.pointer(pointer).and_then(|value| value.as_str());
        let form = || {
            let named = text("/meta/requestId").is_some_and(|id| id.starts_with("req_"));
            ensure!(named, "an answer without a request id");
            if answer.status == 200 {
                ensure!(answer.header("content-type") == Some("application/json"), "it isn't sent as JSON");
                ensure!(answer.body["data"] == json!({}), "its data isn't empty");
                return Ok(Self::Deleted);
            }
            // Unkey's API chooses this type for a client that accepts any, as this one does.
            let content_type = answer.header("content-type");
            ensure!(content_type == Some("application/problem+json"), "it is sent as {content_type:?}");
            ensure!(answer.body["error"]["status"] == answer.status, "the statuses differ");
            let kind =
                text("/error/type").and_then(|kind| kind.strip_prefix("https://unkey.com/docs/errors/"));
            let detail = text("/error/detail").unwrap_or_default();
            let is_repeatable = answer.header("retry-after").is_some();
            ensure!(is_repeatable == (answer.status == 503), "503 alone says when to repeat");
            match (answer.status, kind) {
                (404, Some("unkey/data/key_not_found" | "unkey/data/api_not_found")) => Ok(Self::NotFound),
                (500 | 503, Some("unkey/application/service_unavailable"))
                    if detail.contains("nothing was changed") =>
                {
                    Ok(Self::Unchanged)
                }
                (500, Some("unkey/application/service_unavailable")) if detail.contains("look before") => {
                    Ok(Self::Unknown)
                }
                _ => bail!("not an answer to a deletion"),
            }
        };
        form().with_context(|| format!("{}: {}", answer.status, answer.text))
    }
}

/// A deletion that a client requested, and its answer.
pub(crate) struct DeletionRequest<'k> {
    pub(crate) key: &'k Key,
    pub(crate) answer: DeleteAnswer,
    /// The request id, which names its receipt.
    pub(crate) request: String,
    pub(crate) took: Duration,
}

impl<'k> DeletionRequest<'k> {
    /// Deletes `key`. Fails if there is no answer, or one that no client should get.
    pub(crate) fn of(publisher: &ApiClient, key: &'k Key) -> Result<Self> {
        Self::by(&publisher.call("keys.deleteKey", &json!({ "keyId": key.id }))?, key)
    }

    /// Parses an answer that the test has already received.
    fn by(answer: &Response, key: &'k Key) -> Result<Self> {
        let parsed = DeleteAnswer::by(answer).with_context(|| format!("deleting {}", key.id))?;
        let request = answer.body["meta"]["requestId"].as_str().unwrap_or_default().to_owned();
        Ok(Self { key, answer: parsed, request, took: answer.elapsed })
    }
}

/// All deletions that clients requested, with their answers.
#[derive(Default)]
pub(crate) struct ClientHistory<'k>(pub(crate) Vec<DeletionRequest<'k>>);

impl<'k> ClientHistory<'k> {
    /// Returns the keys whose deletion got this answer.
    pub(crate) fn keys(&self, answer: DeleteAnswer) -> Vec<&'k Key> {
        self.0.iter().filter(|asked| asked.answer == answer).map(|asked| asked.key).collect()
    }

    pub(crate) fn count(&self, answer: DeleteAnswer) -> usize {
        self.0.iter().filter(|asked| asked.answer == answer).count()
    }

    /// Checks after a fault that all answers hold, at every agent and in the store. A key whose deletion was refused
    /// and then repeated is in the history twice.
    pub(crate) fn check(&self, world: &World) -> Result<()> {
        world.wait_until_caught_up()?;
        let deleted = self.keys(DeleteAnswer::Deleted);
        world.assert_gone(&deleted)?;
        let is_deleted = |key: &Key| deleted.iter().any(|deleted| deleted.id == key.id);
        let mut unchanged = self.keys(DeleteAnswer::Unchanged);
        let mut unknown = self.keys(DeleteAnswer::Unknown);
        unknown.retain(|key| !is_deleted(key));
        unchanged.retain(|key| !is_deleted(key) && !unknown.iter().any(|unknown| unknown.id == key.id));
        world.wait_for_codes(&unchanged, "VALID").context("the answer was: nothing was changed")?;
        for key in unknown {
            let in_store =
                format!("SELECT count(*) FROM keys WHERE id = '{}' AND deleted_at_m IS NULL", key.id);
            let code = if world.sql(&in_store)? == "1" { "VALID" } else { "NOT_FOUND" };
            world.wait_for_codes(&[key], code)?;
        }
        check_log(world)?;
        let done = self.0.iter().filter(|asked| asked.answer == DeleteAnswer::Deleted);
        check_receipts(world, done.map(|asked| asked.request.as_str()))
    }
}

/// Checks that each deletion has a final receipt, in the store and in the API.
pub(crate) fn check_receipts<'r>(world: &World, requests: impl Iterator<Item = &'r str>) -> Result<()> {
    const ENOUGH: usize = 200;
    home_store::wait_for_receipts(SOON, |statement| world.sql(statement))?;
    for request in requests.take(ENOUGH) {
        let receipt = world.call("propagation.getReceipt", &json!({ "requestId": request }))?;
        ensure!(receipt["final"] == true && receipt["cause"] == "deleted", "{request}: {receipt}");
    }
    Ok(())
}

/// Runs [`home_store::check_log`] on the world's store.
pub(crate) fn check_log(world: &World) -> Result<()> {
    home_store::check_log(|statement| world.sql(statement))
}

/// Plans two regions and a publisher whose store is the only file in `dir`. Creates `dir`.
fn with_store_in(dir: &Path) -> Result<Plan> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let path = dir.join("home.db").to_string_lossy().into_owned();
    let store = Table::from_iter([("path".to_owned(), path.into())]);
    Ok(Plan { publisher: Table::from_iter([("store".to_owned(), store.into())]), ..plan(&["eu", "us"]) })
}

/// Waits until the publisher has logged `words`.
fn wait_for_log(world: &World, words: &str) -> Result<()> {
    let daemon = &world.publisher().daemon;
    let outcome = try_eventually(&format!("the publisher to log {words:?}"), SOON, || {
        Ok((daemon.stdout()? + &daemon.stderr()?).contains(words).then_some(()))
    });
    outcome.with_context(|| daemon.log_tail())
}
