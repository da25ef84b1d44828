//! The lines that stand before a relayed message: what the script inserted, and the trace of
//! where the mail came from.
//!
//! Contract: the last inserted line comes first; then exactly one `Received` line; every line
//! ends in CRLF. Inserted lines have been checked by who inserted them.

use std::io::Write;

use qrelay_shared::ipc::message::Peer;

/// Inserted lines, in the order of the calls, and the `Received` line for this client.
///
/// A local client in a foreign pid namespace has no pid here; its line says `PID=0`, as the
/// kernel does, so that the line keeps its form.
pub fn prefix(inserted: &[String], peer: &Peer) -> Vec<u8> {
    let mut lines = Vec::with_capacity(64 + inserted_size(inserted));
    for line in inserted.iter().rev() {
        lines.extend_from_slice(line.as_bytes());
        lines.extend_from_slice(b"\r\n");
    }
    // Writing to a `Vec` can't fail.
    let _ = match peer {
        Peer::Local { pid, uid, .. } => {
            write!(lines, "Received: from PID={} UID={uid} with QMQP\r\n", pid.unwrap_or(0))
        }
        Peer::Remote(address) => write!(lines, "Received: from [{address}] with QMQP\r\n"),
    };
    lines
}

/// Bytes that inserted lines add to a message, their ends included.
pub fn inserted_size(inserted: &[String]) -> usize {
    inserted.iter().map(|line| line.len() + 2).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(inserted: &[&str], peer: Peer) -> String {
        let inserted: Vec<String> = inserted.iter().map(ToString::to_string).collect();
        String::from_utf8(prefix(&inserted, &peer)).expect("text")
    }

    #[test]
    fn local_clients() {
        let peer = Peer::Local { pid: Some(42), uid: 1000, gid: 7 };
        assert_eq!(text(&[], peer), "Received: from PID=42 UID=1000 with QMQP\r\n");
        assert_eq!(
            text(&["A: 1", "B: 2"], peer),
            "B: 2\r\nA: 1\r\nReceived: from PID=42 UID=1000 with QMQP\r\n"
        );
        let foreign = Peer::Local { pid: None, uid: 0, gid: 0 };
        assert_eq!(text(&[], foreign), "Received: from PID=0 UID=0 with QMQP\r\n");
    }

    #[test]
    fn remote_clients() {
        let v4 = Peer::Remote([192, 0, 2, 1].into());
        assert_eq!(text(&[], v4), "Received: from [192.0.2.1] with QMQP\r\n");
        let v6 = Peer::Remote("2001:db8::1".parse().expect("address"));
        assert_eq!(text(&[], v6), "Received: from [2001:db8::1] with QMQP\r\n");
    }

    #[test]
    fn counts_inserted_bytes() {
        assert_eq!(inserted_size(&[]), 0);
        assert_eq!(inserted_size(&["X-A: b".to_string()]), 8);
    }
}
