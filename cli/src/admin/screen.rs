//! How figures are shown to people: tables, times, sizes. Pure.

use std::fmt::Write as _;

use qrelay_shared::address::printable;

/// Longest text of a cell in characters; a longer one is cut in its middle.
const CELL_MAX: usize = 48;

/// A table with a line of titles. A title begins with `<` if its column is aligned to the left, and
/// with `>` if it is aligned to the right.
#[derive(Debug)]
pub(super) struct Table {
    titles: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Returns a table without rows.
    pub(super) fn new(titles: &[&'static str]) -> Self {
        Self { titles: titles.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, whose texts may contain anything.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|cell| cut(&printable(cell.as_bytes())));
        self.rows.push(cells.collect());
    }

    /// Returns the table, or nothing if it has no row.
    pub(super) fn text(&self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let titles: Vec<String> = self.titles.iter().map(|title| title[1..].to_owned()).collect();
        let all = || std::iter::once(&titles).chain(&self.rows);
        let width = |column: usize| {
            all().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
        };
        let mut text = String::new();
        for row in all() {
            let mut line = String::new();
            for (column, (cell, title)) in row.iter().zip(&self.titles).enumerate() {
                let width = width(column).unwrap_or(0);
                let gap = if column == 0 { "" } else { "  " };
                // Writing into memory can't fail.
                let _ = match title.starts_with('>') {
                    true => write!(line, "{gap}{cell:>width$}"),
                    false => write!(line, "{gap}{cell:<width$}"),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Cuts a text in its middle, because names differ at their ends.
fn cut(text: &str) -> String {
    let count = text.chars().count();
    if count <= CELL_MAX {
        return text.to_owned();
    }
    let (head, tail) = (CELL_MAX / 2, CELL_MAX - CELL_MAX / 2 - 1);
    let start: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(count - tail).collect();
    format!("{start}…{end}")
}

/// Shows a number of seconds.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match seconds {
        s if s < 0.1 => format!("{:.1} ms", s.max(0.0) * 1e3),
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{whole} s"),
        s if s < 7200.0 => format!("{} min", whole / 60),
        s if s < 172_800.0 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3600 % 24),
    }
}

/// Shows a time of the last minute, if there was one.
pub(super) fn optional(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), duration)
}

/// Shows a number of bytes.
pub(super) fn size(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1024.0 => format!("{bytes} B"),
        b if b < 1024.0 * 1024.0 => format!("{:.1} KiB", b / 1024.0),
        b if b < 1024.0 * 1024.0 * 1024.0 => format!("{:.1} MiB", b / 1024.0 / 1024.0),
        b => format!("{:.1} GiB", b / 1024.0 / 1024.0 / 1024.0),
    }
}

/// Shows a number with its thousands apart.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_readable() {
        for (seconds, shown) in [
            (0.0, "0.0 ms"),
            (0.0421, "42.1 ms"),
            (0.25, "0.2 s"),
            (59.9, "59 s"),
            (300.0, "5 min"),
            (7260.0, "2 h 1 min"),
            (200_000.0, "2 d 7 h"),
        ] {
            assert_eq!(duration(seconds), shown);
        }
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(3 << 30), "3.0 GiB");
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"].map(str::to_owned)
        );
    }

    #[test]
    fn tables_are_aligned() {
        let mut table = Table::new(&["<NAME", ">N"]);
        assert_eq!(table.text(), "");
        table.row(["a".into(), "100".into()]);
        table.row(["b\u{1b}[31m".into(), "7".into()]);
        assert_eq!(table.text(), "NAME      N\na       100\nb?[31m    7\n");
        let long = "x".repeat(100);
        assert_eq!(cut(&long).chars().count(), CELL_MAX);
    }
}
