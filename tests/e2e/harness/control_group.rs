//! Real control groups, which are removed when they are dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::daemon::QRELAY;
use super::record::{PATIENCE, within};

/// Returns the mount point of cgroup2 on this machine.
pub fn mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 "));
    line.expect("cgroup2 is mounted").split(' ').nth(4).expect("mount point").into()
}

/// Sets an extended attribute of a control group.
pub fn set_attribute(group: &Path, name: &str, value: &str) {
    let mut command = Command::new("setfattr");
    command.args(["-n", name, "-v", value]).arg(group);
    assert!(command.status().expect("setfattr").success(), "{name}");
}

/// A control group.
#[derive(Debug)]
pub struct Group {
    pub directory: PathBuf,
}

impl Group {
    pub fn new() -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let number = SERIAL.fetch_add(1, Ordering::Relaxed);
        let directory = mount().join(format!("qrelay-test-{}-{number}", std::process::id()));
        fs::create_dir(&directory).expect("cgroup (as root)");
        Self { directory }
    }

    pub fn below(&self, name: &str) -> Self {
        let directory = self.directory.join(name);
        fs::create_dir(&directory).expect("cgroup");
        Self { directory }
    }

    /// Returns the path as /proc/PID/cgroup shows it to processes in the same cgroup namespace.
    pub fn path(&self) -> String {
        let relative = self.directory.strip_prefix(mount()).expect("below the mount");
        format!("/{}", relative.display())
    }

    /// Returns the path of cgroup.procs; a process that writes 0 into that file joins the group.
    pub fn procs(&self) -> String {
        self.directory.join("cgroup.procs").display().to_string()
    }

    pub fn set(&self, name: &str, value: &str) {
        set_attribute(&self.directory, name, value);
    }

    /// Returns a command that runs in this group; the caller adds program and arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(self.procs());
        command
    }

    /// Submits a mail from within the group, and returns the text of the reply.
    pub fn submit(&self, to: &Path) -> String {
        let mut command = self.command();
        command.arg(QRELAY).arg("send").arg("--to").arg(to);
        command.args(["--sender", "a@example.com", "b@example.org"]);
        let output = command.stdin(Stdio::null()).output().expect("send");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// Removes all groups below this one that are empty. Returns whether none is left.
    pub fn remove_below(&self) -> bool {
        remove_below(&self.directory)
    }
}

fn remove_below(group: &Path) -> bool {
    let entries = fs::read_dir(group).into_iter().flatten().flatten().map(|entry| entry.path());
    let groups: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    let removed = |group: &PathBuf| remove_below(group) && fs::remove_dir(group).is_ok();
    groups.iter().filter(|group| !removed(group)).count() == 0
}

impl Drop for Group {
    fn drop(&mut self) {
        let removed = within(PATIENCE, || fs::remove_dir(&self.directory).ok());
        if removed.is_none() && !std::thread::panicking() {
            panic!("{} can't be removed", self.directory.display());
        }
    }
}
