//! From the tensors of all adapters of a merge to changes of the base's, each shape checked against the other two.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::Value;

use super::adapter::Adapter;
use super::base::{Ambiguous, Base, Homes};
use super::changes::{Change, Drafts, LowRank, Scale, Turn, Update, combine};
use super::experts::Piece;
use super::external::Apply;
use super::matching::Placed;
use super::model_config::{Tie, is_embedding, is_head};
use super::refusals::{BAD_SHAPE, INTEGER, NO_HOME, NO_PARTNER, Problems, UNDECLARED, UNKNOWN, UNUSABLE};
use super::slots::{Fit, Module, Part, Sorted, Votes};
use super::{Options, refusals};
use crate::checkpoint::{Checkpoint, Entry};
use crate::config::{Method, Targeting};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::keys::{MODULES_TO_SAVE, ORIGINAL_MODULE, without_base_layer};

/// What the adapters do to the base, and whether modules have a prefix there that an adapter lacks.
pub fn gather(
    base: &Base,
    adapters: &[Adapter],
    model: Option<&Value>,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<(Drafts, bool)> {
    let mut all = Vec::new();
    let mut problems = Problems::default();
    let mut prefixed = false;
    for (index, adapter) in adapters.iter().enumerate() {
        let method = &adapter.config.method;
        let apply = adapter.apply.as_deref().filter(|_| refusals::elsewhere(&adapter.config).is_some());
        let prefix = apply.map(|apply| apply.prefix(&adapter.config_text)).transpose()?;
        let sorted = Sorted::new(&adapter.checkpoint, method, prefix.as_deref());
        let config: Arc<str> = adapter.config_text.as_str().into();
        let homes = homes(base, &sorted)?;
        notes.extend(adapter.config.warnings.iter().cloned());
        if !homes.strip.is_empty() {
            notes.push(format!("the base lacks the adapter's prefix {}", show_name(&homes.strip)));
        }
        if !homes.add.is_empty() {
            notes.push(format!("the adapter lacks the base's prefix {}", show_name(&homes.add)));
            prefixed = true;
        }
        notes.extend(sorted.untrained.iter().map(|key| {
            format!("{} is left out: the adapter holds the module as it was trained as well", show_name(key))
        }));
        let tie = Tie::find(base, model, prefixed);
        let planner = Planner {
            base,
            adapter: &adapter.checkpoint,
            index,
            weight: adapter.weight,
            config: &config,
            apply,
            method,
            targeting: &adapter.config.targeting,
            stored_transposed: method.fan_in_fan_out() || refusals::stores_transposed(model),
            homes: &homes,
            tie: tie.as_ref(),
        };
        let drafts = planner.changes(&sorted, &mut problems)?;
        refusals::check_weight(adapter, &drafts)?;
        if !options.allow_nonfinite {
            refusals::find_nonfinite(&adapter.checkpoint, &mut problems)?;
        }
        problems.end_of(&adapter.checkpoint, base.checkpoint);
        all.push(drafts);
    }
    problems.refuse()?;
    Ok((combine(all, adapters)?, prefixed))
}

/// PEFT adds the change of an attention's output projection twice where the attention is the target, so that this is what
/// such adapters were trained for.
const PROJECTION: f64 = 2.0;

/// The one way of reading the adapter's module paths.
pub fn homes(base: &Base, sorted: &Sorted) -> Result<Homes> {
    let modules: HashSet<&str> = base.names().filter_map(|name| Some(name.rsplit_once('.')?.0)).collect();
    let paths: Vec<String> = sorted.modules.keys().map(|path| without_base_layer(path)).collect();
    // A head may be tied or new: it does not tell where the rest lives.
    let paths: Vec<&str> = paths.iter().map(String::as_str).filter(|path| path.contains('.')).collect();
    Homes::find(&paths, &modules).map_err(|Ambiguous(one, other)| {
        Error::Merge(format!(
            "the adapter's modules are found twice in the base, under {} and {}; hint: give the part of the base that the adapter was trained on",
            show_name(&one),
            show_name(&other)
        ))
    })
}

/// What decides about the changes.
pub struct Planner<'a> {
    pub base: &'a Base<'a>,
    pub adapter: &'a Checkpoint,
    /// Which adapter of the merge it is.
    pub index: usize,
    /// What its change is multiplied by.
    pub weight: f64,
    /// The text of its config.
    pub config: &'a Arc<str>,
    /// What computes it, where that is not done here.
    pub apply: Option<&'a dyn Apply>,
    pub method: &'a Method,
    pub targeting: &'a Targeting,
    /// Whether square weights are stored as (in, out), as far as the two configs know.
    pub stored_transposed: bool,
    pub homes: &'a Homes,
    pub tie: Option<&'a Tie>,
}

impl Planner<'_> {
    /// The changes to the base by parameter name; what is wrong goes to `problems`.
    pub fn changes(&self, sorted: &Sorted, problems: &mut Problems) -> Result<Drafts> {
        let mut changes = Drafts::new();
        sorted.unknown.iter().for_each(|key| problems.add(UNKNOWN, show_name(key)));
        let integers = self.adapter.entries().filter(|(_, entry)| !entry.dtype.is_adapter_float());
        for (key, entry) in integers.filter(|_| self.apply.is_none()) {
            problems.add(INTEGER, format!("{} {}", show_name(key), entry.dtype.name()));
        }
        for (key, name) in &sorted.whole {
            self.whole(key, name, sorted, &mut changes, problems);
        }
        let placed = self.placed(sorted, &changes, problems)?;
        let votes = Votes::count(&placed);
        for placed in &placed {
            self.weight(placed, &votes, &mut changes, problems)?;
        }
        self.elsewhere(sorted, &mut changes, problems)?;
        for (path, module) in &sorted.modules {
            self.bias(path, module, &mut changes, problems)?;
            self.tokens(path, module, &mut changes, problems);
        }
        Ok(changes)
    }

    /// A parameter that the adapter holds in full.
    fn whole(&self, key: &str, name: &str, sorted: &Sorted, changes: &mut Drafts, problems: &mut Problems) {
        let Some(entry) = self.adapter.entry(key) else { return };
        let (path, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        let adapted = sorted.modules.keys().any(|module| without_base_layer(module) == path);
        let trained = self.method.bias();
        let bias = leaf == "bias" && (trained == "all" || trained.ends_with("_only") && adapted);
        let home = format!("{}.{leaf}", self.homes.path(path));
        let tied = self.tie.filter(|tie| tie.head == home).map(|tie| &tie.embedding);
        let found = self.base.entry(tied.unwrap_or(&home));
        if found.is_none() && !self.is_new(key, path, &home) {
            let alike = |kind: fn(&str) -> bool| self.base.names().find(|other| kind(&home) && kind(other));
            problems.homeless(key, alike(is_embedding).or_else(|| alike(is_head)));
            return;
        }
        let known = is_embedding(name) || name.ends_with("lm_head.weight");
        if !bias && !adapted && !known && self.targeting.saved(path).is_none() {
            problems.add(UNDECLARED, show_name(key));
            return;
        }
        if let Some(found) = found {
            if found.shape != entry.shape && !grows(&home, &found.shape, &entry.shape) {
                let text = format!("{} {:?}, in the base {:?}", show_name(key), entry.shape, found.shape);
                problems.add(BAD_SHAPE, text);
            }
            let floats = usable(found.dtype) && entry.dtype.is_adapter_float();
            if found.dtype != entry.dtype && !floats {
                let text = format!("{} {}, in the base {}", show_name(key), entry.dtype.name(), found.dtype.name());
                problems.add(UNUSABLE, text);
            }
        }
        changes.entry(home).or_default().whole = Some((self.index, key.to_owned()));
    }

    /// Whether `home` is of a module that the config says is trained whole, and that the base lacks where it would be.
    fn is_new(&self, key: &str, path: &str, home: &str) -> bool {
        let Some(module) = self.targeting.saved(path).map(|module| self.homes.path(module)) else { return false };
        let has = |module: &str| {
            let within = |name: &str| name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
            self.base.names().any(within)
        };
        let is_wrapped = key.split('.').any(|part| [MODULES_TO_SAVE, ORIGINAL_MODULE].contains(&part));
        let is_parameter = [".weight", ".bias"].iter().any(|leaf| home.ends_with(leaf));
        // Every base has its embedding, and its head unless the two are tied, whatever they are called.
        let is_had = is_embedding(home) || is_head(home) && self.tie.is_some();
        let has_parent = || module.rsplit_once('.').is_none_or(|(parent, _)| has(parent));
        is_parameter && !is_wrapped && !is_had && !has(&module) && has_parent()
    }

    /// The change of a module's weight, and of its bias where that follows.
    fn weight(&self, placed: &Placed, votes: &Votes, changes: &mut Drafts, problems: &mut Problems) -> Result<()> {
        if !usable(placed.home.dtype) {
            problems.add(UNUSABLE, format!("{} {}", show_name(&placed.home.name), placed.home.dtype.name()));
        }
        let Some(fit) = votes.choose(placed, self.stored_transposed) else { return Ok(()) };
        let change = match placed.module.part {
            Part::None => return Ok(()),
            Part::Factors { down, up, .. } => {
                let update = self.low_rank(placed, fit, (down, up), problems)?;
                for Piece { name, stored: (count, rows), part } in &placed.home.pieces {
                    let update = LowRank { count: *count, rows: *rows, part: Some(*part), ..update.clone() };
                    self.push(changes, name.clone(), Change::LowRank(update));
                }
                if !placed.home.pieces.is_empty() {
                    return Ok(());
                }
                Change::LowRank(update)
            }
            Part::Scale(key) => {
                let shape = self.adapter.entry(key).map(|entry| entry.shape.as_slice());
                let on_input = placed.on_input.unwrap_or(match shape {
                    Some([1, _]) => true,
                    Some([1, channels, ..]) => *channels != fit.rows,
                    _ => false,
                });
                if !on_input {
                    let bias = format!("{}.bias", self.homes.path(&without_base_layer(placed.path)));
                    if self.base.entry(&bias).is_some() {
                        self.push(changes, bias, Change::Scale(Scale { key: key.to_owned(), rows: false, on_input }));
                    }
                }
                Change::Scale(Scale { key: key.to_owned(), rows: on_input == fit.transposed, on_input })
            }
            Part::Turn { key, embedding } => {
                let Method::Oft(oft) = self.method else { return Ok(()) };
                Change::Turn(Turn {
                    key: key.to_owned(),
                    size: fit.size,
                    rows: fit.transposed,
                    on_input: !embedding,
                    terms: oft.use_cayley_neumann.then_some(oft.num_cayley_neumann_terms),
                    bound: oft.coft.then_some(oft.eps),
                })
            }
        };
        self.push(changes, placed.home.name.clone(), change);
        Ok(())
    }

    /// The change that a pair of factors makes.
    fn low_rank(
        &self,
        placed: &Placed,
        fit: Fit,
        (down, up): (&str, &str),
        problems: &mut Problems,
    ) -> Result<LowRank> {
        // PEFT matches its patterns against the parameter's own name where the target is a bare parameter.
        let attention = self.attention_of(placed.path);
        let plain = without_base_layer(attention.unwrap_or(placed.path));
        let leaf = placed.home.name.rsplit('.').next().unwrap_or_default();
        let target = if ["weight", "in_proj_weight"].contains(&leaf) { plain } else { format!("{plain}.{leaf}") };
        let (rank, scaling) = self.rank_and_scaling(&target)?;
        let scaling = scaling * if attention.is_some() { PROJECTION } else { 1.0 };
        if rank != fit.size {
            problems.add(BAD_SHAPE, format!("{} of rank {}, {rank} by the config", show_name(placed.path), fit.size));
        }
        if let Some(key) = placed.module.magnitude {
            let outputs = if fit.transposed { fit.columns } else { fit.rows };
            let found = self.adapter.entry(key).map(|entry| entry.shape.iter().product::<usize>());
            if found != Some(outputs) || fit.count > 1 || !placed.home.pieces.is_empty() {
                problems.add(BAD_SHAPE, format!("{} for {outputs} outputs", show_name(key)));
            }
        } else if self.method.lora().is_some_and(|lora| lora.use_dora) {
            problems.add(NO_PARTNER, format!("{} (no DoRA magnitudes)", show_name(placed.path)));
        }
        Ok(LowRank {
            up: up.to_owned(),
            down: down.to_owned(),
            rank: fit.size,
            scaling,
            count: fit.count,
            rows: fit.rows,
            columns: fit.columns,
            transposed: fit.transposed,
            magnitude: placed.module.magnitude.map(str::to_owned),
            part: None,
        })
    }

    /// The attention whose output projection `path` is, if the attention as a whole is what was adapted.
    fn attention_of<'p>(&self, path: &'p str) -> Option<&'p str> {
        let attention = path.strip_suffix(".base_layer.out_proj")?;
        let joint = format!("{}.in_proj_weight", self.homes.path(&without_base_layer(attention)));
        self.base.entry(&joint).map(|_| attention)
    }

    /// The rank and the scaling of a LoRA of `module`, the adapter's weight in it.
    fn rank_and_scaling(&self, module: &str) -> Result<(usize, f64)> {
        let Some(lora) = self.method.lora() else { return Ok((0, 0.0)) };
        let (rank, scaling) = lora.rank_and_scaling(module)?;
        Ok((rank, scaling * self.weight))
    }

    /// The change that the bias of `up` makes to the layer's own.
    fn bias(&self, path: &str, module: &Module, changes: &mut Drafts, problems: &mut Problems) -> Result<()> {
        let Some((key, entry)) = module.bias.and_then(|key| Some((key, self.adapter.entry(key)?))) else {
            return Ok(());
        };
        let plain = without_base_layer(path);
        let name = format!("{}.bias", self.homes.path(&plain));
        let Some(found) = self.base.entry(&name) else {
            problems.add(NO_HOME, format!("{} (the layer has no bias)", show_name(key)));
            return Ok(());
        };
        if found.shape != entry.shape {
            problems.add(BAD_SHAPE, format!("{} {:?}, in the base {:?}", show_name(key), entry.shape, found.shape));
        }
        let (_, scaling) = self.rank_and_scaling(&plain)?;
        self.push(changes, name, Change::Bias { key: key.to_owned(), scaling });
        Ok(())
    }

    /// The change that trained rows make to an embedding.
    fn tokens(&self, path: &str, module: &Module, changes: &mut Drafts, problems: &mut Problems) {
        let Some((key, entry)) = module.tokens.and_then(|key| Some((key, self.adapter.entry(key)?))) else { return };
        let name = format!("{}.weight", self.homes.path(&without_base_layer(path)));
        let embedding = self.tie.filter(|tie| tie.head == name).map_or(&name, |tie| &tie.embedding);
        let Some(found) = self.base.entry(embedding) else {
            problems.add(NO_HOME, show_name(key));
            return;
        };
        let indices = self.method.lora().map(|lora| lora.token_indices(path)).unwrap_or_default();
        let shape = self.shape(changes, &name, found);
        let &[rows, columns] = shape else {
            problems.add(BAD_SHAPE, format!("{} for {shape:?}", show_name(key)));
            return;
        };
        if entry.shape != [indices.len(), columns] || indices.iter().any(|index| *index >= rows) {
            let text =
                format!("{} {:?} for {} token indices in {:?}", show_name(key), entry.shape, indices.len(), shape);
            problems.add(BAD_SHAPE, text);
            return;
        }
        if changes.get(&name).is_some_and(|draft| !draft.updates.is_empty()) {
            problems.add(UNKNOWN, format!("{} (both rows and factors for one embedding)", show_name(key)));
        }
        self.push(changes, name, Change::Tokens { key: key.to_owned(), indices });
    }

    /// The shape of the tensor called `name`, that of `entry` unless the adapter holds it in full.
    pub fn shape<'s>(&'s self, changes: &Drafts, name: &str, entry: &'s Entry) -> &'s [usize] {
        let whole = changes.get(name).and_then(|draft| draft.whole.as_ref());
        whole.and_then(|(_, key)| self.adapter.entry(key)).map_or(&entry.shape, |whole| &whole.shape)
    }

    pub fn push(&self, changes: &mut Drafts, name: String, change: Change) {
        changes.entry(name).or_default().updates.push(Update { adapter: self.index, change });
    }
}

/// Whether `shape` is that of the table called `name` with rows for new tokens.
fn grows(name: &str, before: &[usize], shape: &[usize]) -> bool {
    let more = matches!((before, shape), ([rows, columns], [after, width]) if after > rows && width == columns);
    more && (is_embedding(name) || is_head(name))
}

/// Whether values of the type can be computed.
fn usable(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32)
}
