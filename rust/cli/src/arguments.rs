//! What the user asks for.

use std::path::PathBuf;

use clap::Parser;
use clap::builder::styling::{AnsiColor, Styles};

const STYLES: Styles =
    Styles::styled().header(AnsiColor::Green.on_default().bold()).literal(AnsiColor::Cyan.on_default());

/// Merge a LoRA adapter into a checkpoint on disk, without loading the model.
///
/// The output has the base's files: the same names, order and types of tensors, its config and its tokenizer. It appears
/// under its name when it is whole. Data goes to standard output, everything else to standard error.
///
/// Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 and 143 interrupted.
#[derive(Debug, Parser)]
#[command(name = "peftrs-merge", version, styles = STYLES, max_term_width = 100)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct Arguments {
    /// The model: a folder of safetensors files, an index, or one safetensors file.
    pub base: PathBuf,

    /// The adapter's folder, with `adapter_config.json` and `adapter_model.safetensors`.
    pub adapter: PathBuf,

    /// The folder to write; it may not exist yet, or must be empty.
    #[arg(short = 'o', long = "output", value_name = "OUT", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,

    /// Replace the output if an earlier merge wrote it; any other folder is left alone.
    #[arg(long)]
    pub overwrite: bool,

    /// Print what would be changed and write nothing.
    #[arg(long)]
    pub dry_run: bool,

    /// Print it as JSON.
    #[arg(long, requires = "dry_run")]
    pub json: bool,

    /// How many threads to use [default: one a core]; the result is the same for any number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Merge weights that are infinite or NaN, and write sums that are.
    #[arg(long)]
    pub allow_nonfinite: bool,

    /// Follow symbolic links that leave the folders of the base and the adapter.
    #[arg(long)]
    pub follow_links: bool,

    /// Do not wait until the output is on the disk: faster, but a power failure may lose it.
    #[arg(long)]
    pub no_sync: bool,

    /// Print errors only.
    #[arg(short, long)]
    pub quiet: bool,
}
