//! The safetensors crate as the reference: what both accept they read alike, and what only one accepts has a reason.

use std::collections::BTreeMap;

use peftrs_core::checkpoint::header::parse;
use peftrs_core::dtype::Dtype;
use peftrs_core::writer::header;
use proptest::prelude::*;
use safetensors::SafeTensors;

use crate::support::raw;

/// What is refused on purpose though the crate takes it; `header.rs` says why.
const STRICTER: [&str; 9] = [
    "does not start with `{`",
    "is larger than can be",
    "more than 16 dimensions",
    "unknown field",
    "unknown dtype",
    "occurs twice",
    "invalid type: sequence, expected an object",
    "invalid type: null, expected an object of strings",
    "is malformed: tensor `__metadata__",
];

/// Names that need escaping as well as plain ones.
fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,3}(\\.[a-z]{1,3}){0,2}", "\\PC{0,4}", "[\\x00-\\x20\"\\\\]{1,3}"]
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I64, Dtype::U8, Dtype::F8_E4M3])
}

fn layout() -> impl Strategy<Value = BTreeMap<String, (Dtype, Vec<usize>)>> {
    prop::collection::btree_map(name(), (dtype(), prop::collection::vec(0_usize..4, 0..4)), 0..6)
}

fn strings() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map(name(), name(), 0..3)
}

fn rows(layout: &BTreeMap<String, (Dtype, Vec<usize>)>) -> Vec<(&str, Dtype, &[usize])> {
    layout.iter().map(|(name, (dtype, shape))| (name.as_str(), *dtype, shape.as_slice())).collect()
}

/// A file of that layout, and how many of its bytes are data.
fn file(layout: &BTreeMap<String, (Dtype, Vec<usize>)>, strings: &BTreeMap<String, String>) -> (Vec<u8>, u64) {
    let mut bytes = header(&rows(layout), strings).unwrap();
    let data: usize = layout.values().map(|(dtype, shape)| shape.iter().product::<usize>() * dtype.size()).sum();
    bytes.resize(bytes.len() + data, 1);
    (bytes, data as u64)
}

/// One edit of a header's text: a piece of it is replaced by a piece of JSON or by random bytes.
fn edit() -> impl Strategy<Value = (prop::sample::Index, usize, Vec<u8>)> {
    let piece = prop::sample::select(vec![
        "",
        "0",
        "1",
        "-",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "\"",
        "null",
        "1.0",
        "F4",
        "\"a\"",
        "\\u0061",
        " ",
        "99999999999",
        "\"__metadata__\":{},",
        "\"dtype\":",
        ",\"x\":0",
    ]);
    let bytes = prop_oneof![piece.prop_map(|text| text.as_bytes().to_vec()), prop::collection::vec(any::<u8>(), 1..3)];
    (any::<prop::sample::Index>(), 0_usize..6, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_header_reads_back_as_it_was_written(layout in layout(), strings in strings()) {
        prop_assume!(!layout.contains_key("__metadata__"));
        let (bytes, data) = file(&layout, &strings);
        let length = bytes.len() - usize::try_from(data).unwrap();
        prop_assert_eq!(length % 8, 0);
        let read = parse(&bytes[8..length], data).unwrap();
        prop_assert_eq!(&read.metadata, &strings);
        let found: BTreeMap<_, _> = read.tensors.into_iter().map(|row| (row.name, (row.dtype, row.shape))).collect();
        prop_assert_eq!(&found, &layout);
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        for (name, (dtype, shape)) in &layout {
            let view = theirs.tensor(name).unwrap();
            prop_assert_eq!((format!("{:?}", view.dtype()), view.shape()), (dtype.name().to_owned(), &shape[..]));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn no_header_is_read_otherwise_than_by_the_reference(
        layout in layout(), strings in strings(), edits in prop::collection::vec(edit(), 1..3),
    ) {
        prop_assume!(!layout.contains_key("__metadata__"));
        let (bytes, data) = file(&layout, &strings);
        let mut json = bytes[8..bytes.len() - usize::try_from(data).unwrap()].to_vec();
        for (at, removed, inserted) in edits {
            let at = at.index(json.len());
            json.splice(at..json.len().min(at + removed), inserted);
        }
        let whole = raw(&json, usize::try_from(data).unwrap());
        match (parse(&json, data), SafeTensors::read_metadata(&whole)) {
            (Ok(ours), Ok((_, theirs))) => {
                for row in &ours.tensors {
                    // A name that occurs twice is found where names are looked up, so this may be the other one.
                    if ours.tensors.iter().filter(|other| other.name == row.name).count() > 1 {
                        continue;
                    }
                    let info = theirs.info(&row.name).unwrap();
                    prop_assert_eq!((&info.shape, info.data_offsets), (&row.shape, (
                        usize::try_from(row.start).unwrap(), usize::try_from(row.end).unwrap())));
                    prop_assert_eq!(format!("{:?}", info.dtype), row.dtype.name());
                }
            }
            // The reference drops all but the last of two equal names, which may leave a hole.
            (Ok(ours), Err(_)) => {
                let mut names: Vec<_> = ours.tensors.iter().map(|row| &row.name).collect();
                names.sort();
                names.dedup();
                prop_assert!(names.len() < ours.tensors.len(), "only ours accepts {}", String::from_utf8_lossy(&json));
            }
            (Err(reason), Ok(_)) => {
                let meant = STRICTER.iter().any(|wanted| reason.contains(wanted));
                prop_assert!(meant, "only the reference accepts: {reason}: {}", String::from_utf8_lossy(&json));
            }
            (Err(_), Err(_)) => {}
        }
    }
}
