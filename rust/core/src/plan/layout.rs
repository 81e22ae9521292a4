//! The files of the merged checkpoint and what is in each.

use std::collections::HashMap;

use super::adapter::Adapter;
use super::base::Base;
use super::changes::{Draft, Drafts};
use super::model_config::Tie;
use super::{File, Output, Source};
use crate::checkpoint::Entry;
use crate::dtype::Dtype;
use crate::error::show_name;

/// The base's files with `drafts` in their places; what the base lacks goes at the end of the last one, a head that was tied
/// first.
pub fn files(base: &Base, adapters: &[Adapter], mut drafts: Drafts, head: Option<&Tie>) -> Vec<File> {
    let same_header = base.layers.is_none() && !base.checkpoint.is_made();
    let empty = |name: &String| File { name: name.clone(), outputs: Vec::new(), same_header };
    let mut files: Vec<File> = base.checkpoint.files().iter().map(|shard| empty(&shard.name)).collect();
    let mut starts: HashMap<String, u64> = HashMap::new();
    for (name, entry) in base.checkpoint.entries() {
        let Some(file) = files.get_mut(entry.file()) else { continue };
        starts.insert(name.to_owned(), entry.start());
        for seen in base.places(name) {
            let output = output(adapters, seen, entry, Source::Base(name.to_owned()), drafts.remove(seen));
            file.same_header &= output.shape == entry.shape;
            file.outputs.push(output);
        }
    }
    for file in &mut files {
        file.outputs.sort_by_key(|output| match &output.source {
            Source::Base(name) => starts.get(name).copied(),
            Source::Adapter(..) | Source::Original(_) => starts.get(&output.name).copied(),
        });
    }
    if let Some(last) = files.last_mut() {
        if let Some((head, entry)) = head.and_then(|tie| Some((tie, base.entry(&tie.embedding)?))) {
            let source = Source::Base(head.embedding.clone());
            last.same_header = false;
            last.outputs.push(output(adapters, &head.head, entry, source, drafts.remove(&head.head)));
        }
        for (name, draft) in drafts {
            let Some(entry) = whole(adapters, &draft) else { continue };
            last.same_header = false;
            last.outputs.push(output(adapters, &name, entry, Source::Base(name.clone()), Some(draft)));
        }
    }
    files
}

/// Says which tensors the output has and the base does not, apart from a head that was tied.
pub fn new(base: &Base, drafts: &Drafts, head: Option<&Tie>) -> Option<String> {
    let is_new = |name: &&String| base.entry(name).is_none() && head.is_none_or(|tie| tie.head != **name);
    let names: Vec<String> = drafts.keys().filter(is_new).map(|name| show_name(name)).collect();
    (!names.is_empty()).then(|| {
        format!("{}: new to the base, of a module that the adapter trained whole (modules_to_save)", names.join(", "))
    })
}

/// The tensor that an adapter holds in full.
pub fn whole<'a>(adapters: &'a [Adapter], draft: &Draft) -> Option<&'a Entry> {
    let (index, key) = draft.whole.as_ref()?;
    adapters.get(*index)?.checkpoint.entry(key)
}

/// The output called `name` with the type of `entry`, and its shape unless an adapter holds it in full.
fn output(adapters: &[Adapter], name: &str, entry: &Entry, source: Source, draft: Option<Draft>) -> Output {
    let draft = draft.unwrap_or_default();
    Output {
        name: name.to_owned(),
        dtype: entry.dtype,
        converted: false,
        shape: whole(adapters, &draft).unwrap_or(entry).shape.clone(),
        source: draft.whole.map_or(source, |(index, key)| Source::Adapter(index, key)),
        updates: draft.updates,
    }
}

/// Gives all floats another type.
pub fn convert(files: &mut [File], dtype: Dtype) {
    for file in files {
        for output in file.outputs.iter_mut().filter(|output| output.dtype.is_adapter_float() && output.dtype != dtype)
        {
            output.dtype = dtype;
            output.converted = true;
            file.same_header = false;
        }
    }
}

/// The same tensors in files of at most `most` bytes of them, or one tensor where that alone is larger.
pub fn reshard(files: Vec<File>, most: u64) -> Vec<File> {
    let mut shards: Vec<Vec<Output>> = Vec::new();
    let mut size = 0;
    for output in files.into_iter().flat_map(|file| file.outputs) {
        let bytes = output.bytes() as u64;
        if let Some(shard) = shards.last_mut().filter(|_| size + bytes <= most) {
            shard.push(output);
        } else {
            shards.push(vec![output]);
            size = 0;
        }
        size += bytes;
    }
    let count = shards.len();
    let name = |index: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    let file = |(index, outputs)| File { name: name(index), outputs, same_header: false };
    shards.into_iter().enumerate().map(file).collect()
}
