//! The ways in which an adapter's tensors fit a weight, by their shapes.

use super::placed::Placed;
use super::sort::{Module, Part};

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
    (size > 1 && size * (size - 1) / 2 == numbers).then_some(size)
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
