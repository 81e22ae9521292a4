//! `peftrs extract`: the adapter between two models, made by Python.

use std::path::PathBuf;

use clap::Args;
use peftrs_core::error::{Result, show_name, show_path};
use serde_json::{Value, json};

use super::table::{count, maybe, table};
use super::{Python, no_python, pretty};
use crate::printer::Printer;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    request: Extraction,

    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// What to make of which models.
#[derive(Debug, Args)]
pub struct Extraction {
    /// The model that the adapter is for: a folder of safetensors files, an index, or one safetensors file.
    pub base: PathBuf,

    /// The model that it should be turned into.
    pub merged: PathBuf,

    /// The folder to write the adapter into.
    #[arg(short = 'o', long = "output", value_name = "OUT")]
    pub output: PathBuf,

    /// The rank of each layer's factors.
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub rank: u32,

    /// Instead of a rank, the part of each layer's change to keep, as 0.95.
    #[arg(long, value_name = "SHARE", conflicts_with = "rank")]
    pub energy: Option<f64>,

    /// The name of a layer, or its end after a dot, as often as wanted; or one pattern, or all-linear.
    #[arg(long = "target", value_name = "NAME", default_value = "all-linear")]
    pub targets: Vec<String>,

    /// Modules to keep whole.
    #[arg(long = "save", value_name = "NAME")]
    pub modules_to_save: Vec<String>,

    /// Replace an adapter that is in the folder.
    #[arg(long)]
    pub overwrite: bool,
}

impl Extraction {
    /// What a config says for the targets: a list of names, or one text that is a pattern or the word for all linear layers.
    fn target_modules(&self) -> Value {
        let is_name = |text: &String| text.chars().all(|one| one.is_alphanumeric() || "._-".contains(one));
        match self.targets.as_slice() {
            [one] if one.eq_ignore_ascii_case("all-linear") || !is_name(one) => json!(one),
            names => json!(names),
        }
    }

    /// The request as JSON, for Python.
    #[must_use]
    pub fn to_json(&self) -> String {
        let rank = self.energy.map_or_else(|| json!(self.rank), |energy| json!(energy));
        let (base, merged, output) =
            (self.base.to_string_lossy(), self.merged.to_string_lossy(), self.output.to_string_lossy());
        json!({
            "base": base,
            "merged": merged,
            "out": output,
            "rank": rank,
            "target_modules": self.target_modules(),
            "modules_to_save": self.modules_to_save,
            "overwrite": self.overwrite,
        })
        .to_string()
    }
}

pub fn run(arguments: &Arguments, printer: &Printer, python: Option<&dyn Python>) -> Result<()> {
    let python = python.ok_or_else(|| no_python("extracting takes torch, and this program has no Python"))?;
    let report = python.extract(&arguments.request)?;
    let texts = |name: &str| -> Vec<String> {
        let list = report.get(name).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).map(show_name).collect()
    };
    for warning in texts("warnings") {
        printer.note(&warning);
    }
    printer.data(&if arguments.json { pretty(&report) } else { text(&report) });
    printer.done(&format!("extracted into {}", show_path(&arguments.request.output)));
    Ok(())
}

fn text(report: &Value) -> String {
    let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_f64);
    let layers = report.get("layers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let row = |layer: &Value| {
        let name = layer.get("name").and_then(Value::as_str).unwrap_or_default();
        let rank = layer.get("rank").and_then(Value::as_u64).unwrap_or(0);
        vec![show_name(name), count(rank), maybe(number(layer, "norm")), maybe(number(layer, "energy"))]
    };
    let rows: Vec<Vec<String>> = layers.iter().map(row).collect();
    let kept = maybe(number(report, "energy"));
    table(&["layer", "rank", "|change|", "part kept"], &rows) + &format!("{kept} of the change is in the adapter\n")
}
