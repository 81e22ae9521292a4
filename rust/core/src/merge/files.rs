//! The files of a merged checkpoint that hold no tensors.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::restore::RESTORE;
use super::{Checked, Merge, Way, Written};
use crate::checkpoint::{Checkpoint, MODEL_CONFIG, Shard, digest, parent, parse_json, read_small};
use crate::error::{Error, Result, show_name};
use crate::plan::{Adapter, Change, Plan};
use crate::quantized;
use crate::threads;
use crate::writer::{FolderWriter, MARKER};

/// The largest file that is copied along. Tokenizers reach 40 MB; what is larger is not part of a model's description.
const LARGEST: u64 = 64 << 20;

/// How deep the folders go that are copied along.
const DEEPEST: usize = 3;

const README: &str = "README.md";

/// The name of the index of files that are made anew.
const INDEX: &str = "model.safetensors.index.json";

/// Endings of files that hold weights in one form or another, which a merge makes stale.
const WEIGHTS: [&str; 12] =
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot"];

/// The folder of a base that is given as a folder, a file or an index.
pub fn folder_of(base: &Path) -> PathBuf {
    if base.is_dir() {
        return base.to_owned();
    }
    parent(base).to_owned()
}

impl Merge {
    /// Copies what belongs to the model beside its weights. Beside a base given as one file, that is its config alone.
    pub(super) fn copy_files(&self, writer: &FolderWriter<'_>) -> Result<()> {
        let folder = folder_of(&self.base_path);
        let mut names = Vec::new();
        if self.base_path.is_file() {
            names.push((folder.clone(), MODEL_CONFIG.to_owned(), MODEL_CONFIG.to_owned()));
        } else {
            list(&folder, "", 0, &mut names)?;
        }
        for (folder, name, inside) in names {
            let stale = self.base.is_made() && quantized::FILES.contains(&inside.as_str());
            if stale
                || inside.ends_with(".safetensors.index.json")
                || inside == MODEL_CONFIG && self.plan.config.is_some()
            {
                continue;
            }
            if let Some(bytes) = read_small(&folder, &name, self.links, LARGEST)? {
                writer.write(&inside, &bytes)?;
            }
        }
        if let Some(config) = &self.plan.config {
            writer.write(MODEL_CONFIG, &pretty(config)?)?;
        }
        self.write_index(writer)
    }

    /// The index of a sharded checkpoint, with the tensors that the base lacks.
    fn write_index(&self, writer: &FolderWriter<'_>) -> Result<()> {
        if self.plan.resharded {
            let mut index = json!({"metadata": {"total_size": self.plan.bytes()}, "weight_map": {}});
            self.fill(&mut index);
            return if self.plan.files.len() > 1 { writer.write(INDEX, &pretty(&index)?) } else { Ok(()) };
        }
        let folder = folder_of(&self.base_path);
        for name in names(&folder)?.iter().filter(|name| name.ends_with(".safetensors.index.json")) {
            let Some(bytes) = read_small(&folder, name, self.links, 256 << 20)? else { continue };
            let mut index = parse_json(&folder.join(name), &bytes)?;
            let Some(map) = index.get("weight_map").and_then(Value::as_object) else { continue };
            if !self.plan.files.iter().any(|file| map.values().any(|value| *value == file.name)) {
                continue;
            }
            if self.plan.files.iter().all(|file| file.same_header) {
                writer.write(name, &bytes)?;
                continue;
            }
            self.fill(&mut index);
            if let Some(size) = index.pointer_mut("/metadata/total_size") {
                *size = Value::from(self.plan.bytes());
            }
            writer.write(name, &pretty(&index)?)?;
        }
        Ok(())
    }

    /// Says in an index which file each tensor is in.
    fn fill(&self, index: &mut Value) {
        let outputs = self.plan.files.iter().flat_map(|file| file.outputs.iter().map(move |output| (output, file)));
        let map: Map<String, Value> =
            outputs.map(|(output, file)| (output.name.clone(), Value::from(file.name.clone()))).collect();
        if let Some(place) = index.get_mut("weight_map") {
            *place = Value::Object(map);
        }
    }

    /// The README of the merged checkpoint, and the record of it that a program can read.
    pub(super) fn write_record(&self, writer: &FolderWriter<'_>, written: &Written) -> Result<()> {
        let record = self.record(written)?;
        writer.write(README, readme(&record, &self.plan).as_bytes())?;
        writer.write(MARKER, &pretty(&record)?)
    }

    /// What was merged from what. Folders are named without the path to them, which is nobody else's business.
    fn record(&self, written: &Written) -> Result<Value> {
        let file = |(index, file): (usize, &Shard)| {
            Ok(json!({
                "name": file.name,
                "bytes": file.length(),
                "header_sha256": digest(&self.base.read_header(index)?),
                "sampled_sha256": file.sampled_digest()?,
            }))
        };
        let files = || self.base.files().iter().enumerate().map(file).collect::<Result<Vec<Value>>>();
        let adapter = |(index, adapter)| self.adapter_record(index, adapter);
        let adapters = || self.adapters.iter().enumerate().map(adapter).collect::<Result<Vec<Value>>>();
        let (files, adapters) = threads::install(|| Ok(rayon::join(files, adapters)))?;
        let changed = self.plan.changed().map(|output| {
            let mut row = json!({"tensor": output.name, "change": output.what()});
            if let (Some(row), Some(moved)) = (row.as_object_mut(), written.moved.get(&output.name)) {
                row.insert("moved".to_owned(), json!(moved.share()));
            }
            row
        });
        let notes: Vec<String> = self.plan.notes.iter().cloned().chain(written.note()).collect();
        let mut record = json!({
            "peftrs": env!("CARGO_PKG_VERSION"),
            "base": { "name": called(&self.base_path), "files": files? },
            "adapters": adapters?,
            "changed": changed.collect::<Vec<_>>(),
            "notes": notes,
        });
        let Some(fields) = record.as_object_mut() else { return Ok(record) };
        if self.way != Way::Merged {
            fields.insert("taken_out".to_owned(), Value::Bool(true));
        }
        if let Some(subtracted) = written.subtracted {
            fields.insert("subtraction".to_owned(), Value::from(subtracted.what()));
        }
        if let Some(checked) = written.checked {
            let Checked { rows, values, off, copied } = checked;
            let found =
                json!({"rows": rows, "values": values, "off_by_one": off, "copied": copied, "what": checked.what()});
            fields.insert("check".to_owned(), found);
        }
        Ok(record)
    }

    /// One adapter of the record: what it is called, what it weighed and what it scaled its factors by.
    fn adapter_record(&self, index: usize, adapter: &Adapter) -> Result<Value> {
        let updates = self.plan.changed().flat_map(|output| &output.updates).filter(|update| update.adapter == index);
        let mut scalings: Vec<f64> = updates
            .filter_map(|update| match &update.change {
                Change::LowRank(update) => Some(update.scaling),
                _ => None,
            })
            .collect();
        scalings.sort_by(f64::total_cmp);
        scalings.dedup();
        Ok(json!({
            "name": called(&adapter.path),
            "weight": adapter.weight,
            "config_sha256": digest(adapter.config_text.as_bytes()),
            "weights_sha256": weights_digest(&adapter.checkpoint)?,
            "scalings": scalings,
        }))
    }
}

/// Every file below `folder` that is copied along: its folder, its name, and its path inside.
fn list(folder: &Path, prefix: &str, depth: usize, found: &mut Vec<(PathBuf, String, String)>) -> Result<()> {
    for name in names(folder)? {
        let path = folder.join(&name);
        let metadata = std::fs::symlink_metadata(&path).map_err(|error| Error::storage(&path, "read", error))?;
        let hidden = name.starts_with('.') || depth == 0 && [README, MARKER, RESTORE].contains(&name.as_str());
        if hidden || WEIGHTS.iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let inside = format!("{prefix}{name}");
        if metadata.is_dir() {
            if depth < DEEPEST {
                list(&path, &format!("{inside}/"), depth + 1, found)?;
            }
        } else if std::fs::metadata(&path).is_ok_and(|metadata| metadata.is_file() && metadata.len() <= LARGEST) {
            found.push((folder.to_owned(), name, inside));
        }
    }
    Ok(())
}

/// The names in a folder, sorted; those that are not Unicode belong to no model.
fn names(folder: &Path) -> Result<Vec<String>> {
    let refused = |error| Error::storage(folder, "list", error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(refused)? {
        names.extend(entry.map_err(refused)?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|error| Error::Merge(error.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The digest of a checkpoint's one file: the header and the tensors after it leave nothing out.
pub(super) fn weights_digest(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(checkpoint.read_header(0)?);
    for name in checkpoint.names() {
        hash.update(checkpoint.read(name)?);
    }
    Ok(hash.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")))
}

/// What a folder or file is called: its own name, or in the Hub's cache that of the repository with the revision.
fn called(path: &Path) -> String {
    let folder = folder_of(path);
    let real = folder.canonicalize().unwrap_or(folder);
    let part = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let repository = real.parent().filter(|parent| part(parent) == "snapshots").and_then(Path::parent).map(part);
    let name = match repository.as_ref().and_then(|name| name.strip_prefix("models--")) {
        Some(name) => format!("{}@{}", name.replace("--", "/"), part(&real)),
        None if path.is_file() => part(path),
        None => part(&real),
    };
    show_name(&name)
}

fn readme(record: &Value, plan: &Plan) -> String {
    let text = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let base = text(record.get("base").unwrap_or(&Value::Null), "name");
    let adapters = record.get("adapters").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let names: Vec<String> = adapters.iter().map(|adapter| text(adapter, "name")).collect();
    let rows = adapters.iter().fold(String::new(), |rows, adapter| {
        let number = |name: &str| adapter.get(name).map(Value::to_string).unwrap_or_default();
        let (name, weight, scalings) = (text(adapter, "name"), number("weight"), number("scalings"));
        let (weights, config) = (text(adapter, "weights_sha256"), text(adapter, "config_sha256"));
        rows + &format!("| `{name}` | {weight} | {scalings} | `{weights}` | `{config}` |\n")
    });
    let files = record.pointer("/base/files").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let files = files.iter().fold(String::new(), |rows, file| {
        let [name, header, sampled] = ["name", "header_sha256", "sampled_sha256"].map(|field| text(file, field));
        let bytes = file.get("bytes").map(Value::to_string).unwrap_or_default();
        rows + &format!("| `{}` | {bytes} | `{header}` | `{sampled}` |\n", show_name(&name))
    });
    let total: usize = plan.files.iter().map(|file| file.outputs.len()).sum();
    let notes = record.get("notes").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let notes = notes.iter().filter_map(Value::as_str).fold(String::new(), |text, note| text + "- " + note + "\n");
    let notes = if notes.is_empty() { notes } else { format!("\n## Notes\n\n{notes}") };
    let told = |label: &str, pointer: &str| {
        let what = record.pointer(pointer).and_then(Value::as_str);
        what.map_or_else(String::new, |what| format!("\n{label}: {what}.\n"))
    };
    let checked = told("Checked", "/check/what") + &told("Accuracy", "/subtraction");
    let (done, how) =
        if record.get("taken_out").is_some() { ("taken out", "Taken out of") } else { ("merged in", "Merged into") };
    format!(
        "---\ntags:\n- merge\n- peftrs\n---\n\n# {base} with {} {done}\n\n\
         {how} the weights of `{base}` by peftrs-merge {version}; {changed} of {total} tensors changed. Load this folder \
         like the base; no adapter library is needed.\n\n\
         | adapter | weight | scaling | weights, SHA-256 | config, SHA-256 |\n|---|---|---|---|---|\n{rows}\n\
         | file of `{base}` | bytes | header, SHA-256 | blocks spread over it, SHA-256 |\n|---|---|---|---|\n{files}\n\
         `{MARKER}` lists every changed tensor.\n{checked}{notes}",
        names.join(" and "),
        version = text(record, "peftrs"),
        changed = plan.changed().count(),
    )
}
