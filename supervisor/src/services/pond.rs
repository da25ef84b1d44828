//! One Pond datagram per finished mail.
//!
//! Contract: sending never waits and never fails a mail. Records go to the log server of the
//! current generation.
//!
//! # Failure
//! A record that could not be sent is lost and counted. The first loss is reported at once, later
//! losses once a minute, and the rest at a stop or when another server takes the place of this one
//! ([`PondSender::report_rest`]). A server that comes back gets the records from then on.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use qrelay_shared::admin::Deliveries;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::ipc::message::{MailRecord, Peer};
use qrelay_shared::pond::{Message, Record, encode};
use slog::{Logger, warn};

/// How often lost records are reported.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// How many records are lost, and when that is reported. Pure.
#[derive(Debug, Default)]
struct Losses {
    /// Losses that have not been reported.
    untold: u64,
    /// Nothing is reported before that.
    quiet_until: Option<Instant>,
}

impl Losses {
    /// Counts a loss.
    fn add(&mut self) {
        self.untold += 1;
    }

    /// Returns how many losses are to be reported now, and counts them as reported.
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.untold == 0 || self.quiet_until.is_some_and(|until| now < until) {
            return None;
        }
        self.quiet_until = Some(now + REPORT_EVERY);
        self.rest()
    }

    /// Returns how many losses have not been reported, and counts them as reported.
    fn rest(&mut self) -> Option<u64> {
        Some(std::mem::take(&mut self.untold)).filter(|&lost| lost > 0)
    }

    /// Returns when [`Self::due`] has something to report, if ever.
    fn next_report(&self) -> Option<Instant> {
        self.quiet_until.filter(|_| self.untold > 0)
    }
}

/// A socket that is ready to send. A local server is looked up for each record, because the server
/// may have been restarted.
#[derive(Debug)]
enum Target {
    Udp(UdpSocket),
    Path(UnixDatagram, PathBuf),
    Abstract(UnixDatagram, UnixAddress),
}

/// Sends records to one log server.
#[derive(Debug)]
pub(super) struct PondSender {
    server: Endpoint,
    target: Option<Target>,
    losses: Losses,
    /// Why the last record was lost.
    cause: String,
    deliveries: Deliveries,
}

impl PondSender {
    /// Prepares to send; the server need not be there.
    pub(super) fn new(server: Endpoint) -> Self {
        Self {
            server,
            target: None,
            losses: Losses::default(),
            cause: String::new(),
            deliveries: Deliveries::default(),
        }
    }

    /// Counts the records that were sent, and those that were lost.
    pub(super) fn deliveries(&self) -> Deliveries {
        self.deliveries
    }

    /// Returns the server that this sender was made for.
    pub(super) fn server(&self) -> &Endpoint {
        &self.server
    }

    /// Sends a mail's record, unless the request was refused before it was a mail.
    pub(super) fn send(&mut self, mail: &MailRecord<'_>, peer: Option<Peer>, log: &Logger) {
        if mail.refused {
            return;
        }
        let datagram = datagram(mail, peer);
        let udp = matches!(self.server, Endpoint::Inet(_));
        self.deliveries.sent += 1;
        for error in losses_of_send(udp, || self.try_send(&datagram)).into_iter().flatten() {
            self.count_lost(&error, log);
        }
    }

    /// Reports what is due.
    pub(super) fn tick(&mut self, now: Instant, log: &Logger) {
        if let Some(lost) = self.losses.due(now) {
            self.report(lost, log);
        }
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.losses.next_report()
    }

    /// Reports what has not been reported, because nothing more will be sent.
    pub(super) fn report_rest(&mut self, log: &Logger) {
        if let Some(Target::Udp(socket)) = &self.target
            && let Ok(Some(error)) = socket.take_error()
        {
            self.losses.add();
            self.cause = error.to_string();
        }
        if let Some(lost) = self.losses.rest() {
            self.report(lost, log);
        }
    }

    fn count_lost(&mut self, error: &io::Error, log: &Logger) {
        self.losses.add();
        self.deliveries.sent = self.deliveries.sent.saturating_sub(1);
        self.deliveries.lost += 1;
        self.cause = error.to_string();
        self.tick(Instant::now(), log);
    }

    fn report(&self, lost: u64, log: &Logger) {
        warn!(log, "log records are lost: {}", self.cause;
            "log_server" => %self.server, "lost" => lost);
    }

    fn try_send(&mut self, datagram: &[u8]) -> io::Result<()> {
        let target = match &self.target {
            Some(target) => target,
            None => self.target.insert(Target::open(&self.server)?),
        };
        match target {
            Target::Udp(socket) => socket.send(datagram),
            Target::Path(socket, path) => socket.send_to(datagram, path),
            Target::Abstract(socket, address) => socket.send_to_addr(datagram, address),
        }
        .map(|_| ())
    }
}

/// Sends a datagram. Returns an error for each datagram that is lost, this one or an earlier one.
///
/// With UDP an error may be about an earlier datagram, and then this datagram has not been tried
/// yet; so it is sent again. A refusal by the server (an ICMP message) is always about an earlier
/// datagram. Any other error may be about this datagram and come a second time; then one datagram
/// is lost.
fn losses_of_send(udp: bool, mut send: impl FnMut() -> io::Result<()>) -> [Option<io::Error>; 2] {
    let Err(first) = send() else { return [None, None] };
    if !udp || first.kind() == io::ErrorKind::WouldBlock {
        return [Some(first), None];
    }
    let second = send().err().filter(|_| first.kind() == io::ErrorKind::ConnectionRefused);
    [Some(first), second]
}

impl Target {
    fn open(server: &Endpoint) -> io::Result<Self> {
        let local = || {
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(socket)
        };
        Ok(match server {
            Endpoint::Inet(address) => {
                let any: SocketAddr = match address {
                    SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                    SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
                };
                let socket = UdpSocket::bind(any)?;
                socket.set_nonblocking(true)?;
                socket.connect(address)?;
                Self::Udp(socket)
            }
            Endpoint::Path(path) => Self::Path(local()?, path.clone()),
            Endpoint::Abstract(name) => {
                Self::Abstract(local()?, UnixAddress::from_abstract_name(name)?)
            }
        })
    }
}

fn datagram(mail: &MailRecord<'_>, peer: Option<Peer>) -> Vec<u8> {
    let remote_host = match peer {
        Some(Peer::Remote(address)) => Some(address.to_string()),
        _ => None,
    };
    encode(&Record {
        timestamp: mail.answered,
        remote_host: remote_host.as_deref(),
        site: mail.account.map(str::as_bytes),
        forwarded_to: mail.next_hop.filter(|_| mail.forwarded && mail.action == "connect"),
        message: Message {
            sender: &mail.sender,
            recipients: &mail.recipients,
            recipient_count: mail.recipient_count,
            text: &mail.text,
        },
        length: mail.size,
        received: mail.received,
        sent: mail.sent,
        duration: mail.duration,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrelay_shared::ipc::message::Times;
    use qrelay_shared::qmqp::Status;

    fn relayed() -> MailRecord<'static> {
        MailRecord {
            sender: "acc@example.com".into(),
            recipients: "<r1@example.org>,<r2@example.org>".into(),
            recipient_count: 2,
            recipients_cut: 0,
            account: Some("acct42"),
            action: "connect",
            next_hop: Some("/run/next.sock"),
            forwarded: true,
            status: Some(Status::Accepted),
            text: "ok".into(),
            size: 26,
            received: 77,
            sent: 85,
            times: Times::default(),
            duration: 469,
            answered: 0x0006_60ff_6bc4_ca1a,
            message_id: None,
            cause: None,
            refused: false,
        }
    }

    /// The part between TIMESTAMP and DURATION of the captured datagram of the same mail.
    #[test]
    fn equals_the_captured_datagram_but_for_the_next_hop() {
        let bytes = datagram(&relayed(), None);
        let captured = b"\x0dfrom=<acc@example.com> to=<r1@example.org>,<r2@example.org> ok\0\
            \x09\0\0\0\0\0\0\0\x1a\x0a\0\0\0\0\0\0\0\x4d\0\0\0\0\0\0\0\x55\
            \x0b\0\0\0\0\0\0\x01\xd5\x0f\x03";
        let text = [b"\x03acct42\0\x0e/run/next.sock\0".as_slice(), captured].concat();
        assert_eq!(bytes[13..bytes.len() - 4], text);
    }

    #[test]
    fn the_text_is_what_the_worker_or_the_log_says() {
        for (status, text) in [(None, "lost"), (None, "canceled"), (Some(Status::Accepted), "ok")] {
            let bytes = datagram(&MailRecord { status, text: text.into(), ..relayed() }, None);
            let end = format!("<r2@example.org> {text}\0");
            assert!(String::from_utf8_lossy(&bytes).contains(&end), "{text}");
        }
    }

    #[test]
    fn losses_are_reported_at_once_and_then_once_a_minute() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut losses = Losses::default();
        assert_eq!((losses.due(start), losses.next_report(), losses.rest()), (None, None, None));
        losses.add();
        assert_eq!(losses.due(start), Some(1));
        assert_eq!(losses.next_report(), None, "nothing is untold");
        losses.add();
        losses.add();
        assert_eq!(losses.due(later(59)), None);
        assert_eq!(losses.next_report(), Some(later(60)), "though no further loss comes");
        assert_eq!(losses.due(later(60)), Some(2));
        assert_eq!(losses.due(later(120)), None);
        losses.add();
        assert_eq!(losses.due(later(121)), Some(1), "the first after a while");
    }

    #[test]
    fn the_rest_is_reported_once() {
        let start = Instant::now();
        let mut losses = Losses::default();
        losses.add();
        assert_eq!(losses.due(start), Some(1));
        losses.add();
        assert_eq!(losses.rest(), Some(1));
        assert_eq!((losses.rest(), losses.next_report()), (None, None));
    }

    #[test]
    fn an_error_of_udp_may_be_about_an_earlier_datagram() {
        use io::ErrorKind::{
            ConnectionRefused as Refused, HostUnreachable as Unreachable, NotFound, WouldBlock,
        };
        type Results<'a> = &'a [Option<io::ErrorKind>];
        let table: [(bool, Results<'_>, Results<'_>); 8] = [
            (true, &[None], &[]),
            (true, &[Some(WouldBlock)], &[Some(WouldBlock)]),
            (true, &[Some(Refused), None], &[Some(Refused)]),
            (true, &[Some(Refused), Some(WouldBlock)], &[Some(Refused), Some(WouldBlock)]),
            (true, &[Some(Unreachable), None], &[Some(Unreachable)]),
            (true, &[Some(Unreachable), Some(Unreachable)], &[Some(Unreachable)]),
            (false, &[Some(Refused)], &[Some(Refused)]),
            (false, &[Some(NotFound)], &[Some(NotFound)]),
        ];
        for (udp, results, expected) in table {
            let mut next = results.iter();
            let losses = losses_of_send(udp, || match next.next().expect("not tried once more") {
                Some(kind) => Err((*kind).into()),
                None => Ok(()),
            });
            let kinds = losses.iter().flatten().map(|error| Some(error.kind()));
            assert_eq!(kinds.collect::<Vec<_>>(), expected, "{udp} {results:?}");
            assert_eq!(next.next(), None, "tried once more: {udp} {results:?}");
        }
    }

    #[test]
    fn a_dead_server_costs_records_only() {
        let log = Logger::root(slog::Discard, slog::o!());
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("log.sock");
        let mut sender = PondSender::new(Endpoint::Path(path.clone()));
        sender.send(&relayed(), None, &log);
        sender.send(&relayed(), None, &log);
        assert_eq!(sender.losses.untold, 1, "one was reported, one is yet to be");
        sender.report_rest(&log);
        assert_eq!(sender.losses.untold, 0);
        let server = UnixDatagram::bind(&path).expect("a server");
        sender.send(&relayed(), None, &log);
        assert!(server.recv(&mut [0; 1000]).expect("a record") > 100);
    }
}
