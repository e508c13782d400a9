//! The format table: every dtype a tensor can be stored in, and how its bytes become numbers.
//!
//! A quantized format stores blocks of `block` elements in `block_bytes` bytes. Inside a block every `group` consecutive
//! elements share one scale; `real = scale * (code - zero)` where the zero point is fixed, `real = scale * code + min`
//! where each group has its own minimum. Codes are unsigned, so that `u8 x s8` dot products apply to all of them.
//!
//! Source of the GGUF block layouts: the GGUF specification and the `ggml` quantization reference.

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
}

/// Where the code meaning 0.0 lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// `real = scale * (code - zero)` with one zero point for the whole format.
    Fixed(u8),
    /// `real = scale * code + min` with a minimum per group.
    Min,
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
/// `mins[block / group]` (untouched where the zero point is fixed).
pub struct Split<'a> {
    /// Unsigned codes, one per element.
    pub codes: &'a mut [u8],
    /// One scale per group.
    pub scales: &'a mut [f32],
    /// One minimum per group.
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
    /// Offsets of the block's f16 scales and minima, and what each is about when the reals span -1 to 1.
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

    /// Planes of int8 codes that activations of this dtype have.
    pub fn planes(self) -> Option<usize> {
        match self {
            DType::A8 => Some(1),
            DType::A16 => Some(2),
            _ => None,
        }
    }

    /// Caches can be stored in it.
    pub fn is_cached(self) -> bool {
        CACHED.contains(&self)
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
            *x = match int.zero {
                Zero::Fixed(zero) => scales[g] * (code as f32 - zero as f32),
                Zero::Min => scales[g] * code as f32 + mins[g],
            };
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

/// What caches can be stored in.
pub const CACHED: [DType; 4] = [DType::F16, DType::I8, DType::F32, DType::BF16];

/// The table, in the order of [`DType`].
pub static FORMATS: [Format; 20] = [
    row(DType::F32, "f32", 1, 4, "IEEE single precision"),
    row(DType::F16, "f16", 1, 2, "IEEE half precision"),
    row(DType::BF16, "bf16", 1, 2, "the upper half of f32"),
    row(DType::I32, "i32", 1, 4, "token ids, positions"),
    row(DType::I8, "i8", 1, 1, "cached keys and values: int8 codes with one scale for each head of a position"),
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
];

/// How each format's block comes apart.
mod split {
    use super::Split;

    fn f16(b: &[u8]) -> f32 {
        half::f16::from_le_bytes([b[0], b[1]]).to_f32()
    }

    /// Low nibbles are the first half of the elements, high nibbles the second.
    fn nibbles(bytes: &[u8], codes: &mut [u8]) {
        let (first, second) = codes.split_at_mut(codes.len() / 2);
        for ((b, low), high) in bytes.iter().zip(first).zip(second) {
            *low = b & 15;
            *high = b >> 4;
        }
    }

    /// Bit `i` of the 32-bit word is the fifth bit of element `i`.
    fn fifth_bits(bytes: &[u8], codes: &mut [u8]) {
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= ((word >> i & 1) as u8) << 4;
        }
    }

    pub fn q4_0(b: &[u8], s: Split<'_>) {
        s.scales[0] = f16(b);
        nibbles(&b[2..], s.codes);
    }

    pub fn q4_1(b: &[u8], s: Split<'_>) {
        s.scales[0] = f16(b);
        s.mins[0] = f16(&b[2..]);
        nibbles(&b[4..], s.codes);
    }

    pub fn q5_0(b: &[u8], s: Split<'_>) {
        s.scales[0] = f16(b);
        nibbles(&b[6..], s.codes);
        fifth_bits(&b[2..], s.codes);
    }

    pub fn q5_1(b: &[u8], s: Split<'_>) {
        s.scales[0] = f16(b);
        s.mins[0] = f16(&b[2..]);
        nibbles(&b[8..], s.codes);
        fifth_bits(&b[4..], s.codes);
    }

    pub fn q8_0(b: &[u8], s: Split<'_>) {
        s.scales[0] = f16(b);
        for (code, b) in s.codes.iter_mut().zip(&b[2..]) {
            *code = b ^ 0x80; // signed byte + 128
        }
    }

    pub fn q2_k(b: &[u8], s: Split<'_>) {
        let (d, dmin) = (f16(&b[80..]), f16(&b[82..]));
        for (g, packed) in b[..16].iter().enumerate() {
            s.scales[g] = d * (packed & 15) as f32;
            s.mins[g] = -dmin * (packed >> 4) as f32;
        }
        for (i, code) in s.codes.iter_mut().enumerate() {
            let (half, within) = (i / 128, i % 128);
            *code = b[16 + half * 32 + within % 32] >> (2 * (within / 32)) & 3;
        }
    }

    pub fn q3_k(b: &[u8], s: Split<'_>) {
        let d = f16(&b[108..]);
        for g in 0..16 {
            // Twelve bytes hold sixteen 6-bit scales: low nibbles in the first eight, high pairs in the last four.
            let low = if g < 8 { b[96 + g] & 15 } else { b[96 + g - 8] >> 4 };
            let high = b[104 + g % 4] >> (2 * (g / 4)) & 3;
            s.scales[g] = d * ((low | high << 4) as f32 - 32.0);
        }
        for (i, code) in s.codes.iter_mut().enumerate() {
            let (half, within) = (i / 128, i % 128);
            let low = b[32 + half * 32 + within % 32] >> (2 * (within / 32)) & 3;
            let high = b[within % 32] >> (half * 4 + within / 32) & 1;
            *code = low | high << 2;
        }
    }

    /// Eight 6-bit scales and eight 6-bit minima in twelve bytes, shared by Q4_K and Q5_K.
    fn scales_and_mins(b: &[u8], s: &mut Split<'_>) {
        let (d, dmin, q) = (f16(b), f16(&b[2..]), &b[4..16]);
        for g in 0..8 {
            let (scale, min) = if g < 4 {
                (q[g] & 63, q[g + 4] & 63)
            } else {
                (q[g + 4] & 15 | q[g - 4] >> 6 << 4, q[g + 4] >> 4 | q[g] >> 6 << 4)
            };
            s.scales[g] = d * scale as f32;
            s.mins[g] = -dmin * min as f32;
        }
    }

    pub fn q4_k(b: &[u8], mut s: Split<'_>) {
        scales_and_mins(b, &mut s);
        for (i, code) in s.codes.iter_mut().enumerate() {
            *code = b[16 + i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
        }
    }

    pub fn q5_k(b: &[u8], mut s: Split<'_>) {
        scales_and_mins(b, &mut s);
        for (i, code) in s.codes.iter_mut().enumerate() {
            let low = b[48 + i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
            *code = low | (b[16 + i % 32] >> (i / 32) & 1) << 4;
        }
    }

    pub fn q6_k(b: &[u8], s: Split<'_>) {
        let d = f16(&b[208..]);
        for g in 0..16 {
            s.scales[g] = d * b[192 + g] as i8 as f32;
        }
        for (i, code) in s.codes.iter_mut().enumerate() {
            let (half, within) = (i / 128, i % 128);
            let low = b[half * 64 + within % 64] >> (4 * (within / 64)) & 15;
            let high = b[128 + half * 32 + within % 32] >> (2 * (within / 32)) & 3;
            *code = low | high << 4;
        }
    }
}
