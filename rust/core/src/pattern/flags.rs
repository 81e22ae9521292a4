//! The flags of `(?imsxau)` and `(?i-s:…)`.

use super::parse::{Parsed, Parser, malformed};

/// The flags in force.
#[derive(Debug, Clone, Copy, Default)]
#[allow(clippy::struct_excessive_bools, reason = "these are the flags that the syntax has")]
pub(super) struct Flags {
    pub ignore_case: bool,
    pub multi_line: bool,
    pub dot_all: bool,
    pub verbose: bool,
    pub ascii: bool,
    /// Whether `u` was given for the whole pattern, which `a` cannot be beside.
    unicode: bool,
}

/// Where flags hold.
pub(super) enum Scope {
    Whole(Flags),
    Inner(Flags),
}

impl Flags {
    fn set(&mut self, letter: char, on: bool) {
        match letter {
            'i' => self.ignore_case = on,
            'm' => self.multi_line = on,
            's' => self.dot_all = on,
            'x' => self.verbose = on,
            'a' => (self.ascii, self.unicode) = (true, false),
            _ => (self.ascii, self.unicode) = (false, true),
        }
    }
}

/// Reads the rest of flags whose first character is `character`.
pub(super) fn read(parser: &mut Parser, character: char, outer: Flags) -> Parsed<Scope> {
    let mut flags = outer;
    let mut added = String::new();
    let mut next = Some(character);
    while let Some(letter) = next.filter(|letter| !":)-".contains(*letter)) {
        check(letter)?;
        added.push(letter);
        flags.set(letter, true);
        next = parser.next();
    }
    if added.contains('a') && added.contains('u') {
        return malformed("bad inline flags: flags 'a', 'u' and 'L' are incompatible");
    }
    match next {
        Some(':') => return Ok(Scope::Inner(flags)),
        Some(')') => {
            if outer.ascii && flags.unicode || outer.unicode && flags.ascii {
                return malformed("ASCII and UNICODE flags are incompatible");
            }
            return Ok(Scope::Whole(flags));
        }
        None => return malformed("missing -, : or )"),
        Some(_) => {}
    }
    let mut removed = String::new();
    loop {
        match parser.next() {
            None => return malformed("missing flag"),
            Some(':') if !removed.is_empty() => break,
            Some(letter) => {
                check(letter)?;
                removed.push(letter);
                flags.set(letter, false);
            }
        }
    }
    if removed.contains(['a', 'u']) {
        return malformed("bad inline flags: cannot turn off flags 'a', 'u' and 'L'");
    }
    if removed.chars().any(|letter| added.contains(letter)) {
        return malformed("bad inline flags: flag turned on and off");
    }
    Ok(Scope::Inner(flags))
}

fn check(letter: char) -> Parsed<()> {
    match letter {
        'a' | 'i' | 'm' | 's' | 'u' | 'x' => Ok(()),
        'L' => malformed("bad inline flags: cannot use 'L' flag with a str pattern"),
        _ => malformed(format!("unknown flag '{letter}'")),
    }
}
