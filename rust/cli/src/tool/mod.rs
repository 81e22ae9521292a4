//! `peftrs`: what adapters and checkpoints hold, how they differ, what an adapter is for, and whether a merge is right.

mod diff;
mod extract;
mod inspect;
mod table;
mod targets;
mod verify;

use std::path::Path;

use clap::{Args, Parser, Subcommand};
use peftrs_core::checkpoint::Links;
use peftrs_core::error::{Error, Result};
use peftrs_core::outline::Outline;
use serde_json::Value;

use crate::arguments::STYLES;
use crate::printer::Printer;
pub use extract::Extraction;

/// Look into adapters and checkpoints on disk, without loading a model.
///
/// Data goes to standard output, everything else to standard error.
///
/// Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "peftrs", version, styles = STYLES, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what an adapter or a checkpoint holds, by its header alone unless norms are asked for.
    Inspect(inspect::Arguments),
    /// Compare two adapters, or two checkpoints.
    Diff(diff::Arguments),
    /// List the layers of a model that an adapter can be for, and what a config would select of them.
    Targets(targets::Arguments),
    /// Make the LoRA adapter that turns one model nearly into another; this takes Python with torch.
    Extract(extract::Arguments),
    /// Check that a checkpoint is a base with adapters merged in, whatever tool merged them, and say what went wrong; the exit
    /// code is 1 if anything did.
    Verify(verify::Arguments),
}

/// What every command understands.
#[derive(Debug, Args)]
struct Shared {
    /// Print JSON.
    #[arg(long)]
    json: bool,

    /// Follow symbolic links that leave the folders given.
    #[arg(long)]
    follow_links: bool,
}

impl Shared {
    fn links(&self) -> Links {
        if self.follow_links { Links::Follow } else { Links::Confined }
    }
}

/// What takes Python with torch, where there is one.
pub trait Python: Sync {
    /// The outline of a model by its class, for an adapter of that `task_type`.
    fn outline(&self, model: &Path, task: Option<&str>) -> Result<Outline>;
    /// Makes the adapter between two models; what it returns is the report.
    fn extract(&self, request: &Extraction) -> Result<Value>;
    /// What training takes, as the report; the request has the arguments of `peftrs.train.memory.plan`.
    fn memory(&self, request: &Value) -> Result<Value>;
}

/// The refusal where there is none.
fn no_python(what: &str) -> Error {
    Error::Merge(format!("{what}; hint: run the peftrs that `pip install peftrs[transformers]` brings"))
}

/// Runs the tool on `arguments`, the program's name left out, and returns its exit code.
#[must_use]
pub fn run(arguments: &[String], python: Option<&dyn Python>) -> i32 {
    let name = std::iter::once("peftrs");
    let arguments = match Arguments::try_parse_from(name.chain(arguments.iter().map(String::as_str))) {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed pipe is the reader's choice.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let printer = Printer::new(false);
    let done = match &arguments.command {
        Command::Inspect(arguments) => inspect::run(arguments, &printer),
        Command::Diff(arguments) => diff::run(arguments, &printer),
        Command::Targets(arguments) => targets::run(arguments, &printer, python),
        Command::Extract(arguments) => extract::run(arguments, &printer, python),
        Command::Verify(arguments) => verify::run(arguments, &printer),
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            printer.error(&error.to_string());
            1
        }
    }
}

/// A value as the text of a JSON document.
fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
