//! Whether the daemon will be able to make the socket files of a script.
//!
//! Contract: nothing is made. The answer is for the user who asks.
//!
//! # Failure
//! A text for the administrator. The file system may be another one when the daemon starts.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};
use qrelay_shared::settings::{Declaration, ListenAddress};

/// Returns a warning for each socket file that can't be made.
pub(super) fn warnings(declaration: &Declaration) -> Vec<String> {
    let paths = declaration.listeners.iter().filter_map(|listener| match &listener.address {
        ListenAddress::Path(path) => Some(path),
        _ => None,
    });
    paths.filter_map(|path| warning(path)).collect()
}

fn warning(path: &Path) -> Option<String> {
    let directory = path.parent()?;
    let shown = directory.display();
    let may_write = AccessFlags::W_OK | AccessFlags::X_OK;
    let cause = match faccessat(AT_FDCWD, directory, may_write, AtFlags::AT_EACCESS) {
        Ok(()) | Err(Errno::EACCES) if directory.is_file() => Errno::ENOTDIR,
        Ok(()) => return occupied(path),
        Err(error) => error,
    };
    Some(match cause {
        Errno::ENOENT => format!(
            "the directory {shown} doesn't exist; create it, for instance by RuntimeDirectory= in \
             the unit or by systemd-tmpfiles"
        ),
        Errno::EACCES => {
            format!("the directory {shown} can't be written by the user who runs this check")
        }
        error => format!("the directory {shown} can't be written: {}", error.desc()),
    })
}

/// Returns a warning if there is a file that isn't a socket.
fn occupied(path: &Path) -> Option<String> {
    let status = path.symlink_metadata().ok()?;
    (!status.file_type().is_socket()).then(|| {
        format!("{} is there already and is no socket, so qrelay won't replace it", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_every_kind() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("file"), "").expect("a file");
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket");
        for (name, expected) in [
            ("new", None),
            ("socket", None),
            ("file", Some("is no socket")),
            ("missing/in", Some("missing doesn't exist; create it")),
            ("file/in", Some("file can't be written: Not a directory")),
            ("file/file/in", Some("file can't be written: Not a directory")),
        ] {
            let told = warning(&at(name));
            match expected {
                None => assert_eq!(told, None, "{name}"),
                Some(part) => assert!(told.as_ref().is_some_and(|t| t.contains(part)), "{told:?}"),
            }
        }
    }
}
