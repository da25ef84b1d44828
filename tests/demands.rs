//! What the end-to-end tests demand of the machine, checked before any of them runs: root, control
//! groups, namespaces, /dev/fuse, and the packages of tests/packages.
//!
//! Contract: `cargo test` runs the test programs of the package `qrelay` in the order of their
//! names, `demands` before `e2e`, and stops after the first program that fails. If something is
//! missing, one message names all of it and says what to run.
//!
//! # Failure
//! The exit status is 1 if something is missing. If tests were chosen by name, the message is only
//! printed, because the chosen tests may need nothing of what is missing.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::unistd::{AccessFlags, access, geteuid};

/// The list of packages.
const PACKAGES: &str = include_str!("packages");

/// Mounts what the machine of the unit's tests has as its root directory.
const OVERLAY: &str = "mount -t tmpfs none /tmp && mkdir /tmp/upper /tmp/work &&
    mount -t overlay none /mnt -o lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    let lacking = lacking();
    if lacking.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("{}", message(&lacking));
    let all_chosen = arguments.iter().all(|argument| argument.starts_with('-'));
    ExitCode::from(u8::from(all_chosen))
}

/// Describes each thing that this machine lacks.
fn lacking() -> Vec<String> {
    let mut lacking = Vec::new();
    if geteuid().is_root() {
        lacking.extend(system());
    } else {
        lacking.push(
            "root: the tests have clients of other users, control groups, namespaces".to_owned(),
        );
    }
    for (package, known_by) in packages() {
        lacking.push(format!("the package {package}: {}", known_by.join(", ")));
    }
    lacking
}

/// Describes what the kernel withholds even from root, as it may in a container.
fn system() -> Vec<String> {
    let mut lacking = Vec::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let cgroup = mounts.lines().find(|line| line.contains(" - cgroup2 "));
    let mount_point = cgroup.and_then(|line| line.split(' ').nth(4));
    if mount_point.is_none_or(|path| access(path, AccessFlags::W_OK).is_err()) {
        lacking.push("a cgroup2 file system that can be written".to_owned());
    }
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--net", "--cgroup", "--pid", "--fork", "true"]);
    if !unshare.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success()) {
        lacking.push("namespaces of mounts, networks, control groups and processes".to_owned());
    }
    let mut overlay = Command::new("unshare");
    overlay.args(["--mount", "sh", "-c", OVERLAY]);
    if !overlay.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success()) {
        lacking.push("an overlay file system over the root directory".to_owned());
    }
    if access("/dev/fuse", AccessFlags::R_OK | AccessFlags::W_OK).is_err() {
        lacking.push("/dev/fuse, for a file whose server is slow (`modprobe fuse`)".to_owned());
    }
    lacking
}

/// Lists the packages for the tests that aren't there, each with what was looked for.
fn packages() -> BTreeMap<&'static str, Vec<&'static str>> {
    let mut missing = BTreeMap::<_, Vec<_>>::new();
    for line in PACKAGES.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<_> = line.split_whitespace().collect();
        if let [known_by, "tests", package] = words[..]
            && !is_there(known_by)
        {
            missing.entry(package).or_default().push(known_by);
        }
    }
    missing
}

/// Whether there is such a file, or such a command in one of the directories for commands.
fn is_there(known_by: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    // An absolute path stays what it is.
    env::split_paths(&path).any(|directory| directory.join(Path::new(known_by)).exists())
}

/// Says what is missing and what to run.
fn message(lacking: &[String]) -> String {
    let mut text = "\nThe end-to-end tests need what this machine lacks:\n\n".to_owned();
    for what in lacking {
        let _ = writeln!(text, "  - {what}");
    }
    text + "
What to run:

  tests/run packages                      as root on Debian or Ubuntu: installs the packages
  tests/run                               the same, and then all tests and checks
  cargo test --workspace --lib            the unit tests alone, which need none of this
  cargo test --workspace --no-fail-fast   all tests; those that need what is missing fail

docs/development.md says which tests need root, and why.\n"
}
