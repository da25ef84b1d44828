//! PostgreSQL behind PgBouncer, which gives each transaction of a client another connection to the
//! server.

use std::thread;

use crate::harness::pooler::Pooler;
use crate::harness::{Daemon, Mail, submit};

/// Starts a daemon whose handler runs the Lua code in the mail's field `X-Code`. The global `db` is
/// the database behind the pooler.
fn evaluator(pooler: &Pooler, arguments: &str, prologue: &str) -> Daemon {
    Daemon::start(&format!(
        "settings{{workers=2}}
         db = pg:new('{}'{arguments})
         {prologue}
         qmqp_listen('$DIR/in', function(m)
           return m:discard(tostring(assert(load('local m = ... ' .. m:header('X-Code')))(m)))
         end)",
        pooler.conninfo()
    ))
}

fn evaluate(daemon: &Daemon, code: &str) -> String {
    let mut mail = Mail::new("x");
    mail.message.splice(0..0, format!("X-Code: {code}\n").into_bytes());
    submit(daemon.path("in"), &mail).to_string()
}

/// Submits 200 mails with this code, eight at a time, and requires that all have this answer.
fn many(daemon: &Daemon, code: &str, answer: &str) {
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let told = evaluate(daemon, code);
                    assert_eq!(told, answer, "{code}\n{}", daemon.text());
                }
            });
        }
    });
}

/// PgBouncer refuses parameters of the start that it doesn't know, or drops them in silence.
const REFUSES: &str = "";
const DROPS: &str = "ignore_startup_parameters = options";

#[test]
fn parameters_and_transactions_never_fail_behind_a_pooler() {
    for settings in [REFUSES, DROPS] {
        let pooler = Pooler::start("transaction", settings);
        pooler.cluster().psql(
            "DROP TABLE IF EXISTS pooled;
             CREATE TABLE pooled (x int, t text DEFAULT 'none', UNIQUE (x) INITIALLY DEFERRED)",
        );
        let daemon = evaluator(&pooler, ", nil, {max_connections=4}", "");
        let query = "local n = math.random(5) \
            local r = assert(db:execute('SELECT $1::int + ' .. n .. ' AS x', {7})) \
            return math.tointeger(r:fetch().x - n)";
        many(&daemon, query, "K7");
        let transaction = "return db:transaction(function(tx) \
            assert(tx:execute('INSERT INTO pooled (t) VALUES ($1)', {m.id})) \
            local r = assert(tx:execute('SELECT count(*) AS n FROM pooled WHERE t = $1', {m.id})) \
            return r:fetch().n end)";
        many(&daemon, transaction, "K1");
        assert_eq!(pooler.cluster().psql("SELECT count(*) FROM pooled"), "200\n");
        // Failures are the statement's own, and cost nobody else anything.
        for (code, part) in [
            ("db:execute('SELECT $1::int', {'x'})", "22P02"),
            ("db:execute('SELECT $1 FROM nowhere', {'x'})", "42P01"),
            ("db:execute('SELECT 1/$1::int', {0})", "22012"),
            ("db:execute('SELECT $1; SELECT 2', {1})", "42601"),
            (
                "db:execute('INSERT INTO pooled (x) SELECT $1 FROM generate_series(1, 2)', {1})",
                "23505",
            ),
            ("db:transaction(function(tx) tx:execute('SELECT $1::int', {'x'}) end)", "25P02"),
            ("db:execute('BEGIN')", "db:transaction"),
        ] {
            let told = evaluate(&daemon, &format!("local r, e = {code} return e"));
            assert!(told.contains(part), "{code}: {told}");
            let told = evaluate(&daemon, "return db:execute('SELECT $1', {8}):fetch(nil, 'n')[1]");
            assert_eq!(told, "K8", "after {code}");
        }
        // A statement that commits by itself, and one with a type that is new to the client.
        pooler.cluster().psql(
            "DROP PROCEDURE IF EXISTS commits; DROP TYPE IF EXISTS weather;
             CREATE TYPE weather AS ENUM ('fair', 'foul');
             CREATE PROCEDURE commits(INOUT w weather) LANGUAGE plpgsql AS $$
               BEGIN COMMIT; END $$",
        );
        many(&daemon, "return assert(db:execute('CALL commits($1)', {'fair'})):fetch().w", "Kfair");
        // No prepared statement is left on any connection to the server. Each transaction has a
        // connection of its own.
        let left = "local n = 0 \
            local function count(depth) \
              return db:transaction(function(tx) \
                local r = assert(tx:execute('SELECT count(*) AS n FROM pg_prepared_statements \
                                             WHERE from_sql')) \
                n = n + r:fetch().n \
                return depth == 3 or count(depth + 1) end) end \
            assert(count(1)) return math.tointeger(n)";
        assert_eq!(evaluate(&daemon, left), "K0", "{}", daemon.text());
        pooler.cluster().psql("DROP TABLE pooled; DROP PROCEDURE commits; DROP TYPE weather");
    }
}

#[test]
fn what_cannot_work_behind_a_pooler_says_so() {
    for settings in [REFUSES, DROPS] {
        let pooler = Pooler::start("transaction", settings);
        let listen = format!("pg:new('{}'):listen('news', print)", pooler.conninfo());
        let daemon = evaluator(&pooler, ", 'pg_catalog'", &listen);
        let told = evaluate(&daemon, "local r, e = db:execute('SELECT 1') return e");
        assert!(told.contains("schema") && told.contains("transaction mode"), "{told}");
        let line = daemon.wait_for_log("LISTEN");
        assert!(line.contains(" error ") && line.contains("transaction mode"), "{line}");
    }
}

#[test]
fn a_pooler_in_session_mode_is_as_good_as_a_server() {
    for settings in [REFUSES, DROPS] {
        let pooler = Pooler::start("session", &format!("default_pool_size = 8\n{settings}"));
        let listen = "db:listen('session_news', function(news) print('heard ' .. tostring(news)) \
                      end)";
        let daemon = evaluator(&pooler, ", 'pg_catalog', {max_connections=1}", listen);
        let path = "return assert(db:execute('SHOW search_path')):fetch(nil, 'n')[1]";
        assert_eq!(evaluate(&daemon, path), "K\"pg_catalog\"", "{}", daemon.text());
        daemon.wait_for_log("heard nil");
        pooler.cluster().psql("NOTIFY session_news, 'today'");
        daemon.wait_for_log("heard today");
    }
}
