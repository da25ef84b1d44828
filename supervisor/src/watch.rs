//! Which descriptors the loop watches, and under which name each becomes ready.
//!
//! [`Poller`] waits; every owner has a [`Watcher`], by which it adds and removes its descriptors.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::ids::{AdminId, ChannelId, JobId, ListenerId, WorkerId, ZygoteId};

/// A watched descriptor by its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The pipe that signal handlers write to.
    Signals,
    /// Connections to accept.
    Listener(ListenerId),
    /// A client that had sent nothing yet, or one whose input is read to its end.
    Connection(JobId),
    /// Reports of a worker.
    Jobs(WorkerId),
    /// Pongs of a worker.
    Control(WorkerId),
    /// Reports of a zygote.
    Zygote(ZygoteId),
    /// Questions to the shared dictionaries.
    Dictionary(ChannelId),
    /// Clients of the control socket to accept.
    AdminListener,
    /// A client of the control socket.
    Admin(AdminId),
}

const SHIFT: u32 = 56;

impl Source {
    fn pack(self) -> u64 {
        let (kind, id) = match self {
            Self::Signals => (0, 0),
            Self::Listener(id) => (1, id.0),
            Self::Connection(id) => (2, id.0),
            Self::Jobs(id) => (3, id.0),
            Self::Control(id) => (4, id.0),
            Self::Zygote(id) => (5, id.0),
            Self::Dictionary(id) => (6, id.0),
            Self::AdminListener => (7, 0),
            Self::Admin(id) => (8, id.0),
        };
        kind << SHIFT | id
    }

    fn unpack(data: u64) -> Self {
        let id = data & ((1 << SHIFT) - 1);
        match data >> SHIFT {
            1 => Self::Listener(ListenerId(id)),
            2 => Self::Connection(JobId(id)),
            3 => Self::Jobs(WorkerId(id)),
            4 => Self::Control(WorkerId(id)),
            5 => Self::Zygote(ZygoteId(id)),
            6 => Self::Dictionary(ChannelId(id)),
            7 => Self::AdminListener,
            8 => Self::Admin(AdminId(id)),
            _ => Self::Signals,
        }
    }
}

/// Adds descriptors to the watched set and removes them. Level-triggered.
#[derive(Debug, Clone)]
pub(crate) struct Watcher {
    epoll: Rc<Epoll>,
    /// Has every [`Self::add`] fail.
    #[cfg(test)]
    pub(crate) full: Rc<std::cell::Cell<bool>>,
}

impl Watcher {
    /// Starts to watch for bytes to read, or connections to accept.
    ///
    /// # Errors
    /// Out of memory or over fs.epoll.max_user_watches.
    pub(crate) fn add(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        self.add_for(fd, EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, source)
    }

    /// Starts to watch for room to write.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub(crate) fn add_output(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        self.add_for(fd, EpollFlags::EPOLLOUT, source)
    }

    /// Starts to watch for the end of a connection in both directions.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub(crate) fn add_end(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        // EPOLLHUP is always watched for.
        self.add_for(fd, EpollFlags::empty(), source)
    }

    fn add_for(&self, fd: impl AsFd, flags: EpollFlags, source: Source) -> Result<(), Errno> {
        #[cfg(test)]
        if self.full.get() {
            return Err(Errno::ENOSPC);
        }
        self.epoll.add(fd, EpollEvent::new(flags, source.pack()))
    }

    /// Stops to watch. A descriptor whose socket other processes share must be removed before it
    /// is closed, because its registration would live on.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        // ENOENT, when it wasn't watched, is what the caller wants.
        let _ = self.epoll.delete(fd);
    }
}

/// Waits for watched descriptors.
#[derive(Debug)]
pub(crate) struct Poller {
    watcher: Watcher,
    events: Vec<EpollEvent>,
}

impl Poller {
    /// Makes an empty set.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub(crate) fn new() -> Result<Self, Errno> {
        let epoll = Rc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let watcher = Watcher {
            epoll,
            #[cfg(test)]
            full: Rc::default(),
        };
        Ok(Self { watcher, events: vec![EpollEvent::empty(); 256] })
    }

    /// Returns a handle to change the set by.
    pub(crate) fn watcher(&self) -> Watcher {
        self.watcher.clone()
    }

    /// Waits until something is ready or the time is over, and puts what is ready into `sources`.
    ///
    /// # Errors
    /// None is known; EINTR counts as nothing ready.
    pub(crate) fn wait(
        &mut self,
        timeout: Duration,
        sources: &mut Vec<Source>,
    ) -> Result<(), Errno> {
        sources.clear();
        // Rounded up, so that a timer is due when the wait for it ends.
        let milliseconds = timeout.as_micros().div_ceil(1000).min(60_000) as u16;
        let timeout = EpollTimeout::from(milliseconds);
        let count = match self.watcher.epoll.wait(&mut self.events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error),
        };
        sources.extend(self.events.iter().take(count).map(|event| Source::unpack(event.data())));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_packing() {
        for source in [
            Source::Signals,
            Source::Listener(ListenerId(3)),
            Source::Connection(JobId(1 << 40)),
            Source::Jobs(WorkerId(7)),
            Source::Control(WorkerId(7)),
            Source::Zygote(ZygoteId(1)),
            Source::Dictionary(ChannelId(2)),
            Source::AdminListener,
            Source::Admin(AdminId(9)),
        ] {
            assert_eq!(Source::unpack(source.pack()), source);
        }
    }
}
