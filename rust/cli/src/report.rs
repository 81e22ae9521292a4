//! A plan for people and for programs.

use std::fmt::Write;

use peftrs_core::error::show_name;
use peftrs_core::plan::{Output, Plan};
use serde_json::{Value, json};

use crate::printer::size;

/// How much of the checkpoint changes.
pub fn summary(plan: &Plan) -> String {
    let total: usize = plan.files.iter().map(|file| file.outputs.len()).sum();
    format!("{} of {total} tensors changed", plan.changed().count())
}

/// The tensors that change, one a line, and a summary.
pub fn table(plan: &Plan) -> String {
    let rows: Vec<[String; 4]> = plan.changed().map(row).collect();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let [names, types, shapes] = [0, 1, 2].map(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for [name, dtype, shape, what] in &rows {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:names$}  {dtype:types$}  {shape:shapes$}  {what}");
    }
    let _ = writeln!(text, "{}, {} to write", summary(plan), size(plan.bytes()));
    text
}

fn row(output: &Output) -> [String; 4] {
    [show_name(&output.name), output.dtype.name().to_owned(), format!("{:?}", output.shape), output.what()]
}

/// The same as JSON, names unabridged.
pub fn json(plan: &Plan) -> String {
    let files: Vec<Value> = plan
        .files
        .iter()
        .map(|file| {
            let changed: Vec<Value> = file
                .outputs
                .iter()
                .filter(|output| !output.is_copy())
                .map(|output| {
                    json!({
                        "name": output.name,
                        "dtype": output.dtype.name(),
                        "shape": output.shape,
                        "change": output.what(),
                    })
                })
                .collect();
            json!({ "name": file.name, "tensors": file.outputs.len(), "changed": changed })
        })
        .collect();
    let plan = json!({ "files": files, "bytes": plan.bytes(), "config": plan.config, "notes": plan.notes });
    format!("{plan:#}\n")
}
