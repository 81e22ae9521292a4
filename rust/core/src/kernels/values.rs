//! Tensors' bytes as numbers, whatever float type they have.

use half::f16;

use super::Wide;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The values of a float tensor, widened exactly or rounded to nearest; any other type is refused.
pub fn widen<W: Wide>(dtype: Dtype, bytes: &[u8]) -> Result<Vec<W>> {
    let mut values = Vec::new();
    if values.try_reserve_exact(bytes.len() / dtype.size().max(1)).is_err() {
        return Err(Error::Merge(format!("no memory for {} bytes of adapter weights", bytes.len())));
    }
    match dtype {
        // Its bits are the upper half of a float32's.
        Dtype::BF16 => extend(&mut values, bytes, |[low, high]| f64::from(f32::from_le_bytes([0, 0, low, high]))),
        Dtype::F16 => extend(&mut values, bytes, |bytes| f16::from_le_bytes(bytes).to_f64()),
        Dtype::F32 => extend(&mut values, bytes, |bytes| f64::from(f32::from_le_bytes(bytes))),
        Dtype::F64 => extend(&mut values, bytes, f64::from_le_bytes),
        other => return Err(Error::Merge(format!("tensors of type {} are not merged", other.name()))),
    }
    Ok(values)
}

/// Appends the elements of `bytes`; the memory is reserved, and filled in a loop that is vectorised.
fn extend<W: Wide, const SIZE: usize>(values: &mut Vec<W>, bytes: &[u8], read: impl Fn([u8; SIZE]) -> f64) {
    values.resize(bytes.len() / SIZE, W::zeroed());
    for (value, chunk) in values.iter_mut().zip(bytes.chunks_exact(SIZE)) {
        *value = W::from_f64(read(chunk.try_into().unwrap_or([0; SIZE])));
    }
}

/// Whether a float tensor's bytes hold neither an infinity nor NaN: no exponent is all ones.
#[must_use]
pub fn all_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    match dtype {
        Dtype::BF16 => exponents_end(bytes, |bytes| u16::from_le_bytes(bytes) & 0x7f80 == 0x7f80),
        Dtype::F16 => exponents_end(bytes, |bytes| u16::from_le_bytes(bytes) & 0x7c00 == 0x7c00),
        Dtype::F32 => exponents_end(bytes, |bytes| u32::from_le_bytes(bytes) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F64 => exponents_end(bytes, |bytes| !f64::from_le_bytes(bytes).is_finite()),
        _ => true,
    }
}

/// Whether `full` holds for no element; without an early end inside a chunk, so that the loop is vectorised.
fn exponents_end<const SIZE: usize>(bytes: &[u8], full: impl Fn([u8; SIZE]) -> bool) -> bool {
    bytes.chunks(4096 * SIZE).all(|chunk| {
        let found = |element: &[u8]| element.try_into().is_ok_and(&full);
        !chunk.chunks_exact(SIZE).fold(false, |any, element| any | found(element))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use half::bf16;

    use super::*;

    #[test]
    fn every_float_type_is_read_exactly() {
        let third = 1.0_f32 / 3.0;
        assert_eq!(widen::<f64>(Dtype::F32, &third.to_le_bytes()).unwrap(), [f64::from(third)]);
        assert_eq!(widen::<f32>(Dtype::F64, &1.5_f64.to_le_bytes()).unwrap(), [1.5]);
        assert_eq!(widen::<f32>(Dtype::F16, &f16::from_f32(-2.5).to_le_bytes()).unwrap(), [-2.5]);
        assert_eq!(widen::<f64>(Dtype::BF16, &bf16::from_f32(0.375).to_le_bytes()).unwrap(), [0.375]);
        assert_eq!(widen::<f32>(Dtype::I8, &[1]).unwrap_err().to_string(), "tensors of type I8 are not merged");
    }

    #[test]
    fn infinities_and_nan_are_found_wherever_they_are() {
        for value in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let mut bytes = vec![0x7e; 40_000];
            assert!(all_finite(Dtype::F32, &bytes));
            assert!(all_finite(Dtype::BF16, &bytes));
            bytes.splice(39_996.., value.to_le_bytes());
            assert!(!all_finite(Dtype::F32, &bytes));
            bytes.splice(20_000..20_002, bf16::from_f32(value).to_le_bytes());
            assert!(!all_finite(Dtype::BF16, &bytes));
            assert!(!all_finite(Dtype::F16, &f16::from_f32(value).to_le_bytes()));
            assert!(!all_finite(Dtype::F64, &f64::from(value).to_le_bytes()));
        }
        assert!(all_finite(Dtype::F16, &f16::MAX.to_le_bytes()));
    }
}
