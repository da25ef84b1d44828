//! A PostgreSQL server for the tests: a temporary cluster on a local socket.
//!
//! Contract: the server's programs are Debian's. Root runs them as the user postgres, since they
//! refuse to run as root. All files are in a temporary directory, and nothing is synced to disk.
//! Dropping a cluster stops its server at once. [`Cluster::shared`] is for tests that leave the
//! server as they found it.
//!
//! # Failure
//! A server that can't be started fails the test.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::sys::signal::Signal;
use nix::unistd::{User, chown, geteuid};
use tempfile::TempDir;

use super::daemon::command;
use super::processes;
use super::record::eventually;
use super::target::Target;

/// A PostgreSQL server with its data.
#[derive(Debug)]
pub struct Cluster {
    dir: TempDir,
    server: Mutex<Option<Child>>,
    port: u16,
    options: Vec<String>,
}

/// Returns the user that the server runs as if that isn't the tests' own user.
fn server_user() -> Option<User> {
    let root = geteuid().is_root();
    root.then(|| User::from_name("postgres").ok().flatten().expect("the user postgres"))
}

/// Returns the path of one of the server's programs, of the newest version on the machine.
fn program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("the package postgresql");
    let paths = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin").join(name)));
    let paths = paths.filter(|path| path.exists());
    // The directories are named after versions: 9.6 is older than 15.
    let version = |path: &PathBuf| {
        let name = path.iter().nth(4).and_then(OsStr::to_str).unwrap_or_default();
        name.split('.').map(|part| part.parse::<u32>().unwrap_or(0)).collect::<Vec<_>>()
    };
    paths.max_by_key(version).unwrap_or_else(|| panic!("no {name} in /usr/lib/postgresql"))
}

/// Returns a command that runs as the server's user.
pub fn as_server(program: &Path) -> Command {
    let Some(user) = server_user() else { return command(program) };
    let mut command = command("setpriv");
    let (uid, gid) = (user.uid.to_string(), user.gid.to_string());
    command.args(["--reuid", &uid, "--regid", &gid, "--clear-groups"]).arg(program);
    command
}

#[track_caller]
fn succeed(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().expect("the program runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Cluster {
    /// Starts a server with these additional settings, such as `ssl=on`.
    pub fn start(options: &[&str]) -> Self {
        let cluster = Self::prepare(options);
        cluster.restart();
        cluster
    }

    /// Creates a cluster without starting its server.
    pub fn prepare(options: &[&str]) -> Self {
        let dir = TempDir::with_prefix("qrelay-pg-").expect("temporary directory");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), mode).expect("mode");
        let cluster = Self {
            port: Target::free_port().port(),
            server: Mutex::default(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            dir,
        };
        cluster.give_to_server(cluster.dir());
        let arguments =
            ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"];
        succeed(as_server(&program("initdb")).args(arguments).arg("-D").arg(cluster.data()));
        cluster
    }

    /// Returns a running server that several tests share.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Self::start(&[]));
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    }

    /// Returns the temporary directory, which contains the server's socket.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the directory of the cluster's data.
    pub fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    /// Returns the TCP port on 127.0.0.1, which is also the number in the socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the connection string of the server, for config.lua.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.dir().display(), self.port)
    }

    /// Makes the server's user the owner of a file.
    pub fn give_to_server(&self, path: &Path) {
        if let Some(user) = server_user() {
            chown(path, Some(user.uid), Some(user.gid)).expect("chown");
        }
    }

    /// Starts or restarts the server, and waits until it accepts connections.
    #[track_caller]
    pub fn restart(&self) {
        self.restart_with(&[]);
    }

    /// Restarts the server with these settings beside its own.
    #[track_caller]
    pub fn restart_with(&self, more: &[&str]) {
        self.stop();
        let mut command = as_server(&program("postgres"));
        command.arg("-D").arg(self.data()).arg("-k").arg(self.dir());
        command.args(["-p", &self.port.to_string(), "-h", "127.0.0.1", "-c", "fsync=off"]);
        command.args(["-c", "max_connections=200", "-c", "log_min_messages=panic"]);
        for option in self.options.iter().map(String::as_str).chain(more.iter().copied()) {
            command.args(["-c", option]);
        }
        let log = std::fs::File::create(self.dir().join("log")).expect("log file");
        let server = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        *self.server() = Some(server.expect("postgres runs"));
        eventually("the database server", || self.is_ready().then_some(()));
    }

    fn server(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_ready(&self) -> bool {
        let mut command = command(program("pg_isready"));
        command.arg("-q").arg("-h").arg(self.dir()).args(["-p", &self.port.to_string()]);
        command.status().expect("pg_isready runs").success()
    }

    /// Ends the server at once, with all its connections.
    pub fn stop(&self) {
        if let Some(mut server) = self.server().take() {
            processes::signal(server.id().cast_signed(), Signal::SIGQUIT);
            server.wait().expect("wait");
        }
    }

    /// Sends a signal to every process of the server.
    pub fn signal_all(&self, signal: Signal) {
        let main = self.server().as_ref().map(|server| server.id().cast_signed());
        if let Some(main) = main {
            let children = processes::children(main).into_iter().map(|child| child.pid);
            children.chain([main]).for_each(|pid| processes::signal(pid, signal));
        }
    }

    /// Runs SQL in the database postgres, and returns what `psql -At` prints.
    #[track_caller]
    pub fn psql(&self, sql: &str) -> String {
        self.psql_in("postgres", sql)
    }

    /// Runs SQL in `database`, and returns what `psql -At` prints.
    #[track_caller]
    pub fn psql_in(&self, database: &str, sql: &str) -> String {
        let mut command = command(program("psql"));
        command.arg("-h").arg(self.dir()).args(["-p", &self.port.to_string()]);
        command.args(["-U", "postgres", "-d", database, "-qAtX", "-v", "ON_ERROR_STOP=1"]);
        succeed(command.args(["-c", sql]))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A test may have stopped the server with SIGSTOP.
        self.signal_all(Signal::SIGCONT);
        self.stop();
    }
}
