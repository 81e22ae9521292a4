//! Experts that the adapter was trained on in one parameter and the base stores one by one, and the other way round.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_lossless, reason = "tests")]

mod common;

use common::{Case, Tensor, assert_close};
use safetensors::tensor::Dtype::{BF16, F32};
use serde_json::json;

const EXPERTS: usize = 3;

/// An adapter of rank 2 on both parameters of three experts of shape (10, 6) and (6, 5).
fn on_parameters() -> Case {
    Case::new()
        .set("target_parameters", json!(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
        .with("l.mlp.experts.base_layer.lora_A.weight", Tensor::new(F32, &[6, 6], 3))
        .with("l.mlp.experts.base_layer.lora_B.weight", Tensor::new(F32, &[10, 6], 4))
        .with("l.mlp.experts.lora_A.weight", Tensor::new(F32, &[6, 5], 5))
        .with("l.mlp.experts.lora_B.weight", Tensor::new(F32, &[6, 6], 6))
}

/// The change of one expert by factors of all.
fn stacked(case: &Case, module: &str, expert: usize, row: usize, column: usize) -> f64 {
    let (up, down) = (case.factor(&format!("{module}.lora_B.weight")), case.factor(&format!("{module}.lora_A.weight")));
    let columns = down.shape[1];
    (0..2)
        .map(|k| up.values[row * 6 + k * EXPERTS + expert] * down.values[(expert * 2 + k) * columns + column])
        .sum::<f64>()
        * 2.0
}

#[test]
fn parameters_of_all_experts_change_the_layers_of_each() {
    for (module, layers) in [("mlp", ["gate_proj", "up_proj", "down_proj"]), ("block_sparse_moe", ["w1", "w3", "w2"])] {
        let mut case = on_parameters();
        for expert in 0..EXPERTS {
            for (seed, (layer, shape)) in layers.iter().zip([[5, 6], [5, 6], [6, 5]]).enumerate() {
                let name = format!("l.{module}.experts.{expert}.{layer}.weight");
                case = case.base(&name, Tensor::new(F32, &shape, (10 * expert + seed) as u64));
            }
        }
        let merged = case.merged();
        assert_eq!(merged.len(), 9);
        for expert in 0..EXPERTS {
            for (layer, factors, first, columns) in [
                (layers[0], "l.mlp.experts.base_layer", 0, 6),
                (layers[1], "l.mlp.experts.base_layer", 5, 6),
                (layers[2], "l.mlp.experts", 0, 5),
            ] {
                let name = format!("l.{module}.experts.{expert}.{layer}.weight");
                assert_close(&merged[&name], |index| {
                    case.tensors[&name].values[index]
                        + stacked(&case, factors, expert, first + index / columns, index % columns)
                });
            }
        }
    }
}

#[test]
fn layers_of_some_experts_change_their_part_of_the_parameter() {
    let mut case = Case::new()
        .base("l.mlp.experts.gate_up_proj", Tensor::new(BF16, &[EXPERTS, 10, 6], 1))
        .base("l.mlp.experts.down_proj", Tensor::new(BF16, &[EXPERTS, 6, 5], 2));
    for (seed, (layer, shape)) in
        [("1.gate_proj", [5, 6]), ("1.up_proj", [5, 6]), ("2.up_proj", [5, 6]), ("0.down_proj", [6, 5])]
            .into_iter()
            .enumerate()
    {
        let seed = 10 * seed as u64 + 3;
        case = case
            .with(&format!("l.mlp.experts.{layer}.lora_A.weight"), Tensor::new(F32, &[2, shape[1]], seed))
            .with(&format!("l.mlp.experts.{layer}.lora_B.weight"), Tensor::new(F32, &[shape[0], 2], seed + 1));
    }
    let merged = case.merged();
    let change = |layer: &str, row: usize, column: usize| {
        let module = format!("l.mlp.experts.{layer}");
        2.0 * case.product(&format!("{module}.lora_B.weight"), &format!("{module}.lora_A.weight"), row, column)
    };
    assert_close(&merged["l.mlp.experts.gate_up_proj"], |index| {
        let (expert, row, column) = (index / 60, index / 6 % 10, index % 6);
        let change = match (expert, row / 5) {
            (1, 0) => change("1.gate_proj", row, column),
            (1, 1) => change("1.up_proj", row - 5, column),
            (2, 1) => change("2.up_proj", row - 5, column),
            _ => 0.0,
        };
        case.tensors["l.mlp.experts.gate_up_proj"].values[index] + change
    });
    assert_close(&merged["l.mlp.experts.down_proj"], |index| {
        let (expert, row, column) = (index / 30, index / 5 % 6, index % 5);
        let change = if expert == 0 { change("0.down_proj", row, column) } else { 0.0 };
        case.tensors["l.mlp.experts.down_proj"].values[index] + change
    });
}

#[test]
fn experts_of_different_shapes_and_lengths_for_parts_are_refused() {
    let mut uneven = on_parameters();
    for (expert, rows) in [(0, 5), (1, 5), (2, 4)] {
        uneven = uneven
            .base(&format!("l.mlp.experts.{expert}.gate_proj.weight"), Tensor::new(F32, &[rows, 6], 1))
            .base(&format!("l.mlp.experts.{expert}.up_proj.weight"), Tensor::new(F32, &[rows, 6], 2));
    }
    let message = uneven.refused();
    assert!(message.contains("adapter modules have no home in the base: l.mlp.experts"), "{message}");
    let lengths = Case::new()
        .set("use_dora", json!(true))
        .base("l.mlp.experts.down_proj", Tensor::new(F32, &[EXPERTS, 6, 5], 2))
        .with("l.mlp.experts.0.down_proj.lora_A.weight", Tensor::new(F32, &[2, 5], 3))
        .with("l.mlp.experts.0.down_proj.lora_B.weight", Tensor::new(F32, &[6, 2], 4))
        .with("l.mlp.experts.0.down_proj.lora_magnitude_vector", Tensor::new(F32, &[6], 5));
    let message = lengths.refused();
    assert!(message.contains("l.mlp.experts.0.down_proj.lora_magnitude_vector for 6 outputs"), "{message}");
}
