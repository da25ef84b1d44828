//! PostgreSQL as scripts see it: values, statements, errors, transactions, arrays.

use std::sync::Arc;

use crate::harness::postgres::Cluster;
use crate::harness::{Daemon, Mail, submit};

/// A daemon with one worker whose global `db` is the shared cluster. The handler runs the Lua code
/// in the mail's field `X-Code`, and the result of the code is the text of the reply.
pub struct Evaluator {
    pub daemon: Daemon,
    cluster: Arc<Cluster>,
}

impl Evaluator {
    pub fn start() -> Self {
        Self::with("")
    }

    /// Starts the daemon with `prologue` before the listener in config.lua.
    pub fn with(prologue: &str) -> Self {
        let cluster = Cluster::shared();
        let daemon = Daemon::start(&format!(
            "settings{{workers=1}}
             db = pg:new('{}')
             {prologue}
             qmqp_listen('$DIR/in', function(m)
               local result = assert(load(m:header('X-Code')))()
               return m:discard(tostring(result))
             end)",
            cluster.conninfo()
        ));
        Self { daemon, cluster }
    }

    pub fn run(&self, code: &str) -> String {
        let mut mail = Mail::new("x");
        mail.message.splice(0..0, format!("X-Code: {code}\n").into_bytes());
        submit(self.daemon.path("in"), &mail).to_string()
    }

    /// Runs code that must return `expected`.
    #[track_caller]
    pub fn expect(&self, code: &str, expected: &str) {
        assert_eq!(self.run(code), format!("K{expected}"), "{code}\n{}", self.daemon.text());
    }

    /// Runs a call that must return nil and a message that contains all `parts`.
    #[track_caller]
    fn expect_failure(&self, call: &str, parts: &[&str]) {
        let told = self.run(&format!("local r, e = {call} return tostring(r) .. ' ' .. e"));
        let fits = told.starts_with("Knil ") && parts.iter().all(|part| told.contains(part));
        assert!(fits, "{call}: {told}\n{}", self.daemon.text());
    }
}

/// The columns of a table: name, type, and the value of a row as Lua code.
const COLUMNS: &[(&str, &str, &str)] = &[
    ("i2", "int2", "-32768"),
    ("i4", "int4", "'2147483647'"),
    ("i8", "int8", "math.mininteger"),
    ("whole", "int8", "2^53"),
    ("n", "numeric", "'12345678901234567890.123456789'"),
    ("n2", "numeric(10,2)", "0.1"),
    ("f4", "float4", "1.5"),
    ("f8", "float8", "0.1 + 0.2"),
    ("huge", "float8", "1e300"),
    ("inf", "float8", "-1/0"),
    ("nan", "float8", "0/0"),
    ("yes", "bool", "true"),
    ("no", "bool", "false"),
    ("word", "bool", "'yes'"),
    ("t", "text", "'it\\'s \\\\ \"quoted\" \\195\\164 $1 -- /* '"),
    ("empty", "text", "''"),
    ("number", "text", "42.0"),
    ("c", "char(5)", "'ab'"),
    ("v", "varchar(10)", "'abc'"),
    ("by", "bytea", "'\\\\x00ff5c27'"),
    ("ts", "timestamp", "'2024-02-29 12:34:56.789'"),
    ("tz", "timestamptz", "'2024-02-29 12:34:56+02'"),
    ("d", "date", "'2024-02-29'"),
    ("ti", "time", "'23:59:59'"),
    ("iv", "interval", "'1 year 2 days 03:04:05'"),
    ("u", "uuid", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"),
    ("ip", "inet", "'192.0.2.0/24'"),
    ("j", "json", "'{\"a\" : [1, null]}'"),
    ("jb", "jsonb", "'{\"b\":2,\"a\" : [1, null]}'"),
    ("ia", "int4[]", "pg:encode_array{1, 2, 3}"),
    ("ta", "text[]", "pg:encode_array{'a', 'b,c', '\"', '\\\\', '', 'NULL', n=7}"),
    ("nested", "int4[]", "'{{1,2},{3,4}}'"),
    ("e", "mood", "'happy'"),
    ("null", "int4", "nil"),
];

#[test]
fn values_are_what_psql_prints() {
    let evaluator = Evaluator::start();
    let column = |(name, kind, _): &(&str, &str, &str)| format!("\"{name}\" {kind}");
    let columns: Vec<_> = COLUMNS.iter().map(column).collect();
    let cluster = &evaluator.cluster;
    cluster.psql("CREATE TYPE mood AS ENUM ('sad', 'happy')");
    cluster.psql(&format!("CREATE TABLE kinds ({})", columns.join(",")));
    let places: Vec<_> = (1..=COLUMNS.len()).map(|number| format!("${number}")).collect();
    let values: Vec<_> = COLUMNS.iter().map(|(_, _, value)| *value).collect();
    let site = evaluator.daemon.path("rows");
    let code = format!(
        "local n = {count} local p = table.pack({values}) assert(p.n == n) \
         local r = assert(db:execute('INSERT INTO kinds VALUES ({places})', p)) \
         assert(r:affected() == 1 and r:fetch() == nil) \
         r = assert(db:execute('SELECT * FROM kinds')) \
         local f = io.open('{file}', 'w') \
         for row in r:rows('n') do \
           for i = 1, n do row[i] = row[i] or '' end f:write(table.concat(row, '|'), '\\n') end \
         f:close() return 'done'",
        count = COLUMNS.len(),
        values = values.join(", "),
        places = places.join(","),
        file = site.display(),
    );
    evaluator.expect(&code, "done");
    let written = std::fs::read_to_string(&site).expect("rows");
    assert_eq!(written, cluster.psql("SELECT * FROM kinds"));
    assert!(written.contains("0.30000000000000004|1e+300|-Infinity|NaN|t|f|t"), "{written}");
    cluster.psql("DROP TABLE kinds; DROP TYPE mood");
}

#[test]
fn results() {
    let evaluator = Evaluator::start();
    for (code, expected) in [
        // Rows by name, by number, and into a given table, where NULL removes the old value.
        ("return db:execute('SELECT 1 AS a, NULL AS b'):fetch().a", "1"),
        ("return db:execute('SELECT 1 AS a'):fetch({}, 'a').a", "1"),
        ("return db:execute('SELECT 7'):fetch(nil, 'n')[1]", "7"),
        ("local t = {b = 5} return tostring(db:execute('SELECT NULL AS b'):fetch(t).b)", "nil"),
        ("local t = {} return db:execute('SELECT 1'):fetch(t) == t", "true"),
        ("local r = db:execute('SELECT 1') r:fetch() return r:fetch()", "nil"),
        // Iteration, with a new table for each row.
        (
            "local s = {} for r in db:execute('SELECT generate_series(1, 3) AS i'):rows() do \
             s[#s + 1] = r end return s[1].i .. s[2].i .. s[3].i .. #s",
            "1233",
        ),
        // Several statements: the last result counts, and the others leave nothing.
        ("return db:execute('SELECT 1 AS a; SELECT 2 AS a'):fetch().a", "2"),
        ("return db:execute('SELECT 1 AS a; SELECT 2 AS a WHERE false'):fetch()", "nil"),
        ("return db:execute('SELECT generate_series(1, 5)'):affected()", "5"),
        ("return db:execute(''):fetch()", "nil"),
        // Parameters: their number, `n`, conversions.
        ("return db:execute('SELECT $1 + 1 AS x', {41}):fetch().x", "42"),
        ("return db:execute('SELECT $1 AS x', {1}):fetch().x", "1"),
        (
            "return tostring(db:execute('SELECT $1 AS a, $2::int AS x', {1, nil, n=2}):fetch().x)",
            "nil",
        ),
        ("return db:execute('SELECT $1::bool AS x', {true}):fetch().x", "t"),
        ("return db:execute('SELECT $1 AS x -- end', {'y'}):fetch().x", "y"),
        ("return db:execute('SELECT 5 AS x', {}):fetch().x", "5"),
        ("return tostring(db)", ""),
    ] {
        if expected.is_empty() {
            assert!(evaluator.run(code).starts_with("Kdatabase"), "{}", evaluator.run(code));
        } else {
            evaluator.expect(code, expected);
        }
    }
}

#[test]
fn misuse_raises_and_failure_returns() {
    let evaluator = Evaluator::start();
    for wrong in [
        "db.execute('SELECT 1')",
        "db:execute()",
        "db:execute({})",
        "db:execute('SELECT $1', 1)",
        "db:execute('SELECT $1', {{}})",
        "db:execute('SELECT $1', {print})",
        "db:execute('SELECT $1', {n=-1})",
        "db:execute('SELECT $1', {n=1e9})",
        "db:execute('SELECT 1'):fetch('a')",
        "db:execute('SELECT 1'):fetch({}, 'x')",
        "db:execute('SELECT 1'):rows('x')",
        "db:execute('SELECT 1'):fetch({}, 'a', 1)",
        "db:execute('SELECT 1'):rows('a', 1)",
        "db:execute('SELECT 1'):affected(1)",
        "db:transaction(function(tx) tx:execute('SELECT 1', nil, 1) end)",
        "db:transaction(function() end, 1)",
        "db:excute('SELECT 1')",
        "db:transaction()",
        "db:transaction(1)",
        "db:listen('', print)",
        "db:listen('x')",
        "db:listen(('x'):rep(64), print)",
        "pg.new('dbname=x')",
        "pg:new()",
        "pg:new('x')",
        "pg:new('usr=x')",
        "pg:new('host=a sslmode=maybe')",
        "pg:new('host=a sslcert=x')",
        "pg:new('', {})",
        "pg:new('', nil, {max_conections=1})",
        "pg:new('', nil, {max_connections=0})",
        "pg:encode_array('x')",
        "pg:encode_array{print}",
        "pg:encode_array{1, nil, 3}",
        "pg:encode_array{[2]='b'}",
        "pg:encode_array{1, x=1}",
        "pg:encode_array{1, [1.5]=1}",
        "pg:encode_array{1, 2, n=1}",
        "pg:encode_array{{1}, {2, x=1}}",
        "pg:decode_array({})",
    ] {
        let code = format!("return pcall(function() {wrong} end)");
        evaluator.expect(&code, "false");
    }
    for (call, parts) in [
        ("db:execute('SELEC')", &["ERROR 42601", "SELEC"][..]),
        ("db:execute('SELECT * FROM nowhere')", &["42P01", "\"nowhere\" does not exist"]),
        ("db:execute('SELECT * FROM nowhere WHERE $1', {1})", &["42P01"]),
        ("db:execute('SELECT $1::int', {'x'})", &["22P02", "\"x\""]),
        ("db:execute('SELECT 1/$1::int', {0})", &["22012"]),
        ("db:execute('SELECT $1, $2', {0})", &["42601"]),
        ("db:execute('SELECT $1', {'a\\0b'})", &["NUL"]),
        ("db:execute('SELECT \\0')", &["NUL"]),
        ("db:execute('SELECT $1', {'a\\255b'})", &["22021", "0xff"]),
        ("db:execute('SELECT \\255')", &["22021"]),
        ("db:execute('COPY pg_class TO STDOUT')", &["COPY"]),
        ("db:execute('COPY pg_class FROM STDIN')", &["COPY"]),
        ("db:execute('SELECT 1; COPY pg_class FROM STDIN')", &["COPY"]),
        ("pg:decode_array('{a')", &["malformed array"]),
        ("pg:new('host=/nonexistent'):execute('SELECT 1')", &["/nonexistent/.s.PGSQL.5432"]),
    ] {
        evaluator.expect_failure(call, parts);
        // The next statement gets a working connection.
        evaluator.expect("return db:execute('SELECT 1 AS a'):fetch().a", "1");
    }
}

#[test]
fn parameters_never_change_the_statement() {
    let evaluator = Evaluator::start();
    let cluster = &evaluator.cluster;
    cluster.psql("CREATE TABLE victim (v text)");
    for value in [
        r"\'); DROP TABLE victim; --",
        r"\\\'); DROP TABLE victim; --",
        r"\\",
        r"$1",
        r"-- $1",
        r"/*",
        r"$$",
        r"E\\x27",
        r"\195\164\\\'",
    ] {
        for setting in ["on", "off"] {
            let code = format!(
                "local v = '{value}' \
                 return db:transaction(function(tx) \
                   assert(tx:execute('SET LOCAL standard_conforming_strings = {setting}')) \
                   assert(tx:execute('INSERT INTO victim VALUES ($1)', {{v}})) \
                   local r = assert(tx:execute('SELECT v FROM victim WHERE v = $1', {{v}})) \
                   return r:fetch().v == v end)"
            );
            evaluator.expect(&code, "true");
        }
    }
    let second = "db:execute('SELECT $1; DROP TABLE victim', {1})";
    evaluator.expect_failure(second, &["42601", "multiple commands"]);
    let second = "db:execute('SELECT 1 WHERE $1; DROP TABLE victim; --', {true})";
    evaluator.expect_failure(second, &["42601"]);
    assert_eq!(cluster.psql("SELECT count(*) FROM victim"), "18\n");
    cluster.psql("DROP TABLE victim");
}

#[test]
fn an_empty_list_of_parameters_counts_as_parameters() {
    let evaluator = Evaluator::start();
    let cluster = &evaluator.cluster;
    evaluator.expect("return db:execute('SELECT 1', {}):fetch(nil, 'n')[1]", "1");
    evaluator.expect("return db:execute('SELECT 2 -- two', {n=0}):fetch(nil, 'n')[1]", "2");
    for several in
        ["SELECT 1; SELECT 2", "CREATE TABLE two (x int); SELECT 2", "SET x.y = 1; SELECT 1"]
    {
        evaluator.expect_failure(&format!("db:execute('{several}', {{}})"), &["42601"]);
    }
    evaluator.expect("return db:execute('SELECT 1; SELECT 2'):fetch(nil, 'n')[1]", "2");
    // Statements that can't be prepared as a query.
    evaluator.expect("return db:execute('CREATE TABLE empty_list (x int)', {}):affected()", "0");
    evaluator
        .expect("return db:execute('SHOW search_path', {}):fetch().search_path ~= nil", "true");
    evaluator.expect_failure("db:execute('BEGIN', {})", &["db:transaction"]);
    evaluator.expect_failure("db:execute('SELECT $1', {})", &["ERROR"]);
    cluster.psql("DROP TABLE empty_list");
}

#[test]
fn statements_that_are_no_queries_have_parameters_too() {
    let evaluator = Evaluator::start();
    let cluster = &evaluator.cluster;
    cluster.psql(
        "CREATE TYPE colour AS ENUM ('red', 'green');
         CREATE TABLE called (a int, b text, c colour);
         CREATE PROCEDURE call_me(a int, b text, c colour DEFAULT 'red') LANGUAGE plpgsql AS $$
           BEGIN INSERT INTO called VALUES (a, b, c); COMMIT; END $$;
         CREATE PROCEDURE twice(INOUT i int8, INOUT t text, INOUT b bool, INOUT c colour,
           INOUT j jsonb) LANGUAGE plpgsql AS $$
           BEGIN i := 2 * i; t := t || t; b := NOT b; END $$;
         CREATE PROCEDURE half(INOUT n numeric) LANGUAGE plpgsql AS $$
           BEGIN INSERT INTO called VALUES (0, 'half'); n := n / 2; END $$",
    );
    evaluator.expect("return db:execute('CALL call_me($1, $2)', {1, 'one'}):fetch()", "nil");
    evaluator.expect(
        "return db:execute('/* a */ call call_me($1, $2, $3)', {'2', nil, 'green'}) ~= nil",
        "true",
    );
    // The text of a parameter never changes the statement.
    let evil = "'); DROP TABLE called; -- \\\\ $1";
    let call =
        format!("local evil = \"{evil}\" assert(db:execute('CALL call_me($1, $2)', {{3, evil}}))");
    evaluator.expect(
        &format!(
            "{call} local r = db:execute('SELECT b = $1 FROM called WHERE a = 3', {{evil}}) \
             return r:fetch(nil, 'n')[1]"
        ),
        "t",
    );
    let rows = cluster.psql("SELECT a, b IS NULL, c FROM called ORDER BY a");
    assert_eq!(rows, "1|f|red\n2|t|green\n3|f|red\n");
    evaluator.expect(
        "local p = {2^40, 'ab', true, 'red', '{}'} \
         local r = db:execute('CALL twice($1, $2, $3, $4, $5)', p):fetch() \
         return r.i .. r.t .. r.b .. r.c .. r.j",
        "2199023255552ababfred{}",
    );
    evaluator.expect(
        "local r = db:execute('CALL twice($1, $2, $3, $4, $5)', {n=5}):fetch({i = 7}) return r.i",
        "nil",
    );
    let plan = "local explain = 'EXPLAIN (COSTS OFF) SELECT * FROM called WHERE a = $1' \
                local r = assert(db:execute(explain, {7})) \
                local text = '' for row in r:rows('n') do text = text .. row[1] .. '\\n' end \
                return text:find('called', 1, true) ~= nil and text:find('7', 1, true) ~= nil";
    evaluator.expect(plan, "true");
    for (call, parts) in [
        ("db:execute('CALL half($1)', {3})", &["was done", "column n", "numeric"][..]),
        ("db:execute('CALL call_me($1, $2); SELECT 1', {1, 2})", &["42601"]),
        ("db:execute('CALL call_me($1, $2)', {'x', 2})", &["22P02"]),
        ("db:execute('CALL call_me($1, $2)', {1, 'a\\255'})", &["22021"]),
        ("db:execute('CALL call_me($1, $2)', {1, 'a\\0'})", &["NUL"]),
        ("db:execute('CALL call_me($1, $2)', {1, 2, 3})", &["42P18", "$3"]),
        ("db:execute('CALL call_me($1, $2)', {1})", &["08P01"]),
        ("db:execute('CALL no_such($1)', {1})", &["42883"]),
        ("db:execute('CREATE TABLE x (a int DEFAULT $1)', {1})", &["ERROR"]),
        ("db:execute('NOTIFY x, $1', {'y'})", &["42601"]),
        ("db:execute('COPY called FROM STDIN', {})", &["COPY takes no parameters"]),
        ("db:execute('--\\rCOPY called FROM STDIN', {})", &["COPY takes no parameters"]),
        ("db:execute(';COPY called FROM STDIN', {})", &["COPY from or to the client"]),
        ("db:execute(';COPY called TO STDOUT', {})", &["COPY from or to the client"]),
    ] {
        evaluator.expect_failure(call, parts);
        evaluator.expect("return db:execute('SELECT 1 AS a'):fetch().a", "1");
    }
    assert_eq!(cluster.psql("SELECT count(*) FROM called WHERE b = 'half'"), "1\n");
    // In a transaction a procedure can't commit, so the call fails like any other statement.
    evaluator.expect_failure(
        "db:transaction(function(tx) assert(tx:execute('CALL twice($1, $2, $3, $4, $5)', {n=5})) \
         return tx:execute('CALL call_me($1, $2)', {1, 2}) end)",
        &["25P02"],
    );
    cluster.psql("DROP PROCEDURE call_me, twice, half; DROP TABLE called; DROP TYPE colour");
}

/// The client library has to ask the server about a type that it doesn't know, while the result
/// with that type is larger than the buffers of the library and the socket.
#[test]
fn a_large_result_has_a_type_that_is_new_to_the_connection() {
    let evaluator = Evaluator::start();
    let cluster = &evaluator.cluster;
    cluster.psql("CREATE TYPE mood AS ENUM ('calm', 'glad')");
    evaluator.expect(
        "return db:transaction(function(tx) \
           assert(tx:execute([[DECLARE c CURSOR FOR \
                               SELECT mood 'glad' AS m, repeat('x', 2000) AS t \
                               FROM generate_series(1, 1000)]])) \
           local n = 0 \
           for row in assert(tx:execute('FETCH ALL FROM c', {})):rows() do \
             assert(row.m == 'glad' and #row.t == 2000) n = n + 1 \
           end \
           return n end)",
        "1000",
    );
    cluster.psql("DROP TYPE mood");
}

/// The start of a parallel worker of the server takes longer than the statement may take. So the
/// statement that `commit` sends before COMMIT fails. A machine may be fast enough now and then, so
/// there are many attempts.
#[test]
fn a_refused_commit_leaves_no_transaction() {
    let evaluator = Evaluator::start();
    let commit = "return select(2, db:transaction(function(tx) \
         assert(tx:execute([[SELECT set_config(name, 'on', true) FROM pg_settings \
                             WHERE name IN ('force_parallel_mode', 'debug_parallel_query')]])) \
         assert(tx:execute([[SET LOCAL statement_timeout = '1ms']])) end))";
    let refused = (0..50).any(|_| evaluator.run(commit).contains("57014"));
    assert!(refused, "{}", evaluator.daemon.text());
    evaluator.expect("return assert(db:execute('SELECT 1 AS a', {})):fetch().a", "1");
}

#[test]
fn transactions() {
    // A name of its own, since other tests' transactions may be open on the same server.
    let cluster = Cluster::shared();
    let conninfo = format!("{} application_name=ledger", cluster.conninfo());
    let evaluator = Evaluator::with(&format!("db = pg:new('{conninfo}')"));
    cluster.psql("CREATE TABLE ledger (x int)");
    let insert = "tx:execute('INSERT INTO ledger VALUES ($1)', {1})";
    let count = || cluster.psql("SELECT count(*) FROM ledger");
    evaluator.expect(&format!("return db:transaction(function(tx) {insert} end)"), "true");
    assert_eq!(count(), "1\n");
    evaluator.expect(
        &format!("return pcall(db.transaction, db, function(tx) {insert} error('no') end)"),
        "false",
    );
    assert_eq!(count(), "1\n");
    // The function ignores that a statement has failed: nothing is stored, and the script is told.
    let careless = format!("db:transaction(function(tx) {insert} tx:execute('SELEC') end)");
    evaluator.expect_failure(&careless, &["25P02"]);
    assert_eq!(count(), "1\n");
    // The results of the function are the results of the transaction.
    evaluator.expect("return select('#', db:transaction(function() return 1, 2, 3 end))", "3");
    evaluator.expect("return db:transaction(function(tx) kept = tx end)", "true");
    evaluator.expect_failure("kept:execute('SELECT 1')", &["over"]);
    // A BEGIN without COMMIT leaves nothing open. BEGIN and COMMIT in one call are as good as any
    // statement.
    for begin in ["BEGIN", "start transaction", "SELECT 1; BEGIN; INSERT INTO ledger VALUES (2)"] {
        evaluator.expect_failure(&format!("db:execute('{begin}')"), &["db:transaction"]);
    }
    evaluator.expect_failure("db:execute('BEGIN; SELEC')", &["42601"]);
    evaluator.expect_failure("db:execute('BEGIN; SELECT 1/0')", &["22012"]);
    let whole = "BEGIN; INSERT INTO ledger VALUES (3); COMMIT";
    evaluator.expect(&format!("return db:execute('{whole}') ~= nil"), "true");
    assert_eq!(count(), "2\n");
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ledger'";
    assert_ne!(cluster.psql(connections), "0\n");
    assert_eq!(cluster.psql(&format!("{connections} AND state LIKE 'idle in%'")), "0\n");
    // Inside of a transaction nothing else begins or ends it, and a refusal leaves it as it was.
    let control =
        ["COMMIT", "/* c */ commit", "-- c\\n ROLLBACK", "BEGIN", "SELECT 1; end", "END;", "Abort"];
    for word in control {
        for parameters in ["", ", {}"] {
            if word.contains("; ") && !parameters.is_empty() {
                continue;
            }
            let code = format!(
                "local told local r = db:transaction(function(tx) {insert} \
                   local r, e = tx:execute('{word}'{parameters}) told = tostring(r) .. ' ' .. e \
                   return assert(tx:execute('SELECT 1')) end) \
                 return told .. (r and ' committed' or ' lost')"
            );
            let told = evaluator.run(&code);
            let hint = "Knil db:transaction itself";
            assert!(told.starts_with(hint) && told.ends_with(" committed"), "{word}: {told}");
        }
    }
    assert_eq!(count(), "15\n");
    evaluator.expect(
        &format!(
            "return db:transaction(function(tx) assert(tx:execute('SAVEPOINT a')) {insert} \
             return assert(tx:execute('ROLLBACK TO a')):affected() end)"
        ),
        "0",
    );
    assert_eq!(count(), "15\n");
    cluster.psql("DROP TABLE ledger");
}

#[test]
fn a_transaction_ends_with_its_handler() {
    let cluster = Cluster::shared();
    let daemon = Daemon::start(&format!(
        "settings{{workers=1, relay_timeout=1, handler_timeout=0.5}}
         local db = pg:new('{}', nil, {{max_connections=1}})
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'good@x' then
             return m:discard(db:execute('SELECT 1'):fetch(nil, 'n')[1])
           end
           return db:transaction(function(tx)
             assert(tx:execute('SELECT 1'))
             if m.sender == 'slow@x' then sleep(60) end
             while true do end
           end)
         end)",
        cluster.conninfo()
    ));
    for (sender, reply) in [("slow@x", "Zrelay failed"), ("runaway@x", "Zscript failed")] {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from(sender)), reply);
        let told = submit(daemon.path("in"), &Mail::new("x").from("good@x"));
        assert_eq!(told, "K1", "{}", daemon.text());
    }
}

#[test]
fn statements_survive_changes() {
    let evaluator = Evaluator::start();
    let cluster = &evaluator.cluster;
    cluster.psql("CREATE TABLE changing (x int); INSERT INTO changing VALUES (1)");
    let select = "return db:execute('SELECT * FROM changing WHERE x = $1', {1}):fetch(nil, 'n')[1]";
    evaluator.expect(select, "1");
    cluster.psql("ALTER TABLE changing ADD y int");
    evaluator.expect(select, "1");
    evaluator.expect("return db:execute('DISCARD ALL') ~= nil", "true");
    evaluator.expect(select, "1");
    // In a transaction, too, whatever the transaction has done before.
    let within = "return db:transaction(function(tx) \
        assert(tx:execute('INSERT INTO changing (x) VALUES ($1)', {2})) \
        local r = assert(tx:execute('SELECT * FROM changing WHERE x = $1', {1})) \
        return r:fetch(nil, 'n')[1] end)";
    evaluator.expect(within, "1");
    cluster.psql("ALTER TABLE changing ADD z int");
    evaluator.expect(within, "1");
    evaluator.expect("return db:execute('DEALLOCATE ALL') ~= nil", "true");
    evaluator.expect(within, "1");
    evaluator.expect(select, "1");
    assert_eq!(cluster.psql("SELECT count(*) FROM changing WHERE x = 2"), "3\n");
    // There are more different statements than stay prepared.
    let many = "for i = 1, 300 do assert(db:execute('SELECT $1 + ' .. i, {1})) end \
                local r = db:execute('SELECT count(*) FROM pg_prepared_statements') \
                return r:fetch(nil, 'n')[1]";
    let told = evaluator.run(many);
    let count: u32 = told.trim_start_matches('K').parse().expect(&told);
    assert!(count <= 130, "{told}");
    cluster.psql("DROP TABLE changing");
}

#[test]
fn arrays() {
    let evaluator = Evaluator::start();
    for (code, expected) in [
        ("return pg:encode_array{}", "{}"),
        ("return pg:encode_array{1, 'a', true}", "{\"1\",\"a\",\"1\"}"),
        ("return pg:encode_array{nil, 'NULL', n=3}", "{NULL,\"NULL\",NULL}"),
        ("return pg:encode_array{{1}, {2}}", "{{\"1\"},{\"2\"}}"),
        ("local t = pg:decode_array('{a,NULL}') return t[1] .. tostring(t[2]) .. t.n", "anil2"),
        ("return #pg:decode_array('{}')", "0"),
        ("return pg:decode_array('{{1,2},{3,4}}')[2][1]", "3"),
        (
            "local t = {'', 'a b', '\"', '\\\\', '{,}', 'NULL', '\\195\\164', ' '} \
             local r = db:execute('SELECT $1::text[] AS a', {pg:encode_array(t)}):fetch().a \
             return table.concat(pg:decode_array(r), '|') == table.concat(t, '|')",
            "true",
        ),
        (
            "local r = db:execute(\"SELECT '[0:1]={7,8}'::int[] AS a\"):fetch().a \
             return pg:decode_array(r)[2]",
            "8",
        ),
    ] {
        evaluator.expect(code, expected);
    }
}
