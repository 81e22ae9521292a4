//! Typed access to the fields of a config: every fault is noted, and none stops the reading of the others.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::Names;
use crate::error::show_name;

/// The most entries that a list or object may have.
const MAX_ITEMS: usize = 100_000;

/// How many faults one message lists.
const SHOWN_FAULTS: usize = 8;

/// The fields of one config and what is wrong with them.
pub(super) struct Fields<'a> {
    values: &'a Map<String, Value>,
    known: BTreeSet<&'static str>,
    faults: Vec<String>,
}

impl<'a> Fields<'a> {
    pub fn new(values: &'a Map<String, Value>) -> Self {
        Self { values, known: BTreeSet::new(), faults: Vec::new() }
    }

    /// Notes a fault that is more than one field's type.
    pub fn fault(&mut self, fault: impl Into<String>) {
        self.faults.push(fault.into());
    }

    /// Every fault in one line, or none.
    pub fn faults(&self) -> Option<String> {
        let rest = self.faults.len().saturating_sub(SHOWN_FAULTS);
        let shown = self.faults.iter().take(SHOWN_FAULTS).cloned().collect::<Vec<_>>().join("; ");
        (!self.faults.is_empty()).then(|| if rest > 0 { format!("{shown}; and {rest} more") } else { shown })
    }

    /// The keys that nobody asked for.
    pub fn unknown(&self) -> Vec<&'a str> {
        self.values.keys().map(String::as_str).filter(|key| !self.known.contains(key)).collect()
    }

    /// The field, if it is there. Asking makes the name a known one.
    pub fn value(&mut self, name: &'static str) -> Option<&'a Value> {
        self.known.insert(name);
        self.values.get(name)
    }

    /// The field, if it is there and not null.
    pub fn set(&mut self, name: &'static str) -> Option<&'a Value> {
        self.value(name).filter(|value| !value.is_null())
    }

    pub fn integer(&mut self, name: &'static str, range: RangeInclusive<i64>, default: i64) -> i64 {
        let Some(value) = self.value(name) else { return default };
        self.checked(name, value, integer(value, &range)).unwrap_or(default)
    }

    pub fn number(&mut self, name: &'static str, default: f64) -> f64 {
        let Some(value) = self.value(name) else { return default };
        self.checked(name, value, number(value)).unwrap_or(default)
    }

    /// A probability, such as that of dropping a value.
    pub fn fraction(&mut self, name: &'static str) {
        let Some(value) = self.value(name) else { return };
        let found = number(value).and_then(|number| {
            (0.0..=1.0).contains(&number).then_some(number).ok_or_else(|| "a number from 0 to 1".to_owned())
        });
        self.checked(name, value, found);
    }

    pub fn boolean(&mut self, name: &'static str, default: bool) -> bool {
        let Some(value) = self.value(name) else { return default };
        self.checked(name, value, value.as_bool().ok_or_else(|| "true or false".to_owned())).unwrap_or(default)
    }

    /// One of some strings, the first of which is the default.
    pub fn choice(&mut self, name: &'static str, choices: &[&str]) -> String {
        let default = choices.first().copied().unwrap_or_default().to_owned();
        let Some(value) = self.value(name) else { return default };
        let found = value.as_str().filter(|text| choices.contains(text)).map(str::to_owned);
        self.checked(name, value, found.ok_or_else(|| format!("one of {}", choices.join(", ")))).unwrap_or(default)
    }

    pub fn text(&mut self, name: &'static str) -> Option<String> {
        let value = self.set(name)?;
        self.checked(name, value, value.as_str().map(str::to_owned).ok_or_else(|| "a string".to_owned()))
    }

    pub fn strings(&mut self, name: &'static str) -> Option<Vec<String>> {
        let value = self.set(name)?;
        self.checked(name, value, strings(value))
    }

    /// A pattern or a list of names.
    pub fn names(&mut self, name: &'static str) -> Option<Names> {
        let value = self.set(name)?;
        let found = match value {
            Value::String(pattern) => Ok(Names::Pattern(pattern.clone())),
            _ => strings(value).map(Names::List).map_err(|_| "a string or a list of strings".to_owned()),
        };
        self.checked(name, value, found)
    }

    /// An integer or a list of them.
    pub fn integers(&mut self, name: &'static str, range: &RangeInclusive<i64>) -> Option<Vec<i64>> {
        let value = self.set(name)?;
        let found = if value.is_array() { integers(value, range) } else { integer(value, range).map(|one| vec![one]) };
        self.checked(name, value, found)
    }

    /// An object whose values are read by `read`, in the order of the file.
    pub fn entries<T>(&mut self, name: &'static str, read: impl Fn(&Value) -> Result<T, String>) -> Vec<(String, T)> {
        let Some(value) = self.set(name) else { return Vec::new() };
        let Some(object) = value.as_object().filter(|object| object.len() <= MAX_ITEMS) else {
            self.faults.push(format!("`{name}` is {}, not an object of at most {MAX_ITEMS} entries", show(value)));
            return Vec::new();
        };
        let mut entries = Vec::with_capacity(object.len());
        for (key, value) in object {
            match read(value) {
                Ok(read) => entries.push((key.clone(), read)),
                Err(wanted) => {
                    self.faults.push(format!("`{name}` has {} for `{}`, not {wanted}", show(value), show_name(key)));
                }
            }
        }
        entries
    }

    /// An object that is kept unread.
    pub fn object(&mut self, name: &'static str) -> Option<&'a Map<String, Value>> {
        let value = self.set(name)?;
        self.checked(name, value, value.as_object().ok_or_else(|| "an object".to_owned()))
    }

    /// `found`, or a note that the field is not what was wanted.
    pub fn checked<T>(&mut self, name: &str, value: &Value, found: Result<T, String>) -> Option<T> {
        found.map_err(|wanted| self.faults.push(format!("`{name}` is {}, not {wanted}", show(value)))).ok()
    }
}

/// An integer, which neither `true` nor `8.0` nor `"8"` is.
pub(super) fn integer(value: &Value, range: &RangeInclusive<i64>) -> Result<i64, String> {
    value.as_i64().filter(|integer| range.contains(integer)).ok_or_else(|| match (range.start(), range.end()) {
        (&i64::MIN, &i64::MAX) => "an integer".to_owned(),
        (start, &i64::MAX) => format!("an integer of at least {start}"),
        (start, end) => format!("an integer from {start} to {end}"),
    })
}

pub(super) fn number(value: &Value) -> Result<f64, String> {
    value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| "a finite number".to_owned())
}

pub(super) fn integers(value: &Value, range: &RangeInclusive<i64>) -> Result<Vec<i64>, String> {
    let list = value.as_array().filter(|list| list.len() <= MAX_ITEMS);
    let found = list.and_then(|list| list.iter().map(|item| integer(item, range).ok()).collect::<Option<Vec<_>>>());
    found.ok_or_else(|| match integer(&Value::Null, range) {
        Err(one) => format!("a list of at most {MAX_ITEMS}, each {one}"),
        Ok(_) => "a list of integers".to_owned(),
    })
}

fn strings(value: &Value) -> Result<Vec<String>, String> {
    let list = value.as_array().filter(|list| list.len() <= MAX_ITEMS);
    let found = list.and_then(|list| list.iter().map(|item| item.as_str().map(str::to_owned)).collect());
    found.ok_or_else(|| format!("a list of at most {MAX_ITEMS} strings"))
}

/// A value in few words.
fn show(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(object) => format!("an object of {}", object.len()),
        Value::String(text) => format!("\"{}\"", show_name(text)),
        other => show_name(&other.to_string()),
    }
}
