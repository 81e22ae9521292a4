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
    memory: Option<Py<PyAny>>,
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
        asked(&self.extract, request.to_json())
    }

    fn memory(&self, request: &serde_json::Value) -> Result<serde_json::Value> {
        let missing = || Error::Merge("this program cannot tell what training takes".to_owned());
        asked(self.memory.as_ref().ok_or_else(missing)?, request.to_string())
    }
}

fn asked(function: &Py<PyAny>, request: String) -> Result<serde_json::Value> {
    let report: String = Python::attach(|py| {
        let found = function.bind(py).call1((request,)).and_then(|found| found.extract());
        found.map_err(|error| raised(py, &error))
    })?;
    serde_json::from_str(&report).map_err(|error| Error::Merge(error.to_string()))
}

fn raised(py: Python<'_>, error: &PyErr) -> Error {
    Error::Merge(error.value(py).to_string())
}

#[pyfunction]
#[pyo3(signature = (arguments, by_class, extract, memory=None))]
pub fn tool_main(
    py: Python<'_>,
    arguments: Vec<String>,
    by_class: Py<PyAny>,
    extract: Py<PyAny>,
    memory: Option<Py<PyAny>>,
) -> PyResult<i32> {
    let callbacks = Callbacks { by_class, extract, memory };
    run(py, || Ok(peftrs_cli::tool::run(&arguments, Some(&callbacks))))
}
