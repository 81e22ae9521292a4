//! What a config's patterns select of a model's layers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Layer, Outline, added, block};
use crate::config::{AdapterConfig, Method, Names};
use crate::error::{Error, Result, show_name};
use crate::target::{Request, Selection, select};

/// The word that stands for all linear layers.
const ALL_LINEAR: &str = "all-linear";

/// Layers of a kind that LoRA adapts.
const ADAPTED: [&str; 8] = ["linear", "embedding", "conv1d", "conv2d", "conv3d", "attention", "parameter", "quantized"];

/// What an adapter would be for.
#[derive(Debug, Clone, PartialEq)]
pub struct Aim {
    /// What the patterns select.
    pub selection: Selection,
    /// Which blocks of each stack hold a target, where any does.
    pub coverage: Vec<Coverage>,
    /// Numbers that the adapter's factors would hold, if it is a LoRA.
    pub parameters: Option<u64>,
    /// What looks wrong.
    pub warnings: Vec<String>,
}

/// Which blocks of one stack hold a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// The stack's name, such as `model.layers`.
    pub stack: String,
    /// The numbers of the blocks with a target.
    pub adapted: BTreeSet<usize>,
    /// The numbers of all blocks.
    pub blocks: BTreeSet<usize>,
}

impl Coverage {
    /// How much is covered, in a few words.
    #[must_use]
    pub fn what(&self) -> String {
        format!("{} of {} layers adapted in {}", self.adapted.len(), self.blocks.len(), show_name(&self.stack))
    }
}

/// Whether the config asks for all linear layers, which only the model's class knows.
#[must_use]
pub fn wants_all_linear(config: &AdapterConfig) -> bool {
    matches!(&config.targeting.target_modules, Some(Names::Pattern(word)) if word.eq_ignore_ascii_case(ALL_LINEAR))
}

/// What `config` selects of `outline`. Refuses patterns that are malformed or too costly, and `all-linear` where the model's
/// class was not asked.
pub fn aim(outline: &Outline, config: &AdapterConfig) -> Result<Aim> {
    let targeting = &config.targeting;
    if wants_all_linear(config) && outline.linear.is_none() {
        return Err(Error::Target(
            "target_modules is all-linear, and only the model's class says which layers those are; hint: name the layers"
                .to_owned(),
        ));
    }
    let lora = config.lora();
    let (feedforward, parameters, patterns) = match &config.method {
        Method::Lora(lora) => (
            None,
            lora.target_parameters.as_deref().unwrap_or_default(),
            vec![
                ("rank_pattern".to_owned(), lora.rank_pattern.iter().map(|(key, _)| key.clone()).collect()),
                ("alpha_pattern".to_owned(), lora.alpha_pattern.iter().map(|(key, _)| key.clone()).collect()),
            ],
        ),
        Method::Ia3(fields) => (fields.feedforward_modules.as_ref(), &[][..], Vec::new()),
        _ => (None, &[][..], Vec::new()),
    };
    let selection = select(&Request {
        modules: &outline.modules,
        linear: outline.linear.as_deref().unwrap_or_default(),
        target_modules: targeting.target_modules.as_ref(),
        exclude_modules: targeting.exclude_modules.as_ref(),
        layers_to_transform: targeting.layers_to_transform.as_deref().unwrap_or_default(),
        layers_pattern: targeting.layers_pattern.as_deref().unwrap_or_default(),
        modules_to_save: targeting.modules_to_save.as_deref().unwrap_or_default(),
        feedforward_modules: feedforward,
        parameters: &outline.parameters,
        target_parameters: parameters,
        patterns: &patterns,
    })?;
    let layers: HashMap<&str, &Layer> = outline.layers.iter().map(|layer| (layer.name.as_str(), layer)).collect();
    let mut warnings = unmatched(&selection);
    let mut unfit: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut count = lora.map(|_| 0_u64);
    for name in selection.targets.iter().chain(&selection.parameters) {
        let layer = layers.get(name.as_str());
        let kind = layer.map_or("no layer", |layer| layer.kind.as_str());
        if lora.is_some() && !ADAPTED.contains(&kind) {
            unfit.entry(kind).or_default().push(name);
        }
        if let (Some(sum), Some(lora), Some(layer)) = (&mut count, lora, layer) {
            let (rank, _) = lora.rank_and_scaling(name)?;
            *sum = sum.saturating_add(added(&layer.kind, &layer.shape, rank).unwrap_or(0));
        }
    }
    warnings.extend(unfit.iter().map(|(kind, names)| {
        let first = names.first().map(|name| show_name(name)).unwrap_or_default();
        format!(
            "{} targets cannot be adapted, being {kind}: {first}{}",
            names.len(),
            if names.len() > 1 { ", …" } else { "" }
        )
    }));
    let coverage = coverage(outline, &selection);
    if targeting.layers_to_transform.is_none() {
        warnings.extend(coverage.iter().filter(|part| part.adapted.len() < part.blocks.len()).map(Coverage::what));
    }
    if selection.targets.is_empty() && selection.parameters.is_empty() {
        warnings.insert(0, "nothing would be adapted".to_owned());
    }
    Ok(Aim { selection, coverage, parameters: count, warnings })
}

/// The entries that match nothing.
fn unmatched(selection: &Selection) -> Vec<String> {
    let lost = selection.report.iter().filter(|row| row.count == 0);
    lost.map(|row| {
        let nearest = row.nearest.as_ref().map(|name| format!("; did you mean {}?", show_name(name)));
        format!("{}: {} matches nothing{}", row.field, show_name(&row.entry), nearest.unwrap_or_default())
    })
    .collect()
}

/// The blocks with a target, for each stack that has any.
fn coverage(outline: &Outline, selection: &Selection) -> Vec<Coverage> {
    let mut adapted: HashMap<&str, BTreeSet<usize>> = HashMap::new();
    for (stack, number) in selection.targets.iter().chain(&selection.parameters).filter_map(|name| block(name)) {
        adapted.entry(stack).or_default().insert(number);
    }
    let stacks = outline.stacks().into_iter();
    stacks
        .filter_map(|(stack, blocks)| Some(Coverage { adapted: adapted.remove(stack.as_str())?, stack, blocks }))
        .collect()
}
