//! Addresses that a reload has to bind again, or in another form.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use nix::unistd::{Uid, chown};

use crate::harness::daemon::NOBODY;
use crate::harness::{Daemon, Mail, Site, Target, submit};

/// Listens on this path or address.
fn config(at: &str, allow: &str) -> String {
    format!("qmqp_listen('{at}', function(m) return m:discard() end{allow})")
}

#[test]
fn a_socket_file_that_is_gone_is_bound_by_a_reload() {
    let mut daemon = Daemon::start(&config("$DIR/in", ""));
    fs::remove_file(daemon.path("in")).expect("the file");
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    let line = daemon.wait_for_log("the socket file was gone: bound again");
    assert!(line.contains(&format!("path={}", daemon.path("in").display())), "{line}");

    // A file that is there isn't bound again.
    assert!(daemon.reload());
    assert_eq!(daemon.count_log("bound again"), 1, "{}", daemon.text());
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    daemon.stop();
}

#[test]
fn a_socket_whose_directory_was_made_anew_is_bound_by_a_reload() {
    let site = Site::with(&config("$DIR/run/in", ""));
    fs::create_dir(site.path("run")).expect("directory");
    let mut daemon = site.start();
    for old in ["out-moved", ""] {
        match old {
            "" => fs::remove_dir_all(daemon.path("run")).expect("removed"),
            old => fs::rename(daemon.path("run"), daemon.path(old)).expect("moved"),
        }
        fs::create_dir(daemon.path("run")).expect("directory");
        assert!(daemon.reload());
        assert_eq!(submit(daemon.path("run/in"), &Mail::new("x")), "Kdiscarded");
    }
    assert_eq!(daemon.count_log("the socket file was gone: bound again"), 2, "{}", daemon.text());
    daemon.stop();
}

#[test]
fn a_socket_of_somebody_else_at_the_path_is_left_alone() {
    let mut daemon = Daemon::start(&config("$DIR/in", ""));
    fs::remove_file(daemon.path("in")).expect("the file");
    let _other = UnixListener::bind(daemon.path("in")).expect("bind");
    let status = daemon.reload_status();
    assert!(status.contains("already in use"), "{status}");
    assert_eq!(daemon.count_log("bound again"), 0, "{}", daemon.text());
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn a_port_moves_to_another_form_of_its_address_and_back() {
    let free = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
    let loopback = format!("127.0.0.1:{}", free.port());
    let every = format!("0.0.0.0:{}", free.port());
    let allow = ", {allow = {'127.0.0.0/8'}}";
    let mut daemon = Daemon::start(&config(&loopback, allow));
    let other: SocketAddr = format!("127.0.0.2:{}", free.port()).parse().expect("address");
    for (address, is_every) in [(&every, true), (&loopback, false), (&every, true)] {
        daemon.site().configure(&config(address, allow));
        assert!(daemon.reload(), "{}", daemon.text());
        assert_eq!(submit(Target::from(free), &Mail::new("x")), "Kdiscarded", "{address}");
        assert_eq!(TcpStream::connect(other).is_ok(), is_every, "{address}");
        // Nobody else can share the port.
        assert!(TcpListener::bind(free).is_err());
    }
    daemon.stop();
}

#[test]
fn a_socket_that_may_not_be_connected_to_is_not_called_in_use() {
    let site = Site::with(&config("$DIR/run/in", ""));
    fs::create_dir(site.path("run")).expect("directory");
    chown(&site.path("run"), Some(Uid::from_raw(NOBODY)), None).expect("owner");
    let _private = UnixListener::bind(site.path("run/in")).expect("bind");
    fs::set_permissions(site.path("run/in"), fs::Permissions::from_mode(0o600)).expect("mode");
    let id = NOBODY.to_string();
    let wrapper = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"];
    let mut daemon = site.launch_without_control().through(&wrapper).spawn();
    assert_eq!(daemon.wait_exit().code(), Some(71));
    let text = daemon.complete_text();
    assert!(text.contains("cannot find out whether anybody listens on "), "{text}");
    assert!(text.contains("/run/in: Permission denied"), "{text}");
    assert!(!text.contains("in use"), "{text}");
}
