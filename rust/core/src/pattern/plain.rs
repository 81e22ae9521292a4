//! Patterns that are names but for dots, which is what most are: no engine is needed for them.

/// A text of known length, some of whose characters may be any. For names of ASCII without newlines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plain {
    /// Whether the text has to stand at the start of the name.
    anchored: bool,
    /// The bytes, zero for any.
    bytes: Vec<u8>,
}

impl Plain {
    /// The pattern, if it is nothing but such a text.
    pub fn new(pattern: &str) -> Option<Self> {
        let (anchored, text) = pattern.strip_prefix('^').map_or((false, pattern), |rest| (true, rest));
        let mut bytes = Vec::with_capacity(text.len());
        let mut characters = text.bytes();
        while let Some(byte) = characters.next() {
            bytes.push(match byte {
                b'.' => 0,
                b'\\' => characters.next().filter(|&next| next == b'.')?,
                b'-' | b'_' => byte,
                _ if byte.is_ascii_alphanumeric() => byte,
                _ => return None,
            });
        }
        (!bytes.is_empty()).then_some(Self { anchored, bytes })
    }

    /// The longest part of the text without characters that may be any; empty if all may be.
    pub fn longest_text(&self) -> String {
        let parts = self.bytes.split(|&byte| byte == 0);
        let longest = parts.max_by_key(|part| part.len()).unwrap_or_default();
        longest.iter().map(|&byte| char::from(byte)).collect()
    }

    /// Whether the name is this text, or ends in it after a dot.
    pub fn ends(&self, name: &str) -> bool {
        let name = name.as_bytes();
        name.len().checked_sub(self.bytes.len()).is_some_and(|start| self.at(name, start))
    }

    /// Whether the name is this text, or has it as some of its components.
    pub fn within(&self, name: &str) -> bool {
        let name = name.as_bytes();
        let Some(last) = name.len().checked_sub(self.bytes.len()) else { return false };
        let ends_component = |end: usize| name.get(end).is_none_or(|&byte| byte == b'.');
        (0..=last).any(|start| ends_component(start + self.bytes.len()) && self.at(name, start))
    }

    fn at(&self, name: &[u8], start: usize) -> bool {
        let Some((before, rest)) = name.split_at_checked(start) else { return false };
        // Compared from the end, where names differ soonest.
        let same = |(&wanted, &byte): (&u8, &u8)| wanted == byte || wanted == 0;
        let rest = rest.get(..self.bytes.len()).unwrap_or_default();
        self.bytes.iter().zip(rest).rev().all(same) && (before.is_empty() || !self.anchored && before.ends_with(b"."))
    }
}
