//! A running qrelay, its temporary directory, and what the daemon leaves behind.
//!
//! Contract: a daemon is ready when it sends `READY=1` to its notification socket; log text is
//! never a sign of readiness. Everything that the daemon writes to stderr is kept. When a
//! [`Daemon`] is dropped, all its processes are killed, also those that are no children of the
//! supervisor. A failing test prints the daemon's log.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use tempfile::TempDir;

use super::notify::Notify;
use super::processes::{self, Process, TAG};
use super::record::{PATIENCE, Record, eventually, within};

/// The binary under test.
pub const QRELAY: &str = env!("CARGO_BIN_EXE_qrelay");

/// Returns a command whose environment is the same whoever runs the tests. The environment says
/// where programs and temporary files are, and nothing about databases, time zones, languages or a
/// service manager.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    for name in ["PATH", "TMPDIR", "LLVM_PROFILE_FILE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// Gives the process of the tests the same umask and enough descriptors, whoever runs the tests.
/// Other users read files of the tests, and some tests are a crowd of clients.
fn usual_limits() {
    const DESCRIPTORS: u64 = 20_000;
    umask(Mode::from_bits_truncate(0o022));
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    if soft < DESCRIPTORS.min(hard) {
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS.min(hard), hard).expect("limit");
    }
}

/// A temporary directory with a configuration.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
}

impl Site {
    /// Creates an empty directory that every user may enter.
    pub fn new() -> Self {
        usual_limits();
        let dir = TempDir::with_prefix("qrelay-e2e-").expect("temporary directory");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), mode).expect("mode");
        Self { dir }
    }

    /// Creates a directory whose config.lua is `config`, with every `$DIR` replaced by the
    /// directory.
    pub fn with(config: &str) -> Self {
        let site = Self::new();
        site.configure(config);
        site
    }

    /// Returns the path of `name` in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Replaces config.lua in one step, so that the daemon never reads a partial file.
    pub fn configure(&self, config: &str) {
        let text = config.replace("$DIR", self.dir.path().to_str().expect("UTF-8"));
        std::fs::write(self.path("config.new"), text).expect("config");
        std::fs::rename(self.path("config.new"), self.path("config.lua")).expect("config");
    }

    /// Returns the command that runs the daemon in this directory, for options that [`Launch`]
    /// adds.
    pub fn launch(self) -> Launch {
        let control = self.path("control-socket");
        self.launch_with(&control)
    }

    /// Returns the command for a daemon that may not make files in this directory, so there is no
    /// control socket.
    pub fn launch_without_control(self) -> Launch {
        self.launch_with(Path::new("none"))
    }

    fn launch_with(self, control: &Path) -> Launch {
        let mut command = command(QRELAY);
        command.arg("--config").arg(self.path("config.lua")).arg("--control").arg(control);
        Launch { site: self, command, unread: false }
    }

    /// Starts the daemon and waits until it is ready.
    #[track_caller]
    pub fn start(self) -> Daemon {
        self.launch().ready()
    }

    /// Returns the names of all files in the directory, sorted, except for the harness's own.
    pub fn leftovers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir()).expect("directory");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("entry").file_name().to_string_lossy().into_owned()
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.retain(|name| name != "config.lua" && name != "notify");
        names.sort();
        names
    }
}

/// A daemon that is about to be started.
#[derive(Debug)]
pub struct Launch {
    site: Site,
    command: Command,
    unread: bool,
}

impl Launch {
    /// Adds a command-line argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Sets an environment variable of the daemon.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs the daemon by way of another program. The program gets the daemon's command line as its
    /// last arguments and executes it.
    pub fn through(mut self, wrapper: &[&str]) -> Self {
        let mut command = command(wrapper[0]);
        command.args(&wrapper[1..]).arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        self.command = command;
        self
    }

    /// Gives the daemon an /etc that has only these files, with name and content, so that nothing
    /// depends on the machine's users and hosts. Needs root.
    pub fn with_etc(self, files: &[(&str, &str)]) -> Self {
        let directory = self.site.path("etc");
        std::fs::create_dir(&directory).expect("directory");
        for (name, content) in files {
            std::fs::write(directory.join(name), content).expect("file");
        }
        let directory = directory.to_str().expect("UTF-8");
        let script = "mount -t tmpfs none /etc && cp \"$1\"/* /etc/ && shift && exec \"$@\"";
        self.through(&["unshare", "--mount", "sh", "-c", script, "sh", directory])
    }

    /// Leaves the daemon's stderr unread, to test that a full pipe doesn't hold up the daemon.
    pub fn unread_stderr(mut self) -> Self {
        self.unread = true;
        self
    }

    /// Returns the command, for changes to stdin, stdout and working directory.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Starts the daemon, and waits for nothing.
    #[track_caller]
    pub fn spawn(self) -> Daemon {
        let Self { site, mut command, unread } = self;
        let notify_path = site.path("notify");
        let notify = Notify::bind(&notify_path);
        let tag = unique_tag();
        command.env("NOTIFY_SOCKET", &notify_path).env(TAG, &tag);
        command.stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().expect("the binary runs");
        let log = Arc::new(Record::default());
        let record = log.clone();
        // The reading end stays open in `child`, so the pipe fills up instead of breaking.
        let stderr = if unread { None } else { child.stderr.take() };
        let reader = stderr.map(|err| std::thread::spawn(move || keep_lines(err, &record)));
        Daemon { child, site, log, reader, notify, tag }
    }

    /// Starts the daemon and waits until it is ready.
    #[track_caller]
    pub fn ready(self) -> Daemon {
        let mut daemon = self.spawn();
        daemon.wait_ready();
        daemon
    }
}

fn unique_tag() -> String {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed))
}

fn keep_lines(stderr: impl std::io::Read, record: &Record<String>) {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        record.push(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned());
        line.clear();
    }
}

/// A daemon that has been started.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    site: Site,
    log: Arc<Record<String>>,
    reader: Option<JoinHandle<()>>,
    notify: Notify,
    tag: String,
}

impl Daemon {
    /// Starts a daemon with this configuration, in which `$DIR` is the daemon's directory, and
    /// waits until it is ready.
    #[track_caller]
    pub fn start(config: &str) -> Self {
        Site::with(config).start()
    }

    /// Waits for `READY=1`, and fails if the daemon ends instead.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        let ready = within(PATIENCE, || {
            let ready = self.notify.all().iter().any(|line| line == "READY=1");
            (ready || self.exited().is_some()).then_some(ready)
        });
        assert_eq!(ready, Some(true), "not ready; exit {:?}; log:\n{}", self.exited(), self.text());
    }

    /// Runs a command that talks to this daemon, such as `status`, and returns its output when it
    /// has ended.
    pub fn command(&self, args: &[&str]) -> Output {
        let mut command = command(QRELAY);
        command.args(args).arg("--control").arg(self.path("control-socket"));
        command.stdin(Stdio::null()).output().expect("the binary runs")
    }

    /// Returns what `qrelay status --json` says.
    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        let output = self.command(&["status", "--json"]);
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    /// Returns the process id of the supervisor.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Returns the path of `name` in the daemon's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.site.path(name)
    }

    /// Returns the messages of the daemon to the service manager.
    pub fn notify(&self) -> &Notify {
        &self.notify
    }

    /// Sends a signal to the supervisor.
    pub fn signal(&self, signal: Signal) {
        processes::signal(self.pid(), signal);
    }

    /// Sends SIGHUP, waits until the reload is over, and returns the status that the daemon reports
    /// then.
    #[track_caller]
    pub fn reload_status(&self) -> String {
        let mark = self.notify.mark();
        self.signal(Signal::SIGHUP);
        self.notify.after(mark, "RELOADING=1", |line| line == "RELOADING=1");
        self.notify.after(mark, "READY=1 after RELOADING=1", |line| line == "READY=1");
        self.notify.after(mark, "the status", |line| line.starts_with("STATUS=")).text
    }

    /// Sends SIGHUP, waits until the reload is over, and returns whether it worked.
    #[track_caller]
    pub fn reload(&self) -> bool {
        !self.reload_status().contains("failed")
    }

    /// Returns all log lines so far.
    pub fn text(&self) -> String {
        self.log.all().join("\n")
    }

    /// Returns all log lines of a daemon that has ended, including those still in the pipe.
    pub fn complete_text(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("log reader");
        }
        self.text()
    }

    /// Waits for a log line that contains `part`, and returns the line.
    #[track_caller]
    pub fn wait_for_log(&self, part: &str) -> String {
        self.wait_for_log_within(part, PATIENCE)
    }

    /// Like [`Self::wait_for_log`], for a line that takes its time.
    #[track_caller]
    pub fn wait_for_log_within(&self, part: &str, timeout: Duration) -> String {
        let found = self
            .log
            .wait_for(timeout, |lines| lines.iter().find(|line| line.contains(part)).cloned());
        match found {
            Some(line) => line,
            None => panic!("no {part:?} in the log:\n{}", self.text()),
        }
    }

    /// Returns the number of log lines that contain `part`.
    pub fn count_log(&self, part: &str) -> usize {
        self.log.all().iter().filter(|line| line.contains(part)).count()
    }

    /// Returns the pids of the workers, including those of draining generations.
    pub fn workers(&self) -> Vec<i32> {
        processes::children_named(self.pid(), "qrelay-worker")
    }

    /// Returns the pids of the zygotes and their standbys.
    pub fn zygotes(&self) -> Vec<i32> {
        processes::children_named(self.pid(), "qrelay-zygote")
    }

    /// Returns all processes of this daemon, including orphans.
    pub fn processes(&self) -> Vec<Process> {
        processes::tagged(&self.tag)
    }

    /// Waits until there are exactly `count` workers, none of which is in `not`, and returns their
    /// pids.
    #[track_caller]
    pub fn wait_for_workers(&self, count: usize, not: &[i32]) -> Vec<i32> {
        eventually("the workers", || {
            let workers = self.workers();
            let new = workers.iter().all(|pid| !not.contains(pid));
            (new && workers.len() == count).then_some(workers)
        })
    }

    /// Returns the number of open descriptors of the supervisor.
    pub fn fd_count(&self) -> usize {
        processes::descriptors(self.pid()).len()
    }

    /// Returns the number of open descriptors of an idle supervisor with this many workers. The
    /// daemon counts as idle when all its processes are there, no worker relays, and five checks in
    /// a row have found the same number.
    #[track_caller]
    pub fn idle_fd_count(&self, workers: usize) -> usize {
        let mut seen = Vec::new();
        eventually("an idle daemon", || {
            let there = self.workers();
            let idle = there.iter().all(|&worker| processes::relaying(worker) == 0);
            let complete = there.len() == workers && self.zygotes().len() == 2;
            seen.push(self.fd_count());
            if !(idle && complete) || seen.first() != seen.last() {
                seen.clear();
            }
            (seen.len() == 5).then(|| seen[0])
        })
    }

    /// Returns the exit status of the supervisor if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait")
    }

    /// Waits until the supervisor ends, and returns its exit status.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        eventually("the daemon's exit", || self.child.try_wait().expect("wait"))
    }

    /// Waits until the supervisor ends, for `timeout` at most, and returns its exit status.
    pub fn exit_within(&mut self, timeout: Duration) -> Option<ExitStatus> {
        within(timeout, || self.child.try_wait().expect("wait"))
    }

    /// Sends SIGTERM, waits for a clean end, and checks that no process and no socket is left.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait_exit();
        assert_eq!(status.code(), Some(0), "exit status; log:\n{}", self.text());
        self.assert_nothing_left();
    }

    /// Checks that no process of the daemon lives, and that none of its socket files is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let none = within(PATIENCE, || self.processes().is_empty().then_some(()));
        assert!(none.is_some(), "processes left: {:?}", self.processes());
        let sockets: Vec<_> = self
            .site
            .leftovers()
            .into_iter()
            .filter(|name| is_socket(&self.site.path(name)) && !name.starts_with("out"))
            .collect();
        assert_eq!(sockets, Vec::<String>::new(), "sockets left");
    }
}

/// Returns whether there is a socket file at `path`.
pub fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for _ in 0..100 {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            left.iter().for_each(|process| processes::signal(process.pid, Signal::SIGKILL));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the daemon ---\n{}\n---", self.text());
            eprintln!("--- notices --- {:?}", self.notify.all());
        }
    }
}

/// Runs the binary with these arguments and an empty stdin, and returns its output when it has
/// ended.
pub fn run(args: &[&str]) -> Output {
    command(QRELAY).args(args).stdin(Stdio::null()).output().expect("the binary runs")
}

/// Submits an empty mail by `qrelay send` as the user nobody, and returns the output when the
/// command has ended.
pub fn send_as_nobody(to: &Path, sender: &str) -> Output {
    send_message_as_nobody(to, sender, Stdio::null())
}

/// Submits a message like [`send_as_nobody`].
pub fn send_message_as_nobody(to: &Path, sender: &str, message: impl Into<Stdio>) -> Output {
    command(QRELAY)
        .args(["send", "--sender", sender, "recipient@example.org", "--to"])
        .arg(to)
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(message)
        .output()
        .expect("runs as another user")
}

/// Uid and gid of nobody and nogroup in Debian.
pub const NOBODY: u32 = 65534;
