//! Weights that nobody wrote: made from a seed where they are to lie, so that a model of any size can be timed.
//!
//! ```text
//!  a packed matrix   scales, scales, codes, codes, ...      words of 32 bits, the same kinds of them in every strip
//!  word i            = hash(seed, i) & mask | value         random codes: mask ffffffff; scales: mask 0
//! ```
//!
//! Codes are uniform, floats have random signs and mantissas, scales are one constant, such that elements have a variance of
//! about `1 / columns` and activations stay in range. Everything is a function of a word's number, so a GPU, or any number of
//! threads, make the same bytes in any order.

use crate::formats::{DType, E4M3_UNIT, IntFormat, Zero};
use crate::layout::{StripLayout, packed_bytes};
use crate::plan::WeightSpec;
use crate::planes::{GROUP, PlanesLayout};
use crate::{Result, bail, text};
use half::f16;

/// The kernel that fills memory on a GPU. Its arguments: where to, [`Fill::pattern`], and `u64[3]` of words, words of the
/// pattern and the seed.
pub const KERNEL: &str = "mansard_synthetic";

/// Some bytes of a packed weight, all made alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Where they begin.
    pub at: usize,
    /// How many, a multiple of 4.
    pub bytes: usize,
    /// Mask and value of each word of 32 bits; from the start again after the last.
    pub pattern: Vec<[u32; 2]>,
    /// What words depend on beside their number.
    pub seed: u64,
}

/// Every bit is random.
const RANDOM: [u32; 2] = [u32::MAX, 0];

/// A quarter more than what the root mean square of uniform remainders is: few groups have more.
const SPREAD: f32 = 5.8;

/// How to make weight number `index` of a program.
///
/// # Errors
/// Where its type has no such form.
pub fn fills(spec: &WeightSpec, index: usize, seed: u64) -> Result<Vec<Fill>> {
    let ty = text::parse_type(&spec.ty)?;
    let Some((dtype, dims)) = ty.as_tensor() else { bail!(Input, "{ty} is no weight") };
    let shape: Vec<usize> = dims.iter().filter_map(|dim| dim.fixed()).collect();
    if shape.len() != dims.len() || packed_bytes(dtype, &shape) != spec.bytes {
        bail!(Input, "expected {} packed bytes of {ty}, found {}", packed_bytes(dtype, &shape), spec.bytes);
    }
    let columns = *shape.last().unwrap_or(&1);
    let parts = match (dtype, shape.len()) {
        (_, 0 | 1) => vec![(0, spec.bytes, vec![[0, 1f32.to_bits()]])],
        (DType::Q8_PLANES, 2) => planes(columns, shape[0]),
        _ => vec![(0, spec.bytes, strip(dtype, columns)?)],
    };
    let fill = |(part, (at, bytes, pattern))| {
        let number = (2 * index + part + 1) as u64;
        Fill { at, bytes, pattern, seed: seed ^ number.wrapping_mul(0xd134_2543_de82_ef95) }
    };
    Ok(parts.into_iter().enumerate().map(fill).collect())
}

impl Fill {
    /// Word `index`: of a counter-based generator (SplitMix64) its upper half.
    pub fn word(&self, index: usize) -> u32 {
        let [mask, value] = self.pattern[index % self.pattern.len()];
        let mut z = self.seed.wrapping_add(index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 32) as u32 & mask | value
    }

    /// Makes some of the bytes, from word `first` on.
    pub fn write(&self, first: usize, out: &mut [u8]) {
        for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            *out = self.word(first + i).to_le_bytes();
        }
    }
}

/// One strip.
fn strip(dtype: DType, columns: usize) -> Result<Vec<[u32; 2]>> {
    let layout = StripLayout::new(dtype, columns);
    let words = layout.bytes / 4;
    let Some(int) = dtype.int() else {
        let exponent = -(1.5 * (columns as f32).sqrt()).log2().round() as i32;
        let (mask, value) = match dtype {
            DType::F32 => (0x807f_ffff, biased(exponent, 127) << 23),
            DType::BF16 => (0x807f_807f, both(biased(exponent, 127) << 7)),
            DType::F16 => (0x83ff_83ff, both(biased(exponent.max(-14), 15) << 10)),
            _ => bail!(Unsupported, "weights of {dtype} are not made up"),
        };
        return Ok(vec![[mask, value]; words.min(1)]);
    };
    let (scale, second) = figures(int, columns);
    let word = |word: usize| match 4 * word % layout.chunk_bytes {
        at if at < layout.mins => [0, both(scale.to_bits().into())],
        at if int.zero.has_mins() && at < layout.high => [0, both(second.to_bits().into())],
        // 8-bit floats below 2: half of their exponents, and all numbers.
        _ if int.zero == Zero::E4M3 => [0xbfbf_bfbf, 0],
        _ => RANDOM,
    };
    Ok((0..words).map(word).collect())
}

/// The scale of uniform codes, and the minimum or zero point beside it.
fn figures(int: IntFormat, columns: usize) -> (f16, f16) {
    let codes = f32::from(1u16 << int.bits);
    // Of uniform codes, of the integers that 4-bit floats are, and of f16 that are 8-bit floats below 2.
    let deviation = match int.zero {
        Zero::E2M1 => 5.85,
        Zero::E4M3 => 0.6 / E4M3_UNIT,
        _ => codes / 12f32.sqrt(),
    };
    let scale = 1.0 / (deviation * (columns as f32).sqrt());
    let second = match int.zero {
        Zero::Min => -scale * (codes - 1.0) / 2.0,
        Zero::Point => codes / 2.0,
        Zero::Fixed(_) | Zero::E2M1 | Zero::E4M3 => 0.0,
    };
    (f16::from_f32(scale), f16::from_f32(second))
}

/// Both planes of `rows` rows.
fn planes(columns: usize, rows: usize) -> Vec<(usize, usize, Vec<[u32; 2]>)> {
    let layout = PlanesLayout::new(columns);
    let codes = 256.0 / 12f32.sqrt();
    let scale = both(f16::from_f32(1.0 / (codes * (columns as f32).sqrt())).to_bits().into());
    let upper = |word: usize| match 4 * word {
        at if at >= layout.spreads() => [0, SPREAD.to_bits()],
        at if at % layout.strip.chunk_bytes < layout.strip.mins => [0, scale],
        _ => RANDOM,
    };
    let groups = 2 * (columns / GROUP);
    let lower = |word: usize| match 4 * word {
        at if at < groups => [0, scale],
        at if at < layout.codes => [0, 0],
        _ => RANDOM,
    };
    let upper = (0..layout.strip_bytes / 4).map(upper).collect();
    let lower = (0..layout.row_bytes / 4).map(lower).collect();
    let end = layout.upper_bytes(rows);
    vec![(0, end, upper), (end, layout.lower_bytes(rows), lower)]
}

fn biased(exponent: i32, bias: i32) -> u32 {
    (exponent + bias).max(1) as u32
}

fn both(half: u32) -> u32 {
    half << 16 | half
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode;
    use crate::value::Value;

    fn made(ty: &str, dtype: DType, shape: &[usize]) -> (Vec<u8>, Vec<Fill>) {
        let spec = WeightSpec { name: "w".into(), ty: ty.into(), bytes: packed_bytes(dtype, shape), recipe: None };
        let fills = fills(&spec, 3, 7).unwrap();
        let mut bytes = vec![0; spec.bytes];
        for fill in &fills {
            fill.write(0, &mut bytes[fill.at..fill.at + fill.bytes]);
        }
        assert_eq!(fills.iter().map(|fill| fill.bytes).sum::<usize>(), spec.bytes);
        (bytes, fills)
    }

    #[test]
    fn elements_have_the_variance_that_is_meant() {
        let (rows, columns) = (40, 512);
        let quantized = [
            DType::Q4_0,
            DType::Q4_1,
            DType::Q5_0,
            DType::Q5_1,
            DType::Q8_0,
            DType::Q6_K,
            DType::INT4_G64,
            DType::UINT4_G32,
            DType::MXFP4,
            DType::E4M3_G32,
            DType::E4M3_G128,
        ];
        for dtype in [DType::F32, DType::BF16, DType::F16].into_iter().chain(quantized) {
            let ty = format!("{dtype}[{rows}, {columns}]");
            let (bytes, _) = made(&ty, dtype, &[rows, columns]);
            let Value::Tensor(values) = decode::operand(dtype, &[rows, columns], &bytes).unwrap() else {
                panic!("{ty}")
            };
            let count = (rows * columns) as f32;
            let mean = values.data.iter().sum::<f32>() / count;
            let variance = values.data.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / count * columns as f32;
            assert!((0.4..2.5).contains(&variance), "{ty}: variance {variance} / columns");
            assert!(mean.abs() * (columns as f32).sqrt() < 0.15, "{ty}: mean {mean}");
        }
    }

    #[test]
    fn planes_are_one_matrix() {
        let (bytes, fills) = made("q8_planes[48, 256]", DType::Q8_PLANES, &[48, 256]);
        assert_eq!(fills.len(), 2);
        let Value::Planes(planes) = decode::operand(DType::Q8_PLANES, &[48, 256], &bytes).unwrap() else { panic!() };
        let square = |values: &[f32]| values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32 * 256.0;
        assert!((0.8..1.2).contains(&square(&planes.upper)), "{}", square(&planes.upper));
        assert!((0.001..0.01).contains(&square(&planes.lower)), "{}", square(&planes.lower));
    }

    #[test]
    fn words_depend_on_their_number_alone() {
        let (bytes, fills) = made("q4_0[16, 128]", DType::Q4_0, &[16, 128]);
        let mut later = vec![0; bytes.len() - 400];
        fills[0].write(100, &mut later);
        assert_eq!(later, bytes[400..]);
        let vector = made("f32[20]", DType::F32, &[20]).0;
        assert_eq!(vector[..4], 1f32.to_le_bytes());
        let wrong = WeightSpec { name: "w".into(), ty: "q4_0[16, 128]".into(), bytes: 64, recipe: None };
        assert!(super::fills(&wrong, 0, 0).is_err());
    }
}
