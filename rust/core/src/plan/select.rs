//! Which of the changed tensors are merged: `--only` and `--skip`.

use std::collections::BTreeSet;

use super::base::Base;
use super::draft::Drafts;
use crate::error::{Error, Result, show_name};
use crate::pattern::{Budget, Name, Pattern, Role};
use crate::target::nearest_end;

/// Leaves of `drafts` those that a pattern of `only` names, if there is one, and none that a pattern of `skip` does.
///
/// A pattern names a tensor, or a module and all that is in it: by the whole name or the end of it after a dot, in Python's
/// `re` syntax, as the entries of `modules_to_save` do. Refuses one that matches no tensor of the model.
pub fn select(drafts: &mut Drafts, base: &Base, only: &[String], skip: &[String]) -> Result<()> {
    if only.is_empty() && skip.is_empty() {
        return Ok(());
    }
    let budget = Budget::default();
    let every: BTreeSet<String> = base.names().chain(drafts.keys().map(String::as_str)).map(str::to_owned).collect();
    for (option, patterns) in
        [("--only", only), ("--skip", skip)].into_iter().filter(|(_, patterns)| !patterns.is_empty())
    {
        let mut named: BTreeSet<&str> = BTreeSet::new();
        for text in patterns {
            let pattern = Pattern::new(option, text, Role::Subtree, &budget)?;
            let mut matched = false;
            for name in &every {
                if pattern.is_match(Name::new(name), &budget)? {
                    matched = true;
                    named.insert(name);
                }
            }
            if !matched {
                return Err(stray(option, text, &every));
            }
        }
        drafts.retain(|name, _| named.contains(name.as_str()) == (option == "--only"));
    }
    Ok(())
}

/// The refusal of a pattern that matches nothing.
fn stray(option: &str, text: &str, every: &BTreeSet<String>) -> Error {
    let modules = every.iter().filter_map(|name| Some(name.rsplit_once('.')?.0.to_owned()));
    let names: Vec<String> = modules.chain(every.iter().cloned()).collect();
    let hint = nearest_end(&names, text).map_or_else(
        || "--dry-run lists the tensors that change".to_owned(),
        |near| format!("the nearest name is {}", show_name(&near)),
    );
    Error::Merge(format!("{option} {} matches no tensor of the model; hint: {hint}", show_name(text)))
}
