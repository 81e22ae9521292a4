//! The search for adapter tensors that hold an infinity or NaN.

use rayon::prelude::*;

use super::problems::{NONFINITE, Problems};
use crate::checkpoint::Checkpoint;
use crate::error::{Result, show_name};
use crate::kernels::values::all_finite;
use crate::threads;

/// Values read at once when the adapter is searched for infinities and NaN.
const SCAN_BYTES: usize = 1 << 20;

/// Reports the tensors of the adapter that hold an infinity or NaN.
pub fn find_nonfinite(adapter: &Checkpoint, problems: &mut Problems) -> Result<()> {
    let names: Vec<&str> = adapter.names().collect();
    let scan = |name: &&str| -> Result<bool> {
        let Some(entry) = adapter.entry(name).filter(|entry| entry.dtype.is_adapter_float()) else { return Ok(true) };
        let mut buffer = vec![0; SCAN_BYTES.min(entry.bytes())];
        let mut offset = 0;
        while offset < entry.bytes() {
            let length = SCAN_BYTES.min(entry.bytes() - offset);
            let Some(part) = buffer.get_mut(..length) else { break };
            adapter.read_range(name, offset as u64, part)?;
            if !all_finite(entry.dtype, part) {
                return Ok(false);
            }
            offset += length;
        }
        Ok(true)
    };
    let finite: Vec<bool> = threads::install(|| names.par_iter().map(scan).collect())?;
    names
        .iter()
        .zip(finite)
        .filter(|(_, finite)| !finite)
        .for_each(|(name, _)| problems.add(NONFINITE, show_name(name)));
    Ok(())
}
