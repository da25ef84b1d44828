//! The log in systemd's journal: native entries with fields. The daemon runs in a mount namespace
//! in which the journal's socket belongs to the test.
//!
//! # Failure
//! An entry that journald couldn't parse panics in [`parse`].

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use crate::harness::daemon::Launch;
use crate::harness::record::Record;
use crate::harness::{Daemon, Mail, PATIENCE, Sink, Site, eventually, submit};

/// Names and values of the fields of an entry, in their order.
type Entry = Vec<(String, String)>;

/// Parses an entry (systemd.io/JOURNAL_NATIVE_PROTOCOL). A field is `NAME=value\n`, or, for a value
/// with newlines, `NAME\n`, its length in 64 bits little-endian, the value, `\n`.
#[track_caller]
fn parse(datagram: &[u8]) -> Entry {
    let mut entry = Entry::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let end = rest.iter().position(|&byte| byte == b'\n').expect("a field's end");
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        let (name, value) = match line.iter().position(|&byte| byte == b'=') {
            Some(at) => {
                rest = after;
                (&line[..at], &line[at + 1..])
            }
            None => {
                let (length, after) = after.split_first_chunk().expect("a length");
                let length = usize::try_from(u64::from_le_bytes(*length)).expect("fits");
                assert_eq!(after[length], b'\n');
                rest = &after[length + 1..];
                (line, &after[..length])
            }
        };
        let valid = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'_';
        let name = String::from_utf8_lossy(name).into_owned();
        assert!(name.bytes().all(|byte| valid(&byte)) && name.len() <= 64, "{name:?}");
        assert!(name.starts_with(|first: char| first.is_ascii_uppercase()), "{name:?}");
        entry.push((name, String::from_utf8(value.to_vec()).expect("UTF-8")));
    }
    entry
}

fn get<'e>(entry: &'e Entry, name: &str) -> Option<&'e str> {
    entry.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}

/// A daemon whose stderr is the journal, and the entries that the journal receives.
struct Journaled {
    daemon: Daemon,
    entries: Arc<Record<Entry>>,
}

/// Starts a daemon whose stderr is the journal. Returns the daemon and the journal's socket.
fn start(config: &str) -> (Daemon, UnixDatagram) {
    start_launch(Site::with(config).launch())
}

/// Starts this daemon with the journal as its stderr.
pub fn start_launch(launch: Launch) -> (Daemon, UnixDatagram) {
    let directory = launch.site().path("journal");
    std::fs::create_dir(&directory).expect("directory");
    let socket = UnixDatagram::bind(directory.join("socket")).expect("bind");
    // JOURNAL_STREAM has the device and inode of stderr if stderr leads to the journal.
    let script = format!(
        "mount -t tmpfs none /run && mkdir -p /run/systemd/journal &&
         mount --bind {} /run/systemd/journal &&
         JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$@\"",
        directory.display()
    );
    let daemon = launch.through(&["unshare", "-m", "sh", "-c", &script, "sh"]).ready();
    (daemon, socket)
}

impl Journaled {
    fn start(config: &str) -> Self {
        let (daemon, socket) = start(config);
        let entries = Arc::new(Record::default());
        let record = entries.clone();
        std::thread::spawn(move || {
            let mut datagram = vec![0; 1 << 20];
            while let Ok(length) = socket.recv(&mut datagram) {
                record.push(parse(&datagram[..length]));
            }
        });
        Self { daemon, entries }
    }

    /// Waits for at least `count` entries whose message satisfies `wanted`, and returns all such
    /// entries.
    #[track_caller]
    fn wait(&self, count: usize, wanted: impl Fn(&str) -> bool) -> Vec<Entry> {
        let matching = |entries: &[Entry]| -> Vec<Entry> {
            let message = |entry: &&Entry| wanted(get(entry, "MESSAGE").expect("MESSAGE"));
            entries.iter().filter(message).cloned().collect()
        };
        let found = self.entries.wait_for(PATIENCE, |entries| {
            Some(matching(entries)).filter(|found| found.len() >= count)
        });
        match found {
            Some(found) => found,
            None => panic!("waited for {count} entries, got {:#?}", self.entries.all()),
        }
    }

    /// Stops the daemon, and returns all entries. Checks that nothing was logged to stderr and that
    /// every entry has its required fields.
    #[track_caller]
    fn stop(mut self) -> Vec<Entry> {
        self.daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(self.daemon.wait_exit().code(), Some(0));
        assert_eq!(self.daemon.complete_text(), "", "on stderr");
        self.wait(1, |message| message == "stopped");
        let entries = self.entries.all();
        for entry in &entries {
            for required in ["PRIORITY", "SYSLOG_IDENTIFIER", "MESSAGE"] {
                let times = entry.iter().filter(|(name, _)| name == required).count();
                assert_eq!(times, 1, "{required} in {entry:?}");
            }
            let raw = entry.iter().find(|(_, value)| value.contains(char::is_control));
            assert_eq!(raw, None, "control characters");
        }
        entries
    }
}

#[test]
fn one_entry_per_mail_with_its_fields() {
    let journaled = Journaled::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           m.account = 'customer-42'
           return m:connect('$DIR/out')
         end)",
    );
    let daemon = &journaled.daemon;
    let _sink = Sink::answering(daemon.path("out"), "Kfine \u{1b}[31m\r\nMESSAGE=forged\u{7f}");
    let recipients = ["b@example.org", "c@example.org"];
    for sender in ["first@example.com", "second@example.com"] {
        let mail = Mail::new("x").from(sender).to(&recipients);
        assert_eq!(submit(daemon.path("in"), &mail).status(), 'K');
    }
    let mails = journaled.wait(2, |message| message.starts_with("mail "));
    let of = |sender: &str| {
        let from = format!("<{sender}>");
        mails.iter().find(|entry| get(entry, "QRELAY_FROM") == Some(&*from)).expect("its entry")
    };
    let entry = of("first@example.com");
    let own = std::process::id().to_string();
    let next_hop = daemon.path("out").display().to_string();
    let size = Mail::new("x").message.len().to_string();
    let worker = get(entry, "QRELAY_WORKER").expect("worker");
    for (name, value) in [
        ("PRIORITY", "6"),
        ("SYSLOG_IDENTIFIER", "qrelay"),
        ("QRELAY_FROM", "<first@example.com>"),
        ("QRELAY_TO", "<b@example.org>,<c@example.org>"),
        ("QRELAY_RECIPIENTS", "2"),
        ("QRELAY_UID", "0"),
        ("QRELAY_PID", &own),
        ("QRELAY_ACCOUNT", "customer-42"),
        ("QRELAY_ACTION", "connect"),
        ("QRELAY_NEXT_HOP", &next_hop),
        ("QRELAY_STATUS", "K"),
        ("QRELAY_REPLY", "fine ?[31m??MESSAGE=forged?"),
        ("QRELAY_SIZE", &size),
        ("QRELAY_WORKER", "1"),
    ] {
        assert_eq!(get(entry, name), Some(value), "{name} in {entry:#?}");
    }
    assert_eq!(worker.parse(), Ok(1));
    let milliseconds = get(entry, "QRELAY_MS").expect("ms").parse::<f64>().expect("a number");
    assert!((0.0..20_000.0).contains(&milliseconds), "{milliseconds}");
    assert_eq!(get(entry, "QRELAY_PEER"), None, "a local client has no peer");
    let id = get(entry, "QRELAY_ID").expect("id");
    let message = get(entry, "MESSAGE").expect("MESSAGE");
    assert!(message.starts_with(&format!("mail id={id} from=<first@example.com> ")), "{message}");
    assert_ne!(get(of("second@example.com"), "QRELAY_ID"), Some(id));

    let entries = journaled.stop();
    let about = entries.iter().filter(|entry| get(entry, "QRELAY_ID") == Some(id));
    assert_eq!(about.count(), 1, "one entry per mail");
    let ready = entries.iter().find(|entry| get(entry, "QRELAY_WORKERS") == Some("1"));
    assert!(ready.is_some_and(|entry| get(entry, "QRELAY_GENERATION") == Some("1")));
}

#[test]
fn output_and_errors_of_a_script() {
    let journaled = Journaled::start(
        "settings{workers=1}
         print('loading\\ttab')
         qmqp_listen('$DIR/in', function(m)
           log.warn('two\\nlines', {count = 7, text = 'a\\nMESSAGE=forged\\n\\x1b[0m',
             long = ('x'):rep(300000)})
           print('one') print('two\\rMESSAGE=forged')
           io.stderr:write('complaint\\n')
           error('of\\nmany\\nlines')
         end)",
    );
    let daemon = &journaled.daemon;
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed");
    let mails = journaled.wait(1, |message| message.starts_with("mail "));
    let id = get(&mails[0], "QRELAY_ID").expect("id").to_owned();
    let of_mail = |start: &str| {
        let found = journaled.wait(1, |message| message.starts_with(start));
        assert_eq!(found.len(), 1, "{start}: {found:#?}");
        let entry = found[0].clone();
        assert_eq!(get(&entry, "QRELAY_ID"), Some(&*id), "{entry:#?}");
        assert_eq!(get(&entry, "SYSLOG_IDENTIFIER"), Some("qrelay-worker"));
        entry
    };
    let warned = of_mail("two\\nlines ");
    assert_eq!(get(&warned, "PRIORITY"), Some("4"));
    assert_eq!(get(&warned, "QRELAY_COUNT"), Some("7"));
    assert_eq!(get(&warned, "QRELAY_TEXT"), Some("a\\nMESSAGE=forged\\n\\x1b[0m"));
    let long = get(&warned, "QRELAY_LONG").expect("the value is there, though cut");
    assert!(long.len() <= 4096 && long.starts_with("xxx") && long.ends_with('…'), "{}", long.len());
    assert!(get(&warned, "MESSAGE").expect("MESSAGE").len() <= 4096);
    assert_eq!(get(&of_mail("one"), "PRIORITY"), Some("6"));
    of_mail("two\\x0dMESSAGE=forged");
    assert_eq!(get(&of_mail("complaint"), "PRIORITY"), Some("4"));
    let failed = of_mail("script failed: ");
    assert_eq!(get(&failed, "PRIORITY"), Some("3"));
    assert!(get(&failed, "MESSAGE").is_some_and(|m| m.contains("of\\nmany\\nlines")), "{failed:?}");

    let entries = journaled.stop();
    let loading = entries.iter().find(|e| get(e, "SYSLOG_IDENTIFIER") == Some("qrelay-zygote"));
    assert_eq!(loading.and_then(|entry| get(entry, "MESSAGE")), Some("loading\\ttab"));
    assert!(!entries.iter().any(|e| get(e, "MESSAGE").is_some_and(|m| m.contains("lost"))));
}

/// A journal that reads nothing costs entries, which are counted, but no mail.
#[test]
fn a_full_journal_costs_entries_only() {
    let (daemon, socket) = start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    for _ in 0..200 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    }
    socket.set_nonblocking(true).expect("flag");
    let mut datagram = vec![0; 1 << 20];
    eventually("a report of the lost entries", || {
        // Reading makes room for the entry of the next mail. The report is sent before that entry.
        while let Ok(length) = socket.recv(&mut datagram) {
            let entry = parse(&datagram[..length]);
            if get(&entry, "QRELAY_LOST").is_some_and(|lost| lost.parse::<u32>().is_ok()) {
                return Some(());
            }
        }
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
        None
    });
}

/// journald makes its socket anew when its socket unit is restarted. Supervisor and workers go on
/// logging there by themselves, and on stderr as long as there is no socket.
#[test]
fn a_journal_that_is_made_anew() {
    let (daemon, socket) = start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           log.info('about ' .. m.sender)
           return m:discard()
         end)",
    );
    let mail = |sender: &str| {
        let mail = Mail::new("x").from(sender);
        assert_eq!(submit(daemon.path("in"), &mail), "Kdiscarded");
    };
    let entries_about = |socket: &UnixDatagram, sender: &str| {
        let (mut datagram, mut found) = (vec![0; 1 << 20], Vec::new());
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        while found.len() < 2 {
            let length = socket.recv(&mut datagram).expect("two entries");
            let entry = parse(&datagram[..length]);
            let message = get(&entry, "MESSAGE").expect("MESSAGE");
            if message.contains(sender) {
                found.push(get(&entry, "SYSLOG_IDENTIFIER").expect("a process").to_owned());
            }
        }
        found.sort();
        found
    };
    mail("first@example.com");
    assert_eq!(entries_about(&socket, "first@"), ["qrelay", "qrelay-worker"]);

    drop(socket);
    let at = daemon.path("journal/socket");
    std::fs::remove_file(&at).expect("the old socket");
    mail("second@example.com");
    daemon.wait_for_log("mail id=");
    daemon.wait_for_log("about second@example.com");

    let socket = UnixDatagram::bind(&at).expect("bind");
    mail("third@example.com");
    assert_eq!(entries_about(&socket, "third@"), ["qrelay", "qrelay-worker"]);
    assert_eq!(daemon.count_log("third@example.com"), 0, "{}", daemon.text());
    assert_eq!(daemon.count_log("lost"), 0, "{}", daemon.text());
}
