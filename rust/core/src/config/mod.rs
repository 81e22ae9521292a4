//! Adapter configs: `adapter_config.json`, typed strictly, every fault of one file in one error.
//!
//! Nothing that a value names is imported, opened or fetched here; fields that name such things are kept and warned of.

mod fields;
mod json;
mod lora;
mod prompt;
mod scaling;

use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::{ADAPTER_CONFIG, Links, read_small};
use crate::error::{Error, Result, show_name};
use fields::Fields;
pub use lora::{Init, LoraFields, TokenIndices};
pub use scaling::{Ia3Fields, OftFields};

/// The longest config that is read, in bytes.
const MAX_LENGTH: u64 = 16 << 20;

/// The largest rank, number of virtual tokens and the like.
const MAX_SIZE: i64 = 65_536;

/// What a field that names modules may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// A pattern in Python's syntax that whole names match.
    Pattern(String),
    /// Names, or the ends of names after a dot.
    List(Vec<String>),
}

/// Which modules an adapter is for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targeting {
    /// `target_modules`.
    pub target_modules: Option<Names>,
    /// `exclude_modules`.
    pub exclude_modules: Option<Names>,
    /// `layers_to_transform`.
    pub layers_to_transform: Option<Vec<i64>>,
    /// `layers_pattern`.
    pub layers_pattern: Option<Vec<String>>,
    /// `modules_to_save`.
    pub modules_to_save: Option<Vec<String>>,
}

impl Targeting {
    /// The module that `modules_to_save` names, if `path` is one or lies within it.
    #[must_use]
    pub fn saved<'p>(&self, path: &'p str) -> Option<&'p str> {
        let is_named = |module: &&str| {
            let above = self.modules_to_save.iter().flatten().filter_map(|name| module.strip_suffix(name.as_str()));
            above.into_iter().any(|above| above.is_empty() || above.ends_with('.'))
        };
        let ends = path.match_indices('.').map(|(dot, _)| dot).chain([path.len()]);
        ends.filter_map(|end| path.get(..end)).find(is_named)
    }
}

/// The fields of one kind of adapter.
#[derive(Debug)]
pub enum Method {
    /// LoRA and what is built on it.
    Lora(Box<LoraFields>),
    /// (IA)³.
    Ia3(Ia3Fields),
    /// Orthogonal fine-tuning.
    Oft(OftFields),
    /// Any other kind, as the file has it; only what all kinds share has been checked.
    Other(Map<String, Value>),
}

impl Method {
    /// The fields of LoRA, if it is that.
    #[must_use]
    pub fn lora(&self) -> Option<&LoraFields> {
        match self {
            Self::Lora(lora) => Some(lora),
            _ => None,
        }
    }

    /// Which of the base's biases are trained.
    #[must_use]
    pub fn bias(&self) -> &str {
        match self {
            Self::Lora(lora) => &lora.bias,
            Self::Oft(oft) => &oft.bias,
            Self::Ia3(_) | Self::Other(_) => "none",
        }
    }

    /// Whether the base is said to store weights as (in, out).
    #[must_use]
    pub fn fan_in_fan_out(&self) -> bool {
        match self {
            Self::Lora(lora) => lora.fan_in_fan_out,
            Self::Ia3(ia3) => ia3.fan_in_fan_out,
            Self::Oft(oft) => oft.fan_in_fan_out,
            Self::Other(_) => false,
        }
    }

    /// The targets that scale their inputs, as far as the config says.
    #[must_use]
    pub fn feedforward(&self) -> Option<&Names> {
        match self {
            Self::Ia3(ia3) => ia3.feedforward_modules.as_ref(),
            _ => None,
        }
    }
}

/// An adapter's config.
#[derive(Debug)]
pub struct AdapterConfig {
    /// The kind of adapter, as in `LORA`.
    pub peft_type: String,
    /// The model that the adapter was trained on: a path or the name of a repository, neither of which is opened.
    pub base_model: Option<String>,
    /// Which modules the adapter is for.
    pub targeting: Targeting,
    /// What is particular to the kind.
    pub method: Method,
    /// What the user should know of, such as keys that are ignored.
    pub warnings: Vec<String>,
}

impl AdapterConfig {
    /// Reads a config's text; `origin` is where it comes from, for messages.
    pub fn parse(text: &str, origin: &str) -> Result<Self> {
        let document = object(text).map_err(|reason| Error::config(origin, reason))?;
        let mut fields = Fields::new(&document.values);
        let mut config = Self::from_fields(&mut fields, &document.values);
        if let Some(faults) = fields.faults() {
            return Err(Error::config(origin, faults));
        }
        config.warnings.splice(..0, document.warnings);
        Ok(config)
    }

    /// Reads `adapter_config.json` in `folder`.
    pub fn read(folder: &Path) -> Result<Self> {
        let (text, _) = read_text(folder)?;
        Self::parse(&text, &folder.join(ADAPTER_CONFIG).to_string_lossy())
    }

    /// The fields of LoRA, if it is that.
    #[must_use]
    pub fn lora(&self) -> Option<&LoraFields> {
        self.method.lora()
    }

    fn from_fields(fields: &mut Fields, values: &Map<String, Value>) -> Self {
        let mut warnings = Vec::new();
        if fields.value("peft_type").is_none() {
            fields.fault("`peft_type` is missing; it names the kind of adapter, as in \"LORA\"");
        }
        let peft_type = fields.text("peft_type").unwrap_or_default();
        let base_model = fields.text("base_model_name_or_path");
        shared(fields, &mut warnings);
        let targeting = targeting(fields);
        let method = match peft_type.as_str() {
            "LORA" => Method::Lora(Box::new(lora::read(fields, &mut warnings))),
            "IA3" => Method::Ia3(scaling::ia3(fields, &targeting)),
            "OFT" => Method::Oft(scaling::oft(fields)),
            kind => {
                if fields.set("r").is_some() {
                    fields.integer("r", 0..=MAX_SIZE, 0);
                }
                prompt::check(fields, kind);
                Method::Other(values.clone())
            }
        };
        if !matches!(method, Method::Other(_)) {
            let unknown: Vec<String> = fields.unknown().iter().map(|key| format!("`{}`", show_name(key))).collect();
            if !unknown.is_empty() {
                let shown = unknown.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
                let more = if unknown.len() > 8 { format!(" and {} more", unknown.len() - 8) } else { String::new() };
                warnings.push(format!("keys unknown to {peft_type} are ignored: {shown}{more}"));
            }
        }
        Self { peft_type, base_model, targeting, method, warnings }
    }
}

/// The text of `adapter_config.json` in `folder`, checked to be one JSON object, and warnings.
pub fn read_text(folder: &Path) -> Result<(String, Vec<String>)> {
    let path = folder.join(ADAPTER_CONFIG);
    let fault = |reason: String| Error::checkpoint(&path, reason);
    let bytes = read_small(folder, ADAPTER_CONFIG, Links::Confined, MAX_LENGTH)?
        .ok_or_else(|| fault("is missing; an adapter's folder holds one, so check the folder's name".to_owned()))?;
    let text = String::from_utf8(bytes).map_err(|_| fault("is not UTF-8 text".to_owned()))?;
    let document = object(&text).map_err(fault)?;
    Ok((text, document.warnings))
}

/// A config's JSON as one object.
struct Object {
    values: Map<String, Value>,
    warnings: Vec<String>,
}

fn object(text: &str) -> Result<Object, String> {
    let document = json::parse(text)?;
    let Value::Object(values) = document.value else { return Err("is not a JSON object".to_owned()) };
    let twice = |key: &String| format!("key `{}` occurs twice; the last value counts", show_name(key));
    Ok(Object { values, warnings: document.duplicates.iter().take(8).map(twice).collect() })
}

/// Fields that any config may have and that say nothing about the adapter's weights.
fn shared(fields: &mut Fields, warnings: &mut Vec<String>) {
    for name in ["task_type", "revision", "peft_version"] {
        fields.text(name);
    }
    fields.boolean("inference_mode", false);
    fields.object("auto_mapping");
    // Values that name files, repositories or modules which PEFT would open or import. Those that PEFT writes by itself
    // are as it writes them; any other is told.
    let usual = [
        ("tokenizer_name_or_path", ""),
        ("tokenizer_kwargs", ""),
        ("prompt_tuning_init_state_dict_path", ""),
        ("shadow_model", "mirror"),
        ("megatron_core", "megatron.core"),
    ];
    for (name, default) in usual {
        if fields.set(name).is_some_and(|value| value.as_str() != Some(default)) {
            warnings.push(format!("`{name}` is kept but never used to open, fetch or import anything"));
        }
    }
}

fn targeting(fields: &mut Fields) -> Targeting {
    let target_modules = fields.names("target_modules");
    let exclude_modules = fields.names("exclude_modules");
    let layers_to_transform = fields.integers("layers_to_transform", &(i64::MIN..=i64::MAX));
    let layers_pattern = match fields.names("layers_pattern") {
        Some(Names::Pattern(one)) if one.is_empty() => Some(Vec::new()),
        Some(Names::Pattern(one)) => Some(vec![one]),
        Some(Names::List(list)) => Some(list),
        None => None,
    };
    if matches!(target_modules, Some(Names::Pattern(_))) {
        for (name, set) in
            [("layers_to_transform", layers_to_transform.is_some()), ("layers_pattern", layers_pattern.is_some())]
        {
            if set {
                fields.fault(format!("`{name}` only goes with a list of `target_modules`, not with a pattern"));
            }
        }
    } else if layers_pattern.as_ref().is_some_and(|list| !list.is_empty()) && layers_to_transform.is_none() {
        fields.fault("`layers_pattern` needs `layers_to_transform`");
    }
    let modules_to_save = fields.strings("modules_to_save");
    Targeting { target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save }
}

#[cfg(test)]
mod tests;
