//! How the supervisor's descriptors are shared out. Pure.
//!
//! Every connection takes a descriptor of the supervisor until its end. If clients could take all
//! of them, no worker could be replaced and no configuration be loaded. So a part is kept for the
//! supervisor itself and for its listeners, and the rest is divided between connections that
//! workers have, connections that no worker has yet, and channels to the shared dictionaries.

use qrelay_shared::settings::Declaration;
use qrelay_shared::sys::limits::of_others;

/// Descriptors for standard streams, signals, logs, the first listener, the control socket,
/// zygotes, and files that are open for a moment.
const OWN: u64 = 28 + PER_LISTENER;

/// Most clients of the control socket: more than there are administrators, their scripts, and a
/// dashboard.
const MAX_COMMANDS: u64 = 16;

/// Descriptors of a worker for everything but its jobs.
const OF_WORKER: u64 = 28;

/// Descriptors for each further listener: the socket, its file, and the file's directory. A local
/// socket that has a file takes the most.
const PER_LISTENER: u64 = 3;

/// Descriptors for a worker: its two channels and its flight recorder, as many for its successor
/// while both live, and some for what the successor gets until that is on its way.
const PER_WORKER: u64 = 8;

/// Descriptors of the part for dictionaries that a worker's opener and its successor's take.
const OPENERS: u64 = 3;

/// Channels to the shared dictionaries that a worker may have beside one for each mail: for
/// functions that `every` and `db:listen` run, and for questions whose time was over.
const SPARE_CHANNELS: u64 = 16;

/// Most channels to the shared dictionaries of a worker. A question is answered within
/// microseconds, so more channels gain nothing; without one, a question waits for one.
const MAX_CHANNELS: u64 = 128;

/// Descriptors of a worker for a job: the client, the next hop, and a program's input and output.
const PER_JOB: u64 = 4;

/// Most connections that no worker has, whatever the descriptors: enough for a burst that workers
/// deal with in a second, and little memory.
const MAX_HELD: u64 = 4096;

/// How many connections there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allotment {
    /// Most connections that no worker has.
    pub(crate) held: usize,
    /// Most jobs of a worker.
    pub(crate) credit: usize,
    /// Most channels of a worker to the shared dictionaries.
    pub(crate) channels: usize,
}

/// Returns how many clients the control socket may have, with `limit` descriptors in all. With few,
/// mails come first.
pub(crate) fn commands(limit: u64) -> u64 {
    (limit / 64).clamp(1, MAX_COMMANDS)
}

/// Divides `limit` descriptors (RLIMIT_NOFILE; workers may have [`of_others`]): half of what isn't
/// kept goes to jobs, a quarter to connections without a worker, and a quarter to channels.
pub(crate) fn allot(limit: u64, declaration: &Declaration) -> Allotment {
    let settings = &declaration.settings;
    let workers = u64::from(settings.workers.max(1));
    let listeners = PER_LISTENER * declaration.listeners.len().saturating_sub(1) as u64;
    let free = limit.saturating_sub(OWN + commands(limit) + listeners + PER_WORKER * workers);
    let credit = u64::from(settings.worker_connections)
        .min(free / 2 / workers)
        .min(of_others(limit).saturating_sub(OF_WORKER) / PER_JOB);
    let channels = (credit + SPARE_CHANNELS)
        .min(MAX_CHANNELS)
        .min((free / 4 / workers).saturating_sub(OPENERS));
    Allotment {
        held: (free / 4).clamp(1, MAX_HELD) as usize,
        credit: credit.max(1) as usize,
        channels: channels.max(1) as usize,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrelay_shared::settings::{ListenAddress, ListenerDecl, Settings};

    fn declaration(listeners: usize, workers: u32, worker_connections: u32) -> Declaration {
        let listener = ListenerDecl {
            address: ListenAddress::Abstract(b"x".to_vec()),
            mode: 0o600,
            owner: None,
            group: None,
            backlog: 128,
            max_size: 1 << 20,
            allow: None,
        };
        Declaration {
            listeners: vec![listener; listeners],
            settings: Settings { workers, worker_connections, ..Settings::default() },
            ..Declaration::default()
        }
    }

    #[test]
    fn descriptors_are_divided() {
        let table = [
            // As the unit has it, everything that is asked for fits.
            (65_536, declaration(1, 2, 256), 4096, 256, 128),
            (65_536, declaration(1, 64, 256), 4096, 256, 128),
            (u64::MAX, declaration(1, 2, 256), 4096, 256, 128),
            (1024, declaration(1, 2, 256), 240, 240, 117),
            (132, declaration(1, 2, 256), 20, 20, 7),
            (132, declaration(1, 2, 4), 20, 4, 7),
            // A worker needs more for a job than the supervisor.
            (1024, declaration(1, 1, 4096), 242, 249, 128),
            // And may have less.
            (16_384, declaration(1, 1, 4096), 4082, 3065, 128),
            (48, declaration(1, 1, 256), 2, 4, 1),
            (0, declaration(1, 1, 256), 1, 1, 1),
            // Listeners take theirs from what clients get.
            (1024, declaration(101, 2, 256), 165, 165, 79),
            (1024, declaration(1000, 2, 256), 1, 1, 1),
            (65_536, declaration(1000, 2, 256), 4096, 256, 128),
        ];
        for (limit, declaration, held, credit, channels) in table {
            let settings = &declaration.settings;
            let shown = (limit, declaration.listeners.len(), settings.workers);
            let expected = Allotment { held, credit, channels };
            assert_eq!(allot(limit, &declaration), expected, "{shown:?}");
        }
    }
}
