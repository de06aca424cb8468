//! [`World`]: a deployment with one API in it, and the assertions on it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use evictd_tests::http::{Client, Response};
use evictd_tests::sql::Session;
use evictd_tests::topology::{Node, Plan, Servers, StoreKind, Topology, Wires};
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::{Value, json};
use tempfile::TempDir;
use toml::toml;

/// How long an expected event may take on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// How long a test watches for an event that must not happen.
pub(crate) const A_WHILE: Duration = Duration::from_millis(300);

/// The code of a verification that was denied because the agent had no answer that was recent enough.
pub(crate) const UNAVAILABLE: &str = "UNAVAILABLE";

/// Plans one agent per region, and one NATS server for all.
pub(crate) fn plan(regions: &[&str]) -> Plan {
    Plan { servers: Servers::Single, ..Plan::new(regions) }
}

/// As [`plan`], with wires that a test can break.
pub(crate) fn breakable(regions: &[&str]) -> Plan {
    Plan { wires: Wires::Proxied, ..plan(regions) }
}

/// Returns `plan` with a bound that a test can wait for, and a load timeout well within it.
pub(crate) fn with_bound(bound: Duration, plan: Plan) -> Plan {
    Plan { bound, agents: toml! { loads = { timeout = "300ms" } }, ..plan }
}

/// A key of the world's API.
#[derive(Clone)]
pub(crate) struct Key {
    /// Identifies the key for a deletion.
    pub(crate) id: String,
    /// The secret that is verified.
    pub(crate) text: String,
}

/// A deployment with an API. Dropping it kills all processes, and fails the test if a daemon panicked.
pub(crate) struct World {
    pub(crate) topology: Topology,
    pub(crate) api: String,
    /// The home store's URL, if it is on PostgreSQL.
    pub(crate) database: Option<String>,
    store: PathBuf,
    dir: TempDir,
}

impl World {
    pub(crate) fn start(plan: &Plan) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let topology = Topology::start(dir.path(), plan)?;
        let elsewhere = plan.publisher.get("store").and_then(|store| store.get("path")?.as_str());
        let store = elsewhere.map_or_else(|| dir.path().join("home.db"), PathBuf::from);
        let database = match &plan.store {
            StoreKind::Sqlite => None,
            StoreKind::Postgres(url) => Some(url.clone()),
        };
        let mut world = Self { topology, api: String::new(), database, store, dir };
        world.api = world.create_api()?;
        Ok(world)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The home store's file.
    pub(crate) fn store(&self) -> PathBuf {
        self.store.clone()
    }

    pub(crate) fn publisher(&self) -> &Node {
        &self.topology.publisher
    }

    /// The first agent of the `region`-th region.
    pub(crate) fn agent(&self, region: usize) -> &Node {
        &self.topology.regions[region].agents[0]
    }

    pub(crate) fn agent_mut(&mut self, region: usize) -> &mut Node {
        &mut self.topology.regions[region].agents[0]
    }

    /// Calls the control API and returns the answer's `data`. An answer other than 200 is an error.
    pub(crate) fn call(&self, operation: &str, body: &Value) -> Result<Value> {
        let answer = self.topology.call(self.publisher(), operation, body)?;
        ensure!(answer.status == 200, "{operation} answered {}: {}", answer.status, answer.text);
        Ok(answer.body["data"].clone())
    }

    pub(crate) fn create_api(&self) -> Result<String> {
        let data = self.call("apis.createApi", &json!({ "name": "payments" }))?;
        Ok(data["apiId"].as_str().context("an API without an id")?.to_owned())
    }

    pub(crate) fn create_key(&self) -> Result<Key> {
        self.create_key_with(json!({ "apiId": self.api }))
    }

    /// Creates a key of the world's API, or of the one that `body` names.
    pub(crate) fn create_key_with(&self, mut body: Value) -> Result<Key> {
        if body["apiId"].is_null() {
            body["apiId"] = self.api.as_str().into();
        }
        let data = self.call("keys.createKey", &body)?;
        let text = |member: &str| data[member].as_str().map(str::to_owned);
        Ok(Key { id: text("keyId").context("no keyId")?, text: text("key").context("no key")? })
    }

    /// Creates `how_many` keys of the world's API, with several clients at once.
    pub(crate) fn create_keys(&self, how_many: usize) -> Result<Vec<Key>> {
        let created = self.by_all_clients(&vec![(); how_many], |caller, ()| {
            let answer = caller.call("keys.createKey", &json!({ "apiId": self.api }))?;
            let text = |member: &str| answer.body["data"][member].as_str().map(str::to_owned);
            Ok(Key { id: text("keyId").context("no keyId")?, text: text("key").context("no key")? })
        });
        created.context("creating keys")
    }

    /// Inserts keys of the world's API by one SQL statement, which is fast also for very many.
    pub(crate) fn import_keys(&self, how_many: usize) -> Result<Vec<Key>> {
        self.sql(&format!(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {how_many} - 1)
             INSERT INTO keys (id, api_id, workspace_id, hash, start)
             SELECT 'key_' || i, apis.id, apis.workspace_id, sha256('imported_' || i), 'impo' FROM n, apis
             WHERE apis.id = '{}'",
            self.api
        ))?;
        let key = |i: usize| Key { id: format!("key_{i}"), text: format!("imported_{i}") };
        Ok((0..how_many).map(key).collect())
    }

    /// Deletes `keys` with several clients at once, in no particular order.
    pub(crate) fn delete_all(&self, keys: &[Key]) -> Result<()> {
        let deleted = self.by_all_clients(keys, |caller, key| {
            let answer = caller.call("keys.deleteKey", &json!({ "keyId": key.id }))?;
            ensure!(
                answer.status == 200,
                "the deletion of {} was answered {}: {}",
                key.id,
                answer.status,
                answer.text
            );
            Ok(())
        });
        deleted.map(drop).context("deleting keys")
    }

    /// Calls the publisher for each of `items`, which several clients share. The results are in no particular order.
    pub(crate) fn by_all_clients<'i, T: Sync, R: Send>(
        &self,
        items: &'i [T],
        call: impl Fn(&ApiClient, &'i T) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        const CLIENTS: usize = 4;
        let caller = ApiClient::new(self, self.publisher());
        std::thread::scope(|scope| {
            let clients: Vec<_> = items
                .chunks(items.len().div_ceil(CLIENTS).max(1))
                .map(|items| {
                    let (caller, call) = (caller.clone(), &call);
                    scope.spawn(move || items.iter().map(|item| call(&caller, item)).collect())
                })
                .collect();
            let mut results = Vec::with_capacity(items.len());
            for client in clients {
                let part: Result<Vec<R>> = client.join().map_err(|_| anyhow!("a client panicked"))?;
                results.extend(part?);
            }
            Ok(results)
        })
    }

    pub(crate) fn delete(&self, key: &Key) -> Result<()> {
        self.call("keys.deleteKey", &json!({ "keyId": key.id })).map(drop)
    }

    pub(crate) fn delete_permanently(&self, key: &Key) -> Result<()> {
        self.call("keys.deleteKey", &json!({ "keyId": key.id, "permanent": true })).map(drop)
    }

    /// Verifies `key` at `agent`. Returns the code, or [`UNAVAILABLE`].
    pub(crate) fn code(&self, agent: &Node, key: &Key) -> Result<String> {
        ApiClient::new(self, agent).code(key)
    }

    pub(crate) fn wait_for_code(&self, agent: &Node, key: &Key, wanted: &str) -> Result<()> {
        let what = format!("{} to be {wanted} at {}", key.id, agent.daemon.name());
        let mut last = String::new();
        let caller = ApiClient::new(self, agent);
        let outcome = try_eventually(&what, SOON, || {
            last = caller.code(key)?;
            Ok((last == wanted).then_some(()))
        });
        outcome.with_context(|| format!("the last answer was {last}\n{}", agent.daemon.log_tail()))
    }

    /// Waits until every agent answers `wanted` for all of `keys`.
    pub(crate) fn wait_for_codes(&self, keys: &[&Key], wanted: &str) -> Result<()> {
        for agent in self.topology.agents() {
            for key in keys {
                self.wait_for_code(agent, key, wanted)?;
            }
        }
        Ok(())
    }

    /// Verifies `keys` at every agent until it answers VALID for all of them from its cache alone.
    pub(crate) fn cache_everywhere(&self, keys: &[&Key]) -> Result<()> {
        // A key that is cached before its creation is applied would be loaded a second time.
        self.wait_until_caught_up()?;
        for agent in self.topology.agents() {
            self.cache(agent, keys)?;
        }
        Ok(())
    }

    fn cache(&self, agent: &Node, keys: &[&Key]) -> Result<()> {
        let caller = ApiClient::new(self, agent);
        for key in keys {
            self.wait_for_code(agent, key, "VALID")?;
        }
        let what = format!("{} to answer from its cache", agent.daemon.name());
        try_eventually(&what, SOON, || {
            let before = hits_and_misses(agent)?;
            let mut valid = true;
            for key in keys {
                valid &= caller.code(key)? == "VALID";
            }
            // The root key and the key: two hits each.
            let expected = (before.0 + 2 * keys.len() as u64, before.1);
            Ok((valid && hits_and_misses(agent)? == expected).then_some(()))
        })
    }

    /// Waits until `keys` are NOT_FOUND at every agent, and asserts for a while that none becomes VALID again.
    pub(crate) fn assert_gone(&self, keys: &[&Key]) -> Result<()> {
        self.wait_for_codes(keys, "NOT_FOUND")?;
        throughout(A_WHILE, || self.assert_none_valid(keys))
    }

    pub(crate) fn assert_none_valid(&self, keys: &[&Key]) -> Result<()> {
        for agent in self.topology.agents() {
            for key in keys {
                let code = self.code(agent, key)?;
                ensure!(code != "VALID", "{} is VALID at {}", key.id, agent.daemon.name());
            }
        }
        Ok(())
    }

    /// Asserts that no verification is VALID that begins `bound` after `deleted_at` or later.
    pub(crate) fn assert_gone_within(&self, key: &Key, deleted_at: Instant, bound: Duration) -> Result<()> {
        throughout(bound + A_WHILE, || {
            for agent in self.topology.agents() {
                let asked_at = Instant::now();
                assert_bounded(asked_at, deleted_at, bound, &self.code(agent, key)?)?;
            }
            Ok(())
        })
    }

    /// Waits until every agent has applied all that was committed. Returns the head position.
    pub(crate) fn wait_until_caught_up(&self) -> Result<u64> {
        try_eventually("every agent to apply the whole log", SOON, || {
            let head = count(self.publisher(), "evictd_publisher_head_position", &[])?;
            for agent in self.topology.agents() {
                if agent.status()?["appliedPosition"] != head {
                    return Ok(None);
                }
            }
            // The gauge may lag behind the store.
            let in_store = self.sql(
                "SELECT head || ' ' || (SELECT count(*) FROM invalidations WHERE position IS NULL) FROM log_head",
            )?;
            Ok((in_store == format!("{head} 0")).then_some(head))
        })
    }

    /// Runs one statement on the home store directly, without the publisher. Returns the first value of its result as
    /// text.
    pub(crate) fn sql(&self, statement: &str) -> Result<String> {
        const SCRIPT: &str = "import hashlib, sqlite3, sys\n\
            store = sqlite3.connect(sys.argv[1], timeout=20)\n\
            store.create_function('sha256', 1, lambda text: hashlib.sha256(text.encode()).digest())\n\
            row = store.execute(sys.argv[2]).fetchone()\n\
            store.commit()\n\
            print('' if row is None else row[0])";
        if let Some(url) = &self.database {
            return Session::connect(url)?.query(statement);
        }
        let output = Command::new("python3").args(["-c", SCRIPT]).arg(self.store()).arg(statement).output();
        let output = output.context("running python3 for direct SQL")?;
        if !output.status.success() {
            bail!("{statement}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    /// Asserts that the deployment still accepts a valid key and evicts a deleted one.
    pub(crate) fn assert_works(&self) -> Result<()> {
        let (good, doomed) = (self.create_key()?, self.create_key()?);
        self.cache_everywhere(&[&good, &doomed])?;
        self.delete(&doomed)?;
        self.assert_gone(&[&doomed])?;
        self.wait_for_codes(&[&good], "VALID")
    }

    /// Returns everything that the daemons logged.
    pub(crate) fn logs(&self) -> Result<String> {
        let nodes = self.topology.agents().chain(self.topology.publishers());
        let logs = nodes.map(|node| Ok(node.daemon.stdout()? + &node.daemon.stderr()?));
        logs.collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let panicked = self.logs().map(|logs| {
            let lines = logs.lines().filter(|line| line.contains("panicked"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        });
        if !std::thread::panicking() {
            assert_eq!(panicked.unwrap_or_default(), Vec::<String>::new(), "a daemon panicked");
        }
    }
}

/// A client of one daemon, which can move to another thread.
#[derive(Clone)]
pub(crate) struct ApiClient {
    client: Client,
    url: String,
    root_key: String,
}

impl ApiClient {
    pub(crate) fn new(world: &World, node: &Node) -> Self {
        let url = format!("http://{}/v2", node.http);
        Self { client: Client::new(), url, root_key: world.topology.root_key().to_owned() }
    }

    pub(crate) fn call(&self, operation: &str, body: &Value) -> Result<Response> {
        self.client.post_json(&format!("{}/{operation}", self.url), Some(&self.root_key), body, &[])
    }

    /// Verifies `key`. Returns the code, or [`UNAVAILABLE`].
    pub(crate) fn code(&self, key: &Key) -> Result<String> {
        let answer = self.call("keys.verifyKey", &json!({ "key": key.text }))?;
        let body = &answer.body;
        let request_id = body["meta"]["requestId"].as_str().unwrap_or_default();
        ensure!(request_id.starts_with("req_"), "not an answer in Unkey's form: {}", answer.text);
        match answer.status {
            200 => {
                let code = body["data"]["code"].as_str().context("a verdict without a code")?;
                ensure!(
                    body["data"]["valid"] == (code == "VALID"),
                    "`valid` contradicts `code`: {}",
                    answer.text
                );
                Ok(code.to_owned())
            }
            503 => {
                let kind = body["error"]["type"].as_str().unwrap_or_default();
                ensure!(
                    body["error"]["status"] == 503 && kind.ends_with("unkey/application/service_unavailable"),
                    "not an error in Unkey's form: {}",
                    answer.text
                );
                Ok(UNAVAILABLE.to_owned())
            }
            status => bail!("a verification was answered {status}: {}", answer.text),
        }
    }
}

/// Waits until `agent` has applied a change of `id` for this `cause`.
pub(crate) fn wait_until_applied(agent: &Node, id: &str, cause: &str) -> Result<()> {
    let what = format!("{} to apply that {id} was {cause}", agent.daemon.name());
    try_eventually(&what, SOON, || {
        let status = agent.status()?;
        let rows = status["recent"].as_array().cloned().unwrap_or_default();
        Ok(rows.iter().any(|row| row["id"] == id && row["cause"] == cause).then_some(()))
    })
}

pub(crate) fn wait_for_mode(agent: &Node, mode: &str) -> Result<()> {
    let what = format!("{} to be {mode}", agent.daemon.name());
    try_eventually(&what, SOON, || {
        let shown = agent.status()?["mode"] == mode;
        Ok((shown && count(agent, "evictd_agent_mode", &[("mode", mode)])? == 1).then_some(()))
    })
}

/// Waits until `/readyz` answers `status`. Returns the answer's body.
pub(crate) fn wait_for_readiness(node: &Node, status: u16) -> Result<Value> {
    let what = format!("the readiness of {} to be {status}", node.daemon.name());
    try_eventually(&what, SOON, || {
        let answer = Client::new().get(&format!("http://{}/readyz", node.admin))?;
        Ok((answer.status == status).then_some(answer.body))
    })
}

/// Waits until `node` is ready with a warning that contains `words`.
pub(crate) fn wait_for_warning(node: &Node, words: &str) -> Result<()> {
    let (what, mut last) = (format!("{} to warn of {words:?}", node.daemon.name()), Value::Null);
    let outcome = try_eventually(&what, SOON, || {
        last = wait_for_readiness(node, 200)?;
        Ok(last["warnings"].to_string().contains(words).then_some(()))
    });
    outcome.with_context(|| format!("the last answer was {last}"))
}

/// Waits until `node` has been ready for long enough to stay ready without NATS.
pub(crate) fn wait_until_settled(node: &Node) -> Result<()> {
    const SETTLES_AFTER: Duration = Duration::from_secs(3);
    let mut since = None;
    try_eventually("the node to be ready for a while", SOON, || {
        let answer = Client::new().get(&format!("http://{}/readyz", node.admin))?;
        if answer.status != 200 {
            since = None;
            return Ok(None);
        }
        let ready_for = since.get_or_insert_with(Instant::now).elapsed();
        Ok((ready_for > SETTLES_AFTER + A_WHILE).then_some(()))
    })
}

/// Returns a counter or gauge of whole numbers, summed over all series with these labels. Without a series, it is 0.
pub(crate) fn count(node: &Node, name: &str, labels: &[(&str, &str)]) -> Result<u64> {
    Ok(node.metrics()?.value(name, labels).unwrap_or(0.0) as u64)
}

pub(crate) fn wait_for_count(node: &Node, name: &str, labels: &[(&str, &str)], wanted: u64) -> Result<()> {
    let what = format!("{name}{labels:?} of {} to be {wanted}", node.daemon.name());
    let mut last = 0;
    let outcome = try_eventually(&what, SOON, || {
        last = count(node, name, labels)?;
        Ok((last == wanted).then_some(()))
    });
    outcome.with_context(|| format!("it is {last}"))
}

fn hits_and_misses(agent: &Node) -> Result<(u64, u64)> {
    let hits = count(agent, "evictd_agent_cache_hits_total", &[])?;
    Ok((hits, count(agent, "evictd_agent_cache_misses_total", &[])?))
}

/// Returns how often an agent has flushed its cache, not counting its start.
pub(crate) fn flushes(agent: &Node) -> Result<u64> {
    let flushes = |labels: &[_]| count(agent, "evictd_agent_flushes_total", labels);
    Ok(flushes(&[])? - flushes(&[("reason", "start")])?)
}

/// Returns how often an agent has connected to NATS, summed over its connections.
pub(crate) fn connects(agent: &Node) -> Result<u64> {
    count(agent, "evictd_agent_nats_connects_total", &[])
}

/// Returns how many repairs of this `cause` an agent has requested.
pub(crate) fn repairs(agent: &Node, cause: &str) -> Result<u64> {
    count(agent, "evictd_agent_repairs_total", &[("cause", cause)])
}

/// Returns milliseconds since 1970, the unit of `expires`.
pub(crate) fn wall_millis() -> Result<i64> {
    Ok(i64::try_from(std::time::UNIX_EPOCH.elapsed()?.as_millis())?)
}

/// Checks the bound: a verification that began `bound` after `deleted_at` or later isn't VALID.
pub(crate) fn assert_bounded(
    asked_at: Instant,
    deleted_at: Instant,
    bound: Duration,
    code: &str,
) -> Result<()> {
    let late = asked_at.saturating_duration_since(deleted_at);
    ensure!(code != "VALID" || late < bound, "VALID {late:?} after the deletion; the bound is {bound:?}");
    Ok(())
}
