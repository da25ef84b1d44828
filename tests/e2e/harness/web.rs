//! `qrelay web` as a process, and a client of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};

use super::PATIENCE;
use super::daemon::{QRELAY, command};

/// A running `qrelay web`, killed when dropped.
#[derive(Debug)]
pub struct Web {
    child: Child,
    /// The first line that it printed.
    pub announcement: String,
    pub address: SocketAddr,
}

impl Web {
    /// Starts it for the daemon with this control socket, on a free port, and waits until it
    /// listens.
    pub fn start(control: &Path) -> Self {
        Self::start_with(control, &["--listen", "127.0.0.1:0"])
    }

    /// Starts it with these options, one of which is `--listen`.
    pub fn start_with(control: &Path, options: &[&str]) -> Self {
        let mut child = command(QRELAY)
            .args(["web", "--control"])
            .arg(control)
            .args(options)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut announcement = String::new();
        let stderr = child.stderr.take().expect("a pipe");
        BufReader::new(stderr).read_line(&mut announcement).expect("a line");
        let url = announcement.split_once("http://").and_then(|(_, rest)| rest.split_once('/'));
        let address = url.and_then(|(address, _)| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("no address in {announcement:?}"));
        Self { child, announcement, address }
    }

    pub fn pid(&self) -> i32 {
        self.child.id().try_into().expect("a pid")
    }

    /// Opens a connection.
    pub fn connect(&self) -> TcpStream {
        connect(self.address.port())
    }

    /// Sends bytes, and returns all that comes back.
    pub fn raw(&self, request: &[u8]) -> String {
        exchange(self.connect(), request)
    }

    /// Asks for a path, with more header lines.
    pub fn ask(&self, path: &str, headers: &[&str]) -> Answer {
        ask(self.connect(), path, headers)
    }

    /// Asks for a path.
    pub fn get(&self, path: &str) -> Answer {
        self.ask(path, &[])
    }
}

/// Opens a connection to a server of this machine.
fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

fn exchange(mut stream: TcpStream, request: &[u8]) -> String {
    stream.write_all(request).expect("sent");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer in time");
    String::from_utf8(answer).expect("UTF-8")
}

fn ask(stream: TcpStream, path: &str, headers: &[&str]) -> Answer {
    let mut request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n");
    headers.iter().for_each(|line| request.extend([line, "\r\n"]));
    request.push_str("\r\n");
    Answer::from(exchange(stream, request.as_bytes()))
}

/// Asks the server on this port of this machine for a path.
pub fn get(port: u16, path: &str) -> Answer {
    ask(connect(port), path, &[])
}

impl Drop for Web {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer taken apart.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The header lines.
    pub head: String,
    pub body: String,
}

impl From<String> for Answer {
    fn from(text: String) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Self {
            status: status.unwrap_or_else(|| panic!("{text:?}")),
            head: head.to_owned(),
            body: body.to_owned(),
        }
    }
}

impl Answer {
    /// Returns the value of a header line.
    pub fn header(&self, name: &str) -> &str {
        self.head
            .lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(found, _)| found.eq_ignore_ascii_case(name))
            .map_or("", |(_, value)| value)
    }
}
