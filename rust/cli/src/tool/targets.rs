//! `peftrs targets`: the layers of a model, and what a config would select of them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use clap::Args;
use peftrs_core::checkpoint::{ADAPTER_CONFIG, Checkpoint, parent, read_small};
use peftrs_core::config::AdapterConfig;
use peftrs_core::error::{Error, Result, show_name};
use peftrs_core::outline::{Aim, Group, Outline, added, aim, wants_all_linear};
use serde_json::{Value, json};

use super::table::{count, ranges, sizes, table, warnings};
use super::{Python, Shared, no_python, pretty};
use crate::printer::{Printer, size};

/// The longest config that is read, in bytes.
const MAX_CONFIG: u64 = 16 << 20;

#[derive(Debug, Args)]
pub struct Arguments {
    /// The model: a folder of safetensors files, an index, or one safetensors file.
    model: PathBuf,

    /// An adapter's config, or its folder: show what it would select.
    #[arg(long, value_name = "CONFIG")]
    config: Option<PathBuf>,

    /// The rank for which added parameters are counted.
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    rank: u32,

    /// Ask the model's class in transformers for names and kinds, instead of guessing them from headers.
    #[arg(long)]
    by_class: bool,

    /// Tell what training with batches of so many rows takes of memory; with --config and --seq.
    #[arg(long, value_name = "ROWS", requires_all = ["config", "seq"], value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,

    /// How many tokens a row has.
    #[arg(long, value_name = "TOKENS", requires = "batch", value_parser = clap::value_parser!(u32).range(1..))]
    seq: Option<u32>,

    /// How the frozen weights are to be quantized.
    #[arg(long, value_name = "KIND", requires = "batch", value_parser = ["nf4", "nf4-double", "fp4", "int8"])]
    quant: Option<String>,

    /// What the adapter is to be trained by.
    #[arg(
        long, value_name = "NAME", requires = "batch", default_value = "adamw",
        value_parser = ["adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "sgd"]
    )]
    optimizer: String,

    #[command(flatten)]
    shared: Shared,
}

/// What training takes, where that is asked for.
fn memory(arguments: &Arguments, python: Option<&dyn Python>) -> Result<Option<Value>> {
    let Some(batch) = arguments.batch else { return Ok(None) };
    let python = python.ok_or_else(|| {
        no_python("only the model's class says what its forward pass keeps, and this program has no Python")
    })?;
    let request = json!({
        "model": arguments.model,
        "config": arguments.config,
        "batch": batch,
        "seq": arguments.seq,
        "quant": arguments.quant,
        "optimizer": arguments.optimizer,
    });
    python.memory(&request).map(Some)
}

/// The same for people.
fn memory_text(memory: &Value) -> String {
    let part = |name: &str| memory.get(name).and_then(Value::as_u64).unwrap_or_default();
    let row = |(name, what): &(&str, &str)| vec![(*what).to_owned(), size(part(name))];
    let rows: Vec<Vec<String>> = [
        ("weights", "weights"),
        ("adapter", "adapter"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer"),
        ("activations", "activations"),
        ("total", "in all"),
        ("activations_checkpointed", "activations with gradient checkpointing"),
        ("total_checkpointed", "in all with gradient checkpointing"),
    ]
    .iter()
    .filter(|(name, _)| memory.get(*name).is_some_and(Value::is_u64))
    .map(row)
    .collect();
    let batch = format!("memory of training, {} x {} tokens", part("batch"), part("seq"));
    "\n".to_owned() + &table(&[&batch, "size"], &rows)
}

pub fn run(arguments: &Arguments, printer: &Printer, python: Option<&dyn Python>) -> Result<()> {
    let config = arguments.config.as_ref().map(|path| read_config(path, arguments)).transpose()?;
    let (config, task) = config.unzip();
    let asks = arguments.by_class || config.as_ref().is_some_and(wants_all_linear);
    let outline = match python.filter(|_| asks) {
        Some(python) => python.outline(&arguments.model, task.flatten().as_deref())?,
        None if asks => {
            return Err(no_python("only the model's class says which layers it has, and this program has no Python"));
        }
        None => Outline::of(&Checkpoint::open_model(&arguments.model, arguments.shared.links())?),
    };
    let aim = config.as_ref().map(|config| aim(&outline, config)).transpose()?;
    let report = Report { outline: &outline, aim, rank: arguments.rank as usize, guessed: outline.linear.is_none() };
    let memory = memory(arguments, python)?;
    printer.data(&if arguments.shared.json {
        let mut report = report.json();
        if let (Some(memory), Some(fields)) = (memory, report.as_object_mut()) {
            fields.insert("memory".to_owned(), memory);
        }
        pretty(&report)
    } else {
        report.text() + &memory.as_ref().map(memory_text).unwrap_or_default()
    });
    Ok(())
}

/// The config, and the task that it is for.
fn read_config(path: &Path, arguments: &Arguments) -> Result<(AdapterConfig, Option<String>)> {
    let file = if path.is_dir() { path.join(ADAPTER_CONFIG) } else { path.to_owned() };
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let bytes = read_small(parent(&file), &name, arguments.shared.links(), MAX_CONFIG)?;
    let bytes = bytes.ok_or_else(|| Error::checkpoint(&file, "is not there"))?;
    let text = String::from_utf8(bytes).map_err(|_| Error::checkpoint(&file, "is not UTF-8 text"))?;
    let config = AdapterConfig::parse(&text, &file.to_string_lossy())?;
    let values: Value = serde_json::from_str(&text).map_err(|error| Error::checkpoint(&file, error.to_string()))?;
    Ok((config, values.get("task_type").and_then(Value::as_str).map(str::to_owned)))
}

struct Report<'a> {
    outline: &'a Outline,
    aim: Option<Aim>,
    rank: usize,
    guessed: bool,
}

impl Report<'_> {
    /// How many members of a group are selected, in which blocks.
    fn selected(&self, group: &Group) -> Option<(usize, Vec<usize>)> {
        let selection = &self.aim.as_ref()?.selection;
        let chosen: HashSet<&String> = selection.targets.iter().chain(&selection.parameters).collect();
        let members: Vec<&String> = group.members.iter().filter(|name| chosen.contains(name)).collect();
        let mut blocks: Vec<usize> =
            members.iter().filter_map(|name| name.split('.').find_map(|part| part.parse().ok())).collect();
        blocks.sort_unstable();
        blocks.dedup();
        Some((members.len(), blocks))
    }

    fn added(&self, group: &Group) -> Option<u64> {
        Some(added(&group.kind, &group.shape, self.rank)?.saturating_mul(group.members.len() as u64))
    }

    fn json(&self) -> Value {
        let groups = self.outline.groups();
        let group = |group: &Group| {
            let selected = self.selected(group);
            json!({
                "name": group.name,
                "leaf": group.leaf(),
                "kind": group.kind,
                "shape": group.shape,
                "count": group.members.len(),
                "blocks": group.blocks,
                "parameters": group.parameters,
                "added": self.added(group),
                "selected": selected.as_ref().map(|(count, _)| count),
                "selected_blocks": selected.as_ref().map(|(_, blocks)| blocks),
            })
        };
        json!({
            "by_class": !self.guessed,
            "rank": self.rank,
            "groups": groups.iter().map(group).collect::<Vec<_>>(),
            "blocks": self.outline.stacks().iter().map(|(name, all)| (name.as_str(), all.len())).collect::<BTreeMap<_, _>>(),
            "config": self.aim.as_ref().map(aim_json),
        })
    }

    fn text(&self) -> String {
        let groups = self.outline.groups();
        let mut head = vec!["leaf", "name", "kind", "shape", "count", "blocks", "parameters"];
        let added = format!("added at rank {}", self.rank);
        head.push(&added);
        if self.aim.is_some() {
            head.extend(["selected", "in blocks"]);
        }
        let dash = || "-".to_owned();
        let row = |group: &Group| {
            let mut row = vec![
                show_name(group.leaf()),
                show_name(&group.name),
                show_name(&group.kind),
                sizes(&group.shape),
                group.members.len().to_string(),
                if group.blocks.is_empty() { dash() } else { ranges(&group.blocks) },
                count(group.parameters),
                self.added(group).map_or_else(dash, count),
            ];
            if let Some((selected, blocks)) = self.selected(group) {
                row.push(if selected == 0 { dash() } else { selected.to_string() });
                row.push(if blocks.is_empty() { dash() } else { ranges(&blocks) });
            }
            row
        };
        let mut text = table(&head, &groups.iter().map(row).collect::<Vec<_>>());
        if self.guessed {
            text += "names are those of the files, kinds a guess from shapes and names; --by-class asks the model's class\n";
        }
        text + &self.aim.as_ref().map(aim_text).unwrap_or_default()
    }
}

fn aim_json(aim: &Aim) -> Value {
    let selection = &aim.selection;
    let entries = selection
        .report
        .iter()
        .map(|row| json!({ "field": row.field, "entry": row.entry, "count": row.count, "nearest": row.nearest }));
    let coverage = aim
        .coverage
        .iter()
        .map(|part| json!({ "stack": part.stack, "adapted": part.adapted, "blocks": part.blocks.len() }));
    json!({
        "targets": selection.targets,
        "parameters": selection.parameters,
        "modules_to_save": selection.modules_to_save,
        "excluded": selection.excluded,
        "entries": entries.collect::<Vec<_>>(),
        "coverage": coverage.collect::<Vec<_>>(),
        "added": aim.parameters,
        "warnings": aim.warnings,
    })
}

fn aim_text(aim: &Aim) -> String {
    let selection = &aim.selection;
    let rows: Vec<Vec<String>> = selection
        .report
        .iter()
        .map(|row| vec![row.field.clone(), show_name(&row.entry), row.count.to_string()])
        .collect();
    let mut text = "\n".to_owned() + &table(&["field", "entry", "matches"], &rows);
    let targets = selection.targets.len() + selection.parameters.len();
    let mut parts = vec![format!("{targets} layers selected")];
    if !selection.modules_to_save.is_empty() {
        parts.push(format!("{} modules trained whole", selection.modules_to_save.len()));
    }
    if !selection.excluded.is_empty() {
        parts.push(format!("{} excluded", selection.excluded.len()));
    }
    parts.extend(aim.parameters.map(|number| format!("{} parameters added", count(number))));
    text += &["\n", &parts.join(", "), "\n"].concat();
    text + &warnings(&aim.warnings)
}
