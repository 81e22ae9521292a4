//! `peftrs verify`: every seeded fault is named, and nothing that is merely rounded otherwise.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{Case, Tensor, Tensors, read, round, write};
use safetensors::tensor::Dtype::{self, BF16, F16, F32};
use serde_json::{Value, json};

const EXPERTS: usize = 4;

/// How large the updates are beside weights in (-1, 1).
#[derive(Clone, Copy, Debug)]
enum Size {
    Large,
    Small,
    /// Most of the update is less than half a unit in the last place of a bf16 weight.
    Tiny,
}

const KINDS: [(Dtype, Size); 5] =
    [(F32, Size::Tiny), (BF16, Size::Large), (BF16, Size::Small), (BF16, Size::Tiny), (F16, Size::Small)];

/// A merged model of three layers whose queries, experts and stacks of experts are adapted.
fn case(dtype: Dtype, size: Size, seed: u64) -> Case {
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

fn merge(case: &Case, base: &str, adapter: &str, out: &str) {
    let done = case.run(&[base, adapter, "-o", out, "--quiet", "--no-sync", "--overwrite"]);
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
}

/// The exit code, the faults and the whole report.
fn verified(case: &Case) -> (i32, Vec<String>, Value) {
    let done = case.tool(&["verify", "base", "adapter", "out", "--json"]);
    let report: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|_| panic!("{}", done.stderr));
    assert_eq!(report["right"] == true, done.code == 0, "{}", done.stderr);
    let faults = report["faults"].as_array().unwrap().iter().map(|fault| fault.as_str().unwrap().to_owned()).collect();
    (done.code, faults, report)
}

/// Asserts that the one fault found starts like that.
fn assert_fault(case: &Case, start: &str, about: &str) {
    let (code, faults, _) = verified(case);
    assert_eq!((code, faults.len()), (1, 1), "{about}: {faults:?}");
    assert!(faults[0].starts_with(start), "{about}: {faults:?}");
}

fn output(case: &Case) -> Tensors {
    read(&case.path("out/model.safetensors"))
}

/// Changes the merged tensors.
fn tamper(case: &Case, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = output(case);
    change(&mut tensors);
    write(&case.path("out/model.safetensors"), &tensors);
}

/// Runs the same on every kind of case.
fn everywhere(check: impl Fn(&Case, &str)) {
    for (seed, (dtype, size)) in (1..).zip(KINDS) {
        check(&case(dtype, size, seed), &format!("{dtype:?} {size:?}"));
    }
}

#[test]
fn a_right_merge_is_right() {
    everywhere(|case, about| {
        let (code, faults, report) = verified(case);
        assert_eq!((code, faults.as_slice(), &report["untouched"]), (0, &[][..], &json!(5)), "{about}");
        let tensors = report["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), 3 * (1 + 2 * EXPERTS), "{about}");
        assert!(tensors.iter().all(|row| row["equal"] == row["elements"] && row["verdict"] == "right"), "{about}");
    });
    let case = case(BF16, Size::Small, 1);
    let done = case.tool(&["verify", "base", "adapter", "out"]);
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    let line =
        "27 of 27 changed tensors are right, 25,920 of 25,920 elements to the bit; 5 of 5 others are the base's\n";
    assert_eq!(done.stdout, line);
}

#[test]
fn other_roundings_are_right() {
    everywhere(|case, about| {
        // A tool that rounds the update before it adds, with factors in half the precision.
        let coarse = if case.tensors["norm.weight"].dtype == F32 { F32 } else { BF16 };
        let scaling = case.config["lora_alpha"].as_f64().unwrap() / case.config["r"].as_f64().unwrap();
        tamper(case, |tensors| {
            for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with("q.weight")) {
                let factor = |slot: &str| case.factor(&name.replace("weight", slot)).to(coarse);
                let (down, up) = (factor("lora_A.weight"), factor("lora_B.weight"));
                let rank = down.shape[0];
                for (index, value) in tensor.values.iter_mut().enumerate() {
                    let (row, column) = (index / 24, index % 24);
                    let product: f64 =
                        (0..rank).map(|k| up.values[row * rank + k] * down.values[k * 24 + column]).sum();
                    let update = round(coarse, round(coarse, product) * scaling);
                    *value = round(tensor.dtype, case.tensors[name].values[index] + update);
                }
            }
        });
        let (code, faults, report) = verified(case);
        assert_eq!((code, faults.as_slice()), (0, &[][..]), "{about}: {report}");
    });
}

#[test]
fn other_types_prefixes_and_files_are_right() {
    for to in [F32, F16, BF16] {
        let case = case(F32, Size::Large, 1);
        tamper(&case, |tensors| {
            let renamed = tensors.iter().map(|(name, tensor)| (format!("model.{name}"), tensor.to(to))).collect();
            *tensors = renamed;
        });
        assert_eq!(verified(&case).0, 0, "{to:?}");
        // In two files, with the tied head spelled out.
        let mut tensors = output(&case);
        std::fs::remove_file(case.path("out/model.safetensors")).unwrap();
        tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
        let mut map = serde_json::Map::new();
        for (index, (name, tensor)) in tensors.iter().enumerate() {
            let file = format!("model-{index}.safetensors");
            write(&case.path("out").join(&file), &[(name.clone(), tensor.clone())].into());
            map.insert(name.clone(), file.into());
        }
        let index = json!({"weight_map": map}).to_string();
        std::fs::write(case.path("out/model.safetensors.index.json"), index).unwrap();
        let (code, faults, report) = verified(&case);
        assert_eq!((code, faults.as_slice()), (0, &[][..]), "{report}");
        assert_eq!(report["notes"][0], "lm_head.weight is a copy of model.embed_tokens.weight");
    }
}

#[test]
fn not_merged_at_all() {
    everywhere(|case, about| {
        std::fs::copy(case.path("base/model.safetensors"), case.path("out/model.safetensors")).unwrap();
        assert_fault(case, "not merged at all: none of 27 tensors", about);
    });
}

#[test]
fn merged_twice() {
    everywhere(|case, about| {
        merge(case, "out", "adapter", "twice");
        std::fs::rename(case.path("twice/model.safetensors"), case.path("out/model.safetensors")).unwrap();
        assert_fault(case, "merged twice: all 27 tensors have ", about);
    });
}

#[test]
fn wrong_scale() {
    for factor in [0.5, 3.0] {
        everywhere(|case, about| {
            let weighted = format!("adapter@{factor}");
            merge(case, "base", &weighted, "out");
            assert_fault(case, "merged with ", &format!("{about} {factor}"));
            let found: f64 = verified(case).1[0].split(' ').nth(2).unwrap().parse().unwrap();
            assert!((found - factor).abs() < 0.04 * factor, "{about}: {found}");
            let done = case.tool(&["verify", "base", &weighted, "out"]);
            assert_eq!(done.code, 0, "{about}: the weight given is the weight merged");
        });
    }
    let case = case(BF16, Size::Small, 1);
    merge(&case, "base", "adapter@-1", "out");
    assert_fault(&case, "subtracted instead of merged: all 27 tensors", "-1");
}

#[test]
fn one_layer_missed() {
    everywhere(|case, about| {
        tamper(case, |tensors| {
            let name = "layers.1.q.weight";
            tensors.insert(name.into(), case.tensors[name].clone());
        });
        assert_fault(case, "1 of 27 tensors lack their change: layers.1.q.weight", about);
    });
}

#[test]
fn experts_permuted() {
    everywhere(|case, about| {
        // Whole experts of a stack, in a ring.
        let right = output(case);
        tamper(case, |tensors| {
            tensors.get_mut("layers.2.mlp.stack").unwrap().values.rotate_left(40 * 24);
        });
        let start =
            "permuted: of layers.2.mlp.stack.*, 0 has that of 1, 1 has that of 2, 2 has that of 3, 3 has that of 0";
        assert_fault(case, start, about);
        // Two experts that are tensors of their own.
        write(&case.path("out/model.safetensors"), &right);
        let name = |expert: usize| format!("layers.0.experts.{expert}.w1.weight");
        tamper(case, |tensors| {
            tensors.insert(name(1), right[&name(3)].clone());
            tensors.insert(name(3), right[&name(1)].clone());
        });
        assert_fault(case, "permuted: of layers.0.experts.*.w1.weight, 1 has that of 3, 3 has that of 1", about);
    });
}

#[test]
fn updates_of_experts_permuted() {
    for (dtype, size) in KINDS {
        let mut case = case(dtype, size, 7);
        let kept = case.adapter.clone();
        // The columns of the second factor read as if they were sorted by expert, where their ranks are.
        let rank: usize = case.config["r"].as_u64().unwrap().try_into().unwrap();
        for (key, tensor) in case.adapter.iter_mut().filter(|(key, _)| key.contains("mlp.lora_")) {
            let columns = tensor.values.len() / tensor.shape[0];
            if key.contains("lora_A") {
                tensor.values.rotate_left(rank * columns);
            } else {
                tensor
                    .values
                    .chunks_mut(columns)
                    .for_each(|row| row.chunks_mut(EXPERTS).for_each(|one| one.rotate_left(1)));
            }
        }
        case.save_adapter();
        merge(&case, "base", "adapter", "out");
        case.adapter = kept;
        case.save_adapter();
        let (code, faults, _) = verified(&case);
        assert_eq!((code, faults.len()), (1, 3), "{dtype:?} {size:?}: {faults:?}");
        assert!(
            faults.iter().all(|fault| fault.starts_with("permuted: of layers.") && fault.contains("0 has that of 1"))
        );
    }
}

#[test]
fn a_wrong_packing_of_experts_differs() {
    for (dtype, size) in KINDS {
        let mut case = case(dtype, size, 7);
        let kept = case.adapter.clone();
        let rank: usize = case.config["r"].as_u64().unwrap().try_into().unwrap();
        for (_, tensor) in case.adapter.iter_mut().filter(|(key, _)| key.contains("mlp.lora_B")) {
            for row in tensor.values.chunks_mut(EXPERTS * rank) {
                let old = row.to_vec();
                for (index, value) in row.iter_mut().enumerate() {
                    *value = old[(index % EXPERTS) * rank + index / EXPERTS];
                }
            }
        }
        case.save_adapter();
        merge(&case, "base", "adapter", "out");
        case.adapter = kept;
        case.save_adapter();
        assert_eq!(verified(&case).0, 1, "{dtype:?} {size:?}");
    }
}

#[test]
fn other_faults() {
    let fault = |start: &str, change: &dyn Fn(&mut Tensors)| {
        let case = case(BF16, Size::Small, 1);
        tamper(&case, change);
        assert_fault(&case, start, start);
    };
    fault("1 tensors changed that the adapter leaves alone: norm.weight", &|tensors| {
        tensors.get_mut("norm.weight").unwrap().values[3] += 1.0;
    });
    fault("1 tensors are not finite: layers.0.q.weight", &|tensors| {
        tensors.get_mut("layers.0.q.weight").unwrap().values[3] = f64::NAN;
    });
    fault("1 tensors are missing: layers.0.q.weight", &|tensors| {
        tensors.remove("layers.0.q.weight");
    });
    fault("1 tensors should not be there: more.weight", &|tensors| {
        tensors.insert("more.weight".into(), Tensor::new(BF16, &[3], 1));
    });
    fault("1 tensors differ in a way", &|tensors| {
        let tensor = tensors.get_mut("layers.0.q.weight").unwrap();
        *tensor = Tensor::new(BF16, &tensor.shape, 77);
    });
    fault("layers.0.q.weight is BF16 [24, 40], not BF16 [40, 24]", &|tensors| {
        tensors.get_mut("layers.0.q.weight").unwrap().shape.reverse();
    });
    fault("23 of 23 tensors are not there", &|tensors| {
        *tensors = tensors.iter().map(|(name, tensor)| (name.replace('.', "_"), tensor.clone())).collect();
    });
}

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
