//! What the user asks for.

use std::path::PathBuf;

use clap::Parser;
use clap::builder::styling::{AnsiColor, Styles};

/// The colours of both tools' help.
pub const STYLES: Styles =
    Styles::styled().header(AnsiColor::Green.on_default().bold()).literal(AnsiColor::Cyan.on_default());

/// Merge adapters into a checkpoint on disk, without loading the model.
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

    /// The adapters' folders, each with `adapter_config.json` and `adapter_model.safetensors`; `@0.5` after one multiplies
    /// its change by that.
    #[arg(required = true, value_name = "ADAPTER[@WEIGHT]")]
    pub adapters: Vec<String>,

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

    /// Keep what is written if the merge stops, beside the output, and go on with what an earlier stop kept of the same
    /// merge into the same output.
    #[arg(long, conflicts_with = "no_sync")]
    pub resume: bool,

    /// Do not wait until the output is on the disk: faster, but a power failure may lose it.
    #[arg(long)]
    pub no_sync: bool,

    /// Print errors only.
    #[arg(short, long)]
    pub quiet: bool,
}

/// The folder and the weight that an argument names: what follows the last `@` if that is a number and the folder is not
/// called so, else 1.
pub fn weighted(argument: &str) -> (PathBuf, f64) {
    let whole = PathBuf::from(argument);
    let split = argument.rsplit_once('@').filter(|_| !whole.exists());
    let weight = split.and_then(|(path, weight)| Some((path, weight.parse::<f64>().ok()?)));
    match weight {
        Some((path, weight)) if weight.is_finite() => (PathBuf::from(path), weight),
        _ => (whole, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_a_finite_number_after_the_last_at() {
        for (argument, path, weight) in [
            ("a", "a", 1.0),
            ("a@0.5", "a", 0.5),
            ("a@b@-2e-1", "a@b", -0.2),
            ("a@inf", "a@inf", 1.0),
            ("a@nan", "a@nan", 1.0),
            ("org@main", "org@main", 1.0),
        ] {
            assert_eq!(weighted(argument), (PathBuf::from(path), weight), "{argument}");
        }
    }
}
