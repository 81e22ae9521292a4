//! Methods without a kernel in the core, computed by their Python classes.

use peftrs_core::dtype::Dtype;
use peftrs_core::error::{Error, Result};
use peftrs_core::plan::{Apply, Effect, Layer};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

/// The module that does it; importing it imports torch.
const MODULE: &str = "peftrs.io.apply";

/// A weight and a bias, each as bytes.
type Bytes = (Vec<u8>, Option<Vec<u8>>);

/// Calls into Python, whose errors become refusals. The caller must not hold the interpreter's lock.
#[derive(Debug)]
pub struct Python;

thread_local! {
    static KEPT: Kept = Kept::new();
}

/// Python's state of this thread, kept from the first call to the end. Without it, every call would make one and delete it
/// again, and the torch of before 2.7 goes on using the first that it saw in a thread.
struct Kept;

impl Kept {
    fn new() -> Self {
        // SAFETY: the caller does not hold the interpreter's lock. It is taken and given back, and only the thread's state stays,
        // which is the interpreter's own, and freed with it: the thread may end at a time when the lock can no longer be had.
        unsafe {
            ffi::PyGILState_Ensure();
            ffi::PyEval_SaveThread();
        }
        Self
    }
}

impl Python {
    fn call<T>(work: impl FnOnce(pyo3::Python<'_>, &Bound<'_, PyModule>) -> PyResult<T>) -> Result<T> {
        KEPT.with(|_| ());
        pyo3::Python::attach(|py| py.import(MODULE).and_then(|module| work(py, &module)))
            .map_err(|error| Error::Merge(pyo3::Python::attach(|py| error.value(py).to_string())))
    }
}

fn describe<'py>(py: pyo3::Python<'py>, layer: &Layer) -> PyResult<Bound<'py, PyDict>> {
    let facts = PyDict::new(py);
    facts.set_item("config", &*layer.config)?;
    facts.set_item("strength", layer.weight)?;
    facts.set_item("path", &layer.path)?;
    facts.set_item("parameter", &layer.parameter)?;
    facts.set_item("dtype", layer.dtype.name())?;
    facts.set_item("shape", &layer.shape)?;
    facts.set_item("bias", layer.bias)?;
    facts.set_item("transposed", layer.transposed)?;
    let slots = layer.slots.iter().map(|slot| (&slot.name, slot.dtype.name(), &slot.shape)).collect::<Vec<_>>();
    facts.set_item("slots", slots)?;
    Ok(facts)
}

impl Apply for Python {
    fn prefix(&self, config: &str) -> Result<String> {
        Self::call(|_, module| module.getattr("prefix")?.call1((config,))?.extract())
    }

    fn check(&self, layer: &Layer) -> Result<Effect> {
        let (additive, bias) = Self::call(|py, module| {
            module.getattr("check")?.call1((describe(py, layer)?,))?.extract::<(bool, bool)>()
        })?;
        Ok(Effect { additive, bias })
    }

    fn apply(
        &self,
        layer: &Layer,
        slots: &[Vec<u8>],
        wide: Dtype,
        weight: Vec<u8>,
        bias: Option<Vec<u8>>,
    ) -> Result<Bytes> {
        Self::call(|py, module| {
            let slots: Vec<_> = slots.iter().map(|slot| PyBytes::new(py, slot)).collect();
            let bias = bias.map(|bias| PyBytes::new(py, &bias));
            let values = (describe(py, layer)?, slots, wide.name(), PyBytes::new(py, &weight), bias);
            module.getattr("apply")?.call1(values)?.extract::<Bytes>()
        })
    }
}
