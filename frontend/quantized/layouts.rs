//! Where each method keeps codes, scales and zero points. `w` is a word of 32 bits; g the columns that share a scale.
//!
//! | method | codes | scales | zero points |
//! |---|---|---|---|
//! | GPTQ | `qweight w[k / 8, n]` | `scales [k / g, n]` | `qzeros w[k / g, n / 8]`, less one in version 1 |
//! | AWQ | `qweight w[k, n / 8]`, neighbours in order 0 4 1 5 2 6 3 7 | `scales [k / g, n]` | `qzeros w[k / g, n / 8]`, likewise |
//! | compressed-tensors | `weight_packed w[n, k / 8]` or `u8[n, k / 2]`, `weight i8[n, k]` or `f8[n, k]` | `weight_scale [n, k / g]` | `weight_zero_point w[n / 8, k / g]` |
//! | fp8 | `weight f8[n, k]` | `weight_scale_inv [n / rows, k / columns]`, else `weight_scale` of all or `[n]` | - |
//!
//! Sources: AutoGPTQ 0.7.1, `nn_modules/qlinear/qlinear_cuda_old.py` (pack); AutoAWQ 0.2.9, `utils/packing_utils.py`;
//! compressed-tensors 0.20.0, `compressors/pack_quantized`, `naive_quantized`, `nvfp4`, `mxfp4`; transformers,
//! `integrations/finegrained_fp8.py`.

use super::{Module, Raw, Settings, format, groups};
use crate::checkpoint::Tensor;
use mansard_ir::Result;
use mansard_ir::formats::{DType, Zero};
use mansard_ir::grid::{Code, Grid, Groups};

/// Where neighbour `i` lies in a word of AWQ's.
const AWQ_ORDER: [u8; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// `f32` stands for what can only be read as reals, for a reason.
fn tensor(grid: Grid, shape: (usize, usize), kept: std::result::Result<DType, String>) -> Tensor {
    let listed = matches!(grid.groups, Groups::Listed(_));
    match kept {
        Ok(_) if listed => {
            Tensor::grid(grid, DType::F32, shape, Some("columns in an order of their own (`desc_act`)".into()))
        }
        Ok(dtype) => Tensor::grid(grid, dtype, shape, None),
        Err(reason) => Tensor::grid(grid, DType::F32, shape, Some(reason)),
    }
}

pub fn gptq(settings: &Settings, module: &mut Module<'_>) -> Result<Tensor> {
    let (bits, raw) = (settings.bits, module.codes()?);
    let per = 32 / bits;
    let (words, n) = raw.matrix()?;
    let k = words * per;
    let group = settings.group.unwrap_or(k);
    let groups = groups(k, group, module.find("g_idx")?)?;
    let scales = module.take("scales")?;
    scales.expect(&[k / group, n])?;
    let zeros = module.take("qzeros")?;
    zeros.expect(&[k / group, n.div_ceil(per)])?;
    let zero = if settings.symmetric { Zero::Fixed(1 << (bits - 1)) } else { Zero::Point };
    let grid = Grid {
        codes: raw.ints(bits, (false, true), n)?,
        code: Code::Int(0),
        scales: scales.scales((1, n), 1)?,
        zeros: Some((zeros.ints(bits, (true, true), n.div_ceil(per))?, settings.zero_offset)),
        groups,
    };
    Ok(tensor(grid, (n, k), format(bits, zero, group)))
}

pub fn awq(settings: &Settings, module: &mut Module<'_>) -> Result<Tensor> {
    let raw = module.codes()?;
    let (k, words) = raw.matrix()?;
    let n = 8 * words;
    let group = settings.group.unwrap_or(k);
    let groups = groups(k, group, None)?;
    let scales = module.take("scales")?;
    scales.expect(&[k / group, n])?;
    let zeros = module.take("qzeros")?;
    zeros.expect(&[k / group, words])?;
    let (mut codes, mut points) = (raw.ints(4, (true, true), words)?, zeros.ints(4, (true, true), words)?);
    (codes.order, points.order) = (AWQ_ORDER, AWQ_ORDER);
    let scales = scales.scales((1, n), 1)?;
    let grid = Grid { codes, code: Code::Int(0), scales, zeros: Some((points, 0)), groups };
    Ok(tensor(grid, (n, k), format(4, Zero::Point, group)))
}

pub fn compressed(_: &Settings, module: &mut Module<'_>) -> Result<Tensor> {
    let raw = module.codes()?;
    let (n, width) = raw.matrix()?;
    let scales = module.take("weight_scale")?;
    let (bits, k) = match raw.dtype.as_str() {
        "I32" => packed(module, &raw, (n, width))?,
        "U8" => (4, 2 * width),
        _ => (8, width),
    };
    let (strides, group) = sharing(&scales, (n, k))?;
    let listed = module.find("weight_g_idx")?.filter(|raw| raw.dtype == "I32");
    let groups = groups(k, group, listed)?;
    let codes = raw.ints(bits, (false, false), width)?;
    let points = module.find("weight_zero_point")?;
    let (code, zero) = match (raw.dtype.as_str(), bits, points.is_some()) {
        ("F8_E4M3", ..) => (Code::E4M3, Zero::E4M3),
        ("U8", ..) => (Code::E2M1, Zero::E2M1),
        (_, _, true) => (Code::Int(0), Zero::Point),
        (_, bits, false) => (Code::Int(1 << (bits - 1)), Zero::Fixed(1 << (bits - 1))),
    };
    let zeros = match points {
        Some(points) if matches!(code, Code::Int(_)) => {
            let count = k / group;
            let packed = points.dtype == "I32";
            points.expect(&[if packed { n.div_ceil(32 / bits) } else { n }, count])?;
            if !packed && bits != 8 {
                return Err(points.error("packed zero points (I32)", &points.dtype));
            }
            Some((points.ints(bits, (packed, false), count)?, 0))
        }
        Some(points) => return Err(points.error("no zero points beside floats", "some")),
        None => None,
    };
    let mut scales = scales.scales(strides, 1)?;
    if let Some(global) = module.find("weight_global_scale")? {
        scales.divisor = global.value()?;
    }
    Ok(tensor(Grid { codes, code, scales, zeros, groups }, (n, k), format(bits, zero, group)))
}

/// Strides of scales, and the columns that share one: all of the matrix, those of a row, or those of a group of a row.
fn sharing(scales: &Raw, (n, k): (usize, usize)) -> Result<((usize, usize), usize)> {
    match scales.shape[..] {
        _ if scales.shape.iter().product::<usize>() == 1 => Ok(((0, 0), k)),
        [rows] | [rows, 1] if rows == n => Ok(((1, 0), k)),
        [rows, count] if rows == n && count > 0 && k.is_multiple_of(count) => Ok(((count, 1), k / count)),
        _ => Err(scales.error(&format!("scales for {n} rows of {k}"), &format!("shape {:?}", scales.shape))),
    }
}

/// Bits and columns of `weight_packed`, by `weight_shape`.
fn packed(module: &mut Module<'_>, raw: &Raw, (n, width): (usize, usize)) -> Result<(usize, usize)> {
    let shape = module.take("weight_shape")?;
    shape.expect(&[2])?;
    if !["I64", "I32"].contains(&shape.dtype.as_str()) {
        return Err(shape.error("I64", &shape.dtype));
    }
    let size = if shape.dtype == "I64" { 8 } else { 4 };
    let bytes = shape.file.bytes(shape.offset, 2 * size)?;
    let number = |at: &[u8]| at.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let (rows, k) = (number(&bytes[..size]), number(&bytes[size..]));
    for bits in [4, 8] {
        if (rows, k) == (n as u64, (width * 32 / bits) as u64) {
            return Ok((bits, width * 32 / bits));
        }
    }
    Err(raw.error(&format!("codes of 4 or 8 bits for the shape [{rows}, {k}]"), &format!("shape {:?}", raw.shape)))
}

pub fn fp8(settings: &Settings, module: &mut Module<'_>) -> Result<Tensor> {
    let raw = module.codes()?;
    let (n, k) = raw.matrix()?;
    let (scales, group) = match settings.block {
        Some((rows, columns)) => {
            let scales = module.take("weight_scale_inv")?;
            let across = k.div_ceil(columns);
            scales.expect(&[n.div_ceil(rows), across])?;
            (scales.scales((across, 1), rows)?, columns)
        }
        None => {
            let scales = module.take("weight_scale")?;
            let (strides, group) = sharing(&scales, (n, k))?;
            (scales.scales(strides, 1)?, group)
        }
    };
    let codes = raw.ints(8, (false, false), k)?;
    let grid = Grid { codes, code: Code::E4M3, scales, zeros: None, groups: Groups::Of(group) };
    // The last block of a row may be cut short.
    let kept = format(8, Zero::E4M3, group).and_then(|dtype| match dtype.bytes(k) {
        Some(_) => Ok(dtype),
        None => format(8, Zero::E4M3, k),
    });
    Ok(tensor(grid, (n, k), kept))
}
