//! The element types of tensors, named as safetensors names them.

/// An element type that a checkpoint may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "these are the names that the file format spells")]
pub enum Dtype {
    /// One byte a value, zero or one.
    BOOL,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8_E5M2,
    /// 8-bit float, 4 exponent and 3 mantissa bits.
    F8_E4M3,
    /// 8-bit power of two, the scale of a microscaling block.
    F8_E8M0,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
}

impl Dtype {
    const ALL: [(Self, &'static str, usize); 16] = [
        (Self::BOOL, "BOOL", 1),
        (Self::U8, "U8", 1),
        (Self::I8, "I8", 1),
        (Self::F8_E5M2, "F8_E5M2", 1),
        (Self::F8_E4M3, "F8_E4M3", 1),
        (Self::F8_E8M0, "F8_E8M0", 1),
        (Self::I16, "I16", 2),
        (Self::U16, "U16", 2),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::I32, "I32", 4),
        (Self::U32, "U32", 4),
        (Self::F32, "F32", 4),
        (Self::F64, "F64", 8),
        (Self::I64, "I64", 8),
        (Self::U64, "U64", 8),
    ];

    /// The type that safetensors spells `name`, if there is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The name in a safetensors header.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    /// Bytes per element.
    #[must_use]
    pub fn size(self) -> usize {
        Self::ALL.iter().find(|row| row.0 == self).map_or(0, |row| row.2)
    }

    /// Whether adapter weights and merge targets may have this type: F16, BF16, F32 or F64.
    #[must_use]
    pub fn is_adapter_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32 | Self::F64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (dtype, name, size) in Dtype::ALL {
            assert_eq!(Dtype::from_name(name), Some(dtype));
            assert_eq!((dtype.name(), dtype.size()), (name, size));
        }
        assert_eq!(Dtype::from_name("F4"), None);
    }
}
