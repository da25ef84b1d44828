//! The report that `cargo bench` prints.
//!
//! Contract: every function only prints. Every ratio is the median over the rounds, with the
//! smallest and the largest ratio in brackets.
//!
//! # Failure
//! Printing fails only by a panic, when stdout is closed.

use crate::{
    measure::{Extent, Series, Slot, median},
    process::Subject,
    scenario::Scenario,
    usage::Memory,
};

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
pub fn table(subjects: &[Subject], series: &Series) {
    println!(
        "{:<24} {:>8} {:>9} {:>8} {:>8} {:>9} {:>9}",
        "median of the slots", "mails/s", "CPU µs", "p50 ms", "p99 ms", "load µs", "sink µs"
    );
    for (subject, slots) in subjects.iter().zip(&series.slots) {
        let of = |number: fn(&Slot) -> f64| median(slots.iter().map(number));
        println!(
            "{:<24} {:>8.0} {:>9.1} {:>8.2} {:>8.2} {:>9.1} {:>9.1}",
            subject.name,
            of(Slot::rate),
            of(Slot::cpu_per_mail),
            of(|slot| slot.outcome.p50.as_secs_f64() * 1e3),
            of(|slot| slot.outcome.p99.as_secs_f64() * 1e3),
            of(|slot| slot.per_mail(slot.outcome.cpu)),
            of(|slot| slot.per_mail(slot.sink_cpu)),
        );
    }
    println!("(CPU, load and sink: user and system time per mail)\n");
}

/// Prints the ratios of two relays' slots. Returns their medians: of mails per second, and of CPU
/// time per mail.
pub fn comparison(what: &str, slots: &[Slot], baseline: &[Slot]) -> (f64, f64) {
    let ratios = |number: fn(&Slot) -> f64| -> Vec<f64> {
        slots.iter().zip(baseline).map(|(a, b)| number(a) / number(b)).collect()
    };
    let (rate, cpu) = (ratios(Slot::rate), ratios(Slot::cpu_per_mail));
    println!("{what:<32} mails/s {}   CPU {}", spread(&rate), spread(&cpu));
    (median(rate), median(cpu))
}

/// Prints the additional CPU time per mail of a relay. Returns the median in microseconds.
pub fn added_cpu(slots: &[Slot], baseline: &[Slot]) -> f64 {
    let more = slots.iter().zip(baseline).map(|(a, b)| a.cpu_per_mail() - b.cpu_per_mail());
    let added = median(more);
    println!("{:<32} CPU {added:+.1} µs per mail", "difference");
    added
}

fn spread(ratios: &[f64]) -> String {
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    format!("{:.3} [{least:.3} … {most:.3}]", median(ratios.iter().copied()))
}

/// Prints the load of the load generator and of the sink. Close to 100 %, they and not the relay
/// would limit the numbers.
pub fn headroom(series: &Series, extent: &Extent) {
    let busy = |cpu: fn(&Slot) -> f64| {
        let shares = series
            .slots
            .iter()
            .flatten()
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
