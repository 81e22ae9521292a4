//! The two factors of an update, laid out for the loops.

use std::borrow::Cow;

use bytemuck::Zeroable as _;

use super::element::{Element, Wide};
use super::lanes::TILE_BYTES;
use super::low_rank;
use super::parallel::parallel;
use crate::error::{Error, Result};

/// Rows whose factors lie together: with a tile's width, twelve registers of AVX-512 hold their sums; of AVX2 it takes two turns.
pub const ROWS: usize = 12;

/// Bytes of weight in one block: with its factors it stays in a core's second-level cache.
const BLOCK_BYTES: usize = 1 << 18;

/// Panels of `down` that a thread lays out at once.
const PANELS: usize = 16;

/// How many rows of `columns` elements make a block: about a quarter of a megabyte, whole groups of rows, at least one group.
#[must_use]
pub fn block_rows<E: Element>(columns: usize) -> usize {
    let rows = BLOCK_BYTES / (columns * size_of::<E>()).max(1);
    (rows / ROWS * ROWS).max(ROWS)
}

/// A tile's worth of values, where vectors do not reach across lines of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u8; TILE_BYTES]);

// SAFETY: zeros are a valid array of bytes.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: an array of bytes may hold any bits, and its size is a multiple of the alignment, so there is no padding.
unsafe impl bytemuck::Pod for Line {}

/// Columns in a tile.
pub(super) const fn tile<E: Element>() -> usize {
    TILE_BYTES / size_of::<E::Wide>()
}

/// The two factors of an update: `scaling * up @ down`, of shape (rows, columns).
pub struct Factors<'a, E: Element> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) rank: usize,
    pub(super) scaling: E::Wide,
    /// Reads a row of `up`. Only the rows of a block are laid out, while it is worked on.
    up: Box<ReadRow<'a, E::Wide>>,
    /// `down` in panels a tile wide, each panel as (rank, column), the last one filled up with zeros.
    pub(super) down: Vec<Line>,
}

/// Fills a slice with the values of the row of that number.
type ReadRow<'a, W> = dyn Fn(usize, &mut [W]) + Send + Sync + 'a;

impl<'a, E: Element> Factors<'a, E> {
    /// Takes `up` of shape (rows, rank) and lays out `down` of shape (rank, columns), both row-major.
    pub fn new(
        up: impl Into<Cow<'a, [E::Wide]>>,
        down: &[E::Wide],
        shape: (usize, usize),
        rank: usize,
        scaling: f64,
    ) -> Result<Self> {
        let (up, (rows, columns)) = (up.into(), shape);
        if rows.checked_mul(rank) != Some(up.len()) || rank.checked_mul(columns) != Some(down.len()) {
            return Err(Error::Merge(format!(
                "factors of {} and {} values do not make an update of shape ({rows}, {columns}) and rank {rank}",
                up.len(),
                down.len()
            )));
        }
        let up = move |row: usize, to: &mut [E::Wide]| copy(up.get(row * rank..).unwrap_or_default(), to);
        let down = |k: usize, column: usize, to: &mut [E::Wide]| {
            copy(down.get(k * columns + column..).unwrap_or_default(), to);
        };
        Self::gather(up, down, shape, rank, scaling, 1)
    }

    /// As [`Factors::new`], for factors that are read a part at a time: `up(row, to)` fills `to` with the values of a row, and
    /// `down(k, column, to)` with those of the row `k` from that column on, on so many threads at most.
    pub fn gather(
        up: impl Fn(usize, &mut [E::Wide]) + Send + Sync + 'a,
        down: impl Fn(usize, usize, &mut [E::Wide]) + Sync,
        shape: (usize, usize),
        rank: usize,
        scaling: f64,
        threads: usize,
    ) -> Result<Self> {
        let ((rows, columns), tile) = (shape, tile::<E>());
        let mut panels = room(columns.div_ceil(tile), rank)?;
        let chunks = panels.chunks_mut(PANELS * rank.max(1));
        parallel(threads, chunks.enumerate(), |(chunk, panels), (): &mut ()| {
            for (index, panel) in panels.chunks_exact_mut(rank.max(1)).enumerate() {
                let first = (chunk * PANELS + index) * tile;
                for (k, line) in panel.iter_mut().enumerate() {
                    let values: &mut [E::Wide] = bytemuck::cast_slice_mut(&mut line.0);
                    down(k, first, values.get_mut(..tile.min(columns - first)).unwrap_or_default());
                }
            }
        });
        Ok(Self { rows, columns, rank, scaling: Wide::from_f64(scaling), up: Box::new(up), down: panels })
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
        low_rank::run(self, first_row, self.scaling, weight, None)
    }

    /// Writes `weight + scaling * up @ down` unrounded into `sums`, as long as `weight`, which is left alone.
    pub fn sum(&self, first_row: usize, weight: &mut [E], sums: &mut [E::Wide]) {
        low_rank::run(self, first_row, self.scaling, weight, Some(sums));
    }

    /// So many rows of `up` in groups of `ROWS`, each group as (rank, row), the last one filled up with zeros.
    pub(super) fn up(&self, first_row: usize, count: usize) -> Vec<[E::Wide; ROWS]> {
        let mut groups = vec![[E::Wide::zeroed(); ROWS]; count.div_ceil(ROWS) * self.rank];
        let mut values = vec![E::Wide::zeroed(); self.rank];
        for (group, first) in groups.chunks_exact_mut(self.rank.max(1)).zip((0..count).step_by(ROWS)) {
            for (place, row) in (first..count.min(first + ROWS)).enumerate() {
                (self.up)(first_row + row, &mut values);
                for (to, from) in group.iter_mut().filter_map(|values| values.get_mut(place)).zip(&values) {
                    *to = *from;
                }
            }
        }
        groups
    }
}

/// An update to be taken out of a weight.
pub struct Negated<'a, E: Element>(&'a Factors<'a, E>);

impl<E: Element> Negated<'_, E> {
    /// As [`Factors::add`].
    pub fn add(&self, first_row: usize, weight: &mut [E]) -> bool {
        low_rank::run(self.0, first_row, self.0.scaling * Wide::from_f64(-1.0), weight, None)
    }
}

fn room(panels: usize, rank: usize) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    match panels.checked_mul(rank).map(|count| (count, lines.try_reserve_exact(count))) {
        Some((count, Ok(()))) => lines.resize(count, Line::zeroed()),
        _ => return Err(Error::Merge(format!("no memory for the factors of an update of rank {rank}"))),
    }
    Ok(lines)
}

/// Copies what both slices have room for.
#[inline(always)]
pub(super) fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}
