//! Arithmetic on weights in place for Python.

use std::ops::{BitAnd, Range};
use std::ptr::with_exposed_provenance;

use half::{bf16, f16};
use peftrs_core::dtype::Dtype;
use peftrs_core::error::{Error, Result};
use peftrs_core::kernels::{Element, Factors, Wide, in_place};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::run;

/// A matrix in memory: its address and dtype, how many rows and columns it has, and how many elements lie from one row to the
/// next and from one column to the next.
type Given = (usize, String, (usize, usize), (usize, usize));

/// `scaling * up @ down`, as Python gives it.
#[derive(Clone)]
pub struct Update {
    up: Given,
    down: Given,
    scaling: f64,
    threads: usize,
}

impl<'py> FromPyObject<'_, 'py> for Update {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let (up, down, scaling, threads) = object.extract()?;
        Ok(Self { up, down, scaling, threads })
    }
}

/// Calls a generic function for the element that a weight's dtype names.
macro_rules! for_dtype {
    ($weight:expr, $function:ident($($argument:expr),*)) => {
        match Dtype::from_name(&$weight.1) {
            Some(Dtype::BF16) => $function::<bf16>($($argument),*),
            Some(Dtype::F16) => $function::<f16>($($argument),*),
            Some(Dtype::F32) => $function::<f32>($($argument),*),
            _ => Err(Error::Merge(format!("a weight of type {:?} cannot be updated; F16, BF16 and F32 can", $weight.1))),
        }
    };
}

#[pyfunction]
pub fn add_low_rank(
    py: Python<'_>,
    weight: Given,
    update: Update,
    keep: bool,
) -> PyResult<(bool, Option<Bound<'_, PyBytes>>)> {
    let (finite, correction) = run(py, move || for_dtype!(weight, add(&weight, &update, keep)))?;
    Ok((finite, correction.map(|bytes| PyBytes::new(py, &bytes))))
}

#[pyfunction]
pub fn correct_low_rank(
    py: Python<'_>,
    original: Given,
    merged: Given,
    update: Update,
) -> PyResult<Bound<'_, PyBytes>> {
    let correction = run(py, move || for_dtype!(original, correct(&original, &merged, &update)))?;
    Ok(PyBytes::new(py, &correction))
}

#[pyfunction]
pub fn restore_low_rank(
    py: Python<'_>,
    weight: Given,
    update: Update,
    correction: Bound<'_, PyBytes>,
) -> PyResult<bool> {
    let correction = correction.as_bytes();
    run(py, move || for_dtype!(weight, restore(&weight, &update, correction)))
}

#[pyfunction]
pub fn largest_magnitude(py: Python<'_>, matrix: Given) -> PyResult<f64> {
    run(py, move || {
        extent("matrix", &matrix)?;
        // SAFETY: `extent` checked the addresses of all elements; that they are live for the call is the stub's promise.
        Ok(unsafe { Matrix::new(&matrix)?.largest(matrix.2) })
    })
}

fn add<E: Element>(weight: &Given, update: &Update, keep: bool) -> Result<(bool, Option<Vec<u8>>)> {
    let (factors, read) = update.factors::<E>(weight.2)?;
    // SAFETY: as for `elements_mut`: the caller's promise is the stub's.
    let weight = unsafe { elements_mut::<E>("weight", weight, &read)? };
    if keep {
        return in_place::add_keeping(weight, &factors, update.threads).map(|(finite, bytes)| (finite, Some(bytes)));
    }
    Ok((in_place::add(weight, &factors, update.threads)?, None))
}

fn correct<E: Element>(original: &Given, merged: &Given, update: &Update) -> Result<Vec<u8>> {
    let (factors, _) = update.factors::<E>(original.2)?;
    // SAFETY: as for `elements`, of which both are read alone.
    let (original, merged) = unsafe { (elements::<E>("original", original)?, elements::<E>("merged", merged)?) };
    in_place::correction(original, merged, &factors, update.threads)
}

fn restore<E: Element>(weight: &Given, update: &Update, correction: &[u8]) -> Result<bool> {
    let (factors, read) = update.factors::<E>(weight.2)?;
    // SAFETY: as for `elements_mut`: the caller's promise is the stub's.
    let weight = unsafe { elements_mut::<E>("weight", weight, &read)? };
    in_place::restore(weight, &factors, correction, update.threads)
}

impl Update {
    /// The factors laid out, and the memory that they were read from.
    fn factors<E: Element>(&self, shape: (usize, usize)) -> Result<(Factors<'static, E>, [Range<usize>; 2])> {
        let (rank, columns) = self.down.2;
        if self.up.2 != (shape.0, rank) || columns != shape.1 {
            let (up, down) = (self.up.2, self.down.2);
            return Err(Error::Merge(format!(
                "factors of shape {up:?} and {down:?} do not make an update of {shape:?}"
            )));
        }
        if !self.scaling.is_finite() {
            return Err(Error::Merge(format!("the scaling is {}", self.scaling)));
        }
        let read = [extent("up", &self.up)?, extent("down", &self.down)?];
        let (up, down) = (Matrix::new(&self.up)?, Matrix::new(&self.down)?);
        // SAFETY: `extent` checked that every element lies in memory that can exist, at an aligned address; that it is live
        // for the call, which outlives the factors, is the caller's promise in the stub. They ask for elements within the shape alone.
        let (up, down) =
            unsafe { (move |row, to: &mut _| up.read(row, 0, to), |k, column, to: &mut _| down.read(k, column, to)) };
        Ok((Factors::gather(up, down, shape, rank, self.scaling, self.threads)?, read))
    }
}

/// A factor, whatever its type.
struct Matrix {
    address: usize,
    dtype: Dtype,
    dtype_size: usize,
    strides: (usize, usize),
}

impl Matrix {
    fn new((address, dtype, _, strides): &Given) -> Result<Self> {
        let dtype = Dtype::from_name(dtype).filter(|dtype| dtype.is_adapter_float());
        let dtype = dtype.ok_or_else(|| Error::Merge("factors are of type F64, F32, F16 or BF16".into()))?;
        Ok(Self { address: *address, dtype, dtype_size: dtype.size(), strides: *strides })
    }

    /// Fills `to` with a row's elements from a column on.
    ///
    /// # Safety
    /// These elements are in memory that may be read.
    unsafe fn read<W: Wide>(&self, row: usize, column: usize, to: &mut [W]) {
        let address = self.address + (row * self.strides.0 + column * self.strides.1) * self.dtype_size;
        // SAFETY: the caller's promise.
        unsafe {
            match self.dtype {
                Dtype::BF16 => fill(address, self.strides.1, to, bf16::to_f64),
                Dtype::F16 => fill(address, self.strides.1, to, f16::to_f64),
                Dtype::F32 => fill(address, self.strides.1, to, |value: f32| f64::from(value)),
                _ => fill(address, self.strides.1, to, |value: f64| value),
            }
        }
    }

    /// The largest magnitude of the elements of this shape, infinite where one is not finite, and 0 where there is none.
    ///
    /// # Safety
    /// They are in memory that may be read.
    unsafe fn largest(&self, shape: (usize, usize)) -> f64 {
        // SAFETY: the caller's promise.
        let largest = unsafe {
            match self.dtype {
                Dtype::BF16 => bf16::from_bits(self.greatest(shape, 0x7fff)).to_f64(),
                Dtype::F16 => f16::from_bits(self.greatest(shape, 0x7fff)).to_f64(),
                Dtype::F32 => f64::from(f32::from_bits(self.greatest(shape, 0x7fff_ffff))),
                _ => f64::from_bits(self.greatest(shape, 0x7fff_ffff_ffff_ffff)),
            }
        };
        if largest.is_finite() { largest } else { f64::INFINITY }
    }

    /// The greatest of the elements' bits under a mask. Those of floats without their signs are in the order of the magnitudes,
    /// what is not finite last.
    ///
    /// # Safety
    /// As above; the elements are of the size of `T`.
    unsafe fn greatest<T: Copy + Default + Ord + BitAnd<Output = T>>(&self, shape: (usize, usize), mask: T) -> T {
        let ((mut rows, mut columns), (mut down, mut right)) = (shape, self.strides);
        if rows == 0 || columns == 0 {
            return T::default();
        }
        if down < right {
            (rows, columns, down, right) = (columns, rows, right, down);
        }
        if down == columns * right {
            (rows, columns) = (1, rows * columns);
        }
        let first = with_exposed_provenance::<T>(self.address);
        let mut greatest = T::default();
        for row in 0..rows {
            // SAFETY: the caller's promise; the offsets are those of elements of the shape.
            greatest = unsafe {
                let first = first.add(row * down);
                if right == 1 {
                    // Of a slice, the loop is vectorised.
                    let values = std::slice::from_raw_parts(first, columns);
                    values.iter().fold(greatest, |greatest, value| greatest.max(*value & mask))
                } else {
                    (0..columns)
                        .fold(greatest, |greatest, column| greatest.max(first.add(column * right).read() & mask))
                }
            };
        }
        greatest
    }
}

/// Fills `to` with elements from an address on, `stride` elements from one to the next.
///
/// # Safety
/// They are in memory that may be read, and aligned.
unsafe fn fill<T: Copy, W: Wide>(address: usize, stride: usize, to: &mut [W], widen: impl Fn(T) -> f64) {
    let first = with_exposed_provenance::<T>(address);
    if stride == 1 {
        // SAFETY: the caller's promise.
        let from = unsafe { std::slice::from_raw_parts(first, to.len()) };
        to.iter_mut().zip(from).for_each(|(to, from)| *to = W::from_f64(widen(*from)));
        return;
    }
    for (index, to) in to.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *to = W::from_f64(widen(unsafe { first.add(index * stride).read() }));
    }
}

/// The values of a contiguous matrix.
///
/// # Safety
/// The memory is live and nobody writes to it while they are in use.
unsafe fn elements<'a, E: Element>(name: &str, given: &Given) -> Result<&'a [E]> {
    let count = contiguous::<E>(name, given)?;
    // SAFETY: `contiguous` checked the address and the size in bytes; the caller promises the rest.
    Ok(unsafe { std::slice::from_raw_parts(pointer(given.0, count), count) })
}

/// The values of a contiguous matrix, which shares no memory with what was `read`.
///
/// # Safety
/// The memory is live and nobody else uses it while they are in use.
unsafe fn elements_mut<'a, E: Element>(name: &str, given: &Given, read: &[Range<usize>]) -> Result<&'a mut [E]> {
    let count = contiguous::<E>(name, given)?;
    let own = extent(name, given)?;
    if read.iter().any(|other| own.start < other.end && other.start < own.end) {
        return Err(Error::Merge(format!("{name} and a factor share memory")));
    }
    // SAFETY: `contiguous` checked the address and the size in bytes; the caller promises the rest.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer(given.0, count), count) })
}

fn pointer<E>(address: usize, count: usize) -> *mut E {
    if count == 0 { std::ptr::dangling_mut() } else { std::ptr::with_exposed_provenance_mut(address) }
}

/// How many elements a contiguous matrix of `E` has.
fn contiguous<E: Element>(name: &str, given: &Given) -> Result<usize> {
    extent(name, given)?;
    let (_, dtype, (rows, columns), strides) = given;
    if Dtype::from_name(dtype) != Some(E::DTYPE) || *strides != (*columns, 1) {
        return Err(Error::Merge(format!("{name} is not a contiguous matrix of type {}", E::DTYPE.name())));
    }
    Ok(rows * columns)
}

/// The addresses from a matrix's first element to the end of its last.
fn extent(name: &str, (address, dtype, (rows, columns), strides): &Given) -> Result<Range<usize>> {
    let Some(dtype) = Dtype::from_name(dtype) else {
        return Err(Error::Merge(format!("{name} has the unknown type {dtype:?}")));
    };
    if *rows == 0 || *columns == 0 {
        return Ok(*address..*address);
    }
    let last = (rows - 1).checked_mul(strides.0).zip((columns - 1).checked_mul(strides.1));
    let count = last.and_then(|(down, right)| down.checked_add(right)?.checked_add(1));
    let bytes = count.and_then(|count| count.checked_mul(dtype.size())).filter(|bytes| isize::try_from(*bytes).is_ok());
    let Some(end) = bytes.and_then(|bytes| address.checked_add(bytes)) else {
        return Err(Error::Merge(format!("{name} of shape ({rows}, {columns}) is larger than memory")));
    };
    if *address == 0 || address % dtype.size().max(1) != 0 {
        let size = dtype.size();
        return Err(Error::Merge(format!("the address {address:#x} of {name} is null or not a multiple of {size}")));
    }
    Ok(*address..end)
}
