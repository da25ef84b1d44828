//! Fuzzes e-mail addresses: a valid address is printable, and the form for logs contains no
//! delimiter and no control character.
//!
//! # Failure
//! A violation panics; libFuzzer keeps the input under `artifacts/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qrelay_shared::{address, pond};

fuzz_target!(|input: &[u8]| {
    if address::is_valid(input) {
        assert!(input.len() <= address::MAX_ADDRESS);
        assert!(input.iter().all(u8::is_ascii_graphic));
    }
    let shown = address::escape_for_log(input);
    assert!(!shown.contains(['<', '>', ',']) && !shown.chars().any(char::is_control));
    assert!(!address::printable(input).chars().any(char::is_control));
    let recipients = shown.replace(' ', ",");
    let record = pond::Record {
        timestamp: 0,
        remote_host: Some(&shown),
        site: Some(input),
        forwarded_to: Some(&shown),
        message: pond::Message {
            sender: &shown,
            recipients: &recipients,
            recipient_count: input.len() as u32,
            text: &shown,
        },
        length: 0,
        received: 0,
        sent: 0,
        duration: 0,
    };
    assert!(pond::encode(&record).len() <= pond::MAX_DATAGRAM);
});
