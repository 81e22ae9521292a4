//! What an update does to the rows of a matrix.

use std::collections::HashMap;
use std::ops::Range;

use super::matrices::View;
use super::turn::Blocks;
use super::work::Inputs;
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::kernels::values::widen;
use crate::kernels::{Element, Factors, Wide, sum_of_squares};
use crate::plan::{Change, LowRank, Output, Update};

/// One step of the way from the stored values to the merged ones.
pub enum Step<E: Element> {
    /// Adds the product of two factors: one pair a matrix.
    Add(Vec<Factors<E>>),
    /// Multiplies each row by its number.
    Rows(Vec<E::Wide>),
    /// Multiplies each column by its number: numbers for so many rows after each other, and then the next.
    Columns { factors: Vec<E::Wide>, rows: usize },
    /// Turns rows or columns.
    Turn(Blocks<E::Wide>),
    /// Gives each output its length: DoRA's last step. Outputs are rows, or columns where the weight is stored transposed.
    Lengths { magnitudes: Vec<f64>, transposed: bool },
    /// Replaces rows.
    Replace(HashMap<usize, Vec<E::Wide>>),
}

impl<E: Element> Step<E> {
    /// Whether it changes any of the rows.
    pub fn touches(&self, rows: &Range<usize>) -> bool {
        match self {
            Self::Replace(replaced) => rows.clone().any(|row| replaced.contains_key(&row)),
            _ => true,
        }
    }

    /// How many rows have to be changed together, from a multiple of this on.
    pub fn align(&self) -> usize {
        match self {
            Self::Turn(blocks) => blocks.align(),
            _ => 1,
        }
    }

    /// Changes rows of that many columns in place, the first of which is number `first`.
    pub fn apply(&self, first: usize, columns: usize, sums: &mut [E::Wide]) {
        let rows = sums.chunks_exact_mut(columns.max(1));
        match self {
            Self::Add(_) => {}
            Self::Rows(factors) => {
                for (row, factor) in rows.zip(factors.iter().skip(first)) {
                    scale(row, *factor);
                }
            }
            Self::Columns { factors, rows: group } => {
                for (row, index) in rows.zip(first..) {
                    let factors = factors.iter().skip(index / (*group).max(1) * columns);
                    for (value, factor) in row.iter_mut().zip(factors) {
                        *value = *value * *factor;
                    }
                }
            }
            Self::Turn(blocks) => blocks.apply(first, columns, sums),
            Self::Lengths { magnitudes, .. } => {
                for (row, magnitude) in rows.zip(magnitudes.iter().skip(first)) {
                    scale(row, Wide::from_f64(magnitude / sum_of_squares(row).sqrt()));
                }
            }
            Self::Replace(replaced) => {
                for (row, index) in rows.zip(first..) {
                    if let Some(values) = replaced.get(&index) {
                        row.copy_from_slice(values);
                    }
                }
            }
        }
    }
}

fn scale<W: Wide>(row: &mut [W], factor: W) {
    for value in row {
        *value = *value * factor;
    }
}

/// The steps of an output's updates, handed on in their order. Updates of low rank that follow each other are one step.
pub fn steps<E: Element>(
    inputs: Inputs,
    output: &Output,
    view: View,
    take: &mut dyn FnMut(Step<E>) -> Result<()>,
) -> Result<()> {
    let mut updates = output.updates.as_slice();
    while let Some((update, rest)) = updates.split_first() {
        match &update.change {
            Change::LowRank(_) | Change::Bias { .. } => {
                let (run, rest) = updates.split_at(additive(updates));
                take(Step::Add(sum(inputs, run, view)?))?;
                if let Some(Update { adapter, change: Change::LowRank(last) }) = run.last() {
                    if let Some(key) = &last.magnitude {
                        let magnitudes = read(inputs.adapter(*adapter)?, key)?;
                        take(Step::Lengths { magnitudes, transposed: last.transposed })?;
                    }
                }
                updates = rest;
                continue;
            }
            Change::Tokens { key, indices } => {
                let rows: Vec<E::Wide> = read(inputs.adapter(update.adapter)?, key)?;
                let rows = rows.chunks_exact(view.columns.max(1)).map(<[E::Wide]>::to_vec);
                take(Step::Replace(indices.iter().copied().zip(rows).collect()))?;
            }
            Change::Scale(scale) => {
                let factors: Vec<E::Wide> = read(inputs.adapter(update.adapter)?, &scale.key)?;
                take(if scale.rows { Step::Rows(factors) } else { columns(&factors, output, view) })?;
            }
            Change::Turn(turn) => {
                let above: Vec<f64> = read(inputs.adapter(update.adapter)?, &turn.key)?;
                take(Step::Turn(Blocks::new(turn, &above)))?;
            }
        }
        updates = rest;
    }
    Ok(())
}

/// Factors for the inputs of each group of a convolution, each as often as the kernel has elements; a matrix is one group.
fn columns<E: Element>(factors: &[E::Wide], output: &Output, view: View) -> Step<E> {
    let inputs = output.shape.get(1).copied().unwrap_or(view.columns).max(1);
    let groups = if output.shape.len() > 2 { factors.len() / inputs } else { 1 };
    let kernel = groups * view.columns / factors.len().max(1);
    let factors = factors.iter().flat_map(|factor| std::iter::repeat_n(*factor, kernel)).collect();
    Step::Columns { factors, rows: view.rows / groups.max(1) }
}

/// How many of the first updates only add, the last of them perhaps with lengths to give after.
fn additive(updates: &[Update]) -> usize {
    let mut count = 0;
    for update in updates {
        match &update.change {
            Change::LowRank(LowRank { magnitude: Some(_), .. }) => return count + 1,
            Change::LowRank(_) | Change::Bias { .. } => count += 1,
            Change::Tokens { .. } | Change::Scale(_) | Change::Turn(_) => break,
        }
    }
    count
}

/// A pair of factors of one matrix: `up` of shape (rows, rank) and `down` of shape (rank, columns), `scaling` beside them.
struct Term<W> {
    up: Vec<W>,
    down: Vec<W>,
    rank: usize,
    scaling: f64,
}

/// The factors of each matrix that add all of `updates`, their ranks one after the other.
fn sum<E: Element>(inputs: Inputs, updates: &[Update], view: View) -> Result<Vec<Factors<E>>> {
    let mut matrices: Vec<Vec<Term<E::Wide>>> = (0..view.count).map(|_| Vec::new()).collect();
    for update in updates {
        let adapter = inputs.adapter(update.adapter)?;
        let terms = match &update.change {
            Change::LowRank(update) => terms(adapter, update)?,
            Change::Bias { key, scaling } => {
                vec![Term { up: vec![Wide::from_f64(1.0)], down: read(adapter, key)?, rank: 1, scaling: *scaling }]
            }
            Change::Tokens { .. } | Change::Scale(_) | Change::Turn(_) => Vec::new(),
        };
        matrices.iter_mut().zip(terms).for_each(|(matrix, term)| matrix.push(term));
    }
    matrices.into_iter().map(|terms| factors(terms, (view.rows, view.columns))).collect()
}

/// The terms of a matrix as one pair of factors. One alone keeps its scaling apart; several have theirs in `up`.
fn factors<E: Element>(terms: Vec<Term<E::Wide>>, shape: (usize, usize)) -> Result<Factors<E>> {
    if let [Term { up, down, rank, scaling }] = terms.as_slice() {
        return Factors::new(up, down, shape, *rank, *scaling);
    }
    let rank: usize = terms.iter().map(|term| term.rank).sum();
    let mut up = Vec::with_capacity(shape.0 * rank);
    for row in 0..shape.0 {
        for term in &terms {
            let scaling: E::Wide = Wide::from_f64(term.scaling);
            up.extend(term.up.iter().skip(row * term.rank).take(term.rank).map(|value| *value * scaling));
        }
    }
    let down = terms.into_iter().flat_map(|term| term.down).collect::<Vec<_>>();
    Factors::new(&up, &down, shape, rank, 1.0)
}

/// The factors of each matrix of a weight, turned the way in which it is stored.
fn terms<W: Wide>(adapter: &Checkpoint, update: &LowRank) -> Result<Vec<Term<W>>> {
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

/// The transpose of a matrix of that many columns.
fn turn<W: Wide>(matrix: &[W], columns: usize) -> Vec<W> {
    (0..columns).flat_map(|column| matrix.iter().skip(column).step_by(columns.max(1)).copied()).collect()
}

/// A tensor of the adapter, widened.
fn read<W: Wide>(adapter: &Checkpoint, key: &str) -> Result<Vec<W>> {
    let dtype = adapter.entry(key).map_or(Dtype::F32, |entry| entry.dtype);
    widen(dtype, &adapter.read(key)?)
}
