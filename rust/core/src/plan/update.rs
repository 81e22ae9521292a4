//! What happens to the values of one tensor, one step after the other.

use super::elsewhere::Elsewhere;

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
