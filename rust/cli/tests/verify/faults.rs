//! What goes wrong with merges, each named.

use crate::common::{Tensor, Tensors, write};
use crate::support::{EXPERTS, KINDS, Size, assert_fault, case, everywhere, merge, output, tamper, verified};
use safetensors::tensor::Dtype::BF16;

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
