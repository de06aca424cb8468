//! The keys named `listen`: each is the address of a listener of the same process.

use std::net::{IpAddr, SocketAddr};

use toml::{Table, Value};

use super::leaves;

/// The form of such a value.
pub(super) const FORM: &str =
    "an IP address and a port, as in 127.0.0.1:7070 (names of hosts aren't looked up)";

/// The standard library's error for anything else.
pub(super) const NO_ADDRESS: &str = "invalid socket address syntax";

/// Reports listeners that share an address, of which only the first would start.
pub(super) fn check(effective: &Table, problems: &mut Vec<String>) {
    // A value that isn't an address is reported where it is parsed.
    let address = |value: &Value| value.as_str()?.parse::<SocketAddr>().ok();
    let listeners: Vec<(String, SocketAddr)> = leaves(effective)
        .into_iter()
        .filter(|(key, _)| key == "listen" || key.ends_with(".listen"))
        .filter_map(|(key, value)| Some((key, address(value)?)))
        .collect();
    for (at, (key, address)) in listeners.iter().enumerate() {
        for (other, taken) in &listeners[..at] {
            if excludes(*address, *taken) {
                problems.push(format!(
                    "{other}: `{taken}` excludes {key}, `{address}`; each listener needs a port of its own"
                ));
            }
        }
    }
}

/// Port 0 is any free port, each time another one.
fn excludes(one: SocketAddr, other: SocketAddr) -> bool {
    let (here, there) = (one.ip(), other.ip());
    one.port() == other.port()
        && one.port() != 0
        && (here == there || covers(here, there) || covers(there, here))
}

/// Whether a listener at `all` also listens at `one`. One for all of IPv6 includes IPv4.
fn covers(all: IpAddr, one: IpAddr) -> bool {
    all.is_unspecified() && (all.is_ipv6() || one.is_ipv4())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(http: &str, admin: &str) -> Vec<String> {
        let effective = format!("[http]\nlisten = '{http}'\n[admin]\nlisten = '{admin}'\n").parse().unwrap();
        let mut problems = Vec::new();
        check(&effective, &mut problems);
        problems
    }

    #[test]
    fn two_listeners_at_one_address_are_refused() {
        for (http, admin) in [
            ("127.0.0.1:7070", "127.0.0.1:7070"),
            ("0.0.0.0:7070", "127.0.0.1:7070"),
            ("127.0.0.1:7070", "[::]:7070"),
            ("[::1]:7070", "[::]:7070"),
        ] {
            let problems = problems(http, admin);
            assert_eq!(problems.len(), 1, "{http} {admin}");
            for part in ["http.listen", "admin.listen", http, admin] {
                assert!(problems[0].contains(part), "{problems:?}");
            }
        }
    }

    #[test]
    fn listeners_at_different_addresses_are_accepted() {
        for (http, admin) in [
            ("127.0.0.1:7070", "127.0.0.1:7079"),
            ("127.0.0.1:7070", "127.0.0.2:7070"),
            ("0.0.0.0:7070", "[::1]:7070"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("nowhere", "nowhere"),
        ] {
            assert_eq!(problems(http, admin), Vec::<String>::new(), "{http} {admin}");
        }
    }

    #[test]
    fn error_of_the_standard_library_is_as_expected() {
        assert_eq!("localhost:7070".parse::<SocketAddr>().unwrap_err().to_string(), NO_ADDRESS);
    }
}
