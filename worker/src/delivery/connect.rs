//! The action `connect`: relaying a mail to another QMQP server.
//!
//! Contract: the next address is tried only if connecting to the previous one fails, and never
//! after the request began to go out, because it might have arrived. A name is looked up when it is
//! its turn, and stands for its addresses. Everything ends at the mail's deadline, or at the
//! action's timeout if it has one.
//!
//! # Failure
//! Always a reply: `connect failed`, `relay failed`, `malformed relay response`, or `timeout` if it
//! is the action's own. The cause goes to the log.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::flight::Phase;
use qrelay_shared::qmqp::Reply;
use qrelay_shared::sys::rights::PeerSocket;
use qrelay_shared::texts;
use slog::{Logger, warn};

use crate::delivery::Delivery;
use crate::delivery::action::{Connect, NextHop, Place};
use crate::delivery::dial::dial;
use crate::delivery::envelope::Envelope;
use crate::delivery::exchange::ExchangeError;
use crate::delivery::exchange::exchange;
use crate::delivery::lead::Lead;
use crate::delivery::resolve::{self, LookupError};
use crate::flight::Flight;
use crate::mail::Mail;

/// Relays the mail. `deadline` is the mail's, `connect_timeout` the setting.
///
/// The used connection is returned, so that the caller closes it last: closing costs more than
/// everything else that is left to do for a mail, and less once the next hop has closed its side.
pub(crate) fn relay(
    mail: &Mail,
    action: &Connect,
    connect_timeout: Duration,
    deadline: Deadline,
    logger: &Logger,
    (flight, lead): (&Flight, &dyn Lead),
) -> (Delivery, Option<PeerSocket>) {
    let attempt = Attempt {
        flight,
        lead,
        logger,
        id: &mail.id(),
        deadline: action.timeout.map_or(deadline, Deadline::after),
        connect_timeout: action.connect_timeout.unwrap_or(connect_timeout),
        late: if action.timeout.is_some() { texts::TIMEOUT } else { texts::RELAY_FAILED },
    };
    let mut last = None;
    let places: &mut dyn Iterator<Item = &Place> = match action.random {
        true => &mut mixed(&action.places).into_iter(),
        false => &mut action.places.iter(),
    };
    flight.enter(Phase::Connecting);
    for place in places {
        match attempt.reach(place) {
            Ok((socket, name)) => {
                flight.enter(Phase::NextHop);
                let reply = attempt.exchange(mail, &socket, &name);
                let next_hop = Some(name);
                let delivery = Delivery { reply, next_hop, attempted: true, canceled: false };
                return (delivery, Some(socket));
            }
            Err((DialFailure::Failed, name)) => last = Some(name),
            Err((DialFailure::Late, name)) => return (unsent(attempt.late, Some(name)), None),
        }
    }
    (unsent(texts::CONNECT_FAILED, last), None)
}

fn unsent(text: &str, next_hop: Option<Arc<str>>) -> Delivery {
    Delivery { reply: Reply::temporary(text), next_hop, attempted: false, canceled: false }
}

/// The terms of one mail's relay.
struct Attempt<'a> {
    flight: &'a Flight,
    lead: &'a dyn Lead,
    logger: &'a Logger,
    id: &'a str,
    deadline: Deadline,
    connect_timeout: Duration,
    late: &'static str,
}

/// Why there is no connection.
enum DialFailure {
    /// The address doesn't accept a connection.
    Failed,
    /// The deadline has passed.
    Late,
}

/// A connection and the name of the address, or why there is none.
type Reached = Result<(PeerSocket, Arc<str>), (DialFailure, Arc<str>)>;

impl Attempt<'_> {
    fn reach(&self, place: &Place) -> Reached {
        match place {
            Place::Address(hop) => self.reach_address(hop),
            Place::Name { host, port } => self.reach_name(host, *port),
        }
    }

    fn reach_address(&self, hop: &NextHop) -> Reached {
        let name = Arc::clone(&hop.name);
        match self.dial(hop) {
            Ok(socket) => Ok((socket, name)),
            Err(failure) => Err((failure, name)),
        }
    }

    fn reach_name(&self, host: &Arc<str>, port: u16) -> Reached {
        self.lead.give_up();
        let addresses = resolve::addresses(host, port, self.deadline).map_err(|error| {
            warn!(self.logger, # "next_hop,error", "connect failed"; "id" => self.id,
                "next_hop" => &**host, "error" => %error);
            let late = error == LookupError::TimedOut;
            (if late { DialFailure::Late } else { DialFailure::Failed }, Arc::clone(host))
        })?;
        let mut last = (DialFailure::Failed, Arc::clone(host));
        for address in addresses {
            match self.reach_address(&Endpoint::Inet(address).into()) {
                Err(failure @ (DialFailure::Failed, _)) => last = failure,
                reached => return reached,
            }
        }
        Err(last)
    }

    fn dial(&self, hop: &NextHop) -> Result<PeerSocket, DialFailure> {
        self.flight.next_hop(&hop.name);
        let deadline = self.deadline.at_most(self.connect_timeout);
        dial(&hop.endpoint, deadline, self.lead).map_err(|error| {
            warn!(self.logger, # "next_hop,error", "connect failed"; "id" => self.id,
                "next_hop" => &*hop.name, "error" => error.desc());
            if self.deadline.expired() { DialFailure::Late } else { DialFailure::Failed }
        })
    }

    fn exchange(&self, mail: &Mail, socket: &PeerSocket, next_hop: &str) -> Reply {
        let envelope = Envelope::new(mail);
        let reply = exchange(socket, &mut envelope.pieces(), self.deadline, self.lead);
        reply.unwrap_or_else(|error| {
            warn!(self.logger, # "next_hop,error", "relay failed"; "id" => self.id,
                "next_hop" => next_hop, "error" => %error);
            Reply::temporary(match error {
                ExchangeError::TimedOut => self.late,
                ExchangeError::Malformed | ExchangeError::Rights => texts::MALFORMED_RESPONSE,
                ExchangeError::Os(_) | ExchangeError::Closed | ExchangeError::Early => {
                    texts::RELAY_FAILED
                }
            })
        })
    }
}

/// Returns the places in random order.
fn mixed(places: &[Place]) -> Vec<&Place> {
    let mut order: Vec<&Place> = places.iter().collect();
    for left in (2..=order.len()).rev() {
        order.swap(left - 1, random_below(left));
    }
    order
}

/// Returns a number below `bound`, random enough to spread load.
fn random_below(bound: usize) -> usize {
    // Every `RandomState` has other keys, drawn from the system's randomness per thread.
    let random = RandomState::new().build_hasher().finish();
    // The remainder is below a `usize`.
    (random % bound as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::lead::Follower;
    use crate::mail::test::mail;
    use std::collections::HashSet;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn logger() -> Logger {
        Logger::root(slog::Discard, slog::o!())
    }

    fn listener() -> (TcpListener, Endpoint) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let endpoint = Endpoint::Inet(listener.local_addr().expect("address"));
        (listener, endpoint)
    }

    fn action(addresses: Vec<Endpoint>, timeout: Option<Duration>) -> Connect {
        let places = addresses.into_iter().map(Place::from).collect();
        Connect { places, random: false, timeout, connect_timeout: None }
    }

    fn text(delivery: &Delivery) -> String {
        String::from_utf8_lossy(&delivery.reply.encode()).into_owned()
    }

    fn run(action: &Connect, remaining: Duration) -> Delivery {
        let mail = mail(b"A: b\n\n", b"s@x", &[b"r@x"]);
        let limit = Duration::from_secs(5);
        relay(
            &mail,
            action,
            limit,
            Deadline::after(remaining),
            &logger(),
            (&Flight::unrecorded(), &Follower),
        )
        .0
    }

    const LONG: Duration = Duration::from_secs(5);
    const SHORT: Duration = Duration::from_millis(30);

    #[test]
    fn fails_over_only_while_connecting() {
        let (closed, nobody) = listener();
        drop(closed);
        let (server, endpoint) = listener();
        let (unused, never) = listener();
        unused.set_nonblocking(true).expect("nonblocking");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = server.accept().expect("accept");
                let _ = stream.read(&mut [0; 1]);
            });
            let delivery = run(&action(vec![nobody, endpoint.clone(), never], None), LONG);
            assert_eq!(text(&delivery), "13:Zrelay failed,");
            assert_eq!(delivery.next_hop, Some(endpoint.to_string().into()));
            assert!(delivery.attempted);
        });
        assert!(unused.accept().is_err());
    }

    #[test]
    fn relays() {
        let (server, endpoint) = listener();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = server.accept().expect("accept");
                let mut bytes = [0; 200];
                let length = stream.read(&mut bytes).expect("read");
                assert!(bytes[..length].ends_with(b"A: b\n\n,3:s@x,3:r@x,,"));
                stream.write_all(b"10:Kpassed on,").expect("write");
            });
            let delivery = run(&action(vec![endpoint], None), LONG);
            assert_eq!(text(&delivery), "10:Kpassed on,");
        });
    }

    #[test]
    fn nobody_there() {
        let (closed, nobody) = listener();
        drop(closed);
        let delivery = run(&action(vec![nobody.clone(), nobody.clone()], None), LONG);
        assert_eq!(text(&delivery), "15:Zconnect failed,");
        assert_eq!(delivery.next_hop, Some(nobody.to_string().into()));
        assert!(!delivery.attempted);
    }

    #[test]
    fn whose_time_is_over() {
        // The kernel accepts, nobody answers.
        let (_server, endpoint) = listener();
        let delivery = run(&action(vec![endpoint.clone()], None), SHORT);
        assert_eq!((&*text(&delivery), delivery.attempted), ("13:Zrelay failed,", true));
        let delivery = run(&action(vec![endpoint.clone()], Some(SHORT)), LONG);
        assert_eq!((&*text(&delivery), delivery.attempted), ("8:Ztimeout,", true));
        let delivery = run(&action(vec![endpoint], None), Duration::ZERO);
        assert_eq!((&*text(&delivery), delivery.attempted), ("13:Zrelay failed,", false));
    }

    #[test]
    fn an_action_may_take_longer_than_the_mail() {
        let (server, endpoint) = listener();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = server.accept().expect("accept");
                let _ = stream.read(&mut [0; 200]);
                stream.write_all(b"3:Kok,").expect("write");
            });
            let delivery = run(&action(vec![endpoint], Some(LONG)), Duration::ZERO);
            assert_eq!(text(&delivery), "3:Kok,");
        });
    }

    #[test]
    fn random_order_has_everything() {
        let places: Vec<Place> =
            (b'a'..=b'e').map(|n| Endpoint::Abstract(vec![n]).into()).collect();
        let first: HashSet<&Place> = (0..1000)
            .map(|_| {
                let order = mixed(&places);
                assert_eq!(order.iter().collect::<HashSet<_>>().len(), 5);
                order[0]
            })
            .collect();
        assert_eq!(first.len(), 5);
    }
}
