//! The values of one output tensor, a tile at a time: read, changed in place, checked.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::kernels::values::{all_finite, widen};
use crate::kernels::{Element, Factors, Wide, block_rows, scale_columns, scale_rows, sum_of_squares};
use crate::plan::{LowRank, Output, Source, Update};

/// Bytes of a tile that is only copied.
const COPIED: usize = 1 << 20;

/// What the work on a merge reads from.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub base: &'a Checkpoint,
    pub adapter: &'a Checkpoint,
    pub allow_nonfinite: bool,
}

/// The making of one output tensor.
pub trait Work: Send + Sync {
    /// Byte ranges of the tensor that can be made in any order.
    fn tiles(&self) -> Vec<Range<usize>>;
    /// Makes the bytes of one of them and hands them on.
    fn make(&self, tile: &Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;
}

/// What it takes to make `output`; the adapter's tensors for it are in memory afterwards.
pub fn prepare<'a>(inputs: Inputs<'a>, output: &'a Output) -> Result<Box<dyn Work + 'a>> {
    let values = Values::new(inputs, output);
    if output.update.is_none() && values.dtype == output.dtype {
        return Ok(Box::new(Copied { values, bytes: output.bytes() }));
    }
    match output.dtype {
        Dtype::BF16 => Ok(Box::new(Matrices::<bf16>::new(inputs, output, values)?)),
        Dtype::F16 => Ok(Box::new(Matrices::<f16>::new(inputs, output, values)?)),
        Dtype::F32 => Ok(Box::new(Matrices::<f32>::new(inputs, output, values)?)),
        other => Err(Error::Merge(format!("{} of type {} cannot be changed", show_name(&output.name), other.name()))),
    }
}

/// Buffers that each thread keeps from tile to tile; of u64, so that every element type is aligned.
#[derive(Default)]
struct Scratch {
    values: Vec<u64>,
    sums: Vec<u64>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The first `count` elements of `buffer`, which grows to hold them.
fn room<T: bytemuck::Pod>(buffer: &mut Vec<u64>, count: usize) -> Result<&mut [T]> {
    let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
    if words > buffer.len() {
        let more = buffer.try_reserve_exact(words - buffer.len());
        more.map_err(|_| Error::Merge(format!("no memory for a block of {} bytes", words * size_of::<u64>())))?;
        buffer.resize(words, 0);
    }
    Ok(bytemuck::cast_slice_mut::<u64, T>(buffer).get_mut(..count).unwrap_or_default())
}

/// Where an output's values are before its update.
struct Values<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    dtype: Dtype,
}

impl<'a> Values<'a> {
    fn new(inputs: Inputs<'a>, output: &'a Output) -> Self {
        let (checkpoint, name) = match &output.source {
            Source::Base(name) => (inputs.base, name),
            Source::Adapter(name) => (inputs.adapter, name),
        };
        let dtype = checkpoint.entry(name).map_or(output.dtype, |entry| entry.dtype);
        Self { checkpoint, name, dtype }
    }

    /// Fills `values` from the tensor's element number `first` on, converting if it has another type.
    fn read<E: Element>(&self, first: usize, values: &mut [E]) -> Result<()> {
        let offset = (first * self.dtype.size()) as u64;
        if self.dtype == E::DTYPE {
            return self.checkpoint.read_range(self.name, offset, bytemuck::cast_slice_mut(values));
        }
        let mut bytes = vec![0; values.len() * self.dtype.size()];
        self.checkpoint.read_range(self.name, offset, &mut bytes)?;
        E::round(&widen::<E::Wide>(self.dtype, &bytes)?, values);
        Ok(())
    }
}

/// A tensor that is written as it was read.
struct Copied<'a> {
    values: Values<'a>,
    bytes: usize,
}

impl Work for Copied<'_> {
    fn tiles(&self) -> Vec<Range<usize>> {
        (0..self.bytes).step_by(COPIED).map(|start| start..self.bytes.min(start + COPIED)).collect()
    }

    fn make(&self, tile: &Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let bytes = room::<u8>(&mut scratch.values, tile.len())?;
            self.values.checkpoint.read_range(self.values.name, tile.start as u64, bytes)?;
            take(bytes)
        })
    }
}

/// The last step of DoRA.
enum Dora<W> {
    /// A magnitude for each row of the stored weight.
    Rows(Vec<f64>),
    /// For each column of the stored weight, its magnitude over its norm.
    Columns(Vec<W>),
}

/// A tensor as matrices of shape (rows, columns), one or one an expert, with their updates.
struct Matrices<'a, E: Element> {
    values: Values<'a>,
    name: &'a str,
    rows: usize,
    columns: usize,
    factors: Vec<Factors<E>>,
    dora: Option<Dora<E::Wide>>,
    replaced: HashMap<usize, Vec<E>>,
    check: bool,
}

impl<'a, E: Element> Matrices<'a, E> {
    fn new(inputs: Inputs<'a>, output: &'a Output, values: Values<'a>) -> Result<Self> {
        let rows = output.shape.first().copied().unwrap_or(1);
        let columns = output.shape.iter().skip(1).product();
        let mut work = Self {
            values,
            name: &output.name,
            rows,
            columns,
            factors: Vec::new(),
            dora: None,
            replaced: HashMap::new(),
            check: !inputs.allow_nonfinite,
        };
        match &output.update {
            None => work.factors.push(Factors::new(&[], &[], (rows, columns), 0, 1.0)?),
            Some(Update::Bias { key, scaling }) => {
                (work.rows, work.columns) = (1, rows);
                let bias = read(inputs.adapter, key)?;
                work.factors.push(Factors::new(&[Wide::from_f64(1.0)], &bias, (1, rows), 1, *scaling)?);
            }
            Some(Update::Tokens { key, indices }) => {
                work.factors.push(Factors::new(&[], &[], (rows, columns), 0, 1.0)?);
                let trained: Vec<E::Wide> = read(inputs.adapter, key)?;
                for (index, row) in indices.iter().zip(trained.chunks_exact(columns.max(1))) {
                    let mut rounded = vec![E::zeroed(); columns];
                    E::round(row, &mut rounded);
                    work.replaced.insert(*index, rounded);
                }
            }
            Some(Update::LowRank(update)) => {
                (work.rows, work.columns) = (update.rows, update.columns);
                work.factors = factors(inputs.adapter, update)?;
                if let Some(key) = &update.magnitude {
                    let magnitudes: Vec<f64> = read(inputs.adapter, key)?;
                    work.dora = Some(if update.transposed {
                        Dora::Columns(work.over_norms(&magnitudes)?)
                    } else {
                        Dora::Rows(magnitudes)
                    });
                }
            }
        }
        Ok(work)
    }

    /// Each magnitude over the norm of its column of the updated weight: a first pass over the whole weight.
    fn over_norms(&self, magnitudes: &[f64]) -> Result<Vec<E::Wide>> {
        let mut squares = vec![0.0; self.columns];
        // A few blocks at once, added up in their order: the sums are the same for any number of threads.
        for group in self.tiles().chunks(16) {
            let partial = |tile: &Range<usize>| self.column_squares(tile);
            for block in group.par_iter().map(partial).collect::<Result<Vec<_>>>()? {
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
            let mut squares = vec![0.0; self.columns];
            for row in sums.chunks_exact(self.columns.max(1)) {
                for (sum, value) in squares.iter_mut().zip(row) {
                    let value: f64 = (*value).into();
                    *sum += value * value;
                }
            }
            Ok(squares)
        })
    }

    /// The rows of a tile as stored, and with their update but unrounded.
    fn sums<'s>(&self, tile: &Range<usize>, scratch: &'s mut Scratch) -> Result<(&'s mut [E], &'s mut [E::Wide])> {
        let count = tile.len() / size_of::<E>();
        let values = room::<E>(&mut scratch.values, count)?;
        self.values.read(tile.start / size_of::<E>(), values)?;
        let sums = room::<E::Wide>(&mut scratch.sums, count)?;
        if let Some((factors, row)) = self.place(tile) {
            factors.sum(row, values, sums);
        }
        Ok((values, sums))
    }

    /// The factors of the matrix that a tile is in, and the tile's first row there.
    fn place(&self, tile: &Range<usize>) -> Option<(&Factors<E>, usize)> {
        let row = tile.start / size_of::<E>() / self.columns.max(1);
        Some((self.factors.get(row / self.rows.max(1))?, row % self.rows.max(1)))
    }

    /// The values of a tile after the update.
    fn updated<'s>(&self, tile: &Range<usize>, scratch: &'s mut Scratch) -> Result<&'s mut [E]> {
        match &self.dora {
            None => {
                let values = room::<E>(&mut scratch.values, tile.len() / size_of::<E>())?;
                self.values.read(tile.start / size_of::<E>(), values)?;
                if let Some((factors, row)) = self.place(tile) {
                    factors.add(row, values);
                }
                Ok(values)
            }
            Some(Dora::Columns(scales)) => {
                let (values, sums) = self.sums(tile, scratch)?;
                scale_columns(sums, scales, values);
                Ok(values)
            }
            Some(Dora::Rows(magnitudes)) => {
                let (values, sums) = self.sums(tile, scratch)?;
                let first = tile.start / size_of::<E>() / self.columns.max(1);
                let rows = sums.chunks_exact(self.columns.max(1)).zip(magnitudes.iter().skip(first));
                let scales: Vec<E::Wide> =
                    rows.map(|(row, magnitude)| Wide::from_f64(magnitude / sum_of_squares(row).sqrt())).collect();
                scale_rows(sums, self.columns, &scales, values);
                Ok(values)
            }
        }
    }
}

impl<E: Element> Work for Matrices<'_, E> {
    fn tiles(&self) -> Vec<Range<usize>> {
        let row_bytes = self.columns * size_of::<E>();
        let (matrix, block) = (self.rows * row_bytes, block_rows::<E>(self.columns) * row_bytes);
        let mut tiles = Vec::new();
        for start in (0..self.factors.len()).map(|index| index * matrix) {
            tiles.extend((0..matrix).step_by(block.max(1)).map(|at| start + at..start + matrix.min(at + block)));
        }
        tiles
    }

    fn make(&self, tile: &Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let values = self.updated(tile, scratch)?;
            let first = tile.start / size_of::<E>() / self.columns.max(1);
            if !self.replaced.is_empty() {
                for (row, values) in values.chunks_exact_mut(self.columns.max(1)).enumerate() {
                    if let Some(replaced) = self.replaced.get(&(first + row)) {
                        values.copy_from_slice(replaced);
                    }
                }
            }
            let bytes: &[u8] = bytemuck::cast_slice(values);
            if self.check && !all_finite(E::DTYPE, bytes) {
                let row = bytes.chunks(self.columns.max(1) * size_of::<E>()).position(|row| !all_finite(E::DTYPE, row));
                return Err(Error::Merge(format!(
                    "{} would not be finite in row {} of {}; hint: the adapter is broken, or the weight's type too \
                     narrow for the sum; --allow-nonfinite writes it all the same",
                    show_name(self.name),
                    first + row.unwrap_or(0),
                    E::DTYPE.name()
                )));
            }
            take(bytes)
        })
    }
}

/// A tensor of the adapter, widened.
fn read<W: Wide>(adapter: &Checkpoint, key: &str) -> Result<Vec<W>> {
    let dtype = adapter.entry(key).map_or(Dtype::F32, |entry| entry.dtype);
    widen(dtype, &adapter.read(key)?)
}

/// The factors of each matrix of a weight, turned the way in which it is stored.
fn factors<E: Element>(adapter: &Checkpoint, update: &LowRank) -> Result<Vec<Factors<E>>> {
    let LowRank { rank, scaling, count, rows, columns, transposed, .. } = *update;
    let (inner, outer) = if transposed { (rows, columns) } else { (columns, rows) };
    let down: Vec<E::Wide> = read(adapter, &update.down)?;
    let up: Vec<E::Wide> = read(adapter, &update.up)?;
    let one = |(index, down): (usize, &[E::Wide])| {
        // Experts' factors: down is stacked by expert, and in up the ranks are, each with a column an expert.
        let up: Vec<E::Wide> = up.iter().skip(index).step_by(count).copied().collect();
        if transposed {
            Factors::new(&turn(down, inner), &turn(&up, rank), (rows, columns), rank, scaling)
        } else {
            Factors::new(&up, down, (outer, inner), rank, scaling)
        }
    };
    down.chunks((rank * inner).max(1)).enumerate().map(one).collect()
}

/// The transpose of a matrix of that many columns.
fn turn<W: Wide>(matrix: &[W], columns: usize) -> Vec<W> {
    (0..columns).flat_map(|column| matrix.iter().skip(column).step_by(columns.max(1)).copied()).collect()
}
