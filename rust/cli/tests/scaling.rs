//! (IA)³ and OFT against their formulas in float64.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor, assert_close};
use safetensors::tensor::Dtype::{BF16, F16, F32};
use serde_json::{Value, json};

fn case(config: Value) -> Case {
    let mut case = Case::new();
    case.config = config;
    case
}

fn ia3(feedforward: &[&str]) -> Case {
    case(json!({"peft_type": "IA3", "target_modules": ["q", "w"], "feedforward_modules": feedforward}))
}

#[test]
fn outputs_and_inputs_are_scaled_and_biases_of_outputs() {
    for dtype in [BF16, F16, F32] {
        let case = ia3(&["w"])
            .base("l.q.weight", Tensor::new(dtype, &[21, 37], 1))
            .base("l.q.bias", Tensor::new(dtype, &[21], 2))
            .base("l.w.weight", Tensor::new(dtype, &[6, 37], 3))
            .base("l.w.bias", Tensor::new(dtype, &[6], 4))
            .with("l.q.ia3_l", Tensor::new(F32, &[21, 1], 5))
            .with("l.w.ia3_l", Tensor::new(F32, &[1, 37], 6));
        let merged = case.merged();
        let (outputs, inputs) = (&case.factor("l.q.ia3_l").values, &case.factor("l.w.ia3_l").values);
        assert_close(&merged["l.q.weight"], |index| case.tensors["l.q.weight"].values[index] * outputs[index / 37]);
        assert_close(&merged["l.q.bias"], |index| case.tensors["l.q.bias"].values[index] * outputs[index]);
        assert_close(&merged["l.w.weight"], |index| case.tensors["l.w.weight"].values[index] * inputs[index % 37]);
        assert_eq!(merged["l.w.bias"], case.tensors["l.w.bias"]);
    }
}

#[test]
fn weights_stored_the_other_way_round() {
    let case = ia3(&["w"])
        .set("fan_in_fan_out", json!(true))
        .base("l.q.weight", Tensor::new(F32, &[5, 5], 1))
        .base("l.w.weight", Tensor::new(F32, &[5, 7], 2))
        .with("l.q.ia3_l", Tensor::new(F32, &[5, 1], 3))
        .with("l.w.ia3_l", Tensor::new(F32, &[1, 5], 4));
    let merged = case.merged();
    let (outputs, inputs) = (&case.factor("l.q.ia3_l").values, &case.factor("l.w.ia3_l").values);
    assert_close(&merged["l.q.weight"], |index| case.tensors["l.q.weight"].values[index] * outputs[index % 5]);
    assert_close(&merged["l.w.weight"], |index| case.tensors["l.w.weight"].values[index] * inputs[index / 7]);
}

#[test]
fn channels_of_convolutions_whose_groups_each_have_their_inputs() {
    let case = ia3(&["w"])
        .base("l.q.weight", Tensor::new(F32, &[4, 4, 3, 2], 1))
        .base("l.w.weight", Tensor::new(F32, &[6, 2, 3, 3], 2))
        .with("l.q.ia3_l", Tensor::new(F32, &[1, 4, 1, 1], 3))
        .with("l.w.ia3_l", Tensor::new(F32, &[1, 4, 1, 1], 4));
    let merged = case.merged();
    let (outputs, inputs) = (&case.factor("l.q.ia3_l").values, &case.factor("l.w.ia3_l").values);
    assert_close(&merged["l.q.weight"], |index| case.tensors["l.q.weight"].values[index] * outputs[index / 24]);
    assert_close(&merged["l.w.weight"], |index| {
        let (row, input) = (index / 18, index / 9 % 2);
        case.tensors["l.w.weight"].values[index] * inputs[row / 3 * 2 + input]
    });
}

#[test]
fn a_square_convolution_whose_side_no_config_tells_is_refused() {
    let mut case = ia3(&[])
        .base("l.q.weight", Tensor::new(F32, &[4, 4, 3, 3], 1))
        .with("l.q.ia3_l", Tensor::new(F32, &[1, 4, 1, 1], 2));
    case.config.as_object_mut().unwrap().remove("feedforward_modules");
    let message = case.refused();
    assert!(message.contains("l.q [1, 4, 1, 1] for l.q.weight [4, 4, 3, 3]"), "{message}");
    let wrong =
        ia3(&["q"]).base("l.q.weight", Tensor::new(F32, &[4, 6], 1)).with("l.q.ia3_l", Tensor::new(F32, &[4, 1], 2));
    let message = wrong.refused();
    assert!(message.contains("l.q [4, 1] for l.q.weight [4, 6]"), "{message}");
}

#[test]
fn what_multiplies_has_no_weight() {
    let scaled =
        ia3(&[]).base("l.q.weight", Tensor::new(F32, &[4, 6], 1)).with("l.q.ia3_l", Tensor::new(F32, &[4, 1], 2));
    let turned =
        oft().base("l.q.weight", Tensor::new(F32, &[4, 6], 1)).with("l.q.oft_R.weight", Tensor::new(F32, &[3, 1], 2));
    for case in [scaled, turned] {
        case.save();
        let output = case.run(&["base", "adapter@0.5", "-o", "out"]);
        assert_eq!(output.code, 1);
        let expected = "error: adapter cannot have the weight 0.5: it does not add to l.q.weight";
        assert!(output.stderr.starts_with(expected), "{}", output.stderr);
    }
}

fn oft() -> Case {
    case(json!({
        "peft_type": "OFT", "target_modules": ["q"], "r": 0, "oft_block_size": 2, "use_cayley_neumann": false,
        "peft_version": "0.21.2",
    }))
}

/// Cayley's map of the skew matrix of two rows with `q` above its diagonal.
fn turn(q: f64) -> [[f64; 2]; 2] {
    let (cosine, sine) = ((1.0 - q * q) / (1.0 + q * q), 2.0 * q / (1.0 + q * q));
    [[cosine, -sine], [sine, cosine]]
}

#[test]
fn inputs_are_turned_block_by_block() {
    for (dtype, shared) in [(BF16, false), (F16, true), (F32, false)] {
        let above = Tensor::new(F32, &[if shared { 1 } else { 18 }, 1], 2);
        let case = oft()
            .set("block_share", json!(shared))
            .base("l.q.weight", Tensor::new(dtype, &[21, 36], 1))
            .with("l.q.oft_R.weight", above);
        assert_close(&case.merged()["l.q.weight"], |index| {
            let (row, column) = (index / 36, index % 36);
            let block = turn(case.factor("l.q.oft_R.weight").values[if shared { 0 } else { column / 2 }]);
            let start = row * 36 + column / 2 * 2;
            let values = &case.tensors["l.q.weight"].values[start..start + 2];
            values[0] * block[column % 2][0] + values[1] * block[column % 2][1]
        });
    }
}

#[test]
fn inputs_of_a_transposed_weight_and_outputs_of_an_embedding() {
    let above = Tensor::new(F32, &[700, 1], 2);
    let case = oft()
        .set("fan_in_fan_out", json!(true))
        .base("l.q.weight", Tensor::new(F32, &[1400, 37], 1))
        .with("l.q.oft_R.weight", above);
    assert_close(&case.merged()["l.q.weight"], |index| {
        let (row, column) = (index / 37, index % 37);
        let block = turn(case.factor("l.q.oft_R.weight").values[row / 2]);
        let value = |row: usize| case.tensors["l.q.weight"].values[row * 37 + column];
        value(row / 2 * 2) * block[row % 2][0] + value(row / 2 * 2 + 1) * block[row % 2][1]
    });
    let case = oft()
        .base("e.weight", Tensor::new(F32, &[30, 6], 1))
        .base("other.weight", Tensor::new(F32, &[3], 2))
        .with("e.oft_embedding_R.weight", Tensor::new(F32, &[3, 1], 3));
    assert_close(&case.merged()["e.weight"], |index| {
        let block = turn(case.factor("e.oft_embedding_R.weight").values[index % 6 / 2]);
        let values = &case.tensors["e.weight"].values[index / 2 * 2..index / 2 * 2 + 2];
        values[0] * block[0][index % 2] + values[1] * block[1][index % 2]
    });
}

#[test]
fn files_whose_turn_nobody_can_tell_are_refused() {
    let saved = |change: &dyn Fn(&mut Value)| {
        let mut case = oft()
            .base("l.q.weight", Tensor::new(F32, &[4, 6], 1))
            .with("l.q.oft_R.weight", Tensor::new(F32, &[3, 1], 2));
        change(&mut case.config);
        case
    };
    saved(&|_| {}).merged();
    saved(&|config| config["peft_version"] = json!("0.17.1")).merged();
    saved(&|config| {
        config["use_cayley_neumann"] = json!(true);
        config["peft_version"] = json!("0.18.0.dev0@abc");
    })
    .merged();
    for name in ["oft_block_size", "use_cayley_neumann"] {
        let case = saved(&|config| drop(config.as_object_mut().unwrap().remove(name)));
        let message = case.refused();
        assert!(message.starts_with(&format!("error: the OFT adapter has no `{name}`: an early version")), "{message}");
    }
    for version in [json!("0.17.1"), json!(null)] {
        let case = saved(&|config| {
            config["use_cayley_neumann"] = json!(true);
            config["peft_version"] = version.clone();
        });
        let message = case.refused();
        assert!(message.starts_with("error: the OFT adapter was saved by PEFT before 0.18 ("), "{message}");
    }
    let case = saved(&|_| {}).with("l.q.oft_r.weight", Tensor::new(F32, &[3, 1], 2));
    let message = case.refused();
    assert!(message.contains("a name that their method does not use: base_model.model.l.q.oft_r.weight"), "{message}");
}
