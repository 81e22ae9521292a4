//! Merged rows in float64, as the formulas say them: what a check holds the kernels' rows against.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::matrices::View;
use super::steps::{Step, steps};
use super::terms::read;
use super::work::{Inputs, Values};
use crate::error::Result;
use crate::plan::{Change, LowRank, Output};
use crate::threads;

/// How the rows of one output are made.
pub struct Reference<'a> {
    values: Values<'a>,
    view: View,
    parts: Vec<Part<'a>>,
}

/// A part of an update.
enum Part<'a> {
    /// The product of two factors, as the file has them.
    LowRank { update: &'a LowRank, up: Arc<Vec<f64>>, down: Arc<Vec<f64>> },
    /// Values added to each row.
    Bias { values: Vec<f64>, scaling: f64 },
    /// A step that is no sum of products, in float64.
    Step(Step<f32>),
}

/// Rows in float64, and for each value how large the numbers were that it is a sum of.
pub struct Rows {
    pub values: Vec<f64>,
    pub reach: Vec<f64>,
}

impl<'a> Reference<'a> {
    pub fn new(inputs: Inputs<'a>, output: &'a Output) -> Result<Self> {
        let values = Values::new(inputs, output)?;
        let mut reference = Self { values, view: View::of(output), parts: Vec::new() };
        // Experts of one tensor may share factors.
        let mut factors: HashMap<(usize, &str), Arc<Vec<f64>>> = HashMap::new();
        let mut factor = |index: usize, key: &'a str| -> Result<Arc<Vec<f64>>> {
            if let Some(read) = factors.get(&(index, key)) {
                return Ok(Arc::clone(read));
            }
            let values = Arc::new(read(inputs.adapter(index)?, key)?);
            factors.insert((index, key), Arc::clone(&values));
            Ok(values)
        };
        for update in &output.updates {
            let adapter = inputs.adapter(update.adapter)?;
            let part = match &update.change {
                Change::LowRank(low) => {
                    let (up, down) = (factor(update.adapter, &low.up)?, factor(update.adapter, &low.down)?);
                    Part::LowRank { update: low, up, down }
                }
                Change::Bias { key, scaling } => Part::Bias { values: read(adapter, key)?, scaling: *scaling },
                Change::Tokens { .. } | Change::Scale(_) | Change::Turn(_) | Change::Elsewhere(_) => {
                    let alone = Output { updates: vec![update.clone()], ..output.clone() };
                    let parts = &mut reference.parts;
                    steps(inputs, &alone, values, reference.view, &mut |step| {
                        parts.push(Part::Step(step));
                        Ok(())
                    })?;
                    continue;
                }
            };
            reference.parts.push(part);
            let Change::LowRank(LowRank { magnitude: Some(key), transposed, .. }) = &update.change else { continue };
            let magnitudes: Vec<f64> = read(adapter, key)?;
            let lengths = if *transposed {
                let norms = reference.column_norms()?;
                let factors = magnitudes.iter().zip(norms).map(|(magnitude, norm)| magnitude / norm).collect();
                Step::Columns { factors, rows: reference.view.rows }
            } else {
                Step::Lengths { magnitudes, transposed: false }
            };
            reference.parts.push(Part::Step(lengths));
        }
        Ok(reference)
    }

    /// How many rows there are, all matrices together, and how many columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.view.count * self.view.rows, self.view.columns)
    }

    /// How many rows have to be made together, from a multiple of this on.
    pub fn align(&self) -> usize {
        let align = |part: &Part<'_>| if let Part::Step(step) = part { step.align() } else { 1 };
        // Blocks of several sizes end together where the product of their sizes does, if not before.
        self.parts.iter().map(align).fold(1, |all, one| if all % one == 0 { all } else { all * one })
    }

    /// So many rows, the first of which is number `first` of all matrices'.
    pub fn rows(&self, first: usize, count: usize) -> Result<Rows> {
        let columns = self.view.columns;
        let mut values = vec![0.0_f64; count * columns];
        self.values.read_wide(first * columns, &mut values)?;
        let mut reach: Vec<f64> = values.iter().map(|value| value.abs()).collect();
        for part in &self.parts {
            let rows = values.chunks_exact_mut(columns.max(1)).zip(reach.chunks_exact_mut(columns.max(1)));
            match part {
                Part::LowRank { update, up, down } => {
                    rows.zip(first..).for_each(|((values, reach), row)| add(update, up, down, row, values, reach));
                }
                Part::Bias { values: bias, scaling } => {
                    for ((value, reach), bias) in
                        rows.flat_map(|(values, reach)| values.iter_mut().zip(reach).zip(bias))
                    {
                        *value += scaling * bias;
                        *reach += (scaling * bias).abs();
                    }
                }
                Part::Step(step) => {
                    step.apply(first, columns, &mut values);
                    // It may mix the values, so that each has what is open of all.
                    let most = reach.iter().chain(&values).fold(0.0_f64, |most, value| most.max(value.abs()));
                    reach.fill(most);
                }
            }
        }
        Ok(Rows { values, reach })
    }

    /// The length of each column after the parts so far.
    fn column_norms(&self) -> Result<Vec<f64>> {
        let (rows, columns) = self.shape();
        let zero = || vec![0.0; columns];
        let plus = |mut sums: Vec<f64>, more: Vec<f64>| {
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            sums
        };
        let squares = |row: usize| -> Result<Vec<f64>> {
            Ok(self.rows(row, 1)?.values.into_iter().map(|value| value * value).collect())
        };
        let sums = threads::install(|| {
            (0..rows).into_par_iter().map(squares).try_reduce(zero, |sums, more| Ok(plus(sums, more)))
        })?;
        Ok(sums.into_iter().map(f64::sqrt).collect())
    }
}

/// Adds the update's part of one row, and to `reach` its terms without their signs.
fn add(update: &LowRank, up: &[f64], down: &[f64], row: usize, values: &mut [f64], reach: &mut [f64]) {
    let LowRank { rank, scaling, count, rows, transposed, .. } = *update;
    let (mut matrix, mut row, mut count) = (row / rows.max(1), row % rows.max(1), count);
    if let Some(part) = update.part {
        let (to, first) = part.to;
        if matrix != to || !(first..first + part.rows).contains(&row) {
            return;
        }
        (matrix, row, count) = (part.from.0, part.from.1 + row - first, part.experts);
    }
    let inner = if transposed { rows } else { values.len() };
    for (column, (value, reach)) in values.iter_mut().zip(reach).enumerate() {
        let (out, input) = if transposed { (column, row) } else { (row, column) };
        // Experts' factors: `down` is (expert, rank, in) and `up` is (out, rank, expert).
        let terms = (0..rank).map(|k| {
            let up = up.get((out * rank + k) * count + matrix).copied().unwrap_or_default();
            up * down.get((matrix * rank + k) * inner + input).copied().unwrap_or_default()
        });
        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        *value += scaling * sum;
        *reach += (scaling * size).abs();
    }
}
