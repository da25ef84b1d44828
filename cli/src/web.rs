//! `qrelay web`: metrics for Prometheus, and a page that shows what the daemon does.
//!
//! Contract: a process of its own, which asks the daemon by its control socket and has no other
//! privilege. Nothing here changes the daemon. Addresses of mails are shown with `--mails` only.
//!
//! # Failure
//! If listening fails, the command ends with exit status 71. A daemon that can't be asked is shown
//! as such, and asked again.

use std::fmt;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use qrelay_shared::admin;
use qrelay_shared::exit::Exit;
use qrelay_shared::system_error::shown;

mod exposition;
mod history;
mod metrics;
mod page;
mod request;
mod response;
mod server;
mod source;

use history::{History, Point};
use request::Request;
use response::Response;
use server::Site;
use source::Source;

/// The usual port.
const PORT: u16 = 9628;
/// Time between two points of the charts.
const INTERVAL: Duration = Duration::from_secs(1);

/// Show in a browser what the daemon does, and serve metrics for Prometheus.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  qrelay web --listen 127.0.0.1:9628")]
pub struct Args {
    /// Where to listen: IP address with or without port.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9628", value_parser = address)]
    listen: SocketAddr,
    /// Also show the mails in flight, with their addresses, at /mails.json.
    #[arg(long)]
    mails: bool,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let host = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    text.parse()
        .or_else(|_| host.parse().map(|host: IpAddr| SocketAddr::new(host, PORT)))
        .map_err(|_| "expected an IP address with or without port".to_owned())
}

/// Serves until a signal ends the process. The daemon is asked at `control`.
pub fn run(args: &Args, control: PathBuf) -> Exit {
    let address = args.listen;
    let failed = |error: io::Error| {
        say(format_args!("can't listen on {address}: {}", shown(&error)));
        Exit::System
    };
    let listener = match TcpListener::bind(address) {
        Ok(listener) => listener,
        Err(error) => return failed(error),
    };
    let bound = match listener.local_addr() {
        Ok(bound) => bound,
        Err(error) => return failed(error),
    };
    say(format_args!("{}", announcement(bound, args.mails)));
    let site = Arc::new(Shown {
        source: Source::new(control),
        history: Mutex::default(),
        mails: args.mails,
    });
    let sampled = site.clone();
    thread::spawn(move || sampled.sample());
    server::serve(&listener, &site, |error| say(format_args!("a connection failed: {error}")))
}

/// Prints one line on stderr. A failure is ignored, because the page is also served if nobody reads
/// stderr.
fn say(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "qrelay web: {text}");
}

/// Says what is shown to whom.
fn announcement(address: SocketAddr, mails: bool) -> String {
    let whom = if address.ip().to_canonical().is_loopback() {
        "all users of this machine"
    } else {
        "everybody who reaches this address"
    };
    let what = if mails {
        "the daemon's state, and senders and recipients of mails in flight"
    } else {
        "the daemon's state, and no addresses of mails"
    };
    format!("http://{address}/ shows {whom} {what}")
}

/// What is shown.
struct Shown {
    source: Source,
    history: Mutex<History>,
    mails: bool,
}

impl Shown {
    /// Adds a point to the charts each second, whether somebody looks or not.
    fn sample(&self) -> ! {
        loop {
            let point = Point::new(admin::now(), self.source.snapshot().status());
            self.history.lock().unwrap_or_else(PoisonError::into_inner).add(point);
            thread::sleep(INTERVAL);
        }
    }

    fn page(&self) -> Response {
        match page::nonce() {
            Ok(nonce) => Response::page(page::page(&nonce), &nonce),
            Err(error) => Response::failure("500 Internal Server Error", &shown(&error)),
        }
    }
}

impl Site for Shown {
    fn answer(&self, request: &Request) -> Response {
        let json = |body: Result<Arc<str>, &str>| match body {
            Ok(body) => Response::new("application/json", body),
            Err(error) => Response::failure("503 Service Unavailable", error),
        };
        match request.path.as_str() {
            "/" => self.page(),
            "/metrics" => {
                let body = self.source.snapshot().metrics(request.format);
                Response::new(request.format.content_type(), body)
            }
            "/status.json" => json(self.source.snapshot().json()),
            "/history.json" => {
                let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
                json(Ok(history.json().into()))
            }
            "/mails.json" if self.mails => {
                json(self.source.mails().as_ref().as_ref().map(Arc::clone).map_err(String::as_str))
            }
            "/mails.json" => {
                Response::failure("404 Not Found", "mails are shown with --mails only")
            }
            _ => Response::failure("404 Not Found", "there is no such page"),
        }
    }
}
