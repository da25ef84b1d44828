//! A PostgreSQL server of the tests' own: a temporary cluster on a local socket.
//!
//! Contract: the server's programs are Debian's; root runs them as the user postgres, since they
//! refuse root. Everything is in a temporary directory, without fsync. A dropped cluster is stopped
//! at once. [`Cluster::shared`] is for tests that leave the server as it was.
//!
//! # Failure
//! A server that can't be had fails the test.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::sys::signal::Signal;
use nix::unistd::{User, chown, geteuid};
use tempfile::TempDir;

use super::processes;
use super::record::eventually;
use super::target::Target;

/// A server.
#[derive(Debug)]
pub struct Cluster {
    dir: TempDir,
    server: Mutex<Option<Child>>,
    port: u16,
    options: Vec<String>,
}

/// The user that the server runs as, if it isn't the tests' own.
fn server_user() -> Option<User> {
    let root = geteuid().is_root();
    root.then(|| User::from_name("postgres").ok().flatten().expect("the user postgres"))
}

/// One of the server's programs: the newest there is.
fn program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("the package postgresql");
    let paths = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin").join(name)));
    let mut paths: Vec<_> = paths.filter(|path| path.exists()).collect();
    paths.sort();
    paths.pop().unwrap_or_else(|| panic!("no {name} in /usr/lib/postgresql"))
}

/// A command that runs as the server does.
fn as_server(program: &Path) -> Command {
    let Some(user) = server_user() else { return Command::new(program) };
    let mut command = Command::new("setpriv");
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
    /// A running server, with these further settings, such as `ssl=on`.
    pub fn start(options: &[&str]) -> Self {
        let cluster = Self::prepare(options);
        cluster.restart();
        cluster
    }

    /// A server that hasn't been started.
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

    /// A running server that others use, too.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Self::start(&[]));
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    }

    /// The directory, with the socket in it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The cluster's directory.
    pub fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    /// The TCP port on 127.0.0.1, and the number in the socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it is, for config.lua.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.dir().display(), self.port)
    }

    /// Makes a file the server's own.
    pub fn give_to_server(&self, path: &Path) {
        if let Some(user) = server_user() {
            chown(path, Some(user.uid), Some(user.gid)).expect("chown");
        }
    }

    /// Starts the server, or starts it again, and waits until it takes connections.
    #[track_caller]
    pub fn restart(&self) {
        self.stop();
        let mut command = as_server(&program("postgres"));
        command.arg("-D").arg(self.data()).arg("-k").arg(self.dir());
        command.args(["-p", &self.port.to_string(), "-h", "127.0.0.1", "-c", "fsync=off"]);
        command.args(["-c", "max_connections=200", "-c", "log_min_messages=panic"]);
        for option in &self.options {
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
        let mut command = Command::new(program("pg_isready"));
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

    /// What `psql -At` prints.
    #[track_caller]
    pub fn psql(&self, sql: &str) -> String {
        self.psql_in("postgres", sql)
    }

    /// The same in another database.
    #[track_caller]
    pub fn psql_in(&self, database: &str, sql: &str) -> String {
        let mut command = Command::new("psql");
        command.arg("-h").arg(self.dir()).args(["-p", &self.port.to_string()]);
        command.args(["-U", "postgres", "-d", database, "-qAtX", "-v", "ON_ERROR_STOP=1"]);
        succeed(command.args(["-c", sql]))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // It may have been stopped by a signal.
        self.signal_all(Signal::SIGCONT);
        self.stop();
    }
}
