//! The tensors of an adapter, by the module that they belong to and the part that they play there, and the ways in which their
//! shapes fit a weight.

use std::collections::{BTreeMap, HashSet};

use super::matching::Placed;
use crate::checkpoint::Checkpoint;
use crate::config::Method;
use crate::keys;

/// What tensors of LoRA are for their module, as files spell it.
const LORA: [&str; 7] = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    TOKENS,
];

/// Rows of an embedding that were trained whole, beside any method.
const TOKENS: &str = "token_adapter.trainable_tokens_delta";

/// The same of (IA)³.
const IA3: [&str; 1] = ["ia3_l"];

/// The same of OFT.
const OFT: [&str; 2] = ["oft_R.weight", "oft_embedding_R.weight"];

/// What changes a module's weight: keys in the adapter file.
#[derive(Debug, Default, Clone, Copy)]
pub enum Part<'a> {
    /// Nothing, or not all that it takes.
    #[default]
    None,
    /// `down`, of shape (rank, in), and `up`, (out, rank); an embedding's weight is (in, out).
    Factors { down: &'a str, up: &'a str, embedding: bool },
    /// A factor for each input or output.
    Scale(&'a str),
    /// The skew matrices of turns; of outputs for an embedding, else of inputs.
    Turn { key: &'a str, embedding: bool },
}

/// The tensors of one module: the keys in the adapter file.
#[derive(Debug, Default)]
pub struct Module<'a> {
    /// What changes the weight.
    pub part: Part<'a>,
    /// The bias of `up`, of shape (out).
    pub bias: Option<&'a str>,
    /// DoRA's magnitudes, (out) in all.
    pub magnitude: Option<&'a str>,
    /// The rows of an embedding that were trained whole.
    pub tokens: Option<&'a str>,
    /// One factor of two, as long as the other is not found.
    pub lone: Option<&'a str>,
    /// The tensors of a method that is computed elsewhere: what each is for the module, and its key.
    pub slots: Vec<(&'a str, &'a str)>,
}

impl Module<'_> {
    /// Whether its slots are those of an embedding.
    pub fn is_embedding(&self) -> bool {
        matches!(self.part, Part::Factors { embedding: true, .. } | Part::Turn { embedding: true, .. })
    }

    /// The keys whose shapes tell how the weight is changed.
    pub fn shaping(&self) -> Vec<&str> {
        match self.part {
            Part::None => Vec::new(),
            Part::Factors { down, up, .. } => vec![down, up],
            Part::Scale(key) | Part::Turn { key, .. } => vec![key],
        }
    }
}

/// All tensors of an adapter.
#[derive(Debug, Default)]
pub struct Sorted<'a> {
    /// By module path, without the prefix that every key has.
    pub modules: BTreeMap<&'a str, Module<'a>>,
    /// Weights and biases saved whole: (key, parameter name without that prefix and the names of wrapped layers).
    pub whole: Vec<(&'a str, String)>,
    /// Keys of modules as they were before training, of which the adapter holds the trained ones as well.
    pub untrained: Vec<&'a str>,
    /// Keys that follow neither form.
    pub unknown: Vec<&'a str>,
}

impl<'a> Sorted<'a> {
    /// Sorts the keys of `adapter`; `elsewhere` is how the names of tensors begin if the method is computed elsewhere.
    pub fn new(adapter: &'a Checkpoint, method: &Method, elsewhere: Option<&str>) -> Self {
        let (slots, prefix): (&[&str], _) = match method {
            Method::Ia3(_) => (&IA3, "ia3_"),
            Method::Oft(_) => (&OFT, "oft_"),
            _ => (&LORA, "lora_"),
        };
        let (slots, prefix) = elsewhere.map_or((slots, prefix), |prefix| (&[TOKENS][..], prefix));
        let mut sorted = Self::default();
        let mut originals = Vec::new();
        for key in adapter.names() {
            if let Some(parsed) = keys::parse(key, slots) {
                let module = sorted.modules.entry(parsed.module).or_default();
                if !module.take(key, parsed.slot) {
                    sorted.unknown.push(key);
                }
                continue;
            }
            let name = key.strip_prefix(keys::PREFIX).unwrap_or(key);
            if let Some((module, slot)) = elsewhere.and_then(|prefix| split(name, prefix)) {
                sorted.modules.entry(module).or_default().slots.push((slot, key));
                continue;
            }
            if name.contains(prefix) || !name.contains('.') {
                sorted.unknown.push(key);
            } else if name.split('.').any(|part| part == keys::ORIGINAL_MODULE) {
                originals.push((key, name));
            } else {
                sorted.whole.push((key, keys::without_base_layer(name)));
            }
        }
        let trained: HashSet<String> = sorted.whole.iter().map(|(_, name)| name.clone()).collect();
        let rows = sorted.modules.values().any(|module| module.tokens.is_some());
        for (key, name) in originals {
            let plain = keys::without_base_layer(&name.replace(&format!(".{}.", keys::ORIGINAL_MODULE), "."));
            if trained.contains(&plain) {
                sorted.untrained.push(key);
            } else {
                // Embeddings of which rows are trained are kept so as well.
                sorted.whole.push((key, if rows { plain } else { name.to_owned() }));
            }
        }
        sorted
    }
}

/// A name before and from the first component that begins with `prefix`.
fn split<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let dots = name.match_indices('.').map(|(dot, _)| dot);
    let dot = dots.into_iter().find(|dot| name.get(dot + 1..).is_some_and(|rest| rest.starts_with(prefix)))?;
    Some((name.get(..dot)?, name.get(dot + 1..)?))
}

impl<'a> Module<'a> {
    /// Puts `key` where its slot belongs, unless that is taken.
    fn take(&mut self, key: &'a str, slot: &str) -> bool {
        let place = match slot {
            "lora_B.bias" => &mut self.bias,
            "lora_magnitude_vector" => &mut self.magnitude,
            TOKENS => &mut self.tokens,
            _ => return self.take_part(key, slot),
        };
        place.replace(key).is_none()
    }

    fn take_part(&mut self, key: &'a str, slot: &str) -> bool {
        if !matches!(self.part, Part::None) {
            return false;
        }
        let embedding = slot.contains("embedding");
        match (slot, self.lone.take()) {
            ("ia3_l", None) => self.part = Part::Scale(key),
            ("oft_R.weight" | "oft_embedding_R.weight", None) => self.part = Part::Turn { key, embedding },
            (_, None) => self.lone = Some(key),
            (_, Some(other)) => {
                let is_down = |slot: &str| slot.ends_with("_A") || slot.ends_with("_A.weight");
                if is_down(key) == is_down(other) || other.contains("lora_embedding") != embedding {
                    self.lone = Some(other);
                    return false;
                }
                let (down, up) = if is_down(key) { (key, other) } else { (other, key) };
                self.part = Part::Factors { down, up, embedding };
            }
        }
        true
    }
}

/// One way in which an update fits a weight, seen as `count` matrices of shape (rows, columns).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    pub count: usize,
    /// The rank of two factors, the size of a block to turn, or nothing.
    pub size: usize,
    pub rows: usize,
    pub columns: usize,
    /// Whether the weight is stored as (in, out).
    pub transposed: bool,
}

/// The ways in which the tensors of `module`, of the shapes given, make an update of `weight`.
pub fn fits(weight: &[usize], module: &Module, shapes: &[&[usize]], on_input: Option<bool>) -> Vec<Fit> {
    match (&module.part, shapes) {
        (Part::Factors { embedding, .. }, [down, up]) => low_rank(weight, down, up, *embedding),
        (Part::Scale(_), [vector]) => scale(weight, vector, on_input),
        (Part::Turn { embedding, .. }, [above]) => turn(weight, above, *embedding),
        _ => Vec::new(),
    }
}

/// `down` of shape (rank, in) and `up` of shape (out, rank), a convolution's with its kernel, or stacks of experts'.
fn low_rank(weight: &[usize], down: &[usize], up: &[usize], embedding: bool) -> Vec<Fit> {
    let (Some(first), Some(out)) = (down.first(), up.first()) else { return Vec::new() };
    let one = |size: usize, rows, columns, transposed| Fit { count: 1, size, rows, columns, transposed };
    match (weight, down, up) {
        (&[rows, columns], &[rank, inner], &[outer, other]) if rank == other => {
            [(outer, inner, false), (inner, outer, true)]
                .into_iter()
                .filter(|(a, b, transposed)| (rows, columns) == (*a, *b) && (*transposed || !embedding))
                .map(|(_, _, transposed)| one(rank, rows, columns, transposed))
                .collect()
        }
        (&[count, rows, columns], &[stacked, inner], &[outer, other])
            if stacked == other && count > 0 && stacked % count == 0 =>
        {
            [(outer, inner, false), (inner, outer, true)]
                .into_iter()
                .filter(|(a, b, _)| (rows, columns) == (*a, *b))
                .map(|(_, _, transposed)| Fit { count, size: stacked / count, rows, columns, transposed })
                .collect()
        }
        ([rows, kernel @ ..], [rank, inner @ ..], [_, rest @ ..]) if kernel.len() >= 2 => {
            let pointwise = rest.first() == Some(rank) && rest.iter().skip(1).all(|size| *size == 1);
            let fits = rows == out && kernel == inner && pointwise && rest.len() == kernel.len();
            fits.then(|| one(*first, *rows, kernel.iter().product(), false)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}

/// A factor for each output, of shape (out, 1), or each input, (1, in); a convolution's is (1, channels, 1, ...) for both,
/// and the inputs are those of all groups of channels.
fn scale(weight: &[usize], vector: &[usize], on_input: Option<bool>) -> Vec<Fit> {
    let one = |rows: usize, columns, transposed| Fit { count: 1, size: 0, rows, columns, transposed };
    match (weight, vector) {
        (&[rows, columns], &[first, second]) => {
            let on_input = on_input.unwrap_or(first == 1 && second != 1);
            let length = if on_input { second } else { first };
            [(rows, columns, false), (columns, rows, true)]
                .into_iter()
                .filter(|(outputs, inputs, _)| {
                    [first, second].contains(&1) && length == if on_input { *inputs } else { *outputs }
                })
                .filter(|_| first * second == length)
                .map(|(_, _, transposed)| one(rows, columns, transposed))
                .collect()
        }
        ([rows, inputs, kernel @ ..], [1, length, ones @ ..])
            if kernel.len() >= 2 && kernel.len() == ones.len() && ones.iter().all(|size| *size == 1) =>
        {
            let groups = length.checked_div(*inputs).filter(|groups| groups * inputs == *length && *groups > 0);
            let by_input = groups.is_some_and(|groups| rows % groups == 0);
            let fits = match on_input {
                Some(true) => by_input,
                Some(false) => rows == length,
                // What the file does not say and both would fit, nobody can know.
                None => by_input != (rows == length),
            };
            fits.then(|| one(*rows, inputs * kernel.iter().product::<usize>(), false)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}

/// The numbers above the diagonals of skew matrices, (blocks, size * (size - 1) / 2), or those of one that all blocks share.
fn turn(weight: &[usize], above: &[usize], embedding: bool) -> Vec<Fit> {
    let &[blocks, numbers] = above else { return Vec::new() };
    let (Some(rows), true) = (weight.first(), matches!(weight.len(), 2 | 4)) else { return Vec::new() };
    let Some(size) = block_size(numbers) else { return Vec::new() };
    let columns: usize = weight.iter().skip(1).product();
    [(columns, false), (*rows, true)]
        .into_iter()
        .filter(|(features, transposed)| {
            let fits = features % size == 0 && (blocks == 1 || blocks * size == *features);
            // An embedding's outputs are its columns.
            fits && !(*transposed && (embedding || weight.len() > 2))
        })
        .map(|(_, transposed)| Fit { count: 1, size, rows: *rows, columns, transposed })
        .collect()
}

/// The size of a square matrix that has so many numbers above its diagonal.
fn block_size(numbers: usize) -> Option<usize> {
    let size = numbers.checked_mul(8)?.checked_add(1)?.isqrt().div_ceil(2);
    (size * (size - 1) / 2 == numbers).then_some(size)
}

/// Which way round weights are stored that tell by their shape: for matrices and for stacks of matrices.
pub struct Votes([(usize, usize); 2]);

impl Votes {
    pub fn count(placed: &[Placed]) -> Self {
        let mut votes = [(0, 0); 2];
        for placed in placed.iter().filter(|placed| !placed.module.is_embedding()) {
            let [fit] = placed.fits.as_slice() else { continue };
            let Some((straight, transposed)) = votes.get_mut(usize::from(placed.home.shape.len() == 3)) else {
                continue;
            };
            *if fit.transposed { transposed } else { straight } += 1;
        }
        Self(votes)
    }

    /// The one way in which `placed` fits, or of two the one in which its like are stored, or else as the config says.
    pub fn choose(&self, placed: &Placed, stated: bool) -> Option<Fit> {
        let transposed = match self.0.get(usize::from(placed.home.shape.len() == 3)) {
            Some((0, 1..)) => true,
            Some((1.., 0)) => false,
            _ => stated && placed.home.shape.len() == 2,
        };
        let fits = &placed.fits;
        fits.iter().find(|fit| fits.len() == 1 || fit.transposed == transposed).copied()
    }
}
