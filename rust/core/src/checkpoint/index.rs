//! The index of a sharded checkpoint: which file holds which tensor.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::header::{Strings, short};
use super::open::check_name;
use crate::error::show_name;

/// The longest index that is read, in bytes.
pub(super) const MAX_LENGTH: u64 = 256 << 20;

/// The JSON of an index as tensor name → file name.
///
/// Each file name is one component and ends in `.safetensors`; the reason that comes back otherwise does not name the index.
pub(super) fn parse(json: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let Index(weight_map) = serde_json::from_slice(json).map_err(|error| format!("is malformed: {}", short(&error)))?;
    for (tensor, file) in &weight_map {
        let within = |reason| format!("for tensor `{}`, {reason}", show_name(tensor));
        check_name(file).map_err(within)?;
        if !file.ends_with(".safetensors") {
            return Err(within(format!("names the file `{}`, which is not a .safetensors file", show_name(file))));
        }
    }
    Ok(weight_map)
}

struct Index(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(IndexVisitor)
    }
}

struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = Index;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let mut weight_map = None;
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<Skipped>()?;
            } else if weight_map.is_some() {
                return Err(A::Error::custom("key `weight_map` occurs twice"));
            } else {
                let Strings(strings) = map.next_value()?;
                weight_map = Some(strings);
            }
        }
        weight_map.map(Index).ok_or_else(|| A::Error::missing_field("weight_map"))
    }
}

/// A value of no interest that still has to keep to the limit of nesting, which `serde::de::IgnoredAny` does not.
struct Skipped;

impl<'de> Deserialize<'de> for Skipped {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Skipped {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self, A::Error> {
        while sequence.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while map.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}
