//! Whom resources are counted for.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::ipc::message::Peer;

/// Bits of an IPv6 address that say in which network the host is (RFC 4291, section 2.5.1).
const SUBNET: u128 = !(u64::MAX as u128);

/// The client that connections, credits and memory are counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Client {
    /// All processes of a user.
    Uid(u32),
    /// All connections from an IPv4 address, or from an IPv6 network of /64: a host can give itself
    /// any address in that network.
    Ip(IpAddr),
}

impl From<Peer> for Client {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Local { uid, .. } => Self::Uid(uid),
            Peer::Remote(IpAddr::V6(address)) => {
                Self::Ip(Ipv6Addr::from_bits(address.to_bits() & SUBNET).into())
            }
            Peer::Remote(address) => Self::Ip(address),
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "uid {uid}"),
            Self::Ip(IpAddr::V4(address)) => write!(f, "{address}"),
            Self::Ip(IpAddr::V6(network)) => write!(f, "{network}/64"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(address: &str) -> Client {
        Peer::Remote(address.parse().expect("an address")).into()
    }

    #[test]
    fn hosts_of_an_ipv6_network_are_one_client() {
        assert_eq!(remote("2001:db8::1"), remote("2001:db8::ffff:2:3:4"));
        assert_ne!(remote("2001:db8::1"), remote("2001:db8:0:1::1"));
        assert_ne!(remote("192.0.2.1"), remote("192.0.2.2"));
    }

    #[test]
    fn names_for_the_log() {
        assert_eq!(remote("192.0.2.1").to_string(), "192.0.2.1");
        assert_eq!(remote("2001:db8::5").to_string(), "2001:db8::/64");
        assert_eq!(Client::Uid(33).to_string(), "uid 33");
    }
}
