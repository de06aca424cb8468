//! What the configuration accepts.

use evictd_ops::config::{ConfigError, Layers};

use super::*;

fn load(settings: &[(&str, &str)]) -> Result<PublisherConfig, ConfigError> {
    let layers = Layers::new(DEFAULTS);
    let layers = settings.iter().fold(layers, |layers, (key, value)| layers.set(key, value));
    layers.load().map(|loaded| loaded.config)
}

#[test]
fn the_documented_defaults_are_usable() {
    let config = load(&[]).unwrap();
    assert_eq!(Duration::from(config.receipts.bound), Duration::from_secs(30));
}

#[test]
fn all_problems_are_reported_together() {
    let keys = [
        "sequencer.poll_interval",
        "sequencer.tick_interval",
        "sequencer.expiry_interval",
        "authority.round_spacing",
        "authority.round_patience",
        "receipts.bound",
    ];
    let limits = ["authority.probes_waiting_max", "authority.lookups_max", "authority.replays_max"];
    let settings: Vec<_> =
        keys.map(|key| (key, "0s")).into_iter().chain(limits.map(|key| (key, "0"))).collect();
    let problems = load(&settings).unwrap_err().problems;
    let named: Vec<_> = problems.iter().filter_map(|problem| problem.split(": ").next()).collect();
    assert_eq!(named, [&keys[..], &limits[..]].concat());
}
