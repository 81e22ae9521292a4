//! What stands against a merge, collected before anything is refused.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, show_name};

pub const NO_HOME: &str = "adapter modules have no home in the base";
pub const HOMELESS: &str = "adapter tensors have no home in the base";
pub const NO_PARTNER: &str = "adapter tensors lack their partner";
pub const BAD_SHAPE: &str = "adapter tensors have shapes that do not fit";
pub const UNKNOWN: &str = "adapter tensors have a name that their method does not use";
pub const UNDECLARED: &str = "adapter tensors name a weight of the base that the config does not declare";
pub const UNUSABLE: &str = "tensors have a type that cannot be merged (a quantized base?)";
pub const NONFINITE: &str = "adapter tensors are not finite (--allow-nonfinite merges them all the same)";

/// How many names an error lists of each kind.
const LISTED: usize = 6;

/// What other tools keep beside factors, by the last part of its name.
const FOREIGN: [(&str, &str); 4] = [
    ("alpha", "a LoRA's alpha, which PEFT keeps in its config"),
    ("dora_scale", "DoRA's magnitudes, which PEFT calls lora_magnitude_vector"),
    ("diff", "a difference of weights"),
    ("diff_b", "a difference of biases"),
];

const EXPERTS: &str = "experts are merged where the base stores them as the adapter names them; save the base with the version \
                       of transformers that the adapter was trained with";

const OTHER_TOOL: &str = "the file is another tool's, such as kohya's or ComfyUI's: convert it to PEFT's format";

const UNHOMED: &str = "name the tensor as the base does, or leave it out of the file; only a whole module that modules_to_save \
                       names and the base lacks may be new";

/// What stands against a merge, by kind.
#[derive(Debug, Default)]
pub struct Problems {
    kinds: Vec<(&'static str, Vec<String>)>,
    hint: Option<&'static str>,
    told: Vec<String>,
}

impl Problems {
    /// Notes that `item` has the fault `kind`, which reads on after "tensors" and before a colon.
    pub fn add(&mut self, kind: &'static str, item: impl Into<String>) {
        match self.kinds.iter_mut().find(|known| known.0 == kind) {
            Some((_, items)) => items.push(item.into()),
            None => self.kinds.push((kind, vec![item.into()])),
        }
    }

    /// Notes that the adapter holds `key` in full and the base has nothing of its kind, unless it is `near`.
    pub fn homeless(&mut self, key: &str, near: Option<&str>) {
        let leaf = key.rsplit('.').next().unwrap_or_default();
        let foreign = FOREIGN.iter().find(|(name, _)| *name == leaf).map(|(_, what)| format!(" ({what})"));
        self.hint = if foreign.is_some() { Some(OTHER_TOOL) } else { self.hint.or(Some(UNHOMED)) };
        let near = near.map(|near| format!(" (the base has {})", show_name(near)));
        self.add(HOMELESS, format!("{}{}", show_name(key), foreign.or(near).unwrap_or_default()));
    }

    /// Ends the list of what `adapter` has against it.
    pub fn end_of(&mut self, adapter: &Checkpoint, base: &Checkpoint) {
        let kinds = std::mem::take(&mut self.kinds);
        let list = |(kind, items): &(&str, Vec<String>)| {
            let shown: Vec<&str> = items.iter().take(LISTED).map(String::as_str).collect();
            let more = items.len().saturating_sub(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("{} {kind}: {}{more}", items.len(), shown.join(", "))
        };
        let lists: Vec<String> = kinds.iter().map(list).collect();
        if !lists.is_empty() {
            if kinds.iter().flat_map(|(_, items)| items).any(|item| item.contains(".experts")) {
                self.hint = Some(EXPERTS);
            }
            self.told.push(format!("{} does not fit {}: {}", file_of(adapter), file_of(base), lists.join("; ")));
        }
    }

    /// One error that lists them all, if there are any.
    pub fn refuse(self) -> Result<()> {
        if self.told.is_empty() {
            return Ok(());
        }
        let hint = self.hint.unwrap_or("check that this is the base that the adapter was trained on");
        Err(Error::Merge(format!("{}; hint: {hint}", self.told.join("; "))))
    }
}

/// The path that a checkpoint was opened from.
fn file_of(checkpoint: &Checkpoint) -> String {
    show_name(&checkpoint.path().to_string_lossy())
}
