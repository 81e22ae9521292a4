//! The merge tool for Python.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict, PyTuple};

use crate::apply;
use crate::error::run;

/// How often the main thread lets Python look at the signals that came.
const PATIENCE: Duration = Duration::from_millis(50);

#[pyfunction]
pub fn merge_main(py: Python<'_>, arguments: Vec<String>) -> PyResult<i32> {
    let signal = Arc::new(AtomicUsize::new(0));
    let handlers = Handlers::install(py, &signal)?;
    let code = run(py, || {
        std::thread::scope(|scope| {
            let (sender, done) = channel();
            let flag = &*signal;
            let merge = scope.spawn(move || {
                let code = peftrs_cli::run_until(&arguments, flag, Some(Arc::new(apply::Python)));
                // The receiver waits until the sender is gone, so sending cannot fail.
                let _ = sender.send(());
                code
            });
            while done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                // Runs our handlers where this is the main thread; their effect is the flag.
                #[allow(clippy::redundant_closure_for_method_calls, reason = "the method's lifetime is too narrow")]
                let _ = Python::attach(|py| py.check_signals());
            }
            Ok(merge.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    });
    handlers.restore(py)?;
    code
}

/// Python's signal handlers from before, if this is the thread that may set them.
struct Handlers(Vec<(usize, Py<PyAny>)>);

impl Handlers {
    /// Makes SIGINT and SIGTERM set `signal`.
    fn install(py: Python<'_>, signal: &Arc<AtomicUsize>) -> PyResult<Self> {
        let (threading, module) = (py.import("threading")?, py.import("signal")?);
        let current = threading.call_method0("current_thread")?;
        if !current.is(&threading.call_method0("main_thread")?) {
            return Ok(Self(Vec::new()));
        }
        let mut handlers = Vec::new();
        for name in ["SIGINT", "SIGTERM"] {
            let number: usize = module.getattr(name)?.extract()?;
            let flag = Arc::clone(signal);
            let set =
                move |_: &Bound<'_, PyTuple>, _: Option<&Bound<'_, PyDict>>| flag.store(number, Ordering::Relaxed);
            let handler = PyCFunction::new_closure(py, None, None, set)?;
            handlers.push((number, module.call_method1("signal", (number, handler))?.unbind()));
        }
        Ok(Self(handlers))
    }

    fn restore(self, py: Python<'_>) -> PyResult<()> {
        let module = py.import("signal")?;
        for (number, handler) in self.0 {
            // A handler that was not set from Python comes back as None, which cannot be set again.
            let handler = if handler.is_none(py) { module.getattr("SIG_DFL")?.unbind() } else { handler };
            module.call_method1("signal", (number, handler))?;
        }
        Ok(())
    }
}
