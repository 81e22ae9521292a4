//! The number of the layer that a module is in.

use std::collections::BTreeMap;

use super::{Row, row};
use crate::error::Result;
use crate::pattern::{Budget, Name, Pattern, Role};

/// `layers_to_transform` and `layers_pattern`.
pub(super) struct Layers<'a> {
    /// How many names are in each layer that is wanted.
    wanted: BTreeMap<i64, usize>,
    /// The patterns, and for how many names each was the first to match.
    patterns: Vec<(&'a str, Pattern, usize)>,
}

impl<'a> Layers<'a> {
    pub fn new(wanted: &[i64], patterns: &'a [String], budget: &Budget) -> Result<Self> {
        let wanted: BTreeMap<i64, usize> = wanted.iter().map(|&layer| (layer, 0)).collect();
        let mut read = Vec::new();
        if !wanted.is_empty() {
            for pattern in patterns {
                read.push((pattern.as_str(), Pattern::new("layers_pattern", pattern, Role::Layers, budget)?, 0));
            }
        }
        Ok(Self { wanted, patterns: read })
    }

    /// Whether the name is in a wanted layer, or any will do.
    pub fn wants(&mut self, name: &str, budget: &Budget) -> Result<bool> {
        if self.wanted.is_empty() {
            return Ok(true);
        }
        let number = self.number(name, budget)?;
        let count = number.and_then(|number| self.wanted.get_mut(&number));
        Ok(count.map(|count| *count += 1).is_some())
    }

    fn number(&mut self, name: &str, budget: &Budget) -> Result<Option<i64>> {
        if self.patterns.is_empty() {
            return Ok(first_number(name));
        }
        for (_, pattern, count) in &mut self.patterns {
            if let Some(number) = pattern.layer(Name::new(name), budget)? {
                *count += 1;
                return Ok(number.parse().ok());
            }
        }
        Ok(None)
    }

    pub fn report(&self, report: &mut Vec<Row>) {
        let layers =
            self.wanted.iter().map(|(layer, &count)| row("layers_to_transform", &layer.to_string(), count, None));
        report.extend(layers);
        report.extend(self.patterns.iter().map(|(text, _, count)| row("layers_pattern", text, *count, None)));
    }
}

/// The first component that is a number, has one after it and at least two before it, so that the number of a layer comes
/// before that of an expert. Where there is none, a list of layers at the top of the model will do as well.
fn first_number(name: &str) -> Option<i64> {
    let components: Vec<&str> = name.split('.').collect();
    let (_, inner) = components.split_last()?;
    let is_number = |text: &&&str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let found = inner.iter().skip(2).find(is_number).or_else(|| inner.get(1).filter(is_number));
    found.and_then(|digits| digits.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::first_number;

    #[test]
    fn the_number_of_a_layer_is_found_without_a_pattern() {
        for (name, expected) in [
            ("model.layers.3.q", Some(3)),
            ("model.layers.1.experts.0.w", Some(1)),
            ("layers.7.q", Some(7)),
            ("a.0.b.1.c", Some(1)),
            ("model.layers.3", None),
            ("3.q", None),
            ("model.layers.x3.q", None),
            ("m.l.99999999999999999999.q", None),
        ] {
            assert_eq!(first_number(name), expected, "{name}");
        }
    }
}
