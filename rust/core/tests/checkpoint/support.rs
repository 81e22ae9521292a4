//! Files made by hand, and what every error has to keep to.

use std::path::Path;

use peftrs_core::checkpoint::Checkpoint;
use peftrs_core::error::Result;

/// A file with this header and that many bytes of data.
pub fn raw(json: impl AsRef<[u8]>, data_length: usize) -> Vec<u8> {
    let json = json.as_ref();
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json);
    bytes.resize(bytes.len() + data_length, 7);
    bytes
}

/// A file of one-byte-wide tensors with these names, two bytes each.
pub fn tensors(names: &[&str]) -> Vec<u8> {
    let rows: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            format!(r#""{name}":{{"dtype":"F16","shape":[1],"data_offsets":[{},{}]}}"#, at * 2, at * 2 + 2)
        })
        .collect();
    raw(format!("{{{}}}", rows.join(",")), names.len() * 2)
}

pub fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// The error's text: one line without control characters that names the file and stays short apart from its path.
#[track_caller]
pub fn refusal(result: Result<Checkpoint>, file: &Path) -> String {
    let message = result.expect_err("this has to be refused").to_string();
    let start = format!("{}: ", file.display());
    let reason = message.strip_prefix(&start).unwrap_or_else(|| panic!("`{message}` does not name {start}"));
    assert!(reason.chars().count() <= 300, "too long: {message}");
    assert!(!message.chars().any(char::is_control), "control characters: {message:?}");
    reason.to_owned()
}

#[track_caller]
pub fn assert_says(reason: &str, wanted: &str) {
    assert!(reason.contains(wanted), "`{reason}` does not say `{wanted}`");
}
