//! Text that Prometheus reads: families of metrics and their samples, in either of its two forms.
//!
//! Pure. Contract: names are this program's own, and label values are anything, because they come
//! from scripts. Names of counters are given without `_total`, and samples get it here.

use std::fmt::{Display, Write as _};

use qrelay_shared::admin::Histogram;

use crate::web::request::Format;

/// The names and values of labels.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Kinds of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number that only grows, until the daemon starts anew.
    Counter,
    /// A number that goes up and down.
    Gauge,
    /// Numbers of durations, by length.
    Histogram,
}

/// A text that is being written.
#[derive(Debug)]
pub struct Exposition {
    format: Format,
    text: String,
}

/// A family of metrics, whose samples follow.
pub struct Family<'e> {
    exposition: &'e mut Exposition,
    name: &'static str,
    suffix: &'static str,
}

impl Exposition {
    /// Returns an empty text.
    pub fn new(format: Format) -> Self {
        Self { format, text: String::new() }
    }

    /// Begins a family. The name of a counter has no `_total`, and help is one sentence.
    pub fn family(&mut self, kind: Kind, name: &'static str, help: &str) -> Family<'_> {
        let (word, suffix) = match kind {
            Kind::Counter => ("counter", "_total"),
            Kind::Gauge => ("gauge", ""),
            Kind::Histogram => ("histogram", ""),
        };
        // OpenMetrics names the family, the older form names the samples.
        let shown = if self.format == Format::OpenMetrics { "" } else { suffix };
        self.add(format_args!("# HELP {name}{shown} {help}\n# TYPE {name}{shown} {word}\n"));
        Family { exposition: self, name, suffix }
    }

    /// Returns the complete text.
    pub fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }

    fn add(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String can't fail.
        let _ = self.text.write_fmt(text);
    }

    fn sample(&mut self, name: &str, suffix: &str, labels: Labels<'_>, value: impl Display) {
        self.add(format_args!("{name}{suffix}"));
        for (index, (label, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            self.add(format_args!("{before}{label}=\"{}\"", escaped(value)));
        }
        let after = if labels.is_empty() { "" } else { "}" };
        self.add(format_args!("{after} {value}\n"));
    }
}

impl Family<'_> {
    /// Adds a sample.
    pub fn sample(&mut self, labels: Labels<'_>, value: impl Display) -> &mut Self {
        self.exposition.sample(self.name, self.suffix, labels, value);
        self
    }

    /// Adds a sample if its value is known.
    pub fn known(&mut self, labels: Labels<'_>, value: Option<impl Display>) {
        if let Some(value) = value {
            self.sample(labels, value);
        }
    }

    /// Adds a histogram with these upper bounds of its buckets.
    pub fn histogram(&mut self, labels: Labels<'_>, bounds: &[f64], histogram: &Histogram) {
        let mut count = 0;
        for (index, bucket) in histogram.buckets.iter().enumerate() {
            count += bucket;
            let bound = bounds.get(index).map_or("+Inf".to_owned(), |bound| format!("{bound:?}"));
            let with_bound: Vec<_> =
                labels.iter().copied().chain([("le", bound.as_str())]).collect();
            self.exposition.sample(self.name, "_bucket", &with_bound, count);
        }
        self.exposition.sample(self.name, "_sum", labels, histogram.sum);
        self.exposition.sample(self.name, "_count", labels, count);
    }
}

/// Escapes the value of a label.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(write: impl Fn(&mut Exposition)) -> [String; 2] {
        [Format::Text, Format::OpenMetrics].map(|format| {
            let mut exposition = Exposition::new(format);
            write(&mut exposition);
            exposition.finish()
        })
    }

    #[test]
    fn counters_are_named_as_each_form_wants() {
        let [text, open] = both(|exposition| {
            exposition.family(Kind::Counter, "a", "Letters.").sample(&[], 1);
        });
        assert_eq!(text, "# HELP a_total Letters.\n# TYPE a_total counter\na_total 1\n");
        assert_eq!(open, "# HELP a Letters.\n# TYPE a counter\na_total 1\n# EOF\n");
    }

    #[test]
    fn label_values_may_be_anything() {
        let [text, _] = both(|exposition| {
            exposition
                .family(Kind::Gauge, "a", "Letters.")
                .sample(&[("b", "x\"} 7\na 1\\"), ("c", "ä")], 0.5);
        });
        assert_eq!(text.lines().nth(2), Some("a{b=\"x\\\"} 7\\na 1\\\\\",c=\"ä\"} 0.5"));
    }

    #[test]
    fn a_histogram_adds_its_buckets_up() {
        let histogram = Histogram { buckets: vec![1, 0, 2], sum: 3.5, p50: None, p99: None };
        let [text, _] = both(|exposition| {
            exposition.family(Kind::Histogram, "a_seconds", "Times.").histogram(
                &[("b", "c")],
                &[0.5, 1.0],
                &histogram,
            );
        });
        let samples = "a_seconds_bucket{b=\"c\",le=\"0.5\"} 1\n\
                       a_seconds_bucket{b=\"c\",le=\"1.0\"} 1\n\
                       a_seconds_bucket{b=\"c\",le=\"+Inf\"} 3\n\
                       a_seconds_sum{b=\"c\"} 3.5\n\
                       a_seconds_count{b=\"c\"} 3\n";
        assert!(text.ends_with(samples), "{text}");
    }
}
