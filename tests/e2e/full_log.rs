//! A log file: for which there is no room, and then there is, on a full disk and at the limit of a
//! file's size; and the last lines of a process. Lines are lost while there is no room, and
//! counted; no mail is, and no line is spoiled.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;

use crate::harness::daemon::Launch;
use crate::harness::{Daemon, Mail, Site, eventually, submit};

/// Logs from workers and from the supervisor, which write to the same file.
const CONFIG: &str = "
    settings{workers=2}
    qmqp_listen('$DIR/in', function(m)
      log.info('worker' .. ('x'):rep(300))
      return m:discard()
    end)";

/// Has the daemon log to `logs/log` in its directory; a shell runs `prepare` before.
fn logging(launch: Launch, prepare: &str) -> Launch {
    let directory = launch.site().path("logs");
    fs::create_dir(&directory).expect("directory");
    let at = directory.display();
    let script = format!("cd {at} && {prepare} && exec \"$@\" 2>{at}/log");
    launch.through(&["unshare", "-m", "sh", "-c", &script, "sh"])
}

/// Returns a file in the directory of the log, as the daemon sees it.
fn log_file(daemon: &Daemon, name: &str) -> PathBuf {
    let logs = daemon.path("logs");
    let logs = logs.strip_prefix("/").expect("absolute");
    PathBuf::from(format!("/proc/{}/root", daemon.pid())).join(logs).join(name)
}

fn relay(daemon: &Daemon, mails: usize) {
    for _ in 0..mails {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    }
}

/// Returns whether this is one record and nothing else.
fn is_whole(line: &str) -> bool {
    let time = line.get(..24).is_some_and(|time| time.starts_with("20") && time.ends_with('Z'));
    time && line.matches("Z info qrelay").count() + line.matches("Z warn qrelay").count() == 1
}

/// Waits until both kinds of processes have said what was lost, and have gone on logging.
fn wait_for_reports(daemon: &Daemon) -> String {
    eventually("reports of lost lines, and then other lines", || {
        relay(daemon, 1);
        let text = fs::read_to_string(log_file(daemon, "log")).expect("log");
        let logs_again = |process: &str| {
            let mut lines = text.lines().skip_while(|line| {
                !(line.contains(process) && line.contains(" log lines were lost lost="))
            });
            lines.nth(1).is_some() && lines.any(|line| line.contains(process))
        };
        (logs_again(" qrelay[") && logs_again(" qrelay-worker[")).then_some(text)
    })
}

#[test]
fn a_full_disk() {
    let mount = "mount -t tmpfs -o size=128k none . && cd .";
    let mut daemon = logging(Site::with(CONFIG).launch(), mount).ready();
    // Some room stays, so that the last line has room for a part only.
    fs::write(log_file(&daemon, "ballast"), vec![0; 64 << 10]).expect("ballast");
    relay(&daemon, 300);
    let full = fs::read(log_file(&daemon, "log")).expect("log");
    assert!(full.len() <= 64 << 10 && !full.ends_with(b"\n"), "a line is torn: {}", full.len());

    fs::remove_file(log_file(&daemon, "ballast")).expect("ballast");
    let text = wait_for_reports(&daemon);
    let full = String::from_utf8(full).expect("UTF-8");
    for (number, line) in text.lines().enumerate() {
        // Several processes may have put an end to the torn line.
        let is_torn = full.lines().last() == Some(line);
        assert!(is_torn || line.is_empty() || is_whole(line), "{number}: {line}");
    }
    daemon.stop();
}

#[test]
fn a_file_at_the_limit_of_its_size() {
    // 16 blocks of 512 bytes. The daemon must not end by SIGXFSZ.
    let mut daemon = logging(Site::with(CONFIG).launch(), "ulimit -f 16").ready();
    relay(&daemon, 40);
    let log = log_file(&daemon, "log");
    eventually("a full file", || {
        (fs::metadata(&log).expect("log").len() == 16 * 512).then_some(())
    });
    relay(&daemon, 10);

    let report = eventually("a report of the lost lines", || {
        // As logrotate's `copytruncate` does it. The file may be full again before the report.
        if fs::metadata(&log).expect("log").len() == 16 * 512 {
            OpenOptions::new().write(true).truncate(true).open(&log).expect("log");
        }
        relay(&daemon, 1);
        let text = fs::read_to_string(&log).expect("log");
        text.lines()
            .find(|line| line.contains(" qrelay[") && line.contains("lost="))
            .map(str::to_owned)
    });
    let lost = report.rsplit('=').next().and_then(|number| number.parse::<u32>().ok());
    assert!(lost.is_some_and(|lost| lost >= 10), "{report}");
    let text = fs::read_to_string(&log).expect("log");
    assert!(!text.contains('\0'), "the file has a hole: {text:?}");
    daemon.stop();
}

/// A script's last line before `os.exit`, and the daemon's last line, are in the file.
#[test]
fn last_words() {
    let config = "
        settings{workers=1}
        qmqp_listen('$DIR/in', function(m)
          log.info('last words')
          os.exit(3)
        end)";
    let mut daemon = logging(Site::with(config).launch(), "true").ready();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Ztry again later");
    daemon.stop();
    let text = fs::read_to_string(daemon.path("logs/log")).expect("log");
    assert!(text.lines().any(|line| line.contains(" last words id=")), "{text}");
    assert!(text.lines().last().is_some_and(|line| line.ends_with(": stopped")), "{text}");
}
