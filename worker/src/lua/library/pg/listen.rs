//! `db:listen`: notifications, in each worker.
//!
//! Contract: the channels of one connection have a thread that follows it, and each of them has a
//! thread that runs its callback, so that callbacks of one channel never overlap and those of
//! different channels don't wait for each other. A callback runs once after every LISTEN, without a
//! payload, since notifications before it were missed; and once more when more than [`QUEUE_MAX`]
//! notifications wait for it.
//!
//! # Failure
//! A connection that breaks is logged and made again, after a pause that doubles from [`PAUSE_MIN`]
//! to [`PAUSE_MAX`]; so is one that can't be made. Behind a pooler in transaction mode no
//! notification would ever come: the log says so, and nobody listens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use mlua::{Function, Value};
use postgres::fallible_iterator::FallibleIterator as _;
use qrelay_shared::sys::thread::{LUA_STACK, spawn};
use slog::{error, info, warn};

use crate::lua::engine::background::Background;
use crate::lua::library::pg::connection;
use crate::lua::library::pg::pooler::Pooling;
use crate::lua::library::pg::statement::quote_identifier;
use crate::lua::library::pg::target::{Target, describe};

/// Pauses before a connection is made again: at most half of the two seconds within which a server
/// that came back should be noticed.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Notifications that wait for a callback; when it is full, the callback runs once without a
/// payload instead.
const QUEUE_MAX: usize = 1000;

/// A channel and its callback.
pub(super) struct Channel {
    /// The channel's name.
    pub name: String,
    /// The script's function.
    pub callback: Function,
}

/// Starts to listen over one connection.
pub(super) fn start(target: Arc<Target>, channels: Vec<Channel>, background: &Arc<Background>) {
    let logger = background.logger();
    let mut callbacks = Vec::with_capacity(channels.len());
    for channel in channels {
        match CallbackThread::start(channel, Arc::clone(background)) {
            Ok(callback) => callbacks.push(callback),
            Err(error) => slog::error!(logger, "no thread for a callback"; "error" => %error),
        }
    }
    let subscription = Subscription { target, callbacks, background: Arc::clone(background) };
    if let Err(error) = spawn("pg-listen", connection::STACK_SIZE, move || subscription.run()) {
        slog::error!(logger, "no thread for notifications"; "error" => %error);
    }
}

/// The sender's end of a callback's thread.
struct CallbackThread {
    name: String,
    calls: Sender<Option<String>>,
    missed: Arc<AtomicBool>,
}

impl CallbackThread {
    fn start(channel: Channel, background: Arc<Background>) -> std::io::Result<Self> {
        let (calls, waiting) = bounded(QUEUE_MAX);
        let missed = Arc::new(AtomicBool::new(false));
        let callback = Self { name: channel.name.clone(), calls, missed: Arc::clone(&missed) };
        let run = move || run_callbacks(&channel, &background, &waiting, &missed);
        spawn("pg-callback", LUA_STACK, run)?;
        Ok(callback)
    }

    /// Passes a notification on, without waiting.
    fn deliver(&self, payload: Option<String>) {
        if self.calls.try_send(payload).is_err() {
            self.missed.store(true, Ordering::Release);
        }
    }
}

fn run_callbacks(
    channel: &Channel,
    background: &Background,
    waiting: &Receiver<Option<String>>,
    missed: &AtomicBool,
) {
    let what = format!("listen '{}'", channel.name);
    let call = |payload: Option<String>| {
        background.call(&what, &channel.callback, |lua| match payload {
            Some(payload) => lua.create_string(payload).map(Value::String),
            None => Ok(Value::Nil),
        });
    };
    while let Ok(payload) = waiting.recv() {
        call(payload);
        if waiting.is_empty() && missed.swap(false, Ordering::Acquire) {
            warn!(background.logger(), "notifications were missed"; "channel" => &channel.name);
            call(None);
        }
    }
}

/// A thread that receives the notifications of a connection.
struct Subscription {
    target: Arc<Target>,
    callbacks: Vec<CallbackThread>,
    background: Arc<Background>,
}

impl Subscription {
    fn run(&self) {
        let logger = self.background.logger();
        let (mut pause, mut broken) = (PAUSE_MIN, false);
        loop {
            let reason = match self.target.connect() {
                Ok(connection) if connection.pooling == Pooling::Transaction => {
                    let names = self.callbacks.iter().map(|callback| callback.name.as_str());
                    error!(logger, "pg: LISTEN can't work behind a pooler in transaction mode: \
                        name the server itself, or a pool in session mode";
                        "server" => self.target.name(),
                        "channels" => names.collect::<Vec<_>>().join(", "));
                    return;
                }
                Ok(connection) => self.follow(connection.client, &mut broken, &mut pause),
                Err(failure) => failure.message,
            };
            if !std::mem::replace(&mut broken, true) {
                warn!(logger, "no notifications for now"; "error" => reason);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Receives notifications until the connection breaks, and returns the reason.
    fn follow(
        &self,
        mut client: postgres::Client,
        broken: &mut bool,
        pause: &mut Duration,
    ) -> String {
        let name =
            |callback: &CallbackThread| format!("LISTEN {};", quote_identifier(&callback.name));
        let listen: String = self.callbacks.iter().map(name).collect();
        if let Err(error) = client.batch_execute(&listen) {
            return describe(&error);
        }
        if std::mem::take(broken) {
            info!(self.background.logger(), "notifications are back");
        }
        *pause = PAUSE_MIN;
        self.callbacks.iter().for_each(|callback| callback.deliver(None));
        let mut notifications = client.notifications();
        let mut notifications = notifications.blocking_iter();
        loop {
            match notifications.next() {
                Ok(Some(notification)) => {
                    let of = |callback: &&CallbackThread| callback.name == notification.channel();
                    if let Some(callback) = self.callbacks.iter().find(of) {
                        callback.deliver(Some(notification.payload().to_owned()));
                    }
                }
                Ok(None) => return "the server closed the connection".into(),
                Err(error) => return describe(&error),
            }
        }
    }
}
