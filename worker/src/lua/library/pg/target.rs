//! The servers of a database, to be tried in turn, each with all that a connection needs.
//!
//! Contract: [`Target::new`] decides everything that a connection string leaves open, as libpq
//! would (defaults, password file, root certificates), so that nothing is looked up later but host
//! names. [`Target::connect`] blocks, without a time limit but `connect_timeout`'s.
//!
//! # Failure
//! [`ConnInfoError`] for what can't be supported; the text of the last server's error when no
//! server can be connected to.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::unistd::{User, geteuid};
use postgres::config::{LoadBalanceHosts, SslMode, TargetSessionAttrs};
use postgres::error::SqlState;
use postgres::{Client, Config, Error, NoTls};
use qrelay_shared::sys::lookup;
use qrelay_shared::system_error::without_numbers;
use rustls::pki_types::CertificateDer;
use slog::Logger;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::lua::library::pg::parameters::{ConnInfoError, Parameters};
use crate::lua::library::pg::passfile::{self, Access};
use crate::lua::library::pg::pooler::{self, Pooling};
use crate::lua::library::pg::statement;
use crate::lua::library::pg::tls::{self, Check};

/// libpq's default where PostgreSQL is Debian's or Red Hat's.
const DEFAULT_SOCKET_DIRECTORY: &str = "/var/run/postgresql";
/// PostgreSQL's port.
const DEFAULT_PORT: &str = "5432";
/// The default name in a server's list of sessions.
const APPLICATION_NAME: &str = "qrelay";

/// TCP keepalive, in seconds: the silence before the first probe, the interval, and the number of
/// probes. With the system's default of two hours a listener would miss notifications for as long
/// after a router dropped its connection.
const KEEPALIVE_IDLE: u64 = 30;
const KEEPALIVE_INTERVAL: u64 = 10;
const KEEPALIVE_COUNT: u64 = 3;

/// Default limit, in seconds, for connecting to one address. Without a limit an address that
/// answers nothing would leave no time for the next.
const CONNECT_TIMEOUT: u64 = 5;

/// A database.
#[derive(Debug)]
pub(super) struct Target {
    servers: Vec<Server>,
    /// Sets the search path, if one was given.
    prologue: Option<String>,
    logger: Logger,
}

#[derive(Debug)]
struct Server {
    /// The servers' names, for messages.
    name: String,
    config: Config,
    encryption: Encryption,
    /// What connections lead to, once one was made.
    pooling: OnceLock<Pooling>,
    /// Whether the log says that connections aren't encrypted.
    plain: AtomicBool,
}

/// A connection to the first server that accepted.
pub(super) struct Connection {
    /// The client library's end.
    pub client: Client,
    /// Cancels the connection's statement.
    pub cancel: Cancel,
    /// What the connection leads to.
    pub pooling: Pooling,
}

#[derive(Clone)]
enum Encryption {
    Never,
    IfPossible(MakeRustlsConnect),
    Always(MakeRustlsConnect),
}

impl std::fmt::Debug for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Never => "Never",
            Self::IfPossible(_) => "IfPossible",
            Self::Always(_) => "Always",
        })
    }
}

/// Cancels the statement of a connection.
#[derive(Clone)]
pub(super) struct Cancel {
    token: postgres::CancelToken,
    encryption: Encryption,
}

impl Cancel {
    /// Asks the server to cancel; blocks.
    pub(super) fn run(&self) {
        // The server sends no answer, and a failure can't be repaired.
        let _ = match &self.encryption {
            Encryption::Never => self.token.cancel_query(NoTls),
            Encryption::IfPossible(tls) | Encryption::Always(tls) => {
                self.token.cancel_query(tls.clone())
            }
        };
    }
}

impl Target {
    /// The database that a connection string and the environment name.
    ///
    /// # Errors
    /// A parameter isn't supported, or makes no sense.
    pub(super) fn new(
        mut parameters: Parameters,
        schema: Option<&str>,
        logger: &Logger,
    ) -> Result<Self, ConnInfoError> {
        parameters.complete(|variable| std::env::var(variable).ok());
        Self::of_complete(&parameters, schema, logger)
    }

    /// Returns the database that complete parameters name; the environment has no part in it.
    fn of_complete(
        parameters: &Parameters,
        schema: Option<&str>,
        logger: &Logger,
    ) -> Result<Self, ConnInfoError> {
        let who = User::from_uid(geteuid()).ok().flatten();
        let home = who.as_ref().map(|who| who.dir.clone()).unwrap_or_default();
        let own_name = who.map(|who| who.name).unwrap_or_default();
        let reader = Reader { parameters, home };
        let base = reader.base(&own_name)?;
        let passwords = match parameters.get("password") {
            Some(_) => String::new(),
            None => passfile::read(&reader.passfile(), logger),
        };
        let mut servers = Vec::new();
        for mut place in reader.places()? {
            let encryption =
                if place.is_local() { Encryption::Never } else { reader.encryption()? };
            let mut config = base.clone();
            place.apply(&mut config);
            place.ask_for_password(&mut config, &passwords);
            config.ssl_mode(match encryption {
                Encryption::Never => SslMode::Disable,
                Encryption::IfPossible(_) | Encryption::Always(_) => SslMode::Require,
            });
            servers.push(Server {
                name: std::mem::take(&mut place.name),
                config,
                encryption,
                pooling: OnceLock::new(),
                plain: AtomicBool::new(false),
            });
        }
        let prologue = schema.filter(|schema| !schema.is_empty()).map(prologue);
        Ok(Self { servers, prologue, logger: logger.clone() })
    }

    /// The servers, for messages.
    pub(super) fn name(&self) -> String {
        let names = self.servers.iter().map(|server| server.name.as_str());
        names.collect::<Vec<_>>().join(" or ")
    }

    /// Returns the name of the database and its servers, without a password.
    pub(super) fn label(&self) -> String {
        let database = self.servers.first().and_then(|server| server.config.get_dbname());
        format!("{} at {}", database.unwrap_or_default(), self.name())
    }

    /// Connects to the first server that accepts.
    ///
    /// # Errors
    /// The last server's error.
    pub(super) fn connect(&self) -> Result<Connection, ConnectFailure> {
        let mut failure = ConnectFailure::from(String::new());
        for server in &self.servers {
            match server.connect(&self.logger) {
                Ok((mut client, pooling)) => {
                    self.begin(&mut client, pooling, &server.name)?;
                    let encryption = server.encryption.clone();
                    let cancel = Cancel { token: client.cancel_token(), encryption };
                    return Ok(Connection { client, cancel, pooling });
                }
                Err(error) => {
                    let message =
                        format!("cannot connect to {}: {}", server.name, describe(&error));
                    failure = ConnectFailure { message, may_pass: may_pass(&error) };
                }
            }
        }
        Err(failure)
    }

    /// Sets the search path of a new connection, if one was given.
    fn begin(&self, client: &mut Client, pooling: Pooling, server: &str) -> Result<(), String> {
        let Some(prologue) = &self.prologue else { return Ok(()) };
        if pooling == Pooling::Transaction {
            return Err(format!(
                "schema can't work behind {server}, which pools connections in transaction mode: \
                 name the schema in each statement, or set search_path by ALTER ROLE"
            ));
        }
        client.batch_execute(prologue).map_err(|error| describe(&error))
    }
}

/// Why there is no connection.
pub(super) struct ConnectFailure {
    /// The cause.
    pub message: String,
    /// Whether the cause may pass by itself.
    pub may_pass: bool,
}

impl From<String> for ConnectFailure {
    fn from(message: String) -> Self {
        Self { message, may_pass: false }
    }
}

/// Whether a server that can't be reached now may be there later. A server that refuses the user,
/// the database or the certificate won't.
fn may_pass(error: &Error) -> bool {
    if let Some(code) = error.code() {
        // Connection exceptions, resources, operator intervention (a server that starts or stops),
        // errors of the system (PostgreSQL, appendix A).
        return ["08", "53", "57", "58"].iter().any(|class| code.code().starts_with(class));
    }
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                ErrorKind::PermissionDenied => false,
                ErrorKind::TimedOut | ErrorKind::UnexpectedEof => true,
                // Errors of TLS have no number, and a look-up's have one if the system failed.
                _ => lookup::may_pass(io),
            };
        }
        cause = inner.source();
    }
    error.is_closed()
}

impl Server {
    fn connect(&self, logger: &Logger) -> Result<(Client, Pooling), Error> {
        if let Some(pooling) = self.pooling.get() {
            return Ok((self.open(&self.config, logger)?, *pooling));
        }
        let (mut client, pooling) = match self.open(&pooler::marked(&self.config), logger) {
            Ok(mut client) => match pooler::is_direct(&mut client)? {
                true => (client, Some(Pooling::Session)),
                false => (client, None),
            },
            Err(error) if pooler::is_refusal(&error) => (self.open(&self.config, logger)?, None),
            Err(error) => return Err(error),
        };
        let pooling = match pooling {
            Some(pooling) => pooling,
            None => pooler::pooling(&mut client, &mut self.open(&self.config, logger)?)?,
        };
        Ok(match pooling {
            Pooling::Unknown => (client, Pooling::Unknown),
            known => (client, *self.pooling.get_or_init(|| known)),
        })
    }

    fn open(&self, config: &Config, logger: &Logger) -> Result<Client, Error> {
        match &self.encryption {
            Encryption::Never => config.connect(NoTls),
            Encryption::Always(tls) => config.connect(tls.clone()),
            Encryption::IfPossible(tls) => match config.connect(tls.clone()) {
                Err(error) if may_work_without_tls(&error) => {
                    let client = config.clone().ssl_mode(SslMode::Disable).connect(NoTls)?;
                    if !self.plain.swap(true, Ordering::Relaxed) {
                        slog::warn!(logger, "pg: connections are not encrypted (sslmode=prefer)";
                            "server" => &self.name, "cause" => describe(&error));
                    }
                    Ok(client)
                }
                Ok(client) => {
                    self.plain.store(false, Ordering::Relaxed);
                    Ok(client)
                }
                Err(error) => Err(error),
            },
        }
    }
}

/// Whether `sslmode=prefer` tries again without TLS, as libpq does: where the server has no TLS,
/// after a failed handshake, and when no line of pg_hba.conf allows the connection with TLS.
fn may_work_without_tls(error: &Error) -> bool {
    tls::is_refusal(error) || error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
}

/// Returns the error of the server or the system in one line, with SQLSTATE.
pub(super) fn describe(error: &Error) -> String {
    let Some(db) = error.as_db_error() else {
        if let Some(reason) = tls::reason(error) {
            return reason;
        }
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            text.push_str(&format!(": {inner}"));
            cause = inner.source();
        }
        return without_numbers(&text).into_owned();
    };
    let mut text = format!("{} {}: {}", db.severity(), db.code().code(), db.message());
    for (label, part) in [("DETAIL", db.detail()), ("HINT", db.hint())] {
        if let Some(part) = part {
            text.push_str(&format!("; {label}: {part}"));
        }
    }
    text
}

/// Returns the statement that sets the search path to a schema, or to a list as in `search_path`.
fn prologue(schema: &str) -> String {
    let is_list = schema.contains([',', '"']);
    let path = if is_list { schema.to_owned() } else { statement::quote_identifier(schema) };
    let mut sql = "SELECT pg_catalog.set_config('search_path',".to_owned();
    statement::push_literal(&mut sql, path.as_bytes());
    sql.push_str(",false)");
    sql
}

/// A host and port of a target.
struct Place {
    name: String,
    host: String,
    address: Option<IpAddr>,
    port: u16,
}

impl Place {
    fn is_local(&self) -> bool {
        self.host.starts_with('/')
    }

    fn apply(&self, config: &mut Config) {
        config.host(&self.host).port(self.port);
        if let Some(address) = self.address {
            config.hostaddr(address);
        }
    }

    /// Sets the password that the password file has for this server.
    fn ask_for_password(&self, config: &mut Config, passwords: &str) {
        let host = if self.host == DEFAULT_SOCKET_DIRECTORY { "localhost" } else { &self.host };
        let access = Access {
            host,
            port: &self.port.to_string(),
            database: config.get_dbname().unwrap_or_default(),
            user: config.get_user().unwrap_or_default(),
        };
        if let Some(password) = passfile::find(passwords, &access) {
            config.password(password);
        }
    }
}

/// Interprets the parameters.
struct Reader<'a> {
    parameters: &'a Parameters,
    home: PathBuf,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.parameters.get(key)
    }

    fn invalid<T>(&self, key: &'static str, expected: &str) -> Result<T, ConnInfoError> {
        Err(ConnInfoError::InvalidValue { key, expected: expected.to_owned() })
    }

    /// Returns the parameter's value, which must be one of these words.
    fn word(&self, key: &'static str, words: &[&str]) -> Result<Option<&str>, ConnInfoError> {
        match self.get(key) {
            Some(word) if !words.contains(&word) => self.invalid(key, &words.join(", ")),
            word => Ok(word),
        }
    }

    /// A number that isn't negative.
    fn number(&self, key: &'static str) -> Result<Option<u64>, ConnInfoError> {
        let Some(text) = self.get(key) else { return Ok(None) };
        match text.trim().parse::<u32>() {
            Ok(number) => Ok(Some(u64::from(number))),
            Err(_) => self.invalid(key, "a number"),
        }
    }

    /// Returns the configuration that all servers have in common.
    fn base(&self, own_name: &str) -> Result<Config, ConnInfoError> {
        let mut config = Config::new();
        let user = self.get("user").unwrap_or(own_name);
        config.user(user).dbname(self.get("dbname").unwrap_or(user));
        let application = self.get("application_name");
        let application = application.or(self.get("fallback_application_name"));
        config.application_name(application.unwrap_or(APPLICATION_NAME));
        if let Some(password) = self.get("password") {
            config.password(password);
        }
        if let Some(options) = self.get("options") {
            config.options(options);
        }
        self.sockets(&mut config)?;
        self.sessions(&mut config)?;
        Ok(config)
    }

    fn sockets(&self, config: &mut Config) -> Result<(), ConnInfoError> {
        let seconds = |key, default| {
            self.number(key).map(|n| Duration::from_secs(n.filter(|n| *n > 0).unwrap_or(default)))
        };
        match self.number("connect_timeout")?.unwrap_or(CONNECT_TIMEOUT) {
            0 => {}
            limit => drop(config.connect_timeout(Duration::from_secs(limit))),
        }
        if let Some(limit) = self.number("tcp_user_timeout")?.filter(|limit| *limit > 0) {
            config.tcp_user_timeout(Duration::from_millis(limit));
        }
        config.keepalives(self.number("keepalives")? != Some(0));
        config.keepalives_idle(seconds("keepalives_idle", KEEPALIVE_IDLE)?);
        config.keepalives_interval(seconds("keepalives_interval", KEEPALIVE_INTERVAL)?);
        let count = self.number("keepalives_count")?.filter(|count| *count > 0);
        config.keepalives_retries(count.unwrap_or(KEEPALIVE_COUNT) as u32);
        Ok(())
    }

    fn sessions(&self, config: &mut Config) -> Result<(), ConnInfoError> {
        // Texts are UTF-8 on every connection; the other words only mean "no GSSAPI", "no channel
        // binding", of which there are none.
        self.word("client_encoding", &["UTF8", "utf8", "UTF-8", "utf-8", "auto"])?;
        self.word("gssencmode", &["disable", "prefer"])?;
        self.word("channel_binding", &["disable", "prefer"])?;
        let attributes = ["any", "read-write", "read-only"];
        config.target_session_attrs(match self.word("target_session_attrs", &attributes)? {
            Some("read-write") => TargetSessionAttrs::ReadWrite,
            Some("read-only") => TargetSessionAttrs::ReadOnly,
            _ => TargetSessionAttrs::Any,
        });
        // Between the addresses of one name; the hosts themselves are tried in their order.
        let balance = self.word("load_balance_hosts", &["disable", "random"])?;
        config.load_balance_hosts(match balance {
            Some("random") => LoadBalanceHosts::Random,
            _ => LoadBalanceHosts::Disable,
        });
        Ok(())
    }

    /// The servers, in the order in which they are tried.
    fn places(&self) -> Result<Vec<Place>, ConnInfoError> {
        let split = |key| self.get(key).map(|text| text.split(',').collect::<Vec<_>>());
        let hosts = split("host").unwrap_or_default();
        let addresses = split("hostaddr").unwrap_or_default();
        let ports = split("port").unwrap_or_default();
        let count = hosts.len().max(addresses.len()).max(1);
        if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
            return self.invalid("hostaddr", "as many as there are hosts");
        }
        if ports.len() > 1 && ports.len() != count {
            return self.invalid("port", "one port, or as many as there are hosts");
        }
        let item = |list: &[&str], index: usize| -> String {
            list.get(index).copied().unwrap_or_default().to_owned()
        };
        let mut places = Vec::with_capacity(count);
        for index in 0..count {
            let port = ports.get(index).or(ports.first()).copied().unwrap_or_default();
            places.push(self.place(item(&hosts, index), &item(&addresses, index), port)?);
        }
        Ok(places)
    }

    fn place(&self, host: String, address: &str, port: &str) -> Result<Place, ConnInfoError> {
        let port = if port.is_empty() { DEFAULT_PORT } else { port.trim() };
        let Some(port) = port.parse::<u16>().ok().filter(|port| *port > 0) else {
            return self.invalid("port", "numbers from 1 to 65535");
        };
        let parsed = match address.parse::<IpAddr>() {
            Ok(parsed) => Some(parsed),
            Err(_) if address.is_empty() => None,
            Err(_) => return self.invalid("hostaddr", "IP addresses"),
        };
        if host.starts_with('@') {
            return self.invalid("host", "names, addresses or directories of sockets");
        }
        let host = match (host.is_empty(), parsed) {
            (false, _) => host,
            (true, Some(address)) => address.to_string(),
            (true, None) => DEFAULT_SOCKET_DIRECTORY.to_owned(),
        };
        let name = if host.starts_with('/') {
            format!("{host}/.s.PGSQL.{port}")
        } else {
            format!("{host}, port {port}")
        };
        Ok(Place { name, host, address: parsed, port })
    }

    fn passfile(&self) -> PathBuf {
        self.get("passfile").map_or_else(|| self.home.join(".pgpass"), PathBuf::from)
    }

    fn encryption(&self) -> Result<Encryption, ConnInfoError> {
        let modes = ["disable", "prefer", "require", "verify-ca", "verify-full"];
        let mode = self.word("sslmode", &modes)?.unwrap_or("prefer");
        let roots = self.roots(mode)?;
        let check = match mode {
            "disable" => return Ok(Encryption::Never),
            "verify-full" => Check::SignerAndName,
            "verify-ca" => Check::Signer,
            "require" if !roots.is_empty() => Check::Signer,
            _ => Check::Nothing,
        };
        let tls = tls::connector(check, roots).map_err(|reason| self.unusable_roots(&reason))?;
        Ok(if mode == "prefer" { Encryption::IfPossible(tls) } else { Encryption::Always(tls) })
    }

    fn root_file(&self) -> PathBuf {
        let default = || self.home.join(".postgresql/root.crt");
        self.get("sslrootcert").map_or_else(default, PathBuf::from)
    }

    fn unusable_roots(&self, reason: &str) -> ConnInfoError {
        ConnInfoError::UnusableFile {
            key: "sslrootcert",
            path: match self.get("sslrootcert") {
                Some(_) => None,
                None => Some(self.root_file().display().to_string()),
            },
            reason: reason.to_owned(),
        }
    }

    /// The root certificates; there must be some if they are asked for.
    fn roots(&self, mode: &str) -> Result<Vec<CertificateDer<'static>>, ConnInfoError> {
        if matches!(mode, "disable" | "prefer") {
            return Ok(Vec::new());
        }
        let wanted = self.get("sslrootcert").is_some() || mode.starts_with("verify");
        let path = self.root_file();
        if !wanted && !Path::new(&path).exists() {
            return Ok(Vec::new());
        }
        tls::read_roots(&path).map_err(|reason| self.unusable_roots(&reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lua::library::pg::conninfo;

    fn target(text: &str) -> Result<Target, ConnInfoError> {
        let logger = Logger::root(slog::Discard, slog::o!());
        Target::of_complete(&conninfo::parse(text)?, None, &logger)
    }

    #[test]
    fn defaults_are_libpqs() {
        let target = target("dbname=foo").expect("valid");
        assert_eq!(target.servers[0].name, "/var/run/postgresql/.s.PGSQL.5432");
        assert_eq!(target.servers[0].config.get_dbname(), Some("foo"));
        let me = User::from_uid(geteuid()).ok().flatten().map(|me| me.name);
        assert_eq!(target.servers[0].config.get_user(), me.as_deref());
    }

    #[test]
    fn several_servers() {
        let target = target("host=a,b port=1,2 user=u").expect("valid");
        let names: Vec<_> = target.servers.iter().map(|server| server.name.as_str()).collect();
        assert_eq!(names, ["a, port 1", "b, port 2"]);
        assert_eq!(target.servers[0].config.get_dbname(), Some("u"));
    }

    #[test]
    fn what_is_not_supported() {
        for text in [
            "port=0",
            "port=x",
            "port=1,2 host=a,b,c",
            "hostaddr=nowhere",
            "host=a,b hostaddr=127.0.0.1",
            "host=@abstract",
            "host=a sslmode=allow",
            "host=a sslmode=verify-full sslrootcert=/nonexistent",
            "connect_timeout=soon",
            "gssencmode=require",
            "channel_binding=require",
            "client_encoding=LATIN1",
            "target_session_attrs=standby",
        ] {
            assert!(target(text).is_err(), "{text}");
        }
    }

    #[test]
    fn one_schema_or_a_list() {
        assert!(prologue("Mine").contains("'\"Mine\"'"));
        assert!(prologue("a, b").contains("'a, b'"));
        assert!(prologue("o'x").contains("'\"o''x\"'"));
    }
}
