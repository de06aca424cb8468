//! `cargo xtask demo`: a deletion, measured in three regions.
//!
//! Every part is real: a NATS server per region, as a leaf node of home's, with the permissions of `deploy/nats`; one
//! publisher process; one agent process per region. The HTTP APIs and the metrics give every number that is shown.

mod deletion;
mod keys;

use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};
use evictd_tests::nats_server;
use evictd_tests::topology::{Node, Plan, Topology, Where};
use serde_json::{Value, json};

use crate::demo::deletion::RegionTimes;
use crate::steps;

/// The demo's regions.
pub(crate) const REGIONS: [&str; 3] = ["us-east-1", "eu-central-1", "ap-south-1"];

/// The guarantee that the demo measures against.
const BOUND: Duration = Duration::from_secs(30);

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Keys of the API that is deleted.
    #[arg(long, default_value_t = 10_000)]
    keys: usize,
    /// Leave everything running at the end, on the documented ports, and print what to try.
    #[arg(long)]
    keep: bool,
    /// `json`: print one object with the numbers at the end, and nothing else to standard output.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: DemoFormat,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DemoFormat {
    Text,
    Json,
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let say = Say { quiet: args.output == DemoFormat::Json };
    let server = nats_server::find_or_install()?;
    say.line(&format!("nats-server: {}", server.display()));
    say.line("building evictd ...");
    steps::build_evictd()?;

    let dir = tempfile::Builder::new().prefix("evictd-demo-").tempdir()?;
    let listen = if args.keep { Where::DocumentedPorts } else { Where::FreePorts };
    let plan = Plan { bound: BOUND, listen, ..Plan::new(&REGIONS) };
    say.line(&format!(
        "starting {} NATS servers, a publisher and {} agents ...",
        REGIONS.len() + 1,
        REGIONS.len()
    ));
    let deployment = Topology::start(dir.path(), &plan)?;

    say.line(&format!("creating an API with one key, and one with {} keys ...", args.keys));
    let single = keys::create(&deployment, "single", 1)?;
    let many = keys::create(&deployment, "many", args.keys)?;
    say.line("verifying every key in every region, until all are answered from cache ...");
    for agent in deployment.agents() {
        keys::cache(&deployment, agent, &single.keys)?;
        keys::cache(&deployment, agent, &many.keys)?;
    }

    let key = &single.keys[0];
    say.line(&format!("\ndeleting one key, {} ...", key.id));
    let one = deletion::watch(&deployment, "keys.deleteKey", ("keyId", &key.id), key)?;
    say.timelines(&one);
    say.line(&format!("\ndeleting the API {} with {} cached keys ...", many.api, args.keys));
    let all = deletion::watch(&deployment, "apis.deleteApi", ("apiId", &many.api), &many.keys[0])?;
    say.timelines(&all);
    say.line("verifying each of its keys once more, in every region ...");
    for agent in deployment.agents() {
        keys::all_gone(&deployment, agent, &many.keys)?;
    }
    say.line(&format!("none of {} is accepted anywhere", args.keys));

    say.line("\nthe agents' own metrics:");
    for line in lag_lines(&deployment)? {
        say.line(&line);
    }
    if say.quiet {
        println!("{}", json!({ "key": figures(&one), "api": figures(&all), "keys": args.keys }));
    }
    for seen in one.iter().chain(&all) {
        ensure!(seen.not_found_after <= BOUND, "{} took longer than the bound", seen.region);
    }
    let slowest = one.iter().chain(&all).map(|seen| seen.not_found_after).max().unwrap_or_default();
    say.line(&format!("\nthe slowest region took {} of the {} s bound", share(slowest), BOUND.as_secs()));
    if args.keep { keep(&deployment, dir.path(), &say) } else { Ok(()) }
}

/// Prints progress: to standard error if standard output is for a script.
struct Say {
    quiet: bool,
}

impl Say {
    fn line(&self, line: &str) {
        if self.quiet {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }

    fn timelines(&self, seen: &[RegionTimes]) {
        self.line(&format!("  the API answered after {}", millis(seen[0].answered_after)));
        self.line("  region           evicted after   first NOT_FOUND   share of the bound");
        for seen in seen {
            self.line(&format!(
                "  {:<16} {:>10}   {:>14}   {:>10}  {}",
                seen.region,
                millis(seen.evicted_after),
                millis(seen.not_found_after),
                share(seen.not_found_after),
                bar(seen.not_found_after),
            ));
        }
    }
}

/// Twenty characters for the bound. A deletion that takes milliseconds fills the first.
fn bar(duration: Duration) -> String {
    let filled = (duration.as_secs_f64() / BOUND.as_secs_f64() * 20.0).ceil() as usize;
    let filled = filled.clamp(1, 20);
    format!("[{}{}]", "#".repeat(filled), ".".repeat(20 - filled))
}

fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

fn share(duration: Duration) -> String {
    format!("{:.3} %", duration.as_secs_f64() / BOUND.as_secs_f64() * 100.0)
}

fn figures(seen: &[RegionTimes]) -> Value {
    let rows = seen.iter().map(|seen| {
        json!({
            "region": seen.region,
            "answeredMs": seen.answered_after.as_secs_f64() * 1000.0,
            "evictedMs": seen.evicted_after.as_secs_f64() * 1000.0,
            "notFoundMs": seen.not_found_after.as_secs_f64() * 1000.0,
        })
    });
    rows.collect()
}

fn lag_lines(deployment: &Topology) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for (site, agent) in deployment.regions.iter().zip(deployment.agents()) {
        let scrape = agent.metrics()?;
        for scope in ["key", "api"] {
            let name = "evictd_agent_propagation_lag_seconds";
            let Some(lag) = scrape.histogram(name, &[("scope", scope)]) else { continue };
            let quantile =
                |q| lag.quantile(q).map_or_else(|| "-".to_owned(), |s| millis(Duration::from_secs_f64(s)));
            lines.push(format!(
                "  {:<14} {name}{{scope=\"{scope}\"}}: {} of {} within 30 s, p50 {}, p99 {}",
                site.name,
                lag.at_most(30.0).unwrap_or_default(),
                lag.count,
                quantile(0.5),
                quantile(0.99),
            ));
        }
        let value = |name| scrape.value(name, &[]).unwrap_or_default();
        lines.push(format!(
            "  {:<14} applied {} of {}, {} hits, {} misses, lease for {:.1} s more",
            site.name,
            value("evictd_agent_applied_position"),
            value("evictd_agent_head_position"),
            value("evictd_agent_cache_hits_total"),
            value("evictd_agent_cache_misses_total"),
            value("evictd_agent_lease_remaining_seconds"),
        ));
    }
    Ok(lines)
}

/// Waits for Ctrl-C, which ends this process and every process that it started.
fn keep(deployment: &Topology, dir: &Path, say: &Say) -> anyhow::Result<()> {
    let key = keys::create(deployment, "yours", 1)?.keys.remove(0);
    let evictd = evictd_tests::process::evictd_binary()?;
    let url = |node: &Node| format!("http://{}", node.http);
    let verify: Vec<String> = deployment.agents().map(url).collect();
    say.line(&format!(
        "\nAll processes keep running; their files are in {dir}. Try, in another terminal:\n\n\
         export PATH={bin}:$PATH\n\
         export EVICTD_ROOT_KEY={root} EVICTD_API_URL={publisher}\n\
         evictd api keys verify-key --key={text} --api-url={first}\n\
         evictd api keys delete-key --key-id={id}\n\
         evictd api keys verify-key --key={text} --api-url={last}\n\
         curl -s {admin}/status\n\
         curl -s {admin}/metrics | grep -E 'lag|lease|mode'\n\
         prometheus --config.file={prometheus} --storage.tsdb.path=/tmp/evictd-tsdb\n\n\
         Break something: `kill -STOP {pid}` freezes the publisher; the agents serve for at most {rest} s, the\n\
         bound less the margin, and then deny.\n\
         Ctrl-C ends all of them.",
        dir = dir.display(),
        bin = evictd.parent().unwrap_or(&evictd).display(),
        root = deployment.root_key(),
        publisher = url(&deployment.publisher),
        text = key.text,
        id = key.id,
        first = verify[0],
        last = verify[verify.len() - 1],
        admin = format_args!("http://{}", deployment.agents().next().map_or(deployment.publisher.admin, |a| a.admin)),
        prometheus = steps::root().join("deploy/prometheus/prometheus.yml").display(),
        pid = deployment.publisher.daemon.pid(),
        // The demo's agents have the default margin, a tenth of the bound.
        rest = (BOUND * 9 / 10).as_secs(),
    ));
    loop {
        std::thread::park();
    }
}
