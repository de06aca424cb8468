//! Bad days: something that evictd stands on is full, locked, gone, slow or told to end, while clients go on.
//!
//! Whatever the day, the same is held: each client gets an answer that it can act on; what was answered with
//! success is gone everywhere and has a final receipt; what was answered with "nothing was changed" is VALID
//! everywhere; the log holds one row, and the audit log one record, for every change and for nothing else
//! ([`Story::check`]). Readiness, metrics and logs tell what is going on, and when it is over nobody has to help.
//!
//! * [`store_full`], [`store_locked`], [`store_read_only`], [`store_moved`]: what may happen to the store's disk.
//! * [`nats_gone`]: an outage under load, and what piles up in it.
//! * [`contention`]: everybody deletes the same.
//! * [`clients`]: large and slow requests, and connections that nobody uses.
//! * [`shutdown`]: told to end in the middle of it.
//! * [`killed`]: killed in the middle of it, again and again.

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

use crate::world::{Caller, Key, SOON, World, plan};

/// What the answer to a deletion says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Told {
    /// 200: it is deleted, durably.
    Deleted,
    /// 404: it doesn't exist, or somebody else has deleted it.
    NotFound,
    /// 500: the store failed, and nothing was changed.
    Unchanged,
    /// 500: the store failed, and nobody knows whether it was deleted.
    Unknown,
}

impl Told {
    /// Reads an answer in Unkey's form; anything that isn't one of the four is an error.
    fn by(answer: &Response) -> Result<Self> {
        let text = |pointer: &str| answer.body.pointer(pointer).and_then(|value| value.as_str());
        let form = || {
            let named = text("/meta/requestId").is_some_and(|id| id.starts_with("req_"));
            ensure!(named, "an answer without a request id");
            if answer.status == 200 {
                ensure!(answer.header("content-type") == Some("application/json"), "it isn't sent as JSON");
                ensure!(answer.body["data"] == json!({}), "it has other data than none");
                return Ok(Self::Deleted);
            }
            // What Unkey's API gives to who accepts anything, as this client does.
            let content_type = answer.header("content-type");
            ensure!(content_type == Some("application/problem+json"), "it is sent as {content_type:?}");
            ensure!(answer.body["error"]["status"] == answer.status, "it contradicts itself");
            let kind =
                text("/error/type").and_then(|kind| kind.strip_prefix("https://unkey.com/docs/errors/"));
            let detail = text("/error/detail").unwrap_or_default();
            match (answer.status, kind) {
                (404, Some("unkey/data/key_not_found" | "unkey/data/api_not_found")) => Ok(Self::NotFound),
                (500, Some("unkey/application/service_unavailable"))
                    if detail.contains("nothing was changed") =>
                {
                    Ok(Self::Unchanged)
                }
                (500, Some("unkey/application/service_unavailable")) if detail.contains("look before") => {
                    Ok(Self::Unknown)
                }
                _ => bail!("a deletion isn't answered like this"),
            }
        };
        form().with_context(|| format!("{}: {}", answer.status, answer.text))
    }
}

/// A deletion that was asked for, and its answer.
pub(crate) struct Asked<'k> {
    pub(crate) key: &'k Key,
    pub(crate) told: Told,
    /// Its id, by which it has a receipt.
    pub(crate) request: String,
    pub(crate) took: Duration,
}

impl<'k> Asked<'k> {
    /// Deletes `key`. An error is an answer that nobody should get, or none.
    pub(crate) fn of(publisher: &Caller, key: &'k Key) -> Result<Self> {
        Self::by(&publisher.call("keys.deleteKey", &json!({ "keyId": key.id }))?, key)
    }

    /// The same, by an answer that is there already.
    fn by(answer: &Response, key: &'k Key) -> Result<Self> {
        let told = Told::by(answer).with_context(|| format!("deleting {}", key.id))?;
        let request = answer.body["meta"]["requestId"].as_str().unwrap_or_default().to_owned();
        Ok(Self { key, told, request, took: answer.elapsed })
    }
}

/// All that clients asked for, as it was answered.
#[derive(Default)]
pub(crate) struct Story<'k>(pub(crate) Vec<Asked<'k>>);

impl<'k> Story<'k> {
    /// The keys whose deletion was answered like this.
    pub(crate) fn keys(&self, told: Told) -> Vec<&'k Key> {
        self.0.iter().filter(|asked| asked.told == told).map(|asked| asked.key).collect()
    }

    pub(crate) fn count(&self, told: Told) -> usize {
        self.0.iter().filter(|asked| asked.told == told).count()
    }

    /// Whatever has happened is over: what clients were told is true, at every agent and in the store. A key that
    /// was refused and then deleted stands in it twice.
    pub(crate) fn check(&self, world: &World) -> Result<()> {
        world.wait_until_caught_up()?;
        let deleted = self.keys(Told::Deleted);
        world.assert_gone(&deleted)?;
        let is_deleted = |key: &Key| deleted.iter().any(|deleted| deleted.id == key.id);
        let mut unchanged = self.keys(Told::Unchanged);
        let mut unknown = self.keys(Told::Unknown);
        unknown.retain(|key| !is_deleted(key));
        unchanged.retain(|key| !is_deleted(key) && !unknown.iter().any(|unknown| unknown.id == key.id));
        world.wait_for_codes(&unchanged, "VALID").context("nothing was changed, it was said")?;
        for key in unknown {
            let in_store =
                format!("SELECT count(*) FROM keys WHERE id = '{}' AND deleted_at_m IS NULL", key.id);
            let code = if world.sql(&in_store)? == "1" { "VALID" } else { "NOT_FOUND" };
            world.wait_for_codes(&[key], code)?;
        }
        check_log(world)?;
        let done = self.0.iter().filter(|asked| asked.told == Told::Deleted);
        check_receipts(world, done.map(|asked| asked.request.as_str()))
    }
}

/// Every deletion has a final receipt, in the store and for who asks.
pub(crate) fn check_receipts<'r>(world: &World, requests: impl Iterator<Item = &'r str>) -> Result<()> {
    const ENOUGH: usize = 200;
    home_store::wait_for_receipts(SOON, |statement| world.sql(statement))?;
    for request in requests.take(ENOUGH) {
        let receipt = world.call("propagation.getReceipt", &json!({ "requestId": request }))?;
        ensure!(receipt["final"] == true && receipt["cause"] == "deleted", "{request}: {receipt}");
    }
    Ok(())
}

/// [`home_store::check_log`] of a world's store.
pub(crate) fn check_log(world: &World) -> Result<()> {
    home_store::check_log(|statement| world.sql(statement))
}

/// Two regions, and a publisher whose store is alone in `dir`, which is created.
fn with_store_in(dir: &Path) -> Result<Plan> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let path = dir.join("home.db").to_string_lossy().into_owned();
    let store = Table::from_iter([("path".to_owned(), path.into())]);
    Ok(Plan { publisher: Table::from_iter([("store".to_owned(), store.into())]), ..plan(&["eu", "us"]) })
}

/// `evictd` has said so.
fn wait_for_log(world: &World, words: &str) -> Result<()> {
    let daemon = &world.publisher().daemon;
    let outcome = try_eventually(&format!("the publisher to log {words:?}"), SOON, || {
        Ok((daemon.stdout()? + &daemon.stderr()?).contains(words).then_some(()))
    });
    outcome.with_context(|| daemon.log_tail())
}
