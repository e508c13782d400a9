//! Reals -> quant blocks: rounding to nearest, with the scale of each group chosen for the least squared error.
//!
//! ```text
//! 0.9 -0.1 0.05 .. (32 reals)   --q4_0-->   scale -0.11, codes 0 9 8 ..   (real = scale * (code - 8))
//! ```
//!
//! A group's largest value need not be met: a few scales around that one are tried, up to some that clip it, each is replaced
//! by the least-squares scale for the codes it gives, and the best of them, rounded to f16, decides the codes. No calibration,
//! no randomness: the same reals give the same bytes everywhere (sums are taken in 16 lanes, in one order). 4-bit floats have
//! scales of fewer bits, see [`float4`].

mod float4;

use crate::formats::{DType, IntFormat, Zero};
use crate::{Result, bail};
use half::f16;

/// Puts a block's codes and its two figures in file order: scale and minimum (0 where the zero point is fixed), or, of 4-bit
/// floats, the scales of its first and last group.
type Join = fn(codes: &[u8], first: f16, second: f16, out: &mut [u8]);

/// What reals can be quantized to: formats whose quant block is one group, and 4-bit floats.
const QUANTIZERS: [(DType, Join); 14] = [
    (DType::Q4_0, join::q4_0),
    (DType::Q4_1, join::q4_1),
    (DType::Q5_0, join::q5_0),
    (DType::Q5_1, join::q5_1),
    (DType::Q8_0, join::q8_0),
    (DType::INT4_G64, join::q4_0),
    (DType::INT4_G128, join::q4_0),
    (DType::UINT4_G32, join::q4_1),
    (DType::UINT4_G64, join::q4_1),
    (DType::UINT4_G128, join::q4_1),
    (DType::INT8_G64, join::q8_0),
    (DType::INT8_G128, join::q8_0),
    (DType::MXFP4, join::q4_0),
    (DType::NVFP4, join::two_scales),
];

/// Lanes that sums are taken in.
const LANES: usize = 16;

/// Largest quant block of a format that reals are quantized to.
const MOST: usize = 128;

/// Reals can be quantized to `dtype`.
pub fn can_quantize(dtype: DType) -> bool {
    QUANTIZERS.iter().any(|q| q.0 == dtype)
}

/// Quantizes whole blocks: `out` holds [`DType::bytes`] of `reals.len()` elements.
///
/// # Errors
/// Where the format is not made from reals, the lengths disagree, a value is not finite or a scale does not fit f16.
pub fn quantize(dtype: DType, reals: &[f32], out: &mut [u8]) -> Result<()> {
    let (format, quantizer) = (dtype.format(), QUANTIZERS.iter().find(|q| q.0 == dtype));
    let (Some(int), Some((_, join))) = (format.int, quantizer) else {
        let names: Vec<String> = QUANTIZERS.iter().map(|q| q.0.to_string()).collect();
        bail!(Unsupported, "reals cannot be quantized to {dtype}, only to {}", names.join(", "));
    };
    if dtype.bytes(reals.len()) != Some(out.len()) {
        bail!(Internal, "{} bytes for {} elements of {dtype}", out.len(), reals.len());
    }
    let mut codes = [0; MOST];
    let codes = &mut codes[..format.block];
    let tensor = float4::outer_scale(reals);
    for (reals, out) in reals.chunks_exact(format.block).zip(out.chunks_exact_mut(format.block_bytes)) {
        if let Some(x) = reals.iter().find(|x| !x.is_finite()) {
            bail!(Input, "{x} cannot be quantized");
        }
        let (scale, min) = match int.zero {
            Zero::Fixed(zero) => (symmetric(reals, int, zero), 0.0),
            Zero::Min => with_minimum(reals, int),
            Zero::E2M1 => float4::scales(reals, int, tensor),
            Zero::Point => with_zero_point(reals, int),
        };
        let (scale, min) = (f16::from_f32(scale), f16::from_f32(min));
        if !scale.is_finite() || !min.is_finite() {
            bail!(Input, "the scale of a group with values like {} does not fit f16", reals[0]);
        }
        match int.zero {
            Zero::E2M1 => float4::encode(reals, int, [scale.to_f32(), min.to_f32()], codes),
            Zero::Point => encode(reals, int, (scale.to_f32(), -scale.to_f32() * min.to_f32()), codes),
            _ => encode(reals, int, (scale.to_f32(), min.to_f32()), codes),
        }
        join(codes, scale, min, out);
    }
    Ok(())
}

/// The nearest codes under a given scale and minimum.
fn encode(reals: &[f32], int: IntFormat, (scale, min): (f32, f32), codes: &mut [u8]) {
    let (zero, high) = (f32::from(int.zero.fixed().unwrap_or(0)), top(int));
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    for (code, x) in codes.iter_mut().zip(reals) {
        *code = round(((x - min) * inverse + zero).clamp(0.0, high)) as u8;
    }
}

/// The largest code.
fn top(int: IntFormat) -> f32 {
    ((1u32 << int.bits) - 1) as f32
}

/// To the nearest integer, ties to even, for values well below 2^22: one addition brings the fraction out of f32's digits.
fn round(x: f32) -> f32 {
    const SHIFT: f32 = (3 << 22) as f32;
    (x + SHIFT) - SHIFT
}

/// How far beyond the codes the largest value may lie, in steps; smaller steps matter less where there are many codes.
fn candidates(int: IntFormat) -> impl Iterator<Item = f32> {
    let (first, step, count) = if int.bits <= 5 { (-1.0, 0.5, 9) } else { (-0.5, 0.5, 4) };
    (0..count).map(move |i| first + step * i as f32)
}

/// `real = scale * q` with `q` in `-zero ..= top - zero`: the scale of least squared error.
fn symmetric(reals: &[f32], int: IntFormat, zero: u8) -> f32 {
    // The side with one code more takes the largest value: the scale's sign is free.
    let largest = reals.iter().fold(0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    if largest == 0.0 {
        return 0.0;
    }
    let (low, high) = (-(zero as f32), top(int) - zero as f32);
    let (mut best, mut scale) = (0.0, 0.0);
    for beyond in candidates(int) {
        let inverse = (low - beyond) / largest;
        let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
        for x in reals.as_chunks::<LANES>().0 {
            for i in 0..LANES {
                let q = round((x[i] * inverse).clamp(low, high));
                xq[i] += x[i] * q;
                qq[i] += q * q;
            }
        }
        let (xq, qq) = (sum(xq), sum(qq));
        // Squared error: sum of x^2 - xq^2 / qq.
        if xq * xq > best * qq {
            (best, scale) = (xq * xq / qq, xq / qq);
        }
    }
    scale
}

/// `real = scale * q + min` with `q` in `0 ..= top`: scale and minimum of least squared error.
fn with_minimum(reals: &[f32], int: IntFormat) -> (f32, f32) {
    let (low, high) = reals.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
    if low == high {
        return (0.0, low);
    }
    let n = reals.len() as f32;
    let mut best = (f32::MAX, ((high - low) / top(int), low));
    for beyond in candidates(int) {
        let steps = top(int) + beyond;
        let inverse = steps / (high - low);
        // What is clipped is clipped at both ends.
        let from = low + beyond.max(0.0) / 2.0 / inverse;
        let (mut sq, mut qq, mut sx, mut xq) = ([0f32; LANES], [0f32; LANES], [0f32; LANES], [0f32; LANES]);
        let mut xx = [0f32; LANES];
        for x in reals.as_chunks::<LANES>().0 {
            for i in 0..LANES {
                let q = round(((x[i] - from) * inverse).clamp(0.0, top(int)));
                let x = x[i] - low; // differences of like figures below
                (sq[i], qq[i], sx[i], xq[i], xx[i]) =
                    (sq[i] + q, qq[i] + q * q, sx[i] + x, xq[i] + x * q, xx[i] + x * x);
            }
        }
        let (sq, qq, sx, xq, xx) = (sum(sq), sum(qq), sum(sx), sum(xq), sum(xx));
        let determinant = n * qq - sq * sq;
        if determinant > 0.0 {
            let scale = (n * xq - sx * sq) / determinant;
            let min = (sx - scale * sq) / n;
            let error = xx - scale * xq - min * sx;
            if error < best.0 {
                best = (error, (scale, min + low));
            }
        }
    }
    best.1
}

/// `real = scale * (q - zero)`, an integer `zero` in `0 ..= top`: near [`with_minimum`] where that lies near zero.
fn with_zero_point(reals: &[f32], int: IntFormat) -> (f32, f32) {
    let (scale, min) = with_minimum(reals, int);
    if (-scale * top(int)..=0.0).contains(&min) && scale > 0.0 {
        return (scale, round(-min / scale));
    }
    let (low, high) = reals.iter().fold((0f32, 0f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let scale = (high - low) / top(int);
    (scale, if scale > 0.0 { round(-low / scale) } else { 0.0 })
}

/// Puts a block of `dtype` together: its codes, and scale and minimum (or zero point), or the scales of both groups.
///
/// # Errors
/// Where blocks of `dtype` are not made here.
pub(crate) fn join(dtype: DType, codes: &[u8], (first, second): (f16, f16), out: &mut [u8]) -> Result<()> {
    let Some((_, join)) = QUANTIZERS.iter().find(|q| q.0 == dtype) else {
        bail!(Internal, "no blocks of {dtype} are made");
    };
    join(codes, first, second, out);
    Ok(())
}

/// By halves: the same order everywhere.
fn sum(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// How each format's block is put together; the inverse of [`crate::formats`]' splits.
mod join {
    use half::f16;

    fn nibbles(codes: &[u8], out: &mut [u8]) {
        let (first, second) = codes.split_at(codes.len() / 2);
        for ((out, low), high) in out.iter_mut().zip(first).zip(second) {
            *out = low & 15 | high << 4;
        }
    }

    fn fifth_bits(codes: &[u8], out: &mut [u8]) {
        let word = codes.iter().enumerate().fold(0u32, |word, (i, code)| word | u32::from(code >> 4 & 1) << i);
        out[..4].copy_from_slice(&word.to_le_bytes());
    }

    pub fn q4_0(codes: &[u8], scale: f16, _: f16, out: &mut [u8]) {
        out[..2].copy_from_slice(&scale.to_le_bytes());
        nibbles(codes, &mut out[2..]);
    }

    pub fn two_scales(codes: &[u8], first: f16, last: f16, out: &mut [u8]) {
        q4_1(codes, first, last, out);
    }

    pub fn q4_1(codes: &[u8], scale: f16, min: f16, out: &mut [u8]) {
        out[..2].copy_from_slice(&scale.to_le_bytes());
        out[2..4].copy_from_slice(&min.to_le_bytes());
        nibbles(codes, &mut out[4..]);
    }

    pub fn q5_0(codes: &[u8], scale: f16, _: f16, out: &mut [u8]) {
        out[..2].copy_from_slice(&scale.to_le_bytes());
        fifth_bits(codes, &mut out[2..]);
        nibbles(codes, &mut out[6..]);
    }

    pub fn q5_1(codes: &[u8], scale: f16, min: f16, out: &mut [u8]) {
        out[..2].copy_from_slice(&scale.to_le_bytes());
        out[2..4].copy_from_slice(&min.to_le_bytes());
        fifth_bits(codes, &mut out[4..]);
        nibbles(codes, &mut out[8..]);
    }

    pub fn q8_0(codes: &[u8], scale: f16, _: f16, out: &mut [u8]) {
        out[..2].copy_from_slice(&scale.to_le_bytes());
        for (out, code) in out[2..].iter_mut().zip(codes) {
            *out = code ^ 0x80; // code - 128 as a signed byte
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::dequantize;
    use crate::sample::Random;

    /// Root mean square of the error, as a share of that of the reals.
    fn error(dtype: DType, reals: &[f32]) -> f64 {
        let mut bytes = vec![0; dtype.bytes(reals.len()).unwrap()];
        quantize(dtype, reals, &mut bytes).unwrap();
        let mut back = vec![0.0; reals.len()];
        dequantize(dtype, &bytes, &mut back);
        let off: f64 = reals.iter().zip(&back).map(|(x, y)| ((x - y) as f64).powi(2)).sum();
        (off / reals.iter().map(|x| (*x as f64).powi(2)).sum::<f64>()).sqrt()
    }

    /// About normal: a sum of uniform variables.
    fn normal(count: usize) -> Vec<f32> {
        let mut random = Random::new(7);
        (0..count).map(|_| (0..12).map(|_| random.real()).sum::<f32>() / 2.0).collect()
    }

    #[test]
    fn codes_come_back() {
        // Quantizing again what a format holds changes next to nothing.
        for (dtype, _) in QUANTIZERS {
            let reals = normal(16 * dtype.format().block);
            let (size, mut once) = (dtype.bytes(reals.len()).unwrap(), vec![0.0; reals.len()]);
            let (mut first, mut second) = (vec![0; size], vec![0; size]);
            quantize(dtype, &reals, &mut first).unwrap();
            dequantize(dtype, &first, &mut once);
            quantize(dtype, &once, &mut second).unwrap();
            let mut twice = vec![0.0; reals.len()];
            dequantize(dtype, &second, &mut twice);
            let most = once.iter().zip(&twice).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(most < 5e-3, "{dtype}: {most}");
        }
    }

    #[test]
    fn errors_are_near_the_least_possible() {
        // Measured on normal values; the plain scale (largest value met, no search) gives 0.0857 for q4_0.
        let reals = normal(64 * 128);
        let most = [
            (DType::Q4_0, 0.083),
            (DType::Q4_1, 0.076),
            (DType::Q5_0, 0.043),
            (DType::Q5_1, 0.038),
            (DType::Q8_0, 6e-3),
            (DType::INT4_G64, 0.095),
            (DType::INT4_G128, 0.105),
            (DType::UINT4_G32, 0.083),
            (DType::UINT4_G64, 0.092),
            (DType::UINT4_G128, 0.098),
            (DType::INT8_G64, 5.8e-3),
            (DType::INT8_G128, 6.3e-3),
            (DType::MXFP4, 0.115),
            (DType::NVFP4, 0.09),
        ];
        for (dtype, most) in most {
            let found = error(dtype, &reals);
            assert!(found < most, "{dtype}: {found}");
        }
    }

    #[test]
    fn odd_groups() {
        for (dtype, _) in QUANTIZERS {
            let block = dtype.format().block;
            let mut spike = vec![0.0; block];
            spike[3] = -6.0; // a value that 4-bit floats have, under a power of two
            for reals in [vec![0.0; block], vec![0.25; block], spike] {
                let mut bytes = vec![0; dtype.bytes(block).unwrap()];
                quantize(dtype, &reals, &mut bytes).unwrap();
                let mut back = vec![1.0; block];
                dequantize(dtype, &bytes, &mut back);
                let off = reals.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 3e-3, "{dtype} {reals:?}: {back:?}");
            }
            let mut bytes = vec![0; dtype.bytes(block).unwrap()];
            assert!(quantize(dtype, &vec![f32::NAN; block], &mut bytes).is_err());
            assert!(quantize(dtype, &vec![1e30; block], &mut bytes).is_err());
        }
        assert!(quantize(DType::Q6_K, &[0.0; 256], &mut [0; 210]).is_err());
    }
}
