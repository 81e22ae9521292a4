//! The one error type: every message names what is at fault, the values, and the way out.

use std::path::{Path, PathBuf};

/// What every function of the core returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Each variant becomes one Python exception class, all of them under `PeftrsError`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written: the operating system refused (`StorageError`, an `OSError`).
    #[error("{}: cannot {action}: {source}{}", show_path(path), way_out(action, source))]
    Storage {
        /// The file or folder at fault.
        path: PathBuf,
        /// What was tried, as a verb: "open", "read", "write", "sync", "rename".
        action: &'static str,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A checkpoint's bytes break the format, or its tensors are not those expected (`CheckpointError`, a `ValueError`).
    #[error("{}: {reason}", show_path(path))]
    Checkpoint {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong with it, with the tensor's name and both values where there are two.
        reason: String,
    },
    /// An adapter config is malformed or asks for what cannot be (`ConfigError`, a `ValueError`).
    #[error("{}: {reason}", show_name(origin))]
    Config {
        /// The file, or the class and field for a config made in code.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A pattern is malformed, too costly, or matched nothing (`TargetError`, a `ValueError`).
    #[error("{0}")]
    Target(String),
    /// A merge was refused or failed (`MergeError`, a `ValueError`).
    #[error("{0}")]
    Merge(String),
    /// The work was stopped by a signal (`KeyboardInterrupt` in Python, exit code 130 or 143 in the tool).
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
}

impl Error {
    /// A [`Error::Storage`] for `path`.
    #[must_use]
    pub fn storage(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Storage { path: path.to_owned(), action, source }
    }

    /// A [`Error::Checkpoint`] for `path`.
    pub fn checkpoint(path: &Path, reason: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.to_owned(), reason: reason.into() }
    }

    /// A [`Error::Config`] for `origin`.
    pub fn config(origin: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { origin: origin.into(), reason: reason.into() }
    }
}

/// What the user can do about a refusal of the operating system, where that is known.
fn way_out(action: &str, refusal: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match refusal.kind() {
        ErrorKind::NotFound if action == "open" => {
            "; hint: check the path; what is on the Hub has to be downloaded first"
        }
        ErrorKind::NotFound => "; hint: check the path",
        ErrorKind::PermissionDenied => "; hint: check whose it is and who may use it",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; hint: free some room, or write to another disk",
        ErrorKind::ReadOnlyFilesystem => "; hint: write to another disk",
        ErrorKind::FileTooLarge => "; hint: this disk takes no file so large; --max-shard-size makes smaller ones",
        _ => "",
    }
}

/// The longest name that an error message shows whole, in characters.
const SHOWN: usize = 120;

/// `name` as an error message may show it: control characters escaped, at most 120 characters.
#[must_use]
pub fn show_name(name: &str) -> String {
    let mut shown: String = name.chars().take(SHOWN).flat_map(shown_char).collect();
    if name.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// A path as an error message may show it: the end of a long one, since the file's name says most.
#[must_use]
pub fn show_path(path: &Path) -> String {
    let text = path.to_string_lossy();
    let extra = text.chars().count().saturating_sub(2 * SHOWN);
    let tail: String = text.chars().skip(extra).flat_map(shown_char).collect();
    if extra > 0 { format!("…{tail}") } else { tail }
}

fn shown_char(character: char) -> Vec<char> {
    // Besides control characters, the marks that reorder text on a terminal.
    let hides = character.is_control()
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if hides { character.escape_default().collect() } else { vec![character] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_cut() {
        assert_eq!(show_name("a\u{1b}[31m\nb"), "a\\u{1b}[31m\\nb");
        assert_eq!(show_name(&"x".repeat(130)).chars().count(), 121);
        assert_eq!(show_name("q_proj"), "q_proj");
    }

    #[test]
    fn a_long_path_keeps_its_end() {
        let path = PathBuf::from(format!("/{}/adapter_config.json", "d".repeat(500)));
        let message = Error::checkpoint(&path, "is empty").to_string();
        assert!(message.ends_with("/adapter_config.json: is empty"), "{message}");
        assert!(message.chars().count() < 280, "{message}");
    }
}
