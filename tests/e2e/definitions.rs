//! The definitions for the Lua language server, docs/lua/qrelay.d.lua, against what a running
//! qrelay has registered: no name in one is missing from the other.
//!
//! Contract: definitions.lua compares from inside config.lua, because only there an object of each
//! kind can be had. The second test changes the definitions, so the comparison itself is tested.

use std::fs;

use crate::harness::Site;
use crate::harness::control_group::Group;
use crate::harness::postgres::Cluster;

const DEFINITIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/lua/qrelay.d.lua");

/// Returns the differences between these definitions and what is registered, one in a line.
fn differences(definitions: &str) -> String {
    let database = Cluster::shared();
    let site = Site::with(&format!(
        "settings{{workers=1}}
         local definitions = assert(io.open('$DIR/definitions')):read('a')
         local compare = assert(loadfile('$DIR/compare'))(definitions)
         local db = pg:new('{}')
         qmqp_listen('$DIR/in', function(m)
           local file = assert(io.open('$DIR/differences', 'w'))
           file:write(table.concat(compare(m, db), '\\n'))
           file:close()
           return m:discard('compared')
         end)",
        database.conninfo()
    ));
    fs::write(site.path("definitions"), definitions).expect("file");
    fs::write(site.path("compare"), include_str!("definitions.lua")).expect("file");
    let daemon = site.start();
    // A group below another one, so that the client's group has a parent.
    let group = Group::new();
    let answer = group.below("inner").submit(&daemon.path("in"));
    assert_eq!(answer, "compared", "{}", daemon.text());
    fs::read_to_string(daemon.path("differences")).expect("file")
}

#[test]
fn the_definitions_are_what_is_registered() {
    let definitions = fs::read_to_string(DEFINITIONS).expect("the definitions");
    assert_eq!(differences(&definitions), "");
}

#[test]
fn a_difference_is_noticed() {
    let mut definitions = fs::read_to_string(DEFINITIONS).expect("the definitions");
    let mut expected = Vec::new();
    for (old, new, difference) in [
        ("function sleep(seconds) end", "", ": 'sleep' is there and not defined"),
        ("function json.dump(", "function json.print(", "json: 'dump' is there and not defined"),
        ("", "", "json: 'print' is defined and not there"),
        ("function Mail:defer(text) end", "", "qrelay.Mail: 'defer' is there and not defined"),
        ("---@field pid integer? (read only)", "---@field pid integer?", "qrelay.Mail.pid: "),
        ("Result:affected()", "Result:affected(x)", "qrelay.Result.affected: 1 parameters"),
        ("---@field workers?", "---@field worker?", "qrelay.Settings: 'workers' is there"),
        ("---@field order?", "---@field odour?", "qrelay.ConnectOptions: 'odour' is defined"),
        ("---@class qrelay.Action\n", "---@class qrelay.Act\n", "qrelay.Act: not compared"),
    ] {
        assert!(definitions.contains(old), "{old}");
        definitions = definitions.replacen(old, new, 1);
        expected.push(difference);
    }
    let differences = differences(&definitions);
    for difference in expected {
        assert!(differences.contains(difference), "{difference:?} is not in:\n{differences}");
    }
}
