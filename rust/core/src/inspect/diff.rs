//! How two adapters or two checkpoints differ.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::adapter::{Adapter, LowRank};
use super::gram::root;
use super::values::side_by_side;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::threads;

/// How two tensors, or two updates of one weight, differ.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Difference {
    /// Whether they are the same, bit for bit.
    pub identical: bool,
    /// The norm of the first; none where the type has no values to compare.
    pub left: Option<f64>,
    /// The norm of the second.
    pub right: Option<f64>,
    /// The norm of their difference. That of two updates is exact to about 1e-8 of their norms.
    pub distance: Option<f64>,
    /// The norms of the differences of the two factors, down (A) and up (B), where both updates have them in one rank.
    pub factors: Option<[f64; 2]>,
    /// The cosine of the angle between them; none if one is zero.
    pub cosine: Option<f64>,
}

/// One line of a comparison.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// The update of a module in both.
    Update(String, Difference),
    /// A tensor that both have.
    Tensor(String, Difference),
    /// What both have under one name, in shapes or types that cannot be compared.
    Unlike(String, [String; 2]),
    /// What only the first has.
    Left(String),
    /// What only the second has.
    Right(String),
}

impl Difference {
    fn new(squares: [f64; 2], inner: f64, distance: f64, identical: bool) -> Self {
        let [left, right] = squares.map(root);
        let cosine = (left > 0.0 && right > 0.0).then(|| (inner / left / right).clamp(-1.0, 1.0));
        let distance = if identical { 0.0 } else { distance };
        Self { identical, left: Some(left), right: Some(right), distance: Some(distance), factors: None, cosine }
    }
}

impl Row {
    /// What it is about.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Update(name, _)
            | Self::Tensor(name, _)
            | Self::Unlike(name, _)
            | Self::Left(name)
            | Self::Right(name) => name,
        }
    }

    /// Whether it says that nothing differs.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        matches!(self, Self::Update(_, found) | Self::Tensor(_, found) if found.identical)
    }
}

/// Compares two adapters: updates of low rank by their factors, everything else tensor by tensor.
pub fn adapters(left: &Adapter, right: &Adapter) -> Result<Vec<Row>> {
    let paths: BTreeSet<&String> = left.modules.keys().chain(right.modules.keys()).collect();
    let paths: Vec<&String> = paths.into_iter().collect();
    let rows: Vec<Vec<Row>> = threads::install(|| paths.par_iter().map(|path| module(left, right, path)).collect())?;
    Ok(rows.concat())
}

fn module(left: &Adapter, right: &Adapter, path: &str) -> Result<Vec<Row>> {
    let (one, other) = match (left.modules.get(path), right.modules.get(path)) {
        (Some(one), Some(other)) => (one, other),
        (Some(_), None) => return Ok(vec![Row::Left(path.to_owned())]),
        _ => return Ok(vec![Row::Right(path.to_owned())]),
    };
    let mut rows = Vec::new();
    let mut done: Vec<&str> = Vec::new();
    if let (Some(a), Some(b)) = (&one.low_rank, &other.low_rank) {
        let ends = |update: &LowRank| (update.sizes, update.count);
        if ends(a) == ends(b) && rows_of(left, a) == rows_of(right, b) {
            rows.push(Row::Update(path.to_owned(), updates(left, a, right, b)?));
            done = vec![&a.up, &a.down, &b.up, &b.down];
        }
    }
    let slots: BTreeSet<&String> = one.tensors.iter().chain(&other.tensors).map(|(slot, _)| slot).collect();
    for slot in slots {
        let find =
            |tensors: &[(String, String)]| tensors.iter().find(|(known, _)| known == slot).map(|(_, key)| key.clone());
        let name = format!("{path}.{slot}");
        match (find(&one.tensors), find(&other.tensors)) {
            (Some(a), Some(b)) if !done.contains(&a.as_str()) => {
                rows.push(tensors((&left.weights, &a), (&right.weights, &b), name)?);
            }
            (Some(_), None) => rows.push(Row::Left(name)),
            (None, Some(_)) => rows.push(Row::Right(name)),
            _ => {}
        }
    }
    Ok(rows)
}

/// How many outputs an update has.
fn rows_of(adapter: &Adapter, update: &LowRank) -> Option<usize> {
    adapter.weights.entry(&update.up).and_then(|entry| entry.shape.first().copied())
}

/// Compares two updates: each inner product of `s B A` and `t D C` is `s t` times that of `B.T D` and `A C.T`.
fn updates(left: &Adapter, a: &LowRank, right: &Adapter, b: &LowRank) -> Result<Difference> {
    let mut factors = (a.rank == b.rank).then_some([0.0; 2]);
    let (mut squares, mut inner, mut identical) = ([0.0; 2], 0.0, a.scaling.to_bits() == b.scaling.to_bits());
    for (one, other) in left.factors(a)?.iter().zip(&right.factors(b)?) {
        let [first, second] = &mut squares;
        *first += one.up_gram(one).inner(&one.down_gram(one));
        *second += other.up_gram(other).inner(&other.down_gram(other));
        inner += one.up_gram(other).inner(&one.down_gram(other));
        identical &= one.equals(other);
        if let Some([down, up]) = &mut factors {
            let [more_down, more_up] = one.squares(other);
            *down += more_down;
            *up += more_up;
        }
    }
    let [first, second] = squares;
    let (first, second, inner) =
        (first * a.scaling * a.scaling, second * b.scaling * b.scaling, inner * a.scaling * b.scaling);
    let distance = root(first + second - 2.0 * inner);
    let factors = factors.map(|squares| squares.map(root));
    Ok(Difference { factors, ..Difference::new([first, second], inner, distance, identical) })
}

/// Compares two checkpoints tensor by tensor; this reads all of both.
pub fn checkpoints(left: &Checkpoint, right: &Checkpoint) -> Result<Vec<Row>> {
    let names: BTreeSet<&str> = left.names().chain(right.names()).collect();
    let row = |name: &&str| {
        let owned = (*name).to_owned();
        match (left.entry(name), right.entry(name)) {
            (Some(_), Some(_)) => tensors((left, name), (right, name), owned),
            (Some(_), None) => Ok(Row::Left(owned)),
            _ => Ok(Row::Right(owned)),
        }
    };
    let names: Vec<&str> = names.into_iter().collect();
    threads::install(|| names.par_iter().map(row).collect())
}

/// Compares two tensors.
fn tensors(left: (&Checkpoint, &str), right: (&Checkpoint, &str), name: String) -> Result<Row> {
    let (Some(one), Some(other)) = (left.0.entry(left.1), right.0.entry(right.1)) else { return Ok(Row::Left(name)) };
    let floats = one.dtype.is_adapter_float() && other.dtype.is_adapter_float();
    if one.shape != other.shape || one.dtype != other.dtype && !floats {
        let show = |entry: &crate::checkpoint::Entry| format!("{} {:?}", entry.dtype.name(), entry.shape);
        return Ok(Row::Unlike(name, [show(one), show(other)]));
    }
    let mut identical = one.dtype == other.dtype;
    let (mut squares, mut inner, mut distance) = ([0.0; 2], 0.0, 0.0);
    side_by_side(left, right, |a, b, equal| {
        identical &= equal;
        let [first, second] = &mut squares;
        for (a, b) in a.iter().zip(b) {
            *first += a * a;
            *second += b * b;
            inner += a * b;
            distance += (a - b) * (a - b);
        }
    })?;
    let found = if floats {
        Difference::new(squares, inner, distance.sqrt(), identical)
    } else {
        let none = one.elements() == 0;
        Difference { identical: identical || none, ..Difference::default() }
    };
    Ok(Row::Tensor(name, found))
}

/// The fields of two configs that differ, with both values; lists of names are equal in any order.
#[must_use]
pub fn fields(left: &Map<String, Value>, right: &Map<String, Value>) -> Vec<(String, Value, Value)> {
    let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let value = |fields: &Map<String, Value>, name: &str| {
        let mut value = fields.get(name).cloned().unwrap_or(Value::Null);
        if let Some(list) = value.as_array_mut()
            && list.iter().all(Value::is_string)
        {
            list.sort_by(|one, other| one.as_str().cmp(&other.as_str()));
        }
        value
    };
    let both = names.into_iter().map(|name| (name.clone(), value(left, name), value(right, name)));
    both.filter(|(_, one, other)| one != other).collect()
}
