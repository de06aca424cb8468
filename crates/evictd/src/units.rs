//! The tests of the systemd units in `deploy/systemd`: what they must have besides a valid form.

use std::time::Duration;

use evictd_ops::shutdown::ShutdownConfig;

use crate::config_args::ConfigArgs;

/// The daemon of a unit, with the longest time that its end takes after the lame-duck time.
struct ShippedUnit {
    name: &'static str,
    text: &'static str,
    shutdown: ShutdownConfig,
    stop_limit: Duration,
}

fn units() -> [ShippedUnit; 2] {
    [
        ShippedUnit {
            name: "publisher",
            text: include_str!("../../../deploy/systemd/evictd-publisher.service"),
            shutdown: ConfigArgs::default().publisher().unwrap().config.shutdown,
            stop_limit: evictd_publisher::STOP_LIMIT,
        },
        ShippedUnit {
            name: "agent",
            text: include_str!("../../../deploy/systemd/evictd-agent.service"),
            shutdown: ConfigArgs::default().agent().unwrap().config.shutdown,
            stop_limit: evictd_agent::STOP_LIMIT,
        },
    ]
}

impl ShippedUnit {
    /// Returns the values of a key in a section.
    fn values(&self, section: &str, key: &str) -> Vec<&'static str> {
        let mut current = "";
        let mut values = Vec::new();
        for line in self.text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            match (line.strip_prefix('[').and_then(|line| line.strip_suffix(']')), line.split_once('=')) {
                (Some(section), _) => current = section,
                (None, Some((found, value))) if current == section && found == key => values.push(value),
                (None, Some(_)) => {}
                (None, None) => panic!("{}: not a line of a unit: {line}", self.name),
            }
        }
        values
    }

    /// Returns the only value of a key in `[Service]`.
    fn service(&self, key: &str) -> &'static str {
        let values = self.values("Service", key);
        assert_eq!(values.len(), 1, "{}: {key}", self.name);
        values[0]
    }
}

fn seconds(value: &str) -> Duration {
    Duration::from_secs(value.strip_suffix('s').unwrap_or(value).parse().unwrap())
}

/// Failure: a publisher that is started before its database is up is given up after five attempts.
#[test]
fn systemd_never_gives_a_unit_up() {
    for unit in units() {
        assert_eq!(unit.values("Unit", "StartLimitIntervalSec"), ["0"], "{}", unit.name);
        assert_eq!(unit.service("Restart"), "always");
        assert!(seconds(unit.service("RestartSec")) >= Duration::from_secs(1));
    }
}

#[test]
fn systemd_kills_only_after_the_whole_shutdown() {
    for unit in units() {
        let limit = seconds(unit.service("TimeoutStopSec"));
        let delay = Duration::from(unit.shutdown.delay);
        assert!(!delay.is_zero(), "{}: gateways get no time to leave", unit.name);
        let needed = delay + unit.stop_limit;
        assert!(needed < limit, "{}: {needed:?} against {limit:?}", unit.name);
        // As deploy/*.toml and docs/keep-alive.md promise.
        assert!(unit.stop_limit <= Duration::from_secs(15), "{}: {:?}", unit.name, unit.stop_limit);
    }
}

/// Failure: the unit's dynamic user can't read root's secret files, or the documented path of a secret doesn't exist.
#[test]
fn units_get_their_secrets_as_credentials() {
    for unit in units() {
        assert_eq!(unit.service("DynamicUser"), "yes");
        let (id, source) = unit.service("LoadCredential").split_once(':').unwrap();
        assert_eq!(source, format!("/etc/evictd/{}-secrets", unit.name));
        let named = format!("\"/run/credentials/evictd-{}.service/{id}_nats-password\"", unit.name);
        assert!(unit.text.contains(&named), "{named}");
        // Missing is no error.
        assert_eq!(unit.service("EnvironmentFile"), format!("-/etc/evictd/{}.env", unit.name));
    }
}
