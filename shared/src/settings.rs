//! What one generation of the configuration asks of the processes: the typed
//! form of `settings{}`, of the listeners and of the globals that the script
//! leaves behind.
//!
//! The zygote builds these values and sends them to the supervisor inside
//! [`Declaration`]; nothing here is checked again on the other side, so the
//! limits named below are enforced where the script's values are converted.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::network::Network;

/// `max_size` when the script doesn't set it: 16 MiB, as in the original.
pub const DEFAULT_MAX_SIZE: usize = 16 * 1024 * 1024;

/// Backlog of a listener that doesn't say: pending connections in the kernel.
pub const DEFAULT_BACKLOG: u32 = 1024;

/// Mode of a bound socket file that doesn't say.
pub const DEFAULT_MODE: u32 = 0o666;

/// The values of `settings{}`; every field's default is [`Settings::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Worker processes, 1 … 256.
    pub workers: u32,
    /// Mails at once per worker (its credit), 1 … 4096.
    pub worker_connections: u32,
    /// Longest silence of a client during its request.
    pub client_timeout: Duration,
    /// Longest time for a whole request.
    pub request_timeout: Duration,
    /// From the last byte of the request to the answer.
    pub relay_timeout: Duration,
    /// Running Lua per mail; waiting doesn't count.
    pub handler_timeout: Duration,
    /// Per address of a `connect`.
    pub connect_timeout: Duration,
    /// How long Lua may be held, or pings unanswered, before the worker is killed.
    pub hang_timeout: Duration,
    /// How long a generation that is replaced, or a stopping daemon, may finish its mails.
    pub drain_timeout: Duration,
    /// Mails after which a worker is replaced; 0 means never.
    pub worker_max_mails: u64,
    /// Bytes of Lua memory per worker.
    pub lua_memory_limit: usize,
    /// Bytes of messages held in memory per worker.
    pub mail_memory: usize,
    /// Bytes per shared dictionary.
    pub shared_memory: usize,
    /// Connections at once per uid; 0 means no limit.
    pub max_connections_per_uid: u32,
    /// Largest part of all credits that one client may hold, 0 < x ≤ 1.
    pub client_share: f64,
    /// `Received` fields after which a mail is refused as looping.
    pub max_hops: u32,
}

impl Default for Settings {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(2, |n| n.get() as u32);
        Self {
            workers: cpus.clamp(2, 256),
            worker_connections: 256,
            client_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(300),
            relay_timeout: Duration::from_secs(55),
            handler_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(5),
            hang_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(60),
            worker_max_mails: 0,
            lua_memory_limit: 256 << 20,
            mail_memory: 512 << 20,
            shared_memory: 16 << 20,
            max_connections_per_uid: 0,
            client_share: 0.75,
            max_hops: 50,
        }
    }
}

/// Where a listener gets its connections from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ListenAddress {
    /// A socket file; the path is absolute.
    Path(PathBuf),
    /// A socket in the abstract namespace, name without the leading NUL.
    Abstract(Vec<u8>),
    /// A TCP port.
    Inet(SocketAddr),
    /// Sockets passed by systemd: all that no name claims, or those of one FileDescriptorName.
    Systemd(Option<String>),
}

impl std::fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Abstract(name) => write!(f, "@{}", String::from_utf8_lossy(name)),
            Self::Inet(address) => write!(f, "{address}"),
            Self::Systemd(None) => f.write_str("systemd"),
            Self::Systemd(Some(name)) => write!(f, "systemd['{name}']"),
        }
    }
}

/// One `qmqp_listen()` as the supervisor needs it. Its place in
/// [`Declaration::listeners`] is the number by which workers find the handler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListenerDecl {
    /// Where to listen.
    pub address: ListenAddress,
    /// File mode of a bound path.
    pub mode: u32,
    /// Owner of a bound path.
    pub owner: Option<u32>,
    /// Group of a bound path.
    pub group: Option<u32>,
    /// Connections that may wait in the kernel.
    pub backlog: u32,
    /// Bytes of a message, 1024 … 1 GiB.
    pub max_size: usize,
    /// Networks whose clients are served; `None` is the default of the kind of listener.
    pub allow: Option<Vec<Network>>,
}

/// Everything that a generation's script wants from the supervisor.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Declaration {
    /// At least one, without duplicates.
    pub listeners: Vec<ListenerDecl>,
    /// The final values of `settings{}`.
    pub settings: Settings,
    /// The Pond server, if log datagrams are wanted.
    pub log_server: Option<Endpoint>,
}
