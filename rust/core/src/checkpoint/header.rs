//! The header of a safetensors file: which tensors, of what type and shape, where.
//!
//! The format is that of <https://github.com/huggingface/safetensors#format>. Its own crate's parser is the reference in
//! the tests, but does not do here: it takes the last of two equal keys, accepts a description written as an array and
//! fields that the format does not have, takes sizes that no tensor library can hold, wants the whole file in memory,
//! and names neither tensor nor file in what it reports.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::dtype::Dtype;
use crate::error::show_name;

/// The longest header that is read, in bytes; the limit of the safetensors crate.
pub const MAX_LENGTH: u64 = 100_000_000;

/// The most dimensions a tensor may have: over twice what weights have, and few enough that shapes stay smaller than their text.
const MAX_RANK: usize = 16;

/// The most tensors, or strings, in one object. Ten times what the largest models have; a hundred million bytes of
/// smaller entries would take several times that in memory.
const MAX_ENTRIES: usize = 1_000_000;

/// The key of the free-form strings, which no tensor can be named.
pub const METADATA: &str = "__metadata__";

/// What a header says.
#[derive(Debug)]
pub struct Header {
    /// The tensors in the order of their bytes.
    pub tensors: Vec<Row>,
    /// The free-form strings.
    pub metadata: BTreeMap<String, String>,
}

/// One tensor of a header.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// The tensor's name, which another row may have too: whoever looks up by name finds that out.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Where its bytes start, counted from the end of the header.
    pub start: u64,
    /// Where its bytes end.
    pub end: u64,
}

/// Reads the JSON of a header whose file goes on for `data_length` bytes after it.
///
/// All is checked but that names are unique: the tensors lie in `0..data_length` without hole or overlap, and each has
/// as many bytes as its type and shape say. The reason that comes back otherwise does not name the file.
pub fn parse(json: &[u8], data_length: u64) -> Result<Header, String> {
    if json.first() != Some(&b'{') {
        return Err("the header does not start with `{`".into());
    }
    let text = std::str::from_utf8(json).map_err(|error| format!("the header is not UTF-8: {error}"))?;
    let raw: Raw = serde_json::from_str(text).map_err(|error| format!("the header is malformed: {}", short(&error)))?;
    let Raw { mut tensors, metadata } = raw;
    tensors.sort_by_key(|row| (row.start, row.end));
    check_layout(&tensors, data_length)?;
    Ok(Header { tensors, metadata: metadata.unwrap_or_default() })
}

/// What the JSON parser says, without the rest of a long value that it quotes.
pub(super) fn short(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.char_indices().nth(200) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or_default()),
        None => text,
    }
}

fn check_layout(tensors: &[Row], data_length: u64) -> Result<(), String> {
    let mut last: Option<&Row> = None;
    for row in tensors {
        let end = last.map_or(0, |last| last.end);
        if row.start != end {
            let fault = if row.start < end { "overlaps what is before it" } else { "leaves a hole before it" };
            let name = show_name(&row.name);
            return Err(format!("tensor `{name}` {fault}: it starts at byte {}, not {end}", row.start));
        }
        last = Some(row);
    }
    let end = last.map_or(0, |last| last.end);
    match end.cmp(&data_length) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(format!(
            "the file is cut off: its tensors take {end} bytes and {data_length} are there; hint: download it again"
        )),
        std::cmp::Ordering::Less => Err(format!("{} bytes follow the last tensor", data_length.saturating_sub(end))),
    }
}

/// Bytes of a tensor, or why there can be none of that shape. Zeros do not hide sizes that overflow beside them.
pub(crate) fn size(dtype: Dtype, shape: &[u64]) -> Result<u64, String> {
    let limit = i64::MAX.unsigned_abs();
    let mut padded = dtype.size() as u64;
    for &size in shape {
        padded = padded
            .checked_mul(size.max(1))
            .filter(|&bytes| bytes <= limit && size <= limit)
            .ok_or_else(|| format!("shape {} of {} is larger than can be", show_sizes(shape), dtype.name()))?;
    }
    Ok(if shape.contains(&0) { 0 } else { padded })
}

fn show_sizes(sizes: &[u64]) -> String {
    show_name(&format!("{sizes:?}"))
}

/// The header as its JSON has it.
struct Raw {
    tensors: Vec<Row>,
    metadata: Option<BTreeMap<String, String>>,
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut raw = Raw { tensors: Vec::new(), metadata: None };
        while let Some(name) = map.next_key::<String>()? {
            if name != METADATA {
                check_count(raw.tensors.len())?;
                let within = |error| A::Error::custom(format!("tensor `{}`: {error}", show_name(&name)));
                let Description { dtype, shape, start, end } = map.next_value().map_err(within)?;
                raw.tensors.push(Row { name, dtype, shape, start, end });
            } else if raw.metadata.is_some() {
                return Err(A::Error::custom(format!("key `{METADATA}` occurs twice")));
            } else {
                let Strings(strings) = map.next_value()?;
                raw.metadata = Some(strings);
            }
        }
        Ok(raw)
    }
}

fn check_count<E: serde::de::Error>(count: usize) -> Result<(), E> {
    if count < MAX_ENTRIES { Ok(()) } else { Err(E::custom(format!("more than {MAX_ENTRIES} entries"))) }
}

/// A map of strings in which no key occurs twice.
pub(super) struct Strings(pub(super) BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(StringsVisitor)
    }
}

struct StringsVisitor;

impl<'de> Visitor<'de> for StringsVisitor {
    type Value = Strings;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
        let mut strings = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let within = |error| A::Error::custom(format!("key `{}`: {error}", show_name(&key)));
            let value = map.next_value::<String>().map_err(within)?;
            if strings.contains_key(&key) {
                return Err(A::Error::custom(format!("key `{}` occurs twice", show_name(&key))));
            }
            check_count(strings.len())?;
            strings.insert(key, value);
        }
        Ok(Strings(strings))
    }
}

/// What a header says of one tensor.
struct Description {
    dtype: Dtype,
    shape: Vec<usize>,
    start: u64,
    end: u64,
}

impl<'de> Deserialize<'de> for Description {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(DescriptionVisitor)
    }
}

struct DescriptionVisitor;

impl<'de> Visitor<'de> for DescriptionVisitor {
    type Value = Description;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Description, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key::<Field>()? {
            let twice = match field {
                Field::Dtype => dtype.replace(map.next_value::<Dtype>()?).is_some(),
                Field::Shape => shape.replace(map.next_value::<Sizes>()?).is_some(),
                Field::Offsets => offsets.replace(map.next_value::<[u64; 2]>()?).is_some(),
            };
            if twice {
                return Err(A::Error::custom(format!("field `{}` occurs twice", field.name())));
            }
        }
        let dtype = dtype.ok_or_else(|| A::Error::missing_field("dtype"))?;
        let shape = shape.ok_or_else(|| A::Error::missing_field("shape"))?;
        let [start, end] = offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?;
        describe(dtype, shape.get(), start, end).map_err(A::Error::custom)
    }
}

fn describe(dtype: Dtype, sizes: &[u64], start: u64, end: u64) -> Result<Description, String> {
    let bytes = size(dtype, sizes)?;
    let found =
        end.checked_sub(start).ok_or_else(|| format!("its bytes end at {end}, before their start at {start}"))?;
    if found != bytes {
        let shape = show_sizes(sizes);
        return Err(format!("shape {shape} of {} takes {bytes} bytes, the offsets give it {found}", dtype.name()));
    }
    let mut shape = Vec::with_capacity(sizes.len());
    for &size in sizes {
        shape.push(usize::try_from(size).map_err(|_| format!("size {size} does not fit this machine"))?);
    }
    Ok(Description { dtype, shape, start, end })
}

/// A field of a description. As the type's name, it is told from the text in place: a header may have millions.
#[derive(Clone, Copy)]
enum Field {
    Dtype,
    Shape,
    Offsets,
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Self::Dtype => "dtype",
            Self::Shape => "shape",
            Self::Offsets => "data_offsets",
        }
    }
}

/// What a short text stands for.
struct Meant<T>(&'static str, fn(&str) -> Option<T>);

impl<T> Visitor<'_> for Meant<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        (self.1)(text).ok_or_else(|| E::custom(format!("unknown {} `{}`", self.0, show_name(text))))
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let meant =
            |text: &str| [Self::Dtype, Self::Shape, Self::Offsets].into_iter().find(|field| field.name() == text);
        deserializer.deserialize_str(Meant("field", meant))
    }
}

impl<'de> Deserialize<'de> for Dtype {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Meant("dtype", Self::from_name))
    }
}

/// The sizes of a shape, so many of the numbers.
struct Sizes([u64; MAX_RANK], usize);

impl Sizes {
    fn get(&self) -> &[u64] {
        self.0.get(..self.1).unwrap_or_default()
    }
}

impl<'de> Deserialize<'de> for Sizes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(SizesVisitor)
    }
}

struct SizesVisitor;

impl<'de> Visitor<'de> for SizesVisitor {
    type Value = Sizes;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Sizes, A::Error> {
        let mut sizes = Sizes([0; MAX_RANK], 0);
        while let Some(size) = sequence.next_element()? {
            let Some(place) = sizes.0.get_mut(sizes.1) else {
                return Err(A::Error::custom(format!("more than {MAX_RANK} dimensions")));
            };
            *place = size;
            sizes.1 += 1;
        }
        Ok(sizes)
    }
}
