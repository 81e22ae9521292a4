//! A folder that appears at once.

use std::path::Path;

use peftrs_core::error::{Error, Result};
use peftrs_core::writer::{Disk, FolderWriter, MARKER};
use tempfile::tempdir;

use crate::support::names;

fn merge(out: &Path, text: &str, overwrite: bool) -> Result<()> {
    let writer = FolderWriter::create(&Disk, out, overwrite)?;
    writer.write("config.json", text.as_bytes())?;
    writer.finish(true)
}

fn config(out: &Path) -> String {
    std::fs::read_to_string(out.join("config.json")).unwrap()
}

#[track_caller]
fn refusal(result: Result<()>, wanted: &str) {
    match result.expect_err("this has to be refused") {
        Error::Merge(message) => assert!(message.contains(wanted), "{message}"),
        other => panic!("{other}"),
    }
}

#[test]
fn everything_appears_at_the_end() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("new/out");
    let writer = FolderWriter::create(&Disk, &out, false).unwrap();
    writer.write("config.json", b"{}").unwrap();
    writer.write("1_Pooling/config.json", b"[]").unwrap();
    let file = writer.create_file("model.safetensors", 10).unwrap();
    file.write_at(b"world", 5).unwrap();
    file.write_at(b"hello", 0).unwrap();
    assert!(!out.exists() && writer.path().parent() == out.parent());
    writer.finish(true).unwrap();
    assert_eq!(names(&out), ["1_Pooling", "config.json", "model.safetensors", MARKER]);
    assert_eq!(std::fs::read(out.join("model.safetensors")).unwrap(), b"helloworld");
    assert_eq!(names(&folder.path().join("new")), ["out"]);
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let folder = tempdir().unwrap();
    let writer = FolderWriter::create(&Disk, &folder.path().join("new/out"), false).unwrap();
    writer.write("deep/config.json", b"{}").unwrap();
    drop(writer);
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

#[test]
fn only_what_a_merge_wrote_is_overwritten() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    merge(&out, "first", false).unwrap();
    refusal(merge(&out, "second", false), "exists and is not empty");
    assert_eq!(config(&out), "first");
    std::fs::write(out.join("old"), "").unwrap();
    merge(&out, "second", true).unwrap();
    assert_eq!((config(&out).as_str(), names(&out).len()), ("second", 2));
    std::fs::remove_file(out.join(MARKER)).unwrap();
    refusal(merge(&out, "third", true), "so no merge of ours wrote it");
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    refusal(merge(&file, "third", true), "exists and is not a folder");
    assert_eq!(config(&out), "second");
    assert_eq!(names(folder.path()), ["file", "out"]);
}

#[test]
fn what_appears_meanwhile_is_not_replaced() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let writer = FolderWriter::create(&Disk, &out, false).unwrap();
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), "").unwrap();
    refusal(writer.finish(false), "exists and is not empty");
    assert_eq!((names(&out), names(folder.path())), (vec!["mine".to_owned()], vec!["out".to_owned()]));
}

#[test]
fn a_file_that_does_not_fit_the_disk_is_refused_when_it_is_made() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let writer = FolderWriter::create(&Disk, &out, false).unwrap();
    let error = writer.create_file("model.safetensors", 1 << 62).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: cannot write: ", out.join("model.safetensors").display())), "{error}");
}

#[test]
fn names_stay_within_the_folder_and_are_not_taken_twice() {
    let folder = tempdir().unwrap();
    let writer = FolderWriter::create(&Disk, &folder.path().join("out"), false).unwrap();
    for name in ["", "..", "../x", "a/../../x", "/x", "a//b", "a/", "a\\b"] {
        refusal(writer.write(name, b""), "which is not a plain file name");
    }
    writer.write("a", b"").unwrap();
    assert!(matches!(writer.write("a", b""), Err(Error::Storage { .. })));
    refusal(FolderWriter::create(&Disk, Path::new("/"), false).map(drop), "it has no name of its own");
}
