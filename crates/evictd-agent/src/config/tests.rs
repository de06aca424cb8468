//! What the configuration accepts.

use evictd_ops::config::{ConfigError, Layers};

use super::*;

fn load(settings: &[(&str, &str)]) -> Result<AgentConfig, ConfigError> {
    let layers = Layers::new(DEFAULTS);
    let layers = settings.iter().fold(layers, |layers, (key, value)| layers.set(key, value));
    layers.load().map(|loaded| loaded.config)
}

/// The keys that the problems name, in their order.
fn problems(settings: &[(&str, &str)]) -> Vec<String> {
    let problems = load(settings).unwrap_err().problems;
    problems.iter().map(|problem| problem.split(": ").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn the_documented_defaults_are_usable() {
    let config = load(&[]).unwrap();
    assert_eq!(config.bound().bound(), Duration::from_secs(30));
    assert_eq!(config.requester().region.as_str(), "local");
    assert!(config.is_region_default());
    assert_eq!(config.follower().bound, config.bound());
}

#[test]
fn all_problems_are_reported_together() {
    let found = problems(&[
        ("region", "eu.central"),
        ("agent", "*"),
        ("lease.margin", "1s"),
        ("lease.probe_interval", "1ms"),
        ("lease.request_timeout", "0s"),
        ("loads.timeout", "9ms"),
        ("cache.not_found_ttl", "31s"),
        ("loads.concurrent_max", "0"),
    ]);
    let expected = [
        "region",
        "agent",
        "lease.margin",
        "lease.probe_interval",
        "lease.request_timeout",
        "loads.timeout",
        "cache.not_found_ttl",
        "loads.concurrent_max",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_name_must_be_one_token_of_a_subject() {
    let longest = "x".repeat(64);
    assert!(load(&[("region", &longest), ("agent", "A-1_b")]).is_ok());
    for name in ["a b", "a.b", ">", "é", &"x".repeat(65)] {
        assert_eq!(problems(&[("region", name), ("agent", name)]), ["region", "agent"], "{name}");
    }
    assert_eq!(problems(&[("region", "")]), ["region"]);
}

/// Failure: agents whose names weren't configured share one, and receipts wait for one of them in the other's name.
#[test]
fn host_name_is_the_agents_name_by_default() {
    let own = load(&[]).unwrap().requester().agent.to_string();
    assert_eq!(own, subject_token(&host_name()));
    for (host, token) in [
        ("evictd-agent-7c9f4d-x2x9b", "evictd-agent-7c9f4d-x2x9b"),
        ("ip-10-0-0-7.eu-central-1.compute.internal", "ip-10-0-0-7-eu-central-1-compute-internal"),
        ("(none)", "-none-"),
        (&"x".repeat(65), &"x".repeat(64)),
    ] {
        assert_eq!(subject_token(host), token);
        check_name(token).unwrap();
    }
    let named = load(&[("region", "eu"), ("agent", "a1")]).unwrap();
    assert_eq!(named.requester().to_string(), "eu/a1");
    assert!(!named.is_region_default());
}

#[test]
fn the_margin_is_a_tenth_to_a_half_of_the_bound() {
    for margin in ["3s", "15s"] {
        assert!(load(&[("lease.margin", margin)]).is_ok(), "{margin}");
    }
    for margin in ["0s", "2999ms", "15001ms", "40s"] {
        assert_eq!(problems(&[("lease.margin", margin)]), ["lease.margin"], "{margin}");
    }
}

#[test]
fn a_lease_can_be_renewed_twice_before_it_ends() {
    assert!(load(&[("lease.probe_interval", "13500ms")]).is_ok());
    assert_eq!(problems(&[("lease.probe_interval", "13501ms")]), ["lease.probe_interval"]);
}

#[test]
fn excessive_durations_are_rejected_without_overflow() {
    let longest = "5000000000h";
    for key in ["lease.bound", "lease.margin", "lease.probe_interval"] {
        assert!(!problems(&[(key, longest)]).is_empty(), "{key}");
    }
}

#[test]
fn policies_are_named_for_the_agent_and_for_single_apis() {
    let config = load(&[("partition.policy", "serve_stale"), ("partition.apis.api_1", "deny")]).unwrap();
    assert_eq!(config.partition.policy, PolicyName::ServeStale);
    assert_eq!(config.partition.apis["api_1"], PolicyName::Deny);
    let found = load(&[("partition.policy", "allow"), ("partition.apis.api_1", "")]).unwrap_err().problems;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|problem| problem.contains("`deny` or `serve_stale`")), "{found:?}");
}

#[test]
fn the_clock_device_is_optional() {
    assert_eq!(load(&[]).unwrap().vm_clock(), Some(Path::new(evictd_ops::vm_clock::DEVICE)));
    assert_eq!(load(&[("lease.vm_clock", "")]).unwrap().vm_clock(), None);
}
