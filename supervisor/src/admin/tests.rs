use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use qrelay_shared::admin::Answer;

use super::*;
use crate::system::fake::Fake;
use crate::watch::Poller;

/// The owner under test, on a socket in a directory.
struct Stage {
    admin: Admin,
    poller: Poller,
    events: Events,
    directory: tempfile::TempDir,
    now: Instant,
}

impl Stage {
    fn new() -> Self {
        let system = Fake::default();
        // The tests' own process stands for the administrator's command.
        system.start_outside(Pid::this());
        Self::with(system)
    }

    fn with(system: Fake) -> Self {
        let poller = Poller::new().expect("epoll");
        let now = Instant::now();
        let log = Logger::root(slog::Discard, slog::o!());
        let mut admin = Admin::new(log, poller.watcher(), Rc::new(system), now);
        let directory = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(directory.path().join("control")).expect("bind");
        listener.set_nonblocking(true).expect("nonblocking");
        admin.listen(listener);
        Self { admin, poller, events: Events::new(), directory, now }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("control")).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        stream
    }

    /// Runs the loop until nothing is ready and nothing is due within a second.
    fn run(&mut self) {
        let mut sources = Vec::new();
        let soon = self.now + Duration::from_secs(1);
        loop {
            self.poller.wait(Duration::ZERO, &mut sources).expect("epoll");
            let idle = sources.is_empty();
            for source in sources.drain(..) {
                match source {
                    Source::AdminListener => self.admin.on_listener(self.now),
                    Source::Admin(id) => self.admin.on_client(id, self.now),
                    other => panic!("{other:?} is ready"),
                }
            }
            let due = self.admin.next_deadline().is_some_and(|at| at <= self.now);
            self.admin.tick(self.now, &mut self.events);
            match self.admin.next_deadline().filter(|&at| at <= soon) {
                Some(at) => self.now = self.now.max(at),
                None if idle && !due => return,
                None => {}
            }
        }
    }

    /// Takes the only event.
    fn event(&mut self) -> Event {
        self.run();
        let event = self.events.pop_front().expect("an event");
        assert!(self.events.is_empty(), "{:?}", self.events);
        event
    }

    fn ordered(&mut self) -> (AdminId, Command) {
        match self.event() {
            Event::Ordered { client, command } => (client, command),
            other => panic!("{other:?}"),
        }
    }
}

fn line(client: &UnixStream) -> Body {
    let mut line = String::new();
    // One byte after the other, so that nothing of the next line is read.
    let mut byte = [0];
    while !line.ends_with('\n') && (&*client).read(&mut byte).expect("an answer") > 0 {
        line.push(char::from(byte[0]));
    }
    serde_json::from_str::<Answer>(&line).unwrap_or_else(|error| panic!("{line}: {error}")).body
}

fn error(client: &UnixStream) -> String {
    match line(client) {
        Body::Error { message } => message,
        other => panic!("{other:?}"),
    }
}

fn is_closed(mut client: &UnixStream) -> bool {
    matches!(client.read(&mut [0]), Ok(0) | Err(_))
}

const RELOAD: &[u8] = b"{\"version\":1,\"command\":\"reload\"}\n";
const STOP: &[u8] = b"{\"version\":1,\"command\":\"stop\"}\n";
const MAILS: &[u8] = b"{\"version\":1,\"command\":\"mails\"}\n";

fn load(generation: u64) -> Reload {
    Reload { at: 1.5, generation, failure: None, may_pass: false }
}

#[test]
fn a_reload_is_answered_when_a_later_one_has_ended() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    client.write_all(RELOAD).expect("sent");
    let (id, command) = stage.ordered();
    assert_eq!(command, Command::Reload);
    stage.admin.await_reload(id, GenerationId(3), stage.now);
    stage.admin.loaded(&load(3), stage.now);
    stage.now += Duration::from_secs(3600);
    stage.run();
    stage.admin.loaded(&load(4), stage.now);
    assert_eq!(line(&client), Body::Reload(load(4)));
    // The connection goes on, and half of it is enough.
    client.write_all(&STOP[..STOP.len() - 1]).expect("sent");
    client.shutdown(Shutdown::Write).expect("shutdown");
    let (id, command) = stage.ordered();
    assert_eq!(command, Command::Stop { now: false });
    stage.admin.await_stop(id, 7, stage.now);
    assert_eq!(line(&client), Body::Stopping { in_flight: 7 });
    stage.admin.close_all(stage.now);
    assert_eq!(line(&client), Body::Stopped {});
    assert!(is_closed(&client));
}

#[test]
fn a_stop_ends_the_wait_for_a_reload() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    client.write_all(RELOAD).expect("sent");
    let (id, _) = stage.ordered();
    stage.admin.await_reload(id, GenerationId(3), stage.now);
    stage.admin.stop(stage.now);
    assert!(error(&client).contains("the daemon stops"));
    let mut late = stage.connect();
    late.write_all(RELOAD).expect("sent");
    let (id, _) = stage.ordered();
    stage.admin.await_reload(id, GenerationId(3), stage.now);
    assert!(error(&late).contains("the daemon stops"));
}

#[test]
fn nonsense_is_answered_and_ends_the_connection() {
    for nonsense in [&b"hello\n"[..], b"\n\n\n\n", b"{\"version\":2}\n", &[b'x'; 70_000]] {
        let mut stage = Stage::new();
        let mut client = stage.connect();
        client.set_nonblocking(true).expect("nonblocking");
        let _ = client.write(nonsense);
        client.set_nonblocking(false).expect("blocking");
        stage.run();
        assert!(!error(&client).is_empty());
        assert!(is_closed(&client));
        stage.run();
        assert!(stage.events.is_empty());
        assert!(stage.admin.clients.is_empty());
    }
}

#[test]
fn who_says_nothing_is_closed() {
    let mut stage = Stage::new();
    let client = stage.connect();
    stage.run();
    assert_eq!(stage.admin.clients.len(), 1);
    stage.now += PATIENCE;
    stage.run();
    assert!(stage.admin.clients.is_empty() && is_closed(&client));
    assert_eq!(stage.admin.next_deadline(), None, "nothing is left to do");
}

#[test]
fn silent_clients_give_way_and_waiting_ones_do_not() {
    let mut stage = Stage::new();
    let mut first = stage.connect();
    first.write_all(RELOAD).expect("sent");
    let (id, _) = stage.ordered();
    stage.admin.await_reload(id, GenerationId(1), stage.now);
    let crowd: Vec<_> = (0..100).map(|_| stage.connect()).collect();
    stage.run();
    assert_eq!(stage.admin.clients.len(), stage.admin.most);
    let open = crowd.iter().filter(|client| {
        client.set_nonblocking(true).expect("nonblocking");
        !matches!((&**client).read(&mut [0]), Ok(0))
    });
    assert_eq!(open.count(), stage.admin.most - 1);
    let mut last = stage.connect();
    last.write_all(STOP).expect("sent");
    assert_eq!(stage.ordered().1, Command::Stop { now: false });
    stage.admin.loaded(&load(2), stage.now);
    assert_eq!(line(&first), Body::Reload(load(2)));
}

#[test]
fn commands_that_wait_leave_places_to_others() {
    let mut stage = Stage::new();
    let mut reloads = Vec::new();
    for number in 0..stage.admin.most / 2 + 1 {
        let mut client = stage.connect();
        client.write_all(RELOAD).expect("sent");
        let (id, _) = stage.ordered();
        stage.admin.await_reload(id, GenerationId(1), stage.now);
        if number == stage.admin.most / 2 {
            assert!(error(&client).contains("too many commands wait"));
        }
        reloads.push(client);
    }
    // Requests that wait for their turn keep new ones out until they are served.
    stage.admin.took(Duration::from_millis(100), stage.now);
    let clients: Vec<_> = (0..30)
        .map(|_| {
            let mut client = stage.connect();
            client.write_all(STOP).expect("sent");
            client
        })
        .collect();
    let mut served = 0;
    while served < clients.len() {
        stage.run();
        assert!(!stage.events.is_empty(), "{served} were served");
        while let Some(Event::Ordered { client, .. }) = stage.events.pop_front() {
            assert!(stage.admin.clients.len() <= stage.admin.most);
            stage.admin.answer(client, Body::Stopped {}, stage.now);
            served += 1;
        }
    }
}

#[test]
fn who_does_not_read_is_closed() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    client.write_all(RELOAD).expect("sent");
    let (id, _) = stage.ordered();
    let message = "x".repeat(4 << 20);
    let long = Reload { failure: Some(message), ..load(2) };
    stage.admin.answer(id, Body::Reload(long.clone()), stage.now);
    assert_eq!(stage.admin.clients.len(), 1, "a part isn't sent yet");
    stage.now += PATIENCE;
    stage.run();
    assert!(stage.admin.clients.is_empty());
    // One that reads gets all of it, however long that takes.
    let mut client = stage.connect();
    client.write_all(RELOAD).expect("sent");
    let (id, _) = stage.ordered();
    stage.admin.answer(id, Body::Reload(long), stage.now);
    let reader = std::thread::spawn(move || {
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).expect("an answer");
        line.len()
    });
    while !reader.is_finished() {
        stage.run();
    }
    assert!(reader.join().expect("read") > 4 << 20);
}

#[test]
fn a_list_is_given_in_parts() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    client.write_all(MAILS).expect("sent");
    let first = Cursor::default();
    let second = Cursor::Waiting(crate::ids::JobId(7));
    for (cursor, next) in [(first, Some(second)), (second, None)] {
        match stage.event() {
            Event::MailsWanted { client, cursor: wanted } => {
                assert_eq!(wanted, cursor);
                stage.admin.list(client, (Vec::new(), next), stage.now);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(line(&client), Body::End { mails: 0 });
}

#[test]
fn a_request_that_took_time_lets_the_next_one_wait() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    client.write_all(RELOAD).expect("sent");
    let (id, _) = stage.ordered();
    stage.admin.took(Duration::from_millis(5), stage.now);
    stage.admin.answer(id, Body::Stopped {}, stage.now);
    client.write_all(STOP).expect("sent");
    let before = stage.now;
    assert_eq!(stage.ordered().1, Command::Stop { now: false });
    assert_eq!(stage.now - before, Duration::from_millis(5) * SHARE);
}

#[test]
fn descendants_give_no_orders() {
    // The tests' own process stands for a worker.
    let system = Fake::default();
    system.start_as(Pid::this());
    let mut stage = Stage::with(system);
    let client = stage.connect();
    stage.run();
    assert!(error(&client).contains("can't give orders"));
    assert!(is_closed(&client));
    // Of a process that /proc doesn't show nothing is known.
    let mut stage = Stage::with(Fake::default());
    let client = stage.connect();
    stage.run();
    assert!(error(&client).contains("can't be told"));
}
