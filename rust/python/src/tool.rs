//! The tool `peftrs` for Python, where a model's class can be asked.

use std::path::Path;

use peftrs_core::error::{Error, Result};
use peftrs_core::outline::{Layer, Outline};
use pyo3::prelude::*;

use crate::error::run;

/// Modules, layers as (name, kind, shape, parameters), parameters, and what `all-linear` stands for.
type Described = (Vec<String>, Vec<(String, String, Vec<usize>, u64)>, Vec<String>, Vec<String>);

#[pyfunction]
pub fn tool_main(py: Python<'_>, arguments: Vec<String>, by_class: Py<PyAny>) -> PyResult<i32> {
    run(py, || {
        let ask = |model: &Path, task: Option<&str>| Python::attach(|py| outline(by_class.bind(py), model, task));
        Ok(peftrs_cli::tool::run(&arguments, Some(&ask)))
    })
}

/// What `by_class` says of a model; whatever it raises is the tool's error.
fn outline(by_class: &Bound<'_, PyAny>, model: &Path, task: Option<&str>) -> Result<Outline> {
    let described = by_class.call1((model, task)).and_then(|found| found.extract::<Described>());
    let (modules, layers, parameters, linear) =
        described.map_err(|error| Error::Target(error.value(by_class.py()).to_string()))?;
    let layer = |(name, kind, shape, parameters)| Layer { name, kind, shape, parameters };
    Ok(Outline { modules, layers: layers.into_iter().map(layer).collect(), parameters, linear: Some(linear) })
}
