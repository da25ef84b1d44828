//! The dictionaries that all workers and generations share. Pure.
//!
//! Every dictionary has a bound on its memory, and so have all of them together. Beyond its own
//! bound a dictionary loses the keys that were not used for longest; beyond the common bound the
//! largest dictionary does. A key whose time is over counts as absent, and is removed when an
//! operation comes across it.
//!
//! A dictionary is kept for the generations whose scripts have named it while they were loaded, or
//! have used it. It is freed when the last of these generations has ended.
//!
//! The work of one operation is bounded, because the supervisor does nothing else meanwhile.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qrelay_shared::admin;
use qrelay_shared::dictionary::{
    Answer, MAX_DICTIONARIES, MAX_KEY, MAX_KEYS, MAX_VALUE, Operation, Request, Value, is_name,
};
use qrelay_shared::settings::Settings;

use crate::ids::GenerationId;

/// Bytes that an entry costs beside its key and value: the nodes of two maps, at their emptiest,
/// and what malloc adds.
const OVERHEAD: usize = 256;

/// Most keys that one operation removes to make room. The largest entry takes the room of fewer
/// small ones; more have to go only after a bound was lowered, and then the next operations go on.
const MAX_EVICTED: usize = 512;

/// Most entries that one `keys()` looks at, which takes about a millisecond.
const MAX_VISITED: usize = 100_000;

/// Most keys whose time is over that one `keys()` removes.
const MAX_EXPIRED: usize = 1000;

/// Error of `incr` when a value is no number or the sum is out of range.
const NO_SUM: &str = "not a number";
/// Error of an operation that stores a value which doesn't fit.
const TOO_LARGE: &str = "value too large";
/// Error when a dictionary that was just found or made isn't there, which doesn't happen.
const NO_DICTIONARY: &str = "no such dictionary";

/// Most bytes of keys in one answer.
const MAX_KEYS_BYTES: usize = 64 * 1024;

#[derive(Debug)]
struct Entry {
    value: Value<'static>,
    expires: Option<Instant>,
    used: u64,
}

impl Entry {
    fn is_over(&self, now: Instant) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

#[derive(Debug, Default)]
struct Dictionary {
    entries: HashMap<Arc<[u8]>, Entry>,
    /// The keys by their last use, which is a count of uses.
    oldest: BTreeMap<u64, Arc<[u8]>>,
    bytes: usize,
    hits: u64,
    misses: u64,
    evictions: u64,
    /// The living generations whose processes have used the dictionary.
    users: BTreeSet<GenerationId>,
}

/// The bounds on memory, in bytes.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Of each dictionary.
    each: usize,
    /// Of all dictionaries together.
    all: usize,
}

impl From<&Settings> for Bounds {
    fn from(settings: &Settings) -> Self {
        let each = settings.shared_memory;
        Self { each, all: settings.shared_memory_total.max(each) }
    }
}

/// All dictionaries.
#[derive(Debug)]
pub(super) struct Dictionaries {
    table: HashMap<String, Dictionary>,
    /// Dictionaries that nobody can name any more, and that are not freed yet.
    given_up: Vec<Dictionary>,
    /// The names that the script of each generation has named while it was loaded.
    names: BTreeMap<GenerationId, HashSet<String>>,
    bounds: Bounds,
    uses: u64,
}

impl Default for Dictionaries {
    fn default() -> Self {
        let bounds = Bounds::from(&Settings::default());
        Self {
            table: HashMap::new(),
            given_up: Vec::new(),
            names: BTreeMap::new(),
            bounds,
            uses: 0,
        }
    }
}

impl Dictionaries {
    /// Follows these settings from now on.
    pub(super) fn set_bounds(&mut self, settings: &Settings) {
        self.bounds = settings.into();
    }

    /// Keeps the dictionaries of these names until the generation ends.
    pub(super) fn declared(&mut self, generation: GenerationId, names: &[String]) {
        let names = names.iter().take(MAX_DICTIONARIES).cloned();
        self.names.insert(generation, names.collect());
    }

    /// Gives up the dictionaries that no other generation has named or used.
    pub(super) fn generation_ended(&mut self, generation: GenerationId) {
        self.names.remove(&generation);
        let names = &self.names;
        let given_up = self.table.extract_if(|name, dictionary| {
            dictionary.users.remove(&generation);
            dictionary.users.is_empty() && !names.values().any(|names| names.contains(name))
        });
        self.given_up.extend(given_up.map(|(_, dictionary)| dictionary));
    }

    /// Frees a bounded number of entries of what was given up. Returns whether more are left.
    pub(super) fn free_some(&mut self) -> bool {
        self.free(MAX_EVICTED);
        !self.given_up.is_empty()
    }

    /// Frees at most so many entries of what was given up. Returns how many were freed.
    fn free(&mut self, most: usize) -> usize {
        let mut freed = 0;
        while let Some(dictionary) = self.given_up.last_mut().filter(|_| freed < most) {
            freed += dictionary.shrink_to(0, most - freed);
            if dictionary.entries.is_empty() {
                self.given_up.pop();
            }
        }
        freed
    }

    /// Describes every dictionary, in the order of their names.
    pub(super) fn shown(&self) -> Vec<admin::Dictionary> {
        let shown = self.table.iter().map(|(name, dictionary)| admin::Dictionary {
            dictionary: name.clone(),
            keys: dictionary.entries.len() as u64,
            bytes: dictionary.bytes as u64,
            limit_bytes: self.bounds.each as u64,
            hits: dictionary.hits,
            misses: dictionary.misses,
            evictions: dictionary.evictions,
        });
        let mut shown: Vec<_> = shown.collect();
        shown.sort_unstable_by(|one, other| one.dictionary.cmp(&other.dictionary));
        shown
    }

    /// Does one operation for a process of this generation.
    pub(super) fn answer(
        &mut self,
        generation: GenerationId,
        request: Request<'_>,
        now: Instant,
    ) -> Answer<'_> {
        let Request { dictionary: name, key, operation } = request;
        if !is_name(name.as_bytes()) || key.len() > MAX_KEY {
            return failed("not a valid name or key");
        }
        if !self.table.contains_key(name) {
            if self.table.len() >= MAX_DICTIONARIES {
                return failed("too many shared dictionaries");
            }
            self.table.insert(name.to_owned(), Dictionary::default());
        }
        self.uses += 1;
        let uses = self.uses;
        let Some(dictionary) = self.table.get_mut(name) else { return failed(NO_DICTIONARY) };
        dictionary.users.insert(generation);
        let present = dictionary.has(key, now);
        match (operation, present) {
            (Operation::Set { value, ttl }, _) | (Operation::Add { value, ttl }, false) => {
                self.store(name, key, value, expiry(ttl, now))
            }
            (Operation::Increment { by, ttl }, false) => {
                self.count_from(name, key, &by, expiry(ttl, now))
            }
            (operation, _) => match self.table.get_mut(name) {
                Some(dictionary) => dictionary.answer(key, operation, uses, now),
                None => failed(NO_DICTIONARY),
            },
        }
    }

    /// Stores a value under a key that may be there, and makes room for it first.
    fn store(
        &mut self,
        name: &str,
        key: &[u8],
        value: Value<'_>,
        expires: Option<Instant>,
    ) -> Answer<'static> {
        let Some(dictionary) = self.table.get_mut(name) else { return failed(NO_DICTIONARY) };
        let size = key.len() + value.heap_size() + OVERHEAD;
        let Some(room) = self.bounds.each.checked_sub(size) else { return failed(TOO_LARGE) };
        if value.heap_size() > MAX_VALUE {
            return failed(TOO_LARGE);
        }
        dictionary.remove(key);
        let mut evicted = dictionary.shrink_to(room, MAX_EVICTED);
        let room = self.bounds.all.saturating_sub(size);
        if self.bytes() > room {
            evicted += self.free(MAX_EVICTED - evicted);
        }
        loop {
            let surplus = self.bytes().saturating_sub(room);
            let largest = self.table.values_mut().max_by_key(|dictionary| dictionary.bytes);
            let Some(largest) = largest.filter(|_| surplus > 0 && evicted < MAX_EVICTED) else {
                break;
            };
            evicted +=
                largest.shrink_to(largest.bytes.saturating_sub(surplus), MAX_EVICTED - evicted);
        }
        if let Some(dictionary) = self.table.get_mut(name) {
            dictionary.insert(key, value, expires, self.uses);
        }
        Answer::Changed(true)
    }

    /// Stores the first sum under a key that isn't there.
    fn count_from(
        &mut self,
        name: &str,
        key: &[u8],
        by: &Value<'_>,
        expires: Option<Instant>,
    ) -> Answer<'static> {
        let Some(start) = add(&Value::Integer(0), by) else { return failed(NO_SUM) };
        match self.store(name, key, start.clone(), expires) {
            Answer::Changed(_) => Answer::Value(Some(start)),
            refused => refused,
        }
    }

    /// Returns the memory of all dictionaries.
    fn bytes(&self) -> usize {
        self.table.values().chain(&self.given_up).map(|dictionary| dictionary.bytes).sum()
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
    /// Does an operation that stores nothing new.
    fn answer(
        &mut self,
        key: &[u8],
        operation: Operation<'_>,
        used: u64,
        now: Instant,
    ) -> Answer<'_> {
        match operation {
            Operation::Get => Answer::Value(self.get(key, used)),
            Operation::Increment { by, .. } => self.increment(key, &by, used),
            Operation::Delete => Answer::Changed(self.remove(key)),
            Operation::Keys { max } => self.keys(max, now),
            // The key is there.
            Operation::Add { .. } | Operation::Set { .. } => Answer::Changed(false),
        }
    }

    fn get(&mut self, key: &[u8], used: u64) -> Option<Value<'_>> {
        self.touch(key, used);
        let entry = self.entries.get(key);
        *if entry.is_some() { &mut self.hits } else { &mut self.misses } += 1;
        entry.map(|entry| match &entry.value {
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

    /// Adds a key that isn't there.
    fn insert(&mut self, key: &[u8], value: Value<'_>, expires: Option<Instant>, used: u64) {
        self.bytes += key.len() + value.heap_size() + OVERHEAD;
        let key: Arc<[u8]> = key.into();
        self.oldest.insert(used, Arc::clone(&key));
        self.entries.insert(key, Entry { value: value.into_owned(), expires, used });
    }

    /// Adds to a number.
    fn increment(&mut self, key: &[u8], by: &Value<'_>, used: u64) -> Answer<'static> {
        let Some(entry) = self.entries.get_mut(key) else { return failed(NO_SUM) };
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

    /// Removes the keys that were not used for longest, until at most `bytes` are left or `most`
    /// keys are removed. Returns how many were removed.
    fn shrink_to(&mut self, bytes: usize, most: usize) -> usize {
        let mut removed = 0;
        while self.bytes > bytes && removed < most {
            let Some((_, key)) = self.oldest.first_key_value() else { break };
            let key = Arc::clone(key);
            self.remove(&key);
            self.evictions += 1;
            removed += 1;
        }
        removed
    }

    /// Returns whether a key is there. A key whose time is over is removed.
    fn has(&mut self, key: &[u8], now: Instant) -> bool {
        match self.entries.get(key) {
            Some(entry) if entry.is_over(now) => !self.remove(key),
            found => found.is_some(),
        }
    }

    fn keys(&mut self, max: u32, now: Instant) -> Answer<'_> {
        let visited = self.entries.iter().take(MAX_VISITED);
        let expired = visited.filter(|(_, entry)| entry.is_over(now)).take(MAX_EXPIRED);
        let expired: Vec<_> = expired.map(|(key, _)| Arc::clone(key)).collect();
        for key in &expired {
            self.remove(key);
        }
        let mut room = MAX_KEYS_BYTES;
        let keys = self
            .entries
            .iter()
            .take(MAX_VISITED)
            .filter(|(_, entry)| !entry.is_over(now))
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
    const FIRST: GenerationId = GenerationId(1);
    const SECOND: GenerationId = GenerationId(2);

    fn ask(
        all: &mut Dictionaries,
        key: &str,
        operation: Operation<'_>,
        limit: usize,
        now: Instant,
    ) -> Answer<'static> {
        all.bounds.each = limit;
        ask_of("d", all, key, operation, now)
    }

    fn ask_of(
        dictionary: &str,
        all: &mut Dictionaries,
        key: &str,
        operation: Operation<'_>,
        now: Instant,
    ) -> Answer<'static> {
        let request = Request { dictionary, key: key.as_bytes(), operation };
        match all.answer(FIRST, request, now) {
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
        assert!(matches!(all.answer(FIRST, get("../x", b"k"), now), Answer::Failed(_)));
        assert!(matches!(all.answer(FIRST, get("d", &[b'k'; 257]), now), Answer::Failed(_)));
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

    const ONE: Value<'static> = Value::Integer(1);

    fn set() -> Operation<'static> {
        Operation::Set { value: ONE, ttl: None }
    }

    #[test]
    fn all_dictionaries_together_stay_within_their_bound() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let entry = OVERHEAD + 6;
        all.bounds = Bounds { each: 100 * entry, all: 150 * entry };
        for number in 0..1000 {
            let name = format!("d{}", number % 40);
            ask_of(&name, &mut all, &format!("{number:06}"), set(), now);
            assert!(all.bytes() <= all.bounds.all);
        }
        assert_eq!(all.bytes(), all.bounds.all);
        // A flood of one dictionary costs the others only what they have beyond its own size.
        for number in 1000..2000 {
            ask_of("flood", &mut all, &format!("{number:06}"), set(), now);
            assert!(all.bytes() <= all.bounds.all);
        }
        let entries = |name: &str| all.table[name].entries.len();
        assert!((0..40).all(|number| entries(&format!("d{number}")) >= 3));
        assert!(entries("flood") <= 100);
    }

    #[test]
    fn a_dictionary_is_freed_with_the_last_generation_that_names_or_uses_it() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        all.declared(FIRST, &["both".into(), "first".into()]);
        all.declared(SECOND, &["both".into()]);
        for name in ["both", "first", "used"] {
            ask_of(name, &mut all, "k", set(), now);
        }
        let request = |dictionary| Request { dictionary, key: b"k", operation: Operation::Get };
        all.answer(SECOND, request("used"), now);
        all.generation_ended(FIRST);
        let names: BTreeMap<_, _> = all.table.iter().map(|(name, d)| (&**name, d.bytes)).collect();
        let size = OVERHEAD + 1;
        assert_eq!(names, BTreeMap::from([("both", size), ("used", size)]));
        all.generation_ended(SECOND);
        assert!(all.table.is_empty() && all.names.is_empty());
        assert!(!all.free_some());
        assert_eq!(all.bytes(), 0);
    }

    #[test]
    fn one_operation_removes_a_bounded_number_of_keys() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        let count = |all: &Dictionaries| all.table["d"].entries.len();
        for number in 0..4000 {
            ask(&mut all, &format!("{number}"), set(), usize::MAX, now);
        }
        let lowered = 1000 * OVERHEAD;
        ask(&mut all, "new", set(), lowered, now);
        assert_eq!(count(&all), 4001 - MAX_EVICTED);
        for number in 0..10 {
            ask(&mut all, &format!("more {number}"), set(), lowered, now);
        }
        assert!(all.table["d"].bytes <= lowered);

        let brief = Operation::Set { value: ONE, ttl: Some(Duration::from_secs(1)) };
        let mut all = Dictionaries::default();
        for number in 0..2500 {
            ask(&mut all, &format!("{number}"), brief.clone(), LIMIT, now);
        }
        let later = now + Duration::from_secs(1);
        for left in [1500, 500, 0] {
            let keys = ask(&mut all, "", Operation::Keys { max: 10 }, LIMIT, later);
            assert_eq!((keys, count(&all)), (Answer::Keys(Vec::new()), left));
        }
    }

    #[test]
    fn a_large_dictionary_is_freed_in_steps_and_at_once_when_others_need_the_room() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        for number in 0..2000 {
            ask(&mut all, &format!("{number:04}"), set(), LIMIT, now);
        }
        all.bounds.all = all.bytes();
        all.generation_ended(FIRST);
        assert!(all.table.is_empty() && all.bytes() == all.bounds.all);
        ask_of("new", &mut all, "k", set(), now);
        assert!(all.bytes() <= all.bounds.all);
        assert_eq!(all.table["new"].entries.len(), 1);
        let mut steps = 1;
        while all.free_some() {
            steps += 1;
        }
        assert_eq!(steps, 3, "some were freed to make room");
        assert_eq!(all.bytes(), OVERHEAD + 1);
    }

    #[test]
    fn the_largest_entry_finds_room_in_one_operation() {
        let (mut all, now) = (Dictionaries::default(), Instant::now());
        for number in 0..4000 {
            ask(&mut all, &format!("{number}"), set(), LIMIT, now);
        }
        let large = "x".repeat(MAX_VALUE);
        let key = "k".repeat(MAX_KEY);
        let operation = Operation::Set { value: text(&large), ttl: None };
        assert_eq!(ask(&mut all, &key, operation, LIMIT, now), Answer::Changed(true));
        assert!(all.table["d"].bytes <= LIMIT);
    }
}
