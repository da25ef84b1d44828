//! The state that all sessions of a worker share.

use std::sync::Arc;

use qrelay_shared::client::Share;
use qrelay_shared::settings::{Declaration, Settings};
use slog::Logger;

use crate::delivery::children::Children;
use crate::flight::Recorder;
use crate::job_channel::Reports;
use crate::mail::memory::Budget;
use crate::session::progress::Progress;
use crate::session::readings::Readings;
use crate::session::request::Buffers;
use crate::session::script::Script;

/// A listener, as far as sessions need to know it.
pub(crate) struct Listener {
    /// Address, as written in the configuration.
    pub(crate) name: Arc<str>,
    /// Largest message, in bytes.
    pub(crate) max_size: usize,
}

/// The worker as its sessions see it.
pub struct Context {
    /// Indexed by `Job::listener`.
    pub(crate) listeners: Vec<Listener>,
    /// The domain of addresses without a domain.
    pub(crate) default_domain: Option<Arc<str>>,
    /// Settings of the worker's generation.
    pub(crate) settings: Settings,
    /// First part of every mail's id.
    pub(crate) instance: String,
    /// Decides about mails.
    pub(crate) script: Arc<dyn Script>,
    /// Memory for messages.
    pub(crate) budget: Budget,
    /// The requests that threads wait for.
    pub(crate) readings: Readings,
    /// Small buffers that requests are read into first.
    pub(crate) buffers: Buffers,
    /// What each mail is doing.
    pub(crate) recorder: Arc<Recorder>,
    /// How far the leader is.
    pub(crate) leader: Progress,
    /// The supervisor's end of every job.
    pub(crate) reports: Arc<Reports>,
    /// Programs that run for mails.
    pub(crate) children: Arc<Children>,
    /// Names this process in every line.
    pub(crate) logger: Logger,
}

impl Context {
    /// Builds what the sessions of a worker with this declaration share.
    pub fn new(
        declaration: &Declaration,
        instance: String,
        script: Arc<dyn Script>,
        reports: Reports,
        recorder: Arc<Recorder>,
        logger: Logger,
    ) -> Self {
        let listeners = declaration.listeners.iter().map(|listener| Listener {
            name: listener.address.to_string().into(),
            max_size: listener.max_size,
        });
        let settings = declaration.settings.clone();
        let reports = Arc::new(reports);
        Self {
            listeners: listeners.collect(),
            budget: Budget::new(settings.mail_memory, Share::new(settings.client_share)),
            readings: Readings::new(settings.worker_connections as usize),
            buffers: Buffers::default(),
            recorder,
            leader: Progress::default(),
            default_domain: settings.default_domain.as_deref().map(Arc::from),
            settings,
            instance,
            script,
            children: Children::new(Arc::clone(&reports)),
            reports,
            logger,
        }
    }

    /// Takes back the buffer of a finished mail for another request.
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        if let Some(large) = self.buffers.give(buffer) {
            self.budget.keep(large);
        }
    }
}
