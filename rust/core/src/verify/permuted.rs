//! Tensors or experts that stand in each other's places, or have each other's changes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Comparison, Row, Verdict};
use crate::error::Result;
use crate::plan::Output;

/// Elements of each tensor that are compared, spread over all of it.
const SAMPLES: usize = 1 << 14;

/// The most tensors that are compared with each other.
const MAX_GROUP: usize = 512;

/// The part of a tensor's error that may be left where another's place explains it.
const LEFT: f64 = 0.3;

/// Some elements of one tensor: in the base, as they should be, and as they are.
#[derive(Default)]
struct Sample {
    base: Vec<f64>,
    expected: Vec<f64>,
    merged: Vec<f64>,
}

/// Finds among the rows that are wrong those that another one of their kind explains, and says so in their verdicts.
pub fn find(comparison: &Comparison, outputs: &[&Output], rows: &mut [Row]) -> Result<()> {
    let mut groups: BTreeMap<(String, Vec<usize>), Vec<usize>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate() {
        let explained = matches!(row.verdict, Verdict::Other | Verdict::Touched | Verdict::Times(_));
        let output = outputs.iter().find(|output| output.name == row.name);
        if let Some(output) = output.filter(|_| explained) {
            groups.entry((kind(row), output.shape.clone())).or_default().push(index);
        }
    }
    for members in groups.values().filter(|members| (2..=MAX_GROUP).contains(&members.len())) {
        let samples = members.iter().filter_map(|index| rows.get(*index));
        let samples: Vec<Sample> = samples.map(|row| sample(comparison, outputs, row)).collect::<Result<_>>()?;
        let places: Vec<Option<usize>> = (0..samples.len()).map(|index| best(&samples, index)).collect();
        let distinct: BTreeSet<usize> = places.iter().copied().flatten().collect();
        if distinct.len() < places.iter().flatten().count() {
            continue;
        }
        let numbers: Vec<usize> =
            members.iter().filter_map(|index| rows.get(*index)).map(|row| number(row).unwrap_or(0)).collect();
        for (index, place) in members.iter().zip(places) {
            let from = place.and_then(|place| numbers.get(place));
            if let (Some(row), Some(from)) = (rows.get_mut(*index), from) {
                row.verdict = Verdict::Swapped(*from);
            }
        }
    }
    Ok(())
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

fn sample(comparison: &Comparison, outputs: &[&Output], row: &Row) -> Result<Sample> {
    let Some(output) = outputs.iter().find(|output| output.name == row.name) else { return Ok(Sample::default()) };
    let size = output.shape.iter().product::<usize>() / super::parts(output).max(1);
    let (first, step) = (row.part.unwrap_or(0) * size, size.div_ceil(SAMPLES).max(1));
    let blocks = comparison.blocks(output, &|block| {
        let inside = |index: &usize| (first..first + size).contains(index) && (index - first) % step == 0;
        let chosen: Vec<usize> =
            (block.start..block.start + block.expected.len()).filter(inside).map(|index| index - block.start).collect();
        let pick = |values: &[f64]| chosen.iter().filter_map(|index| values.get(*index).copied()).collect::<Vec<_>>();
        Sample { base: pick(&block.base), expected: pick(&block.expected), merged: pick(&block.merged) }
    })?;
    Ok(blocks.into_iter().fold(Sample::default(), |mut all, block| {
        all.base.extend(block.base);
        all.expected.extend(block.expected);
        all.merged.extend(block.merged);
        all
    }))
}

/// The other tensor that explains number `index` best, if it explains most of its error: by its values or by its change.
fn best(samples: &[Sample], index: usize) -> Option<usize> {
    let own = samples.get(index)?;
    let error: f64 = own.merged.iter().zip(&own.expected).map(|(found, wanted)| (found - wanted).powi(2)).sum();
    let mut found: Option<(f64, usize)> = None;
    for (place, other) in samples.iter().enumerate().filter(|(place, _)| *place != index) {
        let (mut values, mut change) = (0.0, 0.0);
        let theirs = other.expected.iter().zip(&other.base);
        for ((merged, base), (expected, their_base)) in own.merged.iter().zip(&own.base).zip(theirs) {
            values += (merged - expected).powi(2);
            change += ((merged - base) - (expected - their_base)).powi(2);
        }
        let left = values.min(change);
        if found.is_none_or(|(least, _)| left < least) {
            found = Some((left, place));
        }
    }
    found.filter(|(left, _)| *left <= LEFT * error).map(|(_, place)| place)
}
