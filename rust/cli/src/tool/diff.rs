//! `peftrs diff`: how two adapters, or two checkpoints, differ.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use peftrs_core::error::{Error, Result, show_name, show_path};
use peftrs_core::inspect::{self, Adapter, Difference, Model, Row, adapter_folder};
use serde_json::{Map, Value, json};

use super::table::{maybe, table};
use super::{Shared, pretty};
use crate::printer::Printer;

/// How many unequal tensors a table lists before it says how many more there are.
const LISTED: usize = 400;

#[derive(Debug, Args)]
pub struct Arguments {
    /// An adapter's folder, or a model.
    left: PathBuf,

    /// Another of the same kind.
    right: PathBuf,

    #[command(flatten)]
    shared: Shared,
}

/// The rows of a comparison and the config fields that differ.
struct Found {
    kind: &'static str,
    rows: Vec<Row>,
    fields: Vec<(String, Value, Value)>,
}

pub fn run(arguments: &Arguments, printer: &Printer) -> Result<()> {
    let links = arguments.shared.links();
    let (left, right) = (&arguments.left, &arguments.right);
    let found = match (adapter_folder(left), adapter_folder(right)) {
        (Some(left), Some(right)) => {
            let (left, right) = (Adapter::open(&left, links)?, Adapter::open(&right, links)?);
            let rows = inspect::adapters(&left, &right)?;
            Found { kind: "adapters", rows, fields: inspect::fields(&left.fields, &right.fields) }
        }
        (None, None) => {
            let (left, right) = (Model::open(left, links)?, Model::open(right, links)?);
            let rows = inspect::checkpoints(&left.weights, &right.weights)?;
            let object = |model: &Model| model.config.as_ref().and_then(Value::as_object).cloned().unwrap_or_default();
            let (one, other): (Map<_, _>, Map<_, _>) = (object(&left), object(&right));
            Found { kind: "checkpoints", rows, fields: inspect::fields(&one, &other) }
        }
        (one, _) => {
            let (adapter, model) = if one.is_some() { (left, right) } else { (right, left) };
            let (adapter, model) = (show_path(adapter), show_path(model));
            return Err(Error::Merge(format!(
                "{adapter} is an adapter and {model} a model; hint: give two of a kind, or use peftrs verify"
            )));
        }
    };
    printer.data(&if arguments.shared.json { pretty(&found.json()) } else { found.text() });
    Ok(())
}

impl Found {
    fn equal(&self) -> usize {
        self.rows.iter().filter(|row| row.is_equal()).count()
    }

    fn json(&self) -> Value {
        let numbers = |found: &Difference| {
            json!({
                "identical": found.identical,
                "left": found.left,
                "right": found.right,
                "distance": found.distance,
                "down_distance": found.factors.map(|[down, _]| down),
                "up_distance": found.factors.map(|[_, up]| up),
                "cosine": found.cosine,
            })
        };
        let row = |row: &Row| {
            let (what, more) = match row {
                Row::Update(_, found) => ("update", numbers(found)),
                Row::Tensor(_, found) => ("tensor", numbers(found)),
                Row::Unlike(_, [left, right]) => ("unlike", json!({ "left": left, "right": right })),
                Row::Left(_) => ("only left", json!({})),
                Row::Right(_) => ("only right", json!({})),
            };
            let mut object = json!({ "name": row.name(), "what": what });
            if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
                object.extend(more);
            }
            object
        };
        let fields =
            self.fields.iter().map(|(name, left, right)| json!({ "field": name, "left": left, "right": right }));
        json!({
            "kind": self.kind,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "identical": self.equal(),
            "config": fields.collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let unequal: Vec<&Row> = self.rows.iter().filter(|row| !row.is_equal()).collect();
        let row = |row: &&Row| {
            let dashes = || vec!["-".to_owned(); 6];
            let (what, numbers) = match row {
                Row::Update(_, found) => ("update".to_owned(), numbers(found)),
                Row::Tensor(_, found) => ("tensor".to_owned(), numbers(found)),
                Row::Unlike(_, [left, right]) => (format!("{left} and {right}"), dashes()),
                Row::Left(_) => ("only in the first".to_owned(), dashes()),
                Row::Right(_) => ("only in the second".to_owned(), dashes()),
            };
            [vec![show_name(row.name()), what], numbers].concat()
        };
        let rows: Vec<Vec<String>> = unequal.iter().take(LISTED).map(row).collect();
        let mut text = table(&["name", "what", "|first|", "|second|", "|difference|", "|dA|", "|dB|", "cosine"], &rows);
        // Writing to a string cannot fail.
        if unequal.len() > LISTED {
            let _ = writeln!(text, "… and {} more", unequal.len() - LISTED);
        }
        for (name, left, right) in &self.fields {
            let [left, right] = [left, right].map(|value| show_name(&value.to_string()));
            let _ = writeln!(text, "config {}: {left} and {right}", show_name(name));
        }
        let what = if self.kind == "adapters" { "updates and tensors" } else { "tensors" };
        text + &format!("{} of {} {what} are identical\n", self.equal(), self.rows.len())
    }
}

fn numbers(found: &Difference) -> Vec<String> {
    let [down, up] = found.factors.map_or([None; 2], |factors| factors.map(Some));
    [found.left, found.right, found.distance, down, up, found.cosine].map(maybe).to_vec()
}
