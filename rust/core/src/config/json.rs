//! JSON from strangers: which keys occur twice, and a limit on how many values there are.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::show_name;

/// The most values one document may have; each takes memory many times its text.
const MAX_VALUES: usize = 1_000_000;

/// A document and the keys that occurred twice in an object of it; the last value counts, as in Python.
pub(super) struct Document {
    pub value: Value,
    pub duplicates: Vec<String>,
}

/// Reads a document of at most 128 levels.
pub(super) fn parse(text: &str) -> Result<Document, String> {
    let mut seen = Seen { duplicates: Vec::new(), values: 0 };
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Seed(&mut seen).deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    let value = value.map_err(|error| format!("is malformed JSON: {}", show_name(&error.to_string())))?;
    Ok(Document { value, duplicates: seen.duplicates })
}

struct Seen {
    duplicates: Vec<String>,
    values: usize,
}

struct Seed<'a>(&'a mut Seen);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.values += 1;
        if self.0.values > MAX_VALUES {
            return Err(D::Error::custom(format!("more than {MAX_VALUES} values")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = sequence.next_element_seed(Seed(self.0))? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Seed(self.0))?;
            if values.insert(key.clone(), value).is_some() {
                self.0.duplicates.push(key);
            }
        }
        Ok(Value::Object(values))
    }
}
