//! The merged weights of every kind of layer against the formula in float64.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor, assert_close};
use safetensors::tensor::Dtype::{self, BF16, F16, F32};
use serde_json::json;

fn linear(dtype: Dtype) -> Case {
    Case::new()
        .base("l.q.weight", Tensor::new(dtype, &[21, 37], 1))
        .base("l.q.bias", Tensor::new(dtype, &[21], 2))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 37], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[21, 2], 4))
}

#[test]
fn linear_in_every_type() {
    for dtype in [BF16, F16, F32] {
        let case = linear(dtype);
        let merged = case.merged();
        assert_close(&merged["l.q.weight"], |index| {
            case.tensors["l.q.weight"].values[index]
                + 2.0 * case.product("l.q.lora_B.weight", "l.q.lora_A.weight", index / 37, index % 37)
        });
        assert_eq!(merged["l.q.bias"], case.tensors["l.q.bias"]);
        assert_ne!(merged["l.q.weight"], case.tensors["l.q.weight"]);
    }
}

#[test]
fn factors_of_any_type() {
    for dtype in [BF16, F16, Dtype::F64] {
        let case = linear(F32);
        let (a, b) = (case.factor("l.q.lora_A.weight").to(dtype), case.factor("l.q.lora_B.weight").to(dtype));
        let case = case.with("l.q.lora_A.weight", a).with("l.q.lora_B.weight", b);
        assert_close(&case.merged()["l.q.weight"], |index| {
            case.tensors["l.q.weight"].values[index]
                + 2.0 * case.product("l.q.lora_B.weight", "l.q.lora_A.weight", index / 37, index % 37)
        });
    }
}

#[test]
fn weights_stored_the_other_way_round() {
    let case = Case::new()
        .set("fan_in_fan_out", json!(true))
        .base("h.wide.weight", Tensor::new(BF16, &[5, 15], 1))
        .base("h.square.weight", Tensor::new(BF16, &[5, 5], 2))
        .with("h.wide.lora_A.weight", Tensor::new(F32, &[2, 5], 3))
        .with("h.wide.lora_B.weight", Tensor::new(F32, &[15, 2], 4))
        .with("h.square.lora_A.weight", Tensor::new(F32, &[2, 5], 5))
        .with("h.square.lora_B.weight", Tensor::new(F32, &[5, 2], 6));
    let merged = case.merged();
    for (name, columns) in [("h.wide", 15), ("h.square", 5)] {
        let (up, down) = (format!("{name}.lora_B.weight"), format!("{name}.lora_A.weight"));
        let weight = format!("{name}.weight");
        assert_close(&merged[&weight], |index| {
            case.tensors[&weight].values[index] + 2.0 * case.product(&up, &down, index % columns, index / columns)
        });
    }
}

#[test]
fn a_square_weight_is_stored_as_its_like_are_whatever_the_config_says() {
    let case = linear(F32)
        .set("fan_in_fan_out", json!(true))
        .base("l.k.weight", Tensor::new(F32, &[6, 6], 7))
        .with("l.k.lora_A.weight", Tensor::new(F32, &[2, 6], 8))
        .with("l.k.lora_B.weight", Tensor::new(F32, &[6, 2], 9));
    assert_close(&case.merged()["l.k.weight"], |index| {
        case.tensors["l.k.weight"].values[index]
            + 2.0 * case.product("l.k.lora_B.weight", "l.k.lora_A.weight", index / 6, index % 6)
    });
}

#[test]
fn embeddings() {
    let case = Case::new()
        .base("e.weight", Tensor::new(BF16, &[30, 8], 1))
        .base("other.weight", Tensor::new(BF16, &[3], 2))
        .with("e.lora_embedding_A", Tensor::new(F32, &[2, 30], 3))
        .with("e.lora_embedding_B", Tensor::new(F32, &[8, 2], 4));
    assert_close(&case.merged()["e.weight"], |index| {
        case.tensors["e.weight"].values[index]
            + 2.0 * case.product("e.lora_embedding_B", "e.lora_embedding_A", index % 8, index / 8)
    });
}

#[test]
fn convolutions_of_one_to_three_dimensions() {
    for kernel in [vec![3], vec![3, 2], vec![3, 2, 2]] {
        let ones = vec![1; kernel.len()];
        let shape = |first: [usize; 2], rest: &[usize]| [&first[..], rest].concat();
        let case = Case::new()
            .base("c.weight", Tensor::new(F16, &shape([8, 4], &kernel), 1))
            .with("c.lora_A.weight", Tensor::new(F32, &shape([2, 4], &kernel), 2))
            .with("c.lora_B.weight", Tensor::new(F32, &shape([8, 2], &ones), 3));
        let columns = 4 * kernel.iter().product::<usize>();
        assert_close(&case.merged()["c.weight"], |index| {
            case.tensors["c.weight"].values[index]
                + 2.0 * case.product("c.lora_B.weight", "c.lora_A.weight", index / columns, index % columns)
        });
    }
}

#[test]
fn rank_stabilised_scaling_and_patterns() {
    let case = linear(F32)
        .set("use_rslora", json!(true))
        .set("r", json!(8))
        .set("rank_pattern", json!({"l.q": 2}))
        .set("alpha_pattern", json!({"q": 3.0}));
    let scaling = 3.0 / 2.0_f64.sqrt();
    assert_close(&case.merged()["l.q.weight"], |index| {
        case.tensors["l.q.weight"].values[index]
            + scaling * case.product("l.q.lora_B.weight", "l.q.lora_A.weight", index / 37, index % 37)
    });
}

#[test]
fn biases_of_the_update_and_of_the_layer() {
    let case = linear(F32)
        .set("lora_bias", json!(true))
        .set("bias", json!("lora_only"))
        .with("l.q.lora_B.bias", Tensor::new(F32, &[21], 5))
        .with("l.q.base_layer.bias", Tensor::new(F32, &[21], 6));
    let merged = case.merged();
    assert_close(&merged["l.q.bias"], |index| {
        case.factor("l.q.base_layer.bias").values[index] + 2.0 * case.factor("l.q.lora_B.bias").values[index]
    });
}

#[test]
fn dora_of_a_linear_a_transposed_one_and_an_embedding() {
    let case = Case::new()
        .set("use_dora", json!(true))
        .base("a.weight", Tensor::new(BF16, &[21, 37], 1))
        .with("a.lora_A.weight", Tensor::new(F32, &[2, 37], 2))
        .with("a.lora_B.weight", Tensor::new(F32, &[21, 2], 3))
        .with("a.lora_magnitude_vector", Tensor::new(F32, &[21], 4))
        .base("e.weight", Tensor::new(BF16, &[600, 9], 5))
        .with("e.lora_embedding_A", Tensor::new(F32, &[2, 600], 6))
        .with("e.lora_embedding_B", Tensor::new(F32, &[9, 2], 7))
        .with("e.lora_magnitude_vector", Tensor::new(F32, &[9], 8));
    let merged = case.merged();
    let plain = |row: usize, column: usize| {
        case.tensors["a.weight"].values[row * 37 + column]
            + 2.0 * case.product("a.lora_B.weight", "a.lora_A.weight", row, column)
    };
    assert_close(&merged["a.weight"], |index| {
        let norm = (0..37).map(|column| plain(index / 37, column).powi(2)).sum::<f64>().sqrt();
        case.factor("a.lora_magnitude_vector").values[index / 37] / norm * plain(index / 37, index % 37)
    });
    let plain = |row: usize, column: usize| {
        case.tensors["e.weight"].values[row * 9 + column]
            + 2.0 * case.product("e.lora_embedding_B", "e.lora_embedding_A", column, row)
    };
    let norms: Vec<f64> =
        (0..9).map(|column| (0..600).map(|row| plain(row, column).powi(2)).sum::<f64>().sqrt()).collect();
    assert_close(&merged["e.weight"], |index| {
        case.factor("e.lora_magnitude_vector").values[index % 9] / norms[index % 9] * plain(index / 9, index % 9)
    });
}

#[test]
fn the_projection_of_an_adapted_attention_counts_twice_and_has_its_patterns() {
    let case = Case::new()
        .set("alpha_pattern", json!({"mha": 6, "out_proj": 100}))
        .base("mha.in_proj_weight", Tensor::new(F32, &[24, 8], 1))
        .base("mha.out_proj.weight", Tensor::new(F32, &[8, 8], 2))
        .base("alone.out_proj.weight", Tensor::new(F32, &[8, 8], 3))
        .with("mha.lora_A.weight", Tensor::new(F32, &[2, 8], 4))
        .with("mha.lora_B.weight", Tensor::new(F32, &[24, 2], 5))
        .with("mha.base_layer.out_proj.lora_A.weight", Tensor::new(F32, &[2, 8], 6))
        .with("mha.base_layer.out_proj.lora_B.weight", Tensor::new(F32, &[8, 2], 7))
        .with("alone.out_proj.lora_A.weight", Tensor::new(F32, &[2, 8], 8))
        .with("alone.out_proj.lora_B.weight", Tensor::new(F32, &[8, 2], 9));
    let merged = case.merged();
    for (name, module, scaling) in [
        ("mha.in_proj_weight", "mha", 3.0),
        ("mha.out_proj.weight", "mha.base_layer.out_proj", 6.0),
        ("alone.out_proj.weight", "alone.out_proj", 50.0),
    ] {
        let (up, down) = (format!("{module}.lora_B.weight"), format!("{module}.lora_A.weight"));
        assert_close(&merged[name], |index| {
            case.tensors[name].values[index] + scaling * case.product(&up, &down, index / 8, index % 8)
        });
    }
}

#[test]
fn experts_in_one_parameter() {
    // Two parameters of one module: PEFT nests them, and only the shapes tell which factors are whose.
    let case = Case::new()
        .set("target_parameters", json!(["experts.up", "experts.down"]))
        .base("m.experts.up", Tensor::new(F32, &[3, 10, 6], 1))
        .base("m.experts.down", Tensor::new(F32, &[3, 6, 5], 2))
        .with("m.experts.base_layer.lora_A.weight", Tensor::new(F32, &[6, 6], 3))
        .with("m.experts.base_layer.lora_B.weight", Tensor::new(F32, &[10, 6], 4))
        .with("m.experts.lora_A.weight", Tensor::new(F32, &[6, 5], 5))
        .with("m.experts.lora_B.weight", Tensor::new(F32, &[6, 6], 6));
    let merged = case.merged();
    for (name, wrap, rows, columns) in [("m.experts.up", "base_layer.", 10, 6), ("m.experts.down", "", 6, 5)] {
        let up = &case.factor(&format!("m.experts.{wrap}lora_B.weight")).values;
        let down = &case.factor(&format!("m.experts.{wrap}lora_A.weight")).values;
        assert_close(&merged[name], |index| {
            let (expert, row, column) = (index / (rows * columns), index / columns % rows, index % columns);
            let delta: f64 =
                (0..2).map(|k| up[row * 6 + k * 3 + expert] * down[(expert * 2 + k) * columns + column]).sum();
            case.tensors[name].values[index] + 2.0 * delta
        });
    }
}

#[test]
fn modules_saved_whole_and_trained_tokens() {
    let case = linear(BF16)
        .set("modules_to_save", json!(["score", "norm"]))
        .set("trainable_token_indices", json!({"words": [4, 1]}))
        .base("norm.weight", Tensor::new(BF16, &[8], 5))
        .base("words.weight", Tensor::new(BF16, &[6, 3], 6))
        .with("norm.weight", Tensor::new(F32, &[8], 7))
        .with("score.weight", Tensor::new(F32, &[2, 8], 8))
        .with("words.token_adapter.trainable_tokens_delta", Tensor::new(F32, &[2, 3], 9));
    let merged = case.merged();
    assert_eq!(merged["norm.weight"], case.factor("norm.weight").to(BF16));
    assert_eq!(&merged["score.weight"], case.factor("score.weight"));
    let mut expected = case.tensors["words.weight"].clone();
    let rows = case.factor("words.token_adapter.trainable_tokens_delta").to(BF16).values;
    expected.values.splice(12..15, rows[..3].iter().copied());
    expected.values.splice(3..6, rows[3..].iter().copied());
    assert_eq!(merged["words.weight"], expected);
}

#[test]
fn a_tied_head_is_untied_where_one_side_changes() {
    let tied = || {
        Case::new()
            .model("architectures", json!(["LlamaForCausalLM"]))
            .base("model.embed_tokens.weight", Tensor::new(BF16, &[12, 4], 1))
            .base("model.norm.weight", Tensor::new(BF16, &[4], 2))
    };
    let head = tied()
        .with("lm_head.lora_A.weight", Tensor::new(F32, &[2, 4], 3))
        .with("lm_head.lora_B.weight", Tensor::new(F32, &[12, 2], 4));
    let merged = head.merged();
    assert_eq!(merged["model.embed_tokens.weight"], head.tensors["model.embed_tokens.weight"]);
    assert_close(&merged["lm_head.weight"], |index| {
        head.tensors["model.embed_tokens.weight"].values[index]
            + 2.0 * head.product("lm_head.lora_B.weight", "lm_head.lora_A.weight", index / 4, index % 4)
    });
    let config = std::fs::read_to_string(head.path("out/config.json")).unwrap();
    assert!(config.contains("\"tie_word_embeddings\": false"), "{config}");

    let embedding = tied()
        .with("model.embed_tokens.lora_embedding_A", Tensor::new(F32, &[2, 12], 3))
        .with("model.embed_tokens.lora_embedding_B", Tensor::new(F32, &[4, 2], 4));
    let merged = embedding.merged();
    assert_eq!(merged["lm_head.weight"], embedding.tensors["model.embed_tokens.weight"]);
    assert_ne!(merged["model.embed_tokens.weight"], merged["lm_head.weight"]);

    let tokens = tied()
        .set("trainable_token_indices", json!([3]))
        .with("model.embed_tokens.token_adapter.trainable_tokens_delta", Tensor::new(F32, &[1, 4], 3));
    assert!(!tokens.merged().contains_key("lm_head.weight"));
}
