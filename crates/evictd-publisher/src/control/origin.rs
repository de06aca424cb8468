//! Where a request comes from: the peer, and the client behind the proxies that are trusted.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hyper::header::HeaderMap;

use crate::config::TrustedNetwork;

pub(super) const FORWARDED_FOR: &str = "x-forwarded-for";

/// The proxies whose `X-Forwarded-For` counts.
#[derive(Clone, Debug)]
pub(crate) struct TrustedProxies(Arc<[TrustedNetwork]>);

impl TrustedProxies {
    pub(crate) fn new(networks: Vec<TrustedNetwork>) -> Self {
        Self(networks.into())
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }

    /// Returns the last hop that isn't a trusted proxy, as the trusted ones report it. Each proxy appends the address of
    /// its own peer, so what stands before the first hop that isn't trusted is only that hop's claim. If a hop can't be
    /// read, the one after it counts.
    pub(super) fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let lists = headers.get_all(FORWARDED_FOR).iter().rev();
        let lists: Vec<_> = lists.map(|list| String::from_utf8_lossy(list.as_bytes()).into_owned()).collect();
        let hops = lists.iter().flat_map(|list| list.rsplit(',')).map(str::trim);
        let mut client = peer;
        for hop in hops.filter(|hop| !hop.is_empty()) {
            if !self.contains(client) {
                break;
            }
            let Some(address) = address(hop) else { break };
            client = address;
        }
        client
    }
}

/// Parses an address with or without a port or brackets.
fn address(hop: &str) -> Option<IpAddr> {
    let in_brackets = || hop.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port = || hop.parse().ok().map(|address: SocketAddr| address.ip());
    let address = hop.parse().ok().or_else(with_port).or_else(in_brackets)?;
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn client(trusted: &[&str], peer: &str, lists: &[&str]) -> String {
        let networks = trusted.iter().map(|network| (*network).to_owned().try_into().unwrap()).collect();
        let mut headers = HeaderMap::new();
        for list in lists {
            headers.append(FORWARDED_FOR, HeaderValue::from_bytes(list.as_bytes()).unwrap());
        }
        TrustedProxies::new(networks).client(peer.parse().unwrap(), &headers).to_string()
    }

    const PROXIES: [&str; 3] = ["10.0.0.0/8", "192.0.2.1", "2001:db8:f::/48"];

    /// Failure: any client names any address, and the audit log blames another one.
    #[test]
    fn a_peer_that_isnt_trusted_is_the_client() {
        for lists in [&[][..], &["203.0.113.7"], &["203.0.113.7, 10.0.0.1"]] {
            assert_eq!(client(&[], "198.51.100.1", lists), "198.51.100.1");
            assert_eq!(client(&PROXIES, "198.51.100.1", lists), "198.51.100.1");
            assert_eq!(client(&PROXIES, "192.0.2.2", lists), "192.0.2.2");
        }
    }

    #[test]
    fn the_last_hop_that_isnt_trusted_is_the_client() {
        for (lists, expected) in [
            (&["203.0.113.7"][..], "203.0.113.7"),
            (&["1.1.1.1, 203.0.113.7"], "203.0.113.7"),
            (&["1.1.1.1, 203.0.113.7, 10.9.9.9 , 192.0.2.1"], "203.0.113.7"),
            (&["1.1.1.1", "203.0.113.7, 10.9.9.9"], "203.0.113.7"),
            (&["203.0.113.7", "10.9.9.9"], "203.0.113.7"),
            (&["1.1.1.1, 2001:db8::7, 2001:db8:f::1"], "2001:db8::7"),
            // All are trusted: the first of them.
            (&["10.2.0.1, 10.3.0.1"], "10.2.0.1"),
            (&[], "10.0.0.1"),
            (&[" , ,"], "10.0.0.1"),
        ] {
            assert_eq!(client(&PROXIES, "10.0.0.1", lists), expected, "{lists:?}");
        }
        assert_eq!(client(&["0.0.0.0/0"], "10.0.0.1", &["1.1.1.1, 203.0.113.7"]), "1.1.1.1");
    }

    #[test]
    fn a_hop_that_cant_be_read_ends_the_search() {
        for (lists, expected) in [
            (&["203.0.113.7, junk"][..], "10.0.0.1"),
            (&["203.0.113.7, unknown, 10.9.9.9"], "10.9.9.9"),
            (&["203.0.113.7, \u{e4}"], "10.0.0.1"),
            (&["\u{e4}, 203.0.113.7"], "203.0.113.7"),
            (&["203.0.113.7", "\"><script>"], "10.0.0.1"),
        ] {
            assert_eq!(client(&PROXIES, "10.0.0.1", lists), expected, "{lists:?}");
        }
    }

    #[test]
    fn an_address_is_recorded_without_its_port() {
        for (hop, expected) in [
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.7:5678", "192.0.2.7"),
            ("2001:DB8:0:0::7", "2001:db8::7"),
            ("[2001:db8::7]", "2001:db8::7"),
            ("[2001:db8::7]:5678", "2001:db8::7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
        ] {
            assert_eq!(address(hop).map(|address| address.to_string()).as_deref(), Some(expected), "{hop}");
        }
    }

    #[test]
    fn other_text_is_no_address() {
        for hop in [
            "",
            "\"><script>",
            "unknown",
            "\"192.0.2.7\"",
            "192.0.2.7 10.0.0.1",
            "192.0.2.256",
            "192.0.2.7:",
            "192.0.2.7:65536",
            "192.0.2.7:5678:9",
            "[192.0.2.7]",
            "[]",
            "[::1",
            "::1]",
            "[::1]:",
            "for=192.0.2.7",
            "proxy.example:80",
        ] {
            assert_eq!(address(hop), None, "{hop}");
        }
    }
}
