//! Keys of one field, all of them asked of a name at once.

use aho_corasick::AhoCorasick;

use super::{Budget, Name, Pattern, Role};
use crate::error::Result;

/// With fewer keys than this, asking one after the other is quicker.
const MANY: usize = 8;

/// The most bytes of text that are searched for at once.
const MAX_TEXT: usize = 1 << 20;

/// Keys of one field, of which the first that matches counts.
#[derive(Debug)]
pub struct Keys {
    patterns: Vec<Pattern>,
    sieve: Option<Sieve>,
}

impl Keys {
    /// Keys of `field` in the order of the file.
    pub fn new<'a>(field: &str, keys: impl IntoIterator<Item = &'a str>, role: Role, budget: &Budget) -> Result<Self> {
        let patterns =
            keys.into_iter().map(|key| Pattern::new(field, key, role, budget)).collect::<Result<Vec<_>>>()?;
        let sieve = if patterns.len() < MANY { None } else { Sieve::new(&patterns) };
        Ok(Self { patterns, sieve })
    }

    /// The indices of the keys that match the name, in order.
    pub fn matches(&self, name: &str, budget: &Budget) -> Result<Vec<usize>> {
        self.matching(name, budget).collect()
    }

    /// The index of the first key that matches the name.
    pub fn first(&self, name: &str, budget: &Budget) -> Result<Option<usize>> {
        self.matching(name, budget).next().transpose()
    }

    fn matching(&self, name: &str, budget: &Budget) -> impl Iterator<Item = Result<usize>> {
        let name = Name::new(name);
        let possible = match &self.sieve {
            Some(sieve) if name.simple => sieve.possible(name.text),
            _ => (0..self.patterns.len()).collect(),
        };
        possible.into_iter().filter_map(move |index| {
            let found = self.patterns.get(index)?.is_match(name, budget);
            found.map(|found| found.then_some(index)).transpose()
        })
    }
}

/// One search for what keys need to be in a name: of hundreds of keys, it leaves the few that can match.
#[derive(Debug)]
struct Sieve {
    texts: AhoCorasick,
    /// The key that each text belongs to.
    owners: Vec<usize>,
    /// Keys that need no text.
    always: Vec<usize>,
}

impl Sieve {
    fn new(patterns: &[Pattern]) -> Option<Self> {
        let (mut texts, mut owners, mut always) = (Vec::new(), Vec::new(), Vec::new());
        for (index, pattern) in patterns.iter().enumerate() {
            let its = pattern.texts();
            if its.is_empty() {
                always.push(index);
            }
            owners.extend(its.iter().map(|_| index));
            texts.extend(its);
        }
        if texts.iter().map(String::len).sum::<usize>() > MAX_TEXT {
            return None;
        }
        Some(Self { texts: AhoCorasick::new(texts).ok()?, owners, always })
    }

    /// The indices of the keys that a simple name has a text of, in order.
    fn possible(&self, name: &str) -> Vec<usize> {
        let found = self.texts.find_overlapping_iter(name);
        let mut possible: Vec<usize> =
            found.filter_map(|found| self.owners.get(found.pattern().as_usize()).copied()).collect();
        possible.extend(&self.always);
        possible.sort_unstable();
        possible.dedup();
        possible
    }
}
