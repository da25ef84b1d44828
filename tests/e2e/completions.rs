//! `qrelay completions`: the scripts, in the shells that they are for.

use std::process::Output;

use crate::harness::daemon::command;
use crate::harness::{Site, run};

/// Returns a directory with the script for a shell, in the file `script`.
fn script(shell: &str) -> Site {
    let output = run(&["completions", shell]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let site = Site::new();
    std::fs::write(site.path("script"), &output.stdout).expect("file");
    site
}

/// Runs a shell in that directory, which must not complain, and returns the words that it prints.
#[track_caller]
fn shell(site: &Site, arguments: &[&str]) -> Vec<String> {
    let Output { status, stdout, stderr } = command(arguments[0])
        .args(&arguments[1..])
        .current_dir(site.dir())
        .env("HOME", site.dir())
        .output()
        .expect("the shell is installed");
    let complaints = String::from_utf8_lossy(&stderr);
    assert!(status.success() && complaints.is_empty(), "{arguments:?}: {complaints}");
    String::from_utf8(stdout).expect("UTF-8").split_whitespace().map(str::to_owned).collect()
}

/// Checks the words that complete `qrelay se`, and those for an option of `sink`.
#[track_caller]
fn completes(commands: &[String], options: &[String]) {
    assert_eq!(commands, ["send", "sendmail"]);
    assert!(options.iter().any(|word| word == "--answer"), "{options:?}");
}

#[test]
fn bash() {
    let site = script("bash");
    assert!(shell(&site, &["bash", "-n", "script"]).is_empty());
    let complete = |words: &str| {
        let script = format!(
            "source ./script; set -- qrelay {words}; COMP_WORDS=(\"$@\"); \
             COMP_CWORD=$(($# - 1)); _qrelay qrelay \"${{@: -1}}\" \"${{@: -2:1}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        shell(&site, &["bash", "--norc", "-c", &script])
    };
    completes(&complete("se"), &complete("sink --"));
    let all = complete("''");
    assert!(all.iter().any(|word| word == "check"), "{all:?}");
    assert!(!all.iter().any(|word| word == "zygote"), "{all:?}");
    assert_eq!(complete("completions ''").last().map(String::as_str), Some("fish"));
    assert!(!complete("sendmail -").contains(&"-X".to_owned()));
}

#[test]
fn zsh() {
    let site = script("zsh");
    assert!(shell(&site, &["zsh", "-n", "script"]).is_empty());
    let text = std::fs::read_to_string(site.path("script")).expect("file");
    assert!(text.starts_with("#compdef qrelay") && text.contains("'sendmail:Submit"), "{text}");
    assert!(!text.contains("zygote"), "{text}");
}

#[test]
fn fish() {
    let site = script("fish");
    assert!(shell(&site, &["fish", "--no-execute", "script"]).is_empty());
    let complete = |words: &str| {
        let script =
            format!("source ./script; complete -C '{words}' | string replace -r '\\t.*' ''");
        shell(&site, &["fish", "--no-config", "-c", &script])
    };
    completes(&complete("qrelay se"), &complete("qrelay sink --"));
    assert!(!complete("qrelay ").contains(&"zygote".to_owned()));
}

#[test]
fn other_shells_are_named_as_wrong() {
    let output = run(&["completions", "powershell"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("bash, zsh, fish"));
}
