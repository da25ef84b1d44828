//! Peers that take nothing of what the daemon writes to them: whoever reads the log, of whatever
//! kind it is, and the service manager. They cost lines and notifications, which are counted, but
//! no mail, and they don't keep the daemon from stopping.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Stdio;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::unistd::{Uid, chown};

use crate::harness::daemon::{Launch, NOBODY};
use crate::harness::slow_file::{self, SlowFile};
use crate::harness::{Daemon, Mail, Site, eventually, submit};

/// Logs 1.3 KB of each mail: one line from a worker, one from the supervisor.
const CONFIG: &str = "
    settings{workers=1}
    qmqp_listen('$DIR/in', function(m)
      log.info(('x'):rep(1000))
      return m:discard()
    end)";

/// Logs only from the supervisor: a thread that waits for a file holds up others that write to the
/// same file, and then nobody can kill their processes.
const QUIET: &str = "
    settings{workers=1}
    qmqp_listen('$DIR/in', function(m) return m:discard() end)";

/// More mails than any of the peers takes the lines of.
const MANY: usize = 700;

/// Reads what the daemon has written so far, and returns all of it.
type Drain = Box<dyn FnMut() -> String>;

/// A daemon that nobody listens to.
struct Unread {
    daemon: Daemon,
    /// Has the peer take what there is.
    drain: Drain,
    /// Has the peer take nothing any more.
    stall: Box<dyn Fn()>,
}

impl Unread {
    fn new(daemon: Daemon, drain: Drain) -> Self {
        Self { daemon, drain, stall: Box::new(|| {}) }
    }
}

fn relay_many(daemon: &Daemon) {
    for _ in 0..MANY {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    }
}

/// Gives the daemon this descriptor as standard error.
fn with_stderr(launch: Launch, stderr: OwnedFd) -> Launch {
    let mut launch = launch.through(&["sh", "-c", "exec \"$@\" 2>&0 </dev/null", "sh"]);
    launch.command().stdin(Stdio::from(stderr));
    launch
}

/// Runs the daemon as nobody, who can't open the standard error of root anew.
fn as_nobody(site: Site) -> Launch {
    chown(site.dir(), Some(Uid::from_raw(NOBODY)), None).expect("owner");
    let id = NOBODY.to_string();
    site.launch().through(&["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"])
}

/// Returns what reads a descriptor to the end of what it has.
fn drain(from: impl Into<OwnedFd>) -> Drain {
    let mut from = File::from(from.into());
    fcntl(from.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("flag");
    let mut all = Vec::new();
    Box::new(move || {
        let mut part = [0; 4096];
        loop {
            match from.read(&mut part) {
                Ok(length) if length > 0 => all.extend(&part[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return String::from_utf8_lossy(&all).into_owned(),
            }
        }
    })
}

fn pipe(launch: Launch) -> Unread {
    let (read, write) = std::io::pipe().expect("pipe");
    Unread::new(with_stderr(launch, write.into()).ready(), drain(read))
}

fn terminal(launch: Launch) -> Unread {
    let pty = nix::pty::openpty(None, None).expect("terminal");
    Unread::new(with_stderr(launch, pty.slave).ready(), drain(pty.master))
}

fn socket(launch: Launch) -> Unread {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    Unread::new(with_stderr(launch, theirs.into()).ready(), drain(ours))
}

fn file(launch: Launch) -> Unread {
    let (server, device) = SlowFile::serve();
    let at = launch.site().path("log");
    File::create(&at).expect("file");
    let script = format!(
        "mount -i -t fuse -o {} none {at} && exec \"$@\" 2>>{at} </dev/null",
        slow_file::OPTIONS,
        at = at.display()
    );
    let mut launch = launch.through(&["unshare", "-m", "sh", "-c", &script, "sh"]);
    launch.command().stdin(Stdio::from(device));
    let daemon = launch.ready();
    server.stall(true);
    let server = std::rc::Rc::new(server);
    let stall = server.clone();
    Unread {
        daemon,
        drain: Box::new(move || {
            server.stall(false);
            server.text()
        }),
        stall: Box::new(move || stall.stall(true)),
    }
}

fn journal(launch: Launch) -> Unread {
    let (daemon, socket) = crate::journal::start_launch(launch);
    Unread::new(daemon, drain(socket))
}

#[test]
fn whoever_reads_no_log_costs_lines_only() {
    let own = |start: fn(Launch) -> Unread| start(Site::with(CONFIG).launch());
    let others = |start: fn(Launch) -> Unread| start(as_nobody(Site::with(CONFIG)));
    for (name, start) in [
        ("pipe", &(|| own(pipe)) as &dyn Fn() -> Unread),
        ("pipe of another user", &|| others(pipe)),
        ("terminal", &|| own(terminal)),
        ("terminal of another user", &|| others(terminal)),
        ("socket", &|| own(socket)),
        ("file", &|| file(Site::with(QUIET).launch())),
        ("journal", &|| own(journal)),
    ] {
        eprintln!("log: {name}");
        let Unread { mut daemon, mut drain, stall } = start();
        relay_many(&daemon);
        eventually("a report of the lost lines", || {
            // A line is written only after the next mail, and only if there is room for it.
            let text = drain();
            assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
            let processes = ["qrelay", "qrelay-worker"];
            let writing = if name == "file" { &processes[..1] } else { &processes };
            writing.iter().all(|process| reports_loss(&text, process)).then_some(())
        });
        stall();
        relay_many(&daemon);
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0), "{name}");
    }
}

/// Returns whether a process says in the log how many of its lines were lost, or in the journal.
fn reports_loss(text: &str, process: &str) -> bool {
    let says = |line: &str| line.contains("log lines were lost lost=");
    let named = |line: &str| line.contains(&format!(" {process}["));
    let entry = |line: &str| line.contains(&format!("SYSLOG_IDENTIFIER={process}\n"));
    text.lines().any(|line| says(line) && named(line))
        || text.split("PRIORITY=").any(|part| says(part) && entry(part))
}

#[test]
fn a_service_manager_that_reads_nothing_costs_notifications_only() {
    let site = Site::with(CONFIG);
    let at = site.path("out.notify");
    let socket = UnixDatagram::bind(&at).expect("bind");
    let variable = format!("NOTIFY_SOCKET={}", at.display());
    let mut daemon =
        site.launch().env("WATCHDOG_USEC", "20000").through(&["env", &variable]).spawn();
    daemon.wait_for_log("the service manager takes no notifications");
    relay_many(&daemon);
    // The third reload says more than what is kept until the service manager reads again.
    for generation in 2..=4 {
        daemon.signal(Signal::SIGHUP);
        daemon.wait_for_log(&format!("ready generation={generation}"));
    }
    let mut all = drain(socket);
    let text = eventually("the latest state", || {
        Some(all()).filter(|text| text.contains("STATUS=Generation 4 serves"))
    });
    assert!(text.contains("WATCHDOG=1"), "{text}");
    let again = daemon.wait_for_log("the service manager takes notifications again lost=");
    let lost = again.rsplit('=').next().and_then(|number| number.parse::<u64>().ok());
    assert!(lost.is_some_and(|lost| lost > 0), "{again}");
    eventually("a watchdog that is fed again", || {
        let before = all().matches("WATCHDOG=1").count();
        (all().matches("WATCHDOG=1").count() > before).then_some(())
    });
    relay_many(&daemon);
    daemon.stop();
}
