//! Merged models of every kind, and what `verify` says of them.

use crate::common::{Case, Tensor, Tensors, read, write};
use safetensors::tensor::Dtype::{self, BF16, F16, F32};
use serde_json::{Value, json};

pub const EXPERTS: usize = 4;

/// How large the updates are beside weights in (-1, 1).
#[derive(Clone, Copy, Debug)]
pub enum Size {
    Large,
    Small,
    /// Most of the update is less than half a unit in the last place of a bf16 weight.
    Tiny,
}

pub const KINDS: [(Dtype, Size); 5] =
    [(F32, Size::Tiny), (BF16, Size::Large), (BF16, Size::Small), (BF16, Size::Tiny), (F16, Size::Small)];

/// A merged model of three layers whose queries, experts and stacks of experts are adapted.
pub fn case(dtype: Dtype, size: Size, seed: u64) -> Case {
    let (rank, alpha) = match size {
        Size::Large => (2, 2.0),
        Size::Small => (8, 0.16),
        Size::Tiny => (8, 0.01),
    };
    let mut case = Case::new()
        .set("r", json!(rank))
        .set("lora_alpha", json!(alpha))
        .set("target_modules", json!(["q", "w1"]))
        .set("target_parameters", json!(["mlp.stack"]))
        .base("norm.weight", Tensor::new(dtype, &[24], seed))
        .base("embed_tokens.weight", Tensor::new(dtype, &[50, 24], seed + 1));
    let mut next = seed * 1000;
    let mut tensor = |dtype, shape: &[usize]| {
        next += 1;
        Tensor::new(dtype, shape, next)
    };
    for layer in 0..3 {
        let at = |leaf: &str| format!("layers.{layer}.{leaf}");
        case = case.base(&at("k.weight"), tensor(dtype, &[20, 24]));
        let experts = (0..EXPERTS).map(|expert| format!("experts.{expert}.w1"));
        for leaf in std::iter::once("q".to_owned()).chain(experts) {
            case = case
                .base(&at(&format!("{leaf}.weight")), tensor(dtype, &[40, 24]))
                .with(&at(&format!("{leaf}.lora_A.weight")), tensor(F32, &[rank, 24]))
                .with(&at(&format!("{leaf}.lora_B.weight")), tensor(F32, &[40, rank]));
        }
        case = case
            .base(&at("mlp.stack"), tensor(dtype, &[EXPERTS, 40, 24]))
            .with(&at("mlp.lora_A.weight"), tensor(F32, &[EXPERTS * rank, 24]))
            .with(&at("mlp.lora_B.weight"), tensor(F32, &[40, EXPERTS * rank]));
    }
    case.save();
    merge(&case, "base", "adapter", "out");
    case
}

pub fn merge(case: &Case, base: &str, adapter: &str, out: &str) {
    let done = case.run(&[base, adapter, "-o", out, "--quiet", "--no-sync", "--overwrite"]);
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
}

/// The exit code, the faults and the whole report.
pub fn verified(case: &Case) -> (i32, Vec<String>, Value) {
    let done = case.tool(&["verify", "base", "adapter", "out", "--json"]);
    let report: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|_| panic!("{}", done.stderr));
    assert_eq!(report["right"] == true, done.code == 0, "{}", done.stderr);
    let faults = report["faults"].as_array().unwrap().iter().map(|fault| fault.as_str().unwrap().to_owned()).collect();
    (done.code, faults, report)
}

/// Asserts that the one fault found starts like that.
pub fn assert_fault(case: &Case, start: &str, about: &str) {
    let (code, faults, _) = verified(case);
    assert_eq!((code, faults.len()), (1, 1), "{about}: {faults:?}");
    assert!(faults[0].starts_with(start), "{about}: {faults:?}");
}

pub fn output(case: &Case) -> Tensors {
    read(&case.path("out/model.safetensors"))
}

/// Changes the merged tensors.
pub fn tamper(case: &Case, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = output(case);
    change(&mut tensors);
    write(&case.path("out/model.safetensors"), &tensors);
}

/// Runs the same on every kind of case.
pub fn everywhere(check: impl Fn(&Case, &str)) {
    for (seed, (dtype, size)) in (1..).zip(KINDS) {
        check(&case(dtype, size, seed), &format!("{dtype:?} {size:?}"));
    }
}
