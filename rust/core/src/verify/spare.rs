//! Tensors that one of two checkpoints of a model may have and the other not: tied ones, and what is computed on loading.

use std::collections::HashSet;

use super::{Comparison, Row, Verdict};
use crate::checkpoint::{Checkpoint, Entry};
use crate::error::{Result, show_name};
use crate::plan::is_embedding;

/// The last parts of names of tensors that models compute when they are made, and that older libraries saved.
const COMPUTED: [&str; 5] = ["inv_freq", "position_ids", "masked_bias", "cos_cached", "sin_cached"];

/// Settles what is missing or more than it should be and means nothing; returns the tensors that should not be there.
pub fn settle(comparison: &Comparison, rows: &mut [Row], notes: &mut Vec<String>) -> Result<Vec<String>> {
    let expected: HashSet<String> = rows.iter().map(|row| comparison.merged_name(&row.name)).collect();
    let merged = &comparison.merged.weights;
    let mut extra = Vec::new();
    for (name, entry) in merged.entries().filter(|(name, _)| !expected.contains(*name)) {
        match twin(merged, name)? {
            Some(twin) => notes.push(format!("{} is a copy of {}", show_name(name), show_name(twin))),
            None if is_computed(name, entry) => {}
            None => extra.push(name.to_owned()),
        }
    }
    let base = &comparison.base.weights;
    for row in rows.iter_mut().filter(|row| row.verdict == Verdict::Missing && row.copied) {
        let there = |twin: &&str| merged.entry(&comparison.merged_name(twin)).is_some();
        if let Some(twin) = twin(base, &row.name)?.filter(there) {
            notes.push(format!("{} is left out, being a copy of {}", show_name(&row.name), show_name(twin)));
            row.verdict = Verdict::Right;
        } else if base.entry(&row.name).is_some_and(|entry| is_computed(&row.name, entry)) {
            row.verdict = Verdict::Right;
        }
    }
    Ok(extra)
}

/// Whether a model makes the tensor itself; the causal mask of GPT-2's layers is called like a bias.
fn is_computed(name: &str, entry: &Entry) -> bool {
    COMPUTED.contains(&name.rsplit('.').next().unwrap_or_default())
        || name.ends_with(".attn.bias") && entry.shape.len() == 4
}

/// The tensor that one is a copy of, byte for byte, among those that models tie: an embedding and a head, or the bias of a
/// head and that of its last layer.
fn twin<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<Option<&'a str>> {
    let Some(entry) = checkpoint.entry(name) else { return Ok(None) };
    let alike = |(other, found): &(&str, &Entry)| {
        (is_embedding(other) || is_embedding(name) || is_within(name, other) || is_within(other, name))
            && *other != name
            && (&found.shape, found.dtype) == (&entry.shape, entry.dtype)
    };
    for (other, _) in checkpoint.entries().filter(alike) {
        if checkpoint.has_bytes_of(name, checkpoint, other)? {
            return Ok(Some(other));
        }
    }
    Ok(None)
}

/// Whether `inner` is the parameter of a module, and `outer` the one of that name that the module's parent has.
fn is_within(inner: &str, outer: &str) -> bool {
    let parent = |name: &'_ str| name.rsplit_once('.').map(|(module, leaf)| (module.to_owned(), leaf.to_owned()));
    let (Some((module, leaf)), Some((other, own))) = (parent(inner), parent(outer)) else { return false };
    leaf == own && module.rsplit_once('.').is_some_and(|(above, _)| above == other)
}
