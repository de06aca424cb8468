//! Where a daemon listens: the keys named `listen`, each the address of a listener of the same process.

use std::net::{IpAddr, SocketAddr};

use toml::{Table, Value};

use super::reference::join;

/// What such a key takes.
pub(super) const FORM: &str =
    "an IP address and a port, as in 127.0.0.1:7070 (names of hosts aren't looked up)";

/// What the standard library says of anything else.
pub(super) const NO_ADDRESS: &str = "invalid socket address syntax";

/// Two listeners at one address: only the first would start.
pub(super) fn check(effective: &Table, problems: &mut Vec<String>) {
    let mut listeners = Vec::new();
    find("", effective, &mut listeners);
    for (at, (key, address)) in listeners.iter().enumerate() {
        for (other, taken) in &listeners[..at] {
            if excludes(*address, *taken) {
                problems.push(format!(
                    "{other}: `{taken}` leaves no room for {key}, `{address}`; each listener needs a port of its own"
                ));
            }
        }
    }
}

/// What isn't an address is reported where it is read.
fn find(path: &str, table: &Table, listeners: &mut Vec<(String, SocketAddr)>) {
    for (name, value) in table {
        let key = join(path, name);
        match value {
            Value::Table(section) => find(&key, section, listeners),
            Value::String(text) if name == "listen" => {
                listeners.extend(text.parse().ok().map(|address| (key, address)));
            }
            _ => {}
        }
    }
}

/// Port 0 is any free one, each time another.
fn excludes(one: SocketAddr, other: SocketAddr) -> bool {
    let (here, there) = (one.ip(), other.ip());
    one.port() == other.port()
        && one.port() != 0
        && (here == there || covers(here, there) || covers(there, here))
}

/// Whether whoever listens at `all` listens at `one`, too. The one for IPv6 takes IPv4 as well.
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
    fn two_listeners_at_one_address_are_refused_by_their_keys() {
        for (http, admin) in [
            ("127.0.0.1:7070", "127.0.0.1:7070"),
            ("0.0.0.0:7070", "127.0.0.1:7070"),
            ("127.0.0.1:7070", "[::]:7070"),
            ("[::1]:7070", "[::]:7070"),
        ] {
            let told = problems(http, admin);
            assert_eq!(told.len(), 1, "{http} {admin}");
            for part in ["http.listen", "admin.listen", http, admin] {
                assert!(told[0].contains(part), "{told:?}");
            }
        }
    }

    #[test]
    fn listeners_that_leave_each_other_room_are_fine() {
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
    fn the_standard_librarys_words_are_known() {
        assert_eq!("localhost:7070".parse::<SocketAddr>().unwrap_err().to_string(), NO_ADDRESS);
    }
}
