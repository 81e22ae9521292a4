//! The fields of LoRA, and the rank and scaling that they give a module.

use std::sync::OnceLock;

use serde_json::Value;

use super::MAX_SIZE;
use super::fields::{Fields, integer, integers, number};
use crate::error::{Error, Result, show_name};
use crate::pattern::{Budget, Keys, Role};

/// The most layers that replication may make.
const MAX_LAYERS: i64 = 16_384;

/// How the factors start, `init_lora_weights`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Init {
    /// The default, or none at all.
    Flag(bool),
    /// A named way, such as `pissa`.
    Named(String),
}

/// Which rows of which embeddings are trained, `trainable_token_indices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenIndices {
    /// Rows of the input embedding.
    Input(Vec<usize>),
    /// Rows by the name of an embedding, or its end after a dot.
    ByName(Vec<(String, Vec<usize>)>),
}

/// The fields of LoRA.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "the format has these flags")]
pub struct LoraFields {
    /// The rank where no pattern gives another.
    pub r: usize,
    /// alpha where no pattern gives another.
    pub lora_alpha: f64,
    /// Whether the scaling is alpha / sqrt(r) instead of alpha / r.
    pub use_rslora: bool,
    /// Whether there are magnitudes (DoRA).
    pub use_dora: bool,
    /// Whether the second factor has a bias.
    pub lora_bias: bool,
    /// Whether the base stores weights as (in, out).
    pub fan_in_fan_out: bool,
    /// Which of the base's biases are trained: none, all or `lora_only`.
    pub bias: String,
    /// Ranks by pattern, in the order of the file.
    pub rank_pattern: Vec<(String, u64)>,
    /// alphas by pattern, in the order of the file.
    pub alpha_pattern: Vec<(String, f64)>,
    /// How the factors start.
    pub init_lora_weights: Init,
    /// Bare parameters that are adapted.
    pub target_parameters: Option<Vec<String>>,
    /// Rows of embeddings that are trained whole.
    pub trainable_token_indices: Option<TokenIndices>,
    /// Ranges of layers that make up the deeper model.
    pub layer_replication: Option<Vec<(usize, usize)>>,
    /// Which of the variants' fields are set: each changes what the tensors mean.
    pub variants: Vec<&'static str>,
    rank_keys: OnceLock<(Keys, Budget)>,
    alpha_keys: OnceLock<(Keys, Budget)>,
}

impl LoraFields {
    /// The rank and the scaling of the update of `module`, by the first key of each pattern that matches the path.
    pub fn rank_and_scaling(&self, module: &str) -> Result<(usize, f64)> {
        let rank = match lookup(&self.rank_pattern, &self.rank_keys, "rank_pattern", module)? {
            Some(&rank) => usize::try_from(rank).unwrap_or(usize::MAX),
            None => self.r,
        };
        let alpha =
            *lookup(&self.alpha_pattern, &self.alpha_keys, "alpha_pattern", module)?.unwrap_or(&self.lora_alpha);
        let scaling = self.scaling(rank, alpha);
        if !scaling.is_finite() {
            let what = format!("scaling of {} is not finite: alpha {alpha}, rank {rank}", show_name(module));
            return Err(Error::config("adapter config", what));
        }
        Ok((rank, scaling))
    }

    /// What an update of that rank is multiplied by.
    #[must_use]
    pub fn scaling(&self, rank: usize, alpha: f64) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "a rank is at most 65,536")]
        let rank = rank as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// The rows of the embedding `module` that are trained whole; those of a plain list are any embedding's that is asked for.
    #[must_use]
    pub fn token_indices(&self, module: &str) -> Vec<usize> {
        match &self.trainable_token_indices {
            None => Vec::new(),
            Some(TokenIndices::Input(indices)) => indices.clone(),
            Some(TokenIndices::ByName(entries)) => entries
                .iter()
                .find(|(name, _)| {
                    module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                })
                .map(|(_, indices)| indices.clone())
                .unwrap_or_default(),
        }
    }
}

fn lookup<'a, T>(
    pattern: &'a [(String, T)],
    keys: &OnceLock<(Keys, Budget)>,
    field: &str,
    module: &str,
) -> Result<Option<&'a T>> {
    if pattern.is_empty() {
        return Ok(None);
    }
    let (compiled, budget) = if let Some(compiled) = keys.get() {
        compiled
    } else {
        let budget = Budget::default();
        let compiled = Keys::new(field, pattern.iter().map(|(key, _)| key.as_str()), Role::Suffix, &budget)?;
        keys.get_or_init(|| (compiled, budget))
    };
    Ok(compiled.first(module, budget)?.and_then(|index| pattern.get(index)).map(|(_, value)| value))
}

/// The sub-configs, which are kept unread, and the number of them that change what the tensors mean.
const SUBCONFIGS: [&str; 11] = [
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
];

pub(super) fn read(fields: &mut Fields, warnings: &mut Vec<String>) -> LoraFields {
    let mut variants = subconfigs(fields, warnings);
    fields.fraction("lora_dropout");
    fields.text("megatron_core");
    fields.boolean("ensure_weight_tying", false);
    if fields.boolean("use_qalora", false) {
        variants.push("use_qalora");
    }
    fields.integer("qalora_group_size", 1..=i64::from(u32::MAX), 16);
    if fields.integers("alora_invocation_tokens", &(0..=i64::MAX)).is_some() {
        variants.push("alora_invocation_tokens");
    }
    let lora_alpha = fields.number("lora_alpha", 8.0);
    let alpha_pattern = fields.entries("alpha_pattern", number);
    let negative = alpha_pattern.iter().filter(|(_, alpha)| *alpha < 0.0).count() + usize::from(lora_alpha < 0.0);
    if negative > 0 {
        warnings.push("alpha is negative, so the update is subtracted".to_owned());
    }
    let rank = |value: &Value| integer(value, &(1..=MAX_SIZE)).map(i64::unsigned_abs);
    LoraFields {
        r: usize::try_from(fields.integer("r", 1..=MAX_SIZE, 8)).unwrap_or_default(),
        lora_alpha,
        use_rslora: fields.boolean("use_rslora", false),
        use_dora: fields.boolean("use_dora", false),
        lora_bias: fields.boolean("lora_bias", false),
        fan_in_fan_out: fields.boolean("fan_in_fan_out", false),
        bias: fields.choice("bias", &["none", "all", "lora_only"]),
        rank_pattern: fields.entries("rank_pattern", rank),
        alpha_pattern,
        init_lora_weights: init(fields),
        target_parameters: fields.strings("target_parameters"),
        trainable_token_indices: token_indices(fields),
        layer_replication: layer_replication(fields),
        variants,
        rank_keys: OnceLock::new(),
        alpha_keys: OnceLock::new(),
    }
}

/// The sub-configs that are set and change what the tensors mean.
fn subconfigs(fields: &mut Fields, warnings: &mut Vec<String>) -> Vec<&'static str> {
    let mut variants = Vec::new();
    for (index, name) in SUBCONFIGS.into_iter().enumerate() {
        let Some(object) = fields.object(name) else { continue };
        if index < 5 {
            variants.push(name);
        }
        let opened =
            ["cache_file", "covariance_file"].into_iter().filter(|key| object.get(*key).is_some_and(|v| !v.is_null()));
        warnings.extend(opened.map(|key| format!("`{key}` of `{name}` is kept but never opened")));
        if name == "runtime_config" {
            warnings.push("`runtime_config` is ignored: it is set where the adapter is used".to_owned());
        }
    }
    variants
}

fn init(fields: &mut Fields) -> Init {
    let Some(value) = fields.value("init_lora_weights") else { return Init::Flag(true) };
    let found = match value {
        Value::Bool(flag) => Ok(Init::Flag(*flag)),
        Value::String(name) => Ok(Init::Named(name.clone())),
        _ => Err("true, false or a string".to_owned()),
    };
    fields.checked("init_lora_weights", value, found).unwrap_or(Init::Flag(true))
}

fn indices(value: &Value) -> Result<Vec<usize>, String> {
    let list = integers(value, &(0..=i64::MAX))?;
    Ok(list.into_iter().map(|index| usize::try_from(index).unwrap_or(usize::MAX)).collect())
}

fn token_indices(fields: &mut Fields) -> Option<TokenIndices> {
    let name = "trainable_token_indices";
    let value = fields.set(name)?;
    if value.is_object() {
        return Some(TokenIndices::ByName(fields.entries(name, indices)));
    }
    fields.checked(name, value, indices(value)).map(TokenIndices::Input)
}

fn layer_replication(fields: &mut Fields) -> Option<Vec<(usize, usize)>> {
    let name = "layer_replication";
    let value = fields.set(name)?;
    let range = |pair: &Value| match integers(pair, &(0..=MAX_LAYERS)).ok()?.as_slice() {
        &[start, end] if start < end => Some((usize::try_from(start).ok()?, usize::try_from(end).ok()?)),
        _ => None,
    };
    let ranges: Option<Vec<_>> = value.as_array().and_then(|list| list.iter().map(range).collect());
    let most = usize::try_from(MAX_LAYERS).unwrap_or_default();
    let found = ranges.filter(|ranges| ranges.iter().map(|(start, end)| end - start).sum::<usize>() <= most);
    fields.checked(
        name,
        value,
        found.ok_or_else(|| format!("a list of [start, end) pairs of at most {MAX_LAYERS} layers")),
    )
}
