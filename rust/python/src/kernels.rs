//! Arithmetic on weights in place for Python.

use half::{bf16, f16};
use peftrs_core::dtype::Dtype;
use peftrs_core::error::{Error, Result};
use peftrs_core::kernels::{self, Element};
use pyo3::prelude::*;

use crate::error::run;

/// The addresses and sizes of one update, as Python gives them.
#[derive(Clone, Copy)]
struct Update {
    weight: usize,
    up: usize,
    down: usize,
    rows: usize,
    columns: usize,
    rank: usize,
    scaling: f64,
}

#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the stub fixes them")]
pub fn add_low_rank(
    py: Python<'_>,
    weight: usize,
    dtype: &str,
    rows: usize,
    columns: usize,
    up: usize,
    down: usize,
    rank: usize,
    scaling: f64,
) -> PyResult<()> {
    let update = Update { weight, up, down, rows, columns, rank, scaling };
    let dtype = dtype.to_owned();
    run(py, move || match Dtype::from_name(&dtype) {
        Some(Dtype::BF16) => update.add::<bf16>(),
        Some(Dtype::F16) => update.add::<f16>(),
        Some(Dtype::F32) => update.add::<f32>(),
        _ => Err(Error::Merge(format!("a weight of type {dtype:?} cannot be updated; F16, BF16 and F32 can"))),
    })
}

impl Update {
    fn add<E: Element>(self) -> Result<()> {
        if !self.scaling.is_finite() {
            return Err(Error::Merge(format!("the scaling is {}", self.scaling)));
        }
        let weight = span::<E>("weight", self.weight, self.rows, self.columns)?;
        let up = span::<E::Wide>("up", self.up, self.rows, self.rank)?;
        let down = span::<E::Wide>("down", self.down, self.rank, self.columns)?;
        for (name, factor) in [("up", &up), ("down", &down)] {
            if factor.start < weight.end && weight.start < factor.end {
                return Err(Error::Merge(format!("{name} and the weight share memory")));
            }
        }
        // SAFETY: `span` checked that each address is aligned and not null, unless there is nothing to read, and that the
        // size in bytes fits in isize; the weight, the only one written, overlaps neither factor. That the memory is live
        // and of that size for the call is the contract in the stub: the caller holds the tensors and passes their sizes.
        let (weight, up, down) = unsafe {
            (
                std::slice::from_raw_parts_mut(weight.pointer::<E>(), weight.count),
                std::slice::from_raw_parts(up.pointer::<E::Wide>(), up.count),
                std::slice::from_raw_parts(down.pointer::<E::Wide>(), down.count),
            )
        };
        kernels::add_low_rank(weight, (self.rows, self.columns), up, down, self.rank, self.scaling)
    }
}

/// A stretch of memory that has been checked.
struct Span {
    start: usize,
    end: usize,
    count: usize,
}

impl Span {
    fn pointer<T>(&self) -> *mut T {
        if self.count == 0 { std::ptr::dangling_mut() } else { std::ptr::with_exposed_provenance_mut(self.start) }
    }
}

fn span<T>(name: &str, start: usize, rows: usize, columns: usize) -> Result<Span> {
    let count = rows.checked_mul(columns);
    let bytes =
        count.and_then(|count| count.checked_mul(size_of::<T>())).filter(|bytes| isize::try_from(*bytes).is_ok());
    let end = bytes.and_then(|bytes| start.checked_add(bytes));
    let (Some(count), Some(end)) = (count, end) else {
        return Err(Error::Merge(format!("{name} of shape ({rows}, {columns}) is larger than memory")));
    };
    if count > 0 && (start == 0 || start % align_of::<T>() != 0) {
        let size = align_of::<T>();
        return Err(Error::Merge(format!("the address {start:#x} of {name} is null or not a multiple of {size}")));
    }
    Ok(Span { start, end, count })
}
