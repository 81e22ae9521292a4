//! `peftrs-merge`: merges adapters into checkpoints on disk without loading a model; [`tool`] is `peftrs`.

mod arguments;
mod printer;
mod report;
pub mod tool;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use clap::Parser;
use peftrs_core::checkpoint::Links;
use peftrs_core::dtype::Dtype;
use peftrs_core::error::{Error, Result, show_name};
use peftrs_core::merge::{Choice, Merge, Settings, Writing};
use peftrs_core::plan::{Apply, Options};
use peftrs_core::writer::Disk;

use arguments::{Arguments, weighted};
use printer::{Printer, Progress, size};

/// Bytes after which a merge that can be resumed notes how far it is.
const EVERY: u64 = 1 << 30;

/// Runs the tool on `arguments`, the program's name left out, and returns its exit code. SIGINT and SIGTERM end it
/// cleanly, from then on.
#[must_use]
pub fn run(arguments: &[String]) -> i32 {
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let value = usize::try_from(number).unwrap_or_default();
        // Where the system refuses, the signal kills the tool at once: the temporary folder stays, nothing else is lost.
        let _ = signal_hook::flag::register_usize(number, Arc::clone(&signal), value);
    }
    run_until(arguments, &signal, None)
}

/// The same for a program that handles signals itself: it stores the number of one that came in `signal`. `apply` computes
/// methods that have no kernel in the core.
#[must_use]
pub fn run_until(arguments: &[String], signal: &AtomicUsize, apply: Option<Arc<dyn Apply>>) -> i32 {
    let name = std::iter::once("peftrs-merge");
    let arguments = match Arguments::try_parse_from(name.chain(arguments.iter().map(String::as_str))) {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed pipe is the reader's choice.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let printer = Printer::new(arguments.quiet);
    match merge(&arguments, &printer, signal, apply) {
        Ok(()) => 0,
        Err(Error::Interrupted(signal)) => {
            let kept = "interrupted; hint: the same command goes on where it stopped";
            printer.error(if arguments.resume { kept } else { "interrupted, nothing was written" });
            128 + signal
        }
        Err(error) => {
            printer.error(&error.to_string());
            1
        }
    }
}

/// The merge into the base that is chosen, after telling what either choice is off by where there is one.
fn open(arguments: &Arguments, adapters: &[(PathBuf, f64)], settings: &Settings, printer: &Printer) -> Result<Merge> {
    let choice = arguments.base.as_ref().map(|base| base.to_string_lossy());
    let into_original = match choice.as_deref() {
        None | Some("dequantized") => false,
        Some("original") => true,
        Some(other) => {
            let other = show_name(other);
            return Err(Error::Merge(format!(
                "--base is `original` or `dequantized`, not `{other}`; a path goes with --unmerge"
            )));
        }
    };
    let Some(original) = &arguments.original else {
        if into_original {
            return Err(Error::Merge("--base original needs --original, the model that BASE was made from".to_owned()));
        }
        let merge = Merge::open(&arguments.model, adapters, settings.clone())?;
        return if choice.is_none() || merge.dequantizes() { Ok(merge) } else { Err(not_quantized()) };
    };
    let exact = |model: &Path| {
        let options = Options { dtype: Some(Dtype::F32), max_shard_bytes: None, ..settings.options.clone() };
        Merge::open(model, adapters, Settings { options, ..settings.clone() })
    };
    let quantized = exact(&arguments.model)?;
    if !quantized.dequantizes() {
        return Err(not_quantized());
    }
    let merge = Merge::open(if into_original { original } else { &arguments.model }, adapters, settings.clone())?;
    printer.note(&Choice::measure(&quantized, &exact(original)?, &merge)?.what());
    Ok(merge)
}

fn not_quantized() -> Error {
    Error::Merge(
        "BASE is not quantized: --original and --base dequantized are for adapters that were trained over one that is"
            .to_owned(),
    )
}

fn merge(arguments: &Arguments, printer: &Printer, signal: &AtomicUsize, apply: Option<Arc<dyn Apply>>) -> Result<()> {
    let threads = arguments.threads.map_or(0, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| Error::Merge(format!("cannot start {threads} threads: {error}")))?;
    let links = if arguments.follow_links { Links::Follow } else { Links::Confined };
    let options = Options {
        allow_nonfinite: arguments.allow_nonfinite,
        only: arguments.only.clone(),
        skip: arguments.skip.clone(),
        dtype: arguments.dtype,
        max_shard_bytes: arguments.max_shard_size,
    };
    let settings = Settings { links, options, apply };
    pool.install(|| {
        let started = Instant::now();
        let adapters: Vec<_> = arguments.adapters.iter().map(|argument| weighted(argument)).collect();
        let merge = if arguments.unmerge {
            Merge::unmerge(&arguments.model, &adapters, arguments.base.as_deref(), settings)?
        } else {
            open(arguments, &adapters, &settings, printer)?
        };
        merge.plan().notes.iter().for_each(|note| printer.note(note));
        if arguments.dry_run {
            let report = if arguments.json { report::json(merge.plan()) } else { report::table(merge.plan()) };
            printer.data(&report);
            return Ok(());
        }
        let Some(output) = &arguments.output else { return Ok(()) };
        let writing = Writing {
            overwrite: arguments.overwrite,
            sync: !arguments.no_sync,
            resume: arguments.resume.then_some(EVERY),
            check: arguments.check,
            keep_restore: arguments.keep_restore,
        };
        let progress = Progress::new(printer, merge.plan().bytes(), signal);
        let written = merge.write(&Disk, output, writing, &progress);
        progress.finish();
        let written = written?;
        written.note().iter().for_each(|note| printer.note(note));
        if written.resumed > 0 {
            printer.note(&format!("{} were there from an earlier run", size(written.resumed)));
        }
        if let Some(checked) = written.checked {
            printer.done(&format!("checked: {}", checked.what()));
        }
        if let Some(subtracted) = written.subtracted {
            printer.done(&subtracted.what());
        }
        let done = if arguments.unmerge { "taken out" } else { "merged" };
        printer.done(&format!(
            "{done} into {}: {}, {} in {:.2} s",
            output.display(),
            report::summary(merge.plan()),
            size(merge.plan().bytes()),
            started.elapsed().as_secs_f64()
        ));
        Ok(())
    })
}
