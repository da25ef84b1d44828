//! A PostgreSQL server for the scenarios that query one.
//!
//! Contract: the server's programs are Debian's, its data is in a temporary directory, and nothing
//! is synced to disk. Root runs them as the user postgres, since they refuse to run as root. If
//! `PGHOST` is set, the scenarios use that server, and none is started. Dropping a cluster stops
//! its server.
//!
//! # Failure
//! A server that can't be started is an error that names what failed.

use std::{
    env, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, chown, geteuid},
};
use tempfile::TempDir;

use crate::error::{BenchError, system};

/// Longest time until the server accepts connections.
const START: Duration = Duration::from_secs(30);

/// A running server with its data.
pub struct Cluster {
    dir: TempDir,
    server: Child,
}

impl Cluster {
    /// Starts a server if the script needs one and the environment names none.
    pub fn for_script(script: &str) -> Result<Option<Self>, BenchError> {
        match script.contains("pg:new") && env::var_os("PGHOST").is_none() {
            true => Self::start().map(Some).map_err(system("postgresql")),
            false => Ok(None),
        }
    }

    /// Returns the environment by which a script finds the server.
    pub fn environment(&self) -> [(&'static str, String); 3] {
        let host = self.dir.path().display().to_string();
        [("PGHOST", host), ("PGUSER", "postgres".into()), ("PGDATABASE", "postgres".into())]
    }

    fn start() -> io::Result<Self> {
        let dir = TempDir::with_prefix("qrelay-pg-")?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let user = match geteuid().is_root() {
            true => User::from_name("postgres")?,
            false => None,
        };
        if let Some(user) = &user {
            chown(dir.path(), Some(user.uid), Some(user.gid))?;
        }
        let data = dir.path().join("data");
        let mut create = as_user(user.as_ref(), &program("initdb")?);
        create.args(["-U", "postgres", "-A", "trust", "--no-sync", "-D"]).arg(&data);
        if !create.stdout(Stdio::null()).status()?.success() {
            return Err(io::Error::other("initdb failed"));
        }
        let mut server = as_user(user.as_ref(), &program("postgres")?);
        server.arg("-D").arg(&data).arg("-k").arg(dir.path()).args(["-h", "", "-c", "fsync=off"]);
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let cluster = Self { server: server.spawn()?, dir };
        let begin = Instant::now();
        while !cluster.is_ready()? {
            if begin.elapsed() > START {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(cluster)
    }

    fn is_ready(&self) -> io::Result<bool> {
        let mut command = Command::new(program("pg_isready")?);
        Ok(command.arg("-q").arg("-h").arg(self.dir.path()).status()?.success())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The child hasn't been waited for, so the pid is its own.
        let _ = kill(Pid::from_raw(self.server.id().cast_signed()), Signal::SIGQUIT);
        let _ = self.server.wait();
    }
}

fn as_user(user: Option<&User>, program: &Path) -> Command {
    let Some(user) = user else { return Command::new(program) };
    let (uid, gid) = (user.uid.to_string(), user.gid.to_string());
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &uid, "--regid", &gid, "--clear-groups"]).arg(program);
    command
}

/// Returns the path of one of the server's programs, of the newest version on the machine.
fn program(name: &str) -> io::Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql")?.flatten();
    let numbered = versions.filter_map(|entry| {
        let number: f64 = entry.file_name().to_str()?.parse().ok()?;
        let path = entry.path().join("bin").join(name);
        path.exists().then_some((number, path))
    });
    let newest = numbered.max_by(|(a, _), (b, _)| a.total_cmp(b));
    newest.map(|(_, path)| path).ok_or_else(|| io::ErrorKind::NotFound.into())
}
