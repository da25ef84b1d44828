//! Fuzzes headers: fields lie in order within the message, and after the removal of a field's
//! ranges no field of that name is left.
//!
//! # Failure
//! A violation panics; libFuzzer keeps the input under `artifacts/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qrelay_shared::header;

fuzz_target!(|input: &[u8]| {
    let mut end = 0;
    for field in header::fields(input) {
        assert!(field.name.start >= end && field.name.end < field.value.start);
        end = field.whole().end;
    }
    assert!(end <= input.len());
    assert!(header::received_count(input) >= header::headers(input, b"Received").len());
    let removed = header::field_ranges(input, b"A");
    let left = header::without(input, &removed).collect::<Vec<_>>().concat();
    assert_eq!(header::header_value(&left, b"a"), None);
});
