//! placeholder
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Endpoint { Inet(SocketAddr), Path(PathBuf), Abstract(Vec<u8>) }
