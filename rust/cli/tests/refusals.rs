//! Everything that stands against a merge is said at once, in one line and a hint, before anything is written.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor};
use safetensors::tensor::Dtype::{BF16, F32, U8};
use serde_json::json;

const HINT: &str = "hint: check that this is the base that the adapter was trained on\n";

fn linear() -> Case {
    Case::new()
        .base("l.q.weight", Tensor::new(BF16, &[4, 6], 1))
        .base("l.norm.weight", Tensor::new(BF16, &[6], 2))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[4, 2], 4))
}

fn does_not_fit(case: &Case, what: &str) {
    let expected =
        format!("error: adapter/adapter_model.safetensors does not fit base/model.safetensors: {what}\n{HINT}");
    assert_eq!(case.refused(), expected);
}

#[test]
fn a_module_without_a_home() {
    let case = linear()
        .with("l.extra.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("l.extra.lora_B.weight", Tensor::new(F32, &[4, 2], 4));
    does_not_fit(&case, "1 adapter modules have no home in the base: l.extra");
}

#[test]
fn a_factor_without_its_partner_and_a_name_that_lora_does_not_use() {
    let case = linear()
        .with("l.k.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("l.q.lora_C.weight", Tensor::new(F32, &[2, 6], 3));
    does_not_fit(
        &case,
        "1 adapter tensors have a name that their method does not use: base_model.model.l.q.lora_C.weight; \
         1 adapter tensors lack their partner: base_model.model.l.k.lora_A.weight",
    );
}

#[test]
fn shapes_and_ranks_that_do_not_fit() {
    let case = linear()
        .with("l.norm.lora_A.weight", Tensor::new(F32, &[2, 7], 3))
        .with("l.norm.lora_B.weight", Tensor::new(F32, &[4, 2], 4));
    does_not_fit(
        &case,
        "1 adapter tensors have shapes that do not fit: l.norm [2, 7] and [4, 2] for l.norm.weight [6]",
    );
    does_not_fit(
        &linear().set("r", json!(3)),
        "1 adapter tensors have shapes that do not fit: l.q of rank 2, 3 by the config",
    );
}

#[test]
fn factors_of_integers_and_factors_without_elements() {
    does_not_fit(
        &linear().with("l.q.lora_B.weight", Tensor::new(U8, &[4, 2], 4)),
        "1 adapter tensors are of an integer type, which their method does not have: base_model.model.l.q.lora_B.weight U8",
    );
    does_not_fit(
        &linear().with("l.q.lora_B.weight", Tensor::new(F32, &[0], 4)),
        "1 adapter tensors have shapes that do not fit: l.q [2, 6] and [0] for l.q.weight [4, 6]",
    );
}

#[test]
fn a_weight_of_the_base_that_the_config_does_not_declare() {
    does_not_fit(
        &linear().with("l.norm.weight", Tensor::new(F32, &[6], 5)),
        "1 adapter tensors name a weight of the base that the config does not declare: base_model.model.l.norm.weight",
    );
}

#[test]
fn weights_that_are_not_finite_unless_allowed() {
    let mut broken = Tensor::new(F32, &[4, 2], 4);
    broken.values[5] = f64::NAN;
    let case = linear().with("l.q.lora_B.weight", broken);
    does_not_fit(
        &case,
        "1 adapter tensors are not finite (--allow-nonfinite merges them all the same): base_model.model.l.q.lora_B.weight",
    );
    let output = case.run(&["base", "adapter", "-o", "out", "--quiet", "--allow-nonfinite"]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    let merged = common::read(&case.path("out/model.safetensors"));
    assert_eq!(merged["l.q.weight"].values.iter().filter(|value| value.is_nan()).count(), 6);
}

#[test]
fn a_sum_too_large_for_the_type() {
    let case = Case::new()
        .base("l.q.weight", Tensor::filled(safetensors::tensor::Dtype::F16, &[4, 6], 60000.0))
        .with("l.q.lora_A.weight", Tensor::filled(F32, &[2, 6], 100.0))
        .with("l.q.lora_B.weight", Tensor::filled(F32, &[4, 2], 100.0));
    let message = case.refused();
    assert!(message.starts_with("error: l.q.weight would not be finite in row 0 of F16\nhint: "), "{message}");
}

#[test]
fn a_quantized_base() {
    let case = linear().base("l.q.weight", Tensor::new(U8, &[4, 6], 1));
    does_not_fit(&case, "1 tensors have a type that cannot be merged (a quantized base?): l.q.weight U8");
    let case = linear().model("quantization_config", json!({"quant_method": "hqq"}));
    let message = case.refused();
    assert!(message.contains("is quantized by `hqq`, which is not read; bitsandbytes"), "{message}");
}

#[test]
fn other_methods_and_starts() {
    assert_eq!(
        linear().set("peft_type", json!("LOHA")).refused(),
        "error: adapters of type LOHA are not merged by this version\n\
         hint: run the peftrs-merge of the Python package, or PeftModel.from_pretrained(...).merge_and_unload()\n"
    );
    let message = linear().set("init_lora_weights", json!("pissa")).refused();
    assert!(message.contains("init_lora_weights=pissa are not merged"), "{message}");
}

#[test]
fn an_adapter_that_changes_nothing() {
    let mut case = linear();
    case.adapter.clear();
    let case = case.set("modules_to_save", json!(["head"])).with("head.weight", Tensor::new(F32, &[1], 1));
    assert_eq!(case.merged().len(), 3);
    let mut case = linear();
    case.adapter.clear();
    case.save();
    let output = case.run(&["base", "adapter", "-o", "out"]);
    assert_eq!(output.code, 1);
}

#[test]
fn a_module_found_twice() {
    let case = Case::new()
        .base("text.l.q.weight", Tensor::new(BF16, &[4, 6], 1))
        .base("vision.l.q.weight", Tensor::new(BF16, &[4, 6], 2))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[4, 2], 4));
    assert_eq!(
        case.refused(),
        "error: the adapter's modules are found twice in the base, under text. and vision.\n\
         hint: give the part of the base that the adapter was trained on\n"
    );
}

#[test]
fn an_architecture_whose_tie_is_unknown() {
    let case = Case::new()
        .model("architectures", json!(["T5ForConditionalGeneration"]))
        .base("shared.weight", Tensor::new(BF16, &[9, 4], 1))
        .with("shared.lora_embedding_A", Tensor::new(F32, &[2, 9], 2))
        .with("shared.lora_embedding_B", Tensor::new(F32, &[4, 2], 3));
    let message = case.refused();
    assert!(message.starts_with("error: the adapter changes shared.weight, which the base ties to"), "{message}");
}
