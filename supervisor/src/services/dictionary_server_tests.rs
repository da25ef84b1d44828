//! The dictionary server, asked by processes that the test plays.

use std::fs::File;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use qrelay_shared::dictionary::{Answer, FromOpener, Request, ToOpener, Value, Wish};

use super::*;
use crate::ids::{WorkerId, ZygoteId};
use crate::watch::Poller;

const FIRST: GenerationId = GenerationId(1);
const WORKER: Asker = Asker::Worker(WorkerId(1));
const OTHER: Asker = Asker::Worker(WorkerId(2));
const ZYGOTE: Asker = Asker::Zygote(ZygoteId(1));

/// A process' end of its opener.
type Opener = Channel<ToOpener, FromOpener>;
/// A process' end of a channel for questions.
type Asking = Channel<ToDictionary, FromDictionary>;

struct Site {
    server: DictionaryServer,
    poller: Poller,
    events: Events,
}

impl Site {
    /// A server for workers that may have two mails each.
    fn new() -> Self {
        let poller = Poller::new().expect("epoll");
        let mut server = DictionaryServer::new(poller.watcher(), 20_000);
        let settings = Settings { worker_connections: 2, ..Settings::default() };
        server.declared(FIRST, &Declaration { settings, ..Declaration::default() });
        Self { server, poller, events: Events::new() }
    }

    fn process(&mut self, asker: Asker) -> Opener {
        let (ours, theirs) = OpenerChannel::pair().expect("a pair");
        self.server.asker_came(NewAsker { asker, generation: FIRST, opener: ours.foreign() });
        theirs
    }

    /// Serves what is ready for one turn. Returns how many channels were ready.
    fn turn(&mut self) -> usize {
        let mut sources = Vec::new();
        self.poller.wait(Duration::ZERO, &mut sources).expect("epoll_wait");
        self.server.begin_turn(Instant::now());
        for source in &sources {
            let Source::Dictionary(channel) = *source else { panic!("{source:?}") };
            self.server.on_ready(channel, Instant::now(), &mut self.events);
        }
        sources.len()
    }

    /// Asks for a channel.
    fn open(&mut self, opener: &Opener) -> Result<Asking, String> {
        opener.try_send(&Wish::Channel, &[]).expect("room");
        self.turn();
        let mut buffer = RecvBuffer::small();
        let mut received = opener.try_recv(&mut buffer).expect("an answer");
        match received.message {
            Opened::Channel => Ok(Asking::from_fd(received.fds.take().expect("a channel"))),
            Opened::Refused(cause) => Err(cause.into_owned()),
        }
    }

    /// Checks that this process, and no other, was found lying, and that its channels are closed.
    #[track_caller]
    fn assert_lied(&mut self, asker: Asker, complaint: &str) {
        let events: Vec<_> = self.events.drain(..).map(|event| format!("{event:?}")).collect();
        assert_eq!(
            events,
            [format!("{:?}", Event::AskerLied { asker, complaint: "" })
                .replace("\"\"", &format!("{complaint:?}"))]
        );
        assert!(self.server.lines.values().all(|line| line.asker != asker));
    }
}

fn ask(channel: &Asking, operation: Operation<'_>) {
    channel.try_send(&Request { dictionary: "d", key: b"k", operation }, &[]).expect("room");
}

fn increment(channel: &Asking) {
    ask(channel, Operation::Increment { by: Value::Integer(1), ttl: None });
}

/// Takes the number that an increment has led to.
fn sum(channel: &Asking) -> Option<i64> {
    let mut buffer = RecvBuffer::new();
    match channel.try_recv(&mut buffer).ok()?.message {
        Answer::Value(Some(Value::Integer(sum))) => Some(sum),
        other => panic!("{other:?}"),
    }
}

fn is_closed(fault: RecvError) -> bool {
    matches!(fault, RecvError::Closed)
}

#[test]
fn a_question_is_answered() {
    let mut site = Site::new();
    let opener = site.process(WORKER);
    let channel = site.open(&opener).expect("a channel");
    increment(&channel);
    assert_eq!(site.turn(), 1);
    assert_eq!(sum(&channel), Some(1));
    assert!(site.events.is_empty());
}

#[test]
fn a_channel_that_its_process_closes_makes_room_for_another() {
    let mut site = Site::new();
    let opener = site.process(WORKER);
    assert_eq!(site.turn(), 0);
    drop(site.open(&opener));
    assert_eq!(site.turn(), 1);
    assert_eq!(site.turn(), 0, "it isn't watched any more");
    assert!(site.server.askers[&WORKER].channels.is_empty());
    assert_eq!(site.server.lines.len(), 1, "the opener");
}

#[test]
fn a_process_has_no_more_channels_than_it_needs() {
    for (asker, most) in [(WORKER, 2 + 16), (ZYGOTE, ZYGOTE_CHANNELS)] {
        let mut site = Site::new();
        let opener = site.process(asker);
        let mut channels: Vec<_> = (0..most).map(|_| site.open(&opener).expect("one")).collect();
        assert_eq!(site.open(&opener).expect_err("no more"), "too many questions at once");
        increment(&channels[0]);
        site.turn();
        assert_eq!(sum(&channels[0]), Some(1), "the others go on");
        channels.pop();
        site.turn();
        assert!(site.open(&opener).is_ok());
        let other = site.process(OTHER);
        assert!(site.open(&other).is_ok(), "another process has channels of its own");
        assert!(site.events.is_empty());
    }
}

#[test]
fn the_channels_of_a_process_end_with_it() {
    let mut site = Site::new();
    let (opener, other) = (site.process(WORKER), site.process(OTHER));
    let channels = [(); 3].map(|()| site.open(&opener).expect("a channel"));
    let others = site.open(&other).expect("a channel");
    increment(&channels[0]);
    site.server.asker_gone(WORKER);
    assert_eq!(site.turn(), 0, "nobody is served any more");
    let mut buffer = RecvBuffer::new();
    for channel in &channels {
        assert!(channel.recv(&mut buffer).is_err_and(is_closed));
    }
    assert!(opener.recv(&mut buffer).is_err_and(is_closed));
    increment(&others);
    site.turn();
    assert_eq!(sum(&others), Some(1));
}

#[test]
fn a_process_that_sends_nonsense_is_found() {
    for to_opener in [false, true] {
        let mut site = Site::new();
        let opener = site.process(WORKER);
        let channel = site.open(&opener).expect("a channel");
        let bytes = [0xff; 9];
        let fd = if to_opener { opener.as_fd() } else { channel.as_fd() };
        nix::unistd::write(fd, &bytes).expect("sent");
        site.turn();
        site.assert_lied(WORKER, "it sent nonsense to a dictionary");
    }
}

#[test]
fn a_process_that_passes_descriptors_is_found_or_the_kernel_refuses_them() {
    let file = File::open("/dev/null").expect("open");
    let mut site = Site::new();
    let opener = site.process(WORKER);
    let channel = site.open(&opener).expect("a channel");
    let request = Request { dictionary: "d", key: b"k", operation: Operation::Get };
    let sent = [
        channel.try_send(&request, &[file.as_fd()]),
        opener.try_send(&Wish::Channel, &[file.as_fd()]),
    ];
    match sent {
        [Ok(()), Ok(())] => {
            site.turn();
            site.assert_lied(WORKER, "it passed descriptors to a dictionary");
        }
        sent => {
            let refused = |sent: &Result<_, _>| matches!(sent, Err(SendError::Os(Errno::EPERM)));
            assert!(sent.iter().all(refused), "{sent:?}");
        }
    }
}

#[test]
fn a_process_that_does_not_read_its_answers_is_found() {
    for to_opener in [false, true] {
        let mut site = Site::new();
        let (opener, other) = (site.process(WORKER), site.process(OTHER));
        let channel = site.open(&opener).expect("a channel");
        let others = site.open(&other).expect("a channel");
        while site.events.is_empty() {
            match to_opener {
                true => opener.try_send(&Wish::Channel, &[]).expect("room"),
                false => increment(&channel),
            }
            site.turn();
        }
        site.assert_lied(WORKER, "it doesn't read what a dictionary answers");
        ask(&others, Operation::Delete);
        site.turn();
        assert!(others.try_recv(&mut RecvBuffer::new()).is_ok());
    }
}

/// Asks on a channel until its socket is full.
fn flood(channel: &Asking, operation: &Operation<'_>) {
    let request = Request { dictionary: "d", key: b"k", operation: operation.clone() };
    while channel.try_send(&request, &[]).is_ok() {}
}

#[test]
fn a_process_that_floods_has_its_share_of_a_turn() {
    let add = Operation::Increment { by: Value::Integer(1), ttl: None };
    for (operation, most) in [(add, SHARE as usize), (Operation::Keys { max: 1 }, 1)] {
        let mut site = Site::new();
        site.server.declared(FIRST, &Declaration::default());
        let (opener, other) = (site.process(WORKER), site.process(OTHER));
        let channels: Vec<_> = (0..128).map(|_| site.open(&opener).expect("one")).collect();
        let others = site.open(&other).expect("a channel");
        for channel in &channels {
            flood(channel, &operation);
        }
        let mut waited = 0;
        let mut buffer = RecvBuffer::new();
        for _ in 0..20 {
            increment(&others);
            while others.try_recv(&mut buffer).is_err() {
                site.turn();
                waited += 1;
                let answers =
                    channels.iter().filter(|channel| channel.try_recv(&mut buffer).is_ok());
                assert!((1..=most).contains(&answers.count()));
            }
        }
        assert!(waited <= 40, "{waited} turns for 20 questions of another process");
        assert!(site.events.is_empty());
    }
}

/// A script that is tried asks on several channels: for its handler, and for its timers.
#[test]
fn a_script_alone_has_several_channels_to_the_same_dictionaries() {
    let limited = |fd: OwnedFd| {
        let limit = TimeVal::seconds(5);
        setsockopt(&fd, sockopt::ReceiveTimeout, &limit).expect("a time limit");
        fd
    };
    let opener = Opener::from_fd(limited(alone().expect("an opener")));
    let open = || {
        let mut buffer = RecvBuffer::small();
        opener.send(&Wish::Channel, &[]).expect("room");
        let mut received = opener.recv(&mut buffer).expect("a channel");
        Asking::from_fd(limited(received.fds.take().expect("its descriptor")))
    };
    let (first, second) = (open(), open());
    for (channel, expected) in [(&second, 1), (&first, 2), (&second, 3)] {
        increment(channel);
        let mut buffer = RecvBuffer::new();
        let answer = channel.recv(&mut buffer).expect("an answer").message;
        assert_eq!(answer, Answer::Value(Some(Value::Integer(expected))));
    }
}
