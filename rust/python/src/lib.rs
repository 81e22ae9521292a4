//! The Python extension `peftrs._native`: each room converts, releases the interpreter, calls the core, converts back.

#![allow(clippy::needless_pass_by_value, reason = "what Python hands over arrives by value")]

mod apply;
mod checkpoint;
mod config;
mod error;
mod kernels;
mod merge;
mod target;
mod tool;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    error::add_classes(module)?;
    error::run(module.py(), peftrs_core::threads::survive_forks)?;
    module.add_class::<checkpoint::Checkpoint>()?;
    module.add_class::<target::Selection>()?;
    module.add_function(wrap_pyfunction!(checkpoint::write_adapter, module)?)?;
    module.add_function(wrap_pyfunction!(checkpoint::write_config, module)?)?;
    module.add_function(wrap_pyfunction!(config::read_config, module)?)?;
    module.add_function(wrap_pyfunction!(config::check_config, module)?)?;
    module.add_function(wrap_pyfunction!(target::select, module)?)?;
    module.add_function(wrap_pyfunction!(target::shortest_suffixes, module)?)?;
    module.add_function(wrap_pyfunction!(target::parse_keys, module)?)?;
    module.add_function(wrap_pyfunction!(kernels::add_low_rank, module)?)?;
    module.add_function(wrap_pyfunction!(kernels::correct_low_rank, module)?)?;
    module.add_function(wrap_pyfunction!(kernels::restore_low_rank, module)?)?;
    module.add_function(wrap_pyfunction!(kernels::largest_magnitude, module)?)?;
    module.add_function(wrap_pyfunction!(merge::merge_main, module)?)?;
    module.add_function(wrap_pyfunction!(tool::tool_main, module)?)
}
