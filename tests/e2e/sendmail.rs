//! `qrelay sendmail`: the programs that call /usr/sbin/sendmail, as Debian has them, and every rule
//! of that interface, through a daemon to a next hop.

use std::fs::{self, File};
use std::io::{PipeReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::process::{Command, Output, Stdio};

use crate::harness::daemon::{NOBODY, QRELAY, command};
use crate::harness::processes::memory;
use crate::harness::{Daemon, Mail, Sink, Site, eventually};

/// A daemon with a next hop, and a link by the name sendmail.
struct Relay {
    daemon: Daemon,
    sink: Sink,
}

impl Relay {
    fn start() -> Self {
        Self::answering("Kok")
    }

    fn answering(answer: &str) -> Self {
        let site = Site::with(
            "qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end, {mode='0666'})",
        );
        let sink = Sink::answering(site.path("out"), answer);
        symlink(QRELAY, site.path("sendmail")).expect("link");
        Self { daemon: site.start(), sink }
    }

    fn path(&self, name: &str) -> String {
        self.daemon.path(name).to_str().expect("UTF-8").to_owned()
    }

    /// The path of sendmail.
    fn sendmail(&self) -> String {
        self.path("sendmail")
    }

    /// Returns a command that finds the daemon by the environment.
    fn program(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = command(name);
        command
            .args(arguments)
            .env("QRELAY_SOCKET", self.daemon.path("in"))
            .env("HOME", self.daemon.site().dir())
            .current_dir(self.daemon.site().dir());
        command
    }

    /// Runs sendmail with `message` on stdin.
    fn run(&self, arguments: &[&str], message: &[u8]) -> Output {
        fed(&mut self.program(&self.sendmail(), arguments), message)
    }

    /// Runs sendmail, which must accept the mail silently, and returns what the next hop has got.
    #[track_caller]
    fn sent(&self, arguments: &[&str], message: &str) -> Sent {
        let before = self.sink.mails().len();
        let output = self.run(arguments, message.as_bytes());
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
        assert_eq!(self.sink.mails().len(), before + 1);
        self.last()
    }

    /// Runs sendmail, which must send nothing.
    #[track_caller]
    fn refused(&self, arguments: &[&str], message: &[u8], code: i32, told: &str) {
        let before = self.sink.mails().len();
        let output = self.run(arguments, message);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(told), "{arguments:?}: {errors}");
        assert_eq!(self.sink.mails().len(), before, "{arguments:?}");
    }

    /// The mail that the next hop has got last.
    fn last(&self) -> Sent {
        Sent::from(self.sink.mails().pop().expect("a mail"))
    }
}

/// Runs a command with `input` on stdin.
fn fed(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    // Writing fails when the command refuses its arguments, because it doesn't read stdin then.
    let _ = child.stdin.take().expect("piped").write_all(input);
    child.wait_with_output().expect("ends")
}

#[track_caller]
fn succeeds(output: &Output) {
    assert!(output.status.success(), "{output:?}");
}

/// A mail as the next hop has got it, in parts.
#[derive(Debug)]
struct Sent {
    sender: String,
    recipients: Vec<String>,
    /// The lines of the header, without the one that the daemon adds.
    header: Vec<String>,
    body: String,
}

impl From<Mail> for Sent {
    fn from(mail: Mail) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let message = text(mail.message);
        assert!(!message.contains('\r'), "{message:?}");
        let (received, message) = message.split_once('\n').expect("lines");
        assert!(received.starts_with("Received: from PID="), "{received}");
        let (header, body) = message.split_once("\n\n").expect("header and body");
        Self {
            sender: text(mail.sender),
            recipients: mail.recipients.into_iter().map(text).collect(),
            header: header.lines().map(str::to_owned).collect(),
            body: body.to_owned(),
        }
    }
}

impl Sent {
    /// The value of the only field with this name, which must have a single line.
    #[track_caller]
    fn field(&self, name: &str) -> &str {
        let values: Vec<_> =
            self.header.iter().filter_map(|line| line.strip_prefix(&format!("{name}: "))).collect();
        let [value] = values[..] else { panic!("{name} in {:#?}", self.header) };
        value
    }

    #[track_caller]
    fn lacks(&self, text: &str) {
        assert!(!self.header.iter().any(|line| line.contains(text)), "{:#?}", self.header);
    }

    #[track_caller]
    fn is(&self, sender: &str, recipients: &[&str]) {
        assert_eq!(self.sender, sender);
        assert_eq!(self.recipients, recipients);
    }
}

#[test]
fn php() {
    let relay = Relay::start();
    let path = format!("sendmail_path={} -t -i --domain example.com", relay.sendmail());
    let script = r#"
        $headers = [
            'From' => '"Shop, Inc." <shop@example.com>', 'Cc' => 'c@example.org',
            'Bcc' => 'hidden@example.org', 'Content-Type' => 'text/plain; charset=utf-8',
        ];
        $to = 'Jörg <j@example.org>, root';
        $body = "Grüße,\r\n.\r\nthe shop";
        exit(mail($to, 'Bestellung', $body, $headers, $argv[1]) ? 0 : 1);
    "#;
    let args = ["-d", &path, "-r", script, "--", "-fbounces@example.com"];
    succeeds(&relay.program("php", &args).output().expect("php is installed"));
    let sent = relay.last();
    let recipients = ["j@example.org", "root@example.com", "c@example.org", "hidden@example.org"];
    sent.is("bounces@example.com", &recipients);
    assert_eq!(sent.field("To"), "Jörg <j@example.org>, root@example.com");
    assert_eq!(sent.field("From"), "\"Shop, Inc.\" <shop@example.com>");
    assert_eq!(sent.field("Subject"), "Bestellung");
    assert!(sent.field("Message-ID").ends_with("@example.com>"));
    assert!(sent.field("Date").ends_with(" +0000"));
    sent.lacks("hidden");
    assert_eq!(sent.body, "Grüße,\n.\nthe shop\n");
}

#[test]
fn php_learns_of_a_refusal() {
    let relay = Relay::answering("Dnot today");
    let path = format!("sendmail_path={QRELAY} sendmail -t -i");
    let script = "exit(mail('r@example.org', 's', 'b') ? 0 : 17);";
    let output = relay.program("php", &["-d", &path, "-r", script]).output().expect("php");
    assert_eq!(output.status.code(), Some(17), "{output:?}");
    let told = [output.stdout, output.stderr].concat();
    assert!(String::from_utf8_lossy(&told).contains("qrelay sendmail: not today"));
}

/// Debian's cron gives its sendmail these arguments, and this header.
#[test]
fn cron() {
    let relay = Relay::start();
    let message = "From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@box> run-parts\n\
        MIME-Version: 1.0\nX-Cron-Env: <LOGNAME=root>\n\nall is well\n";
    let options = ["-i", "-FCronDaemon", "-B8BITMIME", "-oem", "root", "--domain", "box.test"];
    let sent = relay.sent(&options, message);
    sent.is("root@box.test", &["root@box.test"]);
    assert_eq!(sent.field("From"), "root@box.test (Cron Daemon)");
    assert_eq!(sent.field("To"), "root@box.test");
    assert_eq!(sent.field("X-Cron-Env"), "<LOGNAME=root>");
    assert_eq!(sent.body, "all is well\n");
}

#[test]
fn git_send_email() {
    let relay = Relay::start();
    let git = |arguments: &[&str]| {
        let who = ["GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"].map(|name| (name, "Jörg"));
        let at = ["GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"].map(|name| (name, "j@example.com"));
        let output = relay
            .program("/usr/bin/git", arguments)
            .envs(who)
            .envs(at)
            .stdin(Stdio::null())
            .output()
            .expect("git is installed");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    git(&["init", "-q", "repository"]);
    fs::write(relay.daemon.path("repository/file"), "text\n.\n").expect("file");
    git(&["-C", "repository", "add", "file"]);
    git(&["-C", "repository", "commit", "-q", "-m", "Add a file"]);
    for how in
        [format!("--smtp-server={}", relay.sendmail()), format!("--sendmail-cmd={QRELAY} sendmail")]
    {
        let options = ["--from=j@example.com", "--to=list@example.org", "--cc=root@example.com"];
        let more =
            ["--envelope-sender=bounces@example.com", "--confirm=never", "--suppress-cc=all"];
        let command = ["-C", "repository", "send-email", "--no-signed-off-by-cc"];
        git(&[&command[..], &[&how], &options, &more, &["-1"]].concat());
        let sent = relay.last();
        sent.is("bounces@example.com", &["list@example.org", "root@example.com"]);
        assert_eq!(sent.field("Subject"), "[PATCH] Add a file");
        assert_eq!(sent.field("To"), "list@example.org");
        assert!(sent.body.contains("+text\n+.\n"), "{}", sent.body);
    }
    assert_eq!(relay.sink.mails().len(), 2);
}

#[test]
fn mutt() {
    let relay = Relay::start();
    let with = format!("set sendmail='{QRELAY} sendmail -oem -oi' copy=no");
    let name = "my_hdr From: Jörg <j@example.com>";
    let options = ["-n", "-F", "/dev/null", "-e", &with, "-e", name, "-e", "set use_envelope_from"];
    let mail = ["-s", "Grüße", "-c", "c@example.org", "-b", "hidden@example.org", "r@example.org"];
    let mut command = relay.program("mutt", &[&options[..], &mail].concat());
    succeeds(&fed(command.env("LC_ALL", "C.UTF-8"), b"one\n.\ntwo\n"));
    // mutt may end before its sendmail does.
    relay.sink.record().wait_for_count(1);
    let sent = relay.last();
    sent.is("j@example.com", &["r@example.org", "c@example.org", "hidden@example.org"]);
    assert_eq!(sent.field("To"), "r@example.org");
    assert_eq!(sent.field("Cc"), "c@example.org");
    assert_eq!(sent.field("Subject"), "=?iso-8859-1?B?R3L832U=?=");
    sent.lacks("hidden");
    assert_eq!(sent.body, "one\n.\ntwo\n");
}

#[test]
fn s_nail() {
    let relay = Relay::start();
    let with = format!("-Smta={}", relay.sendmail());
    let options = ["-:/", "-Sv15-compat", &with, "-r", "j@example.com", "-s", "hello"];
    let mail = ["-c", "c@example.org", "-b", "hidden@example.org", "r@example.org"];
    let mut command = relay.program("s-nail", &[&options[..], &mail].concat());
    succeeds(&fed(command.env("LC_ALL", "C.UTF-8"), b"one\n.\ntwo\n"));
    relay.sink.record().wait_for_count(1);
    let sent = relay.last();
    sent.is("j@example.com", &["r@example.org", "c@example.org", "hidden@example.org"]);
    assert_eq!(sent.field("To"), "r@example.org");
    assert_eq!(sent.field("Subject"), "hello");
    sent.lacks("hidden");
    assert_eq!(sent.body, "one\n.\ntwo\n");
}

#[test]
fn python() {
    let relay = Relay::start();
    let script = "\
import subprocess, sys
from email.message import EmailMessage
mail = EmailMessage()
mail['Subject'] = 'Grüße'
mail['From'] = 'Jörg <j@example.com>'
mail['To'] = ', '.join(f'Nr. {n} <r{n}@example.org>' for n in range(20))
mail['Bcc'] = 'hidden@example.org'
mail.set_content('hello\\n')
subprocess.run([sys.argv[1], '-t', '-oi'], input=mail.as_bytes(), check=True)
";
    succeeds(&relay.program("python3", &["-c", script, &relay.sendmail()]).output().expect("runs"));
    let sent = relay.last();
    assert_eq!(sent.recipients.len(), 21);
    assert_eq!(sent.recipients[19..], ["r19@example.org", "hidden@example.org"]);
    sent.lacks("hidden");
    assert_eq!(sent.body, "hello\n");
}

/// Runs sendmail as root on a machine with this name and these files in /etc.
fn on_machine(relay: &Relay, name: &str, mailname: Option<&str>, arguments: &[&str]) -> Output {
    let etc = relay.daemon.path("etc");
    let _ = fs::remove_dir_all(&etc);
    fs::create_dir(&etc).expect("directory");
    fs::write(etc.join("passwd"), "root:x:0:0::/:/bin/sh\n").expect("file");
    if let Some(mailname) = mailname {
        fs::write(etc.join("mailname"), mailname).expect("file");
    }
    let script = "printf %s \"$1\" >/proc/sys/kernel/hostname && shift &&
        mount -t tmpfs none /etc && cp etc/* /etc/ && exec ./sendmail \"$@\"";
    let before = ["--mount", "--uts", "sh", "-c", script, "sh", name];
    fed(&mut relay.program("unshare", &[&before, arguments].concat()), b"Subject: x\n\nhi\n")
}

#[test]
fn bare_addresses_get_the_domain_of_the_machine() {
    let relay = Relay::start();
    for (name, mailname, arguments, domain) in [
        ("box", None, &["root"][..], "box"),
        ("box.test", None, &["root"], "box.test"),
        ("box", Some("mail.test\n"), &["root"], "mail.test"),
        ("box", Some("no domain\n"), &["root"], "box"),
        ("box", Some("mail.test\n"), &["--domain", "given.test", "root"], "given.test"),
    ] {
        succeeds(&on_machine(&relay, name, mailname, arguments));
        let sent = relay.last();
        let root = format!("root@{domain}");
        sent.is(&root, &[&root]);
        assert_eq!(sent.field("From"), root);
        assert!(sent.field("Message-ID").ends_with(&format!("@{domain}>")));
    }
    let output = on_machine(&relay, "-", None, &["root"]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("--domain"));
}

#[test]
fn the_sender_is_the_user() {
    use std::os::unix::process::CommandExt as _;
    let relay = Relay::start();
    for (uid, name) in [(NOBODY, "nobody"), (54_321, "54321")] {
        let arguments = ["sendmail", "--domain", "x.test", "r@x"];
        let mut sendmail = relay.program(QRELAY, &arguments);
        succeeds(&fed(sendmail.uid(uid).gid(uid), b"hello\n"));
        let sent = relay.last();
        sent.is(&format!("{name}@x.test"), &["r@x"]);
        assert_eq!(sent.field("From"), format!("{name}@x.test"));
        assert_eq!(sent.body, "hello\n");
    }
}

#[test]
fn options_of_every_sendmail() {
    let relay = Relay::start();
    let ignored: &[&[&str]] = &[
        &["-oi", "-oem", "-odi", "-o7", "-om", "-om"],
        &["-i", "-i", "-bm", "-v", "-v", "-n", "-m", "-G", "-U"],
        &["-B8BITMIME", "-B", "7BIT", "-Nnever", "-N", "success,failure", "-Rhdrs", "-Venvid"],
        &["-OMaxHopCount=3", "-O", "Timeout=1m", "-h", "17", "-pESMTP:host", "-Ltag", "-Am"],
        &["-C", "/etc/mail/sendmail.cf", "-X", "/tmp/log", "-em", "-e", "m"],
    ];
    for options in ignored {
        let sent = relay.sent(&[*options, &["r@example.org"]].concat(), "Subject: x\n\nhi\n");
        assert_eq!(sent.recipients, ["r@example.org"], "{options:?}");
    }
    for sender in ["-fs@x", "-f s@x", "-rs@x", "-r s@x", "-f <s@x>", "-f A B <s@x>", "-i -fs@x"] {
        let options: Vec<_> = match sender.strip_prefix("-f ") {
            Some(value) => vec!["-f", value],
            None => sender.split(' ').collect(),
        };
        let sent = relay.sent(&[&options[..], &["r@x"]].concat(), "hi\n");
        sent.is("s@x", &["r@x"]);
        assert_eq!(sent.field("From"), "s@x");
    }
    for (sender, expected) in
        [("", ""), ("<>", ""), ("#@[]", "#@[]"), ("l-@[]", "l-@[]"), ("me", "me@d.test")]
    {
        let sent = relay.sent(&["--domain", "d.test", "-f", sender, "r@x"], "hi\n");
        sent.is(expected, &["r@x"]);
        let from = if expected == "me@d.test" { expected } else { "root@d.test" };
        assert_eq!(sent.field("From"), from);
    }
    // There is no queue to run.
    for options in [&["-q"][..], &["-q30m"], &["-q", "1h"]] {
        succeeds(&relay.run(options, b""));
    }
    let sent = relay.sent(&["-ti", "a@x", "--", "-b@x"], "To: c@x\n\n.\n");
    assert_eq!(sent.recipients, ["a@x", "-b@x", "c@x"]);
    assert_eq!(sent.body, ".\n");
}

#[test]
fn wrong_usage() {
    let relay = Relay::start();
    let mail = b"To: a@x\n\nhi\n";
    for mode in ["-bs", "-bd", "-bp", "-bv", "-bi", "-b"] {
        relay.refused(&[mode], mail, 64, "-b <MODE>");
    }
    relay.refused(&["-Z", "a@x"], mail, 64, "-Z");
    relay.refused(&["-q", "root"], mail, 64, "there is no queue");
    relay.refused(&["-q30m", "root"], mail, 64, "-q");
    relay.refused(&["-t", "-q"], mail, 64, "-q");
    relay.refused(&["-qRexample.org"], mail, 64, "there is no queue");
    relay.refused(&[], mail, 64, "no recipient");
    relay.refused(&["-i", ""], mail, 64, "no recipient");
    relay.refused(&["--domain", "a b", "root"], mail, 64, "--domain");
    relay.refused(&["--to", "", "root"], mail, 64, "--to");
}

#[test]
fn bad_addresses_and_messages() {
    let relay = Relay::start();
    for (recipient, told) in [
        ("a@x..y", "the recipient 'a@x..y' is not a mail address"),
        ("a@x, <b@x", "'<' is opened and not closed"),
        ("a b", "comma"),
        ("<>", "is empty"),
        ("a@x\nb@x", "comma"),
        ("\"a\nb\"@x", "is not a mail address"),
        ("jörg@x", "is not a mail address"),
    ] {
        relay.refused(&["ok@x", recipient], b"hi\n", 65, told);
        let header = format!("To: ok@x\nCc: {}\n\nhi\n", recipient.replace('\n', "\n "));
        relay.refused(&["-t"], header.as_bytes(), 65, "");
    }
    for sender in ["a@x\nBcc: c@x", "a b", "a@x, b@x", "a@x>", "@", "<a@x> <b@x>"] {
        relay.refused(&["-f", sender, "r@x"], b"hi\n", 65, "the sender '");
    }
    for message in ["", "hi\n", "To: \n\nhi\n", "Subject: x\nTo: undisclosed-recipients:;\n\nhi\n"]
    {
        relay.refused(&["-t"], message.as_bytes(), 65, "names no recipient");
    }
    relay.refused(&["-t"], b"To: a@x\nCc: b@x (c\n\nhi\n", 65, "the field Cc is no list");
    let many: Vec<_> = (0..1025).map(|n| format!("r{n}@x")).collect();
    relay.refused(&[&many.join(",")], b"hi\n", 65, "more than 1024 recipients");
    let sent = relay.sent(&[&many[1..].join(",")], "hi\n");
    assert_eq!(sent.recipients, many[1..]);
    let large = format!("To: a@x\n{}\nhi\n", "X: y\n".repeat(300_000));
    relay.refused(&["-t"], large.as_bytes(), 65, "header is larger than 1048576 bytes");
}

#[test]
fn a_message_that_cannot_be_read_to_its_end_is_not_sent() {
    let relay = Relay::start();
    let site = relay.daemon.site();
    // A directory; a file that isn't open for reading; memory that isn't there (EIO).
    let inputs: [(&str, Stdio); 3] = [
        ("Is a directory", File::open(site.dir()).expect("opens").into()),
        ("Bad file descriptor", File::create(site.path("out.txt")).expect("opens").into()),
        ("Input/output error", File::open("/proc/self/mem").expect("opens").into()),
    ];
    for (cause, input) in inputs {
        let mut sendmail = relay.program(&relay.sendmail(), &["-i", "r@x"]);
        let output = sendmail.stdin(input).output().expect("runs");
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(65), "{cause}: {told}");
        assert!(told.contains("isn't sent") && told.contains(cause), "{cause}: {told}");
    }
    // A terminal whose other end goes away: first the data come, then EIO.
    let pty = nix::pty::openpty(None, None).expect("terminal");
    let (master, slave) = (pty.master, File::from(pty.slave));
    (&slave).write_all(b"Subject: x\n\nhalf of a mes").expect("written");
    drop(slave);
    let mut sendmail = relay.program(&relay.sendmail(), &["-i", "r@x"]);
    let output = sendmail.stdin(Stdio::from(master)).output().expect("runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{told}");
    assert!(told.contains("Input/output error"), "{told}");
    assert_eq!(relay.sink.mails().len(), 0);
}

#[test]
fn dots_and_line_ends() {
    let relay = Relay::start();
    for (options, message, body) in [
        (&[][..], "A: b\n\none\n.\ntwo\n", "one\n"),
        (&[], "A: b\r\n\r\none\r\n.\r\ntwo\r\n", "one\n"),
        (&["-i"], "A: b\r\n\r\none\r\n.\r\ntwo\r\n", "one\n.\ntwo\n"),
        (&["-oi"], "A: b\n\n.\ntwo", ".\ntwo\n"),
        (&[], "A: b\n\n..\n.x\n", "..\n.x\n"),
        (&[], "no header\n", "no header\n"),
        (&[], "From somebody Mon\nA: b\n\nx\n", "x\n"),
    ] {
        let sent = relay.sent(&[options, &["r@x"]].concat(), message);
        assert_eq!(sent.body, body, "{message:?}");
    }
}

/// A caller that ends its message with a dot may go on, and wait for the result.
#[test]
fn a_dot_ends_the_message_before_the_input_ends() {
    let relay = Relay::start();
    let (input, mut writer): (PipeReader, _) = std::io::pipe().expect("pipe");
    let mut sendmail = relay.program(&relay.sendmail(), &["r@x"]);
    let mut child = sendmail.stdin(OwnedFd::from(input)).spawn().expect("runs");
    writer.write_all(b"Subject: x\n\nhi\n.\n").expect("written");
    let status = eventually("sendmail ends", || child.try_wait().expect("waits"));
    assert!(status.success());
    assert_eq!(relay.last().body, "hi\n");
}

#[test]
fn recipients_of_arguments_and_header() {
    let relay = Relay::start();
    let message = "From: me@x\nTo: A. B. <a@x>,\n \"C, D\" <c@x> (E)\nCc: Group: d@x, root;\n\
        bcc: blind@x\nBCC:\n hidden@x\nSubject: x\n\nTo: nobody@x\n";
    let header = ["a@x", "c@x", "d@x", "root@d.test", "blind@x", "hidden@x"];
    let sent = relay.sent(&["--domain", "d.test", "-t"], message);
    assert_eq!(sent.recipients, header);
    sent.lacks("blind@x");
    sent.lacks("hidden@x");
    assert_eq!(sent.field("Cc"), "Group: d@x, root@d.test;");
    // As with Postfix, arguments are added; each recipient counts once.
    let sent = relay.sent(&["--domain", "d.test", "-t", "z@x", "d@x, y"], message);
    assert_eq!(sent.recipients, [&["z@x", "d@x", "y@d.test", "a@x", "c@x"], &header[3..]].concat());
    // Without -t the header names nobody, and blind recipients are still nobody's business.
    let sent = relay.sent(&["Name <z@x>"], message);
    assert_eq!(sent.recipients, ["z@x"]);
    sent.lacks("blind@x");
    let sent = relay.sent(&["-t"], &format!("Resent-To: r@x\nResent-Bcc: s@x\n{message}"));
    assert_eq!(sent.recipients, ["r@x", "s@x"]);
    sent.lacks("s@x");
}

#[test]
fn names_cannot_add_fields() {
    let relay = Relay::start();
    let name = "Jörg\nBcc: evil@x\r\n\r\nbody";
    let sent = relay.sent(&["-F", name, "-f", "s@x", "r@x"], "Subject: x\n\nhi\n");
    assert_eq!(sent.recipients, ["r@x"]);
    assert_eq!(sent.header.len(), 5, "{:#?}", sent.header);
    assert_eq!(sent.body, "hi\n");
    let sent = relay.sent(&["-FA \"B\" <evil@x>", "-f", "s@x", "r@x"], "hi\n");
    assert_eq!(sent.field("From"), "\"A \\\"B\\\" <evil@x>\" <s@x>");
    let sent = relay.sent(&["-FIgnored", "-f", "s@x", "r@x"], "From: other@x\n\nhi\n");
    assert_eq!(sent.field("From"), "other@x");
}

#[test]
fn the_usual_socket_needs_no_option() {
    let relay = Relay::start();
    let script = "mount -t tmpfs none /run && mkdir -p /run/cm4all/qrelay &&
        ln -s \"$PWD/in\" /run/cm4all/qrelay/qrelay.sock && exec \"$@\"";
    for arguments in [&["sendmail", "-fs@x", "r@x"][..], &["send", "--sender", "s@x", "r@x"]] {
        let before = ["--mount", "sh", "-c", script, "sh", QRELAY];
        let mut command = relay.program("unshare", &[&before, arguments].concat());
        succeeds(&fed(command.env_remove("QRELAY_SOCKET"), b"Subject: x\n\nhi\n"));
        relay.last().is("s@x", &["r@x"]);
    }
    assert_eq!(relay.sink.mails().len(), 2);
}

/// Whoever reads nothing of what went wrong still learns it from the exit status.
#[test]
fn a_reader_of_errors_that_is_gone_changes_no_exit_status() {
    let relay = Relay::answering("Dnever");
    fs::write(relay.daemon.path("mail"), "Subject: x\n\nhi\n").expect("file");
    for arguments in [
        &["sendmail", "r@x"][..],
        &["send", "--sender", "s@x", "r@x"],
        &["send", "--sender", "s@x", "r@x", "--file", "mail"],
    ] {
        let (_, gone) = std::io::pipe().expect("pipe");
        let mut command = relay.program(QRELAY, arguments);
        command.stdout(Stdio::null());
        let input = File::open(relay.daemon.path("mail")).expect("opens");
        let status = command.stdin(input).stderr(gone).status().expect("runs");
        assert_eq!(status.code(), Some(69), "{arguments:?}");
        let (_, gone) = std::io::pipe().expect("pipe");
        command.env("QRELAY_SOCKET", relay.path("nobody"));
        let status = command.stdin(Stdio::null()).stderr(gone).status().expect("runs");
        assert_eq!(status.code(), Some(75), "{arguments:?}");
    }
}

#[test]
fn the_message_is_in_memory_once() {
    const LINES: u64 = 64 * 1024;
    const SIZE: u64 = LINES * 1024;
    let site = Site::new();
    let (sink, gate) = Sink::gated(site.path("out"));
    let mut sendmail = command(QRELAY);
    sendmail.args(["sendmail", "-i", "r@x"]).env("QRELAY_SOCKET", site.path("out"));
    let mut child = sendmail.stdin(Stdio::piped()).spawn().expect("runs");
    let line = [b"x".repeat(1023), b"\r\n".to_vec()].concat();
    let mut input = std::io::BufWriter::new(child.stdin.take().expect("piped"));
    input.write_all(b"Subject: x\n\n").expect("written");
    for _ in 0..LINES {
        input.write_all(&line).expect("written");
    }
    drop(input);
    sink.record().wait_for_count(1);
    let highest = memory(child.id().cast_signed(), "status", "VmHWM");
    gate.open();
    assert!(child.wait().expect("ends").success());
    assert!(highest > SIZE && highest < SIZE + SIZE / 2, "{highest} bytes");
    assert!(sink.only().message.len() as u64 > SIZE);
}

#[test]
fn the_exit_status_says_what_became_of_the_mail() {
    for (answer, code) in [("Znot\x1b[1m now", 75), ("Dnever", 69)] {
        let relay = Relay::answering(answer);
        let output = relay.run(&["r@x"], b"hi\n");
        assert_eq!(output.status.code(), Some(code));
        let told = format!("qrelay sendmail: {}\n", answer[1..].replace('\x1b', "?"));
        assert_eq!(String::from_utf8_lossy(&output.stderr), told);
    }
    let site = Site::new();
    let mut sendmail = command(QRELAY);
    sendmail.args(["sendmail", "r@x"]).env("QRELAY_SOCKET", site.path("nobody"));
    let output = fed(&mut sendmail, b"hi\n");
    assert_eq!(output.status.code(), Some(75));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("nobody") && told.contains("is qrelay running"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    // An option comes before the environment.
    let relay = Relay::start();
    let socket = relay.path("in");
    let mut sendmail = command(QRELAY);
    sendmail.args(["sendmail", "--to", &socket, "r@x"]).env("QRELAY_SOCKET", site.path("nobody"));
    succeeds(&fed(&mut sendmail, b"hi\n"));
    assert_eq!(relay.last().recipients, ["r@x"]);
}
