//! Headers: fields lie in order within the message, and removing them removes them.
//!
//! # Failure
//! A panic; libFuzzer keeps the input under `artifacts/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qrelay_shared::mail;

fuzz_target!(|input: &[u8]| {
    let mut end = 0;
    for field in mail::fields(input) {
        assert!(field.name.start >= end && field.name.end < field.value.start);
        end = field.whole().end;
    }
    assert!(end <= input.len());
    assert!(mail::received_count(input) >= mail::headers(input, b"Received").len());
    let mut left = input.to_vec();
    for range in mail::field_ranges(input, b"A").into_iter().rev() {
        left.drain(range);
    }
    assert_eq!(mail::header_value(&left, b"a"), None);
});
