//! Small checkpoints and adapters on disk, and the tool run on them.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    dead_code,
    reason = "tests, each of which uses a part of this"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

/// A tensor of float values.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    /// Values in (-1, 1), rounded to `dtype`, that depend on the seed.
    pub fn new(dtype: Dtype, shape: &[usize], seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5677);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
        };
        let values = (0..shape.iter().product()).map(|_| round(dtype, next())).collect();
        Self { dtype, shape: shape.to_vec(), values }
    }

    pub fn filled(dtype: Dtype, shape: &[usize], value: f64) -> Self {
        Self { dtype, shape: shape.to_vec(), values: vec![value; shape.iter().product()] }
    }

    /// The same values rounded to another type.
    pub fn to(&self, dtype: Dtype) -> Self {
        let values = self.values.iter().map(|value| round(dtype, *value)).collect();
        Self { dtype, shape: self.shape.clone(), values }
    }

    fn bytes(&self) -> Vec<u8> {
        self.values
            .iter()
            .flat_map(|value| match self.dtype {
                Dtype::BF16 => bf16::from_f64(*value).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f64(*value).to_le_bytes().to_vec(),
                Dtype::F64 => value.to_le_bytes().to_vec(),
                Dtype::U8 => vec![*value as u8],
                _ => (*value as f32).to_le_bytes().to_vec(),
            })
            .collect()
    }

    fn read(view: &TensorView) -> Self {
        let values = |size: usize, read: &dyn Fn(&[u8]) -> f64| view.data().chunks(size).map(read).collect();
        let values = match view.dtype() {
            Dtype::BF16 => values(2, &|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()),
            Dtype::F16 => values(2, &|b| f16::from_le_bytes([b[0], b[1]]).to_f64()),
            Dtype::U8 => values(1, &|b| f64::from(b[0])),
            _ => values(4, &|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        };
        Self { dtype: view.dtype(), shape: view.shape().to_vec(), values }
    }
}

pub fn round(dtype: Dtype, value: f64) -> f64 {
    match dtype {
        Dtype::BF16 => bf16::from_f64(value).to_f64(),
        Dtype::F16 => f16::from_f64(value).to_f64(),
        Dtype::F64 => value,
        Dtype::U8 => value.abs() * 255.0,
        _ => f64::from(value as f32),
    }
}

pub fn write(path: &Path, tensors: &Tensors) {
    let bytes: Vec<Vec<u8>> = tensors.values().map(Tensor::bytes).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, tensor), bytes)| (name, TensorView::new(tensor.dtype, tensor.shape.clone(), bytes).unwrap()));
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    std::fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

pub fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), Tensor::read(&view))).collect()
}

/// A folder with a base and an adapter, and what the tool said.
pub struct Case {
    pub root: tempfile::TempDir,
    pub tensors: Tensors,
    pub config: Value,
    pub adapter: Tensors,
    pub model: Value,
}

pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Case {
    /// A LoRA of rank 2 and scaling 2 without targets yet.
    pub fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
            tensors: Tensors::new(),
            config: json!({
                "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none",
            }),
            adapter: Tensors::new(),
            model: json!({"architectures": ["BertModel"], "model_type": "bert"}),
        }
    }

    pub fn base(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.to_owned(), tensor);
        self
    }

    /// A tensor of the adapter, the key's prefix left out.
    pub fn with(mut self, key: &str, tensor: Tensor) -> Self {
        self.adapter.insert(format!("base_model.model.{key}"), tensor);
        self
    }

    pub fn set(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    pub fn model(mut self, field: &str, value: Value) -> Self {
        self.model[field] = value;
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn save(&self) {
        for folder in ["base", "adapter"] {
            std::fs::create_dir_all(self.path(folder)).unwrap();
        }
        write(&self.path("base/model.safetensors"), &self.tensors);
        std::fs::write(self.path("base/config.json"), self.model.to_string()).unwrap();
        self.save_adapter();
    }

    pub fn save_adapter(&self) {
        write(&self.path("adapter/adapter_model.safetensors"), &self.adapter);
        std::fs::write(self.path("adapter/adapter_config.json"), self.config.to_string()).unwrap();
    }

    /// Runs the tool in the case's folder; its path does not appear in the output.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.execute(env!("CARGO_BIN_EXE_peftrs-merge"), arguments)
    }

    /// Runs `peftrs` in the case's folder.
    pub fn tool(&self, arguments: &[&str]) -> Output {
        self.execute(env!("CARGO_BIN_EXE_peftrs"), arguments)
    }

    fn execute(&self, program: &str, arguments: &[&str]) -> Output {
        let output = Command::new(program).args(arguments).current_dir(self.root.path()).output().unwrap();
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Saves and merges, and returns the merged tensors.
    pub fn merged(&self) -> Tensors {
        self.save();
        let output = self.run(&["base", "adapter", "-o", "out", "--quiet", "--no-sync", "--check"]);
        assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (0, "", ""));
        read(&self.path("out/model.safetensors"))
    }

    /// Saves, asserts that the merge is refused before anything is written, and returns standard error.
    pub fn refused(&self) -> String {
        self.save();
        let output = self.run(&["base", "adapter", "-o", "out"]);
        assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{}", output.stderr);
        let mut names: Vec<_> =
            std::fs::read_dir(self.root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["adapter", "base"]);
        output.stderr
    }

    pub fn factor(&self, key: &str) -> &Tensor {
        &self.adapter[&format!("base_model.model.{key}")]
    }

    /// `up @ down` at a row and a column.
    pub fn product(&self, up: &str, down: &str, row: usize, column: usize) -> f64 {
        let (up, down) = (self.factor(up), self.factor(down));
        let rank = down.shape[0];
        let columns = down.values.len() / rank;
        (0..rank).map(|k| up.values[row * rank + k] * down.values[k * columns + column]).sum()
    }
}

/// Asserts that each value is `expected(index)` rounded, or its neighbour in the type's grid.
pub fn assert_close(found: &Tensor, expected: impl Fn(usize) -> f64) {
    let unit: f64 = match found.dtype {
        Dtype::BF16 => 2.0_f64.powi(-8),
        Dtype::F16 => 2.0_f64.powi(-11),
        _ => 2.0_f64.powi(-24),
    };
    for (index, value) in found.values.iter().enumerate() {
        let expected = expected(index);
        let error = (value - expected).abs();
        assert!(error <= unit * expected.abs() * 1.01 + 1e-6 * unit.sqrt(), "{value} for {expected} at {index}");
    }
}
