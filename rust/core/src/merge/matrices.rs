//! A tensor as matrices whose rows are changed step by step, unrounded until the last.

use std::ops::Range;

use rayon::prelude::*;

use super::steps::{Step, steps};
use super::work::{Inputs, SCRATCH, Scratch, Values, Work, room};
use crate::error::{Error, Result, show_name};
use crate::kernels::values::all_finite;
use crate::kernels::{Element, ROWS, Wide, block_rows};
use crate::plan::{Change, Output};
use crate::threads;

/// Blocks of the kernels that are read and written at once: the system stores a few large pieces in less time than many small ones.
const BLOCKS: usize = 2;

/// How a tensor is seen: `count` matrices of shape (rows, columns), one after the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct View {
    pub count: usize,
    pub rows: usize,
    pub columns: usize,
}

impl View {
    /// A vector is one row, and a kernel's dimensions are columns; experts are told apart by the updates that they have.
    pub fn of(output: &Output) -> Self {
        if let ([.., columns], true) = (output.shape.as_slice(), output.updates.is_empty()) {
            return Self { count: 1, rows: output.shape.iter().rev().skip(1).product(), columns: *columns };
        }
        let stack = output.updates.iter().find_map(|update| match &update.change {
            Change::LowRank(update) => Some(Self { count: update.count, rows: update.rows, columns: update.columns }),
            _ => None,
        });
        stack.unwrap_or_else(|| match output.shape.as_slice() {
            [rows, rest @ ..] if !rest.is_empty() => Self { count: 1, rows: *rows, columns: rest.iter().product() },
            shape => Self { count: 1, rows: 1, columns: shape.iter().product() },
        })
    }
}

/// A tensor with its updates.
pub struct Matrices<'a, E: Element> {
    values: Values<'a>,
    name: &'a str,
    view: View,
    steps: Vec<Step<E>>,
    check: bool,
}

impl<'a, E: Element> Matrices<'a, E> {
    pub fn new(inputs: Inputs<'a>, output: &'a Output, values: Values<'a>) -> Result<Self> {
        let view = View::of(output);
        let mut work = Self { values, name: &output.name, view, steps: Vec::new(), check: !inputs.allow_nonfinite };
        steps(inputs, output, values, view, &mut |step| {
            let step = match step {
                Step::Lengths { magnitudes, transposed: true } => {
                    Step::Columns { factors: work.over_norms(&magnitudes)?, rows: view.rows }
                }
                step => step,
            };
            work.steps.push(step);
            Ok(())
        })?;
        Ok(work)
    }

    /// Each magnitude over the norm of its column of the weight after the steps so far: a pass over the whole weight.
    fn over_norms(&self, magnitudes: &[f64]) -> Result<Vec<E::Wide>> {
        let mut squares = vec![0.0; self.view.columns];
        // A few blocks at once, added up in their order: the sums are the same for any number of threads.
        for group in self.tiles().chunks(16) {
            let partial = |tile: &Range<usize>| self.column_squares(tile);
            let blocks: Vec<Vec<f64>> = threads::install(|| group.par_iter().map(partial).collect())?;
            for block in blocks {
                squares.iter_mut().zip(block).for_each(|(sum, square): (&mut f64, f64)| *sum += square);
            }
        }
        Ok(magnitudes
            .iter()
            .zip(squares)
            .map(|(magnitude, square)| Wide::from_f64(magnitude / square.sqrt()))
            .collect())
    }

    fn column_squares(&self, tile: &Range<usize>) -> Result<Vec<f64>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let (_, sums) = self.sums(tile, scratch)?;
            let mut squares = vec![0.0; self.view.columns];
            for row in sums.chunks_exact(self.view.columns.max(1)) {
                for (sum, value) in squares.iter_mut().zip(row) {
                    let value: f64 = (*value).into();
                    *sum += value * value;
                }
            }
            Ok(squares)
        })
    }

    /// The first row of a tile, counted through all matrices.
    fn row(&self, tile: &Range<usize>) -> usize {
        tile.start / size_of::<E>() / self.view.columns.max(1)
    }

    /// The rows of a tile as stored, and after all steps but unrounded.
    fn sums<'s>(&self, tile: &Range<usize>, scratch: &'s mut Scratch) -> Result<(&'s mut [E], &'s mut [E::Wide])> {
        let count = tile.len() / size_of::<E>();
        let values = room::<E>(&mut scratch.values, count)?;
        let first = tile.start / size_of::<E>();
        let sums = room::<E::Wide>(&mut scratch.sums, count)?;
        let mut steps = self.steps.iter().peekable();
        if self.values.are::<E>() {
            self.values.read(first, values)?;
            match steps.next_if(|step| matches!(step, Step::Add(_))) {
                Some(Step::Add(factors)) => {
                    if let Some((factors, row)) = self.place(factors, tile) {
                        factors.sum(row, values, sums);
                    }
                }
                _ => E::widen(values, sums),
            }
        } else {
            self.values.read_wide(first, sums)?;
        }
        for step in steps {
            if let Step::Add(factors) = step {
                let Some((factors, row)) = self.place(factors, tile) else { continue };
                let more = room::<E::Wide>(&mut scratch.more, count)?;
                values.fill(E::zeroed());
                factors.sum(row, values, more);
                sums.iter_mut().zip(more).for_each(|(sum, more)| *sum = *sum + *more);
            } else {
                step.apply(self.row(tile), self.view.columns, sums);
            }
        }
        Ok((values, sums))
    }

    /// The factors of the matrix that a tile is in, and the tile's first row there.
    fn place<'f, F>(&self, factors: &'f [F], tile: &Range<usize>) -> Option<(&'f F, usize)> {
        let (row, rows) = (self.row(tile), self.view.rows.max(1));
        Some((factors.get(row / rows)?, row % rows))
    }

    /// The values of a tile after all steps.
    fn updated<'s>(&self, tile: &Range<usize>, scratch: &'s mut Scratch) -> Result<&'s mut [E]> {
        let rows = self.row(tile)..self.row(tile) + tile.len() / size_of::<E>() / self.view.columns.max(1);
        let factors = match self.steps.as_slice() {
            _ if !self.values.are::<E>() => None,
            steps if !steps.iter().any(|step| step.touches(&rows)) => Some(&[][..]),
            [Step::Add(factors)] => Some(factors.as_slice()),
            _ => None,
        };
        let Some(factors) = factors else {
            let (values, sums) = self.sums(tile, scratch)?;
            E::round(sums, values);
            return Ok(values);
        };
        let values = room::<E>(&mut scratch.values, tile.len() / size_of::<E>())?;
        self.values.read(tile.start / size_of::<E>(), values)?;
        if let Some((factors, row)) = self.place(factors, tile) {
            factors.add(row, values);
        }
        Ok(values)
    }
}

/// The least number that both divide.
fn common_multiple(one: usize, other: usize) -> usize {
    let (mut a, mut b) = (one, other);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    one / a.max(1) * other
}

impl<E: Element> Work for Matrices<'_, E> {
    fn tiles(&self) -> Vec<Range<usize>> {
        let View { count, rows, columns } = self.view;
        let row_bytes = columns * size_of::<E>();
        let align = self.steps.iter().map(Step::align).fold(ROWS, common_multiple);
        let block = (BLOCKS * block_rows::<E>(columns)).next_multiple_of(align);
        let (matrix, block) = (rows * row_bytes, block * row_bytes);
        let mut tiles = Vec::new();
        for start in (0..count).map(|index| index * matrix) {
            tiles.extend((0..matrix).step_by(block.max(1)).map(|at| start + at..start + matrix.min(at + block)));
        }
        tiles
    }

    fn make(&self, tile: &Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let values = self.updated(tile, scratch)?;
            let bytes: &[u8] = bytemuck::cast_slice(values);
            if self.check && !all_finite(E::DTYPE, bytes) {
                let row_bytes = self.view.columns.max(1) * size_of::<E>();
                let row = bytes.chunks(row_bytes).position(|row| !all_finite(E::DTYPE, row));
                return Err(Error::Merge(format!(
                    "{} would not be finite in row {} of {}; hint: the adapter is broken, or the weight's type too \
                     narrow for the sum; --allow-nonfinite writes it all the same",
                    show_name(self.name),
                    self.row(tile) + row.unwrap_or(0),
                    E::DTYPE.name()
                )));
            }
            take(bytes)
        })
    }
}
