//! The loops over a block of rows: a few rows by a tile of columns at a time, whose sums stay in registers.

use bytemuck::Zeroable as _;

use super::element::{Element, Wide};
use super::lanes::{Lanes, TILE_BYTES, Vectors};
use crate::error::{Error, Result};

/// Rows whose factors lie together: with a tile's width, twelve registers of AVX-512 hold their sums; of AVX2 it takes two turns.
pub const ROWS: usize = 12;

/// Bytes of `down` that each group of rows passes over in turn, so that they stay in the second-level cache between the groups.
const SPAN_BYTES: usize = 1 << 18;

/// Bytes of weight in one block: with its factors it stays in a core's second-level cache.
const BLOCK_BYTES: usize = 1 << 18;

/// How many rows of `columns` elements make a block: about a quarter of a megabyte, whole groups of rows, at least one group.
#[must_use]
pub fn block_rows<E: Element>(columns: usize) -> usize {
    let rows = BLOCK_BYTES / (columns * size_of::<E>()).max(1);
    (rows / ROWS * ROWS).max(ROWS)
}

/// A tile's worth of values, where vectors do not reach across lines of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; TILE_BYTES]);

// SAFETY: zeros are a valid array of bytes.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: an array of bytes may hold any bits, and its size is a multiple of the alignment, so there is no padding.
unsafe impl bytemuck::Pod for Line {}

/// The two factors of an update, laid out for the loops: `scaling * up @ down`, of shape (rows, columns).
pub struct Factors<E: Element> {
    rows: usize,
    columns: usize,
    rank: usize,
    scaling: E::Wide,
    /// `up` in groups of `ROWS` rows, each group as (rank, row), the last one filled up with zeros.
    up: Vec<[E::Wide; ROWS]>,
    /// `down` in panels a tile wide, each panel as (rank, column), the last one filled up with zeros.
    down: Vec<Line>,
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
        let read = |factor: &[E::Wide], at: usize, to: &mut [E::Wide]| copy(factor.get(at..).unwrap_or_default(), to);
        let up = |row: usize, k: usize, to: &mut [E::Wide]| read(up, row * rank + k, to);
        let down = |k: usize, column: usize, to: &mut [E::Wide]| read(down, k * columns + column, to);
        Self::gather(up, down, shape, rank, scaling)
    }

    /// Lays out factors that are read a part of a row at a time: `up(row, k, to)` fills `to` with the values of a row from the
    /// one for the rank `k` on, and `down(k, column, to)` with those from the one in that column on.
    pub fn gather(
        up: impl Fn(usize, usize, &mut [E::Wide]),
        down: impl Fn(usize, usize, &mut [E::Wide]),
        shape: (usize, usize),
        rank: usize,
        scaling: f64,
    ) -> Result<Self> {
        let (rows, columns) = shape;
        let (zero, tile) = (E::Wide::zeroed(), tile::<E>());
        let mut groups = room(rows.div_ceil(ROWS), rank, [zero; ROWS])?;
        let mut line = room(1, rank, zero)?;
        for (index, group) in groups.chunks_exact_mut(rank.max(1)).enumerate() {
            for (place, row) in (index * ROWS..rows.min((index + 1) * ROWS)).enumerate() {
                up(row, 0, &mut line);
                for (to, from) in group.iter_mut().filter_map(|values| values.get_mut(place)).zip(&line) {
                    *to = *from;
                }
            }
        }
        let mut panels = room(columns.div_ceil(tile), rank, Line::zeroed())?;
        for (index, panel) in panels.chunks_exact_mut(rank.max(1)).enumerate() {
            let width = tile.min(columns - index * tile);
            for (k, line) in panel.iter_mut().enumerate() {
                let values: &mut [E::Wide] = bytemuck::cast_slice_mut(&mut line.0);
                down(k, index * tile, values.get_mut(..width).unwrap_or_default());
            }
        }
        Ok(Self { rows, columns, rank, scaling: Wide::from_f64(scaling), up: groups, down: panels })
    }

    /// The same update the other way round, which takes it out again up to rounding.
    #[must_use]
    pub fn negated(&self) -> Negated<'_, E> {
        Negated(self)
    }

    /// The shape of the weight that they are for.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// How many rows make a block of about a quarter of a megabyte; every block but the last has a multiple of this.
    #[must_use]
    pub fn block_rows(&self) -> usize {
        block_rows::<E>(self.columns)
    }

    /// Updates in place the rows of `weight`, which begin at `first_row`, a multiple of [`Factors::block_rows`]. Returns
    /// whether all sums are finite.
    pub fn add(&self, first_row: usize, weight: &mut [E]) -> bool {
        self.run(first_row, self.scaling, weight, None)
    }

    /// Writes `weight + scaling * up @ down` unrounded into `sums`, as long as `weight`, which is left alone.
    pub fn sum(&self, first_row: usize, weight: &mut [E], sums: &mut [E::Wide]) {
        self.run(first_row, self.scaling, weight, Some(sums));
    }

    fn run(&self, first_row: usize, scaling: E::Wide, weight: &mut [E], sums: Option<&mut [E::Wide]>) -> bool {
        debug_assert!(
            first_row.is_multiple_of(ROWS) && first_row * self.columns + weight.len() <= self.rows * self.columns
        );
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
                // SAFETY: the one thing that the function asks of its caller, these instructions, was just checked.
                return unsafe { run_avx512(self, first_row, scaling, weight, sums) };
            }
            if has!("avx2") && has!("fma") {
                // SAFETY: as above.
                return unsafe { run_avx2(self, first_row, scaling, weight, sums) };
            }
        }
        run_portable(self, first_row, scaling, weight, sums)
    }
}

/// An update to be taken out of a weight.
pub struct Negated<'a, E: Element>(&'a Factors<E>);

impl<E: Element> Negated<'_, E> {
    /// As [`Factors::add`].
    pub fn add(&self, first_row: usize, weight: &mut [E]) -> bool {
        self.0.run(first_row, self.0.scaling * Wide::from_f64(-1.0), weight, None)
    }
}

/// Columns in a tile.
const fn tile<E: Element>() -> usize {
    TILE_BYTES / size_of::<E::Wide>()
}

fn room<T: Clone>(count: usize, rank: usize, value: T) -> Result<Vec<T>> {
    let mut values = Vec::new();
    match count.checked_mul(rank).map(|count| (count, values.try_reserve_exact(count))) {
        Some((count, Ok(()))) => values.resize(count, value),
        _ => return Err(Error::Merge(format!("no memory for the factors of an update of rank {rank}"))),
    }
    Ok(values)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn run_avx512<E: Element>(
    factors: &Factors<E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    sums: Option<&mut [E::Wide]>,
) -> bool {
    // SAFETY: the caller promises the instructions of these vectors, of which two make a tile.
    unsafe { run::<E, <E::Wide as Vectors>::Avx512, ROWS, 2>(factors, first_row, scaling, weight, sums) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<E: Element>(
    factors: &Factors<E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    sums: Option<&mut [E::Wide]>,
) -> bool {
    // SAFETY: the caller promises the instructions of these vectors, of which four make a tile.
    unsafe { run::<E, <E::Wide as Vectors>::Avx2, { ROWS / 4 }, 4>(factors, first_row, scaling, weight, sums) }
}

fn run_portable<E: Element>(
    factors: &Factors<E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    sums: Option<&mut [E::Wide]>,
) -> bool {
    // SAFETY: portable vectors ask for no instruction, and four make a tile.
    unsafe { run::<E, <E::Wide as Vectors>::Portable, 1, 4>(factors, first_row, scaling, weight, sums) }
}

/// # Safety
/// The processor has the instructions of `V`. `COUNT` vectors are as wide as a tile, and `TURN` divides `ROWS`.
#[inline(always)]
unsafe fn run<E: Element, V: Lanes<Value = E::Wide>, const TURN: usize, const COUNT: usize>(
    factors: &Factors<E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    mut sums: Option<&mut [E::Wide]>,
) -> bool {
    let Factors { columns, rank, .. } = *factors;
    let mut poison = Poison::<E>::default();
    let tile = tile::<E>();
    if columns == 0 || rank == 0 {
        if let Some(sums) = sums {
            E::widen(weight, sums);
        }
        return true;
    }
    let groups = factors.up.chunks_exact(rank).skip(first_row / ROWS);
    let panels_in_span = (SPAN_BYTES / (rank * TILE_BYTES)).max(1);
    let mut products = [Line::zeroed(); TURN];
    for (span, panels) in factors.down.chunks(panels_in_span * rank).enumerate() {
        let rows = weight.chunks_mut(ROWS * columns);
        for (group, (up, rows)) in groups.clone().zip(rows).enumerate() {
            for (panel, down) in panels.chunks_exact(rank).enumerate() {
                let start = (span * panels_in_span + panel) * tile;
                let end = columns.min(start + tile);
                for (turn, rows) in rows.chunks_mut(TURN * columns).enumerate() {
                    // SAFETY: the caller promises what the function asks for.
                    unsafe { multiply::<E::Wide, V, TURN, COUNT>(up, turn * TURN, down, &mut products) };
                    for (row, (products, values)) in products.iter().zip(rows.chunks_exact_mut(columns)).enumerate() {
                        let Some(values) = values.get_mut(start..end) else { continue };
                        let offset = (group * ROWS + turn * TURN + row) * columns;
                        let sums = sums.as_mut().and_then(|sums| sums.get_mut(offset + start..offset + end));
                        finish(values, bytemuck::cast_slice(&products.0), scaling, sums, &mut poison);
                    }
                }
            }
        }
    }
    poison.finite()
}

/// `TURN` rows from `first` on of `up`, of shape (rank, rows) transposed, times `down` of shape (rank, tile), summed in the
/// order of the rank.
///
/// # Safety
/// The processor has the instructions of `V`, and `COUNT` of them are as wide as a line.
#[inline(always)]
#[allow(
    clippy::indexing_slicing,
    clippy::needless_range_loop,
    reason = "iterators over vectors are calls that pass them through memory"
)]
unsafe fn multiply<W: Wide, V: Lanes<Value = W>, const TURN: usize, const COUNT: usize>(
    up: &[[W; ROWS]],
    first: usize,
    down: &[Line],
    products: &mut [Line; TURN],
) {
    const { assert!(size_of::<V>() * COUNT == TILE_BYTES && TURN <= ROWS) };
    let width = size_of::<V>() / size_of::<W>();
    // SAFETY: the caller promises the instructions. Each access to a line is one of `COUNT` vectors that fill it.
    unsafe {
        let mut sums = [[V::splat(W::zeroed()); COUNT]; TURN];
        for (up, down) in up.iter().zip(down) {
            let from = std::ptr::from_ref(down).cast::<W>();
            let mut vectors = [V::splat(W::zeroed()); COUNT];
            for index in 0..COUNT {
                vectors[index] = V::load(from.add(index * width));
            }
            for row in 0..TURN {
                let value = V::splat(up[first + row]);
                for index in 0..COUNT {
                    sums[row][index] = value.mul_add(vectors[index], sums[row][index]);
                }
            }
        }
        for row in 0..TURN {
            let to = std::ptr::from_mut(&mut products[row]).cast::<W>();
            for index in 0..COUNT {
                sums[row][index].store(to.add(index * width));
            }
        }
    }
}

/// Weights that are finished at once.
const CHUNK: usize = 16;

/// A zero for each place in a chunk, until it meets a sum that is not finite.
struct Poison<E: Element>([E::Wide; CHUNK]);

impl<E: Element> Default for Poison<E> {
    fn default() -> Self {
        Self([E::Wide::zeroed(); CHUNK])
    }
}

impl<E: Element> Poison<E> {
    fn finite(&self) -> bool {
        self.0.iter().all(|value| (*value).into() == 0.0)
    }
}

/// Adds `scaling * products` to at most a tile of `weight`, rounding into it, or unrounded into `sums` where there is one.
#[inline(always)]
fn finish<E: Element>(
    weight: &mut [E],
    products: &[E::Wide],
    scaling: E::Wide,
    sums: Option<&mut [E::Wide]>,
    poison: &mut Poison<E>,
) {
    let (products, _) = products.as_chunks::<CHUNK>();
    if let Some(sums) = sums {
        let (chunks, sums) = (weight.chunks(CHUNK).zip(products), sums.chunks_mut(CHUNK));
        for ((weight, products), sums) in chunks.zip(sums) {
            let mut padded = [E::zeroed(); CHUNK];
            copy(weight, &mut padded);
            copy(&add(&padded, products, scaling, poison), sums);
        }
        return;
    }
    let (whole, rest) = weight.as_chunks_mut::<CHUNK>();
    for (weight, products) in whole.iter_mut().zip(products) {
        E::round(&add(weight, products, scaling, poison), weight);
    }
    if let (false, Some(products)) = (rest.is_empty(), products.get(whole.len())) {
        let mut padded = [E::zeroed(); CHUNK];
        copy(rest, &mut padded);
        E::round(&add(&padded, products, scaling, poison), &mut padded);
        copy(&padded, rest);
    }
}

#[inline(always)]
fn add<E: Element>(
    weight: &[E; CHUNK],
    products: &[E::Wide; CHUNK],
    scaling: E::Wide,
    poison: &mut Poison<E>,
) -> [E::Wide; CHUNK] {
    let mut wide = [E::Wide::zeroed(); CHUNK];
    E::widen(weight, &mut wide);
    for ((wide, product), poison) in wide.iter_mut().zip(products).zip(&mut poison.0) {
        *wide = scaling.mul_add(*product, *wide);
        *poison = wide.mul_add(E::Wide::zeroed(), *poison);
    }
    wide
}

/// Copies what both slices have room for.
#[inline(always)]
fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// The loops over a whole weight, with one instruction set.
#[cfg(test)]
type Run<E> = fn(&Factors<E>, &mut [E]) -> bool;

/// One for each instruction set that this processor has.
#[cfg(test)]
pub fn instruction_sets<E: Element>() -> Vec<Run<E>> {
    let mut sets: Vec<Run<E>> = vec![|factors, weight| run_portable(factors, 0, factors.scaling, weight, None)];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") {
            // SAFETY: the instructions were just checked.
            sets.push(|factors, weight| unsafe { run_avx2(factors, 0, factors.scaling, weight, None) });
        }
        if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
            // SAFETY: as above.
            sets.push(|factors, weight| unsafe { run_avx512(factors, 0, factors.scaling, weight, None) });
        }
    }
    sets
}
