//! Control groups (cgroup v2) of clients, and their extended attributes.
//!
//! Contract: the path is the one in /proc/PID/cgroup, read while the client's process surely
//! existed. A group's directory is opened beneath the mount of cgroup2, wherever that is, and no
//! symbolic link or `..` leads out of it. While the client lives its group can't be removed, so the
//! directory is that group's. Where the kernel tells the group's id (since Linux 6.13), the path of
//! a group that is known already isn't read again: groups of version 2 can't be renamed. Its
//! directory is then opened when an attribute is asked for, and must still have that id.
//!
//! # Failure
//! [`CgroupError`]. A client whose group can't be known (no cgroup v2, no local client) has none; a
//! group in another cgroup namespace (`/..`) has a path and no attributes. Where no cgroup2 file
//! system is mounted, there is a path, and asking for attributes fails.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use parking_lot::Mutex;
use qrelay_shared::sys::xattr;
use rustc_hash::FxHashMap;
use thiserror::Error;

use crate::client::process::{Client, IdentityError, read};

/// Why a group or an attribute can't be read.
#[derive(Debug, Error)]
pub(crate) enum CgroupError {
    /// The client's process isn't known, or has ended.
    #[error("{0}")]
    Identity(#[from] IdentityError),
    /// No cgroup2 file system is mounted that this process can see.
    #[error("no cgroup2 file system is mounted")]
    NotMounted,
    /// A call to the system failed for this path.
    #[error("cgroup {path}: {error}")]
    Os {
        /// The group.
        path: String,
        /// The system's error.
        error: Errno,
    },
}

/// An attribute's full name and its value.
pub(crate) type Attribute = (Vec<u8>, Vec<u8>);

/// Most groups whose paths are remembered; a host has seldom more with web sites in them, and
/// finding one out again costs some 30 µs.
const MAX_KNOWN: usize = 4096;

/// A group, with its directory open.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: Arc<[u8]>,
    directory: Directory,
}

/// Where a group's attributes are.
#[derive(Debug)]
enum Directory {
    /// In this directory.
    Open(OwnedFd),
    /// In the directory with this inode number, once it has been opened.
    Known(&'static Hierarchy, u64, OnceLock<OwnedFd>),
    /// Not visible: in another namespace, or above the mounted group.
    Hidden,
    /// No cgroup2 file system is mounted that this process can see.
    NotMounted,
}

impl Cgroup {
    /// Returns the path of the group, as in /proc/PID/cgroup.
    pub(crate) fn path(&self) -> &Arc<[u8]> {
        &self.path
    }

    /// The value of an attribute; a name without a dot is one of the namespace `user`.
    ///
    /// # Errors
    /// As fgetxattr(2).
    pub(crate) fn attribute(&self, name: &[u8]) -> Result<Option<Vec<u8>>, CgroupError> {
        let Some(directory) = self.directory()? else { return Ok(None) };
        // A text that can't be a name names no attribute.
        let Some(name) = full_name(name) else { return Ok(None) };
        match xattr::get(directory, &name) {
            Ok(value) => Ok(value),
            // Too long, or only a namespace.
            Err(Errno::ERANGE | Errno::EINVAL) => Ok(None),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Returns the full names and values of all attributes.
    ///
    /// # Errors
    /// As flistxattr(2) and fgetxattr(2).
    pub(crate) fn attributes(&self) -> Result<Vec<Attribute>, CgroupError> {
        let Some(directory) = self.directory()? else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for name in xattr::list(directory).map_err(|error| self.failed(error))? {
            // An attribute may have been removed just now.
            if let Some(value) = self.attribute(name.as_bytes())? {
                all.push((name.into_bytes(), value));
            }
        }
        Ok(all)
    }

    fn directory(&self) -> Result<Option<BorrowedFd<'_>>, CgroupError> {
        match &self.directory {
            Directory::Open(directory) => Ok(Some(directory.as_fd())),
            Directory::Known(hierarchy, id, opened) => match opened.get() {
                Some(directory) => Ok(Some(directory.as_fd())),
                None => match hierarchy.open(&self.path)? {
                    Directory::Open(directory) if inode(&directory) == Some(*id) => {
                        Ok(Some(opened.get_or_init(|| directory).as_fd()))
                    }
                    _ => Err(self.failed(Errno::ENOENT)),
                },
            },
            Directory::Hidden => Ok(None),
            Directory::NotMounted => Err(CgroupError::NotMounted),
        }
    }

    fn failed(&self, error: Errno) -> CgroupError {
        failed(&self.path, error)
    }
}

fn inode(directory: &OwnedFd) -> Option<u64> {
    fstat(directory).ok().map(|status| status.st_ino)
}

fn failed(path: &[u8], error: Errno) -> CgroupError {
    CgroupError::Os { path: String::from_utf8_lossy(path).into_owned(), error }
}

/// The name with its namespace.
fn full_name(name: &[u8]) -> Option<CString> {
    let prefix: &[u8] = if name.contains(&b'.') { b"" } else { b"user." };
    CString::new([prefix, name].concat()).ok().filter(|_| !name.is_empty())
}

/// The path of the group above; the root counts as none.
pub(crate) fn parent(path: &[u8]) -> Option<&[u8]> {
    let slash = path.iter().rposition(|&byte| byte == b'/')?;
    let parent = &path[..slash];
    // The root of another namespace is as little a group as our own.
    (!parent.is_empty() && !parent.ends_with(b"/..")).then_some(parent)
}

/// Returns the groups that this process sees.
pub(crate) fn hierarchy() -> &'static Hierarchy {
    static SEEN: LazyLock<Hierarchy> = LazyLock::new(Hierarchy::default);
    &SEEN
}

/// The mount of cgroup2 and the known groups.
#[derive(Debug, Default)]
pub(crate) struct Hierarchy {
    /// The mount, once it has been found.
    mount: Mutex<Option<Mount>>,
    /// Paths of groups by their ids, at most [`MAX_KNOWN`].
    known: Mutex<FxHashMap<u64, Arc<[u8]>>>,
}

/// Where groups are directories.
#[derive(Debug)]
struct Mount {
    /// The mount point, open.
    directory: OwnedFd,
    /// The path of the group that is mounted there.
    root: Vec<u8>,
}

impl Hierarchy {
    /// The group of a client whose check has just said that its group has this id; `None` if it is
    /// in none of version 2.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub(crate) fn of_client(
        &'static self,
        client: &Client,
        id: Option<u64>,
    ) -> Result<Option<Cgroup>, CgroupError> {
        if let Some((id, path)) = id.and_then(|id| Some((id, self.known.lock().get(&id)?.clone())))
        {
            let directory = Directory::Known(self, id, OnceLock::new());
            return Ok(Some(Cgroup { path, directory }));
        }
        let file = client.read("cgroup")?;
        client.check()?;
        let Some(path) = unified_path(&file) else { return Ok(None) };
        if path.ends_with(b" (deleted)") {
            // The process has ended and only waits to be reaped.
            return Err(IdentityError::Exited.into());
        }
        let cgroup = self.group(path)?;
        client.check()?;
        if let Directory::Open(directory) = &cgroup.directory
            && let Some(id) = id.filter(|&id| inode(directory) == Some(id))
        {
            self.remember(id, &cgroup.path);
        }
        Ok(Some(cgroup))
    }

    fn remember(&self, id: u64, path: &Arc<[u8]>) {
        let mut known = self.known.lock();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(id, Arc::clone(path));
    }

    /// The group with this path.
    ///
    /// # Errors
    /// See [`CgroupError`]; `ENOENT` in it if there is no such group any more.
    pub(crate) fn group(&self, path: &[u8]) -> Result<Cgroup, CgroupError> {
        Ok(Cgroup { path: path.into(), directory: self.open(path)? })
    }

    /// Returns the group with this path, without attributes if there is no such group.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub(crate) fn assumed(&self, path: &[u8]) -> Result<Cgroup, CgroupError> {
        match self.group(path) {
            Err(CgroupError::Os { error: Errno::ENOENT | Errno::ENOTDIR, .. }) => {
                Ok(Cgroup { path: path.into(), directory: Directory::Hidden })
            }
            other => other,
        }
    }

    fn open(&self, path: &[u8]) -> Result<Directory, CgroupError> {
        let mut mount = self.mount.lock();
        if mount.is_none() {
            *mount = find_mount()?;
        }
        mount.as_ref().map_or(Ok(Directory::NotMounted), |mount| mount.open(path))
    }
}

impl Mount {
    fn open(&self, path: &[u8]) -> Result<Directory, CgroupError> {
        let Some(relative) = below(&self.root, path) else { return Ok(Directory::Hidden) };
        // The file system has no symbolic links, and no group is named "..". So openat2(2), which
        // RestrictSUIDSGID= of systemd forbids, isn't needed to stay below the mount.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = openat(&self.directory, OsStr::from_bytes(relative), flags, Mode::empty());
        opened.map(Directory::Open).map_err(|error| failed(path, error))
    }
}

/// The path of a group relative to the mounted one, `None` if it isn't below.
fn below<'p>(root: &[u8], path: &'p [u8]) -> Option<&'p [u8]> {
    if path == b"/.." || path.starts_with(b"/../") {
        return None;
    }
    let root = root.strip_suffix(b"/").unwrap_or(root);
    match path.strip_prefix(root)? {
        b"" | b"/" => Some(b"."),
        rest => rest.strip_prefix(b"/"),
    }
}

/// Returns the mount that shows most, of the mounts that can be opened.
fn find_mount() -> Result<Option<Mount>, CgroupError> {
    first_seen(unified_mounts(&read("/proc/self/mountinfo")?), open_mount)
}

/// The first mount that `open` opens, which has the directory and, if it can be known, the number
/// of what is mounted there: a mount that is listed may have another one over it, even of cgroup2.
///
/// # Errors
/// The last mount's error, if none can be opened.
fn first_seen(
    mounts: Vec<Listed>,
    mut open: impl FnMut(&Path) -> Result<Option<(OwnedFd, Option<u64>)>, Errno>,
) -> Result<Option<Mount>, CgroupError> {
    let mut result = Ok(None);
    for Listed { id, point, root } in mounts {
        match open(&point) {
            Ok(Some((directory, found))) if found.is_none_or(|found| found == id) => {
                return Ok(Some(Mount { directory, root }));
            }
            Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(error) => result = Err(failed(point.as_os_str().as_bytes(), error)),
        }
    }
    result
}

/// Opens a mount point and returns its directory and the mount's number; `None` if it isn't
/// cgroup2.
fn open_mount(point: &Path) -> Result<Option<(OwnedFd, Option<u64>)>, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = open(point, flags, Mode::empty())?;
    if fstatfs(&directory)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Ok(None);
    }
    let id = mount_id(&directory);
    Ok(Some((directory, id)))
}

/// The number of the mount that this was opened in, as in proc_pid_mountinfo(5).
fn mount_id(directory: &OwnedFd) -> Option<u64> {
    let file = read(&format!("/proc/self/fdinfo/{}", directory.as_raw_fd())).ok()?;
    let text = str::from_utf8(&file).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// Returns the path in the hierarchy of version 2, whose number in /proc/PID/cgroup is always 0.
fn unified_path(file: &[u8]) -> Option<&[u8]> {
    let mut lines = file.split(|&byte| byte == b'\n');
    lines.find_map(|line| line.strip_prefix(b"0::")).filter(|path| path.starts_with(b"/"))
}

/// A mount of the cgroup2 file system in proc_pid_mountinfo(5).
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    id: u64,
    point: PathBuf,
    root: Vec<u8>,
}

/// Returns all mounts of cgroup2, the ones with the shortest root first, because they show most.
fn unified_mounts(mountinfo: &[u8]) -> Vec<Listed> {
    let lines = mountinfo.split(|&byte| byte == b'\n');
    let mut mounts: Vec<_> = lines.filter_map(mount_of_line).collect();
    mounts.sort_by_key(|mount| mount.root.len());
    mounts
}

fn mount_of_line(line: &[u8]) -> Option<Listed> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let (root, point) = (fields.nth(2)?, fields.next()?);
    // Optional fields end with a dash; the type of the file system follows.
    fields.find(|field| *field == b"-")?;
    if fields.next()? != b"cgroup2" {
        return None;
    }
    let point = std::ffi::OsString::from_vec(unescape(point)).into();
    Some(Listed { id, point, root: unescape(root) })
}

/// Space, tab, newline and backslash are written as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).and_then(|digits| str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                out.push(byte);
                rest = &tail[3..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::Pid;
    use std::os::unix::net::UnixStream;

    #[test]
    fn paths_of_processes() {
        let table: [(&[u8], Option<&[u8]>); 6] = [
            (b"0::/a/b.slice\n", Some(b"/a/b.slice")),
            (b"12:cpu:/x\n1:name=systemd:/y\n0::/z\n", Some(b"/z")),
            (b"0::/\n", Some(b"/")),
            (b"0::/../other\n", Some(b"/../other")),
            (b"3:cpu:/x\n", None),
            (b"", None),
        ];
        for (file, path) in table {
            assert_eq!(unified_path(file), path);
        }
    }

    #[test]
    fn parents() {
        let table: [(&[u8], Option<&[u8]>); 6] = [
            (b"/a/b/c", Some(b"/a/b")),
            (b"/a/b", Some(b"/a")),
            (b"/a", None),
            (b"/", None),
            (b"/../a/b", Some(b"/../a")),
            (b"/../a", None),
        ];
        for (path, expected) in table {
            assert_eq!(parent(path), expected, "{}", String::from_utf8_lossy(path));
        }
    }

    fn listed(id: u64, point: &str, root: &[u8]) -> Listed {
        Listed { id, point: point.into(), root: root.to_vec() }
    }

    #[test]
    fn the_first_mount_that_is_seen() {
        type Seen = Result<Option<Option<u64>>, Errno>;
        let (hidden, denied): (Seen, Seen) = (Ok(None), Err(Errno::EACCES));
        // What is seen at /a, where /sub is mounted over /, and at /b, where /sub/sub is.
        type Found = Result<Option<&'static str>, Errno>;
        let table: [(Seen, Seen, Found); 9] = [
            (Ok(Some(Some(1))), hidden, Ok(Some("/"))),
            (Ok(Some(Some(2))), hidden, Ok(Some("/sub"))),
            (Ok(Some(None)), hidden, Ok(Some("/"))),
            (Ok(Some(Some(4))), Ok(Some(Some(3))), Ok(Some("/sub/sub"))),
            (denied, Ok(Some(Some(3))), Ok(Some("/sub/sub"))),
            (denied, hidden, Err(Errno::EACCES)),
            (denied, Err(Errno::ENOENT), Err(Errno::EACCES)),
            (Err(Errno::ENOTDIR), hidden, Ok(None)),
            (hidden, Err(Errno::EIO), Err(Errno::EIO)),
        ];
        let file = std::fs::File::open("/").expect("it is there");
        for (at_a, at_b, expected) in table {
            let mounts = [(1, "/a", "/"), (2, "/a", "/sub"), (3, "/b", "/sub/sub")]
                .map(|(id, point, root)| listed(id, point, root.as_bytes()));
            let found = first_seen(mounts.into(), |point| {
                let seen = if point == Path::new("/a") { at_a } else { at_b };
                Ok(seen?.map(|id| (file.try_clone().expect("a descriptor").into(), id)))
            });
            let found = match found {
                Ok(mount) => Ok(mount.map(|mount| String::from_utf8(mount.root).expect("a path"))),
                Err(CgroupError::Os { error, .. }) => Err(error),
                Err(error) => panic!("{error}"),
            };
            assert_eq!(found, expected.map(|root| root.map(str::to_owned)), "{at_a:?} {at_b:?}");
        }
    }

    #[test]
    fn mounts_have_numbers() {
        let root = std::fs::File::open("/proc").expect("/proc").into();
        let id = mount_id(&root);
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("/proc");
        let listed = mounts.lines().any(|line| {
            line.contains(" /proc ") && id == line.split(' ').next().and_then(|id| id.parse().ok())
        });
        assert!(listed, "{id:?}\n{mounts}");
    }

    #[test]
    fn mounts() {
        let hybrid = b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
            38 31 0:31 / /sys/fs/cgroup/unified rw,relatime shared:5 master:1 - \
            cgroup2 cgroup2 rw\n";
        assert_eq!(unified_mounts(hybrid), [listed(38, "/sys/fs/cgroup/unified", b"/")]);
        let part = b"1 2 0:3 /sub\\040tree /mnt/a\\134b rw - cgroup2 none rw\n";
        assert_eq!(unified_mounts(part), [listed(1, "/mnt/a\\b", b"/sub tree")]);
        let both = b"1 2 0:3 /sub /a rw - cgroup2 x rw\n3 2 0:3 / /b rw - cgroup2 x rw\n";
        assert_eq!(unified_mounts(both), [listed(3, "/b", b"/"), listed(1, "/a", b"/sub")]);
        for none in [&b""[..], b"1 2\n", b"1 2 0:3 / /cgroup2 rw - tmpfs cgroup2 rw\n"] {
            assert_eq!(unified_mounts(none), []);
        }
    }

    #[test]
    fn only_what_is_below_the_mount() {
        type Row<'a> = (&'a [u8], &'a [u8], Option<&'a [u8]>);
        let table: [Row<'_>; 8] = [
            (b"/", b"/a/b", Some(b"a/b")),
            (b"/", b"/", Some(b".")),
            (b"/a", b"/a/b", Some(b"b")),
            (b"/a", b"/a", Some(b".")),
            (b"/a", b"/ab", None),
            (b"/a", b"/b", None),
            (b"/", b"/../a", None),
            (b"/", b"/..", None),
        ];
        for (root, path, relative) in table {
            assert_eq!(below(root, path), relative);
        }
    }

    #[test]
    fn names_of_attributes() {
        let full = |name: &[u8]| full_name(name).map(CString::into_bytes);
        assert_eq!(full(b"foo").as_deref(), Some(&b"user.foo"[..]));
        assert_eq!(full(b"trusted.foo").as_deref(), Some(&b"trusted.foo"[..]));
        assert_eq!(full(b""), None);
        assert_eq!(full(b"a\0b"), None);
    }

    #[test]
    fn what_cannot_be_a_name_is_not_there() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = std::fs::File::open(directory.path()).expect("it is there");
        let group = Cgroup { path: b"/a"[..].into(), directory: Directory::Open(file.into()) };
        for name in [&b"user."[..], b"trusted.", b".", b"", b"a\0b", &[b'a'; 1000]] {
            let value = group.attribute(name).expect("no error");
            assert_eq!(value, None, "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn our_own_group() {
        let (ours, _theirs) = UnixStream::pair().expect("pair");
        let hierarchy = hierarchy();
        let file = std::fs::read("/proc/self/cgroup").expect("/proc");
        let client = Client::of(ours.as_fd(), Pid::this(), u64::MAX).expect("it is us");
        let id = client.check().expect("it is us");
        let group = hierarchy.of_client(&client, id).expect("it is us");
        let path = unified_path(&file);
        assert_eq!(group.as_ref().map(|group| &**group.path()), path);
        // Now it may be known.
        let again = hierarchy.of_client(&client, id).expect("it is us");
        assert_eq!(again.as_ref().map(|group| &**group.path()), path);
        let all = |group: &Option<Cgroup>| group.as_ref().map(|group| group.attributes().ok());
        assert_eq!(all(&again), all(&group));
        let foreign = hierarchy.group(b"/../elsewhere").expect("a path");
        match foreign.attributes() {
            Ok(attributes) => assert!(attributes.is_empty()),
            Err(error) => assert!(matches!(error, CgroupError::NotMounted), "{error}"),
        }
    }
}
