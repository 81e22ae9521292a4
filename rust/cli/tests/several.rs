//! Several adapters at once: sums of changes, their weights and their order.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor, Tensors, assert_close, read};
use safetensors::tensor::Dtype::{BF16, F16, F32};
use serde_json::{Value, json};

/// The second adapter of a case, in the folder `second`.
fn second(case: &Case, ranks: usize, more: &Value) -> Tensors {
    let tensors: Tensors = [
        ("base_model.model.l.q.lora_A.weight".to_owned(), Tensor::new(F32, &[ranks, 37], 13)),
        ("base_model.model.l.q.lora_B.weight".to_owned(), Tensor::new(F32, &[21, ranks], 14)),
    ]
    .into();
    let mut config = json!({"peft_type": "LORA", "r": ranks, "lora_alpha": 3 * ranks});
    more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    add(case, "second", &tensors, &config);
    tensors
}

fn add(case: &Case, name: &str, tensors: &Tensors, config: &Value) {
    std::fs::create_dir_all(case.path(name)).unwrap();
    common::write(&case.path(name).join("adapter_model.safetensors"), tensors);
    std::fs::write(case.path(name).join("adapter_config.json"), config.to_string()).unwrap();
}

fn linear(dtype: safetensors::tensor::Dtype) -> Case {
    let case = Case::new()
        .base("l.q.weight", Tensor::new(dtype, &[21, 37], 1))
        .base("l.norm.weight", Tensor::new(dtype, &[6], 2))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 37], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[21, 2], 4));
    case.save();
    case
}

fn merge(case: &Case, adapters: &[&str]) -> Tensors {
    let output =
        case.run(&[&["base"], adapters, &["-o", "out", "--quiet", "--no-sync", "--check", "--overwrite"]].concat());
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (0, "", ""));
    read(&case.path("out/model.safetensors"))
}

fn refused(case: &Case, adapters: &[&str]) -> String {
    let output = case.run(&[&["base"], adapters, &["-o", "out"]].concat());
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!(!case.path("out").exists());
    output.stderr
}

#[test]
fn changes_are_added_with_their_weights_and_rounded_once() {
    for dtype in [BF16, F16, F32] {
        let case = linear(dtype);
        let other = second(&case, 3, &json!({}));
        let (up, down) = (&other["base_model.model.l.q.lora_B.weight"], &other["base_model.model.l.q.lora_A.weight"]);
        let merged = merge(&case, &["adapter@0.25", "second@-1.5"]);
        assert_close(&merged["l.q.weight"], |index| {
            let (row, column) = (index / 37, index % 37);
            let second: f64 = (0..3).map(|k| up.values[row * 3 + k] * down.values[k * 37 + column]).sum();
            case.tensors["l.q.weight"].values[index]
                + 0.25 * 2.0 * case.product("l.q.lora_B.weight", "l.q.lora_A.weight", row, column)
                - 1.5 * 3.0 * second
        });
        assert_eq!(merged["l.norm.weight"], case.tensors["l.norm.weight"]);
    }
}

#[test]
fn one_adapter_split_into_two_weights_is_the_adapter() {
    let case = linear(F32);
    assert_close(&merge(&case, &["adapter@0.5", "adapter@0.5"])["l.q.weight"], |index| {
        case.tensors["l.q.weight"].values[index]
            + 2.0 * case.product("l.q.lora_B.weight", "l.q.lora_A.weight", index / 37, index % 37)
    });
    assert_eq!(merge(&case, &["adapter@0"])["l.q.weight"], case.tensors["l.q.weight"]);
}

#[test]
fn lengths_are_given_to_what_the_adapters_before_made() {
    let case = linear(F32).set("use_dora", json!(true)).with("l.q.lora_magnitude_vector", Tensor::new(F32, &[21], 5));
    case.save();
    let other = second(&case, 3, &json!({}));
    let (up, down) = (&other["base_model.model.l.q.lora_B.weight"], &other["base_model.model.l.q.lora_A.weight"]);
    let change = |row: usize, column: usize| {
        3.0 * (0..3).map(|k| up.values[row * 3 + k] * down.values[k * 37 + column]).sum::<f64>()
    };
    let dora = |row: usize, column: usize, before: &dyn Fn(usize, usize) -> f64| {
        let sum = |column: usize| {
            case.tensors["l.q.weight"].values[row * 37 + column]
                + before(row, column)
                + 2.0 * case.product("l.q.lora_B.weight", "l.q.lora_A.weight", row, column)
        };
        let norm = (0..37).map(|column| sum(column).powi(2)).sum::<f64>().sqrt();
        case.factor("l.q.lora_magnitude_vector").values[row] / norm * sum(column)
    };
    assert_close(&merge(&case, &["adapter", "second"])["l.q.weight"], |index| {
        dora(index / 37, index % 37, &|_, _| 0.0) + change(index / 37, index % 37)
    });
    assert_close(&merge(&case, &["second", "adapter"])["l.q.weight"], |index| dora(index / 37, index % 37, &change));
}

#[test]
fn every_adapter_is_recorded_with_its_weight() {
    let case = linear(F32);
    second(&case, 3, &json!({}));
    merge(&case, &["adapter", "second@0.5"]);
    let text = |name: &str| std::fs::read_to_string(case.path("out").join(name)).unwrap();
    let record: Value = serde_json::from_str(&text("peftrs-merge.json")).unwrap();
    let told: Vec<_> =
        record["adapters"].as_array().unwrap().iter().map(|one| (one["name"].clone(), one["weight"].clone())).collect();
    assert_eq!(told, [(json!("adapter"), json!(1.0)), (json!("second"), json!(0.5))]);
    assert_eq!(record["adapters"][1]["scalings"], json!([1.5]));
    let readme = text("README.md");
    assert!(readme.contains("# base with adapter and second merged in"), "{readme}");
    assert!(readme.contains("| `second` | 0.5 | [1.5] | `"), "{readme}");
}

#[test]
fn a_folder_whose_name_looks_like_a_weight_is_the_folder() {
    let case = linear(F32);
    std::fs::rename(case.path("adapter"), case.path("adapter@0.5")).unwrap();
    let whole = merge(&case, &["adapter@0.5"]);
    let half = merge(&case, &["adapter@0.5@0.5"]);
    assert_ne!(whole["l.q.weight"], half["l.q.weight"]);
}

#[test]
fn what_does_not_add_has_no_weight() {
    let dora = linear(F32).set("use_dora", json!(true)).with("l.q.lora_magnitude_vector", Tensor::new(F32, &[21], 5));
    let saved = linear(F32).set("modules_to_save", json!(["norm"])).with("l.norm.weight", Tensor::new(F32, &[6], 5));
    let rows = linear(F32)
        .set("trainable_token_indices", json!({"q": [4]}))
        .with("l.q.token_adapter.trainable_tokens_delta", Tensor::new(F32, &[1, 37], 5));
    let rows = {
        let mut rows = rows;
        rows.adapter.retain(|name, _| !name.contains("lora_"));
        rows
    };
    for (case, name) in [(dora, "l.q.weight"), (saved, "l.norm.weight"), (rows, "l.q.weight")] {
        case.save();
        assert_eq!(
            refused(&case, &["adapter@0.5"]),
            format!(
                "error: adapter cannot have the weight 0.5: it does not add to {name}, so there is nothing that a weight \
                 multiplies\nhint: leave out @0.5\n"
            )
        );
        merge(&case, &["adapter@1.0"]);
    }
}

#[test]
fn two_adapters_that_set_the_same_values_are_refused_unless_they_agree() {
    let saved =
        |seed: u64| -> Tensors { [("base_model.model.l.norm.weight".to_owned(), Tensor::new(F32, &[6], seed))].into() };
    let config = json!({"peft_type": "LORA", "modules_to_save": ["norm"]});
    let case = linear(F32);
    for (name, seed) in [("one", 7), ("same", 7), ("other", 8)] {
        add(&case, name, &saved(seed), &config);
    }
    assert_eq!(&merge(&case, &["one", "same"])["l.norm.weight"], &saved(7)["base_model.model.l.norm.weight"]);
    std::fs::remove_dir_all(case.path("out")).unwrap();
    let hint = "hint: merge one of them, and the other into the result if that is what you mean\n";
    assert_eq!(
        refused(&case, &["one", "other"]),
        format!("error: one and other hold different values of l.norm.weight\n{hint}")
    );

    let config = json!({"peft_type": "LORA", "modules_to_save": ["q"]});
    let whole: Tensors = [("base_model.model.l.q.weight".to_owned(), Tensor::new(F32, &[21, 37], 7))].into();
    add(&case, "whole", &whole, &config);
    assert_eq!(
        refused(&case, &["adapter", "whole"]),
        format!("error: adapter and whole replace and change l.q.weight\n{hint}")
    );

    let rows = |seed: u64| -> Tensors {
        let name = "base_model.model.l.q.token_adapter.trainable_tokens_delta".to_owned();
        [(name, Tensor::new(F32, &[2, 37], seed))].into()
    };
    for (name, indices) in [("first", [3, 5]), ("again", [5, 6]), ("apart", [0, 1])] {
        let config = json!({"peft_type": "LORA", "trainable_token_indices": {"q": indices}});
        add(&case, name, &rows(9), &config);
    }
    assert_eq!(
        refused(&case, &["first", "again"]),
        format!("error: first and again both replace row 5 of l.q.weight\n{hint}")
    );
    let merged = merge(&case, &["first", "apart"]);
    let trained = &rows(9)["base_model.model.l.q.token_adapter.trainable_tokens_delta"].values;
    for (row, at) in [(0, 0), (1, 37), (3, 0), (5, 37)] {
        assert_eq!(merged["l.q.weight"].values[row * 37..(row + 1) * 37], trained[at..at + 37]);
    }
    // Rows of the one and then factors of the other: the second starts from what the first made.
    let merged = merge(&case, &["first", "adapter"]);
    assert_close(&merged["l.q.weight"], |index| {
        let (row, column) = (index / 37, index % 37);
        let before = match row {
            3 => trained[column],
            5 => trained[37 + column],
            _ => case.tensors["l.q.weight"].values[index],
        };
        before + 2.0 * case.product("l.q.lora_B.weight", "l.q.lora_A.weight", row, column)
    });
}
