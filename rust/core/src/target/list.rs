//! Lists of names, looked up by the ends of a name after its dots.

use std::collections::HashMap;

/// How an entry of a list matches a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hit {
    /// It is the name.
    Exact,
    /// The name ends in it, after a dot.
    End,
}

/// The entries of a list, each with the number of names that it has matched.
pub(super) struct List<'a> {
    entries: Vec<(&'a str, usize)>,
    index: HashMap<&'a str, usize>,
}

impl<'a> List<'a> {
    pub fn new(list: &'a [String]) -> Self {
        let mut entries = Vec::with_capacity(list.len());
        let mut index = HashMap::with_capacity(list.len());
        for entry in list {
            index.entry(entry.as_str()).or_insert_with(|| {
                entries.push((entry.as_str(), 0));
                entries.len() - 1
            });
        }
        Self { entries, index }
    }

    /// Whether an entry is the name; it counts only then.
    pub fn exact(&mut self, name: &str) -> bool {
        self.count(name)
    }

    /// How the entries match the name; every one that does counts.
    pub fn hit(&mut self, name: &str) -> Option<Hit> {
        if self.entries.is_empty() || name.is_empty() {
            return None;
        }
        let exact = self.count(name);
        let mut end = false;
        for (dot, _) in name.match_indices('.') {
            end |= name.get(dot + 1..).is_some_and(|rest| self.count(rest));
        }
        if exact { Some(Hit::Exact) } else { end.then_some(Hit::End) }
    }

    /// Each entry and how many names it matched.
    pub fn counts(&self) -> impl Iterator<Item = (&'a str, usize)> {
        self.entries.iter().copied()
    }

    /// How many matches there were in all.
    pub fn total(&self) -> usize {
        self.entries.iter().map(|(_, count)| count).sum()
    }

    fn count(&mut self, text: &str) -> bool {
        let entry = self.index.get(text).and_then(|&index| self.entries.get_mut(index));
        entry.map(|(_, count)| *count += 1).is_some()
    }
}
