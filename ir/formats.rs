//! The format table: every dtype a tensor can be stored in, and how its bytes become numbers.
//!
//! A quantized format stores blocks of `block` elements in `block_bytes` bytes. Inside a block every `group` consecutive
//! elements share one scale; `real = scale * (code - zero)` where the zero point is fixed or each group has one, `real =
//! scale * code + min` where each group has its own minimum. Codes are unsigned, so that `u8 x s8` dot products apply to
//! all of them; of 4-bit floats it is their index in a table of small integers that is stored. Codes of 8-bit floats are
//! these floats: they are multiplied with floats.
//!
//! Source of the GGUF block layouts: the GGUF specification and the `ggml` quantization reference.

mod split;

use std::fmt;

/// An element type or storage format: an index into [`FORMATS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(non_camel_case_types, missing_docs)] // the field's own spellings; the table documents them
pub enum DType {
    F32,
    F16,
    BF16,
    I32,
    /// Cached keys and values: int8 codes with one scale for each head of a position.
    I8,
    /// Cached keys and values: 8-bit floats, see [`e4m3`].
    FP8,
    /// Cached keys and values: int4 codes, of values with one scale for each head of a position, of keys with a scale and a
    /// middle for each dim of a cache block.
    I4,
    /// Activations: int8 per group of 32 along the row, see [`crate::layout::A8`].
    A8,
    /// Activations in two int8 planes: A8 lines, and A8 lines of what those leave.
    A16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    /// [`DType::Q8_0`] in two planes, see [`crate::planes`].
    Q8_PLANES,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    INT4_G64,
    INT4_G128,
    UINT4_G32,
    UINT4_G64,
    UINT4_G128,
    INT8_G64,
    INT8_G128,
    MXFP4,
    NVFP4,
    E4M3_G32,
    E4M3_G128,
}

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// `real = scale * (code - zero)` with one zero point for the whole format.
    Fixed(u8),
    /// `real = scale * code + min` with a minimum per group.
    Min,
    /// `real = scale * (code - zero)` with a zero point per group, stored in a minimum's place.
    Point,
    /// `real = scale * E2M1[code]`: 4-bit floats, whose scale is stored halved so that they are integers.
    E2M1,
    /// `real = scale * e4m3(code) / 256`: 8-bit floats, read as f16 of the same mantissa, whose exponents count from 2^-8 below.
    E4M3,
}

/// Twice the values of 4-bit floats (sign, two bits of exponent, one of mantissa) by code.
/// Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
pub const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What kernels add to [`E2M1`] so that codes are unsigned.
pub const E2M1_ZERO: u8 = 16;

/// The value of an 8-bit float (sign, four bits of exponent, three of mantissa; no infinities).
/// Source: OCP 8-bit Floating Point Specification (OFP8) 1.0.
pub fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match byte & 127 {
        127 => f32::NAN,
        0..8 => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte < 128 { magnitude } else { -magnitude }
}

/// The byte is no number.
pub const fn is_e4m3_nan(byte: u8) -> bool {
    byte & 127 == 127
}

/// What scales of [`Zero::E4M3`] are stored times.
pub const E4M3_UNIT: f32 = 256.0;

/// Largest value of an 8-bit float.
pub const E4M3_TOP: f32 = 448.0;

/// The 8-bit float nearest to a real, ties to even, the largest for what is beyond: the inverse of [`e4m3`].
pub fn to_e4m3(x: f32) -> u8 {
    let magnitude = x.abs().min(E4M3_TOP);
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    // At least 8 of them unless the exponent is the least; the sixteenth carries into the exponent.
    let steps = (magnitude * f32::from_bits((130 - exponent) as u32 * (1 << 23))).round_ties_even() as u8;
    ((((exponent + 6) as u8) << 3) + steps) | if x < 0.0 { 128 } else { 0 }
}

impl Zero {
    /// What integer sums are to be freed of: the zero point of codes as kernels multiply them, where it is one for all.
    pub const fn fixed(self) -> Option<u8> {
        match self {
            Zero::Fixed(zero) => Some(zero),
            Zero::E2M1 => Some(E2M1_ZERO),
            Zero::Min | Zero::Point | Zero::E4M3 => None,
        }
    }

    /// Every group has a second figure beside its scale: a minimum or a zero point.
    pub const fn has_mins(self) -> bool {
        matches!(self, Zero::Min | Zero::Point)
    }

    /// The real of a code, with its group's scale and second figure.
    pub fn real(self, code: u8, scale: f32, min: f32) -> f32 {
        match self {
            Zero::Fixed(zero) => scale * (f32::from(code) - f32::from(zero)),
            Zero::Min => scale * f32::from(code) + min,
            Zero::Point => scale * (f32::from(code) - min),
            Zero::E2M1 => scale * f32::from(E2M1[usize::from(code & 15)]),
            Zero::E4M3 => {
                scale * half::f16::from_bits(u16::from(code & 128) << 8 | u16::from(code & 127) << 7).to_f32()
            }
        }
    }
}

/// The integer view of a quantized format: what kernels see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntFormat {
    /// Bits of a packed code: 4, 5, 6 or 8 (2- and 3-bit codes are packed in 4).
    pub bits: u8,
    /// Elements along K that share a scale: 16, 32, or a multiple of 32.
    pub group: usize,
    /// The zero point.
    pub zero: Zero,
}

impl IntFormat {
    /// Elements along K whose codes are packed together: a group, or the 32 that share a line of activations.
    pub const fn unit(self) -> usize {
        if self.group < 32 { self.group } else { 32 }
    }
}

/// Codes, scales and minima of one block, as `split` leaves them: `codes[block]`, `scales[block / group]`,
/// `mins[block / group]` (minima or zero points; untouched where there are none).
pub struct Split<'a> {
    /// Unsigned codes, one per element.
    pub codes: &'a mut [u8],
    /// One scale per group.
    pub scales: &'a mut [f32],
    /// One minimum, or zero point, per group.
    pub mins: &'a mut [f32],
}

/// One row of the format table.
pub struct Format {
    /// The dtype this row describes.
    pub dtype: DType,
    /// Its name in text and reports.
    pub name: &'static str,
    /// Elements of a block (1 for plain element types).
    pub block: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// The integer view, for quantized weights.
    pub int: Option<IntFormat>,
    /// Offsets of the block's f16 scales, minima and zero points, and what each is about when the reals span -1 to 1.
    pub scales: &'static [(usize, f32)],
    /// Splits the bytes of one block into codes, scales and minima; for formats with an integer view.
    pub split: fn(&[u8], Split<'_>),
    /// One line of meaning.
    pub meaning: &'static str,
}

impl DType {
    /// This dtype's row of the table.
    pub fn format(self) -> &'static Format {
        &FORMATS[self as usize]
    }

    /// The dtype of that name.
    pub fn parse(name: &str) -> Option<DType> {
        FORMATS.iter().find(|f| f.name == name).map(|f| f.dtype)
    }

    /// The integer view of a quantized weight format.
    pub fn int(self) -> Option<IntFormat> {
        self.format().int
    }

    /// The format of its rows in model files: another one for what only packing takes apart.
    pub fn in_file(self) -> DType {
        if self == DType::Q8_PLANES { DType::Q8_0 } else { self }
    }

    /// A weight format whose codes are integers, so that int8 activations can be multiplied with them.
    pub fn is_integer(self) -> bool {
        self.int().is_some_and(|int| int.zero != Zero::E4M3)
    }

    /// Planes of int8 codes that activations of this dtype have.
    pub fn planes(self) -> Option<usize> {
        match self {
            DType::A8 => Some(1),
            DType::A16 => Some(2),
            _ => None,
        }
    }

    /// Caches with heads of that width can be stored in it: the width is whole blocks.
    pub fn caches(self, dim: usize) -> bool {
        CACHED.contains(&self) && dim.is_multiple_of(self.format().block)
    }

    /// f32, f16 or bf16.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }

    /// Bytes of `elements` elements in file order, or `None` where they do not fill whole blocks or overflow.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let f = self.format();
        elements.is_multiple_of(f.block).then_some(())?;
        (elements / f.block).checked_mul(f.block_bytes)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.format().name)
    }
}

/// Dequantizes whole blocks of `dtype` in file order. `out.len()` is the number of elements; `bytes` must hold exactly
/// [`DType::bytes`] of them.
///
/// # Panics
/// Where the lengths disagree; callers check them against the file first.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let f = dtype.format();
    assert_eq!(dtype.bytes(out.len()), Some(bytes.len()), "{dtype}: {} bytes for {} elements", bytes.len(), out.len());
    let Some(int) = f.int else {
        return plain(dtype, bytes, out);
    };
    let groups = f.block / int.group;
    let (mut codes, mut scales, mut mins) = ([0u8; 256], [0f32; 16], [0f32; 16]);
    for (bytes, out) in bytes.chunks_exact(f.block_bytes).zip(out.chunks_exact_mut(f.block)) {
        (f.split)(
            bytes,
            Split { codes: &mut codes[..f.block], scales: &mut scales[..groups], mins: &mut mins[..groups] },
        );
        for (i, (x, code)) in out.iter_mut().zip(codes).enumerate() {
            let g = i / int.group;
            *x = int.zero.real(code, scales[g], mins[g]);
        }
    }
}

fn plain(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*b);
            }
        }
        DType::F16 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = half::f16::from_le_bytes(*b).to_f32();
            }
        }
        DType::BF16 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = half::bf16::from_le_bytes(*b).to_f32();
            }
        }
        _ => unreachable!("{dtype} holds no reals"),
    }
}

const fn row(dtype: DType, name: &'static str, block: usize, block_bytes: usize, meaning: &'static str) -> Format {
    Format { dtype, name, block, block_bytes, int: None, scales: &[], split: |_, _| unreachable!(), meaning }
}

const fn quant(
    dtype: DType,
    name: &'static str,
    (block, block_bytes): (usize, usize),
    (bits, group, zero): (u8, usize, Zero),
    scales: &'static [(usize, f32)],
    split: fn(&[u8], Split<'_>),
    meaning: &'static str,
) -> Format {
    Format { dtype, name, block, block_bytes, int: Some(IntFormat { bits, group, zero }), scales, split, meaning }
}

/// What caches can be stored in, the most accurate first.
pub const CACHED: [DType; 6] = [DType::F32, DType::F16, DType::BF16, DType::I8, DType::FP8, DType::I4];

/// The table, in the order of [`DType`].
pub static FORMATS: [Format; 31] = [
    row(DType::F32, "f32", 1, 4, "IEEE single precision"),
    row(DType::F16, "f16", 1, 2, "IEEE half precision"),
    row(DType::BF16, "bf16", 1, 2, "the upper half of f32"),
    row(DType::I32, "i32", 1, 4, "token ids, positions"),
    row(DType::I8, "i8", 1, 1, "cached keys and values: int8 codes with one scale for each head of a position"),
    row(DType::FP8, "fp8", 1, 1, "cached keys and values: 8-bit floats (e4m3)"),
    row(
        DType::I4,
        "i4",
        32,
        16,
        "cached keys and values: int4 codes with f16 scales, of keys one for each dim of a cache block",
    ),
    row(DType::A8, "a8", 32, 64, "activations: int8 codes with one scale per 32"),
    row(DType::A16, "a16", 32, 128, "activations: a8, and a8 of the rounding error"),
    quant(
        DType::Q4_0,
        "q4_0",
        (32, 18),
        (4, 32, Zero::Fixed(8)),
        &[(0, 0.12)],
        split::q4_0,
        "4 bits, one f16 scale per 32",
    ),
    quant(
        DType::Q4_1,
        "q4_1",
        (32, 20),
        (4, 32, Zero::Min),
        &[(0, 0.13), (2, -1.0)],
        split::q4_1,
        "4 bits, f16 scale and minimum per 32",
    ),
    quant(
        DType::Q5_0,
        "q5_0",
        (32, 22),
        (5, 32, Zero::Fixed(16)),
        &[(0, 0.06)],
        split::q5_0,
        "5 bits, one f16 scale per 32",
    ),
    quant(
        DType::Q5_1,
        "q5_1",
        (32, 24),
        (5, 32, Zero::Min),
        &[(0, 0.06), (2, -1.0)],
        split::q5_1,
        "5 bits, f16 scale and minimum per 32",
    ),
    quant(
        DType::Q8_0,
        "q8_0",
        (32, 34),
        (8, 32, Zero::Fixed(128)),
        &[(0, 8e-3)],
        split::q8_0,
        "8 bits, one f16 scale per 32",
    ),
    row(
        DType::Q8_PLANES,
        "q8_planes",
        32,
        34,
        "q8_0 in two planes: the upper four bits of all rows, then the lower four",
    ),
    quant(
        DType::Q2_K,
        "q2_k",
        (256, 84),
        (4, 16, Zero::Min),
        &[(80, 0.044), (82, 0.066)],
        split::q2_k,
        "2 bits, 4-bit scale and minimum per 16",
    ),
    quant(
        DType::Q3_K,
        "q3_k",
        (256, 110),
        (4, 16, Zero::Fixed(4)),
        &[(108, 8e-3)],
        split::q3_k,
        "3 bits, 6-bit scale per 16",
    ),
    quant(
        DType::Q4_K,
        "q4_k",
        (256, 144),
        (4, 32, Zero::Min),
        &[(0, 2e-3), (2, 0.016)],
        split::q4_k,
        "4 bits, 6-bit scale and minimum per 32",
    ),
    quant(
        DType::Q5_K,
        "q5_k",
        (256, 176),
        (5, 32, Zero::Min),
        &[(0, 1e-3), (2, 0.016)],
        split::q5_k,
        "5 bits, 6-bit scale and minimum per 32",
    ),
    quant(
        DType::Q6_K,
        "q6_k",
        (256, 210),
        (6, 16, Zero::Fixed(32)),
        &[(208, 2.4e-4)],
        split::q6_k,
        "6 bits, 8-bit scale per 16",
    ),
    quant(
        DType::INT4_G64,
        "int4_g64",
        (64, 34),
        (4, 64, Zero::Fixed(8)),
        &[(0, 0.12)],
        split::q4_0,
        "4 bits, one f16 scale per 64",
    ),
    quant(
        DType::INT4_G128,
        "int4_g128",
        (128, 66),
        (4, 128, Zero::Fixed(8)),
        &[(0, 0.12)],
        split::q4_0,
        "4 bits, one f16 scale per 128",
    ),
    quant(
        DType::UINT4_G32,
        "uint4_g32",
        (32, 20),
        (4, 32, Zero::Point),
        &[(0, 0.13), (2, 8.0)],
        split::q4_1,
        "4 bits, f16 scale and zero point per 32",
    ),
    quant(
        DType::UINT4_G64,
        "uint4_g64",
        (64, 36),
        (4, 64, Zero::Point),
        &[(0, 0.13), (2, 8.0)],
        split::q4_1,
        "4 bits, f16 scale and zero point per 64",
    ),
    quant(
        DType::UINT4_G128,
        "uint4_g128",
        (128, 68),
        (4, 128, Zero::Point),
        &[(0, 0.13), (2, 8.0)],
        split::q4_1,
        "4 bits, f16 scale and zero point per 128",
    ),
    quant(
        DType::INT8_G64,
        "int8_g64",
        (64, 66),
        (8, 64, Zero::Fixed(128)),
        &[(0, 8e-3)],
        split::q8_0,
        "8 bits, one f16 scale per 64",
    ),
    quant(
        DType::INT8_G128,
        "int8_g128",
        (128, 130),
        (8, 128, Zero::Fixed(128)),
        &[(0, 8e-3)],
        split::q8_0,
        "8 bits, one f16 scale per 128",
    ),
    quant(
        DType::MXFP4,
        "mxfp4",
        (32, 18),
        (4, 32, Zero::E2M1),
        &[(0, 0.06)],
        split::q4_0,
        "4-bit floats (e2m1), a power of two per 32",
    ),
    quant(
        DType::NVFP4,
        "nvfp4",
        (32, 20),
        (4, 16, Zero::E2M1),
        &[(0, 0.06), (2, 0.06)],
        split::two_scales,
        "4-bit floats (e2m1), one scale per 16",
    ),
    quant(
        DType::E4M3_G32,
        "e4m3_g32",
        (32, 34),
        (8, 32, Zero::E4M3),
        &[(0, 0.57)],
        split::e4m3,
        "8-bit floats (e4m3), one f16 scale per 32",
    ),
    quant(
        DType::E4M3_G128,
        "e4m3_g128",
        (128, 130),
        (8, 128, Zero::E4M3),
        &[(0, 0.57)],
        split::e4m3,
        "8-bit floats (e4m3), one f16 scale per 128",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats_are_their_own_nearest() {
        for byte in (0..=255).filter(|byte| byte & 127 != 127 && *byte != 128) {
            assert_eq!(to_e4m3(e4m3(byte)), byte);
            assert_eq!(Zero::E4M3.real(byte, E4M3_UNIT, 0.0), e4m3(byte));
        }
        let rounded = [17.0, 19.0, -1000.0, 0.001, 0.0009, 1e-9, 1.96875].map(|x| e4m3(to_e4m3(x)));
        assert_eq!(rounded, [16.0, 20.0, -448.0, 1.0 / 512.0, 0.0, 0.0, 2.0]);
    }
}
