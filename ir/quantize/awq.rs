//! Columns of inputs and the scales by which a matrix's codes lose least: AWQ's search.
//!
//! ```text
//! x wᵀ = (x / s) (w diag s)ᵀ          s[k] = (root mean square of x's column k)^alpha, alpha in 0, 1/8 .. 1
//! ```
//!
//! A column that is multiplied by more before it is rounded is rounded more finely. That costs other columns of its group
//! something, so the alpha is taken under which the results of all matrices that read `x` are off least, given its second
//! moments: on rows spread over each matrix. (Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
//! Acceleration", 2023, who measure on the inputs themselves.) With alpha 0 nothing is scaled, so it is never worse there.

use super::moments::Moments;
use super::{DType, quantize};
use crate::formats::dequantize;
use crate::{Result, bail};

/// Exponents that are tried, in eighths.
const EIGHTHS: std::ops::RangeInclusive<u32> = 0..=8;

/// Most that a column is scaled by, either way: scales of groups are f16.
const MOST: f32 = 256.0;

/// Some rows of a matrix, one after the other, and what it is to be stored as.
pub struct Sample {
    /// The format.
    pub dtype: DType,
    /// Reals.
    pub rows: Vec<f32>,
}

/// What columns of matrices are to be multiplied with before they are rounded to nearest.
///
/// # Errors
/// As [`super::quantize`]; where there are no whole rows.
pub fn search(moments: &Moments, samples: &[Sample]) -> Result<Vec<f32>> {
    let columns = moments.columns();
    if let Some(sample) = samples.iter().find(|s| !s.rows.len().is_multiple_of(columns.max(1))) {
        bail!(Internal, "{} reals are no rows of {columns}", sample.rows.len());
    }
    let mut best = (f64::INFINITY, vec![1.0; columns]);
    for eighths in EIGHTHS {
        let scales = scales(moments, eighths as f32 / 8.0);
        let mut error = 0.0;
        for sample in samples {
            error += sample
                .rows
                .chunks_exact(columns)
                .map(|row| off(moments, sample.dtype, row, &scales))
                .sum::<Result<f64>>()?;
        }
        if error < best.0 {
            best = (error, scales);
        }
    }
    Ok(best.1)
}

/// Roots of mean squares to a power, around 1; those of columns that are hardly ever anything count as a hundredth of the mean.
fn scales(moments: &Moments, alpha: f32) -> Vec<f32> {
    let squares = moments.diagonal();
    let mean = squares.iter().map(|x| f64::from(*x)).sum::<f64>() / squares.len().max(1) as f64;
    if mean <= 0.0 {
        return vec![1.0; squares.len()];
    }
    let logarithms: Vec<f64> = squares.iter().map(|x| (f64::from(*x) / mean + 1e-4).ln() / 2.0).collect();
    let middle = logarithms.iter().sum::<f64>() / logarithms.len() as f64;
    let scale = |logarithm: &f64| ((logarithm - middle) as f32 * alpha).exp().clamp(1.0 / MOST, MOST);
    logarithms.iter().map(scale).collect()
}

/// What the results of one row are off, squared and summed.
fn off(moments: &Moments, dtype: DType, row: &[f32], scales: &[f32]) -> Result<f64> {
    let Some(bytes) = dtype.bytes(row.len()) else {
        bail!(Input, "a row of {} elements does not fill whole groups of {dtype}", row.len());
    };
    let (mut codes, mut back) = (vec![0; bytes], vec![0.0; row.len()]);
    let scaled: Vec<f32> = row.iter().zip(scales).map(|(w, s)| w * s).collect();
    quantize(dtype, &scaled, &mut codes)?;
    dequantize(dtype, &codes, &mut back);
    let off: Vec<f32> = back.iter().zip(scales).zip(row).map(|((q, s), w)| q / s - w).collect();
    Ok(moments.square(&off))
}
