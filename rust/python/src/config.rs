//! Adapter configs for Python.

use std::path::Path;

use peftrs_core::config::{AdapterConfig, read_text};
use pyo3::prelude::*;

use crate::error::run;

/// The text of `adapter_config.json`; see [`read_text`].
#[pyfunction]
pub fn read_config(py: Python<'_>, folder: &str) -> PyResult<(String, Vec<String>)> {
    run(py, || read_text(Path::new(folder)))
}

/// Checks an adapter config's fields; see [`AdapterConfig::parse`].
#[pyfunction]
pub fn check_config(py: Python<'_>, text: &str, origin: &str) -> PyResult<Vec<String>> {
    run(py, || AdapterConfig::parse(text, origin).map(|config| config.warnings))
}
