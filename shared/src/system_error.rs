//! The system's errors as people read them. Pure.
//!
//! # Failure
//! None.

use std::borrow::Cow;
use std::fmt::Display;

/// What Rust appends to the system's text of an error, before the error's number.
const BEFORE: &str = " (os error ";

/// Returns a text without the numbers that Rust appends to the texts of system errors: the text
/// says the same, and the number nothing more.
#[must_use]
pub fn without_numbers(text: &str) -> Cow<'_, str> {
    if !text.contains(BEFORE) {
        return Cow::Borrowed(text);
    }
    let mut parts = text.split(BEFORE);
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        match part[digits..].strip_prefix(')').filter(|_| digits > 0) {
            Some(rest) => shown.push_str(rest),
            None => {
                shown.push_str(BEFORE);
                shown.push_str(part);
            }
        }
    }
    Cow::Owned(shown)
}

/// Returns the text of an error, and of what caused it if the text has that, without numbers.
pub fn shown(error: &impl Display) -> String {
    without_numbers(&error.to_string()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_left_out() {
        let refused = std::io::Error::from_raw_os_error(111);
        assert_eq!(shown(&refused), "Connection refused");
        for (text, expected) in [
            ("a: No such file (os error 2): b (os error 13)", "a: No such file: b"),
            ("x (os error )", "x (os error )"),
            ("x (os error 5", "x (os error 5"),
            ("(os error 5)", "(os error 5)"),
            ("nothing", "nothing"),
        ] {
            assert_eq!(without_numbers(text), expected);
        }
    }
}
