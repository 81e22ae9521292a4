//! Everything that the tool prints: data to standard output, all else to standard error.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use peftrs_core::merge::Watch;

/// What separates an error from the way out in one line.
const HINT: &str = "; hint: ";

/// Prints, or stays silent, as the user asked once.
pub struct Printer {
    quiet: bool,
}

impl Printer {
    pub fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    /// Data, the only thing on standard output. A reader that closes the pipe has read enough.
    #[allow(clippy::unused_self, reason = "printing goes through the printer")]
    pub fn data(&self, text: &str) {
        let mut output = std::io::stdout().lock();
        let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
    }

    /// What the user should know although nothing is wrong.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            say(&format!("note: {text}"));
        }
    }

    /// What was done.
    pub fn done(&self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }

    /// What went wrong, and the way out on a line of its own.
    #[allow(clippy::unused_self, reason = "printing goes through the printer")]
    pub fn error(&self, text: &str) {
        let (error, hint) = text.split_once(HINT).map_or((text, None), |(error, hint)| (error, Some(hint)));
        say(&format!("error: {error}"));
        if let Some(hint) = hint {
            say(&format!("hint: {hint}"));
        }
    }
}

/// One line to standard error; if that is closed there is no one to tell.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// A number of bytes for people.
pub fn size(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

/// The progress bar of a merge, shown on a terminal only, and the signal that may end it.
pub struct Progress<'a> {
    bar: ProgressBar,
    signal: &'a AtomicUsize,
}

impl<'a> Progress<'a> {
    pub fn new(printer: &Printer, bytes: u64, signal: &'a AtomicUsize) -> Self {
        let shown = !printer.quiet && std::io::stderr().is_terminal();
        let bar = if shown { ProgressBar::new(bytes) } else { ProgressBar::hidden() };
        let template = "{bar:32} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar, signal }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Watch for Progress<'_> {
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn interrupted(&self) -> Option<i32> {
        i32::try_from(self.signal.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0)
    }
}
