//! The lines before a relayed message: the lines that the script inserted, and the `Received` line,
//! which says where the mail came from.
//!
//! Contract: the last inserted line comes first; then exactly one `Received` line; every line ends
//! in CRLF. Inserted lines are checked when they are inserted.

use std::io::Write;

use qrelay_shared::ipc::message::Peer;

use crate::mail::Inserted;

/// Appends inserted lines and the `Received` line for this client.
///
/// A local client in a foreign pid namespace has no pid here; its line says `PID=0`, as the kernel
/// does, so that the line keeps its form.
pub(crate) fn write_prefix(out: &mut Vec<u8>, inserted: &Inserted, peer: &Peer) {
    out.extend_from_slice(inserted.text());
    out.extend_from_slice(b"Received: from ");
    match peer {
        Peer::Local { pid, uid, .. } => {
            let mut digits = itoa::Buffer::new();
            out.extend_from_slice(b"PID=");
            out.extend_from_slice(digits.format(pid.unwrap_or(0)).as_bytes());
            out.extend_from_slice(b" UID=");
            out.extend_from_slice(digits.format(*uid).as_bytes());
        }
        // Writing to a `Vec` can't fail.
        Peer::Remote(address) => _ = write!(out, "[{address}]"),
    }
    out.extend_from_slice(b" with QMQP\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(lines: &[(&str, &str)], peer: Peer) -> String {
        let mut inserted = Inserted::default();
        lines.iter().for_each(|(name, value)| inserted.insert(name.as_bytes(), value.as_bytes()));
        assert_eq!(inserted.count(), lines.len());
        let mut out = Vec::new();
        write_prefix(&mut out, &inserted, &peer);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn local_clients() {
        let peer = Peer::Local { pid: Some(42), uid: 1000, gid: 7 };
        assert_eq!(text(&[], peer), "Received: from PID=42 UID=1000 with QMQP\r\n");
        assert_eq!(
            text(&[("A", "1"), ("B", "2")], peer),
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
}
