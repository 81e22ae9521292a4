//! Target matching and the key grammar for Python.

use pyo3::prelude::*;

#[pyclass(frozen, module = "peftrs._native")]
pub struct Selection;

#[pyfunction]
pub fn select() -> Selection {
    Selection
}

#[pyfunction]
pub fn shortest_suffixes() {}

#[pyfunction]
pub fn parse_keys() {}
