//! Networks in CIDR notation, for the `allow` option of a listener.
//!
//! Contract: a network is `10.0.0.0/8`, `fd00::/8`, or a single address without a prefix length.
//! Host bits that are set are an error, because the author probably meant another network.
//! IPv4-mapped addresses (`::ffff:192.0.2.1`, as a dual-stack socket reports IPv4 clients) count as
//! IPv4 addresses, both in networks and for clients.
//!
//! # Failure
//! Every error is a [`NetworkError`], which tells the author of a configuration what was expected.
//! A network that is deserialized is checked like a written one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The reason why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NetworkError {
    /// The part before the slash is no numeric IP address.
    #[error("expected a network such as 10.0.0.0/8, fd00::/8 or a single IP address")]
    Address,
    /// The part after the slash is no number, or too large a number.
    #[error("the prefix length must be a number from 0 to {max}")]
    PrefixLength {
        /// Number of bits of an address of this family.
        max: u8,
    },
    /// The address has bits that are set beyond its prefix.
    #[error("host bits are set; the network is {network}")]
    HostBits {
        /// The network that was probably meant.
        network: Network,
    },
}

/// A range of IP addresses with a common prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(IpAddr, u8)", into = "(IpAddr, u8)")]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Returns the network of all addresses whose first `prefix` bits equal those of `address`.
    ///
    /// # Errors
    /// Returns an error for a prefix length beyond the family's, and for host bits that are set.
    pub(crate) fn new(address: IpAddr, prefix: u8) -> Result<Self, NetworkError> {
        let max = bits(address);
        if prefix > max {
            return Err(NetworkError::PrefixLength { max });
        }
        // Within ::ffff:0:0/96 the prefix counts from the start of the IPv4 address.
        let (address, prefix) = match address.to_canonical() {
            v4 @ IpAddr::V4(_) if max == 128 && prefix >= 96 => (v4, prefix - 96),
            _ => (address, prefix),
        };
        let network = Self { address: mask(address, prefix), prefix };
        if network.address == address {
            Ok(network)
        } else {
            Err(NetworkError::HostBits { network })
        }
    }

    /// Returns whether the network contains `peer`. An IPv4-mapped peer is looked up in IPv4
    /// networks.
    pub fn contains(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        peer.is_ipv4() == self.address.is_ipv4() && mask(peer, self.prefix) == self.address
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Returns `address` with all bits after the first `prefix` cleared.
fn mask(address: IpAddr, prefix: u8) -> IpAddr {
    let hosts = u32::from(bits(address).saturating_sub(prefix));
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(hosts).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(hosts).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| NetworkError::Address)?;
        let max = bits(address);
        let prefix = match prefix {
            None => max,
            Some(digits) => prefix_length(digits).ok_or(NetworkError::PrefixLength { max })?,
        };
        Self::new(address, prefix)
    }
}

fn prefix_length(digits: &str) -> Option<u8> {
    // `parse` alone would also accept a sign.
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl TryFrom<(IpAddr, u8)> for Network {
    type Error = NetworkError;

    fn try_from((address, prefix): (IpAddr, u8)) -> Result<Self, NetworkError> {
        Self::new(address, prefix)
    }
}

impl From<Network> for (IpAddr, u8) {
    fn from(network: Network) -> Self {
        (network.address, network.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contains_peers() {
        let table = [
            ("10.0.0.0/8", "10.255.255.255", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("10.0.0.0/8", "::ffff:10.1.2.3", true),
            ("10.0.0.0/8", "::10.1.2.3", false),
            ("0.0.0.0/0", "192.0.2.1", true),
            ("0.0.0.0/0", "::ffff:192.0.2.1", true),
            ("0.0.0.0/0", "::1", false),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("192.0.2.1/32", "192.0.2.1", true),
            ("192.0.2.128/25", "192.0.2.127", false),
            ("127.0.0.0/8", "127.0.0.1", true),
            ("::1", "::1", true),
            ("::1", "::2", false),
            ("::/0", "2001:db8::1", true),
            ("::/0", "192.0.2.1", false),
            ("fd00::/8", "fdff::1", true),
            ("fd00::/8", "fe00::1", false),
            ("2001:db8::/33", "2001:db8:7fff::", true),
            ("2001:db8::/33", "2001:db8:8000::", false),
            ("::ffff:10.0.0.0/104", "10.1.2.3", true),
            ("::ffff:10.0.0.1", "::ffff:10.0.0.1", true),
        ];
        for (network, peer, expected) in table {
            let parsed: Network = network.parse().expect(network);
            let peer: IpAddr = peer.parse().expect(peer);
            assert_eq!(parsed.contains(peer), expected, "{network} {peer}");
        }
    }

    #[test]
    fn refuses() {
        let prefix = |max| NetworkError::PrefixLength { max };
        let table = [
            ("", NetworkError::Address),
            ("localhost", NetworkError::Address),
            ("10.0.0/8", NetworkError::Address),
            ("10.0.0.0.0/8", NetworkError::Address),
            (" 10.0.0.0/8", NetworkError::Address),
            ("[::1]/128", NetworkError::Address),
            ("fe80::%1/64", NetworkError::Address),
            ("10.0.0.0/", prefix(32)),
            ("10.0.0.0/33", prefix(32)),
            ("10.0.0.0/256", prefix(32)),
            ("10.0.0.0/+8", prefix(32)),
            ("10.0.0.0/-1", prefix(32)),
            ("10.0.0.0/8/8", prefix(32)),
            ("10.0.0.0/255.0.0.0", prefix(32)),
            ("::/129", prefix(128)),
        ];
        for (text, error) in table {
            assert_eq!(text.parse::<Network>(), Err(error), "{text}");
        }
    }

    #[test]
    fn host_bits_name_the_network() {
        let table = [
            ("10.0.0.1/8", "10.0.0.0/8"),
            ("10.0.0.1/0", "0.0.0.0/0"),
            ("fd00::1/8", "fd00::/8"),
            ("::ffff:10.0.0.1/104", "10.0.0.0/8"),
        ];
        for (text, meant) in table {
            let error = text.parse::<Network>().expect_err(text).to_string();
            assert!(error.ends_with(meant), "{error}");
        }
    }

    #[test]
    fn travels() {
        for text in ["10.0.0.0/8", "::/0", "192.0.2.1/32"] {
            let network: Network = text.parse().expect(text);
            assert_eq!(network.to_string(), text);
            let bytes = postcard::to_stdvec(&network).expect("encodes");
            assert_eq!(postcard::from_bytes::<Network>(&bytes), Ok(network));
        }
        let forged = postcard::to_stdvec(&(IpAddr::from([10, 0, 0, 1]), 200u8)).expect("encodes");
        assert!(postcard::from_bytes::<Network>(&forged).is_err());
    }
}
