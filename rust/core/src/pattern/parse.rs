//! Reading patterns by the grammar of Python's `re` (3.11 and later, for text).

use std::collections::BTreeMap;

use super::escape;
use super::flags::{self, Flags, Scope};
use super::syntax::{Anchor, Node, RepeatKind, Set, Width};

/// The most groups within one another.
const MAX_DEPTH: usize = 100;

/// The longest pattern, in characters.
const MAX_LENGTH: usize = 1_000_000;

/// Why there is no tree for a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// Python refuses it too.
    Malformed(String),
    /// Python would take it, but we cannot be sure to mean the same.
    Unsupported(&'static str),
}

pub(super) type Parsed<T> = Result<T, Fault>;

pub(super) fn malformed<T>(reason: impl Into<String>) -> Parsed<T> {
    Err(Fault::Malformed(reason.into()))
}

/// A pattern's tree and the numbers of its named groups.
pub(super) struct Tree {
    pub node: Node,
    pub names: BTreeMap<String, usize>,
}

pub(super) struct Parser {
    text: Vec<char>,
    position: usize,
    /// For each group by its number, the fewest and the most characters; none while it is open. The first is the whole pattern.
    groups: Vec<Option<Width>>,
    names: BTreeMap<String, usize>,
    /// Inside a look behind: the number of groups before it.
    behind: Option<usize>,
    /// The largest group that a condition asks for; it may come later.
    asked: usize,
    depth: usize,
}

/// Reads a whole pattern.
pub(super) fn parse(text: &str) -> Parsed<Tree> {
    let text: Vec<char> = text.chars().take(MAX_LENGTH + 1).collect();
    if text.len() > MAX_LENGTH {
        return Err(Fault::Unsupported("more than a million characters"));
    }
    let mut parser =
        Parser { text, position: 0, groups: vec![None], names: BTreeMap::new(), behind: None, asked: 0, depth: 0 };
    let node = parser.alternatives(Flags::default(), true)?;
    if parser.peek().is_some() {
        return malformed("unbalanced parenthesis");
    }
    if parser.asked >= parser.groups.len() {
        return malformed(format!("invalid group reference {}", parser.asked));
    }
    Ok(Tree { node, names: parser.names })
}

impl Parser {
    pub fn peek(&self) -> Option<char> {
        self.text.get(self.position).copied()
    }

    pub fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.position += 1;
        Some(next)
    }

    pub fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.position += usize::from(found);
        found
    }

    /// At most `most` characters that pass.
    pub fn take_while(&mut self, most: usize, passes: impl Fn(char) -> bool) -> String {
        let found: String = self
            .text
            .iter()
            .skip(self.position)
            .copied()
            .take(most)
            .take_while(|&character| passes(character))
            .collect();
        self.position += found.chars().count();
        found
    }

    /// What precedes `end`, which is taken too.
    fn until(&mut self, end: char, what: &str) -> Parsed<String> {
        let found = self.take_while(usize::MAX, |character| character != end);
        if !self.take(end) {
            return malformed(format!("missing {end}, unterminated {what}"));
        }
        if found.is_empty() { malformed(format!("missing {what}")) } else { Ok(found) }
    }

    fn close(&mut self) -> Parsed<()> {
        if self.take(')') { Ok(()) } else { malformed("missing ), unterminated subpattern") }
    }

    /// Sequences between bars. `outermost` is for the place where flags may be set for the whole pattern.
    fn alternatives(&mut self, mut flags: Flags, outermost: bool) -> Parsed<Node> {
        if self.depth > MAX_DEPTH {
            return Err(Fault::Unsupported("groups nested more than a hundred deep"));
        }
        self.depth += 1;
        let mut branches = vec![self.sequence(&mut flags, outermost)?];
        while self.take('|') {
            branches.push(self.sequence(&mut flags, false)?);
        }
        self.depth -= 1;
        let first = branches.pop();
        Ok(match first {
            Some(only) if branches.is_empty() => only,
            last => Node::Alternate(branches.into_iter().chain(last).collect()),
        })
    }

    fn sequence(&mut self, flags: &mut Flags, outermost: bool) -> Parsed<Node> {
        let mut nodes = Vec::new();
        while let Some(character) = self.peek().filter(|character| !"|)".contains(*character)) {
            self.position += 1;
            if flags.verbose {
                if " \t\n\r\u{b}\u{c}".contains(character) {
                    continue;
                }
                if character == '#' {
                    self.take_while(usize::MAX, |character| character != '\n');
                    self.take('\n');
                    continue;
                }
            }
            match character {
                '\\' => nodes.push(escape::outside(self, *flags)?),
                '[' => nodes.push(escape::set(self, *flags)?),
                '*' | '+' | '?' | '{' => self.repetition(character, &mut nodes, *flags)?,
                '.' => nodes.push(Node::Set(Set::any(flags.dot_all))),
                '^' => nodes.push(Node::Anchor(if flags.multi_line { Anchor::LineStart } else { Anchor::TextStart })),
                '$' => nodes.push(Node::Anchor(if flags.multi_line { Anchor::LineEnd } else { Anchor::End })),
                '(' => nodes.extend(self.group(flags, outermost && nodes.is_empty())?),
                _ => nodes.push(escape::literal(character, *flags)?),
            }
        }
        Ok(Node::Concat(nodes))
    }

    fn repetition(&mut self, character: char, nodes: &mut Vec<Node>, flags: Flags) -> Parsed<()> {
        let (min, max) = match character {
            '*' => (0, None),
            '+' => (1, None),
            '?' => (0, Some(1)),
            _ => {
                let start = self.position;
                let Some(bounds) = self.bounds()? else {
                    self.position = start;
                    nodes.push(escape::literal('{', flags)?);
                    return Ok(());
                };
                bounds
            }
        };
        let node = match nodes.pop() {
            None | Some(Node::Anchor(_)) => return malformed("nothing to repeat"),
            Some(Node::Repeat { .. }) => return malformed("multiple repeat"),
            Some(node) => Box::new(node),
        };
        let kind = if self.take('?') {
            RepeatKind::Lazy
        } else if self.take('+') {
            RepeatKind::Possessive
        } else {
            RepeatKind::Greedy
        };
        nodes.push(Node::Repeat { node, min, max, kind });
        Ok(())
    }

    /// The numbers in braces, or none if the brace is only a character.
    fn bounds(&mut self) -> Parsed<Option<(u32, Option<u32>)>> {
        if self.peek() == Some('}') {
            return Ok(None);
        }
        let low = self.take_while(usize::MAX, |character| character.is_ascii_digit());
        let high = if self.take(',') {
            self.take_while(usize::MAX, |character| character.is_ascii_digit())
        } else {
            low.clone()
        };
        if !self.take('}') {
            return Ok(None);
        }
        let count =
            |text: &str| text.parse::<u32>().map_err(|_| Fault::Malformed("repetition is too large".to_owned()));
        let min = if low.is_empty() { 0 } else { count(&low)? };
        let max = if high.is_empty() { None } else { Some(count(&high)?) };
        if max.is_some_and(|max| max < min) {
            return malformed("min repeat greater than max repeat");
        }
        Ok(Some((min, max)))
    }

    /// What follows an opening parenthesis; nothing for comments and flags.
    fn group(&mut self, flags: &mut Flags, may_set_flags: bool) -> Parsed<Option<Node>> {
        if !self.take('?') {
            return self.capture(None, *flags).map(Some);
        }
        let Some(character) = self.next() else { return malformed("unexpected end of pattern") };
        Ok(Some(match character {
            'P' => self.named(*flags)?,
            ':' => self.enclosed(*flags)?,
            '>' => Node::Atomic(Box::new(self.enclosed(*flags)?)),
            '=' | '!' => Node::Look { ahead: true, negated: character == '!', node: Box::new(self.enclosed(*flags)?) },
            '<' => self.behind(*flags)?,
            '(' => self.conditional(*flags)?,
            '#' => {
                self.take_while(usize::MAX, |character| character != ')');
                return if self.take(')') { Ok(None) } else { malformed("missing ), unterminated comment") };
            }
            '-' | 'a'..='z' | 'A'..='Z' => match flags::read(self, character, *flags)? {
                Scope::Inner(inner) => self.enclosed(inner)?,
                Scope::Whole(all) if may_set_flags => {
                    *flags = all;
                    return Ok(None);
                }
                Scope::Whole(_) => return malformed("global flags not at the start of the expression"),
            },
            _ => return malformed(format!("unknown extension ?{character}")),
        }))
    }

    fn enclosed(&mut self, flags: Flags) -> Parsed<Node> {
        let node = self.alternatives(flags, false)?;
        self.close()?;
        Ok(node)
    }

    fn capture(&mut self, name: Option<String>, flags: Flags) -> Parsed<Node> {
        let number = self.groups.len();
        if let Some(name) = name {
            if self.names.contains_key(&name) {
                return malformed(format!("redefinition of group name '{name}'"));
            }
            self.names.insert(name, number);
        }
        self.groups.push(None);
        let node = self.enclosed(flags)?;
        let width = node.width(&self.groups);
        if let Some(group) = self.groups.get_mut(number) {
            *group = Some(width);
        }
        Ok(Node::Group(number, Box::new(node)))
    }

    fn named(&mut self, flags: Flags) -> Parsed<Node> {
        if self.take('<') {
            let name = self.until('>', "group name")?;
            check_name(&name)?;
            return self.capture(Some(name), flags);
        }
        if !self.take('=') {
            return malformed("unknown extension ?P");
        }
        let name = self.until(')', "group name")?;
        check_name(&name)?;
        match self.names.get(&name) {
            Some(&number) => self.backreference(number, flags),
            None => malformed(format!("unknown group name '{name}'")),
        }
    }

    /// A reference to the text of a group.
    pub fn backreference(&mut self, number: usize, flags: Flags) -> Parsed<Node> {
        match self.groups.get(number) {
            None => return malformed(format!("invalid group reference {number}")),
            Some(None) => return malformed("cannot refer to an open group"),
            Some(Some(_)) => self.check_behind(number)?,
        }
        if flags.ignore_case {
            return Err(Fault::Unsupported("a back-reference that ignores case"));
        }
        Ok(Node::Backreference(number))
    }

    fn check_behind(&self, number: usize) -> Parsed<()> {
        if self.behind.is_some_and(|groups| number >= groups) {
            return malformed("cannot refer to group defined in the same lookbehind subpattern");
        }
        Ok(())
    }

    fn behind(&mut self, flags: Flags) -> Parsed<Node> {
        let negated = match self.next() {
            Some('=') => false,
            Some('!') => true,
            Some(other) => return malformed(format!("unknown extension ?<{other}")),
            None => return malformed("unexpected end of pattern"),
        };
        let outer = self.behind;
        self.behind = outer.or(Some(self.groups.len()));
        let node = self.enclosed(flags)?;
        self.behind = outer;
        let (low, high) = node.width(&self.groups);
        if high != Some(low) {
            return malformed("look-behind requires fixed-width pattern");
        }
        Ok(Node::Look { ahead: false, negated, node: Box::new(node) })
    }

    fn conditional(&mut self, flags: Flags) -> Parsed<Node> {
        let name = self.until(')', "group name")?;
        let group = if name.chars().all(|character| character.is_ascii_digit()) {
            match name.parse() {
                Ok(0) => return malformed("bad group number"),
                Ok(number) => number,
                Err(_) => return malformed("invalid group reference"),
            }
        } else {
            check_name(&name)?;
            match self.names.get(&name) {
                Some(&number) => number,
                None => return malformed(format!("unknown group name '{name}'")),
            }
        };
        self.asked = self.asked.max(group);
        if self.behind.is_some() && self.groups.get(group).is_some_and(Option::is_none) {
            return malformed("cannot refer to an open group");
        }
        self.check_behind(group)?;
        let yes = Box::new(self.sequence(&mut { flags }, false)?);
        let no = if self.take('|') { self.sequence(&mut { flags }, false)? } else { Node::Concat(Vec::new()) };
        if self.peek() == Some('|') {
            return malformed("conditional backref with more than two branches");
        }
        self.close()?;
        Ok(Node::Conditional { group, yes, no: Box::new(no) })
    }
}

fn check_name(name: &str) -> Parsed<()> {
    let start = |character: char| character == '_' || character.is_alphabetic();
    let plain =
        name.chars().enumerate().all(|(index, character)| start(character) || index > 0 && character.is_alphanumeric());
    if plain { Ok(()) } else { malformed(format!("bad character in group name '{name}'")) }
}
