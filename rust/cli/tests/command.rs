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
    assert_eq!(record["changed"], json!([{"tensor": "l.q.weight", "change": "LoRA rank 2, scaling 2"}]));
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
