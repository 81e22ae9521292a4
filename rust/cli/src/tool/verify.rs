//! `peftrs verify`: whether a checkpoint is a base with adapters merged in.

use std::path::PathBuf;

use clap::Args;
use peftrs_core::error::{Error, Result, show_name, show_path};
use peftrs_core::verify::{Row, Tally, Verdict, Verification, verify};
use serde_json::{Value, json};

use super::table::{count, maybe, table};
use super::{Shared, pretty};
use crate::arguments::weighted;
use crate::printer::Printer;

/// How many tensors that are not right a table lists.
const LISTED: usize = 20;

#[derive(Debug, Args)]
pub struct Arguments {
    /// The model: a folder of safetensors files, an index, or one safetensors file.
    base: PathBuf,

    /// The adapters that should be in it, `@0.5` after one that was merged with that weight.
    #[arg(required = true, value_name = "ADAPTER[@WEIGHT]")]
    adapters: Vec<String>,

    /// The merged model, in any of the forms of the base.
    merged: PathBuf,

    #[command(flatten)]
    shared: Shared,
}

pub fn run(arguments: &Arguments, printer: &Printer) -> Result<()> {
    let Arguments { base, merged, .. } = arguments;
    let adapters: Vec<(PathBuf, f64)> = arguments.adapters.iter().map(|argument| weighted(argument)).collect();
    let found = verify(base, &adapters, merged, arguments.shared.links())?;
    printer.data(&if arguments.shared.json { pretty(&as_json(&found)) } else { as_text(&found) });
    match found.faults.as_slice() {
        [] => Ok(()),
        faults => {
            let count = if faults.len() == 1 { "one fault".to_owned() } else { format!("{} faults", faults.len()) };
            Err(Error::Merge(format!(
                "{} is not {} with the adapters merged in: {count}; hint: peftrs-merge makes the merge that was expected",
                show_path(merged),
                show_path(base)
            )))
        }
    }
}

fn as_json(found: &Verification) -> Value {
    let tensor = |row: &Row| {
        let Tally { elements, equal, near, .. } = row.tally;
        json!({
            "name": row.name,
            "expert": row.part,
            "change": row.change,
            "verdict": row.verdict.name(),
            "swapped_with": if let Verdict::Swapped(from) = row.verdict { Some(from) } else { None },
            "coefficient": row.tally.coefficient(),
            "residual": row.tally.residual(),
            "elements": elements,
            "equal": equal,
            "within_one_unit": near,
        })
    };
    let listed = found.rows.iter().filter(|row| !row.copied || !row.verdict.is_right());
    json!({
        "right": found.faults.is_empty(),
        "faults": found.faults,
        "notes": found.notes,
        "untouched": found.rows.iter().filter(|row| row.copied && row.verdict.is_right()).count(),
        "tensors": listed.map(tensor).collect::<Vec<_>>(),
    })
}

fn as_text(found: &Verification) -> String {
    let wrong: Vec<&Row> = found.rows.iter().filter(|row| !row.verdict.is_right()).collect();
    let row = |row: &&Row| {
        let part = row.part.map_or_else(String::new, |part| format!("[{part}]"));
        vec![
            show_name(&row.name) + &part,
            row.verdict.name().to_owned(),
            maybe(row.tally.coefficient()),
            maybe(row.tally.residual()),
            format!("{:.2} %", 100.0 * row.tally.share()),
        ]
    };
    let rows: Vec<Vec<String>> = wrong.iter().take(LISTED).map(row).collect();
    let mut text = table(&["tensor", "verdict", "times merged", "unexplained", "equal"], &rows);
    if wrong.len() > LISTED {
        text += &["… and ", &(wrong.len() - LISTED).to_string(), " more\n"].concat();
    }
    for (label, lines) in [("fault", &found.faults), ("note", &found.notes)] {
        text = lines.iter().fold(text, |text, line| text + label + ": " + line + "\n");
    }
    let changed: Vec<&Row> = found.rows.iter().filter(|row| !row.copied).collect();
    let right = changed.iter().filter(|row| row.verdict.is_right()).count();
    let all = changed.iter().fold(Tally::default(), |all, row| all.and(row.tally));
    let copied = found.rows.iter().filter(|row| row.copied && row.verdict.is_right()).count();
    let total = found.rows.iter().filter(|row| row.copied).count();
    text + &format!(
        "{right} of {} changed tensors are right, {} of {} elements to the bit; {copied} of {total} others are the base's\n",
        changed.len(),
        count(all.equal),
        count(all.elements)
    )
}
