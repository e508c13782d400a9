//! Reals -> quant blocks: rounding to nearest, with the scale of each group chosen for the least squared error.
//!
//! ```text
//! 0.9 -0.1 0.05 .. (32 reals)   --q4_0-->   scale -0.11, codes 0 9 8 ..   (real = scale * (code - 8))
//! ```
//!
//! A block's figures (scales, minima) are put first, then read as any reader of the format would; codes are the nearest under
//! what was read. Every real may have an importance, which its squared error is multiplied with. No randomness: the same reals
//! give the same bytes everywhere. How one group's scale is found is in `scales`; formats whose scales have few bits themselves
//! are in [`float4`] and `kquants`. [`gptq`] chooses the codes of whole rows by what a matrix is multiplied with.

pub mod awq;
mod blocks;
mod float4;
pub mod gptq;
mod kquants;
mod linear;
pub mod moments;
mod scales;
mod table;

pub use gptq::TILE as ROWS;
pub use table::{Needs, Prepared, QUANTIZERS, Quantizer, input_scales};

use crate::formats::{DType, E4M3_UNIT, Format, IntFormat, Split, Zero, to_e4m3};
use crate::{Result, bail};
use half::f16;

/// How a format's blocks are made.
struct Writer {
    dtype: DType,
    /// Puts the scales (and minima) of a block.
    figures: fn(Reals<'_>, IntFormat, &mut [u8]),
    /// Puts its codes.
    codes: fn(&[u8], &mut [u8]),
}

/// What reals can be quantized to.
static WRITERS: [Writer; 19] = [
    writer(DType::Q4_0, one_group, blocks::q4_0),
    writer(DType::Q4_1, one_group, blocks::q4_1),
    writer(DType::Q5_0, one_group, blocks::q5_0),
    writer(DType::Q5_1, one_group, blocks::q5_1),
    writer(DType::Q8_0, one_group, blocks::q8_0),
    writer(DType::Q4_K, kquants::pairs, blocks::q4_k),
    writer(DType::Q5_K, kquants::pairs, blocks::q5_k),
    writer(DType::Q6_K, kquants::singles, blocks::q6_k),
    writer(DType::INT4_G64, one_group, blocks::q4_0),
    writer(DType::INT4_G128, one_group, blocks::q4_0),
    writer(DType::UINT4_G32, one_group, blocks::q4_1),
    writer(DType::UINT4_G64, one_group, blocks::q4_1),
    writer(DType::UINT4_G128, one_group, blocks::q4_1),
    writer(DType::INT8_G64, one_group, blocks::q8_0),
    writer(DType::INT8_G128, one_group, blocks::q8_0),
    writer(DType::MXFP4, float_groups, blocks::q4_0),
    writer(DType::NVFP4, float_groups, blocks::q4_1),
    writer(DType::E4M3_G32, one_group, blocks::e4m3),
    writer(DType::E4M3_G128, one_group, blocks::e4m3),
];

const fn writer(dtype: DType, figures: fn(Reals<'_>, IntFormat, &mut [u8]), codes: fn(&[u8], &mut [u8])) -> Writer {
    Writer { dtype, figures, codes }
}

/// Largest quant block, and most groups of one.
const MOST: (usize, usize) = (256, 16);

/// Every real counts alike.
const ALIKE: [f32; MOST.0] = [1.0; MOST.0];

/// Neighbouring reals of a row, what each one's squared error is multiplied with, and what the row's scales are multiples of
/// where the format has such a figure.
#[derive(Clone, Copy)]
struct Reals<'a> {
    values: &'a [f32],
    importance: &'a [f32],
    outer: f32,
}

impl<'a> Reals<'a> {
    fn groups(self, group: usize) -> impl Iterator<Item = Reals<'a>> {
        let parts = self.values.chunks_exact(group).zip(self.importance.chunks_exact(group));
        parts.map(move |(values, importance)| Reals { values, importance, outer: self.outer })
    }
}

/// Reals can be quantized to `dtype`.
pub fn can_quantize(dtype: DType) -> bool {
    WRITERS.iter().any(|w| w.dtype == dtype)
}

/// Quantizes whole blocks of one row, to nearest: `out` holds [`DType::bytes`] of `reals.len()` elements.
///
/// # Errors
/// Where the format is not made from reals, the lengths disagree, a value is not finite or a scale does not fit f16.
pub fn quantize(dtype: DType, reals: &[f32], out: &mut [u8]) -> Result<()> {
    quantize_by_importance(dtype, reals, None, out)
}

/// [`quantize`], in which the squared error of `reals[i]` counts `importance[i]` times (none may be negative).
///
/// # Errors
/// As [`quantize`].
pub fn quantize_by_importance(dtype: DType, reals: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> Result<()> {
    let blocks = Blocks::of(dtype)?;
    blocks.check(reals, out)?;
    let mut codes = [0; MOST.0];
    let size = blocks.format.block;
    let outer = float4::outer_scale(reals);
    for (index, out) in out.chunks_exact_mut(blocks.format.block_bytes).enumerate() {
        let range = index * size..(index + 1) * size;
        let importance = importance.map_or(&ALIKE[..size], |all| &all[range.clone()]);
        let figures = blocks.fit(Reals { values: &reals[range.clone()], importance, outer }, out)?;
        for (group, (values, codes)) in
            reals[range].chunks_exact(blocks.int.group).zip(codes.chunks_exact_mut(blocks.int.group)).enumerate()
        {
            encode(values, blocks.int, figures.of(group), codes);
        }
        blocks.put(&codes[..size], out);
    }
    Ok(())
}

/// Scales and minima of a block, as its readers see them.
#[derive(Clone, Copy)]
struct Figures {
    scales: [f32; MOST.1],
    mins: [f32; MOST.1],
}

impl Figures {
    /// Scale and minimum (or zero point) of a group.
    fn of(&self, group: usize) -> (f32, f32) {
        (self.scales[group], self.mins[group])
    }
}

/// The blocks of one format, and how they are made.
#[derive(Clone, Copy)]
struct Blocks {
    format: &'static Format,
    int: IntFormat,
    writer: &'static Writer,
}

impl Blocks {
    fn of(dtype: DType) -> Result<Blocks> {
        let (format, writer) = (dtype.format(), WRITERS.iter().find(|w| w.dtype == dtype));
        let (Some(int), Some(writer)) = (format.int, writer) else {
            let names: Vec<String> = WRITERS.iter().map(|w| w.dtype.to_string()).collect();
            bail!(Unsupported, "reals cannot be quantized to {dtype}, only to {}", names.join(", "));
        };
        Ok(Blocks { format, int, writer })
    }

    /// Whole blocks of finite reals, and room for what they become.
    fn check(&self, reals: &[f32], out: &[u8]) -> Result<()> {
        if self.format.dtype.bytes(reals.len()) != Some(out.len()) {
            bail!(Internal, "{} bytes for {} elements of {}", out.len(), reals.len(), self.format.dtype);
        }
        if let Some(x) = reals.iter().find(|x| !x.is_finite()) {
            bail!(Input, "{x} cannot be quantized");
        }
        Ok(())
    }

    /// Puts the figures that suit the reals of a block best, and reads them.
    fn fit(&self, reals: Reals<'_>, out: &mut [u8]) -> Result<Figures> {
        (self.writer.figures)(reals, self.int, out);
        let figures = self.read(out);
        let groups = self.format.block / self.int.group;
        if !figures.scales[..groups].iter().chain(&figures.mins[..groups]).all(|x| x.is_finite()) {
            bail!(Input, "the scale of a group with values like {} does not fit f16", reals.values[0]);
        }
        Ok(figures)
    }

    fn read(&self, block: &[u8]) -> Figures {
        let (mut codes, mut figures) = ([0; MOST.0], Figures { scales: [0.0; MOST.1], mins: [0.0; MOST.1] });
        let groups = self.format.block / self.int.group;
        let Figures { scales, mins } = &mut figures;
        let split =
            Split { codes: &mut codes[..self.format.block], scales: &mut scales[..groups], mins: &mut mins[..groups] };
        (self.format.split)(block, split);
        figures
    }

    fn put(&self, codes: &[u8], out: &mut [u8]) {
        (self.writer.codes)(codes, out);
    }
}

/// Figures of a block that is one group: an f16 scale, and a minimum or zero point where the format has one.
fn one_group(reals: Reals<'_>, int: IntFormat, out: &mut [u8]) {
    let (scale, second) = scales::of_group(reals, int);
    put_figures(int, (f16::from_f32(scale), f16::from_f32(second)), out);
}

/// Figures of 4-bit floats.
fn float_groups(reals: Reals<'_>, int: IntFormat, out: &mut [u8]) {
    let (first, last) = float4::scales(reals, int);
    put_figures(int, (f16::from_f32(first), f16::from_f32(last)), out);
}

fn put_figures(int: IntFormat, (first, second): (f16, f16), out: &mut [u8]) {
    out[..2].copy_from_slice(&first.to_le_bytes());
    if int.zero.has_mins() || int.group < 32 {
        out[2..4].copy_from_slice(&second.to_le_bytes());
    }
}

/// The nearest codes of a group under a given scale and minimum.
fn encode(reals: &[f32], int: IntFormat, figures: (f32, f32), codes: &mut [u8]) {
    let line = Line::new(int, figures);
    for (code, x) in codes.iter_mut().zip(reals) {
        *code = line.nearest(*x);
    }
}

/// The reals that a group's codes stand for.
#[derive(Clone, Copy)]
struct Line {
    int: IntFormat,
    figures: (f32, f32),
    inverse: f32,
    /// What is added before rounding.
    zero: f32,
    high: f32,
}

impl Line {
    fn new(int: IntFormat, (scale, min): (f32, f32)) -> Line {
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let zero = match int.zero {
            Zero::Fixed(zero) => f32::from(zero),
            Zero::Point => min,
            Zero::Min | Zero::E2M1 | Zero::E4M3 => 0.0,
        };
        Line { int, figures: (scale, min), inverse, zero, high: top(int) }
    }

    /// The code of the nearest.
    #[inline]
    fn nearest(&self, x: f32) -> u8 {
        match self.int.zero {
            Zero::E2M1 => float4::nearest(x * self.inverse),
            Zero::E4M3 => to_e4m3(x * self.inverse * E4M3_UNIT),
            Zero::Min => round(((x - self.figures.1) * self.inverse).clamp(0.0, self.high)) as u8,
            _ => round((x * self.inverse + self.zero).clamp(0.0, self.high)) as u8,
        }
    }

    /// What a code stands for.
    #[inline]
    fn real(&self, code: u8) -> f32 {
        self.int.zero.real(code, self.figures.0, self.figures.1)
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

/// Puts a block of `dtype` together: its codes, and scale and minimum (or zero point), or the scales of both groups.
///
/// # Errors
/// Where blocks of `dtype` do not have these figures.
pub(crate) fn join(dtype: DType, codes: &[u8], figures: (f16, f16), out: &mut [u8]) -> Result<()> {
    let blocks = Blocks::of(dtype)?;
    if blocks.format.block > 128 {
        bail!(Internal, "blocks of {dtype} have more than two figures");
    }
    put_figures(blocks.int, figures, out);
    blocks.put(codes, out);
    Ok(())
}

#[cfg(test)]
mod tests;
