//! What of the model is merged, in which type and in which files it is written.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Output, Tensor, Tensors, assert_close, read, write};
use safetensors::tensor::Dtype::{BF16, F16, F32, U8};
use serde_json::{Value, json};

fn case() -> Case {
    let mut case = Case::new().model("torch_dtype", json!("float32")).model("text_config", json!({"dtype": "float32"}));
    for (seed, name) in [(10, "m.layers.0.q"), (20, "m.layers.1.q"), (30, "m.layers.10.q"), (40, "m.layers.1.qq")] {
        case = case
            .base(&format!("{name}.weight"), Tensor::new(F32, &[21, 37], seed))
            .with(&format!("{name}.lora_A.weight"), Tensor::new(F32, &[2, 37], seed + 1))
            .with(&format!("{name}.lora_B.weight"), Tensor::new(F32, &[21, 2], seed + 2));
    }
    let case = case.base("m.ids", Tensor::filled(U8, &[3], 5.0)).base("m.norm.weight", Tensor::new(F32, &[6], 6));
    case.save();
    case
}

fn merge(case: &Case, more: &[&str]) -> Output {
    case.run(&[&["base", "adapter", "-o", "out", "--quiet", "--no-sync", "--overwrite"], more].concat())
}

fn merged(case: &Case, more: &[&str]) -> Tensors {
    let output = merge(case, more);
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (0, "", ""));
    read(&case.path("out/model.safetensors"))
}

fn config(case: &Case) -> Value {
    serde_json::from_slice(&std::fs::read(case.path("out/config.json")).unwrap()).unwrap()
}

fn changed(case: &Case, more: &[&str]) -> Vec<String> {
    let after = merged(case, more);
    let same = |name: &&String| after[*name] != case.tensors[*name];
    case.tensors.keys().filter(same).map(|name| name.trim_start_matches("m.layers.").to_owned()).collect()
}

#[test]
fn patterns_name_modules_with_what_is_in_them_and_tensors() {
    let case = case();
    for (more, expected) in [
        (&[][..], &["0.q.weight", "1.q.weight", "1.qq.weight", "10.q.weight"][..]),
        (&["--only", "q"], &["0.q.weight", "1.q.weight", "10.q.weight"]),
        (&["--only", "layers.1"], &["1.q.weight", "1.qq.weight"]),
        (&["--only", "1.q.weight", "--only", r"layers\.\d\d"], &["1.q.weight", "10.q.weight"]),
        (&["--skip", "layers.1"], &["0.q.weight", "10.q.weight"]),
        (&["--only", "q", "--skip", "m.layers.0"], &["1.q.weight", "10.q.weight"]),
    ] {
        assert_eq!(changed(&case, more), expected, "{more:?}");
    }
}

#[test]
fn a_pattern_that_matches_nothing_or_leaves_nothing_is_refused() {
    let case = case();
    for (more, message) in [
        (
            &["--only", "layers.1.qqq"][..],
            "error: --only layers.1.qqq matches no tensor of the model\nhint: the nearest name is layers.1.qq\n",
        ),
        (
            &["--only", "q", "--skip", "zzzzz"],
            "error: --skip zzzzz matches no tensor of the model\nhint: --dry-run lists the tensors that change\n",
        ),
        (
            &["--only", "norm"],
            "error: the adapter changes no tensor of the base\nhint: it holds no weights, train or save it again\n",
        ),
    ] {
        let output = merge(&case, more);
        assert_eq!((output.code, output.stderr.as_str()), (1, message));
        assert!(!case.path("out").exists());
    }
    assert!(merge(&case, &["--only", "("]).stderr.starts_with("error: --only: pattern `(` is malformed"));
}

#[test]
fn floats_are_converted_after_the_sum() {
    let case = case();
    for (name, dtype, config_name) in [("bf16", BF16, "bfloat16"), ("f16", F16, "float16"), ("f32", F32, "float32")] {
        let after = merged(&case, &["--dtype", name]);
        let (up, down) = ("m.layers.0.q.lora_B.weight", "m.layers.0.q.lora_A.weight");
        let weight = &after["m.layers.0.q.weight"];
        assert_eq!(weight.dtype, dtype);
        let half_unit = 2.0_f64.powi(if dtype == BF16 { -9 } else { -12 });
        for (index, value) in weight.values.iter().enumerate() {
            let change = 2.0 * case.product(up, down, index / 37, index % 37);
            let expected = case.tensors["m.layers.0.q.weight"].values[index] + change;
            let most = expected.abs().log2().ceil().exp2() * half_unit;
            assert!((value - expected).abs() <= most + 1e-6, "{value} for {expected}: rounded more than once?");
        }
        assert_eq!(after["m.norm.weight"], case.tensors["m.norm.weight"].to(dtype));
        assert_eq!(after["m.ids"], case.tensors["m.ids"]);
        assert_eq!(config(&case)["torch_dtype"], json!(config_name));
        assert_eq!(config(&case)["text_config"]["dtype"], json!(config_name));
        assert_eq!(config(&case)["architectures"], case.model["architectures"]);
    }
    let wide = Case::new()
        .base("l.q.weight", Tensor::new(BF16, &[21, 37], 1))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 37], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[21, 2], 4));
    wide.save();
    assert_close(&merged(&wide, &["--dtype", "f32"])["l.q.weight"], |index| {
        wide.tensors["l.q.weight"].values[index]
            + 2.0 * wide.product("l.q.lora_B.weight", "l.q.lora_A.weight", index / 37, index % 37)
    });
    assert_eq!(config(&wide)["torch_dtype"], json!("float32"));
}

#[test]
fn a_value_that_the_type_cannot_hold_is_refused() {
    let case = Case::new()
        .base("l.big.weight", Tensor::filled(F32, &[4, 6], 70_000.0))
        .base("l.q.weight", Tensor::new(F32, &[4, 6], 2))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[4, 2], 4));
    case.save();
    let output = merge(&case, &["--dtype", "f16"]);
    assert_eq!(output.code, 1);
    assert!(
        output.stderr.starts_with("error: l.big.weight would not be finite in row 0 of F16\n"),
        "{}",
        output.stderr
    );
    assert!(!case.path("out").exists());
    assert_eq!(merge(&case, &["--dtype", "bf16"]).code, 0);
    assert_eq!(merge(&case, &["--dtype", "q4"]).code, 2);
}

#[test]
fn files_of_a_size_and_their_index() {
    let case = case();
    let whole = merged(&case, &[]);
    for (size, expected) in [("7KB", 2), ("1B", 6), ("1GiB", 1)] {
        std::fs::remove_dir_all(case.path("out")).unwrap();
        assert_eq!(merge(&case, &["--max-shard-size", size]).code, 0);
        let mut names: Vec<String> = std::fs::read_dir(case.path("out"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".safetensors"))
            .collect();
        names.sort();
        let all: Vec<String> =
            (1..=expected).map(|index| format!("model-{index:05}-of-{expected:05}.safetensors")).collect();
        assert_eq!(names, if expected == 1 { vec!["model.safetensors".to_owned()] } else { all });
        let index = std::fs::read(case.path("out/model.safetensors.index.json"));
        assert_eq!(index.is_ok(), expected > 1);
        let mut found = Tensors::new();
        for name in &names {
            let tensors = read(&case.path("out").join(name));
            if let Ok(index) = &index {
                let index: Value = serde_json::from_slice(index).unwrap();
                for tensor in tensors.keys() {
                    assert_eq!(index["weight_map"][tensor], json!(name));
                }
                assert_eq!(index["metadata"]["total_size"], json!(4 * 21 * 37 * 4 + 24 + 3));
            }
            found.extend(tensors);
        }
        assert_eq!(found, whole);
    }
}

#[test]
fn a_sharded_base_is_made_one_file() {
    let case = case();
    let whole = merged(&case, &[]);
    std::fs::remove_file(case.path("base/model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in case.tensors.iter().enumerate() {
        let file = format!("model-{index}.safetensors");
        write(&case.path("base").join(&file), &[(name.clone(), tensor.clone())].into());
        map.insert(name.clone(), Value::from(file));
    }
    let index = json!({"metadata": {"total_size": 60}, "weight_map": map}).to_string();
    std::fs::write(case.path("base/model.safetensors.index.json"), index).unwrap();
    assert_eq!(merged(&case, &["--max-shard-size", "1GB"]), whole);
    assert!(!case.path("out/model.safetensors.index.json").exists());
}
