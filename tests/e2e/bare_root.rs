//! A root directory that lacks what most have, as in a chroot or a container that somebody has put
//! together by hand.

use crate::harness::{Daemon, Mail, Site, submit};

/// Starts a daemon that finds an empty directory at `path`.
fn without(path: &str, config: &str) -> Daemon {
    let script = format!("mount -t tmpfs none {path} && exec \"$@\"");
    Site::with(config).launch().through(&["unshare", "--mount", "sh", "-c", &script, "sh"]).spawn()
}

#[test]
fn without_devices() {
    let mut daemon = without(
        "/dev",
        "settings{workers=1}
         local echo = assert(io.popen('read line; echo $?'))
         local read = echo:read('n')
         echo:close()
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'raw@x' then return m:exec_raw('/bin/sh', '-c', 'echo K$(wc -c)') end
           return m:reject('read returned ' .. read)
         end)",
    );
    daemon.wait_ready();
    // Programs that the script runs find an empty standard input.
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Dread returned 1");
    let told = submit(daemon.path("in"), &Mail::new("x").from("raw@x"));
    assert_eq!(told.status(), 'K', "{told}");
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Dread returned 1");
    daemon.stop();
}

#[test]
fn without_proc() {
    let mut daemon = without("/proc", "qmqp_listen('$DIR/in', function(m) return m:discard() end)");
    assert_eq!(daemon.wait_exit().code(), Some(71));
    let text = daemon.complete_text();
    assert!(text.contains("cannot start a zygote: /proc/self/exe: No such file"), "{text}");
}
