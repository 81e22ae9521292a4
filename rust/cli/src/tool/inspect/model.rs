//! What a checkpoint holds, for people and for programs.

use std::collections::BTreeMap;

use peftrs_core::error::{show_name, show_path};
use peftrs_core::inspect::{Model, Scan};
use peftrs_core::outline::{Outline, described};
use serde_json::{Value, json};

use super::super::table::{count, ranges, sizes, table, warnings};
use super::{below, scan_json, scan_table, scan_warnings};
use crate::printer::size;

/// How many of the largest tensors are shown.
const LARGEST: usize = 5;

/// What a merge was of, in the words of its record.
fn merged(record: &Value) -> String {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map_or_else(|| "?".to_owned(), show_name);
    let name = |value: &Value| text(value.get("name"));
    let one = record.get("adapter").map(name);
    let adapters =
        record.get("adapters").and_then(Value::as_array).map(|list| list.iter().map(name).collect::<Vec<_>>());
    let adapters = adapters.unwrap_or_else(|| one.into_iter().collect()).join(", ");
    format!("{} with {adapters}, by peftrs-merge {}", text(record.pointer("/base/name")), text(record.get("peftrs")))
}

pub fn json(model: &Model, scan: Option<&Scan>) -> Value {
    let files = model.weights.files().iter().map(|file| json!({ "name": file.name, "bytes": file.length() }));
    let dtypes: BTreeMap<&str, Value> = model
        .dtypes()
        .into_iter()
        .map(|(name, share)| {
            let value = json!({ "tensors": share.tensors, "parameters": share.parameters, "bytes": share.bytes });
            (name, value)
        })
        .collect();
    let largest = model.largest(LARGEST).into_iter().filter_map(|name| Some((name, model.weights.entry(name)?)));
    let largest = largest.map(|(name, entry)| {
        json!({ "name": name, "dtype": entry.dtype.name(), "shape": entry.shape, "bytes": entry.bytes() })
    });
    let stacks = Outline::of(&model.weights).stacks();
    let mut all = model.warnings();
    all.extend(scan_warnings(scan));
    json!({
        "kind": "checkpoint",
        "path": model.weights.path().to_string_lossy(),
        "architectures": model.field("architectures"),
        "model_type": model.field("model_type"),
        "files": files.collect::<Vec<_>>(),
        "tensors": model.weights.names().count(),
        "parameters": model.dtypes().values().map(|share| share.parameters).sum::<u64>(),
        "bytes": model.dtypes().values().map(|share| share.bytes).sum::<u64>(),
        "dtypes": dtypes,
        "blocks": stacks.iter().map(|(name, blocks)| (name.as_str(), blocks.len())).collect::<BTreeMap<_, _>>(),
        "largest": largest.collect::<Vec<_>>(),
        "tie_word_embeddings": model.field("tie_word_embeddings"),
        "quantized": model.quantized(),
        "merged": model.record.as_ref().map(|record| json!({ "what": merged(record), "record": record })),
        "metadata": model.weights.metadata(),
        "warnings": all,
        "norms": scan.map(|scan| scan_json(scan)),
    })
}

pub fn text(model: &Model, scan: Option<&Scan>) -> String {
    let mut lines = vec![format!("{}: checkpoint", show_path(model.weights.path()))];
    lines.extend(described(model.config.as_ref()).map(|name| format!("model: {}", show_name(&name))));
    lines.extend(model.record.as_ref().map(|record| format!("merged: {}", merged(record))));
    lines.extend(model.quantized().map(|method| format!("quantized by {method}")));
    if model.field("tie_word_embeddings").and_then(Value::as_bool) == Some(true) {
        lines.push("output head tied to the embedding".to_owned());
    }
    let stacks = Outline::of(&model.weights).stacks();
    lines.extend(stacks.iter().map(|(name, blocks)| {
        let numbers: Vec<usize> = blocks.iter().copied().collect();
        format!("{} blocks in {}: {}", blocks.len(), show_name(name), ranges(&numbers))
    }));
    let rows: Vec<Vec<String>> = model
        .dtypes()
        .into_iter()
        .map(|(name, share)| {
            vec![name.to_owned(), share.tensors.to_string(), count(share.parameters), size(share.bytes)]
        })
        .collect();
    let total: u64 = model.dtypes().values().map(|share| share.bytes).sum();
    let files = model.weights.files().len();
    lines.push(format!("{} in {files} file{}", size(total), if files == 1 { "" } else { "s" }));
    let mut text = lines.join("\n") + "\n\n" + &table(&["type", "tensors", "parameters", "bytes"], &rows);
    let largest = model.largest(LARGEST).into_iter().filter_map(|name| Some((name, model.weights.entry(name)?)));
    let rows: Vec<Vec<String>> = largest
        .map(|(name, entry)| {
            vec![show_name(name), entry.dtype.name().to_owned(), sizes(&entry.shape), size(entry.bytes() as u64)]
        })
        .collect();
    text += &below(&table(&["largest", "type", "shape", "bytes"], &rows));
    let mut all = model.warnings();
    all.extend(scan_warnings(scan));
    text += &below(&scan.map(|scan| scan_table(scan)).unwrap_or_default());
    text + &below(&warnings(&all))
}
