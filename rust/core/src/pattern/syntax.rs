//! What a pattern in Python's syntax means, as a tree in which flags, names of groups and spellings are resolved.

/// A part of a pattern.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    /// One character of a set.
    Set(Set),
    /// A place between characters.
    Anchor(Anchor),
    /// One after the other.
    Concat(Vec<Node>),
    /// The first that leads to a match.
    Alternate(Vec<Node>),
    /// A capturing group with its number.
    Group(usize, Box<Node>),
    /// A repetition, at most `max` times if there is one.
    Repeat { node: Box<Node>, min: u32, max: Option<u32>, kind: RepeatKind },
    /// What is matched once and not tried otherwise.
    Atomic(Box<Node>),
    /// What has to follow or precede, or must not.
    Look { ahead: bool, negated: bool, node: Box<Node> },
    /// The text of a group.
    Backreference(usize),
    /// One of two, by whether a group took part.
    Conditional { group: usize, yes: Box<Node>, no: Box<Node> },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RepeatKind {
    Greedy,
    Lazy,
    Possessive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    /// `\A`, and `^` of one line.
    TextStart,
    /// `^` of many lines.
    LineStart,
    /// `\Z`.
    TextEnd,
    /// `$` of one line: at the end, or before a newline that ends the text.
    End,
    /// `$` of many lines.
    LineEnd,
    /// `\b` or, if negated, `\B`; in ASCII's words or Unicode's.
    Word { negated: bool, ascii: bool },
}

/// The fewest and the most characters that can match; none for no limit.
pub(super) type Width = (u64, Option<u64>);

/// A set of characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Set {
    pub negated: bool,
    pub items: Vec<Item>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item {
    Range(char, char),
    Category { kind: Category, negated: bool, ascii: bool },
}

/// `\d`, `\s` and `\w`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Category {
    Digit,
    Space,
    Word,
}

impl Category {
    /// The members in ASCII.
    pub fn ascii_ranges(self) -> &'static [(char, char)] {
        match self {
            Self::Digit => &[('0', '9')],
            Self::Space => &[('\t', '\r'), (' ', ' ')],
            Self::Word => &[('0', '9'), ('A', 'Z'), ('_', '_'), ('a', 'z')],
        }
    }
}

impl Set {
    /// Any character, or any but a newline.
    pub fn any(newline: bool) -> Self {
        let items = if newline { Vec::new() } else { vec![Item::Range('\n', '\n')] };
        Self { negated: true, items }
    }

    /// The only character, if there is only one.
    pub fn single(&self) -> Option<char> {
        match (self.negated, self.items.as_slice()) {
            (false, [Item::Range(start, end)]) if start == end => Some(*start),
            _ => None,
        }
    }
}

impl Node {
    /// How much text can match, where `groups` has the widths of groups by number.
    pub fn width(&self, groups: &[Option<Width>]) -> Width {
        match self {
            Self::Set(_) => (1, Some(1)),
            Self::Anchor(_) | Self::Look { .. } => (0, Some(0)),
            Self::Concat(nodes) => nodes.iter().fold((0, Some(0)), |(low, high), node| {
                let (least, most) = node.width(groups);
                (low.saturating_add(least), add(high, most))
            }),
            Self::Alternate(nodes) => either(nodes.iter().map(|node| node.width(groups))),
            Self::Group(_, node) | Self::Atomic(node) => node.width(groups),
            Self::Repeat { node, min, max, .. } => {
                let (least, most) = node.width(groups);
                let most = match (most, max) {
                    (Some(0), _) => Some(0),
                    (Some(most), Some(max)) => Some(most.saturating_mul(u64::from(*max))),
                    _ => None,
                };
                (least.saturating_mul(u64::from(*min)), most)
            }
            Self::Backreference(group) => groups.get(*group).copied().flatten().unwrap_or((0, None)),
            Self::Conditional { yes, no, .. } => either([yes.width(groups), no.width(groups)].into_iter()),
        }
    }

    /// The characters that every match ends with, for a quick look before the search.
    pub fn tail(&self) -> String {
        let mut reversed = String::new();
        self.push_tail(&mut reversed);
        reversed.chars().rev().collect()
    }

    /// Adds the last characters, last first; false if what precedes them is not certain.
    fn push_tail(&self, reversed: &mut String) -> bool {
        match self {
            Self::Set(set) => match set.single() {
                Some(character) => {
                    reversed.push(character);
                    true
                }
                None => false,
            },
            Self::Anchor(anchor) => matches!(anchor, Anchor::End | Anchor::TextEnd | Anchor::LineEnd),
            Self::Look { .. } => true,
            Self::Concat(nodes) => nodes.iter().rev().all(|node| node.push_tail(reversed)),
            Self::Group(_, node) | Self::Atomic(node) => node.push_tail(reversed),
            _ => false,
        }
    }
}

fn add(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one?.saturating_add(other?))
}

fn either(widths: impl Iterator<Item = Width>) -> Width {
    let mut low = None;
    let mut high = Some(0);
    for (least, most) in widths {
        low = Some(low.map_or(least, |low: u64| low.min(least)));
        high = high.and_then(|high| most.map(|most| high.max(most)));
    }
    (low.unwrap_or(0), high)
}
