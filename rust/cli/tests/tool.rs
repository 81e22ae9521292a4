//! `peftrs inspect`, `diff` and `targets`: what they say, to whom, and with which exit code.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor};
use safetensors::tensor::Dtype::{BF16, F32, U8};
use serde_json::{Value, json};

/// Two layers of which both queries are adapted, an embedding and norms.
fn case() -> Case {
    let mut case = Case::new()
        .base("embed_tokens.weight", Tensor::new(BF16, &[11, 6], 1))
        .base("norm.weight", Tensor::new(BF16, &[6], 2))
        .model("tie_word_embeddings", json!(true));
    for layer in 0..2 {
        let at = |leaf: &str| format!("layers.{layer}.{leaf}");
        let seed = 10 * (layer + 1);
        case = case
            .base(&at("q.weight"), Tensor::new(BF16, &[4, 6], seed))
            .base(&at("k.weight"), Tensor::new(BF16, &[4, 6], seed + 1))
            .base(&at("k.bias"), Tensor::new(BF16, &[4], seed + 2))
            .with(&at("q.lora_A.weight"), Tensor::new(F32, &[2, 6], seed + 3))
            .with(&at("q.lora_B.weight"), Tensor::new(F32, &[4, 2], seed + 4));
    }
    case.save();
    case
}

fn report(case: &Case, arguments: &[&str]) -> Value {
    let output = case.tool(&[arguments, &["--json"]].concat());
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    serde_json::from_str(&output.stdout).unwrap()
}

#[test]
fn usage() {
    let case = case();
    assert_eq!(case.tool(&["--version"]).stdout, format!("peftrs {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(case.tool(&["--help"]).code, 0);
    for wrong in [&[][..], &["inspect"], &["diff", "base"], &["targets", "base", "--rank", "0"], &["merge"]] {
        let output = case.tool(wrong);
        assert_eq!((output.code, output.stdout.as_str()), (2, ""), "{wrong:?}");
    }
    for command in ["inspect", "targets"] {
        let output = case.tool(&[command, "nowhere"]);
        assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{command}");
        assert!(output.stderr.starts_with("error: nowhere"), "{}", output.stderr);
    }
    let mixed = case.tool(&["diff", "base", "adapter"]);
    assert_eq!((mixed.code, mixed.stdout.as_str()), (1, ""));
    assert!(mixed.stderr.starts_with("error: adapter is an adapter and base a model\nhint: "), "{}", mixed.stderr);
}

#[test]
fn an_adapter_by_its_header() {
    let case = case().set("base_model_name_or_path", json!("org/model")).set("use_rslora", json!(true));
    case.save_adapter();
    let bytes = std::fs::metadata(case.path("adapter/adapter_model.safetensors")).unwrap().len();
    let expected = "\
adapter: adapter, LORA
base model: org/model
rank 2, alpha 4, scaling 2.8284
targets: q
with rsLoRA
4 tensors in 2 modules, 40 parameters, BYTES B, F32

leaf  modules  rank  scaling  in -> out  parameters
q           2     2   2.8284     6 -> 4          40
";
    let output = case.tool(&["inspect", "adapter"]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    assert_eq!(output.stdout, expected.replace("BYTES", &bytes.to_string()));
    let found = report(&case, &["inspect", "adapter/adapter_model.safetensors"]);
    assert_eq!(found["kind"], "adapter");
    assert_eq!(
        found["leaves"][0],
        json!({
            "name": "q", "modules": 2, "rank": 2, "scaling": 4.0 / 2.0_f64.sqrt(), "in": 6, "out": 4, "experts": null,
            "whole": false, "parameters": 40,
        })
    );
    assert_eq!(
        (&found["targets"], &found["dtypes"], &found["norms"]),
        (&json!(["q"]), &json!({"F32": 4}), &Value::Null)
    );
}

#[test]
fn an_adapters_faults_are_told() {
    let case = case()
        .set("target_modules", json!(["q", "absent"]))
        .set("rank_pattern", json!({"layers.1.q": 1}))
        .with("layers.1.k.lora_A.weight", Tensor::new(F32, &[2, 6], 1))
        .with("layers.0.k.lora_A.weight", Tensor::new(BF16, &[2, 6], 1))
        .with("layers.0.k.lora_B.weight", Tensor::filled(F32, &[4, 2], f64::NAN));
    case.save_adapter();
    let all = [
        "1 modules have factors of another rank than the config gives: layers.1.q 2 (config 1)",
        "1 modules lack a factor, or have factors that do not fit each other: layers.1.k",
        "1 entries of target_modules have no tensor in the file: absent",
        "tensors have several types: BF16, F32",
    ];
    assert_eq!(report(&case, &["inspect", "adapter"])["warnings"], json!(all));
    let found = report(&case, &["inspect", "adapter", "--norms"]);
    let warning = found["warnings"][4].as_str().unwrap();
    assert!(warning.starts_with("1 tensors hold infinities or NaN: "), "{warning}");
    assert!(found["norms"]["updates"].as_array().unwrap().iter().any(|row| row["update"].is_null()));
    let case = case.with("layers.0.k.lora_B.weight", Tensor::filled(F32, &[4, 2], 0.0));
    case.save_adapter();
    assert_eq!(
        report(&case, &["inspect", "adapter", "--norms"])["warnings"][4],
        "1 of 3 updates are zero: never trained"
    );
}

#[test]
fn norms_are_those_of_the_dense_update() {
    let case = case();
    let found = report(&case, &["inspect", "adapter", "--norms"]);
    for (layer, row) in found["norms"]["updates"].as_array().unwrap().iter().enumerate() {
        let (up, down) = (format!("layers.{layer}.q.lora_B.weight"), format!("layers.{layer}.q.lora_A.weight"));
        let dense: f64 =
            (0..24).map(|index| (2.0 * case.product(&up, &down, index / 6, index % 6)).powi(2)).sum::<f64>().sqrt();
        assert!((row["update"].as_f64().unwrap() - dense).abs() < 1e-12 * dense);
        let [largest, effective] = ["largest_singular_value", "effective_rank"].map(|name| row[name].as_f64().unwrap());
        assert!(largest <= dense && dense <= largest * 2.0_f64.sqrt() && (1.0..=2.0).contains(&effective));
    }
}

#[test]
fn a_checkpoint_by_its_headers() {
    let case = case();
    let found = report(&case, &["inspect", "base"]);
    assert_eq!(
        (&found["kind"], &found["tensors"], &found["blocks"]),
        (&json!("checkpoint"), &json!(8), &json!({"layers": 2}))
    );
    assert_eq!(found["dtypes"], json!({"BF16": {"tensors": 8, "parameters": 176, "bytes": 352}}));
    assert_eq!(
        found["largest"][0],
        json!({"name": "embed_tokens.weight", "dtype": "BF16", "shape": [11, 6], "bytes": 132})
    );
    assert_eq!((&found["merged"], &found["quantized"], &found["warnings"]), (&Value::Null, &Value::Null, &json!([])));
    assert_eq!(case.run(&["base", "adapter", "-o", "out", "--quiet"]).code, 0);
    let merged = report(&case, &["inspect", "out", "--norms"]);
    let what = format!("base with adapter, by peftrs-merge {}", env!("CARGO_PKG_VERSION"));
    assert_eq!(merged["merged"]["what"], what);
    assert_eq!(merged["norms"].as_array().unwrap().len(), 8);
    std::fs::write(case.path("out/adapter_config.json"), case.config.to_string()).unwrap();
    let case = case.model("quantization_config", json!({"quant_method": "gptq"}));
    std::fs::write(case.path("out/config.json"), case.model.to_string()).unwrap();
    let found = report(&case, &["inspect", "out"]);
    assert_eq!((&found["quantized"], found["warnings"].as_array().unwrap().len()), (&json!("gptq"), 2));
    let text = case.tool(&["inspect", "out"]).stdout;
    assert!(
        text.contains("quantized by gptq\n") && text.contains("\nwarning: adapter_config.json lies beside"),
        "{text}"
    );
}

#[test]
fn two_adapters_by_their_factors() {
    let case = case();
    let same = report(&case, &["diff", "adapter", "adapter"]);
    assert_eq!((&same["identical"], &same["config"]), (&json!(2), &json!([])));
    let copy = |name: &str, case: &Case| {
        std::fs::rename(case.path("adapter"), case.path(name)).unwrap();
        case.save();
    };
    copy("first", &case);
    // The same updates written otherwise: the factors doubled and halved, the queries' rows of A turned.
    let mut case = case.set("lora_alpha", json!(8));
    for (key, tensor) in &mut case.adapter {
        if key.ends_with("lora_B.weight") {
            tensor.values.iter_mut().for_each(|value| *value *= 0.5);
        }
    }
    case.save_adapter();
    let found = report(&case, &["diff", "first", "adapter"]);
    for row in found["rows"].as_array().unwrap() {
        assert_eq!((&row["what"], &row["identical"]), (&json!("update"), &json!(false)));
        let [left, right, distance, cosine] =
            ["left", "right", "distance", "cosine"].map(|name| row[name].as_f64().unwrap());
        assert!((left - right).abs() < 1e-12 * left && distance < 1e-7 * left && 1.0 - cosine < 1e-12, "{row}");
        assert!(row["down_distance"] == 0.0 && row["up_distance"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert_eq!(found["config"], json!([{"field": "lora_alpha", "left": 4, "right": 8}]));
    // Another update, and one that only the first has.
    let case = case.with("layers.0.q.lora_B.weight", Tensor::new(F32, &[4, 2], 99));
    let mut case = case;
    case.adapter.retain(|key, _| !key.contains("layers.1"));
    case.save_adapter();
    let found = report(&case, &["diff", "first", "adapter"]);
    let cosine = found["rows"][0]["cosine"].as_f64().unwrap();
    assert!(cosine.abs() < 0.999, "{cosine}");
    assert_eq!(found["rows"][1], json!({"name": "layers.1.q", "what": "only left"}));
    let text = case.tool(&["diff", "first", "adapter"]).stdout;
    assert!(
        text.contains("layers.1.q  only in the first") && text.ends_with("0 of 2 updates and tensors are identical\n"),
        "{text}"
    );
}

#[test]
fn two_checkpoints_tensor_by_tensor() {
    let case = case();
    assert_eq!(case.run(&["base", "adapter", "-o", "out", "--quiet"]).code, 0);
    let found = report(&case, &["diff", "base", "out"]);
    assert_eq!((&found["kind"], &found["identical"]), (&json!("checkpoints"), &json!(6)));
    let differing: Vec<&str> = found["rows"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["identical"] == false)
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(differing, ["layers.0.q.weight", "layers.1.q.weight"]);
}

#[test]
fn the_layers_of_a_model() {
    let case = case()
        .base("lm.conv.weight", Tensor::new(BF16, &[3, 5, 2, 2], 1))
        .base("layers.0.mlp.experts.gate_up", Tensor::new(BF16, &[3, 6, 8], 1))
        .base("layers.0.packed.weight", Tensor::filled(U8, &[12, 1], 0.1))
        .base("layers.0.packed.weight.absmax", Tensor::new(F32, &[1], 1));
    case.save();
    let found = report(&case, &["targets", "base", "--rank", "4"]);
    let rows: Vec<Value> = found["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            json!([row["leaf"], row["name"], row["kind"], row["count"], row["blocks"], row["parameters"], row["added"]])
        })
        .collect();
    assert_eq!(
        Value::from(rows),
        json!([
            ["embed_tokens", "embed_tokens", "embedding", 1, [], 66, 68],
            ["k", "layers.*.k", "linear", 2, [0, 1], 56, 80],
            ["gate_up", "layers.*.mlp.experts.gate_up", "parameter", 1, [0], 144, 168],
            ["packed", "layers.*.packed", "quantized", 1, [0], 12, null],
            ["q", "layers.*.q", "linear", 2, [0, 1], 48, 80],
            ["conv", "lm.conv", "conv2d", 1, [], 60, 92],
            ["norm", "norm", "other", 1, [], 6, null],
        ])
    );
    assert!(case.tool(&["targets", "base"]).stdout.contains("kinds a guess"));
}

#[test]
fn what_a_config_would_select() {
    let case = case()
        .set("target_modules", json!(["q", "norn", "norm"]))
        .set("exclude_modules", json!(["layers.0.q"]))
        .set("rank_pattern", json!({"layers.1.q": 3}))
        .set("modules_to_save", json!(["embed_tokens"]));
    case.save_adapter();
    let found = &report(&case, &["targets", "base", "--config", "adapter"])["config"];
    assert_eq!(found["targets"], json!(["layers.1.q", "norm"]));
    assert_eq!((&found["modules_to_save"], &found["excluded"]), (&json!(["embed_tokens"]), &json!(["layers.0.q"])));
    assert_eq!(found["coverage"], json!([{"stack": "layers", "adapted": [1], "blocks": 2}]));
    assert_eq!(found["added"], 30, "rank 3 by the pattern");
    assert_eq!(
        found["warnings"],
        json!([
            "target_modules: norn matches nothing; did you mean norm?",
            "1 targets cannot be adapted, being other: norm",
            "1 of 2 layers adapted in layers",
        ])
    );
    let text = case.tool(&["targets", "base", "--config", "adapter/adapter_config.json"]).stdout;
    assert!(text.contains("2 layers selected, 1 modules trained whole, 1 excluded, 30 parameters added"), "{text}");
}

#[test]
fn attention_in_few_layers_is_warned_of() {
    let mut case = Case::new().set("target_modules", json!(["q_proj", "in_proj"]));
    for layer in 0..56 {
        let leaf = if layer % 14 == 3 { "attn.q_proj" } else { "mixer.conv" };
        case = case.base(&format!("model.layers.{layer}.{leaf}.weight"), Tensor::new(BF16, &[4, 6], layer));
    }
    case.save();
    let found = &report(&case, &["targets", "base", "--config", "adapter"])["config"];
    let expected =
        ["target_modules: in_proj matches nothing; did you mean q_proj?", "4 of 56 layers adapted in model.layers"];
    assert_eq!(found["warnings"], json!(expected));
    let case = case.set("layers_to_transform", json!([3]));
    case.save_adapter();
    let found = &report(&case, &["targets", "base", "--config", "adapter"])["config"];
    assert_eq!(found["coverage"], json!([{"stack": "model.layers", "adapted": [3], "blocks": 56}]));
    assert_eq!(found["warnings"].as_array().unwrap().len(), 1, "as it was asked for");
}

#[test]
fn empty_tensors_of_monstrous_shapes_are_refused() {
    let case = case();
    let header =
        r#"{"a.weight":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904,9],"data_offsets":[0,0]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    std::fs::write(case.path("base/model.safetensors"), bytes).unwrap();
    for command in ["inspect", "targets"] {
        let output = case.tool(&[command, "base"]);
        assert!(
            (output.code, output.stdout.is_empty()) == (0, false) || output.stderr.starts_with("error: "),
            "{}",
            output.stderr
        );
    }
}

#[test]
fn only_a_class_knows_all_linear_layers() {
    let case = case().set("target_modules", json!("all-linear"));
    case.save_adapter();
    for arguments in [&["targets", "base", "--config", "adapter"][..], &["targets", "base", "--by-class"]] {
        let output = case.tool(arguments);
        assert_eq!((output.code, output.stdout.as_str()), (1, ""));
        assert!(output.stderr.contains("\nhint: run the peftrs that `pip install"), "{}", output.stderr);
    }
}

#[test]
fn hostile_names_are_escaped() {
    let case = case()
        .base("layers.0.\u{1b}[31m.weight", Tensor::new(BF16, &[4, 6], 1))
        .set("target_modules", json!(["\u{1b}"]));
    case.save();
    for arguments in [
        &["targets", "base", "--config", "adapter"][..],
        &["inspect", "base"],
        &["inspect", "adapter"],
        &["diff", "base", "base"],
    ] {
        let output = case.tool(arguments);
        assert_eq!(output.code, 0, "{}", output.stderr);
        assert!(!output.stdout.contains('\u{1b}'), "{arguments:?}");
    }
}

#[test]
fn extracting_takes_python() {
    let output = case().tool(&["extract", "base", "base", "-o", "out"]);
    assert_eq!((output.code, output.stdout.as_str()), (1, ""));
    assert!(
        output.stderr.starts_with("error: extracting takes torch")
            && output.stderr.contains("\nhint: run the peftrs that")
    );
}
