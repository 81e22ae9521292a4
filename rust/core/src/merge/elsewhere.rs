//! Whole tensors from methods that are computed elsewhere.

use super::work::{Inputs, Values};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::kernels::Wide;
use crate::kernels::values::widen;
use crate::plan::{Elsewhere, Output};

/// The values of `output` after `change`, which comes from that adapter and is the only one.
pub fn whole<W: Wide>(
    inputs: Inputs,
    output: &Output,
    values: Values,
    adapter: usize,
    change: &Elsewhere,
) -> Result<Vec<W>> {
    let adapter = inputs.adapter(adapter)?;
    let wide = if size_of::<W>() == 8 { Dtype::F64 } else { Dtype::F32 };
    let Some(apply) = &adapter.apply else {
        return Err(Error::Merge(format!("{} has no way to be changed", show_name(&output.name))));
    };
    let mut own = vec![W::zeroed(); output.shape.iter().product()];
    values.read_wide(0, &mut own)?;
    let own = bytemuck::cast_slice::<W, u8>(&own).to_vec();
    let read = |name: &String| -> Result<Vec<u8>> {
        let dtype = inputs.base.entry(name).map_or(wide, |entry| entry.dtype);
        Ok(bytemuck::cast_slice::<W, u8>(&widen::<W>(dtype, &inputs.base.read(name)?)?).to_vec())
    };
    let (weight, bias) = if change.of_bias {
        (read(&change.weight)?, Some(own))
    } else {
        (own, change.bias.as_ref().map(read).transpose()?)
    };
    let slots: Vec<Vec<u8>> =
        change.layer.slots.iter().map(|slot| adapter.checkpoint.read(&slot.key)).collect::<Result<_>>()?;
    let (weight, bias) = apply.apply(&change.layer, &slots, wide, weight, bias)?;
    let found = if change.of_bias { bias.unwrap_or_default() } else { weight };
    if found.len() != output.shape.iter().product::<usize>() * wide.size() {
        return Err(Error::Merge(format!("{} came back with {} bytes", show_name(&output.name), found.len())));
    }
    widen(wide, &found)
}
