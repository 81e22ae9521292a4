//! Short lists that select what long ones do.

use std::collections::{BTreeSet, HashSet};

use crate::error::{Error, Result, show_name};

/// The smallest list of dotted ends that match every name of `targets` and none of `others`, sorted.
///
/// Refuses names that no end can tell apart, as `head` and `decoder.head` where only the first is a target.
pub fn shortest_suffixes(targets: &[String], others: &[String]) -> Result<Vec<String>> {
    let taken: HashSet<&str> = others.iter().flat_map(|name| suffixes(name)).collect();
    let mut found = BTreeSet::new();
    for target in targets {
        // The shortest that will do covers whatever a longer one would, so there is no choice to make.
        let Some(suffix) = suffixes(target).find(|suffix| !taken.contains(suffix)) else {
            return Err(Error::Target(format!(
                "target_modules: no entry selects {} without selecting another module that ends alike; exclude that one",
                show_name(target)
            )));
        };
        found.insert(suffix.to_owned());
    }
    Ok(found.into_iter().collect())
}

/// The ends of a name that follow a dot, the shortest first, and the name itself.
fn suffixes(name: &str) -> impl Iterator<Item = &str> {
    let after_dots = name.rmatch_indices('.').filter_map(|(dot, _)| name.get(dot + 1..));
    after_dots.chain(std::iter::once(name)).filter(|suffix| !suffix.is_empty())
}
