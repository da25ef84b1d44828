//! Large buffers of finished mails, for the next ones. Pure.
//!
//! The memory of a new buffer costs more than everything else that happens to a large mail: the
//! kernel clears each page and maps it at the page's first use, and takes it back at the end. A
//! buffer that is used again has its memory already.
//!
//! Contract: a buffer that is returned is empty, so that nothing of one mail gets into another.

use std::time::{Duration, Instant};

/// How long a buffer is kept that no mail uses: many times what a large mail takes, and too short
/// for a pause between mails.
const IDLE: Duration = Duration::from_millis(100);

/// The buffers, the one that was kept first at the front.
#[derive(Debug, Default)]
pub(super) struct Kept {
    buffers: Vec<Buffer>,
    bytes: usize,
}

#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    since: Instant,
}

impl Kept {
    /// Adds a buffer.
    pub(super) fn push(&mut self, mut bytes: Vec<u8>, now: Instant) {
        bytes.clear();
        self.bytes += bytes.capacity();
        self.buffers.push(Buffer { bytes, since: now });
    }

    /// Returns the capacity of the smallest buffer for a request of so many bytes, if there is one
    /// whose memory the request needs at least half of.
    pub(super) fn fitting(&self, total: usize) -> Option<usize> {
        let capacities = self.buffers.iter().map(|buffer| buffer.bytes.capacity());
        capacities.filter(|capacity| (total..=total.saturating_mul(2)).contains(capacity)).min()
    }

    /// Takes the buffer with this capacity that was kept last, because its memory is in the
    /// processor's caches.
    pub(super) fn take(&mut self, capacity: usize) -> Option<Vec<u8>> {
        let at = self.buffers.iter().rposition(|buffer| buffer.bytes.capacity() == capacity)?;
        self.bytes -= capacity;
        Some(self.buffers.remove(at).bytes)
    }

    /// Takes those buffers out that were kept first and are too many for so many bytes, and those
    /// that nobody has used for a while. The caller frees them, which takes its time.
    pub(super) fn trim(&mut self, most: usize, now: Instant) -> Vec<Vec<u8>> {
        let idle = |buffer: &Buffer| now.saturating_duration_since(buffer.since) >= IDLE;
        let mut given = Vec::new();
        while let Some(first) = self.buffers.first()
            && (self.bytes > most || idle(first))
        {
            let first = self.buffers.remove(0).bytes;
            self.bytes -= first.capacity();
            given.push(first);
        }
        given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(capacities: &[usize], now: Instant) -> Kept {
        let mut kept = Kept::default();
        for &capacity in capacities {
            let mut bytes = Vec::with_capacity(capacity);
            bytes.resize(capacity, b'x');
            kept.push(bytes, now);
        }
        kept
    }

    #[test]
    fn the_smallest_that_fits_is_used() {
        let mut kept = kept(&[400, 100, 200, 100], Instant::now());
        for (total, fitting) in
            [(49, None), (50, Some(100)), (100, Some(100)), (101, Some(200)), (401, None)]
        {
            assert_eq!(kept.fitting(total), fitting, "{total}");
        }
        let buffer = kept.take(100).expect("a buffer");
        assert!(buffer.is_empty() && buffer.capacity() == 100);
        assert_eq!((kept.bytes, kept.buffers[1].bytes.capacity()), (700, 100), "the last one");
        assert!(kept.take(100).is_some() && kept.take(100).is_none());
    }

    #[test]
    fn what_is_too_much_or_unused_is_given_back() {
        let now = Instant::now();
        let mut kept = kept(&[1, 2, 4], now);
        assert!(kept.trim(7, now).is_empty());
        let given: Vec<_> = kept.trim(6, now).iter().map(Vec::capacity).collect();
        assert_eq!((given, kept.bytes), (vec![1], 6));
        kept.push(Vec::with_capacity(8), now + IDLE / 2);
        assert!(kept.trim(14, now + IDLE / 2).is_empty());
        let given: Vec<_> = kept.trim(14, now + IDLE).iter().map(Vec::capacity).collect();
        assert_eq!((given, kept.bytes), (vec![2, 4], 8));
        assert_eq!(kept.trim(0, now).len(), 1);
        assert_eq!(kept.bytes, 0);
    }
}
