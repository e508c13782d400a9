//! Memory as kernels leave it -> values of the interpreter: how a compiled program's intermediate results are read.
//!
//! ```text
//! rows(a8[t, 64], bytes, 3)             3 rows of two lines of codes -> f32[3, 64]
//! weight(q4_1, [20, 64], bytes)         two strips of chunks         -> the reals that dot products see
//! cached(keys<f16>[c, 3, 64], block)    one cache block              -> one element of it
//! ```
//!
//! The layouts are those of [`crate::layout`]; sizes are checked, so any bytes may be given.

use crate::formats::{DType, IntFormat, e4m3};
use crate::layout::{
    A8, CACHE_BLOCK, STRIP, StripLayout, cache_offset, cache_scales, cache_scales_bytes, packed_bytes, row_bytes,
};
use crate::planes::{CENTRE, GROUP, Planes, PlanesLayout};
use crate::types::{CacheRole, Type};
use crate::value::{Ints, Routing, Tensor, Value};
use crate::{Error, Kind, Result, bail};
use half::{bf16, f16};

/// The value in a buffer of `rows` rows.
///
/// # Errors
/// Where the type has no rows, or there are too few bytes.
pub fn rows(ty: &Type, bytes: &[u8], rows: usize) -> Result<Value> {
    let Some(stride) = row_bytes(ty).filter(|stride| rows.checked_mul(*stride).is_some_and(|n| n <= bytes.len()))
    else {
        bail!(Internal, "expected {rows} rows of {ty}, found {} bytes", bytes.len());
    };
    let lines = || bytes.chunks_exact(stride.max(1)).take(rows);
    let width = ty.row_width().unwrap_or(0);
    match ty {
        Type::Routing { top, experts } => {
            let chosen = lines().flat_map(|line| ints(&line[..4 * top])).map(|expert| expert as usize).collect();
            let weights = lines().flat_map(|line| floats(&line[4 * top..8 * top])).collect();
            Ok(Value::Routing(Routing { top: *top, experts: *experts, chosen, weights }))
        }
        Type::Tensor { dtype: DType::I32, .. } => {
            let data: Vec<i32> = lines().flat_map(|line| ints(&line[..4 * width])).collect();
            Ok(Value::Ints(Ints { shape: vec![data.len()], data }))
        }
        Type::Tensor { dtype, shape } => {
            let row = |line: &[u8]| match dtype.planes() {
                Some(planes) => planes_of_codes(line, planes),
                None if *dtype == DType::BF16 => halves(&line[..2 * width]),
                None => floats(&line[..4 * width]),
            };
            let data = lines().flat_map(row).collect();
            let rest = shape.iter().skip(1).filter_map(|d| d.fixed());
            Ok(Value::Tensor(Tensor::new(std::iter::once(rows).chain(rest).collect::<Vec<_>>(), data)))
        }
        _ => bail!(Internal, "{ty} has no rows"),
    }
}

fn ints(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn halves(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
}

/// The reals of a row of [`A8`] lines, which one plane or two of codes add up to.
fn planes_of_codes(row: &[u8], planes: usize) -> Vec<f32> {
    let mut out: Vec<f32> = vec![];
    for (index, line) in row.chunks_exact(A8::LINE).enumerate() {
        let scale = floats(&line[A8::SCALE..][..4])[0];
        let reals = line[..A8::GROUP].iter().map(|code| scale * f32::from(*code as i8));
        if index % planes == 0 {
            out.extend(reals);
        } else {
            let coarse = out.len() - A8::GROUP;
            out[coarse..].iter_mut().zip(reals).for_each(|(coarse, fine)| *coarse += fine);
        }
    }
    out
}

/// One element of a cache block: `(head, position in the block, d)`.
///
/// # Errors
/// Where the type is no cache, or the block too short.
pub fn cached(ty: &Type, block: &[u8], place: (usize, usize, usize)) -> Result<f32> {
    let (Type::Cache { role, dim, dtype, .. }, Some((at, bit))) = (ty, cache_offset(ty, place)) else {
        bail!(Internal, "{ty} is no cache")
    };
    let scales = cache_scales(ty, place.0);
    let scale = scales + cache_scales_bytes(ty) / CACHE_BLOCK * place.1;
    let of = |at: usize, size: usize| {
        let found = block.get(at..at + size);
        found.ok_or_else(|| Error::new(Kind::Internal, format!("a cache block of {} bytes is too short", block.len())))
    };
    let half = |at: usize| of(at, 2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
    Ok(match dtype {
        DType::F16 => half(at)?,
        DType::BF16 => halves(of(at, 2)?)[0],
        DType::FP8 => e4m3(of(at, 1)?[0]),
        DType::I8 => floats(of(scale, 4)?)[0] * f32::from(of(at, 1)?[0] as i8),
        DType::I4 => {
            // The upper four bits are sign and value.
            let code = f32::from((of(at, 1)?[0] << (4 - bit)) as i8 >> 4);
            match role {
                CacheRole::Keys => half(scales + 2 * place.2)?.mul_add(code, half(scales + 2 * (dim + place.2))?),
                CacheRole::Values => half(scale)? * code,
            }
        }
        _ => floats(of(at, 4)?)[0],
    })
}

/// The value of a packed weight: its reals, or those of its planes.
///
/// # Errors
/// As [`weight`].
pub fn operand(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Value> {
    match dtype {
        DType::Q8_PLANES => Ok(Value::Planes(planes(shape, bytes)?)),
        _ => Ok(Value::Tensor(weight(dtype, shape, bytes)?)),
    }
}

/// The reals of a matrix in two planes.
fn planes(shape: &[usize], bytes: &[u8]) -> Result<Planes> {
    let need = packed_bytes(DType::Q8_PLANES, shape);
    let ([n, k], true) = (shape, need <= bytes.len()) else {
        bail!(Input, "expected {need} bytes of a matrix in planes, {shape:?}, found {}", bytes.len());
    };
    let (layout, second) = (PlanesLayout::new(*k), PlanesLayout::new(*k).upper_bytes(*n));
    let (mut upper, mut lower, mut deviations) = (Vec::with_capacity(n * k), Vec::with_capacity(n * k), vec![]);
    for row in 0..*n {
        let strip = &bytes[row / STRIP * layout.strip_bytes..][..layout.strip_bytes];
        let spread = floats(&strip[layout.spreads() + 4 * (row % STRIP)..][..4])[0];
        let rest = &bytes[second + row * layout.row_bytes..][..layout.row_bytes];
        for column in 0..*k {
            let (group, i) = (column / GROUP, column % GROUP);
            let scale = f16::from_le_bytes([rest[2 * group], rest[2 * group + 1]]).to_f32();
            let code = rest[layout.codes + group * GROUP / 2 + i % 16] >> (i / 16 * 4) & 15;
            // 16 upper - 120.5 by q4_0's upper - 8.
            let coarse = element(DType::Q4_0, &layout.strip, strip, (row % STRIP, column));
            upper.push(16.0 * coarse + scale * CENTRE);
            lower.push(scale * (f32::from(code) - CENTRE));
            if i == 0 {
                deviations.push(spread * scale.abs());
            }
        }
    }
    Ok(Planes { shape: shape.to_vec(), upper: upper.into(), lower: lower.into(), deviations: deviations.into() })
}

/// The reals of a packed weight, padding left out; of one in planes, both together.
///
/// # Errors
/// Where there are fewer bytes than its shape takes.
pub fn weight(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Tensor> {
    if dtype == DType::Q8_PLANES {
        let planes = planes(shape, bytes)?;
        return Ok(Tensor::new(shape, planes.upper.iter().zip(planes.lower.iter()).map(|(a, b)| a + b).collect()));
    }
    let need = packed_bytes(dtype, shape);
    if bytes.len() < need {
        bail!(Input, "expected {need} bytes of {dtype} {shape:?}, found {}", bytes.len());
    }
    let [outer @ .., n, k] = shape else {
        let count = shape.iter().product::<usize>();
        return Ok(Tensor::new(shape, floats(&bytes[..4 * count])));
    };
    let (layout, strips) = (StripLayout::new(dtype, *k), n.div_ceil(STRIP));
    let mut data = Vec::with_capacity(shape.iter().product());
    for matrix in 0..outer.iter().product() {
        for row in 0..*n {
            let strip = &bytes[(matrix * strips + row / STRIP) * layout.bytes..][..layout.bytes];
            data.extend((0..*k).map(|column| element(dtype, &layout, strip, (row % STRIP, column))));
        }
    }
    Ok(Tensor::new(shape, data))
}

/// The real at `(row, column)` of a strip.
fn element(dtype: DType, layout: &StripLayout, strip: &[u8], (row, column): (usize, usize)) -> f32 {
    let half = |at: usize| f16::from_le_bytes([strip[at], strip[at + 1]]).to_f32();
    let Some(int) = dtype.int() else {
        let at = column * STRIP + row;
        return match dtype {
            DType::F16 => half(2 * at),
            DType::BF16 => halves(&strip[column / 2 * 64 + row * 4 + column % 2 * 2..][..2])[0],
            _ => floats(&strip[4 * at..][..4])[0],
        };
    };
    let figure = |offset| half(layout.figures_at(offset, int, column / int.group) + 2 * row);
    let min = if int.zero.has_mins() { figure(layout.mins) } else { 0.0 };
    int.zero.real(code(int, layout, strip, (row, column)), figure(layout.scales), min)
}

/// The code at `(row, column)` of a strip.
fn code(int: IntFormat, layout: &StripLayout, strip: &[u8], (row, column): (usize, usize)) -> u8 {
    let (unit, quad, i) = (column / int.unit(), column % int.unit() / 4, column % 4);
    let (codes, at) = (&strip[layout.codes_at(int, unit)..], row * 4 + i);
    if int.bits == 8 {
        return codes[quad * 64 + at];
    }
    let lines = int.unit() / 8;
    let low = if quad < lines { codes[quad * 64 + at] & 15 } else { codes[(quad - lines) * 64 + at] >> 4 };
    let high = &strip[layout.high_at(int, unit)..];
    match int.bits {
        5 => low | (high[quad * 8 + at / 8] >> (at % 8) & 1) << 4,
        6 => low | (high[quad / 4 * 64 + at] >> (2 * (quad % 4)) & 3) << 4,
        _ => low,
    }
}
