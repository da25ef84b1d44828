//! Whether anybody but root could change a file, or which file a path leads to.
//!
//! Contract: every part of the path is looked at, also what symbolic links lead through. Each part
//! has to be root's. No directory may be writable by group or others, unless it has the sticky bit,
//! as /tmp has: there nobody can replace what is root's. Permissions by access control lists show
//! in the group's bits (acl(5)). What passes can't change afterwards, except by root.
//!
//! # Failure
//! [`Unsafe`]: the first part that doesn't pass, or can't be looked at.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{Metadata, metadata, read_link, symlink_metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;

/// Most symbolic links on the way, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Permission of group and others to write.
const OTHERS_WRITE: u32 = 0o022;
/// The sticky bit.
const STICKY: u32 = 0o1000;

/// Why a path isn't safe.
#[derive(Debug, thiserror::Error)]
pub enum Unsafe {
    /// Somebody other than root may change this part.
    #[error("others than root may write {} (owner {owner}, mode {mode:04o})", path.display())]
    Writable {
        /// The file or directory.
        path: PathBuf,
        /// The user id of its owner.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// A part can't be looked at.
    #[error("cannot look at {}: {cause}", path.display())]
    Unknown {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
}

/// Checks an absolute path.
///
/// # Errors
/// See [`Unsafe`].
pub fn check(path: &Path) -> Result<(), Unsafe> {
    let mut walk = Walk { at: "/".into(), rest: VecDeque::new(), links: 0 };
    walk.push(path);
    require_root(Path::new("/"), &look(Path::new("/"))?)?;
    while let Some(name) = walk.rest.pop_front() {
        walk.step(&name)?;
    }
    Ok(())
}

fn look(path: &Path) -> Result<Metadata, Unsafe> {
    symlink_metadata(path).map_err(|cause| Unsafe::Unknown { path: path.to_owned(), cause })
}

/// Checks one file, directory or symbolic link.
fn require_root(path: &Path, found: &Metadata) -> Result<(), Unsafe> {
    let kind = found.file_type();
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    // The mode of a symbolic link means nothing. A device such as /dev/null stays what it is.
    let keeps = kind.is_symlink() || kind.is_char_device();
    let protected = kind.is_dir() && mode & STICKY != 0;
    if owner == 0 && (mode & OTHERS_WRITE == 0 || keeps || protected) {
        return Ok(());
    }
    Err(Unsafe::Writable { path: path.to_owned(), owner, mode })
}

/// A way through the file system.
struct Walk {
    /// The directory that has been reached.
    at: PathBuf,
    /// The names still to come.
    rest: VecDeque<OsString>,
    links: usize,
}

impl Walk {
    /// Goes to a path before all that still comes.
    fn push(&mut self, path: &Path) {
        if path.is_absolute() {
            self.at = "/".into();
        }
        for part in path.components().rev() {
            match part {
                Component::Normal(name) => self.rest.push_front(name.to_owned()),
                Component::ParentDir => self.rest.push_front("..".into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
    }

    fn step(&mut self, name: &OsString) -> Result<(), Unsafe> {
        if name == ".." {
            self.at.pop();
            return Ok(());
        }
        let path = self.at.join(name);
        let found = look(&path)?;
        require_root(&path, &found)?;
        if !found.file_type().is_symlink() {
            self.at = path;
            return Ok(());
        }
        let failed = |cause| Unsafe::Unknown { path: path.clone(), cause };
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(failed(Errno::ELOOP.into()));
        }
        let target = read_link(&path).map_err(failed)?;
        // A link of /proc to a pipe leads there, whatever its text says.
        match metadata(&path) {
            Ok(pipe) if pipe.file_type().is_fifo() && self.at.starts_with("/proc") => {
                require_root(&path, &pipe)
            }
            _ => {
                self.push(&target);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

    /// Some user other than root.
    const OTHER: u32 = 65534;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    }

    /// Makes `ROOT/etc/config.lua`, and passes ROOT on. Needs root.
    fn scene(name: &str, run: impl FnOnce(&Path)) {
        let root = std::env::temp_dir().join(format!("qrelay-safe-{name}-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).expect("a directory");
        fs::write(root.join("etc/config.lua"), "").expect("a file");
        for path in [&root, &root.join("etc")] {
            mode(path, 0o755);
        }
        mode(&root.join("etc/config.lua"), 0o644);
        run(&root);
        fs::remove_dir_all(&root).expect("removed");
    }

    /// Returns the part, relative to the root of the scene, that others may write.
    fn culprit(root: &Path, path: &str) -> Option<String> {
        match check(&root.join(path)) {
            Ok(()) => None,
            Err(Unsafe::Writable { path, .. }) => {
                let part = path.strip_prefix(root).expect("in the scene");
                Some(part.to_str().expect("UTF-8").to_owned())
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn every_part_is_roots() {
        scene("parts", |root| {
            assert_eq!(culprit(root, "etc/config.lua"), None);
            for (part, bad) in [("etc/config.lua", 0o664), ("etc", 0o777), ("etc", 0o775)] {
                mode(&root.join(part), bad);
                assert_eq!(culprit(root, "etc/config.lua").as_deref(), Some(part), "{bad:o}");
                mode(&root.join(part), 0o755);
            }
            for part in ["etc/config.lua", "etc", ""] {
                chown(root.join(part), Some(OTHER), None).expect("chown");
                assert_eq!(culprit(root, "etc/config.lua").as_deref(), Some(part));
                chown(root.join(part), Some(0), None).expect("chown");
            }
            mode(&root.join("etc"), 0o1777);
            assert_eq!(culprit(root, "etc/config.lua"), None, "sticky");
            mode(&root.join("etc/config.lua"), 0o1666);
            assert_eq!(culprit(root, "etc/config.lua").as_deref(), Some("etc/config.lua"));
        });
    }

    #[test]
    fn links_are_walked_through() {
        scene("links", |root| {
            fs::create_dir(root.join("open")).expect("a directory");
            symlink("../etc/config.lua", root.join("open/relative")).expect("a link");
            symlink(root.join("etc/../etc"), root.join("absolute")).expect("a link");
            assert_eq!(culprit(root, "open/relative"), None);
            assert_eq!(culprit(root, "absolute/config.lua"), None);
            mode(&root.join("open"), 0o777);
            assert_eq!(culprit(root, "open/relative").as_deref(), Some("open"));
            assert_eq!(culprit(root, "absolute/config.lua"), None);
            // In a sticky directory everybody can make links of their own.
            mode(&root.join("open"), 0o1777);
            lchown(root.join("open/relative"), Some(OTHER), None).expect("chown");
            assert_eq!(culprit(root, "open/relative").as_deref(), Some("open/relative"));
            mode(&root.join("etc"), 0o777);
            assert_eq!(culprit(root, "absolute/config.lua").as_deref(), Some("etc"));
        });
    }

    #[test]
    fn a_way_without_an_end_and_a_way_to_nowhere() {
        scene("loop", |root| {
            symlink("loop", root.join("loop")).expect("a link");
            let text = check(&root.join("loop")).expect_err("a loop").to_string();
            assert!(text.contains("symbolic links"), "{text}");
            let text = check(&root.join("etc/none")).expect_err("nothing").to_string();
            assert!(text.contains("cannot look at") && text.contains("etc/none"), "{text}");
        });
    }

    #[test]
    fn devices_and_pipes() {
        check(Path::new("/dev/null")).expect("a device");
        let (read, _write) = io::pipe().expect("a pipe");
        check(&PathBuf::from(format!("/dev/fd/{}", read.as_raw_fd()))).expect("a pipe");
    }
}
