//! The errors of the system's resolver.

use std::ffi::CStr;
use std::io;

use nix::libc;

/// Returns whether a look-up that failed with this error may work later: no server answered
/// (EAI_AGAIN), or the system lacked something (EAI_MEMORY, EAI_SYSTEM). A name that doesn't exist
/// is an answer.
pub fn may_pass(error: &io::Error) -> bool {
    // The standard library keeps of the resolver's code only the text, but of EAI_SYSTEM the
    // system's error.
    let text = error.to_string();
    error.raw_os_error().is_some()
        || [libc::EAI_AGAIN, libc::EAI_MEMORY].iter().any(|&code| text.ends_with(&describe(code)))
}

/// Returns the resolver's text for a code.
fn describe(code: i32) -> String {
    // SAFETY: gai_strerror returns a string that is never freed, for any code.
    let text = unsafe { CStr::from_ptr(libc::gai_strerror(code)) };
    text.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_name_is_an_answer() {
        let failed = |code| {
            io::Error::other(format!("failed to lookup address information: {}", describe(code)))
        };
        assert!(may_pass(&failed(libc::EAI_AGAIN)) && may_pass(&failed(libc::EAI_MEMORY)));
        assert!(!may_pass(&failed(libc::EAI_NONAME)) && !may_pass(&failed(libc::EAI_FAIL)));
        assert!(may_pass(&io::Error::from_raw_os_error(libc::EMFILE)));
    }
}
