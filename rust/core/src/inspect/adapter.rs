//! An adapter by its config and the header of its weights, and the norms of its updates by their factors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::gram::{Matrix, by_columns, by_rows, root, singular_values};
use crate::checkpoint::{Checkpoint, Links};
use crate::config::{AdapterConfig, Init, LoraFields, Names, read_text};
use crate::error::{Error, Result, show_name};
use crate::kernels::values::widen;
use crate::keys::{PREFIX, without_base_layer};

/// How slots start that are not named after their method.
const SLOTS: [&str; 4] = ["lora_", "hada_", "token_adapter", "trainable_tokens_"];

/// The largest rank whose spectrum is computed; the cost grows with its cube.
const MAX_SPECTRUM: usize = 512;

/// An open adapter.
#[derive(Debug)]
pub struct Adapter {
    /// Its folder.
    pub path: PathBuf,
    /// Its config.
    pub config: AdapterConfig,
    /// The config's values as the file has them.
    pub fields: Map<String, Value>,
    /// Its tensors.
    pub weights: Checkpoint,
    /// What it holds for each module, by path.
    pub modules: BTreeMap<String, Module>,
}

/// What an adapter holds for one module.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Module {
    /// Its tensors: what each is for the module, and its key.
    pub tensors: Vec<(String, String)>,
    /// Whether they are the module's own parameters, trained and saved whole.
    pub whole: bool,
    /// The update of low rank, if that is what they make.
    pub low_rank: Option<LowRank>,
}

/// An update `scaling * up @ down`.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// The key of the factor of shape (out, rank).
    pub up: String,
    /// The key of the factor of shape (rank, in).
    pub down: String,
    /// The rank of the factors.
    pub rank: usize,
    /// The rank that the config gives the module.
    pub config_rank: usize,
    /// alpha / rank or alpha / sqrt(rank).
    pub scaling: f64,
    /// How many matrices the weight holds: one, or one an expert.
    pub count: usize,
    /// Sizes of what the update maps from and to.
    pub sizes: [usize; 2],
}

/// The norms of an update and its factors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norms {
    /// Of the factor of shape (rank, in).
    pub down: f64,
    /// Of the factor of shape (out, rank).
    pub up: f64,
    /// Of `scaling * up @ down`, without what DoRA makes of it.
    pub update: f64,
    /// The largest singular value of the update; none for a stack of experts.
    pub largest: Option<f64>,
    /// exp of the entropy of the singular values' shares: how many directions the update uses (Roy & Vetterli, 2007).
    pub effective_rank: Option<f64>,
}

impl Adapter {
    /// Opens the adapter in `folder`; only the config and the header of the weights are read.
    pub fn open(folder: &Path, links: Links) -> Result<Self> {
        let (text, mut warnings) = read_text(folder)?;
        let origin = folder.join(crate::checkpoint::ADAPTER_CONFIG);
        let mut config = AdapterConfig::parse(&text, &origin.to_string_lossy())?;
        config.warnings.retain(|warning| !warnings.contains(warning));
        warnings.append(&mut config.warnings);
        config.warnings = warnings;
        let fields = serde_json::from_str(&text).map_err(|error| Error::checkpoint(&origin, error.to_string()))?;
        let weights = Checkpoint::open_adapter(folder, links)?;
        let mut modules = modules(&weights, &config);
        if let Some(lora) = config.lora() {
            for (path, module) in &mut modules {
                module.low_rank = low_rank(&weights, lora, path, module)?;
            }
        }
        Ok(Self { path: folder.to_owned(), config, fields, weights, modules })
    }

    /// The updates of low rank with their modules' paths.
    pub fn updates(&self) -> impl Iterator<Item = (&str, &LowRank)> {
        self.modules.iter().filter_map(|(path, module)| Some((path.as_str(), module.low_rank.as_ref()?)))
    }

    /// How many numbers its tensors hold.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.weights.entries().map(|(_, entry)| entry.elements() as u64).sum()
    }

    /// What goes beyond a plain adapter of its kind, in a few words each.
    #[must_use]
    pub fn features(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(lora) = self.config.lora() {
            let flags = [
                (lora.use_rslora, "rsLoRA"),
                (lora.use_dora, "DoRA"),
                (lora.lora_bias, "lora_bias"),
                (lora.fan_in_fan_out, "fan_in_fan_out"),
                (lora.target_parameters.is_some(), "target_parameters"),
                (lora.trainable_token_indices.is_some(), "trainable tokens"),
                (lora.layer_replication.is_some(), "layer_replication"),
            ];
            found.extend(flags.iter().filter(|(set, _)| *set).map(|(_, name)| (*name).to_owned()));
            for (count, name) in
                [(lora.rank_pattern.len(), "rank_pattern"), (lora.alpha_pattern.len(), "alpha_pattern")]
            {
                if count > 0 {
                    found.push(format!("{name} ({count})"));
                }
            }
            found.extend(lora.variants.iter().map(|name| (*name).to_owned()));
            if lora.bias != "none" {
                found.push(format!("bias {}", show_name(&lora.bias)));
            }
            if let Init::Named(start) = &lora.init_lora_weights {
                found.push(format!("init {}", show_name(start)));
            }
        }
        let saved = self.config.targeting.modules_to_save.iter().flatten();
        let saved: Vec<String> = saved.map(|name| show_name(name)).collect();
        if !saved.is_empty() {
            found.push(format!("modules_to_save {}", saved.join(", ")));
        }
        found
    }

    /// What looks wrong, as far as the config and the header tell.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut found = self.config.warnings.clone();
        let ranks: Vec<String> = self
            .updates()
            .filter(|(_, update)| update.rank != update.config_rank)
            .map(|(path, update)| format!("{} {} (config {})", show_name(path), update.rank, update.config_rank))
            .collect();
        found.extend(listed("modules have factors of another rank than the config gives", &ranks));
        let lora = self.config.lora().is_some();
        let lone: Vec<String> = self
            .modules
            .iter()
            .filter(|(_, module)| lora && module.low_rank.is_none())
            .filter(|(_, module)| module.tensors.iter().any(|(slot, _)| slot.starts_with("lora_")))
            .map(|(path, _)| show_name(path))
            .collect();
        found.extend(listed("modules lack a factor, or have factors that do not fit each other", &lone));
        if let Some(Names::List(entries)) = &self.config.targeting.target_modules {
            let paths: Vec<String> = self.modules.keys().map(|path| format!(".{}", without_base_layer(path))).collect();
            let lost = |entry: &&String| !paths.iter().any(|path| path.ends_with(&format!(".{entry}")));
            let lost: Vec<String> = entries.iter().filter(lost).map(|entry| show_name(entry)).collect();
            found.extend(listed("entries of target_modules have no tensor in the file", &lost));
        }
        let mut dtypes: Vec<&str> = self.weights.entries().map(|(_, entry)| entry.dtype.name()).collect();
        dtypes.sort_unstable();
        dtypes.dedup();
        if dtypes.len() > 1 {
            found.push(format!("tensors have several types: {}", dtypes.join(", ")));
        }
        let size =
            |module: &Module| module.tensors.iter().filter_map(|(_, key)| self.weights.bytes(key).ok()).sum::<usize>();
        let whole: usize = self.modules.values().filter(|module| module.whole).map(size).sum();
        let all: usize = self.modules.values().map(size).sum();
        if whole > all / 2 && all > whole {
            found.push(format!("{whole} of its {all} bytes are modules saved whole"));
        }
        if self.modules.is_empty() {
            found.push("the file holds no tensors".to_owned());
        }
        found
    }

    /// The norms of an update, computed from its factors in float64.
    pub fn norms(&self, update: &LowRank) -> Result<Norms> {
        let (mut norms, mut spectrum) = ([0.0; 3], None);
        for pair in self.factors(update)? {
            let (up, down) = (pair.up_gram(&pair), pair.down_gram(&pair));
            for (sum, part) in norms.iter_mut().zip([down.diagonal().sum(), up.diagonal().sum(), up.inner(&down)]) {
                *sum += part;
            }
            if update.count == 1 && update.rank <= MAX_SPECTRUM {
                spectrum = Some(singular_values(&up, &down));
            }
        }
        let [down, up, product] = norms.map(root);
        let scale = update.scaling.abs();
        let largest = spectrum.as_ref().and_then(|values| values.first()).map(|value| value * scale);
        let effective_rank = spectrum.filter(|_| product > 0.0).map(|values| {
            let sum: f64 = values.iter().sum();
            let entropy: f64 = values
                .iter()
                .map(|value| value / sum)
                .filter(|share| *share > 0.0)
                .map(|share| -share * share.ln())
                .sum();
            entropy.exp()
        });
        Ok(Norms { down, up, update: product * scale, largest, effective_rank })
    }

    /// The factors of each matrix of an update.
    pub(super) fn factors(&self, update: &LowRank) -> Result<Vec<Factors>> {
        let [inner, _] = update.sizes;
        let (down, up) = (self.read(&update.down)?, self.read(&update.up)?);
        let one = |(index, down): (usize, &[f64])| Factors {
            // Experts' factors: down is stacked by expert, and in up the ranks are, each with a column an expert.
            up: up.iter().skip(index).step_by(update.count).copied().collect(),
            down: down.to_vec(),
            rank: update.rank,
            inner,
        };
        Ok(down.chunks((update.rank * inner).max(1)).enumerate().map(one).collect())
    }

    fn read(&self, key: &str) -> Result<Vec<f64>> {
        let missing = || Error::checkpoint(self.weights.path(), format!("has no tensor `{}`", show_name(key)));
        let entry = self.weights.entry(key).ok_or_else(missing)?;
        widen(entry.dtype, &self.weights.read(key)?)
    }
}

/// The two factors of one matrix.
pub(super) struct Factors {
    up: Vec<f64>,
    down: Vec<f64>,
    rank: usize,
    inner: usize,
}

impl Factors {
    /// `self.up.T @ other.up`.
    pub fn up_gram(&self, other: &Self) -> Matrix {
        by_columns(&self.up, self.rank, &other.up, other.rank)
    }

    /// `self.down @ other.down.T`.
    pub fn down_gram(&self, other: &Self) -> Matrix {
        by_rows(&self.down, &other.down, self.inner)
    }

    /// The sums of squares of the differences: of the factors down, and up.
    pub fn squares(&self, other: &Self) -> [f64; 2] {
        let sum = |one: &[f64], other: &[f64]| one.iter().zip(other).map(|(one, other)| (one - other).powi(2)).sum();
        [sum(&self.down, &other.down), sum(&self.up, &other.up)]
    }

    /// Whether the two make the same update, value for value.
    pub fn equals(&self, other: &Self) -> bool {
        self.up == other.up && self.down == other.down
    }
}

/// How many names a warning lists.
const LISTED: usize = 4;

/// One warning for all `items`, if there are any.
fn listed(what: &str, items: &[String]) -> Option<String> {
    let shown = items.iter().take(LISTED).cloned().collect::<Vec<_>>().join(", ");
    let more = items.len().saturating_sub(LISTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!items.is_empty()).then(|| format!("{} {what}: {shown}{more}", items.len()))
}

/// The tensors of an adapter by module: a slot starts with the first component that is named after the method.
fn modules(weights: &Checkpoint, config: &AdapterConfig) -> BTreeMap<String, Module> {
    let own = format!("{}_", config.peft_type.to_lowercase());
    let mut modules: BTreeMap<String, Module> = BTreeMap::new();
    for key in weights.names() {
        let path = key.strip_prefix(PREFIX).unwrap_or(key);
        let starts = std::iter::once(0).chain(path.match_indices('.').map(|(dot, _)| dot + 1));
        let is_slot = |start: &usize| {
            let rest = path.get(*start..).unwrap_or_default();
            rest.starts_with(&own) || SLOTS.iter().any(|slot| rest.starts_with(slot))
        };
        let found = starts.clone().find(is_slot);
        let start = found.or_else(|| starts.last()).unwrap_or(0);
        let (module, slot) = path.split_at_checked(start).unwrap_or(("", path));
        let module = modules.entry(module.trim_end_matches('.').to_owned()).or_default();
        module.whole = found.is_none() && path.contains('.');
        module.tensors.push((slot.to_owned(), key.to_owned()));
    }
    modules
}

/// The update that a module's tensors make, if their shapes fit each other.
fn low_rank(weights: &Checkpoint, lora: &LoraFields, path: &str, module: &Module) -> Result<Option<LowRank>> {
    let find = |slot: &str| module.tensors.iter().find(|(known, _)| known == slot).map(|(_, key)| key);
    let pair = [("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")];
    let Some((down, up)) = pair.iter().find_map(|(down, up)| Some((find(down)?, find(up)?))) else { return Ok(None) };
    let (Some(a), Some(b)) = (weights.entry(down), weights.entry(up)) else { return Ok(None) };
    let (Some(&stacked), Some(&outer)) = (a.shape.first(), b.shape.first()) else { return Ok(None) };
    let inner: usize = a.shape.iter().skip(1).product();
    let columns: usize = b.shape.iter().skip(1).product();
    let floats = a.dtype.is_adapter_float() && b.dtype.is_adapter_float();
    if !floats || stacked == 0 || columns != stacked || a.shape.len() < 2 {
        return Ok(None);
    }
    let plain = without_base_layer(path);
    let (mut config_rank, mut scaling) = lora.rank_and_scaling(&plain)?;
    // A bare parameter's rank is looked up by the parameter's own name; the file has that of its module.
    let leaf = |target: &String| Some(format!("{plain}.{}", target.rsplit('.').next()?));
    for target in lora.target_parameters.iter().flatten().filter_map(leaf) {
        let (rank, other) = lora.rank_and_scaling(&target)?;
        if config_rank != stacked && stacked % rank == 0 {
            (config_rank, scaling) = (rank, other);
        }
    }
    let experts = lora.target_parameters.is_some() && stacked % config_rank == 0;
    let count = if experts { stacked / config_rank } else { 1 };
    let (up, down) = (up.clone(), down.clone());
    Ok(Some(LowRank { up, down, rank: stacked / count, config_rank, scaling, count, sizes: [inner, outer] }))
}
