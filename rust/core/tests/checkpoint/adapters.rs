//! The folder of an adapter.

use std::path::Path;

use peftrs_core::checkpoint::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Links};
use peftrs_core::dtype::Dtype;
use peftrs_core::error::Error;
use peftrs_core::writer::{Disk, Tensor, write_adapter};
use tempfile::tempdir;

use crate::support::{assert_says, raw, refusal, tensors, write};

fn open(folder: &Path) -> peftrs_core::error::Result<Checkpoint> {
    Checkpoint::open_adapter(folder, Links::Confined)
}

#[test]
fn a_missing_folder_is_the_systems_error() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("none");
    let error = open(&path).unwrap_err();
    assert!(matches!(&error, Error::Storage { source, .. } if source.kind() == std::io::ErrorKind::NotFound));
    let file = folder.path().join("file");
    write(&file, "");
    assert_says(&refusal(open(&file), &file), "is not a folder");
}

#[test]
fn missing_weights_are_not_replaced_by_a_pickle() {
    let folder = tempdir().unwrap();
    assert_says(&refusal(open(folder.path()), folder.path()), "holds no adapter_model.safetensors");
    write(&folder.path().join("training_args.bin"), "\u{80}");
    write(&folder.path().join("adapter_model.bin"), "PK\u{3}\u{4}");
    let reason = refusal(open(folder.path()), folder.path());
    assert_says(&reason, "adapter_model.bin is a pickle, which is never loaded; hint: convert it once, by");
    assert_says(&reason, "torch.load(\"adapter_model.bin\", weights_only=True), \"adapter_model.safetensors\")");
}

#[test]
fn types_that_adapters_do_not_have_are_named_together() {
    let folder = tempdir().unwrap();
    let path = folder.path().join(ADAPTER_WEIGHTS);
    let row = |name: &str, dtype: &str, start: usize, end: usize| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[1],"data_offsets":[{start},{end}]}}"#)
    };
    let file = |rows: &[String], length| raw(format!("{{{}}}", rows.join(",")), length);
    write(&path, file(&[row("a", "I8", 0, 1), row("b", "F16", 1, 3), row("c", "F8_E4M3", 3, 4)], 4));
    let reason = refusal(open(folder.path()), &path);
    assert_says(&reason, "holds 2 tensors of a type that adapter weights do not have");
    assert_says(&reason, "`a` I8, `c` F8_E4M3");
    write(&path, file(&[row("a", "BOOL", 0, 1)], 1));
    assert_says(&refusal(open(folder.path()), &path), "holds a tensor of a type");
    let indices = [row("a", "I64", 0, 8), row("b", "I32", 8, 12), row("c", "I16", 12, 14), row("d", "U8", 14, 15)];
    write(&path, file(&indices, 15));
    assert_eq!(open(folder.path()).unwrap().entry("c").unwrap().dtype, Dtype::I16);
}

#[test]
fn tensors_without_elements_are_read() {
    let folder = tempdir().unwrap();
    let path = folder.path().join(ADAPTER_WEIGHTS);
    write(&path, raw(r#"{"a":{"dtype":"F32","shape":[0,8],"data_offsets":[0,0]}}"#, 0));
    let read = open(folder.path()).unwrap();
    assert_eq!(read.entry("a").unwrap().shape, [0, 8]);
    assert!(read.read("a").unwrap().is_empty());
}

#[cfg(unix)]
#[test]
fn weights_that_are_no_regular_file_are_refused_at_once() {
    let folder = tempdir().unwrap();
    let path = folder.path().join(ADAPTER_WEIGHTS);
    let make = |kind, mode: u32| rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode.into(), 0).unwrap();
    make(rustix::fs::FileType::Fifo, 0o644);
    for links in [Links::Confined, Links::Follow] {
        // Opening a pipe without a writer would wait for one.
        assert_says(&refusal(Checkpoint::open_adapter(folder.path(), links), &path), "is not a regular file");
    }
    std::fs::remove_file(&path).unwrap();
    make(rustix::fs::FileType::Socket, 0o644);
    assert_says(&refusal(open(folder.path()), &path), "is not a regular file");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_says(&refusal(open(folder.path()), &path), "is a folder, not a file");
}

#[test]
fn a_save_cut_short_between_its_renames_is_noticed() {
    let folder = tempdir().unwrap();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    let tensor = |data| Tensor { name: "a", dtype: Dtype::F16, shape: &[1], data };
    write_adapter(&Disk, &old, "{\"r\": 1}", &[tensor(b"11")], &[], &[], false).unwrap();
    write_adapter(&Disk, &new, "{\"r\": 2}", &[tensor(b"22")], &[], &[], false).unwrap();
    std::fs::copy(new.join(ADAPTER_WEIGHTS), old.join(ADAPTER_WEIGHTS)).unwrap();
    let left = old.join(format!("{ADAPTER_CONFIG}.tmp-0123456789abcdef"));
    std::fs::copy(new.join(ADAPTER_CONFIG), &left).unwrap();
    let reason = refusal(open(&old), &old);
    assert_says(&reason, "the weights of a save that was cut short");
    assert_says(&reason, "rename adapter_config.json.tmp-0123456789abcdef to adapter_config.json");
    std::fs::rename(&left, old.join(ADAPTER_CONFIG)).unwrap();
    assert_eq!(open(&old).unwrap().read("a").unwrap(), b"22");
    // A config edited by hand is no such thing.
    write(&old.join(ADAPTER_CONFIG), "{\"r\": 3}");
    open(&old).unwrap();
}

#[test]
fn many_tensors_are_found_by_name() {
    let folder = tempdir().unwrap();
    let names: Vec<String> = (0..500).map(|at| format!("layer.{}.x", at * 7 % 500)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    write(&folder.path().join(ADAPTER_WEIGHTS), tensors(&names));
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), names);
    for (at, name) in names.iter().enumerate() {
        let entry = checkpoint.entry(name).unwrap();
        assert_eq!(entry.start() - checkpoint.files()[0].header_length(), at as u64 * 2);
    }
    assert!(checkpoint.entry("layer.500.x").is_none());
}
