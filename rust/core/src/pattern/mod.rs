//! Patterns in the syntax of Python's `re`, which adapter configs hold, with its meaning and without its dangers.
//!
//! A pattern is read by Python's grammar and then spelled anew for one of three ways to match: none at all for a plain name,
//! crate `regex` (linear time) where that can match it, crate `fancy-regex` under a budget otherwise. What none of them can
//! match with the same meaning is refused with one line that names the construct.

mod emit;
mod escape;
mod flags;
mod keys;
mod parse;
mod plain;
mod syntax;
mod texts;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, show_name};
pub use keys::Keys;
use parse::Fault;
use plain::Plain;

/// The most steps back that one match may take.
const MAX_STEPS: usize = 50_000;

/// The longest that all matches of one selection may backtrack, together with compiling its patterns.
const MAX_TIME: Duration = Duration::from_secs(1);

/// How PEFT wraps and matches a pattern, by the field that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The whole name: `target_modules`, `exclude_modules` and `feedforward_modules`.
    Whole,
    /// The end of a name from a dot on: keys of `rank_pattern` and `alpha_pattern`.
    Suffix,
    /// A module and all within it: `modules_to_save`.
    Subtree,
    /// What comes before the number of a layer: `layers_pattern`.
    Layers,
}

impl Role {
    fn wrap(self, pattern: &str) -> String {
        match self {
            Self::Whole => pattern.to_owned(),
            Self::Suffix => format!(r"(.*\.)?({pattern})$"),
            Self::Subtree => format!(r"(^|.*\.){pattern}($|\..*)"),
            Self::Layers => format!(r"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."),
        }
    }
}

/// The time that the patterns of one selection have left.
#[derive(Debug, Default)]
pub struct Budget(AtomicU64);

impl Budget {
    /// Does `work`, the time of which counts, if there is time left.
    fn spend<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        if Duration::from_nanos(self.0.load(Ordering::Relaxed)) > MAX_TIME {
            return None;
        }
        let start = Instant::now();
        let done = work();
        self.0.fetch_add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Some(done)
    }
}

/// A name to match.
#[derive(Debug, Clone, Copy)]
pub struct Name<'a> {
    text: &'a str,
    /// Whether it is of ASCII without newlines, as nearly all are. There, the classes of Unicode are those of ASCII and `$` is
    /// the end.
    simple: bool,
}

impl<'a> Name<'a> {
    /// The name `text`, looked at once for all patterns that it will be matched with.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        Self { text, simple: !text.is_empty() && text.bytes().all(|byte| byte.is_ascii() && byte != b'\n') }
    }
}

/// A pattern, ready to match.
#[derive(Debug)]
pub struct Pattern {
    /// Where it stands and what it is, for messages.
    label: String,
    source: String,
    role: Role,
    plain: Option<Plain>,
    /// What matches where that does not; read when first needed.
    engine: OnceLock<Engine>,
}

#[derive(Debug)]
struct Engine {
    /// What every simple name that matches ends with.
    tail: String,
    /// Texts of which every simple name that matches holds one; none if there is no telling.
    texts: Vec<String>,
    /// For simple names.
    linear: Option<regex::Regex>,
    /// For all names.
    full: OnceLock<fancy_regex::Regex>,
    spelling: String,
    /// The number of the group that holds a layer's index.
    index_group: Option<usize>,
}

impl Pattern {
    /// A pattern of `field`. Refuses one that is malformed, or that cannot be matched with Python's meaning.
    pub fn new(field: &str, pattern: &str, role: Role, budget: &Budget) -> Result<Self> {
        let plain = match role {
            Role::Suffix | Role::Subtree => Plain::new(pattern),
            Role::Whole | Role::Layers => None,
        };
        let label = format!("{field}: pattern `{}`", show_name(pattern));
        let pattern = Self { label, source: pattern.to_owned(), role, plain, engine: OnceLock::new() };
        if pattern.plain.is_none() {
            pattern.engine(budget)?;
        }
        Ok(pattern)
    }

    /// Whether the name matches.
    pub fn is_match(&self, name: Name, budget: &Budget) -> Result<bool> {
        let Name { text, simple } = name;
        if let Some(plain) = self.plain.as_ref().filter(|_| simple) {
            return Ok(if self.role == Role::Subtree { plain.within(text) } else { plain.ends(text) });
        }
        let engine = self.engine(budget)?;
        if simple && !(text.ends_with(&engine.tail) && engine.holds(text)) {
            return Ok(false);
        }
        match &engine.linear {
            Some(linear) if simple => self.spend(budget, || linear.is_match(text)),
            _ => {
                let full = self.full(engine, budget)?;
                self.spend(budget, || full.is_match(text))?.map_err(|error| self.failed(&error))
            }
        }
    }

    /// Texts of which every simple name that matches holds one; none if there is no telling.
    fn texts(&self) -> Vec<String> {
        match (&self.plain, self.engine.get()) {
            (Some(plain), _) => vec![plain.longest_text()],
            (None, Some(engine)) => engine.texts.clone(),
            (None, None) => Vec::new(),
        }
    }

    /// The number of the layer that the name is in, as its digits, if the pattern of a list of layers matches.
    ///
    /// Empty where a pattern with alternatives matches without a number.
    pub fn layer<'a>(&self, name: Name<'a>, budget: &Budget) -> Result<Option<&'a str>> {
        let Name { text, simple } = name;
        let engine = self.engine(budget)?;
        let group = engine.index_group.unwrap_or_default();
        match &engine.linear {
            Some(linear) if simple => {
                let found = self.spend(budget, || linear.captures(text))?;
                Ok(found.map(|found| found.get(group).map_or("", |text| text.as_str())))
            }
            _ => {
                let full = self.full(engine, budget)?;
                let found = self.spend(budget, || full.captures(text))?.map_err(|error| self.failed(&error))?;
                Ok(found.map(|found| found.get(group).map_or("", |text| text.as_str())))
            }
        }
    }

    fn engine(&self, budget: &Budget) -> Result<&Engine> {
        if let Some(engine) = self.engine.get() {
            return Ok(engine);
        }
        let made = self.spend(budget, || Engine::new(&self.source, self.role))?;
        let engine = made.map_err(|reason| self.fault(&reason))?;
        if engine.linear.is_none() {
            self.full(&engine, budget)?;
        }
        Ok(self.engine.get_or_init(|| engine))
    }

    fn full<'a>(&self, engine: &'a Engine, budget: &Budget) -> Result<&'a fancy_regex::Regex> {
        if let Some(full) = engine.full.get() {
            return Ok(full);
        }
        let build = || fancy_regex::RegexBuilder::new(&engine.spelling).backtrack_limit(MAX_STEPS).build();
        let full = self.spend(budget, build)?.map_err(|error| self.failed(&error))?;
        Ok(engine.full.get_or_init(|| full))
    }

    fn spend<T>(&self, budget: &Budget, work: impl FnOnce() -> T) -> Result<T> {
        let costly = || self.fault("takes too long on this model's names; say it more simply, or list the names");
        budget.spend(work).ok_or_else(costly)
    }

    fn failed(&self, error: &fancy_regex::Error) -> Error {
        match error {
            fancy_regex::Error::RuntimeError(_) => self.fault(&format!(
                "needs more than {MAX_STEPS} steps for one name; say it more simply, or list the names"
            )),
            error => self.fault(&format!("cannot be matched: {}", show_name(&error.to_string()))),
        }
    }

    fn fault(&self, reason: &str) -> Error {
        Error::Target(format!("{} {reason}", self.label))
    }
}

impl Engine {
    /// Whether a simple name holds one of the texts, where looking is quicker than matching.
    fn holds(&self, name: &str) -> bool {
        !(1..=2).contains(&self.texts.len()) || self.texts.iter().any(|text| name.contains(text))
    }

    fn new(source: &str, role: Role) -> Result<Self, String> {
        let tree = parse::parse(&role.wrap(source)).map_err(|fault| match fault {
            Fault::Malformed(reason) => format!("is malformed: {reason}"),
            Fault::Unsupported(construct) => format!("has what is not supported: {construct}"),
        })?;
        let anchored = |spelled: &str| format!(r"\A(?:{spelled}){}", if role == Role::Whole { r"\z" } else { "" });
        // A match of the other roles need not reach the end of the name.
        let tail = if matches!(role, Role::Whole | Role::Suffix) { tree.node.tail() } else { String::new() };
        let linear = emit::linear(&tree.node).map(|spelled| {
            regex::RegexBuilder::new(&anchored(&spelled)).nest_limit(2_000).build().map_err(|error| match error {
                regex::Error::CompiledTooBig(_) => "is too large once its repetitions are written out".to_owned(),
                error => format!("cannot be matched: {}", show_name(&error.to_string())),
            })
        });
        Ok(Self {
            tail,
            texts: tree.node.texts(),
            linear: linear.transpose()?,
            full: OnceLock::new(),
            spelling: anchored(&emit::full(&tree.node)),
            index_group: tree.names.get("idx").copied(),
        })
    }
}

#[cfg(test)]
mod tests;
