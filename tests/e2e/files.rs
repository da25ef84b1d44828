//! Files in the hands of others: what is at a socket's path and beside it, and who may write
//! config.lua.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::harness::daemon::NOBODY;
use crate::harness::{Daemon, Mail, Site, run, submit};

const DISCARD: &str = "qmqp_listen('$DIR/in', function(m) return m:discard() end)";
const TWO: &str = "
    qmqp_listen('$DIR/in', function(m) return m:discard() end)
    qmqp_listen('$DIR/new', function(m) return m:discard() end)";

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("a file").mode() & 0o7777
}

/// Puts something that is no lock at the path of a lock.
type Obstacle = fn(&Path);

const OBSTACLES: [(&str, Obstacle); 3] = [
    ("a FIFO", |path| mkfifo(path, Mode::S_IRWXU).expect("a FIFO")),
    ("a directory", |path| fs::create_dir(path).expect("a directory")),
    ("a symbolic link", |path| symlink("config.lua", path).expect("a link")),
];

#[test]
fn what_is_no_lock_ends_a_start_and_is_left_alone() {
    for (name, make) in OBSTACLES {
        let site = Site::with(DISCARD);
        make(&site.path("in.lock"));
        let mut daemon = site.launch().spawn();
        assert_eq!(daemon.wait_exit().code(), Some(71), "{name}");
        let text = daemon.complete_text();
        assert!(text.contains("in.lock exists and is not a regular file"), "{name}: {text}");
        assert_eq!(daemon.site().leftovers(), ["in.lock"], "{name}");
    }
}

#[test]
fn what_is_no_lock_refuses_a_reload() {
    let mut daemon = Daemon::start(DISCARD);
    for (name, make) in OBSTACLES {
        let lock = daemon.path("new.lock");
        make(&lock);
        daemon.site().configure(TWO);
        let status = daemon.reload_status();
        assert!(status.contains("new.lock exists and is not a regular file"), "{name}: {status}");
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
        let is_directory = lock.symlink_metadata().expect("left alone").is_dir();
        if is_directory { fs::remove_dir(&lock) } else { fs::remove_file(&lock) }.expect("removed");
    }
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("new"), &Mail::new("x")), "Kdiscarded");
    daemon.stop();
}

#[test]
fn a_lock_that_somebody_else_has_refuses_a_start_and_a_reload() {
    let site = Site::with(DISCARD);
    let file = fs::File::create(site.path("in.lock")).expect("a file");
    let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
    let mut daemon = site.launch().spawn();
    assert_eq!(daemon.wait_exit().code(), Some(71));
    assert!(daemon.complete_text().contains("is locked: another process"), "{}", daemon.text());
    drop(held.expect("a lock"));

    let mut daemon = Daemon::start(DISCARD);
    let file = fs::File::create(daemon.path("new.lock")).expect("a file");
    let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
    daemon.site().configure(TWO);
    let status = daemon.reload_status();
    assert!(status.contains("is locked: another process"), "{status}");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    drop(held.expect("a lock"));
    assert!(daemon.reload());
    daemon.stop();
}

#[test]
fn a_lease_on_the_lock_file_is_not_waited_for() {
    let site = Site::with(DISCARD);
    // The kernel makes an open(2) without O_NONBLOCK wait for 45 s until it breaks the lease.
    let code = "
import fcntl, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = open(sys.argv[1], 'w')
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('held', flush=True)
sys.stdin.read()";
    let mut holder = Command::new("python3")
        .args(["-c", code])
        .arg(site.path("in.lock"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    let mut line = [0; 5];
    let held = std::io::Read::read_exact(holder.stdout.as_mut().expect("a pipe"), &mut line);
    held.expect("the lease is held");
    let mut daemon = site.launch().spawn();
    assert_eq!(daemon.wait_exit().code(), Some(71));
    let text = daemon.complete_text();
    assert!(text.contains("is locked: another process"), "{text}");
    drop(holder.stdin.take());
    holder.wait().expect("the holder ends");
}

#[test]
fn a_mode_is_exact_whatever_the_umask() {
    for umask in ["0", "077", "0777"] {
        let script = "umask $0 && exec \"$@\"";
        let site = Site::with(
            "qmqp_listen('$DIR/in', function(m) return m:discard() end, {mode='0666'})
             qmqp_listen('$DIR/other', function(m) return m:discard() end, {mode='0600'})",
        );
        let mut daemon = site.launch().through(&["sh", "-c", script, umask]).ready();
        let modes = (mode(&daemon.path("in")), mode(&daemon.path("other")));
        assert_eq!(modes, (0o666, 0o600), "umask {umask}");
        daemon.stop();
    }
}

/// Ends the other thread, also if this one panics.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_directorys_owner_gets_no_other_file_changed() {
    let daemon = Daemon::start(&format!("{DISCARD} -- first"));
    let secret = daemon.path("secret");
    fs::write(&secret, "secret").expect("a file");
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).expect("a mode");
    let (path, aside, link) = (daemon.path("in"), daemon.path("aside"), daemon.path("link"));
    let over = AtomicBool::new(false);
    let unchanged = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Swaps the socket's file against a link to another file, and back, all the time.
            while !over.load(Ordering::Relaxed) {
                let makes: [fn(&Path, &Path) -> std::io::Result<()>; 2] =
                    [|from, to| symlink(from, to), |from, to| fs::hard_link(from, to)];
                for make in makes {
                    make(&secret, &link).expect("a link");
                    fs::rename(&path, &aside).expect("moved");
                    fs::rename(&link, &path).expect("moved");
                    fs::rename(&path, &link).expect("moved");
                    fs::rename(&aside, &path).expect("moved");
                    fs::remove_file(&link).expect("removed");
                }
            }
        });
        let _end = End(&over);
        (0..20).all(|round| {
            let mode = 0o644 + round % 2 * 0o022;
            let options = format!("{{mode='{mode:04o}', owner={NOBODY}}}");
            daemon.site().configure(&DISCARD.replace("end)", &format!("end, {options})")));
            daemon.signal(Signal::SIGHUP);
            daemon.wait_for_log(&format!("ready generation={} ", round + 2));
            let found = fs::metadata(&secret).expect("a file");
            (found.mode() & 0o7777, found.uid()) == (0o600, 0)
        })
    });
    assert!(unchanged);
    let found = fs::symlink_metadata(&path).expect("a socket");
    assert!(found.file_type().is_socket());
}

#[test]
fn root_runs_no_script_that_others_may_write() {
    let cure = "let only root write it and all directories above it";
    let site = Site::with(DISCARD);
    let (config, directory) = (site.path("config.lua"), site.path(""));
    let path = config.to_str().expect("UTF-8").to_owned();
    let check = || run(&["check", "--config", &path]);
    assert!(check().status.success());
    for (part, bad) in [(&config, 0o666), (&config, 0o664), (&directory, 0o777)] {
        let before = mode(part);
        fs::set_permissions(part, Permissions::from_mode(bad)).expect("a mode");
        let output = check();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(text.contains("is not run as root, because others than root may write"), "{text}");
        assert!(text.contains(&format!("mode {bad:04o}")) && text.contains(cure), "{text}");
        fs::set_permissions(part, Permissions::from_mode(before)).expect("a mode");
    }
    chown(&config, Some(NOBODY), None).expect("chown");
    let text = String::from_utf8_lossy(&check().stderr).into_owned();
    assert!(text.contains(&format!("owner {NOBODY}, mode 0644")), "{text}");
    chown(&config, Some(0), None).expect("chown");

    let mut daemon = site.start();
    fs::set_permissions(&config, Permissions::from_mode(0o646)).expect("a mode");
    let status = daemon.reload_status();
    assert!(status.contains("is not run as root"), "{status}");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    daemon.stop();

    // Also if the script runs as another user: the supervisor binds what the script declares.
    for options in [&[][..], &["--user", "nobody"]] {
        let site = Site::with(DISCARD);
        let open = Permissions::from_mode(0o666);
        fs::set_permissions(site.path("config.lua"), open).expect("a mode");
        let launch = options.iter().fold(site.launch(), |launch, option| launch.arg(option));
        let mut daemon = launch.spawn();
        assert_eq!(daemon.wait_exit().code(), Some(78));
        assert!(daemon.complete_text().contains(cure), "{}", daemon.text());
    }
}

#[test]
fn another_user_runs_a_script_that_is_its_own() {
    use std::os::unix::process::CommandExt;
    let site = Site::with(DISCARD);
    chown(site.path("config.lua"), Some(NOBODY), None).expect("chown");
    let checked = Command::new(crate::harness::daemon::QRELAY)
        .args(["check", "--config"])
        .arg(site.path("config.lua"))
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .expect("runs as another user");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn no_message_quotes_a_connection_string() {
    for call in [
        "pg:new('user=me password=x s3cret')",
        "pg:new('user=me password=x s3cret=y')",
        "pg:new('postgresql://me:s3cret/x@host/db')",
        "pg:new('postgresql://me:5/s3cret@host/db')",
        "pg.new('postgresql://me:s3cret@host/db')",
        "pg:new('dbname=x', nil, 'password=s3cret')",
        "pg:new('postgresql://me:s3cret@host/db)\n",
        "pg:new{'dbname=x' 'password=s3cret'}",
    ] {
        let site = Site::with(&format!("local function f() {call} end f() {DISCARD}"));
        let path = site.path("config.lua").to_str().expect("UTF-8").to_owned();
        let output = run(&["check", "--config", &path]);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(78), "{call}: {text}");
        assert!(!text.contains("s3cret"), "{call}: {text}");
        let mut daemon = site.launch().spawn();
        assert_eq!(daemon.wait_exit().code(), Some(78));
        let text = daemon.complete_text();
        assert!(!text.contains("s3cret"), "{call}: {text}");
    }
    let daemon = Daemon::start(
        "qmqp_listen('$DIR/in', function(m) pg:new('password=x s3cret') return m:discard() end)",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")).status(), 'Z');
    daemon.wait_for_log("config.lua:1: in function");
    assert!(!daemon.text().contains("s3cret"), "{}", daemon.text());
}
