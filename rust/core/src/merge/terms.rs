//! The factors of updates, laid out for the weights that they change.

use super::matrices::View;
use super::work::Inputs;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::kernels::values::widen;
use crate::kernels::{Element, Factors, Wide};
use crate::plan::{Adapter, Change, LowRank, Part, Update};

/// A pair of factors of one matrix: `up` of shape (rows, rank) and `down` of shape (rank, columns), `scaling` beside them.
struct Term<W> {
    up: Vec<W>,
    down: Vec<W>,
    rank: usize,
    scaling: f64,
}

/// The factors of each matrix that add all of `updates`, their ranks one after the other.
pub fn sum<E: Element>(inputs: Inputs, updates: &[Update], view: View) -> Result<Vec<Factors<'static, E>>> {
    let mut matrices: Vec<Vec<Term<E::Wide>>> = (0..view.count).map(|_| Vec::new()).collect();
    for update in updates {
        let adapter = inputs.adapter(update.adapter)?;
        let terms = match &update.change {
            Change::LowRank(update @ LowRank { part: Some(part), .. }) => {
                if let Some(matrix) = matrices.get_mut(part.to.0) {
                    matrix.push(piece(adapter, update, *part)?);
                }
                continue;
            }
            Change::LowRank(update) => terms(adapter, update)?,
            Change::Bias { key, scaling } => {
                vec![Term { up: vec![Wide::from_f64(1.0)], down: read(adapter, key)?, rank: 1, scaling: *scaling }]
            }
            Change::Tokens { .. } | Change::Scale(_) | Change::Turn(_) | Change::Elsewhere(_) => Vec::new(),
        };
        matrices.iter_mut().zip(terms).for_each(|(matrix, term)| matrix.push(term));
    }
    matrices.into_iter().map(|terms| factors(terms, (view.rows, view.columns))).collect()
}

/// The terms of a matrix as one pair of factors. One alone keeps its scaling apart; several have theirs in `up`.
fn factors<E: Element>(terms: Vec<Term<E::Wide>>, shape: (usize, usize)) -> Result<Factors<'static, E>> {
    let terms = match <[Term<E::Wide>; 1]>::try_from(terms) {
        Ok([Term { up, down, rank, scaling }]) => return Factors::new(up, &down, shape, rank, scaling),
        Err(terms) => terms,
    };
    let rank: usize = terms.iter().map(|term| term.rank).sum();
    let mut up = Vec::with_capacity(shape.0 * rank);
    for row in 0..shape.0 {
        for term in &terms {
            let scaling: E::Wide = Wide::from_f64(term.scaling);
            up.extend(term.up.iter().skip(row * term.rank).take(term.rank).map(|value| *value * scaling));
        }
    }
    let down = terms.into_iter().flat_map(|term| term.down).collect::<Vec<_>>();
    Factors::new(up, &down, shape, rank, 1.0)
}

/// The factors of each matrix of a weight, turned the way in which it is stored.
fn terms<W: Wide>(adapter: &Adapter, update: &LowRank) -> Result<Vec<Term<W>>> {
    let LowRank { rank, scaling, count, rows, transposed, .. } = *update;
    let inner = if transposed { rows } else { update.columns };
    let down: Vec<W> = read(adapter, &update.down)?;
    let up: Vec<W> = read(adapter, &update.up)?;
    let one = |(index, down): (usize, &[W])| {
        // Experts' factors: down is stacked by expert, and in up the ranks are, each with a column an expert.
        let up: Vec<W> = up.iter().skip(index).step_by(count).copied().collect();
        let (up, down) = if transposed { (turn(down, inner), turn(&up, rank)) } else { (up, down.to_vec()) };
        Term { up, down, rank, scaling }
    };
    Ok(down.chunks((rank * inner).max(1)).enumerate().map(one).collect())
}

/// The factors of some rows of one matrix, which are zero in the other rows of the weight's matrix.
fn piece<W: Wide>(adapter: &Adapter, update: &LowRank, part: Part) -> Result<Term<W>> {
    let LowRank { rank, scaling, rows, columns, .. } = *update;
    let (expert, first) = part.from;
    let down = values(adapter, &update.down, expert * rank * columns, 1, rank * columns)?;
    let mut up = vec![W::zeroed(); rows * rank];
    // A row of `up` has each rank's column of every expert in turn.
    let taken: Vec<W> =
        values(adapter, &update.up, first * rank * part.experts + expert, part.experts, part.rows * rank)?;
    for (to, value) in up.iter_mut().skip(part.to.1 * rank).zip(taken) {
        *to = value;
    }
    Ok(Term { up, down, rank, scaling })
}

/// So many values of a tensor of the adapter, widened: from the first on, those that are a step apart.
fn values<W: Wide>(adapter: &Adapter, key: &str, first: usize, step: usize, count: usize) -> Result<Vec<W>> {
    let dtype = adapter.checkpoint.entry(key).map_or(Dtype::F32, |entry| entry.dtype);
    let bytes = adapter.read_shared(key)?;
    let elements = bytes.chunks_exact(dtype.size()).skip(first).step_by(step).take(count);
    widen(dtype, &elements.flatten().copied().collect::<Vec<u8>>())
}

/// The transpose of a matrix of that many columns.
fn turn<W: Wide>(matrix: &[W], columns: usize) -> Vec<W> {
    (0..columns).flat_map(|column| matrix.iter().skip(column).step_by(columns.max(1)).copied()).collect()
}

/// A tensor of the adapter, widened.
pub fn read<W: Wide>(adapter: &Adapter, key: &str) -> Result<Vec<W>> {
    let dtype = adapter.checkpoint.entry(key).map_or(Dtype::F32, |entry| entry.dtype);
    widen(dtype, &adapter.checkpoint.read(key)?)
}
