//! placeholder
use serde::{Deserialize, Serialize};
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network { pub address: std::net::IpAddr, pub prefix: u8 }
