//! Arithmetic on weights in place for Python.

use pyo3::prelude::*;

#[pyfunction]
pub fn add_low_rank() {}
