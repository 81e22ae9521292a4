//! Experts that transformers keeps in one parameter and checkpoints store one by one, and the other way round.
//!
//! The table is what transformers 5 does to such checkpoints when it loads them, and undoes when it saves: the weights of
//! the experts are stacked, and the projections that make one parameter stand under each other in each expert's matrix.

use super::base::Base;
use super::changes::Part;
use crate::dtype::Dtype;

/// A parameter of the module of all experts, and the linear layers of one expert that are stacked in it.
const FUSED: [(&str, &[&str]); 7] = [
    ("gate_up_proj", &["gate_proj", "up_proj"]),
    ("gate_up_proj", &["w1", "w3"]),
    ("gate_up_proj", &["fc1", "fc3"]),
    ("up_proj", &["up_proj"]),
    ("down_proj", &["down_proj"]),
    ("down_proj", &["w2"]),
    ("down_proj", &["fc2"]),
];

/// Components of module names: as transformers 5 calls them, and as checkpoints may.
const RENAMED: [(&str, &str); 1] = [("mlp", "block_sparse_moe")];

/// The most experts that are looked for.
const MOST: usize = 65_536;

/// A weight that an adapter may be for, and where in the base it is if it is not a tensor there by itself.
pub struct Home {
    /// Its name, which the base may not have.
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The tensors of the base that it is in or that are in it, each with its shape there; none if it is one.
    pub pieces: Vec<Piece>,
}

/// A tensor of the base that has rows in common with a weight.
pub struct Piece {
    pub name: String,
    /// Its matrices and the rows of each.
    pub stored: (usize, usize),
    pub part: Part,
}

/// A module's path and what else it may be called.
pub fn spellings(path: &str) -> Vec<String> {
    let path = format!(".{path}.");
    let pairs = RENAMED.iter().flat_map(|(one, other)| [(one, other), (other, one)]);
    let renamed = pairs.map(|(from, to)| path.replace(&format!(".{from}."), &format!(".{to}.")));
    let others = renamed.filter(|renamed| *renamed != path);
    std::iter::once(path.clone()).chain(others).map(|path| path.trim_matches('.').to_owned()).collect()
}

/// The parameter `leaf` of the module of all experts at `path`, if the base has the layers that make it one by one.
pub fn stacked(base: &Base, path: &str, leaf: &str) -> Option<Home> {
    let layers = FUSED.iter().filter(|(fused, _)| *fused == leaf).map(|(_, layers)| *layers);
    layers.into_iter().find_map(|layers| {
        let entry = |expert: usize, layer: &str| {
            let name = format!("{path}.{expert}.{layer}.weight");
            let entry = base.entry(&name)?;
            let &[rows, columns] = entry.shape.as_slice() else { return None };
            Some((name, entry.dtype, rows, columns))
        };
        let first: Vec<_> = layers.iter().map(|layer| entry(0, layer)).collect::<Option<_>>()?;
        let (dtype, columns) = first.first().map(|(_, dtype, _, columns)| (*dtype, *columns))?;
        let outputs: usize = first.iter().map(|(_, _, rows, _)| rows).sum();
        let experts = (0..MOST).take_while(|expert| layers.iter().any(|layer| entry(*expert, layer).is_some())).count();
        let mut pieces = Vec::new();
        for expert in 0..experts {
            let mut row = 0;
            for (layer, (_, _, height, _)) in layers.iter().zip(&first) {
                let (name, found, rows, width) = entry(expert, layer)?;
                if (found, rows, width) != (dtype, *height, columns) {
                    return None;
                }
                let part = Part { experts, outputs, from: (expert, row), to: (0, 0), rows };
                pieces.push(Piece { name, stored: (1, rows), part });
                row += rows;
            }
        }
        Some(Home { name: format!("{path}.{leaf}"), dtype, shape: vec![experts, outputs, columns], pieces })
    })
}

/// The weight of a layer of one expert at `path`, if the base has a parameter in which it is stacked.
pub fn unstacked(base: &Base, path: &str) -> Option<Home> {
    let (above, layer) = path.rsplit_once('.')?;
    let (module, expert) = above.rsplit_once('.')?;
    let expert: usize = expert.parse().ok()?;
    FUSED.iter().find_map(|(fused, layers)| {
        let place = layers.iter().position(|known| *known == layer)?;
        let name = format!("{module}.{fused}");
        let entry = base.entry(&name)?;
        let &[experts, all, columns] = entry.shape.as_slice() else { return None };
        let rows = all / layers.len();
        if expert >= experts || rows * layers.len() != all {
            return None;
        }
        let part = Part { experts: 1, outputs: rows, from: (0, 0), to: (expert, place * rows), rows };
        let pieces = vec![Piece { name, stored: (experts, all), part }];
        Some(Home { name: format!("{path}.weight"), dtype: entry.dtype, shape: vec![rows, columns], pieces })
    })
}

#[cfg(test)]
mod tests {
    use super::spellings;

    #[test]
    fn a_component_has_several_names_and_a_part_of_one_does_not() {
        assert_eq!(spellings("l.0.mlp.experts"), ["l.0.mlp.experts", "l.0.block_sparse_moe.experts"]);
        assert_eq!(spellings("l.0.block_sparse_moe"), ["l.0.block_sparse_moe", "l.0.mlp"]);
        assert_eq!(spellings("l.my_mlp.q"), ["l.my_mlp.q"]);
    }
}
