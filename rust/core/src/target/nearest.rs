//! The name that the writer of an entry may have meant.

use std::collections::BTreeMap;

use strsim::normalized_damerau_levenshtein;

/// How alike two texts have to be, from 0 to 1.
const ALIKE: f64 = 0.6;

/// How many entries are looked for, how many names are compared with each, and how long an entry may be: comparing costs the
/// product of both lengths.
const MAX_ENTRIES: usize = 16;
const MAX_NAMES: usize = 1_000;
const MAX_LENGTH: usize = 200;

/// Looks for the names nearest to entries that matched nothing.
pub(super) struct Nearest<'a> {
    names: &'a [String],
    asked: usize,
    /// By number of components: the ends of names, one for each that differs in more than digits, with the whole name.
    ends: BTreeMap<usize, Vec<(&'a str, &'a str)>>,
}

impl<'a> Nearest<'a> {
    pub fn new(names: &'a [String]) -> Self {
        Self { names, asked: 0, ends: BTreeMap::new() }
    }

    /// The end of a name nearest to an entry that matched `count` names.
    pub fn end(&mut self, entry: &str, count: usize) -> Option<String> {
        self.find(entry, count).map(|(end, _)| end.to_owned())
    }

    /// The whole name that ends nearest to a pattern that matched `count` names.
    pub fn whole(&mut self, pattern: &str, count: usize) -> Option<String> {
        self.find(pattern, count).map(|(_, name)| name.to_owned())
    }

    fn find(&mut self, entry: &str, count: usize) -> Option<(&'a str, &'a str)> {
        let text = entry.trim_start_matches('^').replace(r"\.", ".");
        let is_name = text.chars().all(|character| character.is_alphanumeric() || "._-".contains(character));
        if count > 0 || !is_name || text.is_empty() || text.len() > MAX_LENGTH || self.asked >= MAX_ENTRIES {
            return None;
        }
        self.asked += 1;
        let names = self.names;
        let components = text.split('.').count();
        let ends = self.ends.entry(components).or_insert_with(|| ends(names, components));
        let scored = ends.iter().map(|&(end, name)| (normalized_damerau_levenshtein(&text, end), end, name));
        let best = scored.filter(|(score, ..)| *score >= ALIKE).max_by(|one, other| one.0.total_cmp(&other.0));
        best.map(|(_, end, name)| (end, name))
    }
}

fn ends(names: &[String], components: usize) -> Vec<(&str, &str)> {
    let mut found: BTreeMap<String, (&str, &str)> = BTreeMap::new();
    for name in names.iter().filter(|name| name.len() <= MAX_LENGTH) {
        let dots = name.rmatch_indices('.').nth(components - 1);
        let Some(end) = name.get(dots.map_or(0, |(dot, _)| dot + 1)..) else { continue };
        let shape: String =
            end.chars().map(|character| if character.is_ascii_digit() { '0' } else { character }).collect();
        found.entry(shape).or_insert((end, name));
        if found.len() >= MAX_NAMES {
            break;
        }
    }
    found.into_values().collect()
}
