//! Adapter configs for Python.

use pyo3::prelude::*;

#[pyfunction]
pub fn read_config(_folder: &str) -> (String, Vec<String>) {
    (String::new(), Vec::new())
}

#[pyfunction]
pub fn check_config(_text: &str, _origin: &str) -> Vec<String> {
    Vec::new()
}
