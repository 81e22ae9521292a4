//! The folder of a model: one file or shards with an index.

use std::path::{Path, PathBuf};

use peftrs_core::checkpoint::{Checkpoint, Links};
use tempfile::{TempDir, tempdir};

use crate::support::{assert_says, refusal, tensors, write};

const INDEX: &str = "model.safetensors.index.json";

fn open(path: &Path) -> peftrs_core::error::Result<Checkpoint> {
    Checkpoint::open_model(path, Links::Confined)
}

/// A folder with shards `one` (a, b) and `two` (c), and this index.
fn sharded(index: &str) -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    write(&folder.path().join("one.safetensors"), tensors(&["a", "b"]));
    write(&folder.path().join("two.safetensors"), tensors(&["c"]));
    let path = folder.path().join(INDEX);
    write(&path, index);
    (folder, path)
}

fn mapped(weight_map: &str) -> String {
    format!(r#"{{"metadata":{{"total_size":6}},"weight_map":{{{weight_map}}}}}"#)
}

#[track_caller]
fn reason(index: &str) -> String {
    let (folder, path) = sharded(index);
    refusal(open(folder.path()), &path)
}

#[test]
fn shards_are_read_as_one() {
    let (folder, index) = sharded(&mapped(r#""c":"two.safetensors","a":"one.safetensors","b":"one.safetensors""#));
    for path in [folder.path(), &index] {
        let checkpoint = open(path).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(
            checkpoint.files().iter().map(|file| &*file.name).collect::<Vec<_>>(),
            ["one.safetensors", "two.safetensors"]
        );
        assert_eq!(checkpoint.entry("c").unwrap().file(), 1);
        assert_eq!(checkpoint.read("c").unwrap(), [7; 2]);
    }
}

#[test]
fn a_tensor_that_the_index_leaves_out_is_not_lost() {
    let (folder, _) = sharded(&mapped(r#""c":"two.safetensors","a":"one.safetensors""#));
    assert!(open(folder.path()).unwrap().entry("b").is_some());
}

#[test]
fn an_index_that_leads_elsewhere_is_refused() {
    for file in [
        "../x.safetensors",
        "/x.safetensors",
        "a/b.safetensors",
        "a\\\\b.safetensors",
        "C:x.safetensors",
        "..",
        ".",
        "",
    ] {
        assert_says(&reason(&mapped(&format!(r#""a":"{file}""#))), "which is not a plain file name");
    }
    assert_says(&reason(&mapped(r#""a":"x\u0000.safetensors""#)), "which is not a plain file name");
    assert_says(&reason(&mapped(r#""a":"pytorch_model.bin""#)), "which is not a .safetensors file");
}

#[test]
fn an_index_that_does_not_agree_with_its_files_is_refused() {
    assert_says(&reason(&mapped(r#""a":"three.safetensors""#)), "asks for three.safetensors, which is not there");
    let elsewhere = reason(&mapped(r#""a":"two.safetensors","b":"one.safetensors","d":"one.safetensors""#));
    assert_says(
        &elsewhere,
        "lists tensors that are not where it says (2): `a` in two.safetensors, `d` in one.safetensors",
    );
    let (folder, _) = sharded(&mapped(r#""a":"one.safetensors","c":"two.safetensors""#));
    write(&folder.path().join("two.safetensors"), tensors(&["c", "a"]));
    let twice = refusal(open(folder.path()), folder.path());
    assert_says(&twice, "tensor `a` occurs twice, in one.safetensors and two.safetensors");
}

#[test]
fn an_index_that_is_malformed_is_refused() {
    assert_says(&reason(""), "is empty");
    assert_says(&reason("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer");
    assert_says(&reason("[]"), "is malformed: invalid type: sequence");
    assert_says(&reason("{}"), "missing field `weight_map`");
    assert_says(&reason(r#"{"weight_map":{},"weight_m\u0061p":{}}"#), "key `weight_map` occurs twice");
    assert_says(&reason(&mapped(r#""a":"one.safetensors","\u0061":"two.safetensors""#)), "key `a` occurs twice");
    assert_says(&reason(&mapped(r#""a":1"#)), "key `a`: invalid type: integer");
    let deep = format!(r#"{{"metadata":{}"#, "[".repeat(100_000));
    assert_says(&reason(&deep), "recursion limit exceeded");
}

#[test]
fn an_index_that_is_too_long_is_not_read() {
    let (folder, index) = sharded("");
    std::fs::File::options().write(true).open(&index).unwrap().set_len((256 << 20) + 1).unwrap();
    assert_says(&refusal(open(folder.path()), &index), "is 268435457 bytes; at most 268435456 are read");
}

#[test]
fn the_one_checkpoint_of_a_folder_is_found() {
    let folder = tempdir().unwrap();
    assert_says(&refusal(open(folder.path()), folder.path()), "holds no safetensors file");
    write(&folder.path().join("pytorch_model.bin"), "");
    assert_says(&refusal(open(folder.path()), folder.path()), "pytorch_model.bin is a pickle");
    let file = folder.path().join("diffusion_pytorch_model.safetensors");
    write(&file, tensors(&["a"]));
    assert_eq!(open(folder.path()).unwrap().path(), file);
    write(&folder.path().join("diffusion_pytorch_model.fp16.safetensors"), tensors(&["a"]));
    let several = refusal(open(folder.path()), folder.path());
    assert_says(&several, "several checkpoints: diffusion_pytorch_model.fp16.safetensors, diff");
    open(&file).unwrap();
    write(&folder.path().join("model.safetensors"), tensors(&["a", "b"]));
    assert_eq!(open(folder.path()).unwrap().names().count(), 2);
}

#[test]
fn a_pickle_given_by_name_is_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    write(&path, tensors(&["a"]));
    assert_says(&refusal(open(&path), &path), "is a pickle, which is never loaded");
}
