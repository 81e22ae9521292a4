//! From the core's errors to Python's exceptions: the classes, and the one way into the core.

use std::panic::{AssertUnwindSafe, catch_unwind};

use peftrs_core::error::{Error, Result};
use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// The exception classes, made when the module is imported since two bases cannot be given to a class made by a macro.
struct Classes {
    root: Py<PyType>,
    config: Py<PyType>,
    checkpoint: Py<PyType>,
    target: Py<PyType>,
    merge: Py<PyType>,
    storage: Py<PyType>,
}

static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();

/// Where users find the classes; pickling goes by it.
const HOME: &str = "peftrs.errors";

fn make(py: Python<'_>, name: &str, doc: &str, bases: &[Bound<'_, PyType>]) -> PyResult<Py<PyType>> {
    let namespace = PyDict::new(py);
    namespace.set_item("__module__", HOME)?;
    namespace.set_item("__doc__", doc)?;
    let class = py.get_type::<PyType>().call1((name, PyTuple::new(py, bases)?, namespace))?;
    Ok(class.cast_into::<PyType>()?.unbind())
}

fn classes(py: Python<'_>) -> PyResult<&Classes> {
    CLASSES.get_or_try_init(py, || {
        let doc = "The root of every error that peftrs raises; its message names what is at fault and the way out.";
        let root = make(py, "PeftrsError", doc, &[py.get_type::<PyException>()])?;
        let value = py.get_type::<PyValueError>();
        let child = |name, doc, base: &Bound<'_, PyType>| make(py, name, doc, &[root.bind(py).clone(), base.clone()]);
        Ok(Classes {
            config: child("ConfigError", "An adapter config is malformed, or asks for what cannot be.", &value)?,
            checkpoint: child(
                "CheckpointError",
                "A checkpoint's bytes break the format, or its tensors are not those that were expected.",
                &value,
            )?,
            target: child("TargetError", "A pattern is malformed, too costly, or matched nothing.", &value)?,
            merge: child("MergeError", "A merge was refused or failed.", &value)?,
            storage: child(
                "StorageError",
                "The operating system refused to read or write a file or folder.",
                &py.get_type::<PyOSError>(),
            )?,
            root,
        })
    })
}

/// Adds the exception classes to the extension module.
pub fn add_classes(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let classes = classes(module.py())?;
    module.add("PeftrsError", &classes.root)?;
    module.add("ConfigError", &classes.config)?;
    module.add("CheckpointError", &classes.checkpoint)?;
    module.add("TargetError", &classes.target)?;
    module.add("MergeError", &classes.merge)?;
    module.add("StorageError", &classes.storage)
}

/// Runs `work` with the interpreter released; what it returns or panics with comes out as a `PeftrsError`.
///
/// Without the catch a panic would be a `PanicException`, which slips through `except Exception`.
pub fn run<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(raise(py, &error)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            let message = format!("peftrs failed in a way it should not, please report it: {text}");
            Err(classes(py).map_or_else(|error| error, |classes| instance(py, &classes.root, message)))
        }
    }
}

fn instance(py: Python<'_>, class: &Py<PyType>, message: String) -> PyErr {
    PyErr::from_type(class.bind(py).clone(), message)
}

fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let classes = match classes(py) {
        Ok(classes) => classes,
        Err(error) => return error,
    };
    let message = error.to_string();
    match error {
        Error::Storage { source, .. } => {
            let raised = instance(py, &classes.storage, message);
            // Set after construction: an OSError made from two arguments would word its own message.
            match raised.value(py).setattr("errno", source.raw_os_error()) {
                Ok(()) => raised,
                Err(error) => error,
            }
        }
        Error::Checkpoint { .. } => instance(py, &classes.checkpoint, message),
        Error::Config { .. } => instance(py, &classes.config, message),
        Error::Target(_) => instance(py, &classes.target, message),
        Error::Merge(_) => instance(py, &classes.merge, message),
        Error::Interrupted(_) => PyKeyboardInterrupt::new_err(message),
    }
}
