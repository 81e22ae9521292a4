//! The fields of the methods that scale or turn what a layer computes: (IA)³ and OFT.

use super::fields::Fields;
use super::{MAX_SIZE, Names, Targeting};

/// The fields of (IA)³.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ia3Fields {
    /// Which targets scale their inputs instead of their outputs.
    pub feedforward_modules: Option<Names>,
    /// Whether the base stores weights as (in, out).
    pub fan_in_fan_out: bool,
    /// Whether the vectors start at one.
    pub init_ia3_weights: bool,
}

/// The fields of orthogonal fine-tuning.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "the format has these flags")]
pub struct OftFields {
    /// Blocks in each layer; zero if the size of a block is given instead.
    pub r: usize,
    /// Size of a block; zero if their number is given instead.
    pub oft_block_size: usize,
    /// Whether the base stores weights as (in, out).
    pub fan_in_fan_out: bool,
    /// Which biases are trained: none, all or `oft_only`.
    pub bias: String,
    /// Whether the turn is held near the identity.
    pub coft: bool,
    /// How near.
    pub eps: f64,
    /// Whether all blocks of a layer are one.
    pub block_share: bool,
    /// Whether the inverse in Cayley's transform is a truncated series.
    pub use_cayley_neumann: bool,
    /// How many terms the series has.
    pub num_cayley_neumann_terms: usize,
    /// Why nobody can tell what the numbers of a file with this config mean, if so, and the way out.
    pub doubt: Option<String>,
}

pub(super) fn ia3(fields: &mut Fields, targeting: &Targeting) -> Ia3Fields {
    let feedforward_modules = fields.names("feedforward_modules");
    if let (Some(Names::List(inner)), Some(Names::List(all))) = (&feedforward_modules, &targeting.target_modules) {
        let strays = inner.iter().filter(|name| !all.contains(name)).count();
        if strays > 0 {
            fields.fault(format!("{strays} of `feedforward_modules` are not among `target_modules`"));
        }
    }
    Ia3Fields {
        feedforward_modules,
        fan_in_fan_out: fields.boolean("fan_in_fan_out", false),
        init_ia3_weights: fields.boolean("init_ia3_weights", true),
    }
}

/// The first version of PEFT whose series ends as it does now, which is also the first that writes its version.
const SERIES_SINCE: (u64, u64) = (0, 18);

/// Why the meaning of a file's numbers cannot be told: they were written for another map than today's.
fn doubt(fields: &mut Fields) -> Option<String> {
    for name in ["oft_block_size", "use_cayley_neumann"] {
        if fields.value(name).is_none() {
            return Some(format!(
                "has no `{name}`: an early version of PEFT wrote it, whose numbers mean another turn; hint: train it again, \
                 or merge it with the version of PEFT that wrote it"
            ));
        }
    }
    let version = fields.text("peft_version");
    let mut parts = version.as_deref().unwrap_or_default().split('.').map_while(|part| part.parse::<u64>().ok());
    let found = parts.next().zip(parts.next());
    (fields.boolean("use_cayley_neumann", true) && found.is_none_or(|found| found < SERIES_SINCE)).then(|| {
        let version = version.as_deref().map_or_else(|| "no version".to_owned(), |version| format!("version {version}"));
        format!(
            "was saved by PEFT before 0.18 ({version} is named), whose `use_cayley_neumann` meant another series; hint: train \
             it again, or merge it with the version of PEFT that wrote it"
        )
    })
}

pub(super) fn oft(fields: &mut Fields) -> OftFields {
    let doubt = doubt(fields);
    let r = fields.integer("r", 0..=MAX_SIZE, 0);
    let oft_block_size = fields.integer("oft_block_size", 0..=MAX_SIZE, 32);
    if (r == 0) == (oft_block_size == 0) {
        fields.fault(format!("`r` is {r} and `oft_block_size` {oft_block_size}, where exactly one must be zero"));
    }
    fields.fraction("module_dropout");
    fields.boolean("init_weights", true);
    OftFields {
        r: usize::try_from(r).unwrap_or_default(),
        oft_block_size: usize::try_from(oft_block_size).unwrap_or_default(),
        fan_in_fan_out: fields.boolean("fan_in_fan_out", false),
        bias: fields.choice("bias", &["none", "all", "oft_only"]),
        coft: fields.boolean("coft", false),
        eps: fields.number("eps", 6e-5),
        block_share: fields.boolean("block_share", false),
        use_cayley_neumann: fields.boolean("use_cayley_neumann", true),
        num_cayley_neumann_terms: usize::try_from(fields.integer("num_cayley_neumann_terms", 1..=MAX_SIZE, 5))
            .unwrap_or_default(),
        doubt,
    }
}
