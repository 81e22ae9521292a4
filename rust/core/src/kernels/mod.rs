//! LoRA's update of a weight, `weight += scaling * up @ down`, a block of rows at a time.
//!
//! 16-bit weights are widened to float32 and 32-bit ones to float64; the products are accumulated in that type in the
//! order of the rank, the sum is scaled, the weight is added, and the result is rounded once to nearest even. Every
//! element is computed alone, by the same operations whatever block it falls in, so the bits depend neither on the number
//! of threads nor on the instruction set: the AVX2 build of the loops multiplies and adds apart, as the portable one does.

#![allow(clippy::inline_always, reason = "the loops must be compiled inside the function that enables AVX2")]

pub mod values;

use bytemuck::Zeroable as _;
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Columns per tile: two AVX2 registers of float32, a whole number of vectors on every machine.
const TILE: usize = 16;

/// Tiles that each group of rows passes over in turn, so that their factors stay in the cache between the groups.
const PANELS: usize = 16;

/// Bytes of weight in one block: with its factors it stays in a core's second-level cache.
const BLOCK_BYTES: usize = 1 << 19;

/// A float in which updates are accumulated: f32 or f64.
pub trait Wide:
    bytemuck::Pod + Send + Sync + Into<f64> + std::ops::Add<Output = Self> + std::ops::Mul<Output = Self>
{
    /// The nearest value to `value`.
    fn from_f64(value: f64) -> Self;
}

impl Wide for f32 {
    #[allow(clippy::cast_possible_truncation, reason = "rounding to nearest is what is asked for")]
    fn from_f64(value: f64) -> Self {
        value as Self
    }
}

impl Wide for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// An element of a weight that can be updated: f32, f16 or bf16.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The type in which its updates are accumulated.
    type Wide: Wide;
    /// Rows of accumulators that, a tile wide, fit the vector registers.
    const ROWS: usize;
    /// Its type in a checkpoint.
    const DTYPE: Dtype;

    /// Widens `from` exactly into `to`, which is as long.
    fn widen(from: &[Self], to: &mut [Self::Wide]);
    /// Rounds `from` to nearest even into `to`, which is as long; a NaN stays one, quiet.
    fn round(from: &[Self::Wide], to: &mut [Self]);
}

impl Element for bf16 {
    type Wide = f32;
    const DTYPE: Dtype = Dtype::BF16;
    const ROWS: usize = 4;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            let quiet = bits | 0x40_0000;
            // A select rather than the early return of `bf16::from_f32`, which would keep the loop from being vectorised.
            let chosen = if from.is_nan() { quiet } else { nearest };
            *to = Self::from_bits((chosen >> 16) as u16);
        }
    }
}

impl Element for f16 {
    type Wide = f32;
    const DTYPE: Dtype = Dtype::F16;
    const ROWS: usize = 4;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for f32 {
    type Wide = f64;
    const DTYPE: Dtype = Dtype::F32;
    const ROWS: usize = 2;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f64]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f64::from(*from);
        }
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "rounding to nearest even is what is asked for")]
    fn round(from: &[f64], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = *from as Self;
        }
    }
}

/// The two factors of an update, laid out for the loops: `scaling * up @ down`, of shape (rows, columns).
pub struct Factors<E: Element> {
    rows: usize,
    columns: usize,
    rank: usize,
    scaling: E::Wide,
    /// `up` in groups of `E::ROWS` rows, each group as (rank, row), the last one filled up with zeros.
    up: Vec<E::Wide>,
    /// `down` in panels a tile wide, each panel as (rank, column), the last one filled up with zeros.
    down: Vec<[E::Wide; TILE]>,
}

impl<E: Element> Factors<E> {
    /// Lays out `up` of shape (rows, rank) and `down` of shape (rank, columns), both row-major.
    pub fn new(up: &[E::Wide], down: &[E::Wide], shape: (usize, usize), rank: usize, scaling: f64) -> Result<Self> {
        let (rows, columns) = shape;
        if rows.checked_mul(rank) != Some(up.len()) || rank.checked_mul(columns) != Some(down.len()) {
            return Err(Error::Merge(format!(
                "factors of {} and {} values do not make an update of shape ({rows}, {columns}) and rank {rank}",
                up.len(),
                down.len()
            )));
        }
        let zero = E::Wide::zeroed();
        let mut packed_up = vec![zero; rows.next_multiple_of(E::ROWS) * rank];
        if rank > 0 {
            for (group, rows) in packed_up.chunks_exact_mut(rank * E::ROWS).zip(up.chunks(rank * E::ROWS)) {
                for (row, values) in rows.chunks_exact(rank).enumerate() {
                    for (to, value) in group.iter_mut().skip(row).step_by(E::ROWS).zip(values) {
                        *to = *value;
                    }
                }
            }
        }
        let mut packed_down = vec![[zero; TILE]; columns.div_ceil(TILE) * rank];
        if columns > 0 {
            for (index, row) in down.chunks_exact(columns).enumerate() {
                for (tile, values) in packed_down.iter_mut().skip(index).step_by(rank).zip(row.chunks(TILE)) {
                    for (to, value) in tile.iter_mut().zip(values) {
                        *to = *value;
                    }
                }
            }
        }
        Ok(Self { rows, columns, rank, scaling: Wide::from_f64(scaling), up: packed_up, down: packed_down })
    }

    /// How many rows make a block of about half a megabyte; every block but the last has a multiple of this.
    #[must_use]
    pub fn block_rows(&self) -> usize {
        block_rows::<E>(self.columns)
    }

    /// Updates in place the rows of `weight`, which begin at `first_row`, a multiple of [`Factors::block_rows`].
    pub fn add(&self, first_row: usize, weight: &mut [E]) {
        self.run(first_row, weight, None);
    }

    /// Writes `weight + scaling * up @ down` unrounded into `sums`, as long as `weight`, which is left alone.
    pub fn sum(&self, first_row: usize, weight: &mut [E], sums: &mut [E::Wide]) {
        self.run(first_row, weight, Some(sums));
    }

    fn run(&self, first_row: usize, weight: &mut [E], sums: Option<&mut [E::Wide]>) {
        debug_assert!(first_row % E::ROWS == 0 && first_row * self.columns + weight.len() <= self.rows * self.columns);
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the one thing that the function asks of its caller, a processor with AVX2, was just checked.
            unsafe { run_avx2(self, first_row, weight, sums) };
            return;
        }
        run_sized(self, first_row, weight, sums);
    }
}

/// The same loops as [`run_sized`], compiled for AVX2; it lacks FMA on purpose, since fusing would change the bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn run_avx2<E: Element>(factors: &Factors<E>, first_row: usize, weight: &mut [E], sums: Option<&mut [E::Wide]>) {
    run_sized(factors, first_row, weight, sums);
}

#[inline(always)]
fn run_sized<E: Element>(factors: &Factors<E>, first_row: usize, weight: &mut [E], sums: Option<&mut [E::Wide]>) {
    if E::ROWS == 4 {
        run::<E, 4>(factors, first_row, weight, sums);
    } else {
        run::<E, 2>(factors, first_row, weight, sums);
    }
}

#[inline(always)]
fn run<E: Element, const ROWS: usize>(
    factors: &Factors<E>,
    first_row: usize,
    weight: &mut [E],
    mut sums: Option<&mut [E::Wide]>,
) {
    let Factors { columns, rank, scaling, .. } = *factors;
    if columns == 0 || rank == 0 {
        if let Some(sums) = sums {
            E::widen(weight, sums);
        }
        return;
    }
    let groups: &[[E::Wide; ROWS]] = bytemuck::cast_slice(&factors.up);
    let groups = groups.chunks_exact(rank).skip(first_row / ROWS);
    for (span, panels) in factors.down.chunks(PANELS * rank).enumerate() {
        let rows = weight.chunks_mut(ROWS * columns);
        for (index, (up, rows)) in groups.clone().zip(rows).enumerate() {
            for (panel, down) in panels.chunks_exact(rank).enumerate() {
                let products = multiply::<E::Wide, ROWS>(up, down);
                let start = (span * PANELS + panel) * TILE;
                let end = columns.min(start + TILE);
                for (row, (products, values)) in products.iter().zip(rows.chunks_exact_mut(columns)).enumerate() {
                    let Some(values) = values.get_mut(start..end) else { continue };
                    let offset = (index * ROWS + row) * columns;
                    let sums = sums.as_mut().and_then(|sums| sums.get_mut(offset + start..offset + end));
                    finish(values, products, scaling, sums);
                }
            }
        }
    }
}

/// `up` of shape (rank, rows) transposed, times `down` of shape (rank, tile), summed in the order of the rank.
#[inline(always)]
fn multiply<W: Wide, const ROWS: usize>(up: &[[W; ROWS]], down: &[[W; TILE]]) -> [[W; TILE]; ROWS] {
    let mut sums = [[W::zeroed(); TILE]; ROWS];
    for (up, down) in up.iter().zip(down) {
        for (sums, up) in sums.iter_mut().zip(up) {
            for (sum, down) in sums.iter_mut().zip(down) {
                *sum = *sum + *up * *down;
            }
        }
    }
    sums
}

/// Adds `scaling * products` to at most a tile of `weight`, rounding into it, or unrounded into `sums` where there is one.
#[inline(always)]
fn finish<E: Element>(weight: &mut [E], products: &[E::Wide; TILE], scaling: E::Wide, sums: Option<&mut [E::Wide]>) {
    let add = |weight: &[E; TILE]| {
        let mut wide = [E::Wide::zeroed(); TILE];
        E::widen(weight, &mut wide);
        for (wide, product) in wide.iter_mut().zip(products) {
            *wide = *wide + scaling * *product;
        }
        wide
    };
    let mut padded = [E::zeroed(); TILE];
    match (<&mut [E; TILE]>::try_from(&mut *weight), sums) {
        (Ok(weight), None) => E::round(&add(weight), weight),
        (Ok(weight), Some(sums)) => copy(&add(weight), sums),
        (Err(_), sums) => {
            copy(weight, &mut padded);
            let wide = add(&padded);
            if let Some(sums) = sums {
                copy(&wide, sums);
            } else {
                E::round(&wide, &mut padded);
                copy(&padded, weight);
            }
        }
    }
}

/// Copies what both slices have room for.
#[inline(always)]
fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// How many rows of `columns` elements make a block: about half a megabyte, whole groups of rows, at least one group.
#[must_use]
pub fn block_rows<E: Element>(columns: usize) -> usize {
    let rows = BLOCK_BYTES / (columns * size_of::<E>()).max(1);
    (rows / E::ROWS * E::ROWS).max(E::ROWS)
}

/// `weight += scaling * up @ down` in place, on all threads of rayon's current pool.
///
/// `weight` is (rows, columns), `up` (rows, rank) and `down` (rank, columns), all row-major.
pub fn add_low_rank<E: Element>(
    weight: &mut [E],
    shape: (usize, usize),
    up: &[E::Wide],
    down: &[E::Wide],
    rank: usize,
    scaling: f64,
) -> Result<()> {
    let (rows, columns) = shape;
    if rows.checked_mul(columns) != Some(weight.len()) {
        let found = weight.len();
        return Err(Error::Merge(format!("a weight of {found} values does not have the shape ({rows}, {columns})")));
    }
    let factors = Factors::<E>::new(up, down, shape, rank, scaling)?;
    let block = factors.block_rows();
    weight
        .par_chunks_mut((block * columns).max(1))
        .enumerate()
        .for_each(|(index, weight)| factors.add(index * block, weight));
    Ok(())
}

/// The sum of squares of `values`, in float64 over eight interleaved lanes, which fixes the order of the additions.
#[must_use]
pub fn sum_of_squares<W: Wide>(values: &[W]) -> f64 {
    let mut lanes = [0.0_f64; 8];
    for chunk in values.chunks(8) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let value: f64 = (*value).into();
            *lane += value * value;
        }
    }
    lanes.iter().sum()
}

/// DoRA's last step: `weight = factor * sums`, rounded once, with a factor for each row.
pub fn scale_rows<E: Element>(sums: &mut [E::Wide], columns: usize, factors: &[E::Wide], weight: &mut [E]) {
    for (row, factor) in sums.chunks_exact_mut(columns.max(1)).zip(factors) {
        for value in row {
            *value = *value * *factor;
        }
    }
    E::round(sums, weight);
}

/// DoRA's last step for a weight stored the other way round: one factor for each column.
pub fn scale_columns<E: Element>(sums: &mut [E::Wide], factors: &[E::Wide], weight: &mut [E]) {
    for row in sums.chunks_exact_mut(factors.len().max(1)) {
        for (value, factor) in row.iter_mut().zip(factors) {
            *value = *value * *factor;
        }
    }
    E::round(sums, weight);
}

#[cfg(test)]
mod tests;
