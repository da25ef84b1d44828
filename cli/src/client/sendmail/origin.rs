//! Who sends a mail if the caller doesn't say so: user, domain and name.
//!
//! Contract: no name server is asked; the domain is what the machine has on its disk or in its
//! kernel.
//!
//! # Failure
//! A machine without a name that mail can have is an error, whose text says what to do.

use std::fs::File;
use std::io::Read as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::unistd::{User, gethostname, getuid};
use qrelay_shared::address::{is_domain, is_valid, printable};

/// The file in which Debian keeps the domain of the machine's mail.
const MAILNAME: &str = "/etc/mailname";
/// Highest number of bytes that are read of that file.
const MAX_MAILNAME: u64 = 1024;
/// Highest number of bytes of a name in one encoded word, which has at most 75 characters with its
/// frame (RFC 2047 2).
const MAX_ENCODED: usize = 45;
/// Longest name that is written as it is; longer names are folded.
const MAX_PLAIN: usize = 64;

/// Returns the domain of addresses that have none.
pub fn domain() -> Result<String, String> {
    let mut mailname = Vec::new();
    if let Ok(file) = File::open(MAILNAME) {
        // A file that can't be read names no domain, and the machine's own name is left.
        let _ = file.take(MAX_MAILNAME).read_to_end(&mut mailname);
    }
    let host = gethostname().unwrap_or_default();
    choose_domain(&mailname, host.as_encoded_bytes()).ok_or_else(|| {
        format!(
            "the host name '{}' is no domain for mail: write one into {MAILNAME}, or use --domain",
            printable(host.as_encoded_bytes())
        )
    })
}

/// Returns the first line of /etc/mailname, or else the host's name, whichever is a domain.
fn choose_domain(mailname: &[u8], host: &[u8]) -> Option<String> {
    let first = mailname.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let chosen = [first.trim_ascii(), host].into_iter().find(|name| is_domain(name))?;
    String::from_utf8(chosen.to_vec()).ok()
}

/// Returns the address of the user who runs this process. A user without a name, as in some
/// containers, has the user id as a name.
pub fn own_address(domain: &str) -> String {
    let uid = getuid();
    let user = User::from_uid(uid).ok().flatten();
    let named = user.map(|user| format!("{}@{domain}", user.name));
    named
        .filter(|address| is_valid(address.as_bytes()))
        .unwrap_or_else(|| format!("{uid}@{domain}"))
}

/// Returns the value of the field `From` for an address and a name, which may have any bytes.
pub fn from_value(name: &[u8], address: &str) -> String {
    // Control characters mean nothing in a name, and a line end would begin another field.
    let name: String = String::from_utf8_lossy(name)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let name = name.trim();
    if name.is_empty() {
        return address.to_owned();
    }
    if name.is_ascii() && name.len() <= MAX_PLAIN {
        let quoted = name.replace('\\', "\\\\").replace('"', "\\\"");
        return format!("\"{quoted}\" <{address}>");
    }
    let mut words = vec![String::new()];
    for c in name.chars() {
        if words.last().is_some_and(|word| word.len() + c.len_utf8() > MAX_ENCODED) {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut() {
            word.push(c);
        }
    }
    let words: Vec<_> =
        words.iter().map(|word| format!("=?utf-8?B?{}?=", STANDARD.encode(word))).collect();
    format!("{}\n <{address}>", words.join("\n "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_a_domain() {
        for (mailname, host, expected) in [
            ("", "host", Some("host")),
            ("", "host.example.com", Some("host.example.com")),
            ("mail.example.com\n", "host", Some("mail.example.com")),
            (" mail.example.com \nother\n", "host", Some("mail.example.com")),
            ("\nother\n", "host", Some("host")),
            ("a b\n", "host", Some("host")),
            ("a\rX: y\n", "a b", None),
            ("", "", None),
        ] {
            let chosen = choose_domain(mailname.as_bytes(), host.as_bytes());
            assert_eq!(chosen.as_deref(), expected, "{mailname:?} {host:?}");
        }
    }

    #[test]
    fn writes_names() {
        for (name, expected) in [
            ("", "a@b"),
            (" \n", "a@b"),
            ("CronDaemon", "\"CronDaemon\" <a@b>"),
            ("A \"B\" \\ C", "\"A \\\"B\\\" \\\\ C\" <a@b>"),
            ("A\r\nBcc: evil@x", "\"A  Bcc: evil@x\" <a@b>"),
            ("Jörg", "=?utf-8?B?SsO2cmc=?=\n <a@b>"),
            ("Jörg\nBcc: x\0", "=?utf-8?B?SsO2cmcgQmNjOiB4?=\n <a@b>"),
        ] {
            assert_eq!(from_value(name.as_bytes(), "a@b"), expected, "{name:?}");
        }
        assert_eq!(from_value(b"J\xf6rg", "a@b"), "=?utf-8?B?Su+/vXJn?=\n <a@b>");
    }

    #[test]
    fn long_names_are_folded() {
        let value = from_value("ö".repeat(5000).as_bytes(), "a@b");
        let lines: Vec<_> = value.split('\n').collect();
        assert!(lines.iter().all(|line| line.len() <= 76), "{lines:?}");
        assert!(lines[1..].iter().all(|line| line.starts_with(' ')), "{lines:?}");
        let decoded: Vec<_> = lines[..lines.len() - 1]
            .iter()
            .map(|line| line.trim().replace("=?utf-8?B?", "").replace("?=", ""))
            .map(|word| STANDARD.decode(word).expect("base64"))
            .collect();
        assert_eq!(decoded.concat(), "ö".repeat(5000).into_bytes());
    }
}
