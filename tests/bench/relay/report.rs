//! The report that `cargo bench` prints, and the same numbers as JSON.
//!
//! Contract: a function that prints a number also returns it. Every ratio is the median over the
//! rounds, with the smallest and the largest ratio in brackets.
//!
//! # Failure
//! Printing fails only by a panic, when stdout is closed.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    measure::{Extent, QRELAY, Series, Slot, median},
    process::Subject,
    scenario::{Quantity, Scenario, Target},
    usage::Memory,
};

/// A number of a slot, with the name that JSON has for it.
type Number = (&'static str, fn(&Slot) -> f64);

/// The numbers of each relay, in the order of the columns.
const NUMBERS: [Number; 7] = [
    ("mails_per_s", Slot::rate),
    ("cpu_us", Slot::cpu_per_mail),
    ("p50_ms", |slot| slot.outcome.p50.as_secs_f64() * 1e3),
    ("p99_ms", Slot::p99),
    ("peak_mib", Slot::peak_mib),
    ("load_us", |slot| slot.per_mail(slot.outcome.cpu)),
    ("sink_us", |slot| slot.per_mail(slot.sink_cpu)),
];

/// Prints the name and the size of the coming measurement.
pub fn opening(scenario: &Scenario, extent: &Extent) {
    println!("scenario {}: {}", scenario.name, scenario.about);
    println!(
        "{} rounds of {:.1} s per relay, {} clients, messages of {} bytes\n",
        extent.rounds,
        extent.slot.as_secs_f64(),
        extent.clients,
        extent.size
    );
}

/// Prints the processes of a qrelay with their memory; `when` tells at which moment.
pub fn processes(when: &str, subject: &Subject, processes: &[Memory]) {
    let start = subject.start.as_secs_f64() * 1e3;
    println!("{} {when} (first answer {start:.1} ms after exec):", subject.name);
    for Memory { pid, name, resident, private } in processes {
        println!(
            "  {name:<16} {pid:>8}  RSS {:>7.2} MiB  private {:>7.2} MiB",
            mib(*resident),
            mib(*private)
        );
    }
    println!();
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// Prints one line per relay, with the median of each number over its slots.
pub fn table(subjects: &[Subject], series: &Series) -> Value {
    println!(
        "{:<24} {:>8} {:>9} {:>8} {:>8} {:>8} {:>9} {:>9}",
        "median of the slots",
        "mails/s",
        "CPU µs",
        "p50 ms",
        "p99 ms",
        "peak MiB",
        "load µs",
        "sink µs"
    );
    let mut relays = BTreeMap::new();
    for (subject, slots) in subjects.iter().zip(&series.slots) {
        let columns = NUMBERS.map(|(_, number)| Spread::new(slots.iter().map(number)));
        let [rate, cpu, p50, p99, peak, load, sink] = columns.map(|spread| spread.median);
        print!("{:<24} {rate:>8.0} {cpu:>9.1} {p50:>8.2} {p99:>8.2}", subject.name);
        println!(" {peak:>8.1} {load:>9.1} {sink:>9.1}");
        let named = NUMBERS.iter().zip(columns);
        let named = named.map(|((name, _), spread)| (*name, spread.record()));
        relays.insert(subject.name, named.collect::<BTreeMap<_, _>>());
    }
    println!("(CPU, load and sink: user and system time per mail; peak: memory above idle)\n");
    json!(relays)
}

/// Median, smallest and largest of some numbers.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The median.
    pub median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    /// Sums up some numbers.
    pub fn new(numbers: impl IntoIterator<Item = f64>) -> Self {
        let numbers: Vec<f64> = numbers.into_iter().collect();
        let least = numbers.iter().copied().fold(f64::INFINITY, f64::min);
        let most = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Self { median: median(numbers), least, most }
    }

    /// Returns the three numbers for JSON.
    pub fn record(self) -> Value {
        json!({ "median": self.median, "min": self.least, "max": self.most })
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} [{:.3} … {:.3}]", self.median, self.least, self.most)
    }
}

/// Returns the rounds' ratios of a number of two relays.
fn ratio(slots: &[Slot], baseline: &[Slot], number: fn(&Slot) -> f64) -> Spread {
    Spread::new(slots.iter().zip(baseline).map(|(a, b)| number(a) / number(b)))
}

/// Prints the ratios of two relays' slots: of mails per second, and of CPU time per mail.
pub fn comparison(what: &str, slots: &[Slot], baseline: &[Slot]) -> Value {
    let rate = ratio(slots, baseline, Slot::rate);
    let cpu = ratio(slots, baseline, Slot::cpu_per_mail);
    println!("{what:<32} mails/s {rate}   CPU {cpu}");
    json!({ "what": what, "mails_per_s": rate.record(), "cpu_us": cpu.record() })
}

/// Prints whether a target is met. A target whose rival isn't there is left out.
pub fn verdict(
    target: &Target,
    scenario: &Scenario,
    extent: &Extent,
    subjects: &[Subject],
    series: &Series,
) -> Option<Value> {
    let slots = |name: &str| {
        let index = subjects.iter().position(|subject| subject.name == name)?;
        Some(series.slots[index].as_slice())
    };
    let ours = slots(QRELAY)?;
    let own = |number: &dyn Fn(&Slot) -> f64| Spread::new(ours.iter().map(number));
    let clients = extent.clients as f64;
    let spread = match target.quantity {
        Quantity::Rate => ratio(ours, slots(target.against)?, Slot::rate),
        Quantity::Cpu => ratio(ours, slots(target.against)?, Slot::cpu_per_mail),
        Quantity::P99 => ratio(ours, slots(target.against)?, Slot::p99),
        Quantity::AddedCpu => {
            let pairs = ours.iter().zip(slots(target.against)?);
            Spread::new(pairs.map(|(a, b)| a.cpu_per_mail() - b.cpu_per_mail()))
        }
        Quantity::Turns => own(&|slot| slot.p99() / 1e3 * slot.rate() / clients),
        Quantity::Delayed => own(&|slot| slot.rate() * scenario.delay as f64 / 1e3 / clients),
        Quantity::Memory => {
            let size = extent.size as f64 / f64::from(1 << 20);
            own(&|slot| slot.peak_mib() / (1.1 * size * clients + 8.0))
        }
    };
    Some(claim(&target.describe(), spread, target.is_met(spread.median)))
}

/// Prints a claim and whether it holds.
pub fn claim(what: &str, value: Spread, met: bool) -> Value {
    println!("target: {what}: {value}: {}", if met { "met" } else { "MISSED" });
    json!({ "claim": what, "value": value.record(), "met": met })
}

/// Prints the load of the load generator and of the sink. Close to 100 %, they and not the relay
/// would limit the numbers.
pub fn headroom(subjects: &[Subject], series: &Series, extent: &Extent) {
    let busy = |cpu: fn(&Slot) -> f64| {
        // A loop that starts programs gets no load.
        let relays = subjects.iter().zip(&series.slots).filter(|(subject, _)| !subject.is_loop());
        let shares = relays
            .flat_map(|(_, slots)| slots)
            .map(|slot| cpu(slot) / slot.outcome.elapsed.as_secs_f64() / extent.threads as f64);
        shares.fold(0.0, f64::max) * 100.0
    };
    println!(
        "busiest slot: load generator {:.0} %, sink {:.0} % of {} thread(s) each",
        busy(|slot| slot.outcome.cpu.as_secs_f64()),
        busy(|slot| slot.sink_cpu.as_secs_f64()),
        extent.threads
    );
}
