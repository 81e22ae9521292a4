//! The tool `peftrs` for Python, where torch and a model's class can be asked.

use std::path::Path;

use peftrs_cli::tool::Extraction;
use peftrs_core::error::{Error, Result};
use peftrs_core::outline::{Layer, Outline};
use pyo3::prelude::*;

use crate::error::run;

/// Modules, layers as (name, kind, shape, parameters), parameters, and what `all-linear` stands for.
type Described = (Vec<String>, Vec<(String, String, Vec<usize>, u64)>, Vec<String>, Vec<String>);

/// The functions that the tool calls; the message of whatever they raise is the tool's error.
struct Callbacks {
    by_class: Py<PyAny>,
    extract: Py<PyAny>,
}

impl peftrs_cli::tool::Python for Callbacks {
    fn outline(&self, model: &Path, task: Option<&str>) -> Result<Outline> {
        let (modules, layers, parameters, linear): Described = Python::attach(|py| {
            let found = self.by_class.bind(py).call1((model, task)).and_then(|found| found.extract());
            found.map_err(|error| raised(py, &error))
        })?;
        let layer = |(name, kind, shape, parameters)| Layer { name, kind, shape, parameters };
        Ok(Outline { modules, layers: layers.into_iter().map(layer).collect(), parameters, linear: Some(linear) })
    }

    fn extract(&self, request: &Extraction) -> Result<serde_json::Value> {
        let report: String = Python::attach(|py| {
            let found = self.extract.bind(py).call1((request.to_json(),)).and_then(|found| found.extract());
            found.map_err(|error| raised(py, &error))
        })?;
        serde_json::from_str(&report).map_err(|error| Error::Merge(error.to_string()))
    }
}

fn raised(py: Python<'_>, error: &PyErr) -> Error {
    Error::Merge(error.value(py).to_string())
}

#[pyfunction]
pub fn tool_main(py: Python<'_>, arguments: Vec<String>, by_class: Py<PyAny>, extract: Py<PyAny>) -> PyResult<i32> {
    let callbacks = Callbacks { by_class, extract };
    run(py, || Ok(peftrs_cli::tool::run(&arguments, Some(&callbacks))))
}
