//! The examples in the documentation: every `lua` block on every page, and every script in
//! docs/examples.
//!
//! A block is a script, or a part of one that runs while it is loaded. A block that listens is
//! served: one mail goes through each of its sockets and must be accepted, unless `reply=D` or
//! `reply=Z` after `lua` says otherwise. A block that doesn't listen is run by `qrelay check`. `lua
//! handler` marks the body of a handler, with the mail as `m`. `lua sendmail` marks a script that
//! hands the mail to sendmail. A failed assertion in a block makes the reply `Z`, or the check
//! fail.
//!
//! The tests replace what a block names outside of itself, so that it can run on any machine.
//! /run/cm4all/qrelay and /etc/cm4all/qrelay become a temporary directory. Strings that begin with
//! 192.0.2. or [2001:db8: (the networks for documentation, RFC 5737 and RFC 3849) become a next hop
//! that accepts everything. A port on 127.0.0.1 becomes a free port. /usr/sbin/sendmail becomes a
//! program of the tests that keeps what it gets.
//!
//! A block of `console` with `qrelay try` or `qrelay check` in it is typed into a shell: each line
//! after `$ `, in a directory where the last script before the block is config.lua, and where the
//! file mail has a mail. The other lines are what standard output and standard error must show
//! together. In such a line `…` stands for any text: what is different in each run, such as times
//! and signatures.
//!
//! Blocks that use `pg:` run with a database server of the tests. The `sql` blocks of all pages
//! have been run in its database.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use crate::harness::daemon::{QRELAY, command, is_socket};
use crate::harness::postgres::Cluster;
use crate::harness::{Mail, Sink, Site, Target, submit};

/// Number of blocks that run at the same time; most of their time is waiting.
const AT_ONCE: usize = 4;

/// A piece of Lua and its expected reply.
#[derive(Debug)]
struct Block {
    /// File and line of the block, for error messages.
    place: String,
    source: String,
    /// Expected first letter of the reply.
    reply: char,
    /// The mail is handed to sendmail.
    sendmail: bool,
}

/// Commands for a shell, and what they show.
#[derive(Debug)]
struct Console {
    /// File and line of the block, for error messages.
    place: String,
    /// The script that the commands are about.
    script: String,
    lines: Vec<String>,
}

/// The mail of the examples.
const MAIL: &str = "From: alice@example.com\nSubject: A test\n\nHello, Bob.\n";

#[test]
fn every_block_of_the_documentation_runs() {
    let (mut blocks, mut consoles) = (Vec::new(), Vec::new());
    for page in pages() {
        read(&page, &mut blocks, &mut consoles);
    }
    assert!(blocks.len() > 20, "only {} blocks were found", blocks.len());
    assert!(consoles.len() > 10, "only {} blocks of console were found", consoles.len());
    let database = database(&blocks);
    let failed = all(&blocks, |block| &block.place, |block| check(block, &database));
    assert!(failed.is_empty(), "these blocks don't do what they say: {failed:#?}");
    let failed = all(&consoles, |console| &console.place, |console| type_in(console, &database));
    assert!(failed.is_empty(), "these commands don't show what they should: {failed:#?}");
}

/// Does something with each item, several at a time. Returns the names of items that failed.
fn all<T: Sync>(
    items: &[T],
    name: impl Fn(&T) -> &String + Sync,
    run: impl Fn(&T) + Sync,
) -> Vec<String> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if catch_unwind(AssertUnwindSafe(|| run(item))).is_err() {
                        failed.lock().expect("lock").push(name(item).clone());
                    }
                }
            });
        }
    });
    failed.into_inner().expect("lock")
}

#[test]
fn every_example_relays_a_mail() {
    let scripts = files_below(&root().join("docs/examples"), "lua");
    assert!(!scripts.is_empty());
    for script in scripts {
        let source = fs::read_to_string(&script).expect("example");
        let block =
            Block { place: script.display().to_string(), source, reply: 'K', sendmail: false };
        let database = database(std::slice::from_ref(&block));
        serve(&block, &database);
    }
}

/// A database server, if any block uses one, and the environment variables by which blocks find it.
struct Database {
    environment: Vec<(&'static str, String)>,
    _cluster: Option<Cluster>,
}

fn database(blocks: &[Block]) -> Database {
    if !blocks.iter().any(|block| block.source.contains("pg:")) {
        return Database { environment: Vec::new(), _cluster: None };
    }
    let cluster = Cluster::start(&[]);
    cluster.psql("CREATE DATABASE foo");
    for page in pages() {
        let text = fs::read_to_string(page).expect("page");
        for part in text.split("```sql\n").skip(1) {
            cluster.psql_in("foo", part.split("```").next().expect("the block's end"));
        }
    }
    let environment = vec![
        ("PGHOST", cluster.dir().display().to_string()),
        ("PGPORT", cluster.port().to_string()),
        ("PGUSER", "postgres".to_owned()),
    ];
    Database { environment, _cluster: Some(cluster) }
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn pages() -> Vec<PathBuf> {
    let mut pages = files_below(&root().join("docs"), "md");
    pages.push(root().join("README.md"));
    pages
}

fn files_below(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("directory") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            found.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|own| own == extension) {
            found.push(path);
        }
    }
    found
}

/// Finds the blocks of a page.
fn read(page: &Path, blocks: &mut Vec<Block>, consoles: &mut Vec<Console>) {
    let text = fs::read_to_string(page).expect("page");
    let before = blocks.len();
    let runs = |line: &&str| line.contains("qrelay try ") || line.contains("qrelay check ");
    let mut lines = text.lines().zip(1..);
    while let Some((line, number)) = lines.next() {
        let Some(info) = line.strip_prefix("```").filter(|_| line.len() > 3) else { continue };
        let body: Vec<_> =
            lines.by_ref().map(|(line, _)| line).take_while(|line| *line != "```").collect();
        let place = format!("{}:{number}", page.display());
        let mut words = info.split_whitespace();
        match words.next() {
            Some("lua") => blocks.push(block(place, body.join("\n"), words)),
            Some("console") if body.iter().any(runs) => {
                let script = blocks[before..].last().expect("a script before the commands");
                let script = script.source.clone();
                let lines = body.into_iter().map(str::to_owned).collect();
                consoles.push(Console { place, script, lines });
            }
            _ => {}
        }
    }
}

/// Runs the commands of a block, and compares what they show.
fn type_in(console: &Console, database: &Database) {
    let site = Site::with(&in_directory(&console.script));
    fs::write(site.path("mail"), MAIL).expect("mail");
    let directory = site.dir().to_str().expect("UTF-8");
    let binaries = Path::new(QRELAY).parent().expect("a directory").display();
    let path = format!("{binaries}:{}", std::env::var("PATH").expect("PATH"));
    let mut lines = console.lines.iter().peekable();
    while let Some(line) = lines.next() {
        let typed = line.strip_prefix("$ ").expect("a command");
        let typed = in_directory(typed).replace("$DIR", directory);
        let mut shell = command("sh");
        shell.args(["-c", &format!("exec 2>&1; {typed}")]).current_dir(site.dir());
        shell.env("PATH", &path).envs(database.environment.clone());
        let output = shell.stdin(Stdio::null()).output().expect("a shell");
        let shown = String::from_utf8_lossy(&output.stdout);
        let shown = shown.replace(directory, "/run/cm4all/qrelay");
        let mut expected = Vec::new();
        while let Some(line) = lines.next_if(|line| !line.starts_with("$ ")) {
            expected.push(line.as_str());
        }
        let same = shown.lines().count() == expected.len()
            && shown.lines().zip(&expected).all(|(shown, expected)| matches(expected, shown));
        assert!(same, "{}: {typed}\nshows\n{shown}", console.place);
    }
}

/// Whether a line is the expected one, in which `…` stands for any text.
fn matches(expected: &str, shown: &str) -> bool {
    match expected.split_once('…') {
        None => expected == shown,
        Some((before, after)) => {
            let rest = shown.strip_prefix(before);
            rest.is_some_and(|rest| {
                let mut ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
                ends.any(|at| matches(after, &rest[at..]))
            })
        }
    }
}

#[test]
fn an_ellipsis_stands_for_any_text() {
    for (expected, shown, same) in [
        ("a b", "a b", true),
        ("a b", "a c", false),
        ("a …", "a b c", true),
        ("a … c", "a b c", true),
        ("a … c … e", "a b c d e", true),
        ("a … c", "a b d", false),
        ("a …", "b", false),
    ] {
        assert_eq!(matches(expected, shown), same, "{expected} {shown}");
    }
}

fn block<'a>(place: String, mut source: String, words: impl Iterator<Item = &'a str>) -> Block {
    let (mut reply, mut sendmail) = ('K', false);
    for word in words {
        match (word, word.strip_prefix("reply=").and_then(|letter| letter.chars().next())) {
            ("handler", _) => {
                source = format!(
                    "qmqp_listen('/run/cm4all/qrelay/qrelay.sock', function(m)\n{source}\nend)"
                );
            }
            ("sendmail", _) => sendmail = true,
            (_, Some(letter)) => reply = letter,
            _ => panic!("{place}: unknown word '{word}' after lua"),
        }
    }
    Block { place, source, reply, sendmail }
}

fn check(block: &Block, database: &Database) {
    if block.source.contains("qmqp_listen(") {
        serve(block, database);
    } else {
        load(block, database);
    }
}

/// Runs a part of a script that declares no listener.
fn load(block: &Block, database: &Database) {
    let listener = "qmqp_listen('$DIR/qrelay.sock', function(m) return m:discard() end)";
    let site = Site::with(&format!("{}\n{listener}\n", in_directory(&block.source)));
    let config = site.path("config.lua");
    let mut command = command(QRELAY);
    command.args(["check", "--config"]).arg(config).envs(database.environment.clone());
    let output = command.stdin(Stdio::null()).output().expect("the binary runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", block.place);
}

/// Runs a script and sends a mail through each of its sockets.
fn serve(block: &Block, database: &Database) {
    let site = Site::new();
    let sendmail = Sendmail::new();
    let next_hop = site.path("next.sock");
    let sink = Sink::answering(next_hop.clone(), "Kok");
    site.configure(&relocated(&block.source, &next_hop, &sendmail.program));
    let directory = site.dir().to_str().expect("UTF-8").to_owned();
    let mut launch = site.launch().env("QRELAY_DIR", &directory);
    for (name, value) in &database.environment {
        launch = launch.env(name, value);
    }
    let daemon = launch.ready();
    let mut mail = Mail::new("Hello, Bob.").from("alice@example.com").to(&["bob@example.org"]);
    mail.message = MAIL.into();
    let sockets: Vec<_> = files_below(daemon.site().dir(), "sock")
        .into_iter()
        .filter(|path| is_socket(path) && *path != next_hop)
        .collect();
    assert!(!sockets.is_empty(), "{}: the script listens on no path", block.place);
    for socket in sockets {
        let reply = submit(socket, &mail).to_string();
        assert!(reply.starts_with(block.reply), "{}: {reply}\n{}", block.place, daemon.text());
    }
    if block.sendmail {
        sendmail.assert_got(&["-i", "-f", "alice@example.com", "--", "bob@example.org"], &mail);
    }
    drop(sink);
}

/// A program in sendmail's place, which writes its arguments and its input into files.
struct Sendmail {
    directory: TempDir,
    program: PathBuf,
}

impl Sendmail {
    /// Creates the program below target/, because programs may be forbidden in the machine's
    /// directory for temporary files.
    fn new() -> Self {
        let directory = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("directory");
        let program = directory.path().join("sendmail");
        let script = "#!/bin/sh\nprintf '%s\\n' \"$@\" >\"$0.arguments\"\ncat >\"$0.message\"\n";
        fs::write(&program, script).expect("program");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("mode");
        Self { directory, program }
    }

    fn kept(&self, what: &str) -> Vec<u8> {
        let path = self.directory.path().join(format!("sendmail.{what}"));
        fs::read(path).expect("the program has run")
    }

    /// Checks that the program has been run with these arguments and this mail.
    #[track_caller]
    fn assert_got(&self, arguments: &[&str], mail: &Mail) {
        let got = String::from_utf8(self.kept("arguments")).expect("UTF-8");
        assert_eq!(got.lines().collect::<Vec<_>>(), arguments);
        let got = self.kept("message");
        assert!(got.starts_with(b"Received: ") && got.ends_with(&mail.message), "{got:?}");
    }
}

/// Returns the script with directories that exist on this machine.
fn in_directory(source: &str) -> String {
    source.replace("/run/cm4all/qrelay", "$DIR").replace("/etc/cm4all/qrelay", "$DIR")
}

/// Returns the script with addresses and programs that exist on this machine.
fn relocated(source: &str, next_hop: &Path, sendmail: &Path) -> String {
    let sendmail = sendmail.to_str().expect("UTF-8");
    let source = in_directory(source).replace("/usr/sbin/sendmail", sendmail);
    let mut parts = source.split('\'');
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        result.push('\'');
        if part.starts_with("192.0.2.") || part.starts_with("[2001:db8:") {
            result.push_str(next_hop.to_str().expect("UTF-8"));
        } else if part.starts_with("127.0.0.1:") {
            result.push_str(&Target::free_port().to_string());
        } else {
            result.push_str(part);
        }
    }
    result
}
