//! What stands against a merge: faults of adapters, collected before anything is refused, what this tool does not merge, values
//! that are not finite, and choices that name nothing.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde_json::Value;

use super::adapter::Adapter;
use super::base::Base;
use super::changes::{Draft, Drafts};
use crate::checkpoint::Checkpoint;
use crate::config::{AdapterConfig, Init, Method, OftFields};
use crate::error::{Error, Result, show_name, show_path};
use crate::kernels::values::all_finite;
use crate::pattern::{Budget, Name, Pattern, Role};
use crate::target::nearest_end;
use crate::threads;

pub const NO_HOME: &str = "adapter modules have no home in the base";
pub const HOMELESS: &str = "adapter tensors have no home in the base";
pub const NO_PARTNER: &str = "adapter tensors lack their partner";
pub const BAD_SHAPE: &str = "adapter tensors have shapes that do not fit";
pub const UNKNOWN: &str = "adapter tensors have a name that their method does not use";
pub const UNDECLARED: &str = "adapter tensors name a weight of the base that the config does not declare";
pub const UNUSABLE: &str = "tensors have a type that cannot be merged (a quantized base?)";
pub const INTEGER: &str = "adapter tensors are of an integer type, which their method does not have";
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
            self.told.push(format!(
                "{} does not fit {}: {}",
                show_path(adapter.path()),
                show_path(base.path()),
                lists.join("; ")
            ));
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

/// Starts that are taken out of the base when training begins, so that the adapter alone is not what was trained.
const RESIDUAL: [&str; 5] = ["pissa", "olora", "corda", "lora_ga", "loftq"];

const CONVERT: &str = "run the peftrs-merge of the Python package, or save the adapter with \
                       path_initial_model_for_weight_conversion, which makes it a plain LoRA";

/// Variants whose update is not one weight.
const ONLINE: [&str; 3] = ["use_qalora", "alora_invocation_tokens", "arrow_config"];

const IN_PYTHON: &str =
    "run the peftrs-merge of the Python package, or PeftModel.from_pretrained(...).merge_and_unload()";

/// Refuses an adapter whose method or variant nobody at hand can compute, and a base whose weights are packed.
pub fn check(adapter: &Adapter, model: Option<&Value>) -> Result<()> {
    check_config(&adapter.config, adapter.apply.is_some(), model)
}

fn check_config(config: &AdapterConfig, can_elsewhere: bool, model: Option<&Value>) -> Result<()> {
    if let Some(name) = config.lora().and_then(|lora| lora.variants.iter().find(|name| ONLINE.contains(name))) {
        let way = "its update depends on the input, load it as an adapter";
        return Err(refused(&format!("adapters with {name} are"), way));
    }
    if let Some((what, way)) = elsewhere(config).filter(|_| !can_elsewhere) {
        return Err(refused(&what, way));
    }
    if let Method::Oft(OftFields { doubt: Some(doubt), .. }) = &config.method {
        return Err(Error::Merge(format!("the OFT adapter {doubt}")));
    }
    if let Some(method) = model.and_then(|model| model.get("quantization_config")).filter(|method| method.is_object()) {
        let name = method.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method");
        let way = "merge into the checkpoint that it was made from, and quantize the result";
        return Err(refused(&format!("bases quantized by {} are", show_name(name)), way));
    }
    Ok(())
}

/// What of an adapter has no kernel here, and what to do without one.
pub fn elsewhere(config: &AdapterConfig) -> Option<(String, &'static str)> {
    match &config.method {
        Method::Lora(lora) => match (&lora.init_lora_weights, lora.variants.first()) {
            (_, Some(name)) => Some((format!("adapters with {name} are"), IN_PYTHON)),
            (Init::Named(start), None)
                if RESIDUAL.iter().any(|known| start.to_ascii_lowercase().starts_with(known)) =>
            {
                Some((format!("adapters with init_lora_weights={} are", show_name(start)), CONVERT))
            }
            _ => None,
        },
        Method::Ia3(_) | Method::Oft(_) => None,
        Method::Other(_) => Some((format!("adapters of type {} are", show_name(&config.peft_type)), IN_PYTHON)),
    }
}

/// Refuses a weight other than 1 for an adapter that does more than add to weights.
pub fn check_weight(adapter: &Adapter, drafts: &Drafts) -> Result<()> {
    let adds = |draft: &Draft| draft.whole.is_none() && draft.updates.iter().all(|update| update.change.is_additive());
    let Some((name, _)) = drafts.iter().find(|(_, draft)| !adds(draft)).filter(|_| !is_one(adapter.weight)) else {
        return Ok(());
    };
    Err(Error::Merge(format!(
        "{} cannot have the weight {}: it does not add to {}, so there is nothing that a weight multiplies; hint: leave out \
         @{}",
        adapter.shown(),
        adapter.weight,
        show_name(name),
        adapter.weight
    )))
}

#[allow(clippy::float_cmp, reason = "a weight that is left out is exactly one")]
fn is_one(weight: f64) -> bool {
    weight == 1.0
}

fn refused(what: &str, way: &str) -> Error {
    Error::Merge(format!("{what} not merged by this version; hint: {way}"))
}

/// Whether the model keeps its linear layers as (in, out), as those of transformers that use its `Conv1D` do.
pub fn stores_transposed(model: Option<&Value>) -> bool {
    let kind = model.and_then(|model| model.get("model_type")).and_then(Value::as_str);
    kind.is_some_and(|kind| ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"].contains(&kind))
}

/// Values read at once when the adapter is searched for infinities and NaN.
const SCAN_BYTES: usize = 1 << 20;

/// Reports the tensors of the adapter that hold an infinity or NaN.
pub fn find_nonfinite(adapter: &Checkpoint, problems: &mut Problems) -> Result<()> {
    let names: Vec<&str> = adapter.names().collect();
    let scan = |name: &&str| -> Result<bool> {
        let Some(entry) = adapter.entry(name).filter(|entry| entry.dtype.is_adapter_float()) else { return Ok(true) };
        let mut buffer = vec![0; SCAN_BYTES.min(entry.bytes())];
        let mut offset = 0;
        while offset < entry.bytes() {
            let length = SCAN_BYTES.min(entry.bytes() - offset);
            let Some(part) = buffer.get_mut(..length) else { break };
            adapter.read_range(name, offset as u64, part)?;
            if !all_finite(entry.dtype, part) {
                return Ok(false);
            }
            offset += length;
        }
        Ok(true)
    };
    let finite: Vec<bool> = threads::install(|| names.par_iter().map(scan).collect())?;
    names
        .iter()
        .zip(finite)
        .filter(|(_, finite)| !finite)
        .for_each(|(name, _)| problems.add(NONFINITE, show_name(name)));
    Ok(())
}

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn config(fields: &Value) -> AdapterConfig {
        AdapterConfig::parse(&fields.to_string(), "adapter_config.json").unwrap()
    }

    #[test]
    fn plain_lora_passes() {
        let config = config(&json!({"peft_type": "LORA", "init_lora_weights": "gaussian", "use_bdlora": null}));
        check_config(&config, false, Some(&json!({"quantization_config": null}))).unwrap();
    }

    #[test]
    fn what_is_not_plain_lora_is_named_with_the_way_out() {
        for (fields, named) in [
            (json!({"peft_type": "LOHA"}), "type LOHA"),
            (json!({"peft_type": "OFT", "peft_version": "0.20.0"}), "has no `oft_block_size`"),
            (json!({"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"}), "init_lora_weights=pissa_niter_16"),
            (json!({"peft_type": "LORA", "kasa_config": {}}), "kasa_config"),
            (json!({"peft_type": "LORA", "use_qalora": true}), "use_qalora"),
        ] {
            let message = check_config(&config(&fields), false, None).unwrap_err().to_string();
            assert!(message.contains(named) && message.contains("; hint: "), "{message}");
        }
        let model = json!({"quantization_config": {"quant_method": "gptq"}});
        let message =
            check_config(&config(&json!({"peft_type": "LORA"})), false, Some(&model)).unwrap_err().to_string();
        assert!(message.contains("quantized by gptq"), "{message}");
    }
}
