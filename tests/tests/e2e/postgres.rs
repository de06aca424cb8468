//! The home store on PostgreSQL: several publishers, direct SQL, fail-overs, replicas, and outages.
//!
//! Each test has a server of its own ([`Site`]), and most have more than one publisher. The guarantees are those of
//! SQLite. In addition, publishers start and end independently of each other, and the server may be replaced by one
//! that lacks commits.
//!
//! * [`clients`]: clients that call all publishers and agents, and check the bound.
//! * [`ordinary`]: a deletion, whichever publisher numbers it.
//! * [`direct_sql`]: changes made outside the API are reported by NOTIFY, and found without it.
//! * [`transactions`]: long transactions, and those that commit in another order than they began.
//! * [`several`]: publishers exit, and are paused, at every point of their shared work.
//! * [`failover`]: another server takes over, with all commits or without some.
//! * [`receipts`]: receipts while publishers and agents start and end.
//! * [`replicas`]: agents that read a replica.
//! * [`rivals`]: copies of the database, with publishers of their own, and read by agents.
//! * [`outages`]: the server is gone, silent, locked, or full.
//! * [`shutdown`]: a publisher is stopped while the server is silent.
//! * [`erasure`]: what is left of a key that was erased.
//! * [`crash_run`]: many deletions under many kills, on both stores.

mod clients;
mod crash_run;
mod direct_sql;
mod erasure;
mod failover;
mod ordinary;
mod outages;
mod receipts;
mod replicas;
mod rivals;
mod several;
mod shutdown;
mod transactions;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::http::{Client, Response};
use evictd_tests::sql::{Session, server_of};
use evictd_tests::topology::{Node, Plan, StoreKind};
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::{Value, json};
use toml::{Table, toml};

use crate::world::{Key, SOON, World, count};

/// A deployment, and the server of its home store. Dropping it stops both.
struct Site {
    world: World,
    server: Postgres,
}

impl Site {
    /// Starts `plan` with this many publishers on a new server.
    fn start(publishers: usize, plan: Plan) -> Result<Self> {
        Self::start_on(Postgres::start()?, publishers, plan)
    }

    fn start_on(server: Postgres, publishers: usize, plan: Plan) -> Result<Self> {
        let plan = Plan { store: StoreKind::Postgres(server.url()), publishers, ..plan };
        Ok(Self { world: World::start(&plan)?, server })
    }

    /// Starts `plan` with publishers that log in as `user`, who doesn't own the database.
    fn start_as(user: &str, server: Postgres, publishers: usize, plan: Plan) -> Result<Self> {
        let plan = Plan { store: StoreKind::Postgres(server.url_as(user)), publishers, ..plan };
        let mut world = World::start(&plan)?;
        world.database = Some(server.url());
        Ok(Self { world, server })
    }

    /// Opens a session on the home store, outside the publishers.
    fn session(&self) -> Result<Session> {
        Session::connect(&self.server.url())
    }

    fn publisher(&self, index: usize) -> Result<&Node> {
        self.world.topology.publishers().nth(index).context("there is no such publisher")
    }

    /// Redirects a publisher to another server, as a fail-over does, and cuts its connections to the old one.
    fn lead(&self, publisher: usize, server: &Postgres) -> Result<()> {
        let wire = self.publisher(publisher)?.store_wire.as_ref();
        let wire = wire.context("the wires are direct: the plan needs `Wires::Proxied`")?;
        wire.lead_to(server_of(&server.url())?);
        wire.reset();
        Ok(())
    }

    /// Redirects all publishers to another server. Returns the old one.
    fn move_to(&mut self, server: Postgres) -> Result<Postgres> {
        for publisher in 0..self.world.topology.publishers().count() {
            self.lead(publisher, &server)?;
        }
        self.world.database = Some(server.url());
        Ok(std::mem::replace(&mut self.server, server))
    }

    /// Asserts that no process counted a broken invariant, and that no agent breached the bound.
    fn assert_no_rule_was_broken(&self) -> Result<()> {
        for node in self.world.topology.publishers().chain(self.world.topology.agents()) {
            let broken = count(node, "evictd_invariant_violations_total", &[])?;
            ensure!(
                broken == 0,
                "{} counted a broken invariant\n{}",
                node.daemon.name(),
                node.daemon.log_tail()
            );
        }
        for agent in self.world.topology.agents() {
            assert_eq!(count(agent, "evictd_agent_bound_breaches_total", &[])?, 0, "{}", agent.daemon.name());
        }
        Ok(())
    }
}

/// A deletion that was waited for: its receipt, and how long it took.
struct Settled {
    receipt: Value,
    took: Duration,
}

impl Settled {
    /// Deletes `key` at `publisher`, and waits for its receipt.
    fn of(world: &World, publisher: &Node, key: &Key) -> Result<Self> {
        let body = json!({ "keyId": key.id });
        let answer =
            world.topology.call_with(publisher, "keys.deleteKey", &body, &[("Prefer", "wait=30")])?;
        ensure!(answer.status == 200, "the answer was {}: {}", answer.status, answer.text);
        Ok(Self { receipt: answer.body["meta"]["propagation"].clone(), took: answer.elapsed })
    }

    /// Returns each region with its state.
    fn regions(&self) -> Vec<(&str, &str)> {
        let regions = self.receipt["regions"].as_array().map(Vec::as_slice).unwrap_or_default();
        regions
            .iter()
            .filter_map(|region| Some((region["region"].as_str()?, region["state"].as_str()?)))
            .collect()
    }
}

/// All publishers, for clients that try the next one when one fails.
#[derive(Clone)]
struct Publishers {
    addresses: Vec<SocketAddr>,
    root_key: String,
}

impl Publishers {
    fn of(world: &World) -> Self {
        let addresses = world.topology.publishers().map(|node| node.http).collect();
        Self { addresses, root_key: world.topology.root_key().to_owned() }
    }

    /// Calls one publisher after the other, beginning with `first`, until an answer isn't a 5xx. Each has some seconds to
    /// answer.
    fn call(
        &self,
        first: usize,
        operation: &str,
        body: &Value,
        headers: &[(&str, &str)],
    ) -> Result<Response> {
        const EACH: Duration = Duration::from_secs(6);
        const ALL: Duration = Duration::from_secs(45);
        let client = Client::with_timeout(EACH);
        let began = Instant::now();
        for address in self.addresses.iter().cycle().skip(first % self.addresses.len()) {
            let url = format!("http://{address}/v2/{operation}");
            match client.post_json(&url, Some(&self.root_key), body, headers) {
                Ok(answer) if answer.status < 500 => return Ok(answer),
                last if began.elapsed() > ALL => bail!("{operation} failed everywhere for {ALL:?}: {last:?}"),
                _ => throughout(Duration::from_millis(5), || Ok(()))?,
            }
        }
        bail!("there is no publisher")
    }

    fn create_key(&self, first: usize, api: &str) -> Result<Key> {
        let answer = self.call(first, "keys.createKey", &json!({ "apiId": api }), &[])?;
        let text = |member: &str| answer.body["data"][member].as_str().map(str::to_owned);
        let key = text("keyId").zip(text("key")).map(|(id, text)| Key { id, text });
        key.with_context(|| format!("createKey answered {}: {}", answer.status, answer.text))
    }
}

/// Retries to delete `key` at `publisher` until it succeeds. Returns when it did.
fn delete_as_soon_as_possible(world: &World, publisher: &Node, key: &Key) -> Result<Instant> {
    let mut last = String::new();
    let done = try_eventually(&format!("{} to be deleted", key.id), SOON, || {
        let answer = world.topology.call(publisher, "keys.deleteKey", &json!({ "keyId": key.id }))?;
        last = answer.text;
        // 404: an earlier try succeeded, and its answer was lost.
        Ok([200, 404].contains(&answer.status).then(Instant::now))
    });
    done.with_context(|| format!("the last answer was {last}\n{}", publisher.daemon.log_tail()))
}

/// Returns the ids of `keys` as a list in SQL.
fn list(keys: &[&Key]) -> String {
    keys.iter().map(|key| format!("'{}'", key.id)).collect::<Vec<_>>().join(", ")
}

/// Returns the configuration of agents that read a database. Its timeout allows for a busy machine.
fn reading(url: &str) -> Table {
    reading_for(url, Duration::from_secs(2))
}

/// As [`reading`], with agents that fall back to the authority when the database was silent for `timeout`.
fn reading_for(url: &str, timeout: Duration) -> Table {
    let timeout = format!("{}ms", timeout.as_millis());
    let postgres = Table::from_iter(
        [("url", url), ("timeout", &timeout)].map(|(key, value)| (key.to_owned(), value.into())),
    );
    let mut agents = toml! { loads = { origin = "postgres" } };
    agents.insert("postgres".to_owned(), postgres.into());
    agents
}
