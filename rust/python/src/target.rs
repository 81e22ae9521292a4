//! Target matching and the key grammar for Python.

use peftrs_core::config::Names;
use peftrs_core::error::Error;
use peftrs_core::keys;
use peftrs_core::target::{self, Request};
use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyString};

use crate::error::run;

/// What a config's patterns select, and a report of what each entry matched.
#[pyclass(frozen, module = "peftrs._native")]
pub struct Selection(target::Selection);

#[pymethods]
impl Selection {
    #[getter]
    fn targets(&self) -> &[String] {
        &self.0.targets
    }

    #[getter]
    fn parameters(&self) -> &[String] {
        &self.0.parameters
    }

    #[getter]
    fn modules_to_save(&self) -> &[String] {
        &self.0.modules_to_save
    }

    #[getter]
    fn excluded(&self) -> &[String] {
        &self.0.excluded
    }

    #[getter]
    fn feedforward(&self) -> &[bool] {
        &self.0.feedforward
    }

    fn pattern_index(&self, py: Python<'_>, field: &str) -> PyResult<Vec<isize>> {
        let Some((_, found)) = self.0.pattern_index.iter().find(|(known, _)| known == field) else {
            return run(py, || Err(Error::Target(format!("{field}: was not among the patterns of this selection"))));
        };
        Ok(found.iter().map(|index| index.and_then(|index| isize::try_from(index).ok()).unwrap_or(-1)).collect())
    }

    #[getter]
    fn report(&self) -> Vec<(&str, &str, usize, Option<&str>)> {
        let rows = self.0.report.iter();
        rows.map(|row| (row.field.as_str(), row.entry.as_str(), row.count, row.nearest.as_deref())).collect()
    }
}

/// A field that holds a pattern or a list of names.
pub struct GivenNames(Names);

impl<'py> FromPyObject<'_, 'py> for GivenNames {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        // A string is a sequence as well, and must not be taken for its letters.
        if object.is_instance_of::<PyString>() {
            return Ok(Self(Names::Pattern(object.extract()?)));
        }
        Ok(Self(Names::List(object.extract()?)))
    }
}

/// Applies a config's patterns to all module names; see [`target::select`].
#[pyfunction]
#[pyo3(signature = (
    modules, *, target_modules = None, exclude_modules = None, linear = Vec::new(), layers_to_transform = None,
    layers_pattern = None, modules_to_save = None, feedforward_modules = None, parameters = Vec::new(),
    target_parameters = None, patterns = None,
), text_signature = "(modules, *, target_modules=None, exclude_modules=None, linear=(), layers_to_transform=None, \
layers_pattern=None, modules_to_save=None, feedforward_modules=None, parameters=(), target_parameters=None, patterns=None)")]
#[allow(clippy::too_many_arguments, reason = "these are the fields that configs have")]
pub fn select(
    py: Python<'_>,
    modules: Vec<String>,
    target_modules: Option<GivenNames>,
    exclude_modules: Option<GivenNames>,
    linear: Vec<String>,
    layers_to_transform: Option<Vec<i64>>,
    layers_pattern: Option<Vec<String>>,
    modules_to_save: Option<Vec<String>>,
    feedforward_modules: Option<GivenNames>,
    parameters: Vec<String>,
    target_parameters: Option<Vec<String>>,
    patterns: Option<&Bound<'_, PyMapping>>,
) -> PyResult<Selection> {
    let patterns: Vec<(String, Vec<String>)> = match patterns {
        Some(patterns) => patterns.items()?.extract()?,
        None => Vec::new(),
    };
    run(py, || {
        let request = Request {
            modules: &modules,
            linear: &linear,
            target_modules: target_modules.as_ref().map(|names| &names.0),
            exclude_modules: exclude_modules.as_ref().map(|names| &names.0),
            layers_to_transform: layers_to_transform.as_deref().unwrap_or_default(),
            layers_pattern: layers_pattern.as_deref().unwrap_or_default(),
            modules_to_save: modules_to_save.as_deref().unwrap_or_default(),
            feedforward_modules: feedforward_modules.as_ref().map(|names| &names.0),
            parameters: &parameters,
            target_parameters: target_parameters.as_deref().unwrap_or_default(),
            patterns: &patterns,
        };
        target::select(&request).map(Selection)
    })
}

/// The smallest list that selects the same; see [`target::shortest_suffixes`].
#[pyfunction]
pub fn shortest_suffixes(py: Python<'_>, targets: Vec<String>, others: Vec<String>) -> PyResult<Vec<String>> {
    run(py, || target::shortest_suffixes(&targets, &others))
}

/// The module and slot of each key; see [`keys::parse`].
#[pyfunction]
pub fn parse_keys(py: Python<'_>, keys: Vec<String>, slots: Vec<String>) -> PyResult<Vec<Option<(String, String)>>> {
    run(py, || {
        let slots: Vec<&str> = slots.iter().map(String::as_str).collect();
        let parsed = keys.iter().map(|key| keys::parse(key, &slots));
        Ok(parsed.map(|key| key.map(|key| (key.module.to_owned(), key.slot.to_owned()))).collect())
    })
}
