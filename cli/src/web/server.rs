//! The HTTP server: connections, each with a thread, and their bounds.
//!
//! Contract: at most [`CONNECTIONS_MAX`] connections exist, each with one request of at most
//! [`HEAD_MAX`] bytes and a time limit. When there are as many, a new connection takes the place of
//! the oldest one. So clients that are slow or say nothing hold up nobody else, however many they
//! are.
//!
//! # Failure
//! A connection that breaks a rule gets a refusal, if it still takes one, and is closed. A failure
//! to accept or to start a thread is told, and the server goes on.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;

use crate::web::request::{self, HEAD_MAX, Hosts, Request};
use crate::web::response::Response;

/// Most connections at a time. A browser opens a few, and Prometheus one.
const CONNECTIONS_MAX: usize = 64;
/// Longest time for a request to arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for an answer to be taken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the client's end of a connection after its answer. Closing a socket with unread
/// data would reset the connection, and the reset would destroy the answer.
const LINGER: Duration = Duration::from_secs(1);
/// Most bytes that are read after a request.
const LINGER_MAX: usize = 64 * 1024;
/// Pause after a failed accept. Without a pause the next accept would fail again at once, because
/// the usual cause is a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Stack of a connection's thread in bytes.
const STACK: usize = 256 * 1024;

/// What answers requests.
pub trait Site: Send + Sync + 'static {
    /// Returns the answer to a request.
    fn answer(&self, request: &Request) -> Response;
}

/// Serves until the process ends. `failed` is told of connections that could not begin.
pub fn serve(listener: &TcpListener, site: &Arc<impl Site>, failed: impl Fn(&io::Error)) -> ! {
    let hosts = match listener.local_addr().map(|address| address.ip().to_canonical().is_loopback())
    {
        Ok(false) => Hosts::Any,
        Ok(true) | Err(_) => Hosts::Loopback,
    };
    let places = Arc::new(Places::default());
    loop {
        let begun = listener.accept().and_then(|(stream, _): (_, SocketAddr)| {
            let place = places.take(&Arc::new(stream));
            let site = site.clone();
            let connection = move || {
                // A failed connection concerns only its client.
                let _ = converse(&place.stream, hosts, site.as_ref());
            };
            thread::Builder::new().name("client".into()).stack_size(STACK).spawn(connection)
        });
        if let Err(error) = begun {
            failed(&error);
            thread::sleep(ACCEPT_PAUSE);
        }
    }
}

/// The connections that exist, oldest first.
#[derive(Default)]
struct Places {
    taken: Mutex<VecDeque<Arc<TcpStream>>>,
    freed: Condvar,
}

/// A connection's right to exist, until it is dropped.
struct Place {
    places: Arc<Places>,
    stream: Arc<TcpStream>,
}

impl Places {
    /// Waits for a place, and has the oldest connection make room if there is none.
    fn take(self: &Arc<Self>, stream: &Arc<TcpStream>) -> Place {
        let mut taken = self.lock();
        while taken.len() >= CONNECTIONS_MAX {
            if let Some(oldest) = taken.front() {
                // The thread of the connection sees the end, and leaves. An error means that the
                // connection has ended by itself.
                let _ = oldest.shutdown(Shutdown::Both);
            }
            taken = self.freed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        taken.push_back(stream.clone());
        Place { places: self.clone(), stream: stream.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<TcpStream>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().retain(|one| !Arc::ptr_eq(one, &self.stream));
        self.places.freed.notify_one();
    }
}

/// Reads a request and answers it.
fn converse(stream: &TcpStream, hosts: Hosts, site: &impl Site) -> io::Result<()> {
    let Some(request) = receive(stream, hosts)? else { return Ok(()) };
    let (head_only, response) = match request {
        Ok(request) => (request.head_only, site.answer(&request)),
        Err(refusal) => (false, Response::from(refusal)),
    };
    let deadline = Deadline::after(ANSWER_TIMEOUT);
    send(stream, response.head().as_bytes(), deadline)?;
    if !head_only {
        send(stream, response.body(), deadline)?;
    }
    stream.shutdown(Shutdown::Write)?;
    linger(stream)
}

/// Receives a request. Returns `None` if the client says nothing, or not enough in time.
fn receive(
    mut stream: &TcpStream,
    hosts: Hosts,
) -> io::Result<Option<Result<Request, request::Refusal>>> {
    let deadline = Deadline::after(REQUEST_TIMEOUT);
    let mut head = [0; HEAD_MAX];
    let mut length = 0;
    while !deadline.expired() {
        stream.set_read_timeout(Some(left(deadline)))?;
        match stream.read(&mut head[length..])? {
            0 => return Ok(None),
            more => length += more,
        }
        match request::parse(&head[..length], hosts) {
            Ok(None) => {}
            Ok(Some(request)) => return Ok(Some(Ok(request))),
            Err(refusal) => return Ok(Some(Err(refusal))),
        }
    }
    Ok(None)
}

/// Sends all bytes, or fails when the deadline has passed.
fn send(mut stream: &TcpStream, mut bytes: &[u8], deadline: Deadline) -> io::Result<()> {
    while !bytes.is_empty() {
        if deadline.expired() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left(deadline)))?;
        let sent = stream.write(bytes)?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Reads and drops what the client still sends, within bounds, until it closes the connection.
fn linger(mut stream: &TcpStream) -> io::Result<()> {
    let deadline = Deadline::after(LINGER);
    let mut dropped = [0; 4096];
    let mut length = 0;
    while length < LINGER_MAX && !deadline.expired() {
        stream.set_read_timeout(Some(left(deadline)))?;
        match stream.read(&mut dropped)? {
            0 => break,
            more => length += more,
        }
    }
    Ok(())
}

/// Returns the time until a deadline, and never zero, which would be no limit at all.
fn left(deadline: Deadline) -> Duration {
    deadline.remaining().max(Duration::from_millis(1))
}
