//! The loops over a block of rows: a few rows by a tile of columns at a time, whose sums stay in registers.

use bytemuck::Zeroable as _;
use half::bf16;

use super::element::{Element, Wide};
use super::factors::{Factors, Line, ROWS, copy, tile};
use super::lanes::{Lanes, TILE_BYTES, Vectors};
use crate::dtype::Dtype;

/// Bytes of `down` that each group of rows passes over in turn, so that they stay in the second-level cache between the groups.
const SPAN_BYTES: usize = 1 << 18;

/// Updates the rows of `weight` from `first_row` on with the best instructions that the processor has; where there are `sums`,
/// they get the values unrounded, and `weight` is left alone. Returns whether all sums are finite.
pub(super) fn run<E: Element>(
    factors: &Factors<'_, E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    sums: Option<&mut [E::Wide]>,
) -> bool {
    debug_assert!(
        first_row.is_multiple_of(ROWS) && first_row * factors.columns + weight.len() <= factors.rows * factors.columns
    );
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
            // SAFETY: the one thing that the function asks of its caller, these instructions, was just checked.
            return unsafe { run_avx512(factors, first_row, scaling, weight, sums) };
        }
        if has!("avx2") && has!("fma") {
            // SAFETY: as above.
            return unsafe { run_avx2(factors, first_row, scaling, weight, sums) };
        }
    }
    run_portable(factors, first_row, scaling, weight, sums)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn run_avx512<E: Element>(
    factors: &Factors<'_, E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    sums: Option<&mut [E::Wide]>,
) -> bool {
    // SAFETY: the caller promises the instructions of these vectors, of which two make a tile.
    unsafe { blocks::<E, <E::Wide as Vectors>::Avx512, ROWS, 2>(factors, first_row, scaling, weight, sums) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<E: Element>(
    factors: &Factors<'_, E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    sums: Option<&mut [E::Wide]>,
) -> bool {
    // SAFETY: the caller promises the instructions of these vectors, of which four make a tile.
    unsafe { blocks::<E, <E::Wide as Vectors>::Avx2, { ROWS / 4 }, 4>(factors, first_row, scaling, weight, sums) }
}

fn run_portable<E: Element>(
    factors: &Factors<'_, E>,
    first_row: usize,
    scaling: E::Wide,
    weight: &mut [E],
    sums: Option<&mut [E::Wide]>,
) -> bool {
    // SAFETY: portable vectors ask for no instruction, and four make a tile.
    unsafe { blocks::<E, <E::Wide as Vectors>::Portable, 1, 4>(factors, first_row, scaling, weight, sums) }
}

/// # Safety
/// The processor has the instructions of `V`. `COUNT` vectors are as wide as a tile, and `TURN` divides `ROWS`.
#[inline(always)]
unsafe fn blocks<E: Element, V: Lanes<Value = E::Wide>, const TURN: usize, const COUNT: usize>(
    factors: &Factors<'_, E>,
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
    let fused = V::ADDS_BF16 && COUNT == 2 && E::DTYPE == Dtype::BF16 && sums.is_none();
    let mut finite = true;
    let up = factors.up(first_row, weight.len() / columns);
    let panels_in_span = (SPAN_BYTES / (rank * TILE_BYTES)).max(1);
    let mut products = [Line::zeroed(); TURN];
    for (span, panels) in factors.down.chunks(panels_in_span * rank).enumerate() {
        let rows = weight.chunks_mut(ROWS * columns);
        for (group, (up, rows)) in up.chunks_exact(rank).zip(rows).enumerate() {
            for (panel, down) in panels.chunks_exact(rank).enumerate() {
                let start = (span * panels_in_span + panel) * tile;
                let end = columns.min(start + tile);
                for (turn, rows) in rows.chunks_mut(TURN * columns).enumerate() {
                    // SAFETY: the caller promises what the function asks for.
                    let tile_sums = unsafe { multiply::<E::Wide, V, TURN, COUNT>(up, turn * TURN, down) };
                    if fused && end - start == tile && rows.len() == TURN * columns {
                        // SAFETY: all of the tile lies in the rows, whose elements are bf16.
                        finite &= unsafe { add_bf16(tile_sums, scaling, rows.as_mut_ptr().add(start).cast(), columns) };
                        continue;
                    }
                    // SAFETY: as above.
                    unsafe { store(tile_sums, &mut products) };
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
    finite && poison.finite()
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
) -> [[V; COUNT]; TURN] {
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
        sums
    }
}

/// Writes the products of a tile.
///
/// # Safety
/// As for `multiply`.
#[inline(always)]
#[allow(clippy::indexing_slicing, clippy::needless_range_loop, reason = "as above")]
unsafe fn store<V: Lanes, const TURN: usize, const COUNT: usize>(
    sums: [[V; COUNT]; TURN],
    products: &mut [Line; TURN],
) {
    for row in 0..TURN {
        let to = std::ptr::from_mut(&mut products[row]).cast::<V::Value>();
        for index in 0..COUNT {
            // SAFETY: the caller's promise; a line holds `COUNT` vectors.
            unsafe { sums[row][index].store(to.add(index * (size_of::<V>() / size_of::<V::Value>()))) };
        }
    }
}

/// Adds a tile's products to weights that lie `columns` elements from one row to the next.
///
/// # Safety
/// As for `multiply`; a tile's width of weights from `weight` on may be read and written in each of `TURN` rows, and `COUNT` is 2.
#[inline(always)]
#[allow(clippy::indexing_slicing, reason = "as above")]
unsafe fn add_bf16<V: Lanes, const TURN: usize, const COUNT: usize>(
    sums: [[V; COUNT]; TURN],
    scaling: V::Value,
    weight: *mut bf16,
    columns: usize,
) -> bool {
    let mut finite = true;
    // A loop would not be unrolled, and take the sums through memory.
    macro_rules! rows {
        ($($row:literal)*) => {
            $(if $row < TURN {
                // SAFETY: the caller's promise.
                unsafe {
                    finite &= V::add_bf16([sums[$row][0], sums[$row][1]], V::splat(scaling), weight.add($row * columns));
                }
            })*
        };
    }
    const { assert!(ROWS == 12) };
    rows!(0 1 2 3 4 5 6 7 8 9 10 11);
    finite
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

/// The loops over a whole weight, with one instruction set.
#[cfg(test)]
type Run<E> = fn(&Factors<'_, E>, &mut [E]) -> bool;

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
