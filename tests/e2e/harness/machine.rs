//! A machine with a real systemd as process 1, in namespaces, which starts qrelay by the units in
//! systemd/. Nothing of the units is changed, so what they restrict is restricted.
//!
//! Contract: the machine has this machine's network, so next hops and servers of the test can be
//! reached. Its files are an overlay in memory over this machine's. Dropping the machine ends all
//! its processes.
//!
//! # Failure
//! A machine that doesn't start fails the test with what it wrote to stderr.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use super::control_group::Group;
use super::daemon::QRELAY;
use super::processes;
use super::record::{PATIENCE, within};

const SCRIPT: &str = include_str!("machine.sh");

/// The directory of the units.
pub const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd");

/// The name of the service.
pub const SERVICE: &str = "cm4all-qrelay.service";

const CONFIG: &str = "/etc/cm4all/qrelay/config.lua";

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    init: i32,
    group: Group,
    /// The machine mounts its files here, in its own namespace.
    _directory: TempDir,
}

impl Machine {
    /// Starts a machine with this config.lua and a journal. qrelay doesn't run yet.
    #[track_caller]
    pub fn boot(config: &str) -> Self {
        let directory = TempDir::with_prefix("qrelay-machine-").expect("temporary directory");
        let group = Group::new();
        let mut command = group.command();
        command.args(["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--uts"]);
        command.args(["--ipc", "--cgroup", "--fork", "--kill-child", "sh", "-c", SCRIPT, "sh"]);
        command.arg(directory.path()).args([UNITS, QRELAY]).process_group(0);
        let stderr = directory.path().with_extension("stderr");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(&stderr).expect("file"));
        let mut child = command.spawn().expect("unshare runs");
        let pid = child.id().cast_signed();
        let init = within(PATIENCE, || {
            if child.try_wait().expect("wait").is_some() {
                return Some(None);
            }
            let children = processes::children(pid);
            let init = children.iter().find(|process| process.name == "systemd")?.pid;
            let serves = format!("/proc/{init}/root/run/systemd/private");
            Path::new(&serves).exists().then_some(Some(init))
        });
        let said = fs::read_to_string(&stderr).unwrap_or_default();
        let _ = fs::remove_file(&stderr);
        let init = init.flatten().unwrap_or_else(|| panic!("systemd doesn't start: {said}"));
        let machine = Self { child, init, group, _directory: directory };
        machine.write(CONFIG, config);
        machine.succeed(&["systemctl", "start", "systemd-journald.service"]);
        machine
    }

    /// Returns the path by which this machine reaches a file of that one.
    pub fn path(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root{path}", self.init).into()
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("directory")).expect("directory");
        fs::write(path, text).expect("file");
    }

    /// Replaces config.lua.
    pub fn configure(&self, config: &str) {
        self.write(CONFIG, config);
    }

    /// Adds a drop-in to the service; an empty text takes it away. [`Machine::restart`] applies it.
    pub fn drop_in(&self, text: &str) {
        self.write(&format!("/etc/systemd/system/{SERVICE}.d/test.conf"), text);
    }

    /// Runs a command as root in the machine.
    pub fn run(&self, command: &[&str]) -> Output {
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &self.init.to_string(), "--mount", "--pid", "--uts", "--ipc"]);
        enter.args(["--cgroup", "--wd=/"]).args(command);
        enter.stdin(Stdio::null()).output().expect("nsenter runs")
    }

    /// Runs a command as root in the machine, and returns what the command printed.
    #[track_caller]
    pub fn succeed(&self, command: &[&str]) -> String {
        let output = self.run(command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {said}{}", self.journal());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Reads all units again and starts the service anew. Returns whether it starts.
    pub fn restart(&self) -> bool {
        self.succeed(&["systemctl", "daemon-reload"]);
        self.succeed(&["systemctl", "stop", SERVICE]);
        self.run(&["systemctl", "reset-failed", SERVICE]);
        self.run(&["systemctl", "start", SERVICE]).status.success()
    }

    /// Returns a property of the service.
    #[track_caller]
    pub fn property(&self, name: &str) -> String {
        self.succeed(&["systemctl", "show", "--value", "-P", name, SERVICE]).trim().to_owned()
    }

    /// Returns the value of a field in /proc/PID/status of the supervisor.
    #[track_caller]
    pub fn status(&self, name: &str) -> String {
        let path = self.path(&format!("/proc/{}/status", self.property("MainPID")));
        let text = fs::read_to_string(path).expect("the supervisor runs");
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.expect("a line").trim().to_owned()
    }

    /// Returns the journal's lines of the service since its last start.
    pub fn journal(&self) -> String {
        // Whatever was logged before is in the journal's files then.
        self.run(&["journalctl", "--sync"]);
        let id = self.run(&["systemctl", "show", "--value", "-P", "InvocationID", SERVICE]).stdout;
        let run = format!("_SYSTEMD_INVOCATION_ID={}", String::from_utf8_lossy(&id).trim());
        let output = self.run(&["journalctl", "--no-pager", "-o", "cat", &run]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Waits for a line of the service's journal that contains `part`, and returns it.
    #[track_caller]
    pub fn wait_for_log(&self, part: &str) -> String {
        let line = |text: String| text.lines().find(|line| line.contains(part)).map(str::to_owned);
        match within(PATIENCE, || line(self.journal())) {
            Some(line) => line,
            None => panic!("no {part:?} in the journal:\n{}", self.journal()),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // unshare takes systemd with it, and systemd all other processes.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // If this takes too long, the group says so when it is dropped.
        within(PATIENCE, || self.group.remove_below().then_some(()));
    }
}
