//! The configuration of one generation: the typed form of `settings{}`, of the listeners and of the
//! globals that the script leaves behind.
//!
//! The zygote builds these values and sends them to the supervisor inside a [`Declaration`]. It
//! enforces the limits named below where it converts the script's values. The supervisor checks
//! those again that it depends on ([`Settings::out_of_limits`]).

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::network::Network;

/// Highest number of worker processes.
pub const MAX_WORKERS: u32 = 256;

/// Highest number of mails that a worker handles at once.
pub const MAX_WORKER_CONNECTIONS: u32 = 4096;

/// Longest duration of a setting: a day.
pub const MAX_DURATION: Duration = Duration::from_secs(86_400);

/// Largest memory limits: 1 TiB, beyond any machine's use for mail.
pub const MAX_MEMORY: usize = 1 << 40;

/// Default of `max_size` in bytes: 16 MiB, as in the original program.
pub const DEFAULT_MAX_SIZE: usize = 16 * 1024 * 1024;

/// Default backlog of a listener: the number of connections that may wait in the kernel.
pub const DEFAULT_BACKLOG: u32 = 1024;

/// Default file mode of a bound socket file.
pub const DEFAULT_MODE: u32 = 0o666;

/// The values of `settings{}`, with the defaults of [`Settings::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Number of worker processes, 1 … 256.
    pub workers: u32,
    /// Number of mails that a worker handles at once (its credit), 1 … 4096.
    pub worker_connections: u32,
    /// Longest silence of a client during its request.
    pub client_timeout: Duration,
    /// Longest time for a whole request.
    pub request_timeout: Duration,
    /// Fewest bytes per second of a request, on average, once `client_timeout` is over; 0 means any
    /// number.
    pub request_min_rate: u64,
    /// Longest time from the last byte of the request to the answer.
    pub relay_timeout: Duration,
    /// Longest time that Lua may run for one mail; waiting doesn't count.
    pub handler_timeout: Duration,
    /// Longest time for connecting to one address of a `connect`.
    pub connect_timeout: Duration,
    /// Longest time that Lua may be held, or pings may stay unanswered, before the worker is
    /// killed.
    pub hang_timeout: Duration,
    /// Longest time that a replaced generation, or a stopping daemon, may take to finish its mails.
    pub drain_timeout: Duration,
    /// Number of mails after which a worker is replaced; 0 means never.
    pub worker_max_mails: u64,
    /// Limit of Lua's memory in bytes per worker.
    pub lua_memory_limit: usize,
    /// Limit of the messages in memory, in bytes per worker.
    pub mail_memory: usize,
    /// Limit of a shared dictionary in bytes.
    pub shared_memory: usize,
    /// Limit of all shared dictionaries together in bytes; a value below `shared_memory` counts as
    /// `shared_memory`.
    pub shared_memory_total: usize,
    /// Highest number of connections at once per user id; 0 means no limit.
    pub max_connections_per_uid: u32,
    /// Largest part of all credits that one client may hold, 0 < x ≤ 1.
    pub client_share: f64,
    /// Highest number of `Received` fields; a mail with more is refused as looping.
    pub max_hops: u32,
    /// The domain of addresses without a domain; `None` means that such addresses are refused.
    pub default_domain: Option<String>,
    /// Whether zygote and workers separate themselves from other processes by Landlock.
    pub sandbox: bool,
    /// The user that zygote and workers become, as a name or a number.
    pub user: Option<String>,
    /// The primary group that zygote and workers get, as a name or a number; `None` means the
    /// user's own.
    pub group: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(2, |n| n.get() as u32);
        Self {
            workers: cpus.clamp(2, 256),
            worker_connections: 256,
            client_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(300),
            request_min_rate: 1000,
            relay_timeout: Duration::from_secs(55),
            handler_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(5),
            hang_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(60),
            worker_max_mails: 0,
            lua_memory_limit: 256 << 20,
            mail_memory: 512 << 20,
            shared_memory: 16 << 20,
            shared_memory_total: 256 << 20,
            max_connections_per_uid: 0,
            client_share: 0.75,
            max_hops: 50,
            default_domain: None,
            sandbox: true,
            user: None,
            group: None,
        }
    }
}

impl Settings {
    /// Returns the name of a setting that is out of its limits, if there is one. Only settings that
    /// the supervisor acts on are looked at.
    pub fn out_of_limits(&self) -> Option<&'static str> {
        let lasts = |duration: Duration| duration <= MAX_DURATION;
        let fits = |bytes: usize| bytes <= MAX_MEMORY;
        let share = self.client_share;
        let checks = [
            ("workers", (1..=MAX_WORKERS).contains(&self.workers)),
            ("worker_connections", (1..=MAX_WORKER_CONNECTIONS).contains(&self.worker_connections)),
            ("client_timeout", lasts(self.client_timeout)),
            ("request_timeout", lasts(self.request_timeout)),
            ("relay_timeout", lasts(self.relay_timeout)),
            ("handler_timeout", lasts(self.handler_timeout)),
            ("connect_timeout", lasts(self.connect_timeout)),
            ("hang_timeout", lasts(self.hang_timeout)),
            ("drain_timeout", lasts(self.drain_timeout)),
            ("shared_memory", fits(self.shared_memory)),
            ("shared_memory_total", fits(self.shared_memory_total)),
            ("client_share", share > 0.0 && share <= 1.0),
        ];
        checks.into_iter().find(|(_, within)| !within).map(|(name, _)| name)
    }
}

/// The source of a listener's connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ListenAddress {
    /// A socket file; the path is absolute.
    Path(PathBuf),
    /// A socket in the abstract namespace; the name is without the leading NUL.
    Abstract(Vec<u8>),
    /// A TCP socket with this IP address and port.
    Inet(SocketAddr),
    /// Sockets passed by systemd: those with this FileDescriptorName, or all that no other listener
    /// names.
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

/// A listener: one `qmqp_listen()`, as the supervisor needs it. Its index in
/// [`Declaration::listeners`] is the number by which workers find the handler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListenerDecl {
    /// The address to listen on.
    pub address: ListenAddress,
    /// File mode of a bound socket file.
    pub mode: u32,
    /// User id of the owner of a bound socket file; `None` leaves the owner as it is.
    pub owner: Option<u32>,
    /// Group id of a bound socket file; `None` leaves the group as it is.
    pub group: Option<u32>,
    /// Number of connections that may wait in the kernel.
    pub backlog: u32,
    /// Largest message in bytes, 1024 … 1 GiB.
    pub max_size: usize,
    /// Networks whose clients are served; `None` means the default of this kind of address.
    pub allow: Option<Vec<Network>>,
}

impl ListenerDecl {
    /// Returns whether clients from this address are served.
    pub fn allows(&self, peer: IpAddr) -> bool {
        match &self.allow {
            Some(networks) => networks.iter().any(|network| network.contains(peer)),
            None => {
                let passed = matches!(self.address, ListenAddress::Systemd(_));
                passed || peer.to_canonical().is_loopback()
            }
        }
    }
}

/// The user and the primary group that a zygote becomes, each as a name or a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The user.
    pub user: String,
    /// The primary group; `None` means the one of the user's entry in the user database.
    pub group: Option<String>,
}

/// How far the kernel separates a generation's zygote and workers from all other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Sandbox {
    /// The script has set `sandbox` to false.
    #[default]
    Off,
    /// No process outside is traced or signalled.
    Full,
    /// No process outside is traced. The kernel is older than Linux 6.12 (Landlock ABI 6).
    PtraceOnly,
    /// The kernel is older than Linux 5.19 (Landlock ABI 2), where Landlock can't be used without
    /// forbidding a rename from one directory to another.
    TooOld,
    /// The kernel was built or started without Landlock, or a filter of system calls hides it.
    Missing,
}

impl Sandbox {
    /// Returns the level in a word, for the log.
    pub fn level(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::PtraceOnly => "ptrace only",
            Self::Off | Self::TooOld | Self::Missing => "none",
        }
    }

    /// Returns what the kernel lacks of Landlock, if it lacks something.
    fn lack(self) -> Option<&'static str> {
        match self {
            Self::Off | Self::Full => None,
            Self::PtraceOnly => Some("this kernel lacks scoped signals (Linux 6.12)"),
            Self::TooOld => Some("this kernel lacks Landlock with renames (Linux 5.19)"),
            Self::Missing => Some(
                "this kernel lacks Landlock (CONFIG_SECURITY_LANDLOCK, lsm=), \
                 or a filter of system calls (SystemCallFilter=) forbids it",
            ),
        }
    }
}

/// The separation of a generation's zygote, which its workers inherit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Separation {
    /// What Landlock forbids.
    pub sandbox: Sandbox,
    /// Whether system calls that change other processes' limits and priorities are forbidden.
    pub filtered: bool,
    /// User id and group id that the zygote has changed to; `None` if it runs as the supervisor
    /// does.
    pub user: Option<(u32, u32)>,
}

impl Separation {
    /// Returns what the kernel lacks for the whole sandbox, if it lacks something.
    pub fn lack(&self) -> Option<&'static str> {
        let filter = (self.sandbox != Sandbox::Off && !self.filtered).then_some(
            "this kernel lacks filters of system calls (CONFIG_SECCOMP_FILTER), or another \
                 filter (SystemCallFilter=) forbids seccomp",
        );
        self.sandbox.lack().or(filter)
    }
}

/// Everything that the script of a generation wants from the supervisor.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Declaration {
    /// The listeners: at least one, without duplicates.
    pub listeners: Vec<ListenerDecl>,
    /// The final values of `settings{}`.
    pub settings: Settings,
    /// Address of the Pond log server, if log datagrams are wanted.
    pub log_server: Option<Endpoint>,
    /// Names of the shared dictionaries that the script has made handles for.
    pub dictionaries: Vec<String>,
    /// What holds for the generation's processes. The zygote fills this in after the script.
    pub separation: Separation,
}
