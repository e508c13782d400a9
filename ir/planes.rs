//! A matrix of 8-bit codes in two planes, so that most of its rows need to be read by half only.
//!
//! ```text
//! code = 16 upper + lower        real = scale (code - 128) = scale (16 upper - 120.5) + scale (lower - 7.5)
//!                                                            first plane                second plane
//! ```
//!
//! Nothing is lost: both planes together are the matrix. The first is packed in strips as [`DType::Q4_0`] is, each followed
//! by its rows' spreads; the second row by row, scales first, so that one row's remainder is one short read:
//!
//! ```text
//!  strip 0: upper codes and scales of 16 rows | f32[16] | strip 1 ...    row 0: f16[groups] | lower codes, row 1 ...
//! ```
//!
//! The *spread* of a row bounds its second plane: in no group is the root mean square of `lower - 7.5` larger. So the second
//! plane's part in a product with `x`, whose sign is as good as random, has a standard deviation of at most
//! `sqrt(sum over groups of (spread * scale)^2 |x of the group|^2)`.

use crate::formats::{DType, Split};
use crate::layout::{ALIGN, STRIP, StripLayout, aligned};
use crate::model::Weight;
use crate::value::{Tensor, Value};
use crate::{Result, bail};
use std::sync::Arc;

/// Columns that share a scale.
pub const GROUP: usize = 32;

/// What the upper four bits lack, on average.
pub const CENTRE: f32 = 7.5;

/// Groups whose lower codes fill a vector.
const GROUPS_OF_VECTOR: usize = 4;

/// A matrix in two planes, as the interpreter sees it. Clones share the data.
#[derive(Clone, Debug, PartialEq)]
pub struct Planes {
    /// `[n, k]`.
    pub shape: Vec<usize>,
    /// Reals of the first plane, row-major.
    pub upper: Arc<Vec<f32>>,
    /// Reals of the second plane.
    pub lower: Arc<Vec<f32>>,
    /// `[n, k / 32]`: the most that the root mean square of a group of the second plane can be.
    pub deviations: Arc<Vec<f32>>,
}

/// Where the parts of a packed matrix lie, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanesLayout {
    /// Strips of the first plane.
    pub strip: StripLayout,
    /// From one strip to the next; the last 64 bytes are its rows' spreads, `f32[16]`.
    pub strip_bytes: usize,
    /// From one row of the second plane to the next.
    pub row_bytes: usize,
    /// Where a row's codes begin: 16 bytes a group, byte `i` holds columns `i` and, in the upper half, `i + 16`.
    pub codes: usize,
}

impl PlanesLayout {
    /// The layout of a matrix with rows of `k`.
    pub fn new(k: usize) -> PlanesLayout {
        let strip = StripLayout::new(DType::Q4_0, k);
        let codes = 2 * (k / GROUP).next_multiple_of(GROUPS_OF_VECTOR);
        PlanesLayout { strip, strip_bytes: strip.bytes + ALIGN, row_bytes: codes + k / 2, codes }
    }

    /// Where a strip's spreads begin.
    pub const fn spreads(&self) -> usize {
        self.strip_bytes - ALIGN
    }

    /// Bytes of the first plane of a matrix of `n` rows.
    pub const fn upper_bytes(&self, n: usize) -> usize {
        n.div_ceil(STRIP) * self.strip_bytes
    }

    /// Bytes of the second plane, of whole strips; a vector's width follows, since kernels load whole ones.
    pub const fn lower_bytes(&self, n: usize) -> usize {
        aligned(n.div_ceil(STRIP) * STRIP * self.row_bytes) + ALIGN
    }

    /// Bytes of the whole matrix.
    pub const fn bytes(&self, n: usize) -> usize {
        self.upper_bytes(n) + self.lower_bytes(n)
    }
}

/// One row taken apart.
#[derive(Clone, Debug)]
pub struct SplitRow {
    /// All eight bits.
    pub codes: Vec<u8>,
    /// One for each group.
    pub scales: Vec<f32>,
    /// The row's spread.
    pub spread: f32,
}

impl SplitRow {
    /// Row `row` of a weight of [`DType::Q8_PLANES`].
    ///
    /// # Errors
    /// Where the row cannot be read.
    pub fn of(weight: &Weight, row: usize) -> Result<SplitRow> {
        let ((_, k), format) = (weight.rows_columns(), DType::Q8_0.format());
        let bytes = weight.quantized_row(row)?;
        if DType::Q8_0.bytes(k) != Some(bytes.len()) {
            bail!(Input, "expected {k} elements of q8_0, found {} bytes", bytes.len());
        }
        let (mut codes, mut scales) = (vec![0; k], vec![0.0; k / GROUP]);
        let parts = codes.chunks_exact_mut(GROUP).zip(scales.chunks_exact_mut(1));
        for (block, (codes, scales)) in bytes.chunks_exact(format.block_bytes).zip(parts) {
            (format.split)(block, Split { codes, scales, mins: &mut [] });
        }
        let squares = |codes: &[u8]| codes.iter().map(|c| centred(*c) * centred(*c)).sum::<f32>();
        let most = codes.chunks_exact(GROUP).map(squares).fold(0f32, f32::max);
        Ok(SplitRow { codes, scales, spread: (most / GROUP as f32).sqrt() })
    }
}

fn centred(code: u8) -> f32 {
    f32::from(code & 15) - CENTRE
}

impl Planes {
    /// The reals of a weight of [`DType::Q8_PLANES`].
    ///
    /// # Errors
    /// Where a row cannot be read.
    pub fn of(weight: &Weight) -> Result<Planes> {
        let (rows, k) = weight.rows_columns();
        let (mut upper, mut lower, mut deviations) =
            (Vec::with_capacity(rows * k), Vec::with_capacity(rows * k), vec![]);
        for row in 0..rows {
            let split = SplitRow::of(weight, row)?;
            for (codes, scale) in split.codes.chunks_exact(GROUP).zip(&split.scales) {
                upper.extend(codes.iter().map(|c| scale * (f32::from(c & 0xf0) - 128.0 + CENTRE)));
                lower.extend(codes.iter().map(|c| scale * centred(*c)));
                deviations.push(split.spread * scale.abs());
            }
        }
        Ok(Planes { shape: vec![rows, k], upper: upper.into(), lower: lower.into(), deviations: deviations.into() })
    }

    /// Row `row` of both planes together.
    pub fn row(&self, row: usize) -> impl Iterator<Item = f32> {
        let k = self.shape[1];
        self.upper[row * k..][..k].iter().zip(&self.lower[row * k..][..k]).map(|(a, b)| a + b)
    }
}

impl Value {
    /// The value of a weight: its reals, or those of its planes.
    ///
    /// # Errors
    /// Where a row cannot be read.
    pub fn of_weight(weight: &Weight) -> Result<Value> {
        match weight.dtype_shape() {
            (DType::Q8_PLANES, _) => Ok(Value::Planes(Planes::of(weight)?)),
            (_, shape) => Ok(Value::Tensor(Tensor::new(shape, weight.read_all()?))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{self, Random};
    use crate::types::{Dim, Type};

    #[test]
    fn planes_add_up_and_spreads_bound_the_second() {
        let ty = |dtype| Type::tensor(dtype, [Dim::N(9), Dim::N(96)]);
        let weight = sample::weight(&ty(DType::Q8_PLANES), &mut Random::new(5)).unwrap();
        let planes = Planes::of(&weight).unwrap();
        let whole = Weight { ty: ty(DType::Q8_0), ..weight }.read_all().unwrap();
        for row in 0..9 {
            for (x, y) in planes.row(row).zip(&whole[row * 96..]) {
                assert!((x - y).abs() <= 1e-6, "row {row}: {x}, not {y}");
            }
        }
        for (group, most) in planes.lower.chunks_exact(GROUP).zip(planes.deviations.iter()) {
            let rms = (group.iter().map(|x| x * x).sum::<f32>() / GROUP as f32).sqrt();
            assert!(rms > 0.0 && rms <= most * 1.0001 && *most < 2.0 * rms, "{rms}, bound {most}");
        }
    }

    #[test]
    fn a_row_of_the_second_plane_is_one_read() {
        let layout = PlanesLayout::new(640);
        assert_eq!((layout.strip_bytes, layout.row_bytes, layout.codes), (640 * 9 + 64, 360, 40));
        assert_eq!(PlanesLayout::new(576).codes, 40); // 18 groups and room for two more
        assert_eq!(layout.bytes(17), 2 * layout.strip_bytes + aligned(32 * 360) + 64);
    }
}
