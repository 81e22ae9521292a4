//! The command line: exit codes, what goes to which stream, and what happens to folders.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor, read, write};
use safetensors::tensor::Dtype::{BF16, F32};
use serde_json::{Value, json};

fn case() -> Case {
    let case = Case::new()
        .base("l.q.weight", Tensor::new(BF16, &[4, 6], 1))
        .base("l.norm.weight", Tensor::new(BF16, &[6], 2))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[4, 2], 4));
    case.save();
    case
}

#[test]
fn usage() {
    let case = case();
    let version = case.run(&["--version"]);
    assert_eq!((version.code, version.stderr.as_str()), (0, ""));
    assert_eq!(version.stdout, format!("peftrs-merge {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(case.run(&["--help"]).code, 0);
    for wrong in [&["base"][..], &["base", "adapter"], &["base", "adapter", "-o", "out", "--json"], &["-x"]] {
        let output = case.run(wrong);
        assert_eq!((output.code, output.stdout.as_str()), (2, ""), "{wrong:?}");
        assert!(output.stderr.starts_with("error: "), "{}", output.stderr);
    }
}

#[test]
fn the_plan_as_a_table_and_as_json() {
    let case = case();
    let output = case.run(&["base", "adapter", "--dry-run"]);
    let expected = "l.q.weight  BF16  [4, 6]  LoRA rank 2, scaling 2\n1 of 2 tensors changed, 60 B to write\n";
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (0, expected, ""));
    let output = case.run(&["base", "adapter", "--dry-run", "--json"]);
    let plan: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(
        plan,
        json!({
            "files": [{
                "name": "model.safetensors",
                "tensors": 2,
                "changed": [
                    {"name": "l.q.weight", "dtype": "BF16", "shape": [4, 6], "change": "LoRA rank 2, scaling 2"},
                ],
            }],
            "bytes": 60,
            "config": null,
            "notes": [],
        })
    );
    assert!(!case.path("out").exists());
}

#[test]
fn a_merge_reports_to_standard_error() {
    let case = case();
    let output = case.run(&["base", "adapter", "-o", "out", "--threads", "2"]);
    assert_eq!((output.code, output.stdout.as_str()), (0, ""));
    assert!(output.stderr.starts_with("merged into out: 1 of 2 tensors changed, 60 B in "), "{}", output.stderr);
    assert_eq!(output.stderr.lines().count(), 1);
}

#[test]
fn the_output_is_replaced_only_if_a_merge_wrote_it() {
    let case = case();
    let merge = |more: &[&str]| case.run(&[&["base", "adapter", "-o", "out", "--quiet"], more].concat());
    assert_eq!(merge(&[]).code, 0);
    let again = merge(&[]);
    assert_eq!(again.code, 1);
    assert!(again.stderr.contains("exists and is not empty"), "{}", again.stderr);
    assert_eq!(merge(&["--overwrite"]).code, 0);
    std::fs::remove_file(case.path("out/peftrs-merge.json")).unwrap();
    assert_eq!(merge(&["--overwrite"]).code, 1);
    assert!(case.path("out/model.safetensors").exists());
}

#[test]
fn the_inputs_are_never_the_output() {
    let case = case();
    for out in ["base", "adapter", "base/merged", "."] {
        let output = case.run(&["base", "adapter", "-o", out, "--overwrite"]);
        assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{out}");
        assert!(output.stderr.starts_with("error: the output "), "{}", output.stderr);
    }
    assert_eq!(read(&case.path("base/model.safetensors")), case.tensors);
}

#[test]
fn other_files_come_along_and_stale_weights_do_not() {
    let case = case();
    let place = |name: &str| std::fs::write(case.path("base").join(name), name).unwrap();
    std::fs::create_dir(case.path("base/1_Pooling")).unwrap();
    for name in ["tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", "README.md", ".gitattributes"] {
        place(name);
    }
    assert_eq!(case.run(&["base", "adapter", "-o", "out", "--quiet"]).code, 0);
    let text = |name: &str| std::fs::read_to_string(case.path("out").join(name)).unwrap();
    assert_eq!(text("tokenizer.json"), "tokenizer.json");
    assert_eq!(text("1_Pooling/config.json"), "1_Pooling/config.json");
    assert_eq!(text("config.json"), case.model.to_string());
    assert!(text("README.md").contains("# base with adapter merged in"));
    let record: Value = serde_json::from_str(&text("peftrs-merge.json")).unwrap();
    assert_eq!(record["adapters"][0]["scalings"], json!([2.0]));
    let (adapter, file) = (&record["adapters"][0], &record["base"]["files"][0]);
    for hash in [&adapter["weights_sha256"], &adapter["config_sha256"], &file["header_sha256"], &file["sampled_sha256"]]
    {
        let hash = hash.as_str().unwrap();
        assert!(hash.len() == 64 && text("README.md").contains(hash), "{hash}");
    }
    assert!(text("README.md").contains(&format!("by peftrs-merge {}", env!("CARGO_PKG_VERSION"))));
    let change = "LoRA rank 2, scaling 2";
    assert_eq!(record["changed"], json!([{"tensor": "l.q.weight", "change": change, "moved": 1.0}]));
    assert!(!case.path("out/pytorch_model.bin").exists() && !case.path("out/.gitattributes").exists());
}

#[test]
fn a_sharded_base_keeps_its_shards() {
    let case = case();
    std::fs::remove_file(case.path("base/model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in case.tensors.iter().enumerate() {
        let file = format!("model-{index}.safetensors");
        write(&case.path("base").join(&file), &[(name.clone(), tensor.clone())].into());
        map.insert(name.clone(), Value::from(file));
    }
    let index = json!({"metadata": {"total_size": 60}, "weight_map": map}).to_string();
    std::fs::write(case.path("base/model.safetensors.index.json"), &index).unwrap();
    assert_eq!(case.run(&["base", "adapter", "-o", "out", "--quiet"]).code, 0);
    let bytes = |folder: &str, name: &str| std::fs::read(case.path(folder).join(name)).unwrap();
    assert_eq!(bytes("out", "model.safetensors.index.json"), index.as_bytes());
    assert_eq!(bytes("out", "model-0.safetensors"), bytes("base", "model-0.safetensors"));
    assert_ne!(bytes("out", "model-1.safetensors"), bytes("base", "model-1.safetensors"));

    let head = case.set("modules_to_save", json!(["score"])).with("score.weight", Tensor::new(F32, &[2, 3], 9));
    head.save_adapter();
    assert_eq!(head.run(&["base", "adapter", "-o", "out", "--quiet", "--overwrite"]).code, 0);
    let index: Value =
        serde_json::from_slice(&std::fs::read(head.path("out/model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["weight_map"]["score.weight"], "model-1.safetensors");
    assert_eq!(index["metadata"]["total_size"], 84);
    assert_eq!(&read(&head.path("out/model-1.safetensors"))["score.weight"], head.factor("score.weight"));
}

#[test]
fn one_thread_and_many_write_the_same_bytes() {
    let case = Case::new()
        .base("l.q.weight", Tensor::new(BF16, &[700, 900], 1))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 900], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[700, 2], 4));
    case.save();
    for threads in ["1", "3"] {
        let out = format!("out{threads}");
        assert_eq!(case.run(&["base", "adapter", "-o", &out, "--quiet", "--threads", threads]).code, 0);
    }
    let bytes = |folder: &str| std::fs::read(case.path(folder).join("model.safetensors")).unwrap();
    assert_eq!(bytes("out1"), bytes("out3"));
}

#[test]
fn a_check_is_reported_and_recorded() {
    let case = case();
    let output = case.run(&["base", "adapter", "-o", "out", "--check"]);
    let what = "4 rows made again in float64: 0 of 24 values off by one unit in the last place, none by more; \
                tensors bit-identical to their source: 1";
    assert_eq!(output.code, 0);
    assert!(output.stderr.starts_with(&format!("checked: {what}\nmerged into out: ")), "{}", output.stderr);
    assert!(std::fs::read_to_string(case.path("out/README.md")).unwrap().contains(&format!("\nChecked: {what}.\n")));
    let record: Value = serde_json::from_slice(&std::fs::read(case.path("out/peftrs-merge.json")).unwrap()).unwrap();
    assert_eq!(record["check"], json!({"rows": 4, "values": 24, "off_by_one": 0, "copied": 1, "what": what}));
}

#[test]
fn a_change_too_small_for_the_type_is_told() {
    let small = |value| case().with("l.q.lora_B.weight", Tensor::filled(F32, &[4, 2], value));
    for (case, more, told) in [
        (small(0.0), &[][..], true),
        (small(1e-6), &[], true),
        (small(1e-6), &["--dtype", "f32"], false),
        (small(0.5), &[], false),
        (small(1e-6).base("l.q.weight", Tensor::new(F32, &[4, 6], 1)), &[], false),
    ] {
        case.save();
        let output = case.run(&[&["base", "adapter", "-o", "out"], more].concat());
        let note = "note: in 1 of 1 tensors most weights stayed as they were: what the adapter adds is nothing, or less than \
                    half a step of their type, which --dtype f32 holds\n";
        assert_eq!(output.stderr.starts_with(note), told, "{}", output.stderr);
        assert_eq!(std::fs::read_to_string(case.path("out/README.md")).unwrap().contains("most weights stayed"), told);
        let record: Value =
            serde_json::from_slice(&std::fs::read(case.path("out/peftrs-merge.json")).unwrap()).unwrap();
        let [before, after] = ["base", "out"].map(|folder| read(&case.path(folder).join("model.safetensors")));
        let [before, after] = [before, after].map(|tensors| tensors["l.q.weight"].values.clone());
        let moved = before.iter().zip(&after).filter(|(before, after)| before.to_bits() != after.to_bits()).count();
        let share = f64::from(u32::try_from(moved).unwrap()) / 24.0;
        assert_eq!(record["changed"][0]["moved"], if more.is_empty() { json!(share) } else { Value::Null });
    }
}

/// Moves the files of a folder into a Hub's cache, as links to blobs, and returns the snapshot.
#[cfg(unix)]
fn cached(case: &Case, folder: &str) -> String {
    let repository = format!("hub/models--org--{folder}");
    let snapshot = format!("{repository}/snapshots/0123456789abcdef");
    std::fs::create_dir_all(case.path(&snapshot)).unwrap();
    std::fs::create_dir_all(case.path(&repository).join("blobs")).unwrap();
    for (index, entry) in std::fs::read_dir(case.path(folder)).unwrap().map(Result::unwrap).enumerate() {
        std::fs::rename(entry.path(), case.path(&repository).join(format!("blobs/{index}"))).unwrap();
        let target = format!("../../blobs/{index}");
        std::os::unix::fs::symlink(target, case.path(&snapshot).join(entry.file_name())).unwrap();
    }
    std::fs::remove_dir(case.path(folder)).unwrap();
    snapshot
}

#[test]
#[cfg(unix)]
fn links_of_the_hubs_cache_are_read_and_plain_files_written() {
    let case = case();
    std::fs::write(case.path("base/tokenizer.json"), "words").unwrap();
    assert_eq!(case.run(&["base", "adapter", "-o", "plain", "--quiet"]).code, 0);
    let (base, adapter) = (cached(&case, "base"), cached(&case, "adapter"));
    let output = case.run(&[&base, &adapter, "-o", "out", "--quiet"]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let path = case.path("out").join(name);
        assert!(std::fs::symlink_metadata(&path).unwrap().is_file(), "{name}");
        assert_eq!(std::fs::read(path).unwrap(), std::fs::read(case.path("plain").join(name)).unwrap(), "{name}");
    }
    let readme = std::fs::read_to_string(case.path("out/README.md")).unwrap();
    assert!(readme.contains("# org/base@0123456789abcdef with org/adapter@0123456789abcdef merged in"), "{readme}");
    // A link to elsewhere is no such link.
    let weights = case.path(&base).join("model.safetensors");
    let elsewhere = case.path("elsewhere");
    std::fs::rename(weights.canonicalize().unwrap(), &elsewhere).unwrap();
    std::fs::remove_file(&weights).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &weights).unwrap();
    let output = case.run(&[&base, &adapter, "-o", "more"]);
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("is a link that leaves the folder\nhint: "), "{}", output.stderr);
    assert_eq!(case.run(&[&base, &adapter, "-o", "more", "--follow-links"]).code, 0);
}

#[test]
#[cfg(unix)]
fn every_refusal_is_one_line_and_a_hint() {
    use std::os::unix::fs::PermissionsExt;
    let case = case();
    std::fs::create_dir_all(case.path("empty")).unwrap();
    std::fs::create_dir_all(case.path("pickled")).unwrap();
    std::fs::write(case.path("pickled/pytorch_model.bin"), "x").unwrap();
    std::fs::create_dir_all(case.path("pointer")).unwrap();
    std::fs::write(case.path("pointer/model.safetensors"), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    std::fs::create_dir_all(case.path("full")).unwrap();
    std::fs::write(case.path("full/letter"), "x").unwrap();
    std::fs::create_dir_all(case.path("two")).unwrap();
    for name in ["a.safetensors", "b.safetensors"] {
        std::fs::copy(case.path("base/model.safetensors"), case.path("two").join(name)).unwrap();
    }
    std::fs::create_dir_all(case.path("cut")).unwrap();
    let bytes = std::fs::read(case.path("base/model.safetensors")).unwrap();
    std::fs::write(case.path("cut/model.safetensors"), &bytes[..bytes.len() - 5]).unwrap();
    std::fs::create_dir_all(case.path("locked")).unwrap();
    std::fs::set_permissions(case.path("locked"), std::fs::Permissions::from_mode(0o500)).unwrap();
    let root = std::fs::create_dir(case.path("locked/try")).is_ok();
    for (base, adapter, more, said) in [
        ("org/model", "adapter", &["-o", "out"][..], "org/model: cannot open: "),
        ("base", "org/adapter", &["-o", "out"], "org/adapter: cannot open: "),
        ("base", "base", &["-o", "out"], "base: holds no adapter_config.json"),
        ("adapter", "adapter", &["-o", "out"], "adapter modules have no home in the base: l.q"),
        ("empty", "adapter", &["-o", "out"], "empty: holds no safetensors file"),
        ("pickled", "adapter", &["-o", "out"], "pytorch_model.bin is a pickle, which is never loaded"),
        ("pointer", "adapter", &["-o", "out"], "is a Git LFS pointer, not the file itself"),
        ("two", "adapter", &["-o", "out"], "two: holds several checkpoints: a.safetensors, b.safetensors"),
        ("cut", "adapter", &["-o", "out"], "cut/model.safetensors: the file is cut off: "),
        ("base", "adapter", &["-o", "base"], "the output base is the base base"),
        ("base", "adapter", &["-o", "full"], "full: exists and is not empty"),
        ("base", "adapter", &["-o", "full", "--overwrite"], "full: is not overwritten: it holds no peftrs-merge.json"),
        ("base", "adapter", &["-o", "full/letter"], "full/letter: exists and is not a folder"),
        ("base", "adapter", &["-o", "locked/out"], "Permission denied"),
        ("base", "adapter", &["-o", "out", "--only", "qq"], "--only qq matches no tensor of the model"),
        ("base", "adapter", &["-o", "out", "--unmerge", "--base", "base"], "was not merged by peftrs"),
    ] {
        if root && said == "Permission denied" {
            continue;
        }
        let output = case.run(&[&[base, adapter], more].concat());
        let lines: Vec<&str> = output.stderr.lines().collect();
        assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{said}");
        assert!(
            matches!(lines[..], [error, hint] if error.starts_with("error: ") && error.contains(said) && hint.starts_with("hint: ")),
            "{}",
            output.stderr
        );
        assert!(!case.path("out").exists());
    }
}
