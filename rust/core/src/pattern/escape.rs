//! Characters, escapes and sets.

use super::flags::Flags;
use super::parse::{Fault, Parsed, Parser, malformed};
use super::syntax::{Anchor, Category, Item, Node, Set};

/// A character that stands for itself.
pub(super) fn literal(character: char, flags: Flags) -> Parsed<Node> {
    let mut items = Vec::new();
    range(character, character, flags, &mut items)?;
    Ok(Node::Set(Set { negated: false, items }))
}

/// An escape outside of a set.
pub(super) fn outside(parser: &mut Parser, flags: Flags) -> Parsed<Node> {
    let Some(character) = parser.next() else { return malformed("bad escape (end of pattern)") };
    if let Some(item) = category(character, flags) {
        return Ok(Node::Set(Set { negated: false, items: vec![item] }));
    }
    let word = |negated| Node::Anchor(Anchor::Word { negated, ascii: flags.ascii });
    match character {
        'A' => Ok(Node::Anchor(Anchor::TextStart)),
        'Z' => Ok(Node::Anchor(Anchor::TextEnd)),
        'b' => Ok(word(false)),
        'B' => Ok(word(true)),
        '1'..='9' => {
            let mut digits = character.to_string();
            digits.push_str(&parser.take_while(1, |character| character.is_ascii_digit()));
            let octal = |text: &str| text.chars().all(|character| character.is_digit(8));
            if digits.len() == 2 && octal(&digits) {
                let third = parser.take_while(1, |character| character.is_digit(8));
                if !third.is_empty() {
                    digits.push_str(&third);
                    return literal(code(&digits, 8)?, flags);
                }
            }
            match digits.parse() {
                Ok(number) => parser.backreference(number, flags),
                Err(_) => malformed("invalid group reference"),
            }
        }
        _ => literal(plain(parser, character, &ALARM_TO_TAB)?, flags),
    }
}

/// A set after its opening bracket.
pub(super) fn set(parser: &mut Parser, flags: Flags) -> Parsed<Node> {
    let negated = parser.take('^');
    let mut items = Vec::new();
    let mut first = true;
    loop {
        let start = match parser.next() {
            None => return malformed("unterminated character set"),
            Some(']') if !first => break,
            Some(character) => member(parser, character, flags)?,
        };
        first = false;
        if !parser.take('-') {
            push(start, flags, &mut items)?;
            continue;
        }
        match parser.next() {
            None => return malformed("unterminated character set"),
            Some(']') => {
                push(start, flags, &mut items)?;
                items.push(Item::Range('-', '-'));
                break;
            }
            Some(character) => match (start, member(parser, character, flags)?) {
                (Item::Range(low, _), Item::Range(high, _)) if low <= high => range(low, high, flags, &mut items)?,
                _ => return malformed("bad character range"),
            },
        }
    }
    Ok(Node::Set(Set { negated, items }))
}

/// One member of a set, or the end of a range.
fn member(parser: &mut Parser, character: char, flags: Flags) -> Parsed<Item> {
    let character = match character {
        '\\' => {
            let Some(escaped) = parser.next() else { return malformed("bad escape (end of pattern)") };
            match category(escaped, flags) {
                Some(item) => return Ok(item),
                None if escaped.is_digit(8) && escaped != '0' => {
                    code(&format!("{escaped}{}", parser.take_while(2, |character| character.is_digit(8))), 8)?
                }
                None => plain(parser, escaped, &ALARM_TO_TAB_AND_BACKSPACE)?,
            }
        }
        _ => character,
    };
    Ok(Item::Range(character, character))
}

fn push(item: Item, flags: Flags, items: &mut Vec<Item>) -> Parsed<()> {
    match item {
        Item::Range(start, end) => range(start, end, flags, items),
        Item::Category { .. } => {
            items.push(item);
            Ok(())
        }
    }
}

const ALARM_TO_TAB: [(char, char); 6] =
    [('a', '\x07'), ('f', '\x0c'), ('n', '\n'), ('r', '\r'), ('t', '\t'), ('v', '\x0b')];
const ALARM_TO_TAB_AND_BACKSPACE: [(char, char); 7] =
    [('a', '\x07'), ('b', '\x08'), ('f', '\x0c'), ('n', '\n'), ('r', '\r'), ('t', '\t'), ('v', '\x0b')];

/// The character that an escape stands for, in a set or out of it.
fn plain(parser: &mut Parser, character: char, named: &[(char, char)]) -> Parsed<char> {
    if let Some(&(_, meant)) = named.iter().find(|(letter, _)| *letter == character) {
        return Ok(meant);
    }
    let digits = match character {
        'x' => 2,
        'u' => 4,
        'U' => 8,
        '0' => return code(&format!("0{}", parser.take_while(2, |character| character.is_digit(8))), 8),
        'N' => return Err(Fault::Unsupported("a character by its name, \\N{...}; write the character itself")),
        _ if character.is_ascii_alphanumeric() => return malformed(format!("bad escape \\{character}")),
        _ => return Ok(character),
    };
    let hex = parser.take_while(digits, |character| character.is_ascii_hexdigit());
    if hex.len() == digits { code(&hex, 16) } else { malformed(format!("incomplete escape \\{character}{hex}")) }
}

fn code(digits: &str, radix: u32) -> Parsed<char> {
    let code = u32::from_str_radix(digits, radix).unwrap_or(u32::MAX);
    if radix == 8 && code > 0o377 {
        return malformed(format!("octal escape value \\{digits} outside of range 0-0o377"));
    }
    match char::from_u32(code) {
        Some(character) => Ok(character),
        None if code <= 0x10_ffff => Err(Fault::Unsupported("half of a surrogate pair, which no name has")),
        None => malformed(format!("bad escape \\U{digits}")),
    }
}

fn category(character: char, flags: Flags) -> Option<Item> {
    let kind = match character.to_ascii_lowercase() {
        'd' => Category::Digit,
        's' => Category::Space,
        'w' => Category::Word,
        _ => return None,
    };
    Some(Item::Category { kind, negated: character.is_ascii_uppercase(), ascii: flags.ascii })
}

/// The range and, where case is ignored, whatever Python takes to be the same as one of its members.
fn range(start: char, end: char, flags: Flags, items: &mut Vec<Item>) -> Parsed<()> {
    items.push(Item::Range(start, end));
    if !flags.ignore_case {
        return Ok(());
    }
    let cased = |character: char| character.is_lowercase() || character.is_uppercase();
    if !flags.ascii && !end.is_ascii() && (start != end || cased(end)) {
        return Err(Fault::Unsupported("a letter outside of ASCII whose case is ignored; write both of its cases"));
    }
    for letter in (start..=end.min('z')).filter(char::is_ascii_alphabetic) {
        let (upper, lower) = (letter.to_ascii_uppercase(), letter.to_ascii_lowercase());
        items.extend([Item::Range(upper, upper), Item::Range(lower, lower)]);
        if flags.ascii {
            continue;
        }
        // The dotted and the dotless i, the long s and the sign of kelvin.
        let others: &[char] = match lower {
            'i' => &['\u{130}', '\u{131}'],
            'k' => &['\u{212a}'],
            's' => &['\u{17f}'],
            _ => &[],
        };
        items.extend(others.iter().map(|&other| Item::Range(other, other)));
    }
    Ok(())
}
