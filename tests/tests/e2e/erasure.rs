//! After `retention.log`, only the opaque id of a permanently deleted key is left. An agent that was cut off for longer
//! flushes its cache instead of missing a row (R5).
//!
//! The store's clock decides how old a row is, and the log is kept for at least an hour. The tests don't wait that
//! long. SQLite uses the clock of the publisher's process, so they restart the publisher with a clock that is two hours
//! ahead. A PostgreSQL server's clock can't be changed, so they make the rows two hours older.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evictd_tests::proxy::WireMode;
use evictd_tests::topology::Plan;
use evictd_tests::wait::{throughout, try_eventually};
use evictd_tests::wall_clock::WallClock;
use evictd_wire::api::ids;
use memchr::memmem;
use serde_json::{Value, json};
use toml::toml;

use crate::world::{
    Key, SOON, UNAVAILABLE, World, assert_bounded, breakable, count, flushes, plan, wait_for_mode, with_bound,
};

/// Returns `plan` with the shortest log retention that the configuration allows.
pub(crate) fn with_short_log(plan: Plan) -> Plan {
    Plan { publisher: toml! { retention = { log = "1h" } }, ..plan }
}

/// Advances the store's time by two hours, and waits until the whole log is purged.
fn purge_log(world: &mut World) -> Result<()> {
    const TWO_HOURS: i64 = 7_200;
    // A row without a position is never purged, nor one whose receipt isn't final.
    let open = "SELECT count(*) FROM invalidations
                WHERE position IS NULL OR (request_id IS NOT NULL AND NOT receipted)";
    try_eventually("every change to have its receipt", SOON, || Ok((world.sql(open)? == "0").then_some(())))?;
    if world.database.is_some() {
        let micros = TWO_HOURS * 1_000_000;
        world.sql(&format!("UPDATE invalidations SET committed_at = committed_at - {micros}"))?;
    } else {
        let dir = world.dir().to_path_buf();
        WallClock::give_to(&mut world.topology.publisher.daemon, &dir, TWO_HOURS)?;
    }
    // The publisher checks for old rows when it starts.
    let publisher = &mut world.topology.publisher;
    ensure!(publisher.daemon.stop(SOON)?.success(), "{}", publisher.daemon.log_tail());
    publisher.restart()?;
    try_eventually("the log to be purged", SOON, || {
        Ok((world.sql("SELECT count(*) FROM invalidations")? == "0").then_some(()))
    })
    .with_context(|| world.publisher().daemon.log_tail())
}

/// A byte sequence that a file may contain.
struct Trace {
    what: String,
    bytes: Vec<u8>,
}

impl Trace {
    fn new(what: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { what: what.into(), bytes: bytes.into() }
    }
}

/// A person with keys, and all personal data that is stored with the keys.
struct Holder {
    number: usize,
    /// The first key, and its successor.
    keys: Vec<Key>,
}

impl Holder {
    fn old_name(&self) -> String {
        format!("Nancy-Formerly-{}", self.number)
    }

    fn name(&self) -> String {
        format!("Jane-Q-Example-{}", self.number)
    }

    fn email(&self) -> String {
        format!("jane.{}@example.com", self.number)
    }

    fn external_id(&self) -> String {
        format!("customer-of-old-{}", self.number)
    }

    fn permission(&self) -> String {
        format!("janes{}.may.read", self.number)
    }

    fn prefix(&self) -> String {
        format!("zanzibar{}", self.number)
    }

    /// Creates a holder with a first key.
    fn create(world: &World, number: usize) -> Result<Self> {
        let mut holder = Self { number, keys: Vec::new() };
        let key = world.create_key_with(json!({
            "name": holder.old_name(),
            "meta": { "email": holder.email() },
            "externalId": holder.external_id(),
            "permissions": [holder.permission()],
            "prefix": holder.prefix(),
        }))?;
        holder.keys.push(key);
        Ok(holder)
    }

    /// Changes the name, and rerolls the key.
    fn change(&mut self, world: &World) -> Result<()> {
        const HOUR_MS: usize = 3_600_000;
        let id = &self.keys[0].id;
        world.call("keys.updateKey", &json!({ "keyId": id, "name": self.name() }))?;
        // The old key of holder 0 expires at once, those of the others hours later.
        let expiration = self.number * HOUR_MS;
        let data = world.call("keys.rerollKey", &json!({ "keyId": id, "expiration": expiration }))?;
        let text = |member: &str| data[member].as_str().map(str::to_owned);
        let key = text("keyId").zip(text("key")).map(|(id, text)| Key { id, text });
        self.keys.push(key.context("no new key")?);
        Ok(())
    }

    /// What no file may ever contain.
    fn never_stored(&self) -> Vec<Trace> {
        let each = self.keys.iter().flat_map(|Key { id, text }| {
            let hash = ids::hash(text).0;
            [
                Trace::new(format!("the text of {id}"), text.as_str()),
                Trace::new(format!("the hash of {id} in hex"), hex(&hash)),
                Trace::new(format!("the hash of {id} in upper-case hex"), hex(&hash).to_uppercase()),
                Trace::new(format!("the hash of {id} in base64"), base64(&hash)),
                Trace::new(
                    format!("the hash of {id} in base64 for URLs"),
                    base64(&hash).replace('+', "-").replace('/', "_"),
                ),
            ]
        });
        each.collect()
    }

    /// What the log contains until it is purged.
    fn hashes(&self) -> Vec<Trace> {
        let hash = |key: &Key| Trace::new(format!("the hash of {}", key.id), ids::hash(&key.text).0);
        self.keys.iter().map(hash).collect()
    }

    /// What the records contain while the holder has this name.
    fn stored(&self, name: String) -> Vec<Trace> {
        let shown = self.prefix().len() + "_1234".len();
        let starts =
            self.keys.iter().map(|key| Trace::new(format!("the start of {}", key.id), &key.text[..shown]));
        let own = [
            ("the name", name),
            ("the email address", self.email()),
            ("the external id", self.external_id()),
            ("the permission", self.permission()),
            ("the prefix", self.prefix()),
        ];
        let own = own.map(|(what, text)| Trace::new(format!("{what} of holder {}", self.number), text));
        starts.chain(own).collect()
    }

    fn ids(&self) -> Vec<Trace> {
        self.keys.iter().map(|key| Trace::new(format!("the id {}", key.id), key.id.as_str())).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Encodes without padding, so that the result is found inside longer texts too.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| -> String {
        let bits =
            three.iter().enumerate().fold(0, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        (0..=three.len()).map(|digit| char::from(DIGITS[(bits >> (18 - 6 * digit)) as usize % 64])).collect()
    };
    bytes.chunks(3).map(group).collect()
}

/// Reads all files below `place` into `files`.
fn read_all(place: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) -> Result<()> {
    for entry in fs::read_dir(place).with_context(|| format!("reading {}", place.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            read_all(&path, files)?;
        }
        // Skips sockets.
        if !path.is_file() {
            continue;
        }
        match fs::read(&path) {
            Ok(bytes) => files.push((path, bytes)),
            // A database can remove its own files at any time.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }
    Ok(())
}

/// All files of a store and of the daemons that use it.
struct Files(Vec<(PathBuf, Vec<u8>)>);

impl Files {
    fn below(places: &[PathBuf]) -> Result<Self> {
        let mut files = Vec::new();
        places.iter().try_for_each(|place| read_all(place, &mut files))?;
        Ok(Self(files))
    }

    /// Returns the paths of the files that contain `trace`.
    fn holding(&self, trace: &Trace) -> Vec<&Path> {
        let holds = |bytes: &[u8]| memmem::find(bytes, &trace.bytes).is_some();
        self.0.iter().filter(|(_, bytes)| holds(bytes)).map(|(path, _)| path.as_path()).collect()
    }

    fn assert_hold(&self, traces: impl IntoIterator<Item = Trace>) {
        for trace in traces {
            assert!(!self.holding(&trace).is_empty(), "{} can't be found", trace.what);
        }
    }

    fn assert_hold_none(&self, traces: impl IntoIterator<Item = Trace>) {
        let found = |trace: Trace| match &*self.holding(&trace) {
            [] => None,
            places => Some(format!("{} is in {places:?}", trace.what)),
        };
        assert_eq!(traces.into_iter().filter_map(found).collect::<Vec<_>>(), Vec::<String>::new());
    }
}

/// Deletes `key` permanently, and waits until every region has confirmed it.
fn erase(world: &World, key: &Key) -> Result<()> {
    let body = json!({ "keyId": key.id, "permanent": true });
    let answer =
        world.topology.call_with(world.publisher(), "keys.deleteKey", &body, &[("Prefer", "wait=30")])?;
    ensure!(answer.status == 200, "{} was answered {}: {}", key.id, answer.status, answer.text);
    let receipt = &answer.body["meta"]["propagation"];
    ensure!(
        receipt["final"] == Value::Bool(true) && receipt["state"] == "confirmed",
        "{} isn't confirmed: {receipt}",
        key.id
    );
    Ok(())
}

/// Returns the traces of all holders.
fn all<'h>(
    holders: &'h [Holder],
    traces: impl Fn(&'h Holder) -> Vec<Trace> + 'h,
) -> impl Iterator<Item = Trace> {
    holders.iter().flat_map(traces)
}

/// Creates, uses, changes, rerolls and erases keys. After each step it searches all files below `places`, once `settle`
/// has made the store write and clean up its files. While the keys exist, everything that may be stored is found. After
/// the erasure only the hashes are left, in the log. After the purge only the ids are left.
pub(crate) fn leave_only_ids(
    world: &mut World,
    settle: impl Fn(&World) -> Result<()>,
    places: &[PathBuf],
) -> Result<()> {
    let files = |world: &World| {
        settle(world)?;
        Files::below(places)
    };
    let neighbour = Holder::create(world, 9)?;
    let mut holders = (0..3).map(|number| Holder::create(world, number)).collect::<Result<Vec<_>>>()?;
    let keys = |holders: &[Holder]| holders.iter().flat_map(|holder| holder.keys.clone()).collect::<Vec<_>>();
    world.cache_everywhere(&keys(&holders).iter().chain(&neighbour.keys).collect::<Vec<_>>())?;
    let created = files(world)?;
    created.assert_hold(all(&holders, |holder| holder.stored(holder.old_name())));

    holders.iter_mut().try_for_each(|holder| holder.change(world))?;
    let doomed = keys(&holders);
    let replacements = doomed.iter().skip(1).step_by(2).collect::<Vec<_>>();
    world.cache_everywhere(&replacements)?;
    let changed = files(world)?;
    changed.assert_hold(all(&holders, |holder| holder.stored(holder.name())));
    changed.assert_hold(all(&holders, Holder::hashes).chain(all(&holders, Holder::ids)));
    changed.assert_hold_none(all(&holders, Holder::never_stored));

    doomed.iter().try_for_each(|key| erase(world, key))?;
    world.assert_gone(&doomed.iter().collect::<Vec<_>>())?;
    let everything_but_hashes = || {
        all(&holders, |holder| holder.stored(holder.old_name()))
            .chain(all(&holders, |holder| holder.stored(holder.name())))
            .chain(all(&holders, Holder::never_stored))
    };
    let erased = files(world)?;
    // A reconnecting agent needs the hashes to evict the keys.
    erased.assert_hold(all(&holders, Holder::hashes));
    erased.assert_hold_none(everything_but_hashes());

    purge_log(world)?;
    let purged = files(world)?;
    purged.assert_hold_none(everything_but_hashes().chain(all(&holders, Holder::hashes)));
    // Shows that the search finds what must be there.
    purged.assert_hold(all(&holders, Holder::ids));
    purged.assert_hold(neighbour.stored(neighbour.old_name()).into_iter().chain(neighbour.hashes()));
    world.assert_gone(&doomed.iter().collect::<Vec<_>>())?;
    world.wait_for_codes(&neighbour.keys.iter().collect::<Vec<_>>(), "VALID")?;
    world.assert_works()
}

/// Failure: erased data can be read from a page, an index, a write-ahead log or a daemon's log.
#[test]
fn only_the_id_of_an_erased_key_is_left_after_a_purge() -> Result<()> {
    let mut world = World::start(&with_short_log(plan(&["eu", "us"])))?;
    // The store's files, and all other files of the deployment.
    let places = [world.dir().to_path_buf()];
    // A checkpoint empties the write-ahead log. No VACUUM is needed: SQLite overwrites what it deletes.
    let settle = |world: &World| {
        try_eventually("a complete checkpoint", SOON, || {
            Ok((world.sql("PRAGMA wal_checkpoint(TRUNCATE)")? == "0").then_some(()))
        })
    };
    leave_only_ids(&mut world, settle, &places)
}

/// Failure: an agent that missed purged rows keeps its entries, flushes repeatedly, or never becomes live again.
#[test]
fn agent_cut_off_across_a_purge_flushes_once() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(2);
    let mut world = World::start(&with_short_log(with_bound(BOUND, breakable(&["cut", "near"]))))?;
    let keys = world.create_keys(6)?;
    let (doomed, good) = (&keys[..3], &keys[3..]);
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    world.topology.regions[0].set_wires(WireMode::Cut)?;
    world.delete_all(doomed)?;
    let deleted_at = Instant::now();
    let watch = |world: &World| {
        for key in doomed {
            let asked_at = Instant::now();
            assert_bounded(asked_at, deleted_at, BOUND, &world.code(world.agent(0), key)?)?;
        }
        Ok(())
    };
    throughout(BOUND * 2, || watch(&world))?;
    purge_log(&mut world)?;
    wait_for_mode(world.agent(0), "expired")?;
    for key in &keys {
        assert_eq!(world.code(world.agent(0), key)?, UNAVAILABLE);
    }

    world.topology.regions[0].set_wires(WireMode::Pass)?;
    try_eventually("the agent to be live again", SOON, || {
        watch(&world)?;
        Ok((world.agent(0).status()?["mode"] == "live").then_some(()))
    })?;
    world.assert_gone(&doomed.iter().collect::<Vec<_>>())?;
    world.wait_for_codes(&good.iter().collect::<Vec<_>>(), "VALID")?;
    world.assert_works()?;
    let refused =
        |region: usize| count(world.agent(region), "evictd_agent_flushes_total", &[("reason", "refused")]);
    // One flush, for that reason. The other agent missed nothing.
    assert_eq!((flushes(world.agent(0))?, refused(0)?), (1, 1), "{}", world.agent(0).daemon.log_tail());
    assert_eq!(flushes(world.agent(1))?, 0, "{}", world.agent(1).daemon.log_tail());
    for agent in world.topology.agents() {
        assert_eq!(count(agent, "evictd_agent_bound_breaches_total", &[])?, 0);
    }
    Ok(())
}
