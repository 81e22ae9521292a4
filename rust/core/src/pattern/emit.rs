//! Spelling a pattern's tree for the two engines, in the few forms that mean the same in both.

use std::fmt::Write as _;

use super::syntax::{Anchor, Category, Item, Node, RepeatKind, Set};

/// For the engine of linear time, and for names of ASCII without newlines alone: there, sets are masks of 128 bits, and
/// `$` is the end. None for a tree that this engine cannot match.
pub(super) fn linear(node: &Node) -> Option<String> {
    let mut out = String::new();
    Spelling { out: &mut out, ascii: true }.node(node)?;
    Some(out)
}

/// For the engine that backtracks, and for any text.
pub(super) fn full(node: &Node) -> String {
    let mut out = String::new();
    // Only the linear form has trees that it refuses.
    let _ = Spelling { out: &mut out, ascii: false }.node(node);
    out
}

struct Spelling<'a> {
    out: &'a mut String,
    /// Whether this is the linear form.
    ascii: bool,
}

impl Spelling<'_> {
    fn node(&mut self, node: &Node) -> Option<()> {
        match node {
            Node::Set(set) => self.set(set),
            Node::Anchor(anchor) => self.anchor(*anchor),
            Node::Concat(nodes) => nodes.iter().try_for_each(|node| self.node(node))?,
            Node::Alternate(nodes) => self.around("(?:", ")", |this| {
                nodes.iter().enumerate().try_for_each(|(index, node)| {
                    if index > 0 {
                        this.out.push('|');
                    }
                    this.node(node)
                })
            })?,
            Node::Group(_, node) => self.around("(", ")", |this| this.node(node))?,
            Node::Repeat { node, min, max, kind } => self.repeat(node, *min, *max, *kind)?,
            // Neither looking around nor remembering can be done in linear time.
            _ if self.ascii => return None,
            Node::Atomic(node) => self.around("(?>", ")", |this| this.node(node))?,
            Node::Look { ahead, negated, node } => {
                let open = match (ahead, negated) {
                    (true, false) => "(?=",
                    (true, true) => "(?!",
                    (false, false) => "(?<=",
                    (false, true) => "(?<!",
                };
                self.around(open, ")", |this| this.node(node))?;
            }
            Node::Backreference(group) => self.write(format_args!("(?:\\{group})")),
            Node::Conditional { group, yes, no } => {
                self.write(format_args!("(?({group})"));
                self.around("(?:", ")|", |this| this.node(yes))?;
                self.around("(?:", "))", |this| this.node(no))?;
            }
        }
        Some(())
    }

    fn around(&mut self, open: &str, close: &str, inner: impl FnOnce(&mut Self) -> Option<()>) -> Option<()> {
        self.out.push_str(open);
        inner(self)?;
        self.out.push_str(close);
        Some(())
    }

    fn write(&mut self, text: std::fmt::Arguments) {
        // Writing to a string cannot fail.
        let _ = self.out.write_fmt(text);
    }

    fn repeat(&mut self, node: &Node, min: u32, max: Option<u32>, kind: RepeatKind) -> Option<()> {
        if kind == RepeatKind::Possessive {
            if self.ascii {
                return None;
            }
            return self.around("(?>", ")", |this| this.repeat(node, min, max, RepeatKind::Greedy));
        }
        if !self.ascii && node.width(&[]).1 == Some(0) {
            return self.repeat_place(node, min, max, kind);
        }
        self.around("(?:", ")", |this| this.node(node))?;
        match (min, max) {
            (0, None) => self.out.push('*'),
            (1, None) => self.out.push('+'),
            (0, Some(1)) => self.out.push('?'),
            (min, None) => self.write(format_args!("{{{min},}}")),
            (min, Some(max)) => self.write(format_args!("{{{min},{max}}}")),
        }
        if kind == RepeatKind::Lazy {
            self.out.push('?');
        }
        Some(())
    }

    /// The repetition of what takes no characters, which the engine refuses: once says all. What may not match even once is
    /// kept, behind what never matches, for the number of its groups.
    fn repeat_place(&mut self, node: &Node, min: u32, max: Option<u32>, kind: RepeatKind) -> Option<()> {
        let (open, close) = match (min, max, kind) {
            (_, Some(0), _) => ("(?:(?!)", "|)"),
            (0, _, RepeatKind::Lazy) => ("(?:|", ")"),
            (0, ..) => ("(?:", "|)"),
            _ => ("(?:", ")"),
        };
        self.around(open, close, |this| this.node(node))
    }

    fn anchor(&mut self, anchor: Anchor) {
        let text = match (anchor, self.ascii) {
            (Anchor::TextStart, _) | (Anchor::LineStart, true) => "\\A",
            (Anchor::TextEnd, _) | (Anchor::End | Anchor::LineEnd, true) => "\\z",
            (Anchor::LineStart, false) => "(?:\\A|(?<=\\n))",
            (Anchor::LineEnd, false) => "(?=\\n|\\z)",
            (Anchor::End, false) => "(?=\\n?\\z)",
            (Anchor::Word { negated: false, .. }, true) => "\\b",
            (Anchor::Word { negated: true, .. }, true) => "\\B",
            (Anchor::Word { negated, ascii }, false) => return self.boundary(negated, ascii),
        };
        self.out.push_str(text);
    }

    /// A boundary by Python's idea of a word, which is not the engine's. There is none in a text without characters,
    /// nor the opposite of one.
    fn boundary(&mut self, negated: bool, ascii: bool) {
        let mut word = String::new();
        Spelling { out: &mut word, ascii: false }
            .set(&Set { negated: false, items: vec![Item::Category { kind: Category::Word, negated: false, ascii }] });
        if negated {
            self.write(format_args!("(?!\\A\\z)(?:(?<={word})(?={word})|(?<!{word})(?!{word}))"));
        } else {
            self.write(format_args!("(?:(?<={word})(?!{word})|(?<!{word})(?={word}))"));
        }
    }

    fn set(&mut self, set: &Set) {
        if let Some(character) = set.single() {
            return self.character(character);
        }
        if self.ascii {
            return self.mask(set);
        }
        if set.items.is_empty() {
            return self.out.push_str(if set.negated { "[\\x{0}-\\x{10FFFF}]" } else { "(?!)" });
        }
        self.out.push_str(if set.negated { "[^" } else { "[" });
        for item in &set.items {
            match *item {
                Item::Range(start, end) => self.range(start, end),
                Item::Category { kind, negated, ascii } => {
                    self.out.push_str(if negated { "[^" } else { "[" });
                    match (kind, ascii) {
                        (_, true) => kind.ascii_ranges().iter().for_each(|&(start, end)| self.range(start, end)),
                        (Category::Digit, false) => self.out.push_str("\\p{Nd}"),
                        (Category::Word, false) => self.out.push_str("\\p{L}\\p{N}_"),
                        (Category::Space, false) => self.out.push_str(SPACES),
                    }
                    self.out.push(']');
                }
            }
        }
        self.out.push(']');
    }

    /// The set's members in ASCII.
    fn mask(&mut self, set: &Set) {
        let mut mask = set.items.iter().fold(0, |mask, item| mask | item_mask(*item));
        if set.negated {
            mask = !mask;
        }
        self.out.push('[');
        if mask == 0 {
            self.out.push_str("a&&b");
        }
        let mut start = None;
        for code in 0..=128_u8 {
            let inside = code < 128 && mask >> code & 1 == 1;
            match (start, inside) {
                (None, true) => start = Some(code),
                (Some(first), false) => {
                    self.range(char::from(first), char::from(code - 1));
                    start = None;
                }
                _ => {}
            }
        }
        self.out.push(']');
    }

    fn range(&mut self, start: char, end: char) {
        self.write(format_args!("\\x{{{:X}}}-\\x{{{:X}}}", u32::from(start), u32::from(end)));
    }

    fn character(&mut self, character: char) {
        if character.is_ascii_alphanumeric() || character == '_' {
            self.out.push(character);
        } else {
            self.write(format_args!("\\x{{{:X}}}", u32::from(character)));
        }
    }
}

/// What Python's `str.isspace` holds for spaces, the separators of files, groups, records and units among them.
const SPACES: &str = "\\x{9}-\\x{D}\\x{1C}-\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";

fn item_mask(item: Item) -> u128 {
    match item {
        Item::Range(start, end) => {
            (u32::from(start)..=u32::from(end).min(127)).fold(0, |mask, code| mask | 1_u128 << code)
        }
        Item::Category { kind, negated, ascii } => {
            let mut mask =
                kind.ascii_ranges().iter().fold(0, |mask, &(start, end)| mask | item_mask(Item::Range(start, end)));
            if kind == Category::Space && !ascii {
                mask |= item_mask(Item::Range('\x1c', '\x1f'));
            }
            if negated { !mask } else { mask }
        }
    }
}
