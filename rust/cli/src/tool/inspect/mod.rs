//! `peftrs inspect`: what an adapter or a checkpoint holds.

mod adapter;
mod model;

use std::path::PathBuf;

use clap::Args;
use peftrs_core::error::{Result, show_name};
use peftrs_core::inspect::{Adapter, Model, Scan, Statistics, adapter_folder, scan};
use serde_json::{Value, json};

use super::table::{count, number, table};
use super::{Shared, pretty};
use crate::printer::Printer;

#[derive(Debug, Args)]
pub struct Arguments {
    /// An adapter's folder, or a model: a folder of safetensors files, an index, or one safetensors file.
    path: PathBuf,

    /// Read the values too: norms of every update or tensor, what was never trained, what is not finite.
    #[arg(long)]
    norms: bool,

    #[command(flatten)]
    shared: Shared,
}

pub fn run(arguments: &Arguments, printer: &Printer) -> Result<()> {
    let links = arguments.shared.links();
    let report = if let Some(folder) = adapter_folder(&arguments.path) {
        let adapter = Adapter::open(&folder, links)?;
        let values = arguments.norms.then(|| adapter::Values::read(&adapter)).transpose()?;
        if arguments.shared.json {
            pretty(&adapter::json(&adapter, values.as_ref()))
        } else {
            adapter::text(&adapter, values.as_ref())
        }
    } else {
        let model = Model::open(&arguments.path, links)?;
        let scan = arguments.norms.then(|| scan(&model.weights)).transpose()?;
        if arguments.shared.json {
            pretty(&model::json(&model, scan.as_ref()))
        } else {
            model::text(&model, scan.as_ref())
        }
    };
    printer.data(&report);
    Ok(())
}

/// The statistics of tensors as JSON.
fn scan_json(scan: &[(String, Statistics)]) -> Vec<Value> {
    let one = |(name, found): &(String, Statistics)| {
        json!({
            "name": name,
            "norm": found.norm,
            "largest": found.largest,
            "nonfinite": found.nonfinite,
            "zeros": found.zeros,
        })
    };
    scan.iter().map(one).collect()
}

/// A part of a report, set off from what is above it.
fn below(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("\n{text}") }
}

fn scan_table(scan: &[(String, Statistics)]) -> String {
    let row = |(name, found): &(String, Statistics)| {
        vec![show_name(name), number(found.norm), number(found.largest), count(found.zeros), count(found.nonfinite)]
    };
    table(&["tensor", "norm", "largest", "zeros", "not finite"], &scan.iter().map(row).collect::<Vec<_>>())
}

fn scan_warnings(scan: Option<&Scan>) -> Vec<String> {
    let broken: Vec<&str> =
        scan.into_iter().flatten().filter(|(_, found)| found.nonfinite > 0).map(|(name, _)| name.as_str()).collect();
    let first = broken.first().map(|name| show_name(name));
    first.map(|first| format!("{} tensors hold infinities or NaN: {first}", broken.len())).into_iter().collect()
}
