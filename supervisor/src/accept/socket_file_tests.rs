//! The owner of a socket's directory puts other files at the socket's path, at every moment between
//! the steps.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;

use nix::sys::socket::bind;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use qrelay_shared::settings::ListenAddress;

use super::*;

/// A directory that is removed in the end.
struct Scene(PathBuf);

impl Scene {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("qrelay-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a new directory");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn place(&self) -> Rc<Place> {
        Rc::new(Place::of(&self.path("in")).expect("a directory"))
    }

    /// Binds a socket at the place, and opens nothing.
    fn bound(&self) -> OwnedFd {
        let socket = unix_socket().expect("a socket");
        let address = UnixAddr::new(&self.path("in")).expect("an address");
        bind(socket.as_raw_fd(), &address).expect("bind");
        socket
    }

    /// Makes another file, of mode 0600, and returns it.
    fn victim(&self) -> PathBuf {
        let path = self.path("victim");
        fs::write(&path, "secret").expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a mode");
        path
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).expect("a directory");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.expect("an entry").file_name().into_string().expect("UTF-8")
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn declared() -> ListenerDecl {
    ListenerDecl {
        address: ListenAddress::Path("/in".into()),
        mode: 0o666,
        owner: Some(geteuid().as_raw()),
        group: None,
        backlog: 8,
        max_size: 1 << 20,
        allow: None,
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("a file").mode() & 0o7777
}

#[test]
fn another_file_at_the_path_after_bind_is_refused() {
    type Swap = fn(&Scene, &Path);
    let swaps: [(&str, Swap); 8] = [
        ("nothing", |scene, _| fs::remove_file(scene.path("in")).expect("removed")),
        ("symlink", |scene, victim| {
            fs::remove_file(scene.path("in")).expect("removed");
            symlink(victim, scene.path("in")).expect("a symlink");
        }),
        ("symlink-back", |scene, _| {
            fs::rename(scene.path("in"), scene.path("moved")).expect("moved");
            symlink(scene.path("moved"), scene.path("in")).expect("a symlink");
        }),
        ("hard-link", |scene, victim| {
            fs::remove_file(scene.path("in")).expect("removed");
            fs::hard_link(victim, scene.path("in")).expect("a link");
        }),
        ("two-names", |scene, _| {
            fs::hard_link(scene.path("in"), scene.path("other")).expect("a link");
        }),
        ("fifo", |scene, _| {
            fs::remove_file(scene.path("in")).expect("removed");
            mkfifo(&scene.path("in"), Mode::from_bits_truncate(0o600)).expect("a FIFO");
        }),
        ("other-socket", |scene, _| {
            drop(UnixListener::bind(scene.path("theirs")).expect("bind"));
            fs::rename(scene.path("theirs"), scene.path("in")).expect("moved");
        }),
        ("new-directory", |scene, _| {
            fs::remove_file(scene.path("in")).expect("removed");
            fs::create_dir(scene.path("in")).expect("a directory");
        }),
    ];
    for (name, swap) in swaps {
        let scene = Scene::new(name);
        let (place, socket, victim) = (scene.place(), scene.bound(), scene.victim());
        swap(&scene, &victim);
        let before = scene.path("in").symlink_metadata().map(|found| found.mode()).ok();
        let result = SocketFile::of(place, &socket).map(drop);
        assert!(matches!(result, Err(BindError::Replaced(_))), "{name}: {result:?}");
        let after = scene.path("in").symlink_metadata().map(|found| found.mode()).ok();
        assert_eq!((after, mode(&victim)), (before, 0o600), "{name}");
    }
}

#[test]
fn the_bound_file_is_changed_and_removed_and_no_other() {
    let scene = Scene::new("later");
    let (place, socket, victim) = (scene.place(), scene.bound(), scene.victim());
    let file = SocketFile::of(place, &socket).expect("the bound file");
    file.apply(&declared()).expect("changed");
    assert_eq!(mode(&scene.path("in")), 0o666);

    // After `apply` has looked, and before it changes anything.
    fs::rename(scene.path("in"), scene.path("moved")).expect("moved");
    symlink(&victim, scene.path("in")).expect("a symlink");
    file.set(&ListenerDecl { mode: 0o640, ..declared() }).expect("changed");
    assert_eq!((mode(&scene.path("moved")), mode(&victim)), (0o640, 0o600));

    file.apply(&ListenerDecl { mode: 0o644, ..declared() }).expect("nothing to do");
    file.unlink();
    assert_eq!((mode(&scene.path("moved")), mode(&victim)), (0o640, 0o600));
    assert_eq!(scene.names(), ["in", "moved", "victim"]);

    fs::rename(scene.path("moved"), scene.path("in")).expect("moved back");
    file.unlink();
    assert_eq!(scene.names(), ["victim"]);
}

#[test]
fn a_directory_that_is_replaced_changes_nothing() {
    let scene = Scene::new("above");
    fs::create_dir(scene.path("run")).expect("a directory");
    let path = scene.path("run/in");
    let place = Rc::new(Place::of(&path).expect("a directory"));
    let socket = unix_socket().expect("a socket");
    bind(socket.as_raw_fd(), &UnixAddr::new(&path).expect("an address")).expect("bind");
    let file = SocketFile::of(place, &socket).expect("the bound file");
    fs::rename(scene.path("run"), scene.path("old")).expect("moved");
    fs::create_dir(scene.path("etc")).expect("a directory");
    fs::write(scene.path("etc/in"), "secret").expect("a file");
    symlink(scene.path("etc"), scene.path("run")).expect("a symlink");
    file.unlink();
    assert!(scene.path("etc/in").exists());
    assert!(!scene.path("old/in").exists());
}

#[test]
fn a_lock_is_a_regular_file_or_an_error() {
    type Make = fn(&Scene);
    let lock = |scene: &Scene| PathLock::take(scene.place()).map(drop);
    let makes: [(&str, Make); 5] = [
        ("fifo", |scene| mkfifo(&scene.path("in.lock"), Mode::S_IRWXU).expect("a FIFO")),
        ("read-fifo", |scene| {
            mkfifo(&scene.path("in.lock"), Mode::S_IRWXU).expect("a FIFO");
        }),
        ("directory", |scene| fs::create_dir(scene.path("in.lock")).expect("a directory")),
        ("symlink", |scene| {
            symlink(scene.victim(), scene.path("in.lock")).expect("a symlink");
        }),
        ("socket", |scene| drop(UnixListener::bind(scene.path("in.lock")).expect("bind"))),
    ];
    for (name, make) in makes {
        let scene = Scene::new(&format!("lock-{name}"));
        make(&scene);
        // A FIFO that somebody reads can be opened for writing.
        let reader = (name == "read-fifo").then(|| {
            let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            nix::fcntl::open(&scene.path("in.lock"), flags, Mode::empty()).expect("a reader")
        });
        let names = scene.names();
        assert!(matches!(lock(&scene), Err(BindError::NotAFile(_))), "{name}");
        assert_eq!(scene.names(), names, "{name}");
        drop(reader);
    }
}

#[test]
fn a_lock_that_somebody_has_is_an_error_and_is_removed_with_its_holder() {
    let scene = Scene::new("lock-held");
    let held = PathLock::take(scene.place()).expect("nobody has it");
    assert!(matches!(PathLock::take(scene.place()), Err(BindError::Locked(_))));
    drop(held);
    assert_eq!(scene.names(), Vec::<String>::new());
    drop(PathLock::take(scene.place()).expect("nobody has it"));
}

#[test]
fn only_a_stale_socket_is_removed() {
    let scene = Scene::new("stale");
    scene.place().remove_stale().expect("nothing is there");
    let listener = UnixListener::bind(scene.path("in")).expect("bind");
    assert!(matches!(scene.place().remove_stale(), Err(BindError::InUse(_))));
    drop(listener);
    scene.place().remove_stale().expect("stale");
    symlink(scene.victim(), scene.path("in")).expect("a symlink");
    assert!(matches!(scene.place().remove_stale(), Err(BindError::NotASocket(_))));
    assert_eq!(scene.names(), ["in", "victim"]);
    let nowhere = Place::of(&scene.path("none/in")).map(drop);
    let Err(BindError::NoDirectory { directory, .. }) = nowhere else { panic!("{nowhere:?}") };
    assert_eq!(directory, scene.path("none"));
}
