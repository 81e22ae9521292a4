//! What an update does to the rows of a matrix.

use std::collections::HashMap;
use std::ops::Range;

use super::elsewhere::whole;
use super::matrices::View;
use super::terms::{read, sum};
use super::turn::Blocks;
use super::work::{Inputs, Values};
use crate::error::Result;
use crate::kernels::{Element, Factors, Wide, sum_of_squares};
use crate::plan::{Change, LowRank, Output, Update};

/// One step of the way from the stored values to the merged ones.
pub enum Step<E: Element> {
    /// Adds the product of two factors: one pair a matrix.
    Add(Vec<Factors<'static, E>>),
    /// Multiplies each row by its number.
    Rows(Vec<E::Wide>),
    /// Multiplies each column by its number: numbers for so many rows after each other, and then the next.
    Columns { factors: Vec<E::Wide>, rows: usize },
    /// Turns rows or columns.
    Turn(Blocks<E::Wide>),
    /// Gives each output its length: DoRA's last step. Outputs are rows, or columns where the weight is stored transposed.
    Lengths { magnitudes: Vec<f64>, transposed: bool },
    /// Takes all values from elsewhere.
    Set(Vec<E::Wide>),
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
            Self::Set(values) => {
                for (value, set) in sums.iter_mut().zip(values.iter().skip(first * columns)) {
                    *value = *set;
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
    values: Values,
    view: View,
    take: &mut dyn FnMut(Step<E>) -> Result<()>,
) -> Result<()> {
    let mut updates = output.updates.as_slice();
    while let Some((update, rest)) = updates.split_first() {
        match &update.change {
            Change::LowRank(_) | Change::Bias { .. } => {
                let (run, rest) = updates.split_at(additive(updates));
                take(Step::Add(sum(inputs, run, view)?))?;
                if let Some(Update { adapter, change: Change::LowRank(last) }) = run.last()
                    && let Some(key) = &last.magnitude
                {
                    let magnitudes = read(inputs.adapter(*adapter)?, key)?;
                    take(Step::Lengths { magnitudes, transposed: last.transposed })?;
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
            Change::Elsewhere(change) => take(Step::Set(whole(inputs, output, values, update.adapter, change)?))?,
            Change::Turn(turn) => {
                let above: Vec<f64> = read(inputs.adapter(update.adapter)?, &turn.key)?;
                take(Step::Turn(Blocks::new(turn, &above)?))?;
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
            Change::Tokens { .. } | Change::Scale(_) | Change::Turn(_) | Change::Elsewhere(_) => break,
        }
    }
    count
}
