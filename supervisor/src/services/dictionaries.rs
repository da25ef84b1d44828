//! The dictionaries that all workers and generations share. Pure.
//!
//! Every dictionary has a bound on its memory. Beyond the bound the keys that were not used for
//! longest are removed first. A key whose time is over counts as absent, and is removed when an
//! operation names it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qrelay_shared::dictionary::{
    Answer, MAX_KEY, MAX_KEYS, MAX_VALUE, Operation, Request, Value, is_name,
};

/// Most dictionaries, because a script that makes names up must not fill the memory.
const MAX_DICTIONARIES: usize = 256;

/// Bytes that an entry costs beside its key and value: the nodes of two maps and the key's counts,
/// rounded up.
const OVERHEAD: usize = 200;

/// Error of `incr` when a value is no number or the sum is out of range.
const NO_SUM: &str = "not a number";

/// Most bytes of keys in one answer.
const MAX_KEYS_BYTES: usize = 64 * 1024;

#[derive(Debug)]
struct Entry {
    value: Value<'static>,
    expires: Option<Instant>,
    used: u64,
}

#[derive(Debug, Default)]
struct Dictionary {
    entries: HashMap<Arc<[u8]>, Entry>,
    /// The keys by their last use, which is a count of uses.
    oldest: BTreeMap<u64, Arc<[u8]>>,
    bytes: usize,
}

/// All dictionaries.
#[derive(Debug, Default)]
pub(super) struct Dictionaries {
    table: HashMap<String, Dictionary>,
    uses: u64,
}

impl Dictionaries {
    /// Does one operation. `limit` is the bound of a dictionary in bytes.
    pub(super) fn answer(
        &mut self,
        request: Request<'_>,
        limit: usize,
        now: Instant,
    ) -> Answer<'_> {
        if !is_name(request.dictionary.as_bytes()) || request.key.len() > MAX_KEY {
            return failed("not a valid name or key");
        }
        if !self.table.contains_key(request.dictionary) {
            if self.table.len() >= MAX_DICTIONARIES {
                return failed("too many shared dictionaries");
            }
            self.table.insert(request.dictionary.to_owned(), Dictionary::default());
        }
        self.uses += 1;
        let Some(dictionary) = self.table.get_mut(request.dictionary) else {
            return failed("no such dictionary");
        };
        dictionary.forget_expired(request.key, now);
        match request.operation {
            Operation::Get => Answer::Value(dictionary.get(request.key, self.uses)),
            Operation::Set { value, ttl } => {
                dictionary.store(request.key, value, expiry(ttl, now), self.uses, limit)
            }
            Operation::Add { value, ttl } => match dictionary.entries.contains_key(request.key) {
                true => Answer::Changed(false),
                false => dictionary.store(request.key, value, expiry(ttl, now), self.uses, limit),
            },
            Operation::Increment { by, ttl } => {
                dictionary.increment(request.key, &by, expiry(ttl, now), self.uses, limit)
            }
            Operation::Delete => Answer::Changed(dictionary.remove(request.key)),
            Operation::Keys { max } => dictionary.keys(max, now),
        }
    }
}

fn failed(message: &'static str) -> Answer<'static> {
    Answer::Failed(Cow::Borrowed(message))
}

fn expiry(ttl: Option<Duration>, now: Instant) -> Option<Instant> {
    // A time that is too far away to be represented is never reached.
    ttl.and_then(|ttl| now.checked_add(ttl))
}

impl Dictionary {
    fn get(&mut self, key: &[u8], used: u64) -> Option<Value<'_>> {
        self.touch(key, used);
        self.entries.get(key).map(|entry| match &entry.value {
            Value::String(bytes) => Value::String(Cow::Borrowed(bytes)),
            other => other.clone(),
        })
    }

    /// Marks a key as the one that was used last.
    fn touch(&mut self, key: &[u8], used: u64) {
        if let Some(entry) = self.entries.get_mut(key)
            && let Some(key) = self.oldest.remove(&entry.used)
        {
            entry.used = used;
            self.oldest.insert(used, key);
        }
    }

    fn store(
        &mut self,
        key: &[u8],
        value: Value<'_>,
        expires: Option<Instant>,
        used: u64,
        limit: usize,
    ) -> Answer<'static> {
        let size = key.len() + value.heap_size() + OVERHEAD;
        if value.heap_size() > MAX_VALUE || size > limit {
            return failed("value too large");
        }
        self.remove(key);
        while self.bytes + size > limit {
            if !self.evict() {
                break;
            }
        }
        let key: Arc<[u8]> = key.into();
        self.oldest.insert(used, Arc::clone(&key));
        self.entries.insert(key, Entry { value: value.into_owned(), expires, used });
        self.bytes += size;
        Answer::Changed(true)
    }

    fn increment(
        &mut self,
        key: &[u8],
        by: &Value<'_>,
        expires: Option<Instant>,
        used: u64,
        limit: usize,
    ) -> Answer<'static> {
        let Some(entry) = self.entries.get_mut(key) else {
            let Some(start) = add(&Value::Integer(0), by) else { return failed(NO_SUM) };
            return match self.store(key, start.clone(), expires, used, limit) {
                Answer::Changed(_) => Answer::Value(Some(start)),
                refused => refused,
            };
        };
        let Some(sum) = add(&entry.value, by) else { return failed(NO_SUM) };
        // Numbers are all of one size, so the count of bytes stays right.
        entry.value = sum.clone();
        self.touch(key, used);
        Answer::Value(Some(sum))
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        let Some((key, entry)) = self.entries.remove_entry(key) else { return false };
        self.oldest.remove(&entry.used);
        self.bytes -= key.len() + entry.value.heap_size() + OVERHEAD;
        true
    }

    fn evict(&mut self) -> bool {
        let Some((_, key)) = self.oldest.first_key_value() else { return false };
        let key = Arc::clone(key);
        self.remove(&key)
    }

    fn forget_expired(&mut self, key: &[u8], now: Instant) {
        let over = |entry: &Entry| entry.expires.is_some_and(|at| at <= now);
        if self.entries.get(key).is_some_and(over) {
            self.remove(key);
        }
    }

    fn keys(&self, max: u32, now: Instant) -> Answer<'_> {
        let mut room = MAX_KEYS_BYTES;
        let keys = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.expires.is_none_or(|at| at > now))
            .take((max as usize).min(MAX_KEYS))
            .map_while(|(key, _)| {
                room = room.checked_sub(key.len() + 4)?;
                Some(Cow::Borrowed(&**key))
            });
        Answer::Keys(keys.collect())
    }
}

/// Adds two numbers: the sum of integers is an integer, any other sum a float. Returns `None` for
/// an integer that doesn't fit, because a counter must not become negative.
fn add(a: &Value<'_>, b: &Value<'_>) -> Option<Value<'static>> {
    match (a, b) {
        (Value::Integer(a), Value::Integer(b)) => a.checked_add(*b).map(Value::Integer),
        (Value::Integer(a), Value::Float(b)) => Some(Value::Float(*a as f64 + b)),
        (Value::Float(a), Value::Integer(b)) => Some(Value::Float(a + *b as f64)),
        (Value::Float(a), Value::Float(b)) => Some(Value::Float(a + b)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1 << 20;

    fn ask(
        all: &mut Dictionaries,
        key: &str,
        operation: Operation<'_>,
        limit: usize,
        now: Instant,
    ) -> Answer<'static> {
        let request = Request { dictionary: "d", key: key.as_bytes(), operation };
        match all.answer(request, limit, now) {
            Answer::Value(value) => Answer::Value(value.map(Value::into_owned)),
            Answer::Changed(changed) => Answer::Changed(changed),
            Answer::Keys(keys) => {
                Answer::Keys(keys.into_iter().map(|key| Cow::Owned(key.into_owned())).collect())
            }
            Answer::Failed(text) => Answer::Failed(Cow::Owned(text.into_owned())),
        }
    }

    fn text(value: &str) -> Value<'_> {
        Value::String(Cow::Borrowed(value.as_bytes()))
    }

    #[test]
    fn set_add_get_delete() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let set = Operation::Set { value: text("x"), ttl: None };
        let add = Operation::Add { value: Value::Boolean(true), ttl: None };
        assert_eq!(ask(&mut all, "k", Operation::Get, LIMIT, now), Answer::Value(None));
        assert_eq!(ask(&mut all, "k", set, LIMIT, now), Answer::Changed(true));
        assert_eq!(ask(&mut all, "k", add.clone(), LIMIT, now), Answer::Changed(false));
        assert_eq!(ask(&mut all, "k", Operation::Get, LIMIT, now), Answer::Value(Some(text("x"))));
        assert_eq!(ask(&mut all, "k", Operation::Delete, LIMIT, now), Answer::Changed(true));
        assert_eq!(ask(&mut all, "k", Operation::Delete, LIMIT, now), Answer::Changed(false));
        assert_eq!(ask(&mut all, "k", add, LIMIT, now), Answer::Changed(true));
    }

    #[test]
    fn a_fixed_window_counts_from_the_keys_creation() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let second = Duration::from_secs(1);
        let count = Operation::Increment { by: Value::Integer(1), ttl: Some(second) };
        let mut at = |key, when| ask(&mut all, key, count.clone(), LIMIT, when);
        assert_eq!(at("k", now), Answer::Value(Some(Value::Integer(1))));
        assert_eq!(at("k", now + second / 2), Answer::Value(Some(Value::Integer(2))));
        assert_eq!(at("k", now + second), Answer::Value(Some(Value::Integer(1))));
    }

    #[test]
    fn increments() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let mut by =
            |key, by| ask(&mut all, key, Operation::Increment { by, ttl: None }, LIMIT, now);
        assert_eq!(by("f", Value::Float(0.5)), Answer::Value(Some(Value::Float(0.5))));
        assert_eq!(by("f", Value::Integer(1)), Answer::Value(Some(Value::Float(1.5))));
        by("i", Value::Integer(i64::MAX));
        assert_eq!(by("i", Value::Integer(1)), failed(NO_SUM));
        assert_eq!(by("i", text("1")), failed(NO_SUM));
        let set = Operation::Set { value: text("x"), ttl: None };
        ask(&mut all, "s", set, LIMIT, now);
        let one = Operation::Increment { by: Value::Integer(1), ttl: None };
        assert_eq!(ask(&mut all, "s", one, LIMIT, now), failed(NO_SUM));
    }

    #[test]
    fn a_flood_of_keys_stays_within_the_bound_and_spares_what_is_used() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let limit = 100 * (OVERHEAD + 5);
        let set = || Operation::Set { value: Value::Integer(1), ttl: None };
        ask(&mut all, "fresh", set(), limit, now);
        for number in 0..10_000 {
            ask(&mut all, &format!("{number:05}"), set(), limit, now);
            ask(&mut all, "fresh", Operation::Get, limit, now);
        }
        assert_eq!(
            ask(&mut all, "fresh", Operation::Get, limit, now),
            Answer::Value(Some(Value::Integer(1)))
        );
        let dictionary = &all.table["d"];
        assert!(dictionary.bytes <= limit && dictionary.entries.len() == 100);
        assert_eq!(dictionary.entries.len(), dictionary.oldest.len());
    }

    #[test]
    fn nonsense_is_refused() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let get = |dictionary, key| Request { dictionary, key, operation: Operation::Get };
        assert!(matches!(all.answer(get("../x", b"k"), LIMIT, now), Answer::Failed(_)));
        assert!(matches!(all.answer(get("d", &[b'k'; 257]), LIMIT, now), Answer::Failed(_)));
        let large = "x".repeat(MAX_VALUE + 1);
        let set = Operation::Set { value: text(&large), ttl: None };
        assert_eq!(ask(&mut all, "k", set, LIMIT, now), failed("value too large"));
    }

    #[test]
    fn keys_leave_out_what_is_over() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let second = Duration::from_secs(1);
        ask(&mut all, "a", Operation::Set { value: Value::Integer(1), ttl: None }, LIMIT, now);
        let brief = Operation::Set { value: Value::Integer(1), ttl: Some(second) };
        ask(&mut all, "b", brief, LIMIT, now);
        let keys = Operation::Keys { max: 10 };
        let expected = Answer::Keys(vec![Cow::Owned(b"a".to_vec())]);
        assert_eq!(ask(&mut all, "", keys, LIMIT, now + second), expected);
    }
}
