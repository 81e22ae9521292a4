//! Taking adapters out of a merged checkpoint again.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::float_cmp, reason = "tests")]

mod common;

use common::{Case, Tensor, Tensors, read};
use safetensors::tensor::Dtype::{self, BF16, F16, F32};
use serde_json::{Value, json};

fn case(dtype: Dtype) -> Case {
    let case = Case::new()
        .base("l.q.weight", Tensor::new(dtype, &[40, 60], 1))
        .base("l.norm.weight", Tensor::new(dtype, &[60], 2))
        .with("l.q.lora_A.weight", Tensor::new(F32, &[2, 60], 3))
        .with("l.q.lora_B.weight", Tensor::new(F32, &[40, 2], 4));
    case.save();
    case
}

fn run(case: &Case, arguments: &[&str]) -> String {
    let output = case.run(&[arguments, &["--no-sync", "--overwrite"]].concat());
    assert_eq!(output.code, 0, "{}", output.stderr);
    output.stderr
}

fn refused(case: &Case, arguments: &[&str]) -> String {
    let output = case.run(&[arguments, &["--no-sync"]].concat());
    assert_eq!(output.code, 1, "{}", output.stderr);
    output.stderr
}

fn tensors(case: &Case, folder: &str) -> Tensors {
    read(&case.path(folder).join("model.safetensors"))
}

#[test]
fn what_was_kept_or_the_base_restores_every_bit() {
    for dtype in [BF16, F16, F32] {
        let case = case(dtype);
        let file = |folder: &str| std::fs::read(case.path(folder).join("model.safetensors")).unwrap();
        run(&case, &["base", "adapter@0.5", "-o", "merged", "--keep-restore", "--check"]);
        assert!(file("merged") != file("base"));
        let kept = read(&case.path("merged/peftrs-restore/base.safetensors"));
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["l.q.weight"]);
        let said = run(&case, &["--unmerge", "merged", "adapter", "-o", "out", "--check"]);
        assert!(said.contains("taken out into out: 1 of 2 tensors changed") && !said.contains("subtraction"), "{said}");
        assert!(file("out") == file("base"));
        assert!(!case.path("out/peftrs-restore").exists());
        assert!(
            std::fs::read_to_string(case.path("out/README.md")).unwrap().contains("# merged with adapter taken out")
        );
        std::fs::remove_dir_all(case.path("merged/peftrs-restore")).unwrap();
        run(&case, &["--unmerge", "merged", "adapter", "-o", "out", "--base", "base"]);
        assert!(file("out") == file("base"));
    }
}

#[test]
fn a_head_that_was_untied_is_tied_again() {
    let case = Case::new()
        .base("model.embed_tokens.weight", Tensor::new(BF16, &[8, 6], 1))
        .base("model.norm.weight", Tensor::new(BF16, &[6], 2))
        .with("model.embed_tokens.lora_embedding_A", Tensor::new(F32, &[2, 8], 3))
        .with("model.embed_tokens.lora_embedding_B", Tensor::new(F32, &[6, 2], 4))
        .set("target_modules", json!(["embed_tokens"]))
        .model("architectures", json!(["LlamaForCausalLM"]))
        .model("tie_word_embeddings", json!(true));
    case.save();
    run(&case, &["base", "adapter", "-o", "merged", "--keep-restore"]);
    assert!(tensors(&case, "merged").contains_key("lm_head.weight"));
    for base in [&[][..], &["--base", "base"]] {
        run(&case, &[&["--unmerge", "merged", "adapter", "-o", "out"], base].concat());
        assert_eq!(tensors(&case, "out"), case.tensors);
        let config: Value = serde_json::from_slice(&std::fs::read(case.path("out/config.json")).unwrap()).unwrap();
        assert_eq!(config, case.model);
    }
}

#[test]
fn a_subtraction_tells_what_it_leaves_open() {
    for dtype in [BF16, F16, F32] {
        let case = case(dtype);
        run(&case, &["base", "adapter@0.5", "-o", "merged"]);
        let said = run(&case, &["--unmerge", "merged", "adapter", "-o", "out"]);
        let (base, merged, out) = (tensors(&case, "base"), tensors(&case, "merged"), tensors(&case, "out"));
        assert_eq!(base["l.norm.weight"], out["l.norm.weight"]);
        let [base, merged, out] = [base, merged, out].map(|tensors| tensors["l.q.weight"].values.clone());
        let digits = if dtype == BF16 {
            8
        } else if dtype == F16 {
            11
        } else {
            24
        };
        let grid = |value: f64| value.abs().log2().floor() - f64::from(digits - 1);
        let (mut differ, mut open) = (0, 0);
        for ((base, merged), out) in base.iter().zip(&merged).zip(&out) {
            // Next to a power of two, the grid towards zero is the finer one.
            let finer = if out.abs().log2().fract() == 0.0 { 1.0 } else { 0.0 };
            let is_open = grid(*merged) > grid(*out) - finer;
            open += usize::from(is_open);
            differ += usize::from(base != out);
            assert!(base == out || is_open, "{base} became {out} by way of {merged}");
            assert!((base - out).abs() < grid(*merged).exp2(), "{base} became {out} by way of {merged}");
        }
        let expected = format!("taken out by subtraction: {open} of 2400 changed values (");
        assert!(said.contains(&expected), "{said} for {expected}");
        assert!(differ > 100 && open < 2000, "{differ} differ, {open} are open");
    }
}

#[test]
fn of_several_adapters_one_is_subtracted_with_the_weight_it_had() {
    let case = case(F32);
    std::fs::rename(case.path("adapter"), case.path("first")).unwrap();
    let second = case.set("lora_alpha", json!(1)).with("l.q.lora_B.weight", Tensor::new(F32, &[40, 2], 9));
    second.save();
    run(&second, &["base", "first@2", "-o", "one"]);
    run(&second, &["base", "first@2", "adapter@-0.5", "-o", "both", "--keep-restore"]);
    let said = run(&second, &["--unmerge", "both", "adapter", "-o", "out"]);
    assert!(said.contains("taken out by subtraction"), "{said}");
    let (one, out) = (tensors(&second, "one"), tensors(&second, "out"));
    let pairs = one["l.q.weight"].values.iter().zip(&out["l.q.weight"].values);
    assert!(pairs.clone().all(|(one, out)| (one - out).abs() < 1e-5) && pairs.clone().any(|(one, out)| one == out));
    let said = refused(&second, &["--unmerge", "both", "adapter", "-o", "no", "--base", "base"]);
    assert_eq!(said, "error: both also holds first\nhint: merge these into the base again instead\n");
    run(&second, &["--unmerge", "both", "adapter", "first", "-o", "out"]);
    assert_eq!(tensors(&second, "out"), second.tensors);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let case = case(BF16);
    std::fs::rename(case.path("adapter"), case.path("first")).unwrap();
    let case = case.set("r", json!(2)).with("l.q.lora_B.weight", Tensor::new(F32, &[40, 2], 9));
    case.save();
    run(&case, &["base", "first", "-o", "merged"]);
    let said = refused(&case, &["--unmerge", "merged", "adapter", "-o", "out"]);
    assert_eq!(said, "error: adapter is not among what was merged into merged\nhint: that was first\n");
    let other = case.base("l.norm.weight", Tensor::new(BF16, &[60], 77));
    common::write(&other.path("base/model.safetensors"), &other.tensors);
    let said = refused(&other, &["--unmerge", "merged", "first", "-o", "out", "--base", "base"]);
    assert!(said.starts_with("error: merged/model.safetensors is no merge into base: l.norm.weight differs"), "{said}");
    std::fs::remove_file(other.path("merged/peftrs-merge.json")).unwrap();
    let said = refused(&other, &["--unmerge", "merged", "first", "-o", "out", "--base", "base"]);
    assert!(said.contains("was not merged by peftrs") && said.contains("hint: leave out --base"), "{said}");
    assert!(!other.path("out").exists());
}

#[test]
fn what_multiplies_is_not_subtracted() {
    let case =
        case(BF16).set("use_dora", json!(true)).with("l.q.lora_magnitude_vector", Tensor::filled(F32, &[40], 2.0));
    case.save();
    run(&case, &["base", "adapter", "-o", "merged"]);
    let said = refused(&case, &["--unmerge", "merged", "adapter", "-o", "out"]);
    assert!(said.starts_with("error: l.q.weight cannot be undone by subtraction: DoRA rank 2"), "{said}");
    run(&case, &["--unmerge", "merged", "adapter", "-o", "out", "--base", "base"]);
    assert_eq!(tensors(&case, "out"), case.tensors);
}
