//! What explains tensors that are wrong: the change with another scale, or that of another tensor of their kind.
//!
//! Rounding to a narrow type hides small changes, so that sums over rounded values tell little. Here the unrounded change is
//! computed, and each explanation has to predict what is there, rounding included.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use super::tally::Grid;
use super::verdict::{EXACT, TOLERANCE};
use super::{Comparison, Row, Verdict, parts};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::plan::Output;
use crate::threads;

/// Elements that are looked at of each tensor, spread over all of it, and of all tensors together.
const MAX_SAMPLES: usize = 1 << 14;
const MIN_SAMPLES: usize = 1 << 8;
const ALL_SAMPLES: usize = 1 << 22;

/// The most tensors that are compared with each other.
const MAX_GROUP: usize = 512;

/// The part of what is unexplained that an explanation may leave.
const LEFT: f64 = 0.3;

/// The scales that are tried are at most this.
const MAX_SCALE: f64 = 4.0;

/// Some elements of one tensor: in the base, what should be added to them, and as they are.
#[derive(Default)]
struct Sample {
    base: Vec<f64>,
    change: Vec<f64>,
    merged: Vec<f64>,
}

/// A row that is wrong, by its number, and some of its elements.
struct Wrong {
    row: usize,
    sample: Sample,
    grid: Grid,
}

/// Looks for what explains the rows that are wrong, and says so in their verdicts.
pub fn explain(comparison: &Comparison, outputs: &[&Output], rows: &mut [Row]) -> Result<()> {
    let mut wrong: BTreeMap<&str, Vec<(usize, usize)>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate().filter(|(_, row)| needs_look(row)) {
        wrong.entry(&row.name).or_default().push((index, row.part.unwrap_or(0)));
    }
    let count = (ALL_SAMPLES / wrong.values().map(Vec::len).sum::<usize>().max(1)).clamp(MIN_SAMPLES, MAX_SAMPLES);
    let wrong: Vec<(&Output, Vec<(usize, usize)>)> =
        outputs.iter().filter_map(|output| Some((*output, wrong.remove(output.name.as_str())?))).collect();
    let looks = |(output, members): &(&Output, Vec<(usize, usize)>)| -> Result<Vec<Wrong>> {
        let Some(grid) = comparison.grid(output) else { return Ok(Vec::new()) };
        let mut samples = comparison.samples(output, count)?;
        let one =
            |&(row, part): &(usize, usize)| Some(Wrong { row, sample: std::mem::take(samples.get_mut(part)?), grid });
        Ok(members.iter().filter_map(one).collect())
    };
    let wrong: Vec<Vec<Wrong>> = threads::install(|| wrong.par_iter().map(looks).collect())?;
    let mut groups: BTreeMap<String, Vec<Wrong>> = BTreeMap::new();
    for one in wrong.into_iter().flatten() {
        let Some(row) = rows.get_mut(one.row) else { continue };
        match one.sample.scale(one.grid).filter(|_| !row.copied) {
            Some(scale) if (scale - 1.0).abs() > TOLERANCE => row.verdict = Verdict::Times(scale),
            Some(_) if matches!(row.verdict, Verdict::Times(_)) => row.verdict = Verdict::Right,
            _ => groups.entry(kind(row)).or_default().push(one),
        }
    }
    for members in groups.values().filter(|members| (2..=MAX_GROUP).contains(&members.len())) {
        swaps(members, rows);
    }
    Ok(())
}

/// Whether the sums alone do not tell what happened to a row.
fn needs_look(row: &Row) -> bool {
    match row.verdict {
        Verdict::Times(_) => row.tally.residual().is_none_or(|residual| residual > EXACT),
        Verdict::Other | Verdict::Touched => true,
        _ => false,
    }
}

/// Finds among tensors of one kind those that stand in each other's places.
fn swaps(members: &[Wrong], rows: &mut [Row]) {
    let best = |own: &Wrong| {
        let limit = LEFT * own.sample.left(&own.sample, &own.sample, 1.0, own.grid);
        let others = members.iter().filter(|other| other.row != own.row);
        let left = |other: &Wrong| {
            // Its change in this place, or all of it as it should be.
            let [changed, moved] =
                [&own.sample, &other.sample].map(|base| own.sample.left(base, &other.sample, 1.0, own.grid));
            (changed.min(moved), other.row)
        };
        let found = others.map(left).min_by(|one, other| one.0.total_cmp(&other.0))?;
        (found.0 <= limit).then_some(found.1)
    };
    let places: Vec<Option<usize>> = members.iter().map(best).collect();
    let distinct: BTreeSet<usize> = places.iter().copied().flatten().collect();
    if distinct.len() < places.iter().flatten().count() {
        return;
    }
    for (one, place) in members.iter().zip(places) {
        let from = place.and_then(|place| rows.get(place)).and_then(number);
        if let (Some(row), Some(from)) = (rows.get_mut(one.row), from) {
            row.verdict = Verdict::Swapped(from);
        }
    }
}

impl Sample {
    /// What is left of the values here if they are `base`'s with `scale` times the change of `other`: the sum of squares.
    fn left(&self, base: &Self, other: &Self, scale: f64, grid: Grid) -> f64 {
        let elements = base.base.iter().zip(&other.change).zip(&self.merged);
        elements.map(|((base, change), merged)| (merged - grid.nearest(base + scale * change)).powi(2)).sum()
    }

    /// How many times the change is in the values, if that explains them.
    fn scale(&self, grid: Grid) -> Option<f64> {
        let left = |scale: f64| self.left(self, self, scale, grid);
        let (mut best, mut step) = (0.0, 0.25);
        // A grid over all scales, then ever finer ones around the best.
        let mut reach = MAX_SCALE;
        for _ in 0..5 {
            let (center, mut least) = (best, f64::INFINITY);
            let mut scale = center - reach;
            while scale <= center + reach {
                let found = left(scale);
                if found < least {
                    (best, least) = (scale, found);
                }
                scale += step;
            }
            (reach, step) = (step, step / 8.0);
        }
        (left(best) <= LEFT * LEFT * left(0.0)).then_some(best)
    }
}

impl Comparison {
    /// The coarser grid of a tensor as it should be and as it is.
    fn grid(&self, output: &Output) -> Option<Grid> {
        let found = self.merged.weights.entry(&self.merged_name(&output.name))?.dtype;
        Some(Grid::of(output.dtype)?.min(Grid::of(found)?))
    }

    /// About `count` elements of a tensor, or of each expert of a stack.
    fn samples(&self, output: &Output, count: usize) -> Result<Vec<Sample>> {
        let parts = parts(output).max(1);
        let size = (output.shape.iter().product::<usize>() / parts).max(1);
        let step = size.div_ceil(count).max(1);
        let dtype = if output.dtype.size() < 4 { Dtype::F32 } else { output.dtype };
        let unrounded = Output { dtype, ..output.clone() };
        let blocks = self.blocks(&unrounded, &|block| {
            let places = (0..block.expected.len()).filter(|place| ((block.start + place) % size).is_multiple_of(step));
            let places: Vec<usize> = places.collect();
            let pick =
                |values: &[f64]| places.iter().filter_map(|place| values.get(*place).copied()).collect::<Vec<_>>();
            let (base, expected, merged) = (pick(&block.base), pick(&block.expected), pick(&block.merged));
            let change = expected.iter().zip(&base).map(|(expected, base)| expected - base).collect();
            (block.start / size, Sample { base, change, merged })
        })?;
        let mut samples: Vec<Sample> = std::iter::repeat_with(Sample::default).take(parts).collect();
        for (part, block) in blocks {
            let Some(sample) = samples.get_mut(part) else { continue };
            sample.base.extend(block.base);
            sample.change.extend(block.change);
            sample.merged.extend(block.merged);
        }
        Ok(samples)
    }
}

/// What the tensors have in common that may have been swapped: all but the innermost number of the name, or the stack.
pub fn kind(row: &Row) -> String {
    if row.part.is_some() {
        return format!("{}.*", row.name);
    }
    let mut parts: Vec<&str> = row.name.split('.').collect();
    if let Some(part) = parts.iter_mut().rev().find(|part| part.parse::<usize>().is_ok()) {
        *part = "*";
    }
    parts.join(".")
}

/// That number.
pub fn number(row: &Row) -> Option<usize> {
    row.part.or_else(|| row.name.rsplit('.').find_map(|part| part.parse().ok()))
}
