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
    let message = pond::Message::new(input, input.split(|&b| b == b'\n'), input);
    assert!(message.text.len() < pond::MAX_MESSAGE);
});
