//! The file of a local socket, and the lock beside it, in a directory whose owner may be hostile.
//!
//! Contract: the directory is opened once, and everything happens relative to that descriptor. The
//! socket's file is opened once, too, right after it was bound, and its mode and owner are changed
//! by that descriptor. So a symbolic link, a hard link or another file that somebody puts at the
//! path, at whatever moment, is never changed. No call waits: files are opened with O_PATH or
//! O_NONBLOCK, locks are tried.
//!
//! # Failure
//! Every error names the path and the cause. A file that isn't the expected one is left alone.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag, openat};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, stat};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, geteuid, unlinkat};
use qrelay_shared::settings::ListenerDecl;
use qrelay_shared::sys::rights;

use crate::accept::bind_error::{BindError, os};
use crate::accept::diagnosis::bound_inode;

/// File systems on which stat(2) shows the inode's number that the kernel itself uses. Network file
/// systems and overlays may show another one.
const PLAIN: [FsType; 4] = [TMPFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC];

/// Attempts to lock a file that others remove at the same moment.
const ATTEMPTS: usize = 100;

/// A name in a directory that is open.
#[derive(Debug)]
pub(super) struct Place {
    directory: OwnedFd,
    name: OsString,
    /// The whole path, for messages.
    path: PathBuf,
}

impl Place {
    /// Opens the directory of a path.
    ///
    /// # Errors
    /// There is no such directory, or the path has no last part.
    pub(super) fn of(path: &Path) -> Result<Self, BindError> {
        let failed = |errno: Errno| os("bind", path.display())(errno);
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(failed(Errno::EINVAL));
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = match openat(AT_FDCWD, directory, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                let (path, directory) = (path.to_owned(), directory.to_owned());
                return Err(BindError::NoDirectory { path, directory });
            }
            other => other.map_err(failed)?,
        };
        Ok(Self { directory, name: name.to_owned(), path: path.to_owned() })
    }

    /// Opens what is at the place, without following a symbolic link, for nothing but looking.
    fn open(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(&self.directory, self.name.as_os_str(), flags, Mode::empty())
    }

    fn has(&self, name: &OsStr, file: &FileStat) -> bool {
        fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|now| same_file(&now, file))
    }

    /// Removes a socket that nobody listens on.
    ///
    /// # Errors
    /// Somebody listens on it, it is no socket, or it can't be looked at or removed.
    pub(super) fn remove_stale(&self) -> Result<(), BindError> {
        let shown = self.path.display();
        let found = match self.open() {
            Err(Errno::ENOENT) => return Ok(()),
            other => other.map_err(os("inspect", &shown))?,
        };
        if !is_a(&fstat(&found).map_err(os("inspect", &shown))?, SFlag::S_IFSOCK) {
            return Err(BindError::NotASocket(self.path.clone()));
        }
        let probe = unix_socket().map_err(os("probe", &shown))?;
        let address = UnixAddr::new(&by_descriptor(&found)).map_err(os("probe", &shown))?;
        match connect(probe.as_raw_fd(), &address) {
            Err(Errno::ECONNREFUSED) => {
                match unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
                    Err(Errno::ENOENT) => Ok(()),
                    other => other.map_err(os("remove the stale socket", shown)),
                }
            }
            Err(error @ (Errno::EACCES | Errno::EPERM)) => {
                Err(os("find out whether anybody listens on", shown)(error))
            }
            // A full backlog (EAGAIN), or a socket of another type, belongs to somebody.
            _ => Err(BindError::InUse(shown.to_string())),
        }
    }
}

/// Makes a local socket whose calls never wait, and whose clients can pass no descriptors if the
/// kernel can refuse them. That must be so before the socket listens.
pub(super) fn unix_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    rights::refuse(socket.as_fd());
    Ok(socket)
}

/// Returns a path that leads to an open file, whatever is at the path of the file.
fn by_descriptor(file: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn same_file(one: &FileStat, other: &FileStat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

fn is_a(file: &FileStat, kind: SFlag) -> bool {
    file.st_mode & SFlag::S_IFMT.bits() == kind.bits()
}

/// A socket file that this process has bound.
#[derive(Debug)]
pub(crate) struct SocketFile {
    place: Rc<Place>,
    file: OwnedFd,
    found: FileStat,
}

impl SocketFile {
    /// Opens the file of a socket that has just been bound.
    ///
    /// # Errors
    /// [`BindError::Replaced`]: the file at the place isn't the one that was bound. Otherwise the
    /// file can't be looked at.
    pub(super) fn of(place: Rc<Place>, socket: &OwnedFd) -> Result<Self, BindError> {
        let replaced = || BindError::Replaced(place.path.clone());
        let file = match place.open() {
            Err(Errno::ENOENT) => return Err(replaced()),
            other => other.map_err(os("inspect", place.path.display()))?,
        };
        let found = fstat(&file).map_err(os("inspect", place.path.display()))?;
        // A link has two names: the other one is where the file comes from.
        let fresh = is_a(&found, SFlag::S_IFSOCK)
            && found.st_uid == geteuid().as_raw()
            && found.st_nlink == 1;
        let is_plain = fstatfs(&file).is_ok_and(|fs| PLAIN.contains(&fs.filesystem_type()));
        let same = match bound_inode(socket) {
            Some(inode) if is_plain => inode == found.st_ino as u32,
            _ => true,
        };
        if !(fresh && same) {
            return Err(replaced());
        }
        Ok(Self { place, file, found })
    }

    /// Returns the path.
    pub(crate) fn path(&self) -> &Path {
        &self.place.path
    }

    /// Returns whether no client can find the file any more: the file was removed, or another
    /// directory is where its directory was. A file that somebody has moved within the directory
    /// isn't gone, and neither is one that can't be looked at.
    pub(crate) fn is_gone(&self) -> bool {
        if fstat(&self.file).is_ok_and(|file| file.st_nlink == 0) {
            return true;
        }
        let Ok(directory) = fstat(&self.place.directory) else { return false };
        match self.place.path.parent().map(stat) {
            Some(Ok(now)) if same_file(&now, &directory) => false,
            Some(Ok(_)) => !stat(&self.place.path).is_ok_and(|now| same_file(&now, &self.found)),
            Some(Err(errno)) => matches!(errno, Errno::ENOENT | Errno::ENOTDIR),
            None => false,
        }
    }

    fn is_still_there(&self) -> bool {
        self.place.has(&self.place.name, &self.found)
    }

    /// Removes the file, unless somebody has put another one there.
    pub(crate) fn unlink(&self) {
        if self.is_still_there() {
            let Place { directory, name, .. } = &*self.place;
            // If the file can't be removed, the next start finds it stale.
            let _ = unlinkat(directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }

    /// Gives the file the declared mode and owner, unless somebody has put another one there.
    ///
    /// # Errors
    /// As chmod(2) and chown(2).
    pub(crate) fn apply(&self, declared: &ListenerDecl) -> Result<(), BindError> {
        if self.is_still_there() { self.set(declared) } else { Ok(()) }
    }

    /// Changes mode and owner of the bound file, wherever it is now.
    fn set(&self, declared: &ListenerDecl) -> Result<(), BindError> {
        let path = self.place.path.display();
        if declared.owner.is_some() || declared.group.is_some() {
            let (uid, gid) = (declared.owner.map(Uid::from_raw), declared.group.map(Gid::from_raw));
            fchownat(&self.file, "", uid, gid, AtFlags::AT_EMPTY_PATH)
                .map_err(os("change the owner of", &path))?;
        }
        // The file has the mode from the start, unless the umask forbids it or the owner is
        // another one now.
        let now = fstat(&self.file).map_err(os("inspect", &path))?;
        if now.st_mode & 0o7777 == declared.mode {
            return Ok(());
        }
        // A descriptor of O_PATH can't be passed to fchmod(2). The link in /proc leads to the file
        // itself.
        let mode = std::fs::Permissions::from_mode(declared.mode);
        std::fs::set_permissions(by_descriptor(&self.file), mode)
            .map_err(os("change the mode of", path))
    }
}

/// The lock beside a path; dropping it removes the lock file.
pub(super) struct PathLock {
    place: Rc<Place>,
    name: OsString,
    _lock: Flock<File>,
}

impl PathLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// Another process has the lock, or the file isn't a regular file or can't be opened.
    pub(super) fn take(place: Rc<Place>) -> Result<Self, BindError> {
        let mut name = place.name.clone();
        name.push(".lock");
        let path = place.path.with_file_name(&name);
        // A process that has just released its lock may have removed the file that is locked here.
        for _ in 0..ATTEMPTS {
            let file = open_lock(&place, &name, &path)?;
            let found = fstat(&file).map_err(os("inspect", path.display()))?;
            if !is_a(&found, SFlag::S_IFREG) {
                return Err(BindError::NotAFile(path));
            }
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, Errno::EAGAIN)) => break,
                Err((_, error)) => return Err(os("lock", path.display())(error)),
            };
            if place.has(&name, &found) {
                return Ok(Self { place, name, _lock: lock });
            }
        }
        Err(BindError::Locked(place.path.clone()))
    }
}

/// Opens or creates the lock file.
fn open_lock(place: &Place, name: &OsStr, path: &Path) -> Result<File, BindError> {
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    match openat(place.directory.as_fd(), name, flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(file) => Ok(file.into()),
        // A symbolic link, a directory, and a FIFO or a socket.
        Err(Errno::ELOOP | Errno::EISDIR | Errno::ENXIO) => {
            Err(BindError::NotAFile(path.to_owned()))
        }
        // Somebody has a lease on the file (fcntl(2), F_SETLEASE).
        Err(Errno::EAGAIN) => Err(BindError::Locked(place.path.clone())),
        Err(error) => Err(os("create", path.display())(error)),
    }
}

impl Drop for PathLock {
    fn drop(&mut self) {
        // Still locked here, so nobody else can be using the file.
        let _ = unlinkat(&self.place.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir);
    }
}

#[cfg(test)]
#[path = "socket_file_tests.rs"]
mod tests;
