//! Making a listening socket: stale files, locks, modes.
//!
//! A path is bound under a flock on `PATH.lock`, which is held only while the path is bound, so
//! that two daemons that start at once can't take the path from each other. Whatever is at the path
//! is left alone, unless it is a socket that refuses connections.
//!
//! # Failure
//! Every error names the address and the cause; nothing is left behind.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, UnixAddr,
    bind, connect, listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chown};
use qrelay_shared::settings::ListenerDecl;
use qrelay_shared::sys::rights;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// Another process listens on the address.
    #[error("{0} is already in use by another process")]
    InUse(String),
    /// The path is no socket.
    #[error("{0} exists and is not a socket; it was left alone")]
    NotASocket(PathBuf),
    /// Another process is binding the path.
    #[error("{0} is locked: another process is starting on this path")]
    Locked(PathBuf),
    /// The named step failed.
    #[error("cannot {0} {1}: {2}")]
    Os(&'static str, String, io::Error),
}

fn os<E: Into<io::Error>>(step: &'static str, what: impl ToString) -> impl FnOnce(E) -> BindError {
    move |error| BindError::Os(step, what.to_string(), error.into())
}

/// A socket file that this process has bound, recognized by its device and inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() })
    }

    fn is_still_ours(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }

    /// Removes the file, unless somebody has put another one there.
    pub(crate) fn unlink(&self) {
        if self.is_still_ours() {
            // If the file can't be removed, the next start finds it stale.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Gives the file the declared mode and owner.
    ///
    /// # Errors
    /// As chmod(2) and chown(2).
    pub(crate) fn apply(&self, declared: &ListenerDecl) -> Result<(), BindError> {
        if !self.is_still_ours() {
            return Ok(());
        }
        let path = self.path.display();
        if declared.owner.is_some() || declared.group.is_some() {
            let (uid, gid) = (declared.owner.map(Uid::from_raw), declared.group.map(Gid::from_raw));
            chown(&self.path, uid, gid).map_err(os("change the owner of", path))?;
        }
        std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(declared.mode))
            .map_err(os("change the mode of", self.path.display()))
    }
}

/// Binds a path and listens on it.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn bind_path(
    path: &Path,
    declared: &ListenerDecl,
) -> Result<(UnixListener, SocketFile), BindError> {
    let shown = path.display().to_string();
    let lock = PathLock::take(path)?;
    remove_stale(path)?;
    let socket = unix_socket().map_err(os("create a socket for", &shown))?;
    let address = UnixAddr::new(path).map_err(os("bind", &shown))?;
    // Nobody may connect before the mode is set.
    let old = umask(Mode::from_bits_truncate(0o177));
    let bound = bind(socket.as_raw_fd(), &address);
    umask(old);
    bound.map_err(os("bind", &shown))?;
    let file = SocketFile::of(path).map_err(os("inspect", &shown))?;
    let finished = file
        .apply(declared)
        .and_then(|()| listen(&socket, backlog(declared)).map_err(os("listen on", &shown)));
    drop(lock);
    match finished {
        Ok(()) => Ok((UnixListener::from(socket), file)),
        Err(error) => {
            file.unlink();
            Err(error)
        }
    }
}

/// Binds a name of the abstract namespace and listens on it.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn bind_abstract(
    name: &[u8],
    declared: &ListenerDecl,
) -> Result<UnixListener, BindError> {
    let shown = declared.address.to_string();
    let socket = unix_socket().map_err(os("create a socket for", &shown))?;
    let address = UnixAddr::new_abstract(name).map_err(os("bind", &shown))?;
    bind_and_listen(&socket, &address, declared)?;
    Ok(UnixListener::from(socket))
}

/// Binds a TCP port and listens on it.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn bind_inet(
    address: SocketAddr,
    declared: &ListenerDecl,
) -> Result<TcpListener, BindError> {
    let shown = address.to_string();
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(os("create a socket for", &shown))?;
    setsockopt(&socket, sockopt::ReuseAddr, &true).map_err(os("prepare", &shown))?;
    match address {
        SocketAddr::V4(v4) => bind_and_listen(&socket, &SockaddrIn::from(v4), declared)?,
        SocketAddr::V6(v6) => {
            setsockopt(&socket, sockopt::Ipv6V6Only, &true).map_err(os("prepare", &shown))?;
            bind_and_listen(&socket, &SockaddrIn6::from(v6), declared)?;
        }
    }
    Ok(TcpListener::from(socket))
}

/// Returns the declared length of the kernel's queue, or the longest possible one.
pub(super) fn backlog(declared: &ListenerDecl) -> Backlog {
    i32::try_from(declared.backlog)
        .ok()
        .and_then(|n| Backlog::new(n).ok())
        .unwrap_or(Backlog::MAXALLOWABLE)
}

fn bind_and_listen(
    socket: &OwnedFd,
    address: &dyn SockaddrLike,
    declared: &ListenerDecl,
) -> Result<(), BindError> {
    let shown = declared.address.to_string();
    match bind(socket.as_raw_fd(), address) {
        Err(Errno::EADDRINUSE) => return Err(BindError::InUse(shown)),
        other => other.map_err(os("bind", &shown))?,
    }
    listen(socket, backlog(declared)).map_err(os("listen on", shown))
}

/// Makes a local socket whose clients can pass no descriptors, if the kernel can refuse them. That
/// must be so before the socket listens.
fn unix_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    rights::refuse(socket.as_fd());
    Ok(socket)
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(os("inspect", path.display())(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    let probe = unix_socket().map_err(os("probe", path.display()))?;
    let address = UnixAddr::new(path).map_err(os("probe", path.display()))?;
    match connect(probe.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED) => {
            std::fs::remove_file(path).map_err(os("remove the stale socket", path.display()))
        }
        Err(Errno::ENOENT) => Ok(()),
        // A full backlog (EAGAIN), or a socket of another type, belongs to somebody.
        _ => Err(BindError::InUse(path.display().to_string())),
    }
}

/// The lock beside a path; dropping it removes the lock file.
struct PathLock {
    path: PathBuf,
    _lock: Flock<File>,
}

impl PathLock {
    fn take(socket: &Path) -> Result<Self, BindError> {
        let mut name = socket.as_os_str().to_owned();
        name.push(".lock");
        let path = PathBuf::from(name);
        // A process that has just released its lock may have removed the file that is locked here.
        for _ in 0..100 {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
                .open(&path)
                .map_err(os("create", path.display()))?;
            let inode = file.metadata().map_err(os("inspect", path.display()))?.ino();
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, Errno::EAGAIN)) => return Err(BindError::Locked(socket.to_owned())),
                Err((_, error)) => return Err(os("lock", path.display())(error)),
            };
            if std::fs::symlink_metadata(&path).is_ok_and(|now| now.ino() == inode) {
                return Ok(Self { path, _lock: lock });
            }
        }
        Err(BindError::Locked(socket.to_owned()))
    }
}

impl Drop for PathLock {
    fn drop(&mut self) {
        // Still locked here, so nobody else can be using the file.
        let _ = std::fs::remove_file(&self.path);
    }
}
