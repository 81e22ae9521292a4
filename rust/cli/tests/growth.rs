//! Models that grow with their adapter: repeated layers, and rows for new tokens.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::collections::BTreeSet;

use common::{Case, Tensor, assert_close, read, write};
use safetensors::tensor::Dtype::{BF16, F32};
use serde_json::{Value, json};

fn config(case: &Case) -> Value {
    serde_json::from_slice(&std::fs::read(case.path("out/config.json")).unwrap()).unwrap()
}

/// Three layers, of which the second is there twice, with an adapter on both and on the last.
fn replicated() -> Case {
    let mut case = Case::new()
        .model("num_hidden_layers", json!(3))
        .model("layer_types", json!(["a", "b", "c"]))
        .model("eos_token_id", json!([1, 2, 3]))
        .set("layer_replication", json!([[0, 2], [1, 3]]))
        .base("model.norm.weight", Tensor::new(F32, &[6], 9));
    for layer in 0..3 {
        case = case
            .base(&format!("model.layers.{layer}.q.weight"), Tensor::new(F32, &[4, 6], layer))
            .base(&format!("model.layers.{layer}.norm.weight"), Tensor::new(F32, &[6], 20 + layer));
    }
    for layer in [1, 2, 3] {
        case = case
            .with(&format!("model.layers.{layer}.q.lora_A.weight"), Tensor::new(F32, &[2, 6], 30 + layer))
            .with(&format!("model.layers.{layer}.q.lora_B.weight"), Tensor::new(F32, &[4, 2], 40 + layer));
    }
    case
}

#[test]
fn repeated_layers_are_written_out_each_with_its_own_change() {
    let case = replicated();
    let merged = case.merged();
    assert_eq!(merged.len(), 9);
    for (layer, source) in [(0, 0), (1, 1), (2, 1), (3, 2)] {
        let weight = &case.tensors[&format!("model.layers.{source}.q.weight")];
        let (up, down) =
            (format!("model.layers.{layer}.q.lora_B.weight"), format!("model.layers.{layer}.q.lora_A.weight"));
        assert_close(&merged[&format!("model.layers.{layer}.q.weight")], |index| {
            let change = if layer > 0 { 2.0 * case.product(&up, &down, index / 6, index % 6) } else { 0.0 };
            weight.values[index] + change
        });
        let norm = case.tensors[&format!("model.layers.{source}.norm.weight")].clone();
        assert_eq!(merged[&format!("model.layers.{layer}.norm.weight")], norm);
    }
    assert_eq!(merged["model.norm.weight"], case.tensors["model.norm.weight"]);
    let config = config(&case);
    assert_eq!(config["num_hidden_layers"], json!(4));
    assert_eq!(config["layer_types"], json!(["a", "b", "b", "c"]));
    assert_eq!(config["eos_token_id"], json!([1, 2, 3]));
}

#[test]
fn an_index_names_repeated_layers_and_no_others() {
    let case = replicated().set("layer_replication", json!([[0, 1], [0, 1], [0, 1], [0, 1]]));
    case.save();
    std::fs::remove_file(case.path("base/model.safetensors")).unwrap();
    let file = |name: &str| format!("model-{}.safetensors", usize::from(name.contains(".2.")));
    let map: serde_json::Map<_, _> = case.tensors.keys().map(|name| (name.clone(), Value::from(file(name)))).collect();
    for name in ["model-0.safetensors", "model-1.safetensors"] {
        let tensors = case.tensors.iter().filter(|(tensor, _)| file(tensor) == name);
        write(&case.path("base").join(name), &tensors.map(|(name, tensor)| (name.clone(), tensor.clone())).collect());
    }
    let index = json!({"metadata": {"total_size": 60}, "weight_map": map}).to_string();
    std::fs::write(case.path("base/model.safetensors.index.json"), index).unwrap();
    let output = case.run(&["base", "adapter", "-o", "out", "--quiet"]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    let index: Value =
        serde_json::from_slice(&std::fs::read(case.path("out/model.safetensors.index.json")).unwrap()).unwrap();
    let tensors = read(&case.path("out/model-0.safetensors"));
    let named: BTreeSet<&String> = index["weight_map"].as_object().unwrap().keys().collect();
    assert_eq!(named, tensors.keys().collect());
    assert_eq!(tensors.len(), 9);
}

#[test]
fn what_cannot_be_repeated_is_refused() {
    for (case, reason) in [
        (
            replicated().set("layer_replication", json!([[0, 4]])),
            "[(0, 4)] are not ranges of the 3 layers in model.layers.",
        ),
        (
            replicated().base("model.encoder.layer.0.q.weight", Tensor::new(F32, &[4, 6], 1)),
            "this has no one list of them",
        ),
        (
            replicated().model("num_hidden_layers", json!(5)),
            "does not say that there are 3 layers (`num_hidden_layers`)",
        ),
        (replicated().model("mlp_only_layers", json!([1])), "says of some layers in `mlp_only_layers`"),
    ] {
        let message = case.refused();
        assert!(message.contains(reason), "{message}");
    }
    let case = replicated();
    case.save();
    std::fs::create_dir(case.path("flat")).unwrap();
    let (weights, config) = ("adapter/adapter_model.safetensors", json!({"peft_type": "LORA", "r": 2}));
    std::fs::copy(case.path(weights), case.path("flat/adapter_model.safetensors")).unwrap();
    std::fs::write(case.path("flat/adapter_config.json"), config.to_string()).unwrap();
    let message = case.run(&["base", "adapter", "flat", "-o", "out"]).stderr;
    assert!(message.starts_with("error: flat was trained on another `layer_replication` than adapter\n"), "{message}");
}

/// A base of eight tokens with an adapter for ten.
fn grown() -> Case {
    Case::new()
        .model("architectures", json!(["LlamaForCausalLM"]))
        .model("vocab_size", json!(8))
        .base("model.embed_tokens.weight", Tensor::new(BF16, &[8, 6], 1))
        .base("model.q.weight", Tensor::new(BF16, &[4, 6], 2))
        .with("model.q.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("model.q.lora_B.weight", Tensor::new(F32, &[4, 2], 4))
        .with("model.embed_tokens.weight", Tensor::new(F32, &[10, 6], 5))
}

#[test]
fn embeddings_grow_and_the_config_says_so() {
    let head = || {
        grown()
            .base("lm_head.weight", Tensor::new(BF16, &[8, 6], 6))
            .with("lm_head.weight", Tensor::new(F32, &[10, 6], 7))
            .model("tie_word_embeddings", json!(false))
    };
    let case = head();
    case.save();
    let output = case.run(&["base", "adapter", "-o", "out"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stderr.contains("note: the vocabulary grows from 8 to 10 tokens; take the tokenizer"));
    let merged = read(&case.path("out/model.safetensors"));
    assert_eq!(merged["model.embed_tokens.weight"], case.factor("model.embed_tokens.weight").to(BF16));
    assert_eq!(merged["lm_head.weight"], case.factor("lm_head.weight").to(BF16));
    assert_eq!(config(&case)["vocab_size"], json!(10));

    // Factors on the grown table.
    let case = head()
        .with("model.embed_tokens.lora_embedding_A", Tensor::new(F32, &[2, 10], 8))
        .with("model.embed_tokens.lora_embedding_B", Tensor::new(F32, &[6, 2], 9));
    assert_close(&case.merged()["model.embed_tokens.weight"], |index| {
        let (up, down) = ("model.embed_tokens.lora_embedding_B", "model.embed_tokens.lora_embedding_A");
        case.factor("model.embed_tokens.weight").values[index] + 2.0 * case.product(up, down, index % 6, index / 6)
    });
}

#[test]
fn a_tied_head_grows_along() {
    for case in [grown(), grown().with("lm_head.weight", Tensor::new(F32, &[10, 6], 5))] {
        let merged = case.merged();
        assert_eq!(merged["model.embed_tokens.weight"].shape, [10, 6]);
        assert!(!merged.contains_key("lm_head.weight"));
        assert_eq!(config(&case).get("tie_word_embeddings"), None);
        assert_eq!(config(&case)["vocab_size"], json!(10));
    }
    let apart = grown().with("lm_head.weight", Tensor::new(F32, &[10, 6], 15));
    assert_eq!(apart.merged()["lm_head.weight"], apart.factor("lm_head.weight").clone().to(BF16));
    assert_eq!(config(&apart)["tie_word_embeddings"], json!(false));
    let changed = grown()
        .with("model.embed_tokens.lora_embedding_A", Tensor::new(F32, &[2, 10], 8))
        .with("model.embed_tokens.lora_embedding_B", Tensor::new(F32, &[6, 2], 9));
    let merged = changed.merged();
    assert_eq!(merged["lm_head.weight"], changed.factor("model.embed_tokens.weight").to(BF16));
    assert_ne!(merged["model.embed_tokens.weight"], merged["lm_head.weight"]);
}

#[test]
fn what_grows_alone_shrinks_or_does_not_fit_is_refused() {
    let shrunk = grown().with("model.embed_tokens.weight", Tensor::new(F32, &[7, 6], 5));
    let lone = grown().base("lm_head.weight", Tensor::new(BF16, &[8, 6], 6));
    let unsaid = grown().model("vocab_size", json!(9));
    let mut padded = grown()
        .with("model.embed_tokens.lora_embedding_A", Tensor::new(F32, &[2, 7], 8))
        .with("model.embed_tokens.lora_embedding_B", Tensor::new(F32, &[6, 2], 9));
    padded.adapter.remove("base_model.model.model.embed_tokens.weight");
    let norm = grown()
        .set("modules_to_save", json!(["norm"]))
        .base("norm.weight", Tensor::new(BF16, &[6], 6))
        .with("norm.weight", Tensor::new(F32, &[7], 6));
    for (case, reason) in [
        (shrunk, "model.embed_tokens.weight [7, 6], in the base [8, 6]"),
        (lone, "model.embed_tokens.weight grows from 8 to 10 rows, and lm_head.weight does not\n"),
        (unsaid, "the base's config.json does not say 8 anywhere (`vocab_size`)"),
        (padded, "model.embed_tokens [2, 7] and [6, 2] for model.embed_tokens.weight [8, 6]"),
        (norm, "norm.weight [7], in the base [6]"),
    ] {
        let message = case.refused();
        assert!(message.contains(reason), "{message}");
    }
}
