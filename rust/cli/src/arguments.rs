//! What the user asks for.

use std::path::PathBuf;

use clap::Parser;
use clap::builder::styling::{AnsiColor, Styles};
use peftrs_core::dtype::Dtype;

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
    #[arg(value_name = "BASE")]
    pub model: PathBuf,

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

    /// Merge only what is in this module or tensor, and leave all else as it is; may be given several times. A name, or its
    /// end after a dot, in the syntax of Python's `re`.
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,

    /// Leave this module or tensor as it is; may be given several times, and goes before `--only`.
    #[arg(long, value_name = "PATTERN")]
    pub skip: Vec<String>,

    /// Convert all floats of the output.
    #[arg(long, value_name = "TYPE", value_parser = dtype)]
    pub dtype: Option<Dtype>,

    /// Make new files of at most this size, such as 5GB or 500MiB, instead of the base's.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub max_shard_size: Option<u64>,

    /// How many threads to use [default: one a core]; the result is the same for any number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Merge weights that are infinite or NaN, and write sums that are.
    #[arg(long)]
    pub allow_nonfinite: bool,

    /// Follow symbolic links that leave the folders of the base and the adapter.
    #[arg(long)]
    pub follow_links: bool,

    /// Read back what was written before it gets its name: some rows of each changed tensor are made again in float64, and
    /// all other tensors compared with the base.
    #[arg(long)]
    pub check: bool,

    /// Keep what it takes to undo the merge exactly, in the folder `peftrs-restore` of the output: the base's tensors that
    /// were changed.
    #[arg(long)]
    pub keep_restore: bool,

    /// Take the adapters out of a merged model, given in the place of BASE: exactly, where --base is given or the merge was
    /// made with --keep-restore, else by subtracting what was added, and telling what that leaves open.
    #[arg(long, conflicts_with_all = ["keep_restore", "only", "skip", "dtype", "max_shard_size"])]
    pub unmerge: bool,

    /// With --unmerge, the base that the merged model was made from. Else `original` or `dequantized`: whether an adapter that was
    /// trained over the quantized BASE goes into the model of --original or into BASE, dequantized.
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,

    /// The model that the quantized BASE was made from; what each choice of --base is off by is told.
    #[arg(long, value_name = "MODEL", conflicts_with = "unmerge")]
    pub original: Option<PathBuf>,

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

/// The type that `name` stands for.
fn dtype(name: &str) -> Result<Dtype, String> {
    match name {
        "bf16" => Ok(Dtype::BF16),
        "f16" => Ok(Dtype::F16),
        "f32" => Ok(Dtype::F32),
        _ => Err("it is one of bf16, f16, f32".to_owned()),
    }
}

/// A number of bytes: digits and a unit of powers of 1000, or of 1024 with an `i`.
fn bytes(size: &str) -> Result<u64, String> {
    let wrong = || "it is a number with one of KB, MB, GB, TB, KiB, MiB, GiB, TiB".to_owned();
    let unit = size.trim_start_matches(|character: char| character.is_ascii_digit());
    let number: u64 = size.strip_suffix(unit).unwrap_or(size).parse().map_err(|_| wrong())?;
    let (letter, base) = match unit.trim().strip_suffix('B').ok_or_else(wrong)? {
        prefix if prefix.ends_with('i') => (prefix.trim_end_matches('i'), 1024_u64),
        prefix => (prefix, 1000),
    };
    let power = [if base == 1000 { "" } else { "-" }, "K", "M", "G", "T"]
        .iter()
        .position(|known| *known == letter)
        .ok_or_else(wrong)?;
    let bytes = u32::try_from(power).ok().and_then(|power| base.checked_pow(power)?.checked_mul(number));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(wrong)
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
    fn sizes_have_units() {
        for (text, found) in [
            ("5GB", Some(5_000_000_000)),
            ("500 MiB", Some(500 << 20)),
            ("7B", Some(7)),
            ("1KiB", Some(1024)),
            ("0GB", None),
            ("5", None),
            ("GB", None),
            ("5iB", None),
            ("1.5GB", None),
            ("99999999999TB", None),
        ] {
            assert_eq!(bytes(text).ok(), found, "{text}");
        }
    }

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
