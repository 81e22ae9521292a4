//! The grammar of adapter tensor names: in a file `base_model.model.<module>.<slot>`, in memory with the adapter's name.
//!
//! A slot is what a tensor is for its module, spelled as in the file: `lora_A.weight`, `lora_embedding_A`, `ia3_l`,
//! `oft_R.weight`, `lora_magnitude_vector`, `token_adapter.trainable_tokens_delta`. In memory each kind of tensor is kept
//! by adapter name, so that the name follows the kind: `lora_A.default.weight`, `lora_embedding_A.default`.

/// What every key of a wrapped model's adapter starts with.
pub const PREFIX: &str = "base_model.model.";

/// What the keys of tensors that a whole model shares start with.
const SHARED_PREFIX: &str = "base_model.";

/// The component under which a layer that an adapter wraps is kept.
pub const BASE_LAYER: &str = "base_layer";

/// The component under which whole modules are kept by adapter name.
pub const MODULES_TO_SAVE: &str = "modules_to_save";

/// The component under which such a module is kept as it was before training.
pub const ORIGINAL_MODULE: &str = "original_module";

/// The wrapper that lies between an embedding and its trained rows.
const TOKEN_ADAPTER: &str = "token_adapter";

/// A magnitude is kept in memory as a small layer, which a file does not show.
const MAGNITUDE: &str = "lora_magnitude_vector";

/// A key taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key<'a> {
    /// The module's path in the base model; empty for a tensor that the whole model shares.
    pub module: &'a str,
    /// What the tensor is for the module.
    pub slot: &'a str,
}

/// The module and slot of a file's key, or none if it ends in none of `slots`.
///
/// The longest slot that fits is taken. Keys without the prefix, as an adapter injected into a model has them, are read as well.
#[must_use]
pub fn parse<'a>(key: &'a str, slots: &[&str]) -> Option<Key<'a>> {
    let path = key.strip_prefix(PREFIX).or_else(|| key.strip_prefix(SHARED_PREFIX)).unwrap_or(key);
    longest(slots.iter().filter_map(|slot| split(path, slot)))
}

/// The key under which a file holds the tensor.
#[must_use]
pub fn spell(module: &str, slot: &str) -> String {
    if module.is_empty() { format!("{SHARED_PREFIX}{slot}") } else { format!("{PREFIX}{module}.{slot}") }
}

/// The name in memory, relative to the base model.
#[must_use]
pub fn in_memory(module: &str, slot: &str, adapter: &str) -> String {
    let tail = tail(slot, adapter);
    if module.is_empty() { tail } else { format!("{module}.{tail}") }
}

/// The module and slot of a name in memory, or none if it is no slot of that adapter's.
#[must_use]
pub fn parse_in_memory<'a>(name: &'a str, slots: &[&'a str], adapter: &str) -> Option<Key<'a>> {
    longest(slots.iter().filter_map(|slot| Some(Key { module: split(name, &tail(slot, adapter))?.module, slot })))
}

/// The name in memory of a parameter of a module that is trained and saved whole; a file has `<module>.<parameter>`.
#[must_use]
pub fn saved_in_memory(module: &str, parameter: &str, adapter: &str) -> String {
    format!("{module}.{MODULES_TO_SAVE}.{adapter}.{parameter}")
}

/// The module and parameter of a name that [`saved_in_memory`] spells, or none if it is no such name of that adapter's.
#[must_use]
pub fn parse_saved<'a>(name: &'a str, adapter: &str) -> Option<(&'a str, &'a str)> {
    let (module, parameter) = name.split_once(&format!(".{MODULES_TO_SAVE}.{adapter}."))?;
    (!module.is_empty() && !parameter.is_empty()).then_some((module, parameter))
}

/// `path` without its `base_layer` components, which only a wrapped model has.
#[must_use]
pub fn without_base_layer(path: &str) -> String {
    path.split('.').filter(|part| *part != BASE_LAYER).collect::<Vec<_>>().join(".")
}

/// The end of a slot's name in memory.
fn tail(slot: &str, adapter: &str) -> String {
    if slot == MAGNITUDE {
        return format!("{slot}.{adapter}.weight");
    }
    // The adapter's name follows the container that is kept by adapter name: the first component, but for the wrapper.
    let (wrapper, kind) = match slot.split_once('.') {
        Some((TOKEN_ADAPTER, kind)) => (format!("{TOKEN_ADAPTER}."), kind),
        _ => (String::new(), slot),
    };
    match kind.split_once('.') {
        Some((container, rest)) => format!("{wrapper}{container}.{adapter}.{rest}"),
        None => format!("{wrapper}{kind}.{adapter}"),
    }
}

fn split<'a>(path: &'a str, slot: &str) -> Option<Key<'a>> {
    let module = path.strip_suffix(slot)?;
    let slot = path.get(module.len()..)?;
    if module.is_empty() {
        return Some(Key { module, slot });
    }
    let module = module.strip_suffix('.')?;
    (!module.is_empty()).then_some(Key { module, slot })
}

fn longest<'a>(found: impl Iterator<Item = Key<'a>>) -> Option<Key<'a>> {
    found.max_by_key(|key| key.slot.len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use proptest::prelude::*;

    use super::*;

    const SLOTS: [&str; 10] = [
        "lora_A.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_magnitude_vector",
        "token_adapter.trainable_tokens_delta",
        "trainable_tokens_delta",
        "ia3_l",
        "oft_R.weight",
        "peanut_encoders.0.weight",
        "vera_lambda_b",
    ];

    fn key<'a>(module: &'a str, slot: &'a str) -> Key<'a> {
        Key { module, slot }
    }

    #[test]
    fn keys_as_files_have_them() {
        let cases = [
            ("base_model.model.lin0.lora_A.weight", Some(key("lin0", "lora_A.weight"))),
            (
                "base_model.model.mha.base_layer.out_proj.lora_A.weight",
                Some(key("mha.base_layer.out_proj", "lora_A.weight")),
            ),
            ("base_model.model.model.model.q.ia3_l", Some(key("model.model.q", "ia3_l"))),
            ("base_model.vera_lambda_b", Some(key("", "vera_lambda_b"))),
            ("layers.0.q.oft_R.weight", Some(key("layers.0.q", "oft_R.weight"))),
            (
                "base_model.model.e.token_adapter.trainable_tokens_delta",
                Some(key("e", "token_adapter.trainable_tokens_delta")),
            ),
            ("base_model.model.e.trainable_tokens_delta", Some(key("e", "trainable_tokens_delta"))),
            ("base_model.model.my_ia3_l", None),
            ("base_model.model..ia3_l", None),
            ("base_model.model.lin0.lora_A", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text, &SLOTS), expected, "{text}");
        }
    }

    #[test]
    fn names_in_memory_have_the_adapter_after_the_container() {
        let cases = [
            ("lora_A.weight", "q.lora_A.default.weight"),
            ("lora_embedding_A", "q.lora_embedding_A.default"),
            ("lora_magnitude_vector", "q.lora_magnitude_vector.default.weight"),
            ("token_adapter.trainable_tokens_delta", "q.token_adapter.trainable_tokens_delta.default"),
            ("peanut_encoders.0.weight", "q.peanut_encoders.default.0.weight"),
        ];
        for (slot, name) in cases {
            assert_eq!(in_memory("q", slot, "default"), name);
        }
        assert_eq!(parse_in_memory("q.lora_A.other.weight", &SLOTS, "default"), None);
    }

    #[test]
    fn saved_modules_go_both_ways() {
        let name = saved_in_memory("model.head", "out.bias", "default");
        assert_eq!(name, "model.head.modules_to_save.default.out.bias");
        assert_eq!(parse_saved(&name, "default"), Some(("model.head", "out.bias")));
        assert_eq!(parse_saved(&name, "other"), None);
    }

    #[test]
    fn base_layers_are_dropped_by_component() {
        assert_eq!(without_base_layer("a.base_layer.my_base_layer.base_layer.bias"), "a.my_base_layer.bias");
    }

    fn component() -> impl Strategy<Value = String> {
        prop_oneof![3 => "[a-zA-Z_0-9]{1,6}", 1 => Just("base_layer".to_owned()), 1 => Just("default".to_owned())]
    }

    proptest! {
        #[test]
        fn both_spellings_round_trip(
            parts in prop::collection::vec(component(), 1..6), slot in prop::sample::select(&SLOTS[..]), adapter in component(),
        ) {
            let module = parts.join(".");
            // `x.token_adapter` with the shorter slot is spelled as `x` with the longer one.
            prop_assume!(!module.ends_with("token_adapter") && !module.starts_with("base_model"));
            let (in_file, in_memory) = (spell(&module, slot), in_memory(&module, slot, &adapter));
            prop_assert_eq!(parse(&in_file, &SLOTS), Some(key(&module, slot)));
            prop_assert_eq!(parse_in_memory(&in_memory, &SLOTS, &adapter), Some(key(&module, slot)));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,40}") {
            if let Some(found) = parse(&text, &SLOTS) {
                prop_assert!(text.ends_with(found.slot));
            }
        }
    }
}
