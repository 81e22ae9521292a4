//! What this tool does not merge, said before anything else is looked at.

use serde_json::Value;

use super::adapter::Adapter;
use super::draft::{Draft, Drafts};
use crate::config::{AdapterConfig, Init, Method, OftFields};
use crate::error::{Error, Result, show_name};

/// Starts that are taken out of the base when training begins, so that the adapter alone is not what was trained.
const RESIDUAL: [&str; 5] = ["pissa", "olora", "corda", "lora_ga", "loftq"];

const CONVERT: &str = "run the peftrs-merge of the Python package, or save the adapter with \
                       path_initial_model_for_weight_conversion, which makes it a plain LoRA";

/// Variants whose update is not one weight.
const ONLINE: [&str; 3] = ["use_qalora", "alora_invocation_tokens", "arrow_config"];

const IN_PYTHON: &str =
    "run the peftrs-merge of the Python package, or PeftModel.from_pretrained(...).merge_and_unload()";

/// Refuses an adapter whose method or variant nobody at hand can compute, and a base whose weights are packed.
pub fn check(adapter: &Adapter, model: Option<&Value>) -> Result<()> {
    check_config(&adapter.config, adapter.apply.is_some(), model)
}

fn check_config(config: &AdapterConfig, can_elsewhere: bool, model: Option<&Value>) -> Result<()> {
    if let Some(name) = config.lora().and_then(|lora| lora.variants.iter().find(|name| ONLINE.contains(name))) {
        let way = "its update depends on the input, load it as an adapter";
        return Err(refused(&format!("adapters with {name} are"), way));
    }
    if let Some((what, way)) = elsewhere(config).filter(|_| !can_elsewhere) {
        return Err(refused(&what, way));
    }
    if let Method::Oft(OftFields { doubt: Some(doubt), .. }) = &config.method {
        return Err(Error::Merge(format!("the OFT adapter {doubt}")));
    }
    if let Some(method) = model.and_then(|model| model.get("quantization_config")).filter(|method| method.is_object()) {
        let name = method.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method");
        let way = "merge into the checkpoint that it was made from, and quantize the result";
        return Err(refused(&format!("bases quantized by {} are", show_name(name)), way));
    }
    Ok(())
}

/// What of an adapter has no kernel here, and what to do without one.
pub fn elsewhere(config: &AdapterConfig) -> Option<(String, &'static str)> {
    match &config.method {
        Method::Lora(lora) => match (&lora.init_lora_weights, lora.variants.first()) {
            (_, Some(name)) => Some((format!("adapters with {name} are"), IN_PYTHON)),
            (Init::Named(start), None)
                if RESIDUAL.iter().any(|known| start.to_ascii_lowercase().starts_with(known)) =>
            {
                Some((format!("adapters with init_lora_weights={} are", show_name(start)), CONVERT))
            }
            _ => None,
        },
        Method::Ia3(_) | Method::Oft(_) => None,
        Method::Other(_) => Some((format!("adapters of type {} are", show_name(&config.peft_type)), IN_PYTHON)),
    }
}

/// Refuses a weight other than 1 for an adapter that does more than add to weights.
pub fn check_weight(adapter: &Adapter, drafts: &Drafts) -> Result<()> {
    let adds = |draft: &Draft| draft.whole.is_none() && draft.updates.iter().all(|update| update.change.is_additive());
    let Some((name, _)) = drafts.iter().find(|(_, draft)| !adds(draft)).filter(|_| !is_one(adapter.weight)) else {
        return Ok(());
    };
    Err(Error::Merge(format!(
        "{} cannot have the weight {}: it does not add to {}, so there is nothing that a weight multiplies; hint: leave out \
         @{}",
        adapter.shown(),
        adapter.weight,
        show_name(name),
        adapter.weight
    )))
}

#[allow(clippy::float_cmp, reason = "a weight that is left out is exactly one")]
fn is_one(weight: f64) -> bool {
    weight == 1.0
}

fn refused(what: &str, way: &str) -> Error {
    Error::Merge(format!("{what} not merged by this version; hint: {way}"))
}

/// Whether the model keeps its linear layers as (in, out), as those of transformers that use its `Conv1D` do.
pub fn stores_transposed(model: Option<&Value>) -> bool {
    let kind = model.and_then(|model| model.get("model_type")).and_then(Value::as_str);
    kind.is_some_and(|kind| ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"].contains(&kind))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn config(fields: &Value) -> AdapterConfig {
        AdapterConfig::parse(&fields.to_string(), "adapter_config.json").unwrap()
    }

    #[test]
    fn plain_lora_passes() {
        let config = config(&json!({"peft_type": "LORA", "init_lora_weights": "gaussian", "use_bdlora": null}));
        check_config(&config, false, Some(&json!({"quantization_config": null}))).unwrap();
    }

    #[test]
    fn what_is_not_plain_lora_is_named_with_the_way_out() {
        for (fields, named) in [
            (json!({"peft_type": "LOHA"}), "type LOHA"),
            (json!({"peft_type": "OFT", "peft_version": "0.20.0"}), "has no `oft_block_size`"),
            (json!({"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"}), "init_lora_weights=pissa_niter_16"),
            (json!({"peft_type": "LORA", "kasa_config": {}}), "kasa_config"),
            (json!({"peft_type": "LORA", "use_qalora": true}), "use_qalora"),
        ] {
            let message = check_config(&config(&fields), false, None).unwrap_err().to_string();
            assert!(message.contains(named) && message.contains("; hint: "), "{message}");
        }
        let model = json!({"quantization_config": {"quant_method": "gptq"}});
        let message =
            check_config(&config(&json!({"peft_type": "LORA"})), false, Some(&model)).unwrap_err().to_string();
        assert!(message.contains("quantized by gptq"), "{message}");
    }
}
