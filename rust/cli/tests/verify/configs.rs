//! Configs that do not fit the weights, layers that are repeated, and the report.

use crate::common::{Case, Tensor};
use crate::support::{Size, assert_fault, case, merge, tamper, verified};
use safetensors::tensor::Dtype::{BF16, F32};
use serde_json::{Value, json};

#[test]
fn configs_that_do_not_fit_the_weights() {
    let config = |fields: Value| {
        let case = case(BF16, Size::Small, 1).model("vocab_size", json!(50)).model("num_hidden_layers", json!(3));
        case.save();
        std::fs::write(case.path("out/config.json"), case.model.to_string()).unwrap();
        assert_eq!(verified(&case).1, [""; 0]);
        let mut model = case.model.clone();
        model.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        std::fs::write(case.path("out/config.json"), model.to_string()).unwrap();
        verified(&case).1
    };
    assert_eq!(config(json!({"vocab_size": 57})), ["config.json says vocab_size 57, and the merge has 50"]);
    assert_eq!(config(json!({"num_hidden_layers": 6})), ["config.json says num_hidden_layers 6, and the merge has 3"]);
    let left = config(json!({"quantization_config": {"quant_method": "gptq"}}));
    assert_eq!(left, ["config.json has a quantization_config, but no tensor is quantized"]);
    let case = case(BF16, Size::Small, 1);
    std::fs::copy(case.path("adapter/adapter_config.json"), case.path("out/adapter_config.json")).unwrap();
    assert_fault(&case, "adapter_config.json lies beside the weights", "transformers would merge twice");
}

#[test]
fn repeated_layers_are_expected() {
    let mut case = Case::new()
        .set("layer_replication", json!([[0, 2], [1, 3]]))
        .model("num_hidden_layers", json!(3))
        .base("norm.weight", Tensor::new(BF16, &[6], 1));
    for layer in 0..4 {
        let at = |leaf: &str| format!("layers.{layer}.q.{leaf}weight");
        case = case
            .with(&at("lora_A."), Tensor::new(F32, &[2, 6], 10 + layer))
            .with(&at("lora_B."), Tensor::new(F32, &[4, 2], 20 + layer));
        if layer < 3 {
            case = case.base(&at(""), Tensor::new(BF16, &[4, 6], 30 + layer));
        }
    }
    case.save();
    merge(&case, "base", "adapter", "out");
    assert_eq!(verified(&case).1, [""; 0]);
    std::fs::write(case.path("out/config.json"), case.model.to_string()).unwrap();
    assert_fault(&case, "config.json says num_hidden_layers 3, and the merge has 4", "depth");
    merge(&case, "base", "adapter", "out");
    tamper(&case, |tensors| {
        let swapped = ["layers.1.q.weight", "layers.2.q.weight"].map(|name| tensors[name].clone());
        let [one, other] = swapped;
        tensors.extend([("layers.1.q.weight".to_owned(), other), ("layers.2.q.weight".to_owned(), one)]);
    });
    assert_fault(&case, "permuted: of layers.*.q.weight, 1 has that of 2, 2 has that of 1", "layers");
}

#[test]
fn an_untied_head_needs_a_config_that_says_so() {
    let case = Case::new()
        .base("embed_tokens.weight", Tensor::new(BF16, &[11, 6], 1))
        .with("lm_head.lora_A.weight", Tensor::new(F32, &[2, 6], 3))
        .with("lm_head.lora_B.weight", Tensor::new(F32, &[11, 2], 4))
        .set("target_modules", json!(["lm_head"]))
        .model("architectures", json!(["LlamaForCausalLM"]))
        .model("tie_word_embeddings", json!(true));
    case.save();
    merge(&case, "base", "adapter", "out");
    assert_eq!(verified(&case).1, [""; 0]);
    std::fs::write(case.path("out/config.json"), case.model.to_string()).unwrap();
    assert_fault(&case, "config.json ties the output head to the embedding", "tied");
}

#[test]
fn the_report_for_people_and_the_refusals() {
    let case = case(F32, Size::Large, 1);
    merge(&case, "base", "adapter@0.5", "out");
    let done = case.tool(&["verify", "base", "adapter", "out"]);
    assert_eq!(
        (done.code, done.stderr.as_str()),
        (
            1,
            "error: out is not base with the adapters merged in: one fault\nhint: peftrs-merge makes the merge that was expected\n"
        )
    );
    assert!(done.stdout.contains("fault: merged with 0.500 times the scale: all 27 tensors"), "{}", done.stdout);
    for arguments in [&["verify", "base", "out"][..], &["verify", "base"]] {
        assert_eq!(case.tool(arguments).code, 2, "{arguments:?}");
    }
    let done = case.tool(&["verify", "nowhere", "adapter", "out"]);
    assert_eq!((done.code, done.stdout.as_str()), (1, ""));
}
