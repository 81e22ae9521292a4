//! What the sums of one tensor say.

use super::tally::Tally;

/// How far the coefficient may be from one: what tools round differently moves it by less, unless few elements move at all.
pub const TOLERANCE: f64 = 0.03;

/// The residual below which the coefficient needs no second look.
pub const EXACT: f64 = 0.1;

/// The part of the change that elements off by more than one unit may be.
const FAR: f64 = 0.1;

/// The residual up to which a coefficient means something; the rest may be rounding.
const ALIKE: f64 = 0.75;

/// What is the matter with a tensor, if anything.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It is as it should be, up to rounding.
    Right,
    /// It lacks the change: it is the base's.
    Unmerged,
    /// It has the change so many times.
    Times(f64),
    /// It is what another one should be: the tensor or expert of that number in its place.
    Swapped(usize),
    /// It differs in a way that the adapter does not explain.
    Other,
    /// It should be the base's, and is not.
    Touched,
    /// Values are not finite that should be.
    NotFinite,
    /// It has another shape or a type that cannot be compared: both, the expected first.
    Unlike([String; 2]),
    /// It is not there.
    Missing,
}

impl Verdict {
    /// The verdict on a tensor that should change, or be the base's if `copied`.
    #[must_use]
    pub fn new(tally: Tally, copied: bool) -> Self {
        if tally.nonfinite > 0 {
            return Self::NotFinite;
        }
        let Some(coefficient) = tally.coefficient() else {
            let right = tally.equal == tally.elements || !copied && tally.near == tally.elements;
            return match (right, copied) {
                (true, _) => Self::Right,
                (false, true) => Self::Touched,
                (false, false) => Self::Other,
            };
        };
        let residual = tally.residual().unwrap_or(0.0);
        #[allow(clippy::cast_precision_loss, reason = "a tolerance")]
        let tolerance = TOLERANCE + (tally.moved.max(1) as f64).sqrt().recip();
        if (coefficient - 1.0).abs() <= tolerance && tally.far <= FAR * FAR * tally.expected {
            Self::Right
        } else if tally.found <= 0.05 * tally.expected {
            Self::Unmerged
        } else if residual <= ALIKE && (coefficient - 1.0).abs() > tolerance {
            Self::Times(coefficient)
        } else {
            Self::Other
        }
    }

    /// Whether nothing is the matter.
    #[must_use]
    pub fn is_right(&self) -> bool {
        *self == Self::Right
    }

    /// The word for it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Unmerged => "not merged",
            Self::Times(_) => "wrong scale",
            Self::Swapped(_) => "swapped",
            Self::Other => "differs",
            Self::Touched => "changed",
            Self::NotFinite => "not finite",
            Self::Unlike(_) => "unlike",
            Self::Missing => "missing",
        }
    }
}
