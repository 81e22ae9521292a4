//! Tensors that stand in a checkpoint in another form, and are made of what is stored whenever they are read.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::ops::Range;

use super::{Checkpoint, Entry};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};

/// What makes a tensor of stored ones.
pub trait Make: Debug + Send + Sync {
    /// Fills `bytes` with those elements of the tensor.
    fn make(&self, stored: &Checkpoint, elements: Range<usize>, bytes: &mut [u8]) -> Result<()>;
}

/// A tensor that is not stored as it is.
#[derive(Debug)]
pub struct Made {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// The stored tensor in whose place it stands.
    pub place: String,
    /// What makes it.
    pub make: Box<dyn Make>,
}

impl Made {
    /// A tensor in the place of the one that has its name.
    pub fn instead(name: &str, dtype: Dtype, shape: Vec<usize>, make: impl Make + 'static) -> Self {
        Self { name: name.to_owned(), dtype, shape, place: name.to_owned(), make: Box::new(make) }
    }
}

/// The checkpoint as it is stored, and what makes tensors of it.
#[derive(Debug)]
pub(super) struct Makers {
    stored: Box<Checkpoint>,
    makers: HashMap<String, Box<dyn Make>>,
}

impl Checkpoint {
    /// The same checkpoint with these tensors in the places of those they are made of, and without the `spent` ones.
    pub fn with_made(self, made: Vec<Made>, spent: &HashSet<String>) -> Result<Self> {
        let mut by_place = HashMap::new();
        let mut makers = HashMap::new();
        for Made { name, dtype, shape, place, make } in made {
            by_place.insert(place, (name.clone(), dtype, shape));
            makers.insert(name, make);
        }
        let mut tensors = Vec::new();
        for (name, entry) in &self.tensors {
            if let Some((made, dtype, shape)) = by_place.remove(name) {
                let bytes = shape.iter().try_fold(dtype.size(), |bytes, size| bytes.checked_mul(*size));
                let refused =
                    || Error::checkpoint(&self.path, format!("`{}` does not fit this machine", show_name(name)));
                let bytes = bytes.ok_or_else(refused)?;
                tensors.push((made, Entry { dtype, shape, file: entry.file, start: entry.start, bytes }));
            } else if !spent.contains(name) {
                tensors.push((name.clone(), entry.clone()));
            }
        }
        let name_at = |position: &usize| tensors.get(*position).map(|(name, _)| name.as_str());
        let mut by_name: Vec<usize> = (0..tensors.len()).collect();
        by_name.sort_unstable_by_key(name_at);
        if let Some(pair) =
            by_name.windows(2).find(|pair| pair.first().and_then(name_at) == pair.last().and_then(name_at))
        {
            let name = pair.first().and_then(name_at).unwrap_or_default();
            let twice = format!("tensor `{}` is there both as it is and quantized", show_name(name));
            return Err(Error::checkpoint(&self.path, twice));
        }
        let (path, shards) = (self.path.clone(), self.shards.clone());
        Ok(Self { path, shards, tensors, by_name, makers: Some(Makers { stored: Box::new(self), makers }) })
    }

    /// Whether tensors are made, so that its files hold others than it shows.
    #[must_use]
    pub fn is_made(&self) -> bool {
        self.makers.is_some()
    }

    /// What makes the tensor called `name`, and of which checkpoint, if it is not stored as it is.
    pub(super) fn maker(&self, name: &str) -> Option<(&Checkpoint, &dyn Make)> {
        let Makers { stored, makers } = self.makers.as_ref()?;
        Some((stored, makers.get(name)?.as_ref()))
    }
}
