//! `qrelay send --file`: many mails, what is told about each, and the exit status of all; and a
//! standard input that can't be read.

use std::fs::{self, File};
use std::io::Read;
use std::process::{Command, Output, Stdio};

use crate::harness::daemon::{QRELAY, command};
use crate::harness::sink::answer;
use crate::harness::{Reply, Sink, Site};

/// Writes a message into a file of its own for each text.
fn files(site: &Site, texts: &[&str]) {
    for (number, text) in texts.iter().enumerate() {
        let message = format!("Subject: {number}\r\n\r\n{text}\n.\n");
        fs::write(site.path(&format!("{number}.eml")), message).expect("file");
    }
}

/// Returns a command that sends these files to the socket `out`.
fn send(site: &Site, files: &[&str]) -> Command {
    let mut command = command(QRELAY);
    command
        .args(["send", "--sender", "s@x", "a@x", "b@x", "--file"])
        .args(files)
        .arg("--to")
        .arg(site.path("out"))
        .current_dir(site.dir())
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Starts a next hop that answers with the last word of the message.
fn obedient(site: &Site) -> Sink {
    Sink::start(
        site.path("out"),
        answer(|mail| {
            let message = text(&mail.message);
            Reply::text(message.lines().rev().nth(1).expect("lines"))
        }),
    )
}

#[track_caller]
fn outcome(output: &Output, code: i32, summary: &str, told: &[&str]) {
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert_eq!(text(&output.stdout), format!("{summary}\n"), "{errors}");
    let lines: Vec<_> = errors.lines().collect();
    let told: Vec<_> = told.iter().map(|line| format!("qrelay send: {line}")).collect();
    assert_eq!(lines, told);
}

#[test]
fn sends_each_file_unchanged() {
    let site = Site::new();
    files(&site, &["Kok", "Kok", "Kok"]);
    let sink = obedient(&site);
    let output = send(&site, &["2.eml", "0.eml", "1.eml"]).output().expect("runs");
    outcome(&output, 0, "3 accepted", &[]);
    let mails = sink.mails();
    assert_eq!(mails.len(), 3);
    for (mail, name) in mails.iter().zip(["2.eml", "0.eml", "1.eml"]) {
        assert_eq!(mail.message, fs::read(site.path(name)).expect("file"));
        assert_eq!((&mail.sender[..], mail.recipients.len()), (&b"s@x"[..], 2));
    }
}

#[test]
fn tells_what_was_not_accepted() {
    let site = Site::new();
    files(&site, &["Kok", "Zbusy\x1b", "Dnever", "garbage"]);
    let sink = obedient(&site);
    let busy = "1.eml: refused for now: busy?";
    let never = "2.eml: refused for good: never";
    let missing = "x.eml: No such file or directory";
    let directory = ".: Is a directory";
    for (files, code, summary, told) in [
        (&["0.eml", "1.eml"][..], 75, "1 accepted, 1 refused for now", &[busy][..]),
        (
            &["2.eml", "1.eml", "0.eml"],
            69,
            "1 accepted, 1 refused for now, 1 refused for good",
            &[never, busy],
        ),
        (
            &["x.eml", "2.eml", ".", "0.eml"],
            66,
            "1 accepted, 1 refused for good, 2 unreadable",
            &[missing, never, directory],
        ),
        (&["x.eml"], 66, "0 accepted, 1 unreadable", &[missing]),
    ] {
        outcome(&send(&site, files).output().expect("runs"), code, summary, told);
    }
    let output = send(&site, &["3.eml", "0.eml"]).output().expect("runs");
    let told = format!("3.eml: {} answered something that isn't QMQP", site.path("out").display());
    outcome(&output, 75, "1 accepted, 1 refused for now", &[&told]);
    assert_eq!(sink.mails().len(), 2 + 3 + 2 + 2);
}

#[test]
fn without_a_server_the_rest_is_not_tried() {
    let site = Site::new();
    files(&site, &["Kok", "Kok", "Kok"]);
    let output = send(&site, &["0.eml", "1.eml", "2.eml"]).output().expect("runs");
    let told = format!(
        "0.eml: can't connect to {}: No such file or directory (is qrelay running, and is this its \
         socket?)",
        site.path("out").display()
    );
    outcome(&output, 75, "0 accepted, 1 refused for now, 2 not tried", &[&told]);
}

/// Runs the command with a terminal as its stderr, and returns what the terminal got.
fn on_terminal(command: &mut Command) -> String {
    let pty = nix::pty::openpty(None, None).expect("terminal");
    let child = command.env("TERM", "xterm").stdout(Stdio::null()).stderr(pty.slave).spawn();
    let mut child = child.expect("runs");
    // The command still holds the other end.
    *command = Command::new("true");
    let (mut shown, mut chunk) = (Vec::new(), [0; 4096]);
    let mut terminal = File::from(pty.master);
    while let Ok(count @ 1..) = terminal.read(&mut chunk) {
        shown.extend_from_slice(&chunk[..count]);
    }
    child.wait().expect("ends");
    text(&shown)
}

#[test]
fn a_terminal_shows_a_bar() {
    let site = Site::new();
    files(&site, &["Kok", "Zbusy", "Kok"]);
    let _sink = obedient(&site);
    let shown = on_terminal(&mut send(&site, &["0.eml", "1.eml", "2.eml"]));
    assert!(shown.contains(" of 3, "), "{shown:?}");
    assert!(shown.contains("qrelay send: 1.eml: refused for now: busy\r\n"), "{shown:?}");
    let alone = on_terminal(&mut send(&site, &["0.eml"]));
    assert_eq!(alone, "");
}

#[test]
fn an_input_that_cannot_be_read_is_not_an_empty_message() {
    let site = Site::new();
    let sink = Sink::answering(site.path("out"), "Kok");
    let write_only = File::create(site.path("file")).expect("opens");
    let mut send = command(QRELAY);
    send.args(["send", "--sender", "s@x", "r@x", "--to"]).arg(site.path("out"));
    let output = send.stdin(write_only).output().expect("runs");
    assert_eq!(output.status.code(), Some(75), "{output:?}");
    assert!(text(&output.stderr).contains("Bad file descriptor"), "{output:?}");
    assert!(sink.mails().is_empty());
}

#[test]
fn recipients_are_needed() {
    for arguments in [&["--file", "0.eml"][..], &["a@x", "--file"]] {
        let mut send = command(QRELAY);
        let output = send.args(["send", "--sender", "s@x"]).args(arguments).output().expect("runs");
        assert_eq!(output.status.code(), Some(64), "{arguments:?}");
    }
}
