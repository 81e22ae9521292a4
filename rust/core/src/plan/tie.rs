//! Output heads that a checkpoint leaves out because they are the embedding.
//!
//! An adapter that changes one of the two changes only that one: after the merge they are two tensors, and the model's
//! config says so. Rows of trained tokens are the exception, since such an adapter changes both alike.

use serde_json::Value;

use super::adapter::Adapter;
use super::base::Base;
use super::draft::{Draft, Drafts, same};
use super::update::Change;
use crate::error::{Error, Result, show_name};
use crate::keys::BASE_LAYER;

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
