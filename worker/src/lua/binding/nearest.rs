//! The known word that somebody may have meant. Pure.
//!
//! # Failure
//! None.

/// The known word that differs from this one by the fewest edits, if they are few.
pub(crate) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let (best, distance) =
        known.iter().map(|known| (*known, distance(word, known))).min_by_key(|(_, d)| *d)?;
    (distance <= 1 + best.len().min(word.len()) / 4).then_some(best)
}

/// Levenshtein's distance in bytes, over one row.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_suggested_only_if_near() {
        let known = ["workers", "worker_connections", "drain_timeout"];
        assert_eq!(nearest("worker", &known), Some("workers"));
        assert_eq!(nearest("drain_timout", &known), Some("drain_timeout"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(nearest("x", &[]), None);
    }
}
