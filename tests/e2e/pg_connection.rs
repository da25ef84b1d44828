//! Connections to PostgreSQL: when they are made, where a connection string leads, their number,
//! and TLS.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::daemon::command;
use crate::harness::postgres::Cluster;
use crate::harness::{Daemon, Mail, Site, burst, submit};
use crate::pg::Evaluator;

#[test]
fn queries_run_while_the_script_loads() {
    let evaluator = Evaluator::with(
        "loaded = assert(db:execute('SELECT pg_backend_pid() AS pid')):fetch().pid
         assert(db:transaction(function(tx) return tx:execute('SELECT $1', {1}) end))",
    );
    let told = evaluator.run("return db:execute('SELECT pg_backend_pid() AS pid'):fetch().pid");
    let other = evaluator.run("return loaded");
    assert_ne!(told, other, "a worker has connections of its own");
    assert!(evaluator.daemon.reload(), "{}", evaluator.daemon.text());
    evaluator.expect("return db:execute('SELECT 1 AS a'):fetch().a", "1");
}

#[test]
fn the_default_socket_and_the_schema() {
    let cluster = Cluster::shared();
    let me = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().expect("me").name;
    cluster.psql(&format!("CREATE ROLE \"{me}\" LOGIN"));
    cluster.psql("CREATE DATABASE foo");
    let grant = format!("GRANT USAGE ON SCHEMA schemaname, \"Odd, One\" TO \"{me}\"");
    cluster
        .psql_in("foo", &format!("CREATE SCHEMA schemaname; CREATE SCHEMA \"Odd, One\"; {grant}"));
    cluster.psql_in("foo", "CREATE TABLE schemaname.bar AS SELECT 42 AS id");
    cluster.psql_in("foo", &format!("GRANT SELECT ON schemaname.bar TO \"{me}\""));
    let site = Site::with(
        "db = pg:new('dbname=foo', 'schemaname')
         other = pg:new('postgresql:///foo', '\"Odd, One\", schemaname')
         qmqp_listen('$DIR/in', function(m)
           local row = assert(db:execute('SELECT id, current_user AS who FROM bar')):fetch({}, 'a')
           local path = assert(other:execute('SHOW search_path')):fetch(nil, 'n')[1]
           return m:discard(row.id .. ' ' .. row.who .. ' ' .. path)
         end)",
    );
    // In the mount namespace of this daemon, the directory in which Debian's libpq looks for the
    // socket is the cluster's.
    let script = format!(
        "mount -t tmpfs none /run && mkdir /run/postgresql && \
         mount --bind {} /run/postgresql && exec \"$@\"",
        cluster.dir().display()
    );
    let launch = site.launch().env("PGPORT", &cluster.port().to_string());
    let daemon = launch.through(&["unshare", "--mount", "sh", "-c", &script, "sh"]).ready();
    let told = submit(daemon.path("in"), &Mail::new("x"));
    assert_eq!(told.to_string(), format!("K42 {me} \"Odd, One\", schemaname"), "{}", daemon.text());
    drop(daemon);
    cluster.psql("DROP DATABASE foo WITH (FORCE)");
    cluster.psql(&format!("DROP ROLE \"{me}\""));
}

#[test]
fn passwords_come_from_the_string_or_the_file() {
    let cluster = Cluster::start(&[]);
    cluster.psql("CREATE ROLE secret LOGIN PASSWORD 'se:cret'");
    let hba = "local all postgres trust\nlocal all all scram-sha-256\n";
    std::fs::write(cluster.data().join("pg_hba.conf"), hba).expect("pg_hba.conf");
    cluster.psql("SELECT pg_reload_conf()");
    let site = Site::new();
    let file = site.path("passwords");
    std::fs::write(&file, "*:*:*:secret:se\\:cret\n").expect("file");
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(&file, mode(0o600)).expect("mode");
    let place = format!("host={} port={} dbname=postgres", cluster.dir().display(), cluster.port());
    site.configure(&format!(
        "local function try(conninfo)
           local r, e = pg:new('{place} user=secret ' .. conninfo):execute('SELECT current_user')
           return r and r:fetch(nil, 'n')[1] or e:match('28P01') or e:match('password missing') or e
         end
         qmqp_listen('$DIR/in', function(m)
           return m:discard(table.concat({{try('password=se:cret'), try('password=wrong'), try(''),
             try('passfile=$DIR/passwords')}}, ' '))
         end)"
    ));
    let daemon = site.launch().env("PGPASSFILE", "/nonexistent").ready();
    let told = submit(daemon.path("in"), &Mail::new("x"));
    assert_eq!(told, "Ksecret 28P01 password missing secret", "{}", daemon.text());
}

#[test]
fn queries_of_different_mails_run_at_the_same_time() {
    let cluster = Cluster::shared();
    let daemon = Daemon::start(&format!(
        "settings{{workers=1, client_share=1}}
         local db = pg:new('{}', nil, {{max_connections=8}})
         qmqp_listen('$DIR/in', function(m)
           assert(db:execute('SELECT pg_sleep(0.05)'))
           return m:discard('slept')
         end)",
        cluster.conninfo()
    ));
    // 64 mails over 8 connections are eight rounds of 0.05 s, and take a little longer. The machine
    // may be busy with other tests for a while, but not in each of ten bursts.
    burst(&daemon, "Kslept", 16);
    let mut bursts = Vec::new();
    let good = (0..10).any(|_| {
        let took = burst(&daemon, "Kslept", 64);
        assert!(took >= Duration::from_millis(400), "{took:?}");
        bursts.push(took);
        took < Duration::from_millis(500)
    });
    assert!(good, "{bursts:?}");
    let count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'qrelay' \
                 AND query LIKE '%pg_sleep%'";
    let connections: u32 = cluster.psql(count).trim().parse().expect("number");
    assert!(connections <= 8, "{connections}");
}

/// Makes a key and a certificate of version 1 for a server in `cluster`, as `openssl x509 -req`
/// does unless it is told otherwise, and returns the signer's certificate.
fn make_old_certificate(cluster: &Cluster, dir: &Path) -> PathBuf {
    let script = "set -e; cd \"$1\"
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.crt
        openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout old.key -out old.csr
        openssl x509 -req -in old.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out old.crt
        openssl x509 -in old.crt -noout -text | grep -q 'Version: 1 '";
    let output = command("sh").args(["-c", script, "sh"]).arg(dir).output().expect("sh runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (from, to) in [("old.key", "server.key"), ("old.crt", "server.crt")] {
        std::fs::copy(dir.join(from), cluster.data().join(to)).expect("copy");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(cluster.data().join(to), mode).expect("mode");
        cluster.give_to_server(&cluster.data().join(to));
    }
    dir.join("ca.crt")
}

#[test]
fn certificates_of_version_1_encrypt_and_cannot_be_verified() {
    let cluster =
        Cluster::prepare(&["ssl=on", "ssl_cert_file=server.crt", "ssl_key_file=server.key"]);
    let certificates = Site::new();
    let root = make_old_certificate(&cluster, certificates.dir());
    let hba = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
    std::fs::write(cluster.data().join("pg_hba.conf"), hba).expect("pg_hba.conf");
    for limit in ["TLSv1.2", "TLSv1.3"] {
        cluster.restart_with(&[&format!("ssl_max_protocol_version={limit}")]);
        let site = Site::with(
            "qmqp_listen('$DIR/in', function(m)
               local db = pg:new('user=postgres dbname=postgres ' .. m:header('X-Conninfo'))
               local r, e = db:execute('SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()')
               return m:discard(r and r:fetch(nil, 'n')[1] or e)
             end)",
        );
        let passwd = format!("tester:x:{}:0::/nonexistent:/bin/sh\n", nix::unistd::geteuid());
        let daemon = site.launch().with_etc(&[("passwd", &passwd)]).ready();
        let old = "the server's certificate is of X.509 version 1 or 2, which can't be verified";
        for (mode, expected) in
            [("prefer", "Kt"), ("require", "Kt"), ("verify-ca", old), ("verify-full", old)]
        {
            let mut mail = Mail::new("x");
            let root = if mode.starts_with("verify") {
                format!("sslrootcert={}", root.display())
            } else {
                String::new()
            };
            let conninfo = format!(
                "X-Conninfo: host=localhost hostaddr=127.0.0.1 port={} sslmode={mode} {root}\n",
                cluster.port()
            );
            mail.message.splice(0..0, conninfo.into_bytes());
            let told = submit(daemon.path("in"), &mail).to_string();
            assert!(told.contains(expected), "{limit} {mode}: {told}\n{}", daemon.text());
        }
        assert_eq!(daemon.count_log("not encrypted"), 0, "{}", daemon.text());
    }
}

#[test]
fn plain_text_instead_of_tls_is_a_warning() {
    let cluster = Cluster::shared();
    let daemon = Daemon::start(&format!(
        "settings{{workers=1}}
         local db = pg:new('host=127.0.0.1 port={} user=postgres dbname=postgres', nil,
           {{max_connections=1}})
         qmqp_listen('$DIR/in', function(m)
           local r = assert(db:execute('SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()'))
           assert(db:execute('SELECT pg_terminate_backend(pg_backend_pid())') == nil)
           return m:discard(r:fetch(nil, 'n')[1])
         end)",
        cluster.port()
    ));
    for _ in 0..3 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kf", "{}", daemon.text());
    }
    let line = daemon.wait_for_log("not encrypted");
    assert!(line.contains(" warn ") && line.contains("does not support TLS"), "{line}");
    assert_eq!(daemon.count_log("not encrypted"), 1, "{}", daemon.text());
}

#[test]
fn tls_as_sslmode_says() {
    let cluster =
        Cluster::prepare(&["ssl=on", "ssl_cert_file=server.crt", "ssl_key_file=server.key"]);
    let (key, certificate) = (cluster.data().join("server.key"), cluster.data().join("server.crt"));
    let mut openssl = command("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]);
    openssl.args(["-subj", "/CN=test", "-addext", "subjectAltName=DNS:localhost"]);
    openssl.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
    let output = openssl.output().expect("openssl runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.give_to_server(&key);
    cluster.give_to_server(&certificate);
    let hba = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
    std::fs::write(cluster.data().join("pg_hba.conf"), hba).expect("pg_hba.conf");
    cluster.restart();
    let site = Site::new();
    std::fs::copy(&certificate, site.path("root.crt")).expect("copy");
    let mut other = command("openssl");
    other.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x"]);
    other.arg("-keyout").arg(site.path("other.key")).arg("-out").arg(site.path("other.crt"));
    assert!(other.output().expect("openssl runs").status.success());
    site.configure(
        "qmqp_listen('$DIR/in', function(m)
           local db = pg:new('user=postgres dbname=postgres ' .. m:header('X-Conninfo'))
           local r, e = db:execute('SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()')
           return m:discard(r and r:fetch(nil, 'n')[1] or e)
         end)",
    );
    // The machine's user may have a ~/.postgresql/root.crt.
    let directory = site.dir().display().to_string();
    let passwd = format!("tester:x:{}:0::{directory}:/bin/sh\n", nix::unistd::geteuid());
    let daemon = site.launch().with_etc(&[("passwd", &passwd)]).ready();
    let try_it = |conninfo: &str| {
        let mut mail = Mail::new("x");
        let text = format!("X-Conninfo: port={} {conninfo}\n", cluster.port());
        mail.message.splice(0..0, text.replace("$DIR", &directory).into_bytes());
        submit(daemon.path("in"), &mail).to_string()
    };
    let by_name = "host=localhost hostaddr=127.0.0.1";
    let cases = [
        (format!("{by_name} sslmode=disable"), "Kf"),
        (format!("{by_name} sslmode=prefer"), "Kt"),
        (by_name.to_owned(), "Kt"),
        (format!("{by_name} sslmode=require"), "Kt"),
        (format!("{by_name} sslmode=require sslrootcert=$DIR/root.crt"), "Kt"),
        (format!("{by_name} sslmode=verify-ca sslrootcert=$DIR/root.crt"), "Kt"),
        (format!("{by_name} sslmode=verify-full sslrootcert=$DIR/root.crt"), "Kt"),
        ("host=127.0.0.1 sslmode=verify-ca sslrootcert=$DIR/root.crt".into(), "Kt"),
        // The certificate is not signed by that root, or is not valid for that name.
        ("host=127.0.0.1 sslmode=verify-full sslrootcert=$DIR/root.crt".into(), "Kcannot"),
        (format!("{by_name} sslmode=verify-ca sslrootcert=$DIR/other.crt"), "Kcannot"),
        (format!("{by_name} sslmode=require sslrootcert=$DIR/other.crt"), "Kcannot"),
        // As with libpq, local sockets have no TLS, whatever `sslmode` is.
        (format!("host={} sslmode=require", cluster.dir().display()), "Kf"),
        // A missing file is a mistake in the configuration.
        (format!("{by_name} sslmode=verify-full sslrootcert=$DIR/none.crt"), "Zscript failed"),
    ];
    for (conninfo, expected) in &cases {
        let told = try_it(conninfo);
        assert!(told.starts_with(expected), "{conninfo}: {told}\n{}", daemon.text());
        assert!(!expected.contains("cannot") || told.contains("certificate "), "{told}");
        assert!(!told.contains("UnknownIssuer"), "a name of the library: {told}");
    }
    // This server has no TLS.
    let plain = Cluster::shared();
    let plain_port = |mode: &str| format!("port={} {by_name} sslmode={mode}", plain.port());
    assert_eq!(try_it(&plain_port("prefer")), "Kf");
    assert!(try_it(&plain_port("require")).starts_with("Kcannot connect"));
}
