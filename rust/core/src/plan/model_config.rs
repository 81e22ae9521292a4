//! What the model's config has to say about the merged weights: their type, repeated layers, rows for new tokens, and output
//! heads that a checkpoint leaves out because they are the embedding.
//!
//! An adapter that changes one of head and embedding changes only that one: after the merge they are two tensors, and the model's
//! config says so. Rows of trained tokens are the exception, since such an adapter changes both alike.

use serde_json::{Map, Value};

use super::adapter::Adapter;
use super::base::Base;
use super::changes::{Change, Draft, Drafts, same};
use super::layout::whole;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::keys::BASE_LAYER;

/// Lists that have an entry for each layer.
const PER_LAYER: [&str; 4] = ["layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type"];

/// Lists of the numbers of some layers, which nobody can tell for layers that are repeated.
const SOME_LAYERS: [&str; 2] = ["mlp_only_layers", "moe_layers"];

/// Says that the head stands for itself.
pub fn untie(config: &mut Value) {
    if let Some(fields) = config.as_object_mut() {
        fields.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
    }
}

/// Says which type the weights have, wherever the config says so already.
pub fn set_dtype(config: &mut Value, dtype: Dtype) {
    let name = match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    };
    if let Some(fields) = config.as_object_mut()
        && !fields.contains_key("dtype")
    {
        fields.entry("torch_dtype").or_insert(Value::Null);
    }
    each(config, &mut |fields| {
        for key in ["dtype", "torch_dtype"] {
            if let Some(value) = fields.get_mut(key).filter(|value| value.is_string() || value.is_null()) {
                *value = Value::from(name);
            }
        }
    });
}

/// Says how many rows the embeddings have, wherever it said `before`; whether it did anywhere.
pub fn set_vocabulary(config: &mut Value, before: usize, rows: usize) -> bool {
    let mut found = false;
    each(config, &mut |fields| {
        if let Some(value) = fields.get_mut("vocab_size").filter(|value| is(value, before)) {
            *value = Value::from(rows);
            found = true;
        }
    });
    found
}

/// Says how many layers there are, and what each of them is.
pub fn replicate(config: &mut Value, base: &Base) -> Result<()> {
    let Some(layers) = &base.layers else { return Ok(()) };
    let (mut found, mut unclear) = (false, None);
    each(config, &mut |fields| {
        if !fields.get("num_hidden_layers").is_some_and(|value| is(value, base.depth)) {
            return;
        }
        found = true;
        fields.insert("num_hidden_layers".to_owned(), Value::from(layers.len()));
        let is_filled =
            |name: &&&str| fields.get(**name).and_then(Value::as_array).is_some_and(|list| !list.is_empty());
        unclear = unclear.or(SOME_LAYERS.iter().find(is_filled));
        for name in PER_LAYER {
            if let Some(list) =
                fields.get_mut(name).and_then(Value::as_array_mut).filter(|list| list.len() == base.depth)
            {
                *list = layers.iter().filter_map(|layer| list.get(*layer).cloned()).collect();
            }
        }
    });
    match unclear {
        Some(name) => {
            Err(refused(&format!("says of some layers in `{name}` what would have to be said of their copies")))
        }
        None if !found => {
            Err(refused(&format!("does not say that there are {} layers (`num_hidden_layers`)", base.depth)))
        }
        None => Ok(()),
    }
}

/// Whether a value is that number.
fn is(value: &Value, number: usize) -> bool {
    value.as_u64().and_then(|value| usize::try_from(value).ok()) == Some(number)
}

fn refused(what: &str) -> Error {
    Error::Merge(format!(
        "layer_replication: the base's config.json {what}; hint: give a folder with a config.json of the model"
    ))
}

/// Calls `change` on every object of a config that stands for a model: the whole, and the parts called `*_config`.
fn each(config: &mut Value, change: &mut dyn FnMut(&mut Map<String, Value>)) {
    let Some(fields) = config.as_object_mut() else { return };
    change(fields);
    fields.iter_mut().filter(|(name, _)| name.ends_with("_config")).for_each(|(_, part)| each(part, change));
}

/// How many rows the embeddings have in the base and after the merge.
pub struct Vocabulary {
    before: usize,
    rows: usize,
}

impl Vocabulary {
    /// The new size, if `drafts` give embeddings more rows. Refuses sizes that do not agree.
    pub fn find(base: &Base, adapters: &[Adapter], drafts: &Drafts) -> Result<Option<Self>> {
        let size = |name: &str| {
            let before = *base.entry(name)?.shape.first()?;
            let draft = drafts.get(name).and_then(|draft| whole(adapters, draft));
            Some((before, draft.map_or(Some(&before), |entry| entry.shape.first()).copied()?))
        };
        let tables = || base.names().filter(|name| is_embedding(name) || is_head(name));
        let grown = tables().filter_map(|name| Some((name, size(name)?))).find(|(_, (before, rows))| rows > before);
        let Some((name, (before, rows))) = grown else { return Ok(None) };
        // A table of another length in the base is another vocabulary's, such as that of positions.
        let differs = |table: &&str| size(table).is_some_and(|(size, after)| size == before && after != rows);
        match tables().find(differs) {
            Some(other) => Err(uneven([name, other], [before, rows])),
            None => Ok(Some(Self { before, rows })),
        }
    }

    /// Says so in the model's config, and to the user.
    pub fn tell(&self, config: &mut Value, notes: &mut Vec<String>) -> Result<()> {
        let Self { before, rows } = self;
        if !config.is_null() && !set_vocabulary(config, *before, *rows) {
            return Err(Error::Merge(format!(
                "the embeddings grow from {before} to {rows} rows, and the base's config.json does not say {before} anywhere \
                 (`vocab_size`); hint: give the base that was resized"
            )));
        }
        notes.push(format!(
            "the vocabulary grows from {before} to {rows} tokens; take the tokenizer that the adapter came with"
        ));
        Ok(())
    }
}

/// The last parts of the names under which models keep their input embedding.
const EMBEDDINGS: [&str; 6] = ["embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"];

/// The last parts of the names under which models keep their output head.
const HEADS: [&str; 3] = ["lm_head.weight", "embed_out.weight", "decoder.weight"];

/// A head tied to an embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tie {
    /// The head's parameter, which the base lacks.
    pub head: String,
    /// The embedding's, which it has.
    pub embedding: String,
    /// Whether untying is known to be enough: the model has this one head and reads it under this name.
    pub known: bool,
    bytes: usize,
}

impl Tie {
    /// The tie of `base`, if its config allows one and it lacks a head; `prefixed` if modules have a prefix in it that an
    /// adapter lacks.
    pub fn find(base: &Base, model: Option<&Value>, prefixed: bool) -> Option<Self> {
        let model = model?;
        if model.get("tie_word_embeddings").and_then(Value::as_bool) == Some(false) {
            return None;
        }
        let architecture = model.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str)?;
        let known = ["ForCausalLM", "LMHeadModel"].iter().any(|end| architecture.ends_with(end));
        let generates = known
            || ["ForConditionalGeneration", "ForMaskedLM", "ForPreTraining"]
                .iter()
                .any(|end| architecture.ends_with(end));
        if !generates || base.names().any(is_head) {
            return None;
        }
        let mut embeddings = base.names().filter(|name| is_embedding(name));
        let embedding = embeddings.next()?;
        // A prefix that the base lacks is the head model's own: its head stands beside it.
        let known = known && embeddings.next().is_none() && !prefixed;
        let bytes = base.entry(embedding)?.bytes();
        Some(Self { head: "lm_head.weight".to_owned(), embedding: embedding.to_owned(), known, bytes })
    }

    /// Lets the embedding grow with the head where an adapter holds the head's frozen weights, which are the embedding's.
    pub fn grow(&self, drafts: &mut Drafts, base: &Base, adapters: &[Adapter]) -> Result<()> {
        let rows = |shape: &[usize]| shape.first().copied().unwrap_or(0);
        let before = base.entry(&self.embedding).map_or(0, |entry| rows(&entry.shape));
        let head = drafts.get(&self.head).and_then(|draft| draft.whole.clone());
        let Some((index, key)) = head.filter(|_| drafts.get(&self.embedding).is_none_or(|draft| draft.whole.is_none()))
        else {
            return Ok(());
        };
        let after = adapters.get(index).and_then(|adapter| adapter.checkpoint.entry(&key));
        let after = after.map_or(0, |entry| rows(&entry.shape));
        if after <= before {
            return Ok(());
        }
        if !key.split('.').any(|part| part == BASE_LAYER) {
            return Err(uneven([&self.head, &self.embedding], [before, after]));
        }
        drafts.entry(self.embedding.clone()).or_default().whole = Some((index, key));
        Ok(())
    }

    /// Unties the two where `drafts` set them apart, and says so; where they stay one, leaves the embedding's changes. `grown`
    /// if the embedding gets more rows, with which a tied head grows.
    pub fn cut(
        self,
        drafts: &mut Drafts,
        adapters: &[Adapter],
        grown: bool,
        notes: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        if !self.is_cut(drafts, adapters, grown)? {
            drafts.remove(&self.head);
            return Ok(None);
        }
        if !self.known {
            return Err(self.refused());
        }
        if let Some(whole) = drafts.get(&self.embedding).filter(|_| grown).and_then(|draft| draft.whole.clone()) {
            drafts.entry(self.head.clone()).or_default().whole.get_or_insert(whole);
        }
        notes.push(format!(
            "{} is no longer tied to {}: {} bytes more, and tie_word_embeddings is false",
            show_name(&self.head),
            show_name(&self.embedding),
            self.bytes
        ));
        Ok(Some(self))
    }

    /// Whether `drafts` set the head and the embedding apart.
    fn is_cut(&self, drafts: &Drafts, adapters: &[Adapter], grown: bool) -> Result<bool> {
        let tokens = |change: &Change| matches!(change, Change::Tokens { .. });
        let changed = |draft: &&Draft| !draft.updates.iter().all(|update| tokens(&update.change));
        let (head, embedding) = (drafts.get(&self.head), drafts.get(&self.embedding));
        if head.iter().chain(&embedding).any(changed) {
            return Ok(true);
        }
        match (head.and_then(|draft| draft.whole.as_ref()), embedding.and_then(|draft| draft.whole.as_ref())) {
            (None, None) => Ok(false),
            (Some(head), Some(embedding)) => Ok(!same(head, embedding, adapters)?),
            (None, Some(_)) => Ok(!grown),
            (Some(_), None) => Ok(true),
        }
    }

    /// The refusal of a tie that this tool does not know how to undo.
    fn refused(&self) -> Error {
        Error::Merge(format!(
            "the adapter changes {}, which the base ties to other weights that it leaves out; hint: save the base with \
             tie_word_embeddings false and the weights told apart, then merge into that",
            show_name(&self.embedding)
        ))
    }
}

/// The refusal of a table that grows from so many rows to so many where another one does not.
pub fn uneven([grown, other]: [&str; 2], [before, rows]: [usize; 2]) -> Error {
    Error::Merge(format!(
        "{} grows from {before} to {rows} rows, and {} does not; hint: the adapter holds one of the two: merge into the base as \
         it was resized, or adapt or save both",
        show_name(grown),
        show_name(other)
    ))
}

/// Whether `name` is that of a model's input embedding.
pub fn is_embedding(name: &str) -> bool {
    let module = name.strip_suffix(".weight").unwrap_or_default();
    EMBEDDINGS.contains(&module.rsplit('.').next().unwrap_or_default())
}

/// Whether `name` is that of a model's output head.
pub fn is_head(name: &str) -> bool {
    HEADS.iter().any(|end| name.ends_with(end))
}
