//! Which modules of a model an adapter is for: PEFT's rules, applied to all names at once.
//!
//! For each module, in this order: `exclude_modules` takes it out; it is left alone if it is, or is within, one of
//! `modules_to_save`; a pattern has to match the whole name; of a list, an entry has to be the name or its end after a dot. A
//! name that only ends in an entry must also be in one of `layers_to_transform`, if there are any.

mod layers;
mod list;
mod nearest;
mod suffixes;

use crate::config::Names;
use crate::error::Result;
use crate::pattern::{Budget, Keys, Name, Pattern, Role};
use layers::Layers;
use list::{Hit, List};
use nearest::Nearest;
pub use suffixes::shortest_suffixes;

/// The word that stands for all linear layers.
const ALL_LINEAR: &str = "all-linear";

/// What to select from, and by what.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// The names of the model's modules; the root, which has none, is never selected.
    pub modules: &'a [String],
    /// What `all-linear` stands for.
    pub linear: &'a [String],
    /// `target_modules`.
    pub target_modules: Option<&'a Names>,
    /// `exclude_modules`.
    pub exclude_modules: Option<&'a Names>,
    /// `layers_to_transform`; none if empty.
    pub layers_to_transform: &'a [i64],
    /// `layers_pattern`; any list of layers if empty.
    pub layers_pattern: &'a [String],
    /// `modules_to_save`.
    pub modules_to_save: &'a [String],
    /// `feedforward_modules`.
    pub feedforward_modules: Option<&'a Names>,
    /// The names of the model's bare parameters, `<module>.<parameter>`.
    pub parameters: &'a [String],
    /// `target_parameters`.
    pub target_parameters: &'a [String],
    /// Fields whose keys are looked up for each target, in the order of the file.
    pub patterns: &'a [(String, Vec<String>)],
}

/// What one entry of a request matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The field, such as `target_modules`.
    pub field: String,
    /// The entry: a name, a pattern, a key or the number of a layer.
    pub entry: String,
    /// How many names it matches, whatever becomes of them.
    pub count: usize,
    /// For an entry that matches none: the name most like it, if one is.
    pub nearest: Option<String>,
}

/// What a request selects. All names are in the order given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Modules to adapt.
    pub targets: Vec<String>,
    /// Bare parameters to adapt.
    pub parameters: Vec<String>,
    /// Modules to train and save whole.
    pub modules_to_save: Vec<String>,
    /// Modules that `exclude_modules` matches.
    pub excluded: Vec<String>,
    /// For each target, whether `feedforward_modules` names it.
    pub feedforward: Vec<bool>,
    /// For each field of patterns: for each target, then each parameter, the first key that matches.
    pub pattern_index: Vec<(String, Vec<Option<usize>>)>,
    /// What each entry matched.
    pub report: Vec<Row>,
}

/// The end of one of `names` that the writer of `entry`, which matches none, may have meant.
#[must_use]
pub fn nearest_end(names: &[String], entry: &str) -> Option<String> {
    Nearest::new(names).end(entry, 0)
}

/// One field that names modules.
enum Matcher<'a> {
    Nothing,
    All(List<'a>),
    List(List<'a>),
    Pattern { pattern: Box<Pattern>, text: &'a str, count: usize },
}

impl<'a> Matcher<'a> {
    fn new(field: &str, names: Option<&'a Names>, budget: &Budget) -> Result<Self> {
        Ok(match names {
            None => Self::Nothing,
            Some(Names::List(list)) => Self::List(List::new(list)),
            Some(Names::Pattern(text)) => {
                let pattern = Box::new(Pattern::new(field, text, Role::Whole, budget)?);
                Self::Pattern { pattern, text, count: 0 }
            }
        })
    }

    /// The same for `target_modules`, where one word is no pattern.
    fn targets(request: &Request<'a>, budget: &Budget) -> Result<Self> {
        match request.target_modules {
            Some(Names::Pattern(word)) if word.eq_ignore_ascii_case(ALL_LINEAR) => {
                Ok(Self::All(List::new(request.linear)))
            }
            names => Self::new("target_modules", names, budget),
        }
    }

    fn hit(&mut self, name: &str, budget: &Budget) -> Result<Option<Hit>> {
        Ok(match self {
            Self::Nothing => None,
            Self::All(list) => list.exact(name).then_some(Hit::Exact),
            Self::List(list) => list.hit(name),
            Self::Pattern { pattern, count, .. } => {
                let found = pattern.is_match(Name::new(name), budget)?;
                *count += usize::from(found);
                found.then_some(Hit::Exact)
            }
        })
    }

    fn report(&self, field: &str, nearest: &mut Nearest, report: &mut Vec<Row>) {
        match self {
            Self::Nothing => {}
            Self::All(list) => report.push(row(field, ALL_LINEAR, list.total(), None)),
            Self::List(list) => {
                report.extend(list.counts().map(|(entry, count)| row(field, entry, count, nearest.end(entry, count))));
            }
            Self::Pattern { text, count, .. } => report.push(row(field, text, *count, nearest.whole(text, *count))),
        }
    }
}

fn row(field: &str, entry: &str, count: usize, nearest: Option<String>) -> Row {
    Row { field: field.to_owned(), entry: entry.to_owned(), count, nearest }
}

/// Applies a request. Refuses patterns that are malformed or too costly.
pub fn select(request: &Request) -> Result<Selection> {
    let budget = Budget::default();
    let mut selection = Selection::default();
    let mut nearest = Nearest::new(request.modules);
    select_modules(request, &budget, &mut nearest, &mut selection)?;

    let mut saved = List::new(request.modules_to_save);
    let names = request.modules.iter().filter(|name| saved.hit(name).is_some());
    selection.modules_to_save = names.cloned().collect();
    let rows = saved.counts().map(|(entry, count)| row("modules_to_save", entry, count, nearest.end(entry, count)));
    selection.report.extend(rows);

    select_feedforward(request, &budget, &mut nearest, &mut selection)?;

    let mut parameters = List::new(request.target_parameters);
    let names = request.parameters.iter().filter(|name| parameters.hit(name).is_some());
    selection.parameters = names.cloned().collect();
    let mut nearest = Nearest::new(request.parameters);
    let rows =
        parameters.counts().map(|(entry, count)| row("target_parameters", entry, count, nearest.end(entry, count)));
    selection.report.extend(rows);

    for (field, keys) in request.patterns {
        look_up(field, keys, &budget, &mut selection)?;
    }
    Ok(selection)
}

fn select_modules(request: &Request, budget: &Budget, nearest: &mut Nearest, selection: &mut Selection) -> Result<()> {
    let mut targets = Matcher::targets(request, budget)?;
    let mut excludes = Matcher::new("exclude_modules", request.exclude_modules, budget)?;
    let mut layers = Layers::new(request.layers_to_transform, request.layers_pattern, budget)?;
    let saved = request.modules_to_save.iter();
    let saved =
        saved.map(|name| Pattern::new("modules_to_save", name, Role::Subtree, budget)).collect::<Result<Vec<_>>>()?;
    let is_saved = |name: &str| -> Result<bool> {
        let name = Name::new(name);
        for pattern in &saved {
            if pattern.is_match(name, budget)? {
                return Ok(true);
            }
        }
        Ok(false)
    };
    for name in request.modules.iter().filter(|name| !name.is_empty()) {
        // Asked of every name, so that the report counts what is excluded as well.
        let hit = targets.hit(name, budget)?;
        if excludes.hit(name, budget)?.is_some() {
            selection.excluded.push(name.clone());
            continue;
        }
        let selected = match hit {
            None => false,
            Some(_) if is_saved(name)? => false,
            Some(Hit::Exact) => true,
            Some(Hit::End) => layers.wants(name, budget)?,
        };
        if selected {
            selection.targets.push(name.clone());
        }
    }
    targets.report("target_modules", nearest, &mut selection.report);
    excludes.report("exclude_modules", nearest, &mut selection.report);
    layers.report(&mut selection.report);
    Ok(())
}

/// Which targets scale their inputs. A list's entries are ends of names, with or without a dot before them.
fn select_feedforward(
    request: &Request,
    budget: &Budget,
    nearest: &mut Nearest,
    selection: &mut Selection,
) -> Result<()> {
    let field = "feedforward_modules";
    if let Some(Names::List(entries)) = request.feedforward_modules {
        selection.feedforward =
            selection.targets.iter().map(|name| entries.iter().any(|entry| name.ends_with(entry.as_str()))).collect();
        for entry in entries {
            let count = selection.targets.iter().filter(|name| name.ends_with(entry.as_str())).count();
            selection.report.push(row(field, entry, count, nearest.end(entry, count)));
        }
        return Ok(());
    }
    let mut matcher = Matcher::new(field, request.feedforward_modules, budget)?;
    let names = selection.targets.iter();
    selection.feedforward = names.map(|name| Ok(matcher.hit(name, budget)?.is_some())).collect::<Result<_>>()?;
    matcher.report(field, nearest, &mut selection.report);
    Ok(())
}

/// Looks up the keys of one field for everything selected.
fn look_up(field: &str, keys: &[String], budget: &Budget, selection: &mut Selection) -> Result<()> {
    let patterns = Keys::new(field, keys.iter().map(String::as_str), Role::Suffix, budget)?;
    let mut counts = vec![0; keys.len()];
    let mut first = Vec::with_capacity(selection.targets.len() + selection.parameters.len());
    for name in selection.targets.iter().chain(&selection.parameters) {
        let found = patterns.matches(name, budget)?;
        for &index in &found {
            counts.get_mut(index).into_iter().for_each(|count| *count += 1);
        }
        first.push(found.first().copied());
    }
    let mut nearest = Nearest::new(&selection.targets);
    let rows = keys.iter().zip(counts).map(|(key, count)| row(field, key, count, nearest.end(key, count)));
    selection.report.extend(rows);
    selection.pattern_index.push((field.to_owned(), first));
    Ok(())
}

#[cfg(test)]
mod tests;
