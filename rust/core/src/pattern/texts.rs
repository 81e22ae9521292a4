//! Texts that a name needs to hold for a pattern to match it, found in the pattern's tree.

use super::syntax::{Item, Node, Set};

/// The most texts of which a match holds one.
const MOST: usize = 16;

/// How long a text gets before another one is begun, in bytes.
const LONG: usize = 64;

/// What having a digit is worth, in characters: keys of one field mostly differ in the numbers of layers.
const DIGIT: usize = 8;

impl Node {
    /// Texts of which every match in ASCII holds one at least; none if there is no telling.
    pub fn texts(&self) -> Vec<String> {
        let mut runs = Runs { current: vec![String::new()], best: Vec::new() };
        self.gather(&mut runs);
        runs.end();
        runs.best
    }

    fn gather(&self, runs: &mut Runs) {
        if let Self::Concat(nodes) = self {
            return nodes.iter().for_each(|node| node.gather(runs));
        }
        match (self.exact(), self) {
            (Some(texts), _) => runs.add(&texts),
            (None, Self::Group(_, node) | Self::Atomic(node)) => node.gather(runs),
            (None, _) => runs.end(),
        }
    }

    /// All texts of ASCII that can match, if they are few and short; their order is of no matter.
    fn exact(&self) -> Option<Vec<String>> {
        let texts = match self {
            Self::Set(set) => set.few()?,
            Self::Anchor(_) | Self::Look { .. } => vec![String::new()],
            Self::Concat(nodes) => nodes.iter().try_fold(vec![String::new()], |texts, node| {
                let more = node.exact()?;
                fit(&texts, &more).then(|| joined(texts, &more))
            })?,
            Self::Alternate(nodes) => {
                let mut all = Vec::new();
                for node in nodes {
                    all.extend(node.exact()?);
                    if all.len() > MOST {
                        return None;
                    }
                }
                all
            }
            Self::Group(_, node) | Self::Atomic(node) => node.exact()?,
            Self::Repeat { node, min: 0, max: Some(1), .. } => {
                let mut texts = node.exact()?;
                texts.push(String::new());
                texts
            }
            _ => return None,
        };
        (texts.len() <= MOST).then_some(texts)
    }
}

impl Set {
    /// The members in ASCII, if they are few and listed; none if there are none.
    fn few(&self) -> Option<Vec<String>> {
        let mut members = Vec::new();
        for item in &self.items {
            let Item::Range(start, end) = *item else { return None };
            if self.negated || members.len() > MOST || u32::from(end).saturating_sub(u32::from(start)) > 128 {
                return None;
            }
            members.extend((start..=end).filter(char::is_ascii).map(String::from));
        }
        members.sort_unstable();
        members.dedup();
        (!members.is_empty()).then_some(members)
    }
}

/// Whether few and short texts come of joining these.
fn fit(texts: &[String], more: &[String]) -> bool {
    texts.len() * more.len() <= MOST && texts.iter().all(|text| text.len() <= LONG)
}

/// Every text of the one followed by every text of the other.
fn joined(mut texts: Vec<String>, more: &[String]) -> Vec<String> {
    if let [one] = more {
        for text in &mut texts {
            text.push_str(one);
        }
        return texts;
    }
    texts.iter().flat_map(|text| more.iter().map(move |one| format!("{text}{one}"))).collect()
}

/// The texts of what comes one after the other in a pattern.
struct Runs {
    /// Of the part that is being read.
    current: Vec<String>,
    /// Of the part that tells most, up to now.
    best: Vec<String>,
}

impl Runs {
    fn add(&mut self, texts: &[String]) {
        if !fit(&self.current, texts) {
            self.end();
        }
        self.current = joined(std::mem::take(&mut self.current), texts);
    }

    /// Ends a part: what follows is not certain.
    fn end(&mut self) {
        let current = std::mem::replace(&mut self.current, vec![String::new()]);
        if worth(&current) > worth(&self.best) {
            self.best = current;
        }
    }
}

/// How much it tells that a name holds one of these.
fn worth(texts: &[String]) -> usize {
    let each = texts.iter().map(|text| match text.len() {
        0 => 0,
        length => length + if text.contains(|character: char| character.is_ascii_digit()) { DIGIT } else { 0 },
    });
    each.min().unwrap_or(0)
}
