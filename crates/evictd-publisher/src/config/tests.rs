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

fn named(settings: &[(&str, &str)]) -> Vec<String> {
    let problems = load(settings).unwrap_err().problems;
    problems.iter().map(|problem| problem.split(": ").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn the_log_is_kept_well_beyond_the_longest_bound() {
    for (bound, log) in [("30s", "1h"), ("6m", "1h"), ("30m", "5h")] {
        assert!(load(&[("receipts.bound", bound), ("retention.log", log)]).is_ok(), "{bound} {log}");
    }
    for (bound, log) in [("30s", "59m"), ("30s", "0s"), ("30m", "4h")] {
        assert_eq!(named(&[("receipts.bound", bound), ("retention.log", log)]), ["retention.log"]);
    }
}

#[test]
fn receipts_and_audit_records_are_kept_as_long_as_the_log() {
    let settings = [("retention.log", "2h"), ("retention.receipts", "1h"), ("retention.audit", "1h")];
    assert_eq!(named(&settings), ["retention.receipts", "retention.audit"]);
    let settings = settings.map(|(key, _)| (key, "2h"));
    assert_eq!(load(&settings).unwrap().retention.audit, Keep::For(Duration::from_hours(2).into()));
    assert_eq!(load(&[]).unwrap().retention.audit, Keep::Forever);
}

#[test]
fn a_limit_is_a_number_or_unlimited() {
    let config = load(&[
        ("rate_limit.requests_per_minute", "600"),
        ("rate_limit.workspaces.ws_1", "unlimited"),
        ("rate_limit.workspaces.ws_2", "0"),
    ]);
    let RateLimitConfig { requests_per_minute, workspaces } = config.unwrap().rate_limit;
    assert_eq!(requests_per_minute, RequestLimit::PerMinute(600));
    assert_eq!(workspaces["ws_1"], RequestLimit::Unlimited);
    assert_eq!(workspaces["ws_2"], RequestLimit::PerMinute(0));
    assert_eq!(load(&[]).unwrap().rate_limit.requests_per_minute, RequestLimit::Unlimited);
    for wrong in ["", "-1", "off", "1/s", "4294967296"] {
        let problems = load(&[("rate_limit.workspaces.ws_1", wrong)]).unwrap_err().problems;
        assert!(problems[0].contains("write a whole number of requests in a minute"), "{problems:?}");
    }
}

#[test]
fn a_region_is_named_once() {
    let problems = load(&[("receipts.regions", "eu,us,eu")]).unwrap_err().problems;
    assert_eq!(problems, ["receipts.regions: `eu` is listed more than once"]);
}

#[test]
fn a_printed_configuration_omits_the_stores_password() {
    let layers = Layers::new(DEFAULTS).set("store.url", "postgres://evictd:hunter2@db:5432/evictd");
    let loaded = layers.load::<PublisherConfig>().unwrap();
    let printed = evictd_ops::config::print_effective(&loaded.effective);
    assert!(printed.contains("postgres://evictd:[redacted]@db:5432/evictd"), "{printed}");
    assert!(!format!("{:?}", loaded.config).contains("hunter2"));
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
    assert_eq!(named(&settings), [&keys[..], &limits[..]].concat());
}

#[test]
fn trusted_proxies_are_networks_or_addresses() {
    let trusted =
        |list: &str| load(&[("audit.trusted_proxies", list)]).map(|config| config.audit.trusted_proxies);
    assert_eq!(trusted("").unwrap(), []);
    let networks = trusted("10.0.0.0/8, 192.0.2.1,2001:db8::/32").unwrap();
    let is_trusted =
        |address: &str| networks.iter().any(|network| network.contains(address.parse().unwrap()));
    for address in ["10.255.0.1", "192.0.2.1", "2001:db8::7"] {
        assert!(is_trusted(address), "{address}");
    }
    for address in ["11.0.0.1", "192.0.2.2", "2001:db9::7"] {
        assert!(!is_trusted(address), "{address}");
    }
    for wrong in ["10.0.0.0/33", "proxy.internal", "10.0.0", "10.0.0.0/8 192.0.2.1"] {
        let problems = trusted(wrong).unwrap_err().problems;
        assert!(problems[0].contains("isn't a network"), "{problems:?}");
    }
}
