//! The metrics: which field of the daemon's status is which metric.
//!
//! Pure. Contract: `docs/metrics.md` lists every metric. Labels are names from the configuration,
//! of which there are few: listeners, next hops, databases, dictionaries. Workers are added up,
//! because each worker has another number, and Prometheus would keep all numbers that ever were.

use qrelay_shared::admin::{
    Answers, Database, Deliveries, Dictionary, NextHop, State, Status, Worker,
};

use crate::web::exposition::Kind::{Counter, Gauge};
use crate::web::exposition::{Exposition, Kind};
use crate::web::request::Format;

/// The states that a worker can be in.
const WORKER_STATES: [&str; 4] = ["starting", "ready", "finishing", "dying"];

/// Returns the metrics of a daemon, or of one that can't be asked.
pub fn render(status: Option<&Status>, format: Format) -> String {
    let mut out = Exposition::new(format);
    out.family(Gauge, "qrelay_up", "Whether the daemon could be asked for its state.")
        .sample(&[], u8::from(status.is_some()));
    if let Some(status) = status {
        daemon(&mut out, status);
        mails(&mut out, status);
        times(&mut out, status);
        listeners(&mut out, status);
        workers(&mut out, status);
        next_hops(&mut out, status);
        databases(&mut out, status);
        dictionaries(&mut out, status);
        logs(&mut out, status);
        supervisor(&mut out, status);
    }
    out.finish()
}

fn daemon(out: &mut Exposition, status: &Status) {
    out.family(Gauge, "qrelay_build_info", "The version of the program, with the value 1.")
        .sample(&[("version", &status.program)], 1);
    out.family(Gauge, "qrelay_start_time_seconds", "When the daemon started.")
        .sample(&[], status.started);
    let mut family = out.family(Gauge, "qrelay_state", "1 for the state that the daemon is in.");
    for (name, state) in
        [("starting", State::Starting), ("serving", State::Serving), ("stopping", State::Stopping)]
    {
        family.sample(&[("state", name)], u8::from(status.state == state));
    }
    let mut family =
        out.family(Gauge, "qrelay_sandbox_info", "The level of the workers' sandbox, with 1.");
    if let Some(level) = &status.sandbox {
        family.sample(&[("level", level)], 1);
    }
    out.family(Gauge, "qrelay_generation", "The number of the configuration that gets new mails.")
        .sample(&[], status.generation.unwrap_or(0));
    out.family(Gauge, "qrelay_generations", "Configurations that serve, finish or are loaded.")
        .sample(&[], status.generations);
    let load = status.last_load.as_ref();
    let mut family =
        out.family(Gauge, "qrelay_last_load_time_seconds", "When the latest load ended.");
    family.known(&[], load.map(|load| load.at));
    let mut family =
        out.family(Gauge, "qrelay_last_load_success", "Whether the latest load succeeded.");
    family.known(&[], load.map(|load| u8::from(load.failure.is_none())));
}

fn mails(out: &mut Exposition, status: &Status) {
    let mut family = out.family(Counter, "qrelay_mails", "Mails that have come to an end.");
    for one in &status.mails {
        family.sample(
            &[("listener", &one.listener), ("action", &one.action), ("reply", &one.reply)],
            one.count,
        );
    }
    out.family(Gauge, "qrelay_mails_in_flight", "Mails that workers have.")
        .sample(&[], status.in_flight);
    out.family(Counter, "qrelay_mails_lost", "Mails whose worker died.")
        .sample(&[], status.ends.lost_mails);
    out.family(Gauge, "qrelay_connections_held", "Connections that no worker has.")
        .sample(&[], status.held);
    out.family(
        Gauge,
        "qrelay_connections_waiting",
        "Connections that have begun to speak, and that no worker has.",
    )
    .sample(&[], status.waiting);
}

fn times(out: &mut Exposition, status: &Status) {
    let times = &status.times;
    out.family(Kind::Histogram, "qrelay_mail_seconds", "Time of a mail, from accept to answer.")
        .histogram(&[], &times.bounds, &times.all);
    let mut family =
        out.family(Kind::Histogram, "qrelay_mail_phase_seconds", "Time of a mail in each phase.");
    for (phase, histogram) in
        [("queue", &times.queue), ("read", &times.read), ("lua", &times.lua), ("hop", &times.hop)]
    {
        family.histogram(&[("phase", phase)], &times.bounds, histogram);
    }
}

fn listeners(out: &mut Exposition, status: &Status) {
    let all = &status.listeners;
    let mut family =
        out.family(Gauge, "qrelay_listener_connections", "Connections that the daemon has.");
    for one in all {
        family.sample(&[("listener", &one.address)], one.connections);
    }
    let mut family = out.family(Gauge, "qrelay_listener_held", "Connections that no worker has.");
    for one in all {
        family.sample(&[("listener", &one.address)], one.held);
    }
    let mut family = out.family(
        Gauge,
        "qrelay_listener_backlog",
        "Connections that the kernel holds because they are not accepted yet.",
    );
    for one in all {
        family.known(&[("listener", &one.address)], one.backlog);
    }
    let mut family = out.family(
        Gauge,
        "qrelay_listener_backlog_limit",
        "Most connections that the kernel holds.",
    );
    for one in all {
        family.known(&[("listener", &one.address)], one.backlog_limit);
    }
}

fn workers(out: &mut Exposition, status: &Status) {
    let all = &status.workers;
    let sum = |value: fn(&Worker) -> u64| all.iter().map(value).sum::<u64>();
    let mut family = out.family(Gauge, "qrelay_workers", "Workers in each state.");
    for state in WORKER_STATES {
        let count = all.iter().filter(|worker| worker.state == state).count();
        family.sample(&[("state", state)], count);
    }
    out.family(
        Gauge,
        "qrelay_workers_credit",
        "Most mails that the workers in the state ready get at a time.",
    )
    .sample(&[], sum(|worker| if worker.state == "ready" { worker.credit } else { 0 }));
    out.family(Gauge, "qrelay_workers_lua_bytes", "Memory of all workers' Lua states.")
        .sample(&[], sum(|worker| worker.lua_bytes));
    out.family(
        Gauge,
        "qrelay_workers_lua_largest_bytes",
        "Memory of the Lua state that has most of all workers'.",
    )
    .sample(&[], all.iter().map(|worker| worker.lua_bytes).max().unwrap_or(0));
    out.family(Gauge, "qrelay_workers_resident_bytes", "Resident memory of all workers.")
        .sample(&[], sum(|worker| worker.rss_bytes.unwrap_or(0)));
    out.family(
        Gauge,
        "qrelay_workers_resident_largest_bytes",
        "Resident memory of the worker that has most.",
    )
    .sample(&[], all.iter().filter_map(|worker| worker.rss_bytes).max().unwrap_or(0));
    out.family(Gauge, "qrelay_workers_threads", "Threads of all workers.")
        .sample(&[], sum(|worker| worker.threads.unwrap_or(0)));
    let ends = status.ends;
    out.family(
        Counter,
        "qrelay_worker_crashes",
        "Workers that died unexpectedly, hung ones included.",
    )
    .sample(&[], ends.crashes);
    out.family(Counter, "qrelay_worker_hangs", "Workers that were killed because they hung.")
        .sample(&[], ends.hangs);
    out.family(
        Counter,
        "qrelay_worker_finishes",
        "Workers that ended after they had finished their mails.",
    )
    .sample(&[], ends.finished);
}

fn next_hops(out: &mut Exposition, status: &Status) {
    let all = &status.next_hops;
    let mut family =
        out.family(Gauge, "qrelay_next_hop_in_flight", "Mails that wait for the next hop.");
    for one in all {
        family.sample(&[("next_hop", &one.next_hop)], one.in_flight);
    }
    let mut family = out.family(
        Counter,
        "qrelay_next_hop_mails",
        "Mails that the next hop got, by the reply to the client.",
    );
    for NextHop { next_hop, answers, .. } in all {
        let Answers { accepted, temporary, permanent, unanswered } = *answers;
        for (reply, count) in
            [("K", accepted), ("Z", temporary), ("D", permanent), ("-", unanswered)]
        {
            family.sample(&[("next_hop", next_hop), ("reply", reply)], count);
        }
    }
    let mut family = out.family(
        Counter,
        "qrelay_next_hop_connect_failures",
        "Mails that could not even begin to go to the next hop.",
    );
    for one in all {
        family.sample(&[("next_hop", &one.next_hop)], one.connect_failures);
    }
    let mut family = out.family(
        Kind::Histogram,
        "qrelay_next_hop_seconds",
        "Time that the next hop took for a mail.",
    );
    for one in all {
        family.histogram(&[("next_hop", &one.next_hop)], &status.times.bounds, &one.times);
    }
}

fn databases(out: &mut Exposition, status: &Status) {
    let mut gauge = |name, help, value: fn(&Database) -> u64| {
        let mut family = out.family(Gauge, name, help);
        for one in &status.databases {
            family.sample(&[("database", &one.database)], value(one));
        }
    };
    gauge(
        "qrelay_database_connections",
        "Connections to the database that exist or are being made.",
        |one| one.connections,
    );
    gauge(
        "qrelay_database_connections_limit",
        "Most connections to the database of all workers together.",
        |one| one.limit,
    );
    gauge("qrelay_database_busy", "Requests to the database in work.", |one| one.busy);
    gauge(
        "qrelay_database_waiting",
        "Requests to the database that wait for a connection.",
        |one| one.waiting,
    );
    let mut family = out.family(
        Counter,
        "qrelay_database_errors",
        "Requests that failed because no connection was to be had in time.",
    );
    for one in &status.databases {
        family.sample(&[("database", &one.database)], one.errors);
    }
}

fn dictionaries(out: &mut Exposition, status: &Status) {
    let mut family = |kind, name, help, value: fn(&Dictionary) -> u64| {
        let mut family = out.family(kind, name, help);
        for one in &status.dictionaries {
            family.sample(&[("dictionary", &one.dictionary)], value(one));
        }
    };
    family(Gauge, "qrelay_dictionary_keys", "Keys in the dictionary.", |one| one.keys);
    family(Gauge, "qrelay_dictionary_bytes", "Memory of keys and values.", |one| one.bytes);
    family(
        Gauge,
        "qrelay_dictionary_limit_bytes",
        "Most memory that the dictionary may have.",
        |one| one.limit_bytes,
    );
    family(Counter, "qrelay_dictionary_hits", "Reads that found their key.", |one| one.hits);
    family(Counter, "qrelay_dictionary_misses", "Reads that found no key.", |one| one.misses);
    family(
        Counter,
        "qrelay_dictionary_evictions",
        "Keys that were removed to make room for others.",
        |one| one.evictions,
    );
}

fn logs(out: &mut Exposition, status: &Status) {
    let Deliveries { sent, lost } = status.log;
    out.family(Counter, "qrelay_log_records", "Log records that were written.").sample(&[], sent);
    out.family(Counter, "qrelay_log_records_lost", "Log records that nobody took.")
        .sample(&[], lost);
    let mut family =
        out.family(Counter, "qrelay_pond_datagrams", "Datagrams sent to the Pond log server.");
    family.known(&[], status.pond.map(|pond| pond.sent));
    let mut family = out.family(
        Counter,
        "qrelay_pond_datagrams_lost",
        "Datagrams to the Pond log server that could not be sent.",
    );
    family.known(&[], status.pond.map(|pond| pond.lost));
}

fn supervisor(out: &mut Exposition, status: &Status) {
    let supervisor = status.supervisor;
    let mut family =
        out.family(Gauge, "qrelay_supervisor_resident_bytes", "The supervisor's resident memory.");
    family.known(&[], supervisor.rss_bytes);
    let mut family =
        out.family(Counter, "qrelay_supervisor_cpu_seconds", "The supervisor's processor time.");
    family.known(&[], supervisor.cpu);
    out.family(
        Gauge,
        "qrelay_supervisor_descriptors_limit",
        "Most descriptors that the supervisor may have.",
    )
    .sample(&[], supervisor.descriptor_limit);
}
