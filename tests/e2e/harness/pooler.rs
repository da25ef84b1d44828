//! PgBouncer in front of a [`Cluster`]: a pooler whose clients share the server's connections.
//!
//! Contract: the program is Debian's. Root runs it as the user postgres, because it refuses to run
//! as root. All files are in a temporary directory. Dropping a pooler ends it at once.
//!
//! # Failure
//! A pooler that can't be started fails the test.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

use super::postgres::{Cluster, as_server};
use super::record::eventually;
use super::target::Target;

/// Where Debian installs the program.
const PROGRAM: &str = "/usr/sbin/pgbouncer";

/// A running PgBouncer.
#[derive(Debug)]
pub struct Pooler {
    cluster: Arc<Cluster>,
    dir: TempDir,
    process: Child,
    port: u16,
}

impl Pooler {
    /// Starts PgBouncer in front of the shared cluster, with at most three connections to the
    /// server. `mode` is `session` or `transaction`; `more` is appended to the settings.
    pub fn start(mode: &str, more: &str) -> Self {
        let cluster = Cluster::shared();
        let dir = TempDir::with_prefix("qrelay-pooler-").expect("temporary directory");
        let permissions = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), permissions).expect("mode");
        cluster.give_to_server(dir.path());
        let port = Target::free_port().port();
        let settings = format!(
            "[databases]\n* = host={server} port={server_port} user=postgres\n[pgbouncer]\n\
             listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir = {dir}\n\
             auth_type = any\npool_mode = {mode}\ndefault_pool_size = 3\n{more}\n",
            server = cluster.dir().display(),
            server_port = cluster.port(),
            dir = dir.path().display(),
        );
        let file = dir.path().join("pgbouncer.ini");
        std::fs::write(&file, settings).expect("settings");
        let mut command = as_server(PROGRAM.as_ref());
        let log = std::fs::File::create(dir.path().join("log")).expect("log file");
        command.arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = command.spawn().expect("pgbouncer runs");
        let pooler = Self { cluster, dir, process, port };
        eventually("the pooler", || UnixStream::connect(pooler.socket()).ok());
        pooler
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join(format!(".s.PGSQL.{}", self.port))
    }

    /// Returns the cluster behind the pooler.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Returns the connection string of the pooler, for config.lua.
    pub fn conninfo(&self) -> String {
        let dir = self.dir.path().display();
        format!("host={dir} port={} user=postgres dbname=postgres", self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        // The process may have ended, which the wait shows as well.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
