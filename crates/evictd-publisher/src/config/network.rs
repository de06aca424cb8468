//! A network whose hosts are trusted.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

/// A network such as `10.0.0.0/8`, or a single address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct TrustedNetwork(IpNet);

/// A text that isn't a network.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` isn't a network; write it as 10.0.0.0/8 or 2001:db8::/32, or write one address")]
pub struct NetworkError(String);

impl TrustedNetwork {
    /// Whether `address`, which is no IPv4 address in the form of IPv6, is in the network.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }
}

impl TryFrom<String> for TrustedNetwork {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        let address = || text.trim().parse().ok().map(|address: IpAddr| address.to_canonical().into());
        let network = text.trim().parse().ok().or_else(address);
        network.map(Self).ok_or(NetworkError(text))
    }
}
