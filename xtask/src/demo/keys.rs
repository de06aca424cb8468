//! Many keys, created, cached and checked by a few threads, as by a gateway.

use anyhow::{Context, bail, ensure};
use evictd_tests::http::{Client, Response};
use evictd_tests::topology::{Node, Topology};
use serde_json::json;

/// Concurrent threads.
const CALLERS: usize = 8;

/// A key with its text, which only the answer to its creation contains.
pub(crate) struct DemoKey {
    pub(crate) id: String,
    pub(crate) text: String,
}

/// An API with its keys.
pub(crate) struct Keys {
    pub(crate) api: String,
    pub(crate) keys: Vec<DemoKey>,
}

/// Creates an API with `count` keys.
pub(crate) fn create(deployment: &Topology, name: &str, count: usize) -> anyhow::Result<Keys> {
    let publisher = &deployment.publisher;
    let created = deployment.call(publisher, "apis.createApi", &json!({ "name": name }))?;
    let api = text(&created, "apiId")?;
    let body = json!({ "apiId": api }).to_string();
    let keys = in_parallel(count, |client, _| {
        let created = call(client, deployment, publisher, "keys.createKey", &body)?;
        Ok(DemoKey { id: text(&created, "keyId")?, text: text(&created, "key")? })
    })?;
    Ok(Keys { api, keys })
}

/// Verifies each key twice: the second answers must all come from the cache.
pub(crate) fn cache(deployment: &Topology, agent: &Node, keys: &[DemoKey]) -> anyhow::Result<()> {
    for round in ["loading", "hitting"] {
        let misses =
            || anyhow::Ok(agent.metrics()?.value("evictd_agent_cache_misses_total", &[]).unwrap_or(0.0));
        let before = misses()?;
        in_parallel(keys.len(), |client, index| {
            let code = verify(client, deployment, agent, &keys[index])?;
            ensure!(code == "VALID", "{} is {code} before anything was deleted", keys[index].id);
            Ok(())
        })?;
        let missed = misses()? - before;
        ensure!(
            round == "loading" || missed == 0.0,
            "{missed} verifications weren't answered from the cache"
        );
    }
    Ok(())
}

/// Verifies that no key is accepted.
pub(crate) fn all_gone(deployment: &Topology, agent: &Node, keys: &[DemoKey]) -> anyhow::Result<()> {
    in_parallel(keys.len(), |client, index| {
        let code = verify(client, deployment, agent, &keys[index])?;
        ensure!(code == "NOT_FOUND", "{} is {code} although its API is deleted", keys[index].id);
        Ok(())
    })?;
    Ok(())
}

/// Returns an agent's verdict on a key.
pub(crate) fn verify(
    client: &Client,
    deployment: &Topology,
    agent: &Node,
    key: &DemoKey,
) -> anyhow::Result<String> {
    let body = json!({ "key": key.text }).to_string();
    text(&call(client, deployment, agent, "keys.verifyKey", &body)?, "code")
}

fn call(
    client: &Client,
    deployment: &Topology,
    node: &Node,
    operation: &str,
    body: &str,
) -> anyhow::Result<Response> {
    let url = format!("http://{}/v2/{operation}", node.http);
    let answer = client.post_json(&url, Some(deployment.root_key()), body, &[])?;
    if answer.status != 200 {
        bail!("{url} answered {}: {}", answer.status, answer.text);
    }
    Ok(answer)
}

fn text(answer: &Response, field: &str) -> anyhow::Result<String> {
    let value = answer.body["data"][field].as_str();
    Ok(value.with_context(|| format!("no {field} in {}", answer.text))?.to_owned())
}

/// Calls `work` for 0..count, and returns the results, in any order.
fn in_parallel<T: Send>(
    count: usize,
    work: impl Fn(&Client, usize) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let caller = |first: usize| {
        let client = Client::new();
        (first..count).step_by(CALLERS).map(|index| work(&client, index)).collect::<anyhow::Result<Vec<T>>>()
    };
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|first| scope.spawn(move || caller(first))).collect();
        let mut done = Vec::with_capacity(count);
        for caller in callers {
            done.extend(caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))??);
        }
        Ok(done)
    })
}
