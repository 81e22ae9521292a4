//! What is right, however it was rounded, named or split.

use crate::common::{Tensor, round, write};
use crate::support::{EXPERTS, Size, case, everywhere, merge, output, tamper, verified};
use safetensors::tensor::Dtype::{BF16, F16, F32};
use serde_json::json;

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
fn what_models_tie_or_compute_may_be_missing_or_more() {
    let case = case(BF16, Size::Small, 1)
        .base("layers.0.attn.rotary_emb.inv_freq", Tensor::new(F32, &[4], 1))
        .base("h.0.attn.bias", Tensor::new(F32, &[1, 1, 3, 3], 2))
        .base("cls.bias", Tensor::new(F32, &[7], 3))
        .base("cls.decoder.bias", Tensor::new(F32, &[7], 3));
    case.save();
    merge(&case, "base", "adapter", "out");
    let full = output(&case);
    tamper(&case, |tensors| {
        for name in ["layers.0.attn.rotary_emb.inv_freq", "h.0.attn.bias", "cls.decoder.bias"] {
            tensors.remove(name).unwrap();
        }
    });
    let (_, faults, report) = verified(&case);
    assert_eq!(faults, [""; 0]);
    assert_eq!(report["notes"], json!(["cls.decoder.bias is left out, being a copy of cls.bias"]));
    // The other way round, in a base that was saved without them.
    write(&case.path("base/model.safetensors"), &{
        let mut tensors = case.tensors.clone();
        tensors.retain(|name, _| output(&case).contains_key(name));
        tensors
    });
    write(&case.path("out/model.safetensors"), &full);
    assert_eq!(verified(&case).1, [""; 0]);
}

#[test]
fn several_adapters_with_weights() {
    let case = case(F32, Size::Small, 1);
    std::fs::rename(case.path("adapter"), case.path("first")).unwrap();
    let mut other = case;
    for (index, (_, tensor)) in (100..).zip(&mut other.adapter) {
        *tensor = Tensor::new(F32, &tensor.shape, index);
    }
    other.save();
    std::fs::rename(other.path("adapter"), other.path("second")).unwrap();
    let merged = other.run(&["base", "first@0.3", "second", "-o", "out", "--quiet", "--no-sync", "--overwrite"]);
    assert_eq!((merged.code, merged.stderr.as_str()), (0, ""));
    for (adapters, code) in [(&["first@0.3", "second"][..], 0), (&["first", "second"], 1), (&["second"], 1)] {
        let done = other.tool(&[&["verify", "base"], adapters, &["out"]].concat());
        assert_eq!(done.code, code, "{adapters:?}: {}", done.stdout);
    }
}
