//! Checkpoints for Python.

use pyo3::prelude::*;

#[pyclass(frozen, module = "peftrs._native")]
pub struct Checkpoint;

#[pyfunction]
pub fn write_adapter() {}
