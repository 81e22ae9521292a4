//! Tensors that an adapter holds in full: each goes to its place in the base, or the merge is refused and nothing written.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor, read, write};
use safetensors::tensor::Dtype::F32;
use serde_json::json;

const Q: &str = "model.layers.0.q";

/// A Llama whose query is adapted and whose head is declared as trained whole.
fn llama() -> Case {
    factors(base(), Q)
}

fn base() -> Case {
    Case::new()
        .model("architectures", json!(["LlamaForCausalLM"]))
        .model("tie_word_embeddings", json!(false))
        .set("modules_to_save", json!(["lm_head"]))
        .base("model.embed_tokens.weight", Tensor::new(F32, &[9, 6], 1))
        .base("model.layers.0.q.weight", Tensor::new(F32, &[4, 6], 2))
        .base("model.norm.weight", Tensor::new(F32, &[6], 3))
        .base("lm_head.weight", Tensor::new(F32, &[9, 6], 4))
}

fn factors(case: Case, path: &str) -> Case {
    case.with(&format!("{path}.lora_A.weight"), Tensor::new(F32, &[2, 6], 5))
        .with(&format!("{path}.lora_B.weight"), Tensor::new(F32, &[4, 2], 6))
}

fn head(value: f64) -> Tensor {
    Tensor::filled(F32, &[9, 6], value)
}

/// The names of the merged tensors, which are the base's.
fn names(case: &Case) -> Vec<&String> {
    case.tensors.keys().collect()
}

#[test]
fn a_tensor_under_a_name_that_the_base_lacks_is_refused_with_a_way_out() {
    let rows = |key: &str| llama().with(key, head(1.0));
    let one = |key: &str, shape: &[usize]| llama().with(key, Tensor::filled(F32, shape, 1.0));
    let name = "hint: name the tensor as the base does, or leave it out of the file";
    let convert = "hint: the file is another tool's, such as kohya's or ComfyUI's: convert it to PEFT's format\n";
    for (case, key, what, hint) in [
        (rows("lm_head.modules_to_save.weight"), "lm_head.modules_to_save.weight", "", name),
        (rows("lm_head.modules_to_save.default.weight"), "lm_head.modules_to_save.default.weight", "", name),
        (rows("lm_head.original_module.weight"), "lm_head.original_module.weight", "", name),
        (rows("_orig_mod.lm_head.weight"), "_orig_mod.lm_head.weight", " (the base has lm_head.weight)", name),
        (rows("embed_tokens.weight"), "embed_tokens.weight", " (the base has model.embed_tokens.weight)", name),
        (
            rows("model.language_model.embed_tokens.weight"),
            "model.language_model.embed_tokens.weight",
            " (the base has model.embed_tokens.weight)",
            name,
        ),
        (
            rows("transformer.wte.weight").set("modules_to_save", json!(["wte"])),
            "transformer.wte.weight",
            " (the base has model.embed_tokens.weight)",
            name,
        ),
        (one("lm_head.bias", &[9]), "lm_head.bias", "", name),
        (
            one("model.layers.0.q.alpha", &[]),
            "model.layers.0.q.alpha",
            " (a LoRA's alpha, which PEFT keeps in its config)",
            convert,
        ),
        (
            one("model.layers.0.q.dora_scale", &[4, 1]),
            "model.layers.0.q.dora_scale",
            " (DoRA's magnitudes, which PEFT calls lora_magnitude_vector)",
            convert,
        ),
        (one("model.layers.0.q.diff_b", &[4]), "model.layers.0.q.diff_b", " (a difference of biases)", convert),
        (
            one("model.layers.0.q.base_layer.bias", &[4]).set("bias", json!("lora_only")),
            "model.layers.0.q.base_layer.bias",
            "",
            name,
        ),
    ] {
        let message = case.refused();
        let start = "error: adapter/adapter_model.safetensors does not fit base/model.safetensors: ";
        let said = format!("{start}1 adapter tensors have no home in the base: base_model.model.{key}{what}\n{hint}");
        assert!(message.starts_with(&said), "{message}");
    }
}

#[test]
fn the_untrained_copy_beside_a_trained_module_is_left_out_and_told() {
    let case = llama().with("lm_head.weight", head(1.0)).with("lm_head.original_module.weight", head(2.0));
    let merged = case.merged();
    assert_eq!(merged.keys().collect::<Vec<_>>(), names(&case));
    assert_eq!(merged["lm_head.weight"], head(1.0));
    let told = case.run(&["base", "adapter", "-o", "other"]).stderr;
    assert!(
        told.contains(
            "note: base_model.model.lm_head.original_module.weight is left out: the adapter holds the module as it was \
             trained as well\n"
        ),
        "{told}"
    );
}

#[test]
fn a_prefix_that_the_adapter_lacks_is_not_put_before_what_the_base_has_at_its_top() {
    let case =
        factors(base(), "layers.0.q").with("lm_head.weight", head(1.0)).with("norm.weight", Tensor::new(F32, &[6], 7));
    let case = case.set("modules_to_save", json!(["lm_head", "norm"]));
    let merged = case.merged();
    assert_eq!(merged.keys().collect::<Vec<_>>(), names(&case));
    assert_eq!((&merged["lm_head.weight"], &merged["model.norm.weight"]), (&head(1.0), case.factor("norm.weight")));
    assert_ne!(merged["model.layers.0.q.weight"], case.tensors["model.layers.0.q.weight"]);

    let case = factors(base(), "layers.0.q")
        .with("lm_head.lora_A.weight", Tensor::new(F32, &[2, 6], 8))
        .with("lm_head.lora_B.weight", Tensor::new(F32, &[9, 2], 9));
    let merged = case.merged();
    assert_eq!(merged.keys().collect::<Vec<_>>(), names(&case));
    assert_ne!(merged["lm_head.weight"], case.tensors["lm_head.weight"]);
}

#[test]
fn a_declared_module_that_the_base_lacks_is_new_and_told() {
    let case = llama()
        .set("modules_to_save", json!(["classifier"]))
        .with("classifier.dense.weight", Tensor::new(F32, &[6, 6], 7))
        .with("classifier.dense.bias", Tensor::new(F32, &[6], 8));
    let merged = case.merged();
    assert_eq!(merged.len(), 6);
    assert_eq!(&merged["classifier.dense.bias"], case.factor("classifier.dense.bias"));
    let told = case.run(&["base", "adapter", "-o", "other"]).stderr;
    assert!(
        told.contains(
            "note: classifier.dense.bias, classifier.dense.weight: new to the base, of a module that the adapter trained \
             whole (modules_to_save)\n"
        ),
        "{told}"
    );
    for (declared, key) in [
        ("score", "classifier.weight"),
        ("classifier", "_orig_mod.classifier.weight"),
        ("classifier", "classifier.modules_to_save.weight"),
        ("classifier", "classifier.original_module.weight"),
        ("classifier", "classifier.running_mean"),
        ("norm", "model.norm.inner.weight"),
    ] {
        let case = llama().set("modules_to_save", json!([declared])).with(key, Tensor::new(F32, &[6, 6], 7));
        let message = case.refused();
        assert!(message.contains(&format!("no home in the base: base_model.model.{key}\n")), "{message}");
    }
}

#[test]
fn a_tied_head_has_the_shape_of_its_embedding() {
    let mut case = llama().model("tie_word_embeddings", json!(true)).with("lm_head.weight", head(1.0));
    case.tensors.remove("lm_head.weight");
    assert_eq!(case.merged()["lm_head.weight"], head(1.0));
    std::fs::remove_dir_all(case.path("out")).unwrap();
    let message = case.with("lm_head.weight", Tensor::new(F32, &[9, 5], 1)).refused();
    assert!(message.contains("base_model.model.lm_head.weight [9, 5], in the base [9, 6]"), "{message}");
}

#[test]
fn verify_refuses_an_adapter_whose_tensors_earlier_merges_left_in_the_output() {
    let case = llama().with("lm_head.modules_to_save.weight", head(1.0));
    let mut junk = llama().merged();
    junk.insert("lm_head.modules_to_save.weight".into(), head(1.0));
    case.save();
    std::fs::create_dir(case.path("out")).unwrap();
    write(&case.path("out/model.safetensors"), &junk);
    std::fs::copy(case.path("base/config.json"), case.path("out/config.json")).unwrap();
    let done = case.tool(&["verify", "base", "adapter", "out"]);
    assert_eq!((done.code, done.stdout.as_str()), (1, ""));
    assert!(
        done.stderr.contains("no home in the base: base_model.model.lm_head.modules_to_save.weight"),
        "{}",
        done.stderr
    );
    assert_eq!(read(&case.path("out/model.safetensors")), junk);
}
