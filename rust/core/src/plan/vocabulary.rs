//! Embeddings that an adapter saved with more rows than the base has: new tokens.

use serde_json::Value;

use super::adapter::Adapter;
use super::base::Base;
use super::draft::Drafts;
use super::layout::whole;
use super::model;
use super::tie::{is_embedding, is_head, uneven};
use crate::error::{Error, Result};

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
        if !config.is_null() && !model::set_vocabulary(config, *before, *rows) {
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
