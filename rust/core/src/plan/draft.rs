//! What one or several adapters do to each parameter of the base, put together in the order in which they apply.

use std::collections::BTreeMap;

use super::adapter::Adapter;
use super::update::{Change, Update};
use crate::error::{Error, Result, show_name};

/// What becomes of one parameter.
#[derive(Debug, Default)]
pub struct Draft {
    /// The adapter that holds it in full, and its key there.
    pub whole: Option<(usize, String)>,
    /// What changes its values, the first to act first.
    pub updates: Vec<Update>,
}

/// Parameters by their names in the base.
pub type Drafts = BTreeMap<String, Draft>;

impl Draft {
    /// Adds what `other`, a later adapter, does to the same parameter.
    fn append(&mut self, other: Self) {
        self.whole = self.whole.take().or(other.whole);
        let (input, output): (Vec<_>, Vec<_>) =
            other.updates.into_iter().partition(|update| update.change.is_on_input());
        self.updates.splice(..0, input);
        self.updates.extend(output);
    }
}

/// The drafts of all adapters as one. Refuses what depends on more than their order.
pub fn combine(all: Vec<Drafts>, adapters: &[Adapter]) -> Result<Drafts> {
    let mut combined = Drafts::new();
    for drafts in all {
        for (name, draft) in drafts {
            if let Some(earlier) = combined.get(&name) {
                check(&name, earlier, &draft, adapters)?;
            }
            combined.entry(name).or_default().append(draft);
        }
    }
    Ok(combined)
}

/// Refuses two adapters that both set values of `name`, unless they set the same.
fn check(name: &str, one: &Draft, other: &Draft, adapters: &[Adapter]) -> Result<()> {
    let shown = |index: usize| adapters.get(index).map(Adapter::shown).unwrap_or_default();
    let of = |draft: &Draft| {
        let update = draft.updates.first().map(|update| update.adapter);
        shown(draft.whole.as_ref().map(|(index, _)| *index).or(update).unwrap_or_default())
    };
    let refuse = |what: &str| {
        Err(Error::Merge(format!(
            "{} and {} {what} {}; hint: merge one of them, and the other into the result if that is what you mean",
            of(one),
            of(other),
            show_name(name)
        )))
    };
    let is_elsewhere = |update: &Update| matches!(update.change, Change::Elsewhere(_));
    if one.updates.iter().chain(&other.updates).any(is_elsewhere) {
        return refuse("change, one of them in Python,");
    }
    match (&one.whole, &other.whole) {
        (Some(_), Some(_)) if !one.updates.is_empty() || !other.updates.is_empty() => refuse("both replace and change"),
        (Some(one), Some(other)) if !same(one, other, adapters)? => refuse("hold different values of"),
        (Some(_), None) | (None, Some(_)) => refuse("replace and change"),
        _ => {
            let rows: Vec<usize> = rows(one).collect();
            match rows.iter().find(|row| self::rows(other).any(|other| other == **row)) {
                Some(row) => refuse(&format!("both replace row {row} of")),
                None => Ok(()),
            }
        }
    }
}

/// The rows that are replaced.
fn rows(draft: &Draft) -> impl Iterator<Item = usize> + '_ {
    let indices = |update| match update {
        &Update { change: Change::Tokens { ref indices, .. }, .. } => indices.as_slice(),
        _ => &[],
    };
    draft.updates.iter().flat_map(move |update| indices(update).iter().copied())
}

/// Whether two tensors of adapters have the same type, shape and bytes.
pub fn same(one: &(usize, String), other: &(usize, String), adapters: &[Adapter]) -> Result<bool> {
    let find = |(index, key): &(usize, String)| {
        let checkpoint = &adapters.get(*index)?.checkpoint;
        Some((checkpoint, checkpoint.entry(key)?))
    };
    let (Some((a, entry)), Some((b, against))) = (find(one), find(other)) else { return Ok(false) };
    Ok(entry.dtype == against.dtype && entry.shape == against.shape && a.read(&one.1)? == b.read(&other.1)?)
}
