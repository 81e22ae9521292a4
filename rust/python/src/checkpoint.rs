//! Checkpoints for Python.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peftrs_core::checkpoint::{Checkpoint as Core, Links};
use peftrs_core::dtype::Dtype;
use peftrs_core::error::{Error, show_name};
use peftrs_core::outline::Outline;
use peftrs_core::writer::{self, Disk, Tensor};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyTuple};

use crate::error::run;

/// An open safetensors checkpoint whose headers have all been checked; tensor bytes are read on request.
#[pyclass(frozen, module = "peftrs._native")]
pub struct Checkpoint(Core);

#[pymethods]
impl Checkpoint {
    #[staticmethod]
    #[pyo3(signature = (folder, *, follow_links = false))]
    fn adapter(py: Python<'_>, folder: PathBuf, follow_links: bool) -> PyResult<Self> {
        run(py, || Core::open_adapter(&folder, links(follow_links))).map(Self)
    }

    #[staticmethod]
    #[pyo3(signature = (path, *, follow_links = false))]
    fn model(py: Python<'_>, path: PathBuf, follow_links: bool) -> PyResult<Self> {
        run(py, || Core::open_model(&path, links(follow_links))).map(Self)
    }

    fn entries(checkpoint: Py<Self>) -> Entries {
        Entries(checkpoint)
    }

    fn layers(&self) -> Vec<(String, String)> {
        Outline::of(&self.0).layers.into_iter().map(|layer| (layer.name, layer.kind)).collect()
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        self.0.metadata()
    }

    fn read_all(&self, py: Python<'_>, tensors: Vec<(String, Bound<'_, PyAny>)>) -> PyResult<Vec<bool>> {
        let mut lent = tensors.into_iter().map(|tensor| Lent::new(py, tensor)).collect::<PyResult<Vec<_>>>()?;
        run(py, || self.0.read_all(&mut Lent::slices(&mut lent)?))
    }

    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyByteArray>> {
        let length = run(py, || self.0.bytes(name))?;
        PyByteArray::new_with(py, length, |bytes| run(py, || self.0.read_into(name, bytes)))
    }
}

/// The tensors of a checkpoint: how many there are costs nothing, each is made when it is asked for.
#[pyclass(frozen, sequence, module = "peftrs._native")]
pub struct Entries(Py<Checkpoint>);

#[pymethods]
impl Entries {
    fn __len__(&self) -> usize {
        self.0.get().0.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, place: usize) -> PyResult<(&str, &'static str, Bound<'py, PyTuple>)> {
        let (name, entry) = self.0.get().0.at(place).ok_or_else(|| PyIndexError::new_err("no such tensor"))?;
        Ok((name, entry.dtype.name(), PyTuple::new(py, &entry.shape)?))
    }
}

/// Memory that Python lends for a tensor to be read into.
struct Lent {
    name: String,
    buffer: PyUntypedBuffer,
}

impl Lent {
    fn new(py: Python<'_>, (name, object): (String, Bound<'_, PyAny>)) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(&object)?;
        if buffer.readonly() || !buffer.is_c_contiguous() {
            let reason = format!("the memory for tensor `{}` is not writable and contiguous", show_name(&name));
            return run(py, || Err(Error::Merge(reason)));
        }
        Ok(Self { name, buffer })
    }

    fn start(&self) -> usize {
        self.buffer.buf_ptr().addr()
    }

    /// All of them as slices.
    fn slices(all: &mut [Self]) -> peftrs_core::error::Result<Vec<(&str, &mut [u8])>> {
        let mut order: Vec<&Self> = all.iter().filter(|one| one.buffer.len_bytes() > 0).collect();
        order.sort_by_key(|one| one.start());
        let overlap = order.windows(2).find(|pair| match pair {
            [first, second] => first.start() + first.buffer.len_bytes() > second.start(),
            _ => false,
        });
        if let Some([first, ..]) = overlap {
            let name = show_name(&first.name);
            return Err(Error::Merge(format!("the memory for tensor `{name}` is another tensor's too")));
        }
        let mut slices = Vec::with_capacity(all.len());
        for one in all {
            let (start, length) = (one.buffer.buf_ptr().cast::<u8>(), one.buffer.len_bytes());
            // SAFETY: the exporter keeps `length` writable contiguous bytes at `start` alive and in place while `one.buffer`
            // is held, no two of them overlap, and a null pointer, which it may give for no bytes, is not used.
            let bytes =
                if length == 0 { &mut [][..] } else { unsafe { std::slice::from_raw_parts_mut(start, length) } };
            slices.push((one.name.as_str(), bytes));
        }
        Ok(slices)
    }
}

fn links(follow: bool) -> Links {
    if follow { Links::Follow } else { Links::Confined }
}

/// A tensor as Python hands it over: its buffer keeps the memory in place while it is written.
struct Given {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    buffer: PyUntypedBuffer,
}

impl Given {
    fn new(py: Python<'_>, folder: &Path, tensor: (String, String, Vec<usize>, Bound<'_, PyAny>)) -> PyResult<Self> {
        let (name, dtype, shape, object) = tensor;
        let fault = |reason: String| {
            let error = Error::checkpoint(folder, format!("tensor `{}` cannot be written: {reason}", show_name(&name)));
            run(py, || Err(error))
        };
        let Some(dtype) = Dtype::from_name(&dtype) else {
            return fault(format!("unknown dtype `{}`", show_name(&dtype)));
        };
        let buffer = PyUntypedBuffer::get(&object)?;
        if !buffer.is_c_contiguous() {
            return fault("its bytes are not contiguous".into());
        }
        Ok(Self { name, dtype, shape, buffer })
    }

    fn tensor(&self) -> Tensor<'_> {
        let (start, length) = (self.buffer.buf_ptr().cast_const().cast::<u8>(), self.buffer.len_bytes());
        // SAFETY: the exporter keeps `length` contiguous bytes at `start` alive and in place while `self.buffer` is held,
        // and a null pointer, which it may give for no bytes, is not used. Python code that writes to a tensor while
        // another thread saves it gets one value or the other in the file, as with every call that releases the interpreter.
        let data = if length == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(start, length) } };
        Tensor { name: &self.name, dtype: self.dtype, shape: &self.shape, data }
    }
}

/// Writes an adapter's config alone; see [`writer::write_config`].
#[pyfunction]
pub fn write_config(py: Python<'_>, folder: PathBuf, config: &str) -> PyResult<()> {
    run(py, || writer::write_config(&Disk, &folder, config))
}

/// Writes an adapter's folder; see [`writer::write_adapter`].
#[pyfunction]
#[pyo3(signature = (folder, config, tensors, *, files = None, notes = None, sync = true))]
pub fn write_adapter(
    py: Python<'_>,
    folder: PathBuf,
    config: &str,
    tensors: Vec<(String, String, Vec<usize>, Bound<'_, PyAny>)>,
    files: Option<BTreeMap<String, Vec<u8>>>,
    notes: Option<BTreeMap<String, String>>,
    sync: bool,
) -> PyResult<()> {
    let given = tensors.into_iter().map(|tensor| Given::new(py, &folder, tensor)).collect::<PyResult<Vec<_>>>()?;
    let tensors: Vec<Tensor<'_>> = given.iter().map(Given::tensor).collect();
    let files = files.unwrap_or_default();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let notes = notes.unwrap_or_default();
    let notes: Vec<(&str, &str)> = notes.iter().map(|(key, note)| (key.as_str(), note.as_str())).collect();
    run(py, || writer::write_adapter(&Disk, &folder, config, &tensors, &files, &notes, sync))
}
