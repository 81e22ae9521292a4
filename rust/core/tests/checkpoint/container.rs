//! The bytes of one file: its header's length, text, JSON, and the layout it describes.

use peftrs_core::checkpoint::Checkpoint;
use peftrs_core::dtype::Dtype;
use tempfile::tempdir;

use crate::support::{assert_says, raw, refusal, write};

/// Writes `bytes` to a file and returns why it is refused.
#[track_caller]
fn reason(bytes: impl AsRef<[u8]>) -> String {
    let folder = tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write(&path, bytes);
    refusal(Checkpoint::open_file(&path), &path)
}

fn open(bytes: impl AsRef<[u8]>) -> Checkpoint {
    let folder = tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write(&path, bytes);
    Checkpoint::open_file(&path).unwrap()
}

/// A header of one tensor, `t`, with this description.
fn one(description: &str) -> String {
    format!(r#"{{"t":{description}}}"#)
}

/// A header of one F32 tensor with this shape and these offsets.
fn shaped(shape: &str, offsets: &str) -> String {
    one(&format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#))
}

#[test]
fn a_length_that_cannot_be_is_refused() {
    assert_says(&reason([]), "is empty");
    assert_says(&reason([1, 2, 3]), "is 3 bytes, too short");
    assert_says(&reason(u64::MAX.to_le_bytes()), "18446744073709551615 bytes, at most 100000000");
    assert_says(&reason(100_000_001_u64.to_le_bytes()), "100000001 bytes, at most 100000000");
    assert_says(&reason(9_u64.to_le_bytes()), "is cut off: its header takes 17 bytes and the file has 8");
    assert_says(&reason(1_u64.to_le_bytes()), "is cut off: its header takes 9 bytes and the file has 8");
    assert_says(&reason(0_u64.to_le_bytes()), "does not start with `{`");
}

#[test]
fn a_header_that_is_not_one_json_object_is_refused() {
    for (json, wanted) in [
        (&b"{\"\xff\":1}"[..], "not UTF-8"),
        (b"[]", "does not start with `{`"),
        (b" {}", "does not start with `{`"),
        (b"{", "malformed: EOF"),
        (b"{} {}", "malformed: trailing characters"),
        (b"{}\0", "malformed: trailing characters"),
        (b"{\"a\":1,}", "malformed"),
        (b"{\"t\":null}", "tensor `t`: invalid type: null"),
        (b"{\"t\":[\"F32\",[1],[0,4]]}", "tensor `t`: invalid type: sequence"),
        (b"{\"t\":{}}", "tensor `t`: missing field `dtype`"),
        (b"{\"__metadata__\":null}", "invalid type: null"),
        (b"{\"__metadata__\":{\"a\":1}}", "key `a`: invalid type: integer `1`, expected a string"),
    ] {
        assert_says(&reason(raw(json, 0)), wanted);
    }
    let deep = format!("{{\"t\":{{\"shape\":{}", "[".repeat(100_000));
    assert_says(&reason(raw(deep, 0)), "tensor `t`: invalid type: sequence, expected u64");
}

#[test]
fn a_description_with_other_fields_or_values_is_refused() {
    for (description, wanted) in [
        (r#"{"dtype":"F4","shape":[2],"data_offsets":[0,1]}"#, "tensor `t`: unknown dtype `F4`"),
        (r#"{"dtype":4,"shape":[2],"data_offsets":[0,1]}"#, "tensor `t`: invalid type: integer `4`"),
        (r#"{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}"#, "tensor `t`: unknown field `x`"),
        (r#"{"dtype":"F32","shape":[],"data_offsets":[0,4],"shape":[1]}"#, "tensor `t`: field `shape` occurs twice"),
        (r#"{"dtype":"F32","shape":[],"data_offsets":[0,4],"sh\u0061pe":[1]}"#, "field `shape` occurs twice"),
        (r#"{"dtype":"F32","shape":[]}"#, "tensor `t`: missing field `data_offsets`"),
        (r#"{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}"#, "floating point `1.0`"),
        (r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, "integer `-1`"),
        (r#"{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}"#, "string \"1\""),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}"#, "floating point `4.0`"),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[0,1e400]}"#, "number out of range"),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#, "invalid length 1"),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}"#, "trailing characters"),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, "its bytes end at 0, before their start at 4"),
    ] {
        assert_says(&reason(raw(one(description), 4)), wanted);
    }
}

#[test]
fn a_shape_that_does_not_fit_is_refused() {
    assert_says(&reason(raw(shaped("[2]", "[0,4]"), 4)), "shape [2] of F32 takes 8 bytes, the offsets give it 4");
    for shape in
        ["[4611686018427387904]", "[4294967296,4294967296]", "[9223372036854775808,0]", "[0,4611686018427387904]"]
    {
        assert_says(&reason(raw(shaped(shape, "[0,0]"), 0)), "is larger than can be");
    }
    for (shape, end) in [("9223372036854775808", "9223372036854775808"), ("9223372036854775808,0", "0")] {
        let bytes = one(&format!(r#"{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,{end}]}}"#));
        assert_says(&reason(raw(bytes, 0)), "is larger than can be");
    }
    assert_says(&reason(raw(shaped("[18446744073709551616]", "[0,0]"), 0)), "tensor `t`: invalid type");
    let dimensions = vec!["1"; 17].join(",");
    assert_says(&reason(raw(shaped(&format!("[{dimensions}]"), "[0,4]"), 4)), "more than 16 dimensions");
}

#[test]
fn a_layout_with_holes_overlaps_or_another_length_is_refused() {
    let two = |first: [u32; 2], second: [u32; 2]| {
        let row = |[start, end]: [u32; 2]| {
            format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{start},{end}]}}"#, end - start)
        };
        format!(r#"{{"a":{},"b":{}}}"#, row(first), row(second))
    };
    for (json, length, wanted) in [
        (two([0, 4], [3, 7]), 7, "tensor `b` overlaps what is before it: it starts at byte 3, not 4"),
        (two([0, 4], [0, 4]), 4, "tensor `b` overlaps"),
        (two([0, 4], [5, 9]), 9, "tensor `b` leaves a hole before it: it starts at byte 5, not 4"),
        (two([1, 4], [4, 9]), 9, "tensor `a` leaves a hole"),
        (two([5, 9], [0, 4]), 9, "tensor `a` leaves a hole"),
        (two([0, 4], [4, 9]), 8, "is cut off: its tensors take 9 bytes and 8 are there"),
        (two([0, 4], [4, 9]), 10, "1 bytes follow the last tensor"),
        ("{}".into(), 3, "3 bytes follow the last tensor"),
    ] {
        assert_says(&reason(raw(json, length)), wanted);
    }
    let swapped = open(raw(two([4, 9], [0, 4]), 9));
    assert_eq!(swapped.names().collect::<Vec<_>>(), ["b", "a"], "the order of the bytes counts");
}

#[test]
fn a_key_that_occurs_twice_is_refused() {
    let row = |start: u32| format!(r#"{{"dtype":"U8","shape":[1],"data_offsets":[{start},{}]}}"#, start + 1);
    let twice = |second: &str| raw(format!(r#"{{"ab":{},"c":{},"{second}":{}}}"#, row(0), row(1), row(2)), 3);
    assert_says(&reason(twice("ab")), "tensor `ab` occurs twice");
    assert_says(&reason(twice(r"a\u0062")), "tensor `ab` occurs twice");
    let strings = r#"{"__metadata__":{},"\u005f_metadata__":{}}"#;
    assert_says(&reason(raw(strings, 0)), "key `__metadata__` occurs twice");
    assert_says(&reason(raw(r#"{"__metadata__":{"a":"x","\u0061":"y"}}"#, 0)), "key `a` occurs twice");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long without optimisation")]
fn a_header_of_countless_entries_is_refused() {
    let many = |entry: &dyn Fn(usize) -> String| (0..=1_000_000).map(entry).collect::<Vec<_>>().join(",");
    let tensors = many(&|at| format!(r#""{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#));
    assert_says(&reason(raw(format!("{{{tensors}}}"), 0)), "more than 1000000 entries");
    let strings = many(&|at| format!(r#""{at}":"""#));
    assert_says(&reason(raw(format!(r#"{{"__metadata__":{{{strings}}}}}"#), 0)), "more than 1000000 entries");
}

#[test]
fn long_and_hidden_text_is_cut_and_escaped() {
    let name = format!(r"\u001b[31m\n\u202e{}", "x".repeat(1_000_000));
    let text = reason(raw(format!(r#"{{"{name}":{{"dtype":"F32"}}}}"#), 0));
    assert_says(&text, r"tensor `\u{1b}[31m\n\u{202e}xxx");
    let value = format!(r#"{{"t":"{}"}}"#, "x".repeat(1_000_000));
    assert_says(&reason(raw(value, 0)), "tensor `t`: invalid type: string");
}

#[test]
fn what_is_no_checkpoint_at_all_is_told_apart() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
    assert_says(&reason(pointer), "Git LFS pointer");
    assert_says(&reason("\n<!DOCTYPE html><html>"), "web page");
    assert_says(&reason("<html><body>404</body></html>"), "web page");
    assert_says(&reason(b"PK\x03\x04aaaaaaaaaaaaaaaaaa"), "is a pickle by its content");
    assert_says(&reason(b"\x80\x02}q\x00(X\x01\x00\x00\x00"), "is a pickle by its content");
    assert_says(&reason(r#"{"error":"not found"}"#), "is no safetensors file");
}

#[test]
fn what_the_format_allows_is_read() {
    assert_eq!(open(raw("{}", 0)).names().count(), 0);
    assert_eq!(open(raw("{}     ", 0)).names().count(), 0);
    let strings = open(raw(r#"{"__metadata__":{"format":"pt"}}"#, 0));
    assert_eq!(strings.metadata()["format"], "pt");
    let scalar = open(raw(shaped("[]", "[0,4]"), 4));
    assert_eq!((scalar.entry("t").unwrap().shape.len(), scalar.read("t").unwrap()), (0, vec![7; 4]));
    let empty = open(raw(shaped("[0,5]", "[0,0]"), 0));
    assert_eq!(empty.read("t").unwrap(), Vec::<u8>::new());
    let row = |shape, start, end| format!(r#"{{"dtype":"U8","shape":[{shape}],"data_offsets":[{start},{end}]}}"#);
    let between = open(raw(format!(r#"{{"c":{},"b":{},"a":{}}}"#, row(1, 4, 5), row(0, 4, 4), row(4, 0, 4)), 5));
    assert_eq!(between.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    for (name, bytes) in [("BOOL", 1), ("F8_E4M3", 1), ("BF16", 2), ("U32", 4), ("I64", 8)] {
        let one = open(raw(one(&format!(r#"{{"data_offsets":[0,{bytes}],"shape":[1],"dtype":"{name}"}}"#)), bytes));
        let entry = one.entry("t").unwrap();
        assert_eq!((entry.dtype, entry.bytes(), entry.file()), (Dtype::from_name(name).unwrap(), bytes, 0));
        assert_eq!(entry.start(), one.files()[0].header_length());
    }
}

#[test]
fn ranges_stay_within_their_tensor() {
    let checkpoint = open(raw(shaped("[2]", "[0,8]"), 8));
    let mut bytes = [0; 3];
    checkpoint.read_range("t", 5, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 3]);
    for offset in [6, 8, u64::MAX] {
        let message = checkpoint.read_range("t", offset, &mut bytes).unwrap_err().to_string();
        assert_says(&message, "tensor `t` has 8 bytes, not 3 from byte");
    }
    assert_says(&checkpoint.read("u").unwrap_err().to_string(), "has no tensor `u`");
    let header = checkpoint.read_header(0).unwrap();
    assert_eq!(header[8..], shaped("[2]", "[0,8]").into_bytes());
    assert_says(&checkpoint.read_header(1).unwrap_err().to_string(), "has no file number 1");
}

#[test]
fn a_file_that_changes_meanwhile_is_noticed() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let file = raw(shaped("[2]", "[0,8]"), 8);
    write(&path, &file);
    let cut = Checkpoint::open_file(&path).unwrap();
    cut.check_unchanged().unwrap();
    write(&path, &file[..file.len() - 1]);
    assert_says(&cut.read("t").unwrap_err().to_string(), "was cut off while it was read");
    write(&path, &file);
    let grown = Checkpoint::open_file(&path).unwrap();
    write(&path, [&file[..], b"x"].concat());
    assert_says(&grown.read("t").unwrap_err().to_string(), "was changed while it was read");
    assert_says(&grown.check_unchanged().unwrap_err().to_string(), "was changed while it was read");
}
