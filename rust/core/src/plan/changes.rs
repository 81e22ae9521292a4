//! What happens to the values of each tensor, one step after the other: what one or several adapters do to it, put together in
//! the order in which they apply.

use std::collections::BTreeMap;

use super::adapter::Adapter;
use super::external::Elsewhere;
use crate::error::{Error, Result, show_name};

/// One adapter's change to a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// Which adapter of the merge it comes from.
    pub adapter: usize,
    /// What it does.
    pub change: Change,
}

/// A change to the values of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// `weight += scaling * up @ down`, and DoRA's magnitudes where there are any.
    LowRank(LowRank),
    /// `bias += scaling * value`.
    Bias {
        /// The value's key in the adapter.
        key: String,
        /// The factor of the module's update, the adapter's weight in it.
        scaling: f64,
    },
    /// Some rows of an embedding are replaced.
    Tokens {
        /// The key of the rows in the adapter.
        key: String,
        /// Which row of the embedding each of them is.
        indices: Vec<usize>,
    },
    /// Inputs or outputs are multiplied, each by its factor: (IA)³.
    Scale(Scale),
    /// Inputs or outputs are turned, a block at a time: OFT.
    Turn(Turn),
    /// What a method without a kernel does.
    Elsewhere(Box<Elsewhere>),
}

/// A factor for each row or column of a weight as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scale {
    /// The factors' key in the adapter.
    pub key: String,
    /// Whether a factor is for a row, else for as many columns as a kernel has elements. More factors than that are those of
    /// one group of rows after the other.
    pub rows: bool,
    /// Whether the factors are for the layer's inputs.
    pub on_input: bool,
}

/// A block-diagonal orthogonal matrix that turns the rows of a weight, or its columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// The key of the numbers above the diagonals of the blocks' skew matrices.
    pub key: String,
    /// Rows and columns of a block.
    pub size: usize,
    /// Whether blocks of rows are mixed, as for a weight stored as (in, out), else blocks of columns within each row.
    pub rows: bool,
    /// Whether the layer's inputs are turned, else its outputs, the other way round.
    pub on_input: bool,
    /// How many terms of its series stand for Cayley's map, or none for the map itself.
    pub terms: Option<usize>,
    /// How far the skew matrices may be from zero, all blocks together.
    pub bound: Option<f64>,
}

/// An update of low rank to a weight seen as `count` matrices of shape (rows, columns).
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// The key of the factor of shape (out, rank).
    pub up: String,
    /// The key of the factor of shape (rank, in).
    pub down: String,
    /// The rank of each matrix.
    pub rank: usize,
    /// alpha / rank or alpha / sqrt(rank), times the adapter's weight.
    pub scaling: f64,
    /// How many matrices the weight holds: one, or one an expert.
    pub count: usize,
    /// Rows of each matrix as stored.
    pub rows: usize,
    /// Columns of each matrix as stored.
    pub columns: usize,
    /// Whether the matrices are stored as (in, out), as embeddings and the `Conv1D` of transformers are.
    pub transposed: bool,
    /// The key of DoRA's magnitudes, one for each output.
    pub magnitude: Option<String>,
    /// What of the factors' product it is and where it goes, if not all of it to all of the weight.
    pub part: Option<Part>,
}

/// Some rows of the matrices that a pair of factors makes, and their place in a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// How many matrices the factors make.
    pub experts: usize,
    /// Rows of each of them.
    pub outputs: usize,
    /// The matrix that is meant, and its first row that is.
    pub from: (usize, usize),
    /// The weight's matrix that it goes to, and the row there that the first one goes to.
    pub to: (usize, usize),
    /// How many rows.
    pub rows: usize,
}

impl Change {
    /// Whether it acts on the layer's input: of two such, the first adapter's is the outermost and comes last.
    #[must_use]
    pub fn is_on_input(&self) -> bool {
        match self {
            Self::LowRank(_) | Self::Bias { .. } | Self::Tokens { .. } | Self::Elsewhere(_) => false,
            Self::Scale(scale) => scale.on_input,
            Self::Turn(turn) => turn.on_input,
        }
    }

    /// Whether it adds to the values, so that a weight can multiply it.
    #[must_use]
    pub fn is_additive(&self) -> bool {
        match self {
            Self::LowRank(update) => update.magnitude.is_none(),
            Self::Bias { .. } => true,
            Self::Elsewhere(update) => update.effect.additive,
            Self::Tokens { .. } | Self::Scale(_) | Self::Turn(_) => false,
        }
    }

    /// What it does, in a few words.
    #[must_use]
    pub fn what(&self) -> String {
        match self {
            Self::LowRank(update) => {
                let kind = if update.magnitude.is_some() { "DoRA" } else { "LoRA" };
                let layout = if update.transposed { ", stored (in, out)" } else { "" };
                let experts = if update.count > 1 && update.part.is_none() {
                    format!(", {} experts", update.count)
                } else {
                    String::new()
                };
                let part = update.part.map_or(String::new(), |part| match part {
                    Part { experts: 1, to: (expert, _), .. } => format!(", into expert {expert}"),
                    Part { from: (expert, _), .. } => format!(", of expert {expert}"),
                });
                format!("{kind} rank {}, scaling {}{layout}{experts}{part}", update.rank, update.scaling)
            }
            Self::Bias { scaling, .. } => format!("bias, scaling {scaling}"),
            Self::Tokens { indices, .. } => format!("{} rows replaced", indices.len()),
            Self::Scale(scale) => format!("IA3 on {}", side(scale.on_input)),
            Self::Elsewhere(_) => "computed by its method in Python".to_owned(),
            Self::Turn(turn) => format!("OFT on {}, blocks of {}", side(turn.on_input), turn.size),
        }
    }
}

fn side(on_input: bool) -> &'static str {
    if on_input { "inputs" } else { "outputs" }
}

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
