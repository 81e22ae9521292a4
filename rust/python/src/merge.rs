//! The merge tool for Python.

use pyo3::prelude::*;

#[pyfunction]
pub fn merge_main(_arguments: Vec<String>) -> i32 {
    2
}
