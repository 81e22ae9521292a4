//! The grammar of an adapter file's tensor names: `base_model.model.<module>.<slot>`.
//!
//! A slot is what a tensor is for its module: `lora_A.weight`, `lora_embedding_A`, `ia3_l`, `oft_R.weight`,
//! `lora_magnitude_vector`, `token_adapter.trainable_tokens_delta`.

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

/// `path` without its `base_layer` components, which only a wrapped model has.
#[must_use]
pub fn without_base_layer(path: &str) -> String {
    path.split('.').filter(|part| *part != BASE_LAYER).collect::<Vec<_>>().join(".")
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
    fn base_layers_are_dropped_by_component() {
        assert_eq!(without_base_layer("a.base_layer.my_base_layer.base_layer.bias"), "a.my_base_layer.bias");
    }

    fn component() -> impl Strategy<Value = String> {
        prop_oneof![3 => "[a-zA-Z_0-9]{1,6}", 1 => Just("base_layer".to_owned()), 1 => Just("default".to_owned())]
    }

    proptest! {
        #[test]
        fn keys_are_taken_apart_at_their_slot(
            parts in prop::collection::vec(component(), 1..6), slot in prop::sample::select(&SLOTS[..]),
        ) {
            let module = parts.join(".");
            // `x.token_adapter` with the shorter slot is spelled as `x` with the longer one.
            prop_assume!(!module.ends_with("token_adapter") && !module.starts_with("base_model"));
            let text = format!("{PREFIX}{module}.{slot}");
            prop_assert_eq!(parse(&text, &SLOTS), Some(key(&module, slot)));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,40}") {
            if let Some(found) = parse(&text, &SLOTS) {
                prop_assert!(text.ends_with(found.slot));
            }
        }
    }
}
