//! Quantized checkpoints that keep codes, scales and zero points in tensors of their own: their rows as quant blocks, bit for
//! bit, or as reals.
//!
//! ```text
//! qweight i32[k / 8, n]  \
//! scales  f16[k / g, n]   --row 5-->   blocks of uint4_g128: scale zero 128 codes, scale zero 128 codes ..
//! qzeros  i32[k / g, n/8]/
//! ```
//!
//! Invariant: an importer has checked the tensors' shapes against each other, so that every row and column of the matrix has
//! its place in each.

use crate::file::MappedFile;
use crate::formats::{DType, E4M3_UNIT, Zero, e4m3, is_e4m3_nan};
use crate::quantize::join;
use crate::{Result, bail};
use half::{bf16, f16};
use std::sync::Arc;

/// One matrix `[n, k]`.
#[derive(Clone, Debug)]
pub struct Grid {
    /// A code for each element.
    pub codes: Ints,
    /// What codes are, where they are read as reals.
    pub code: Code,
    /// A scale for each row and group of columns.
    pub scales: Scales,
    /// Zero points for each row and group, and what is to be added to each.
    pub zeros: Option<(Ints, u8)>,
    /// The group of each column.
    pub groups: Groups,
}

/// What a code stands for; the reals that it gives are those times a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// An unsigned integer: itself less this zero point, or less that of its group.
    Int(u8),
    /// Half of [`crate::formats::E2M1`].
    E2M1,
    /// A float of 8 bits.
    E4M3,
}

/// Which columns share a scale.
#[derive(Clone, Debug)]
pub enum Groups {
    /// So many neighbours.
    Of(usize),
    /// Columns in an order of their own: the group of each.
    Listed(Arc<[u32]>),
}

/// A matrix of small unsigned integers, several of them in a little-endian word.
#[derive(Clone, Debug)]
pub struct Ints {
    /// The mapped file.
    pub file: Arc<MappedFile>,
    /// First byte of the tensor.
    pub offset: usize,
    /// Bits of an integer: 4 or 8.
    pub bits: u8,
    /// Bytes of a word.
    pub word: usize,
    /// The integers of a word belong to neighbouring rows of the matrix, else to neighbouring columns.
    pub along_rows: bool,
    /// Words from one row (or word of rows) to the next, and the same of columns.
    pub strides: (usize, usize),
    /// Where in its word each neighbour lies, the lowest bits first.
    pub order: [u8; 8],
    /// Exclusive or: 128 for signed bytes.
    pub flip: u8,
}

/// A matrix of scales `[rows, groups]`.
#[derive(Clone, Debug)]
pub struct Scales {
    /// The mapped file.
    pub file: Arc<MappedFile>,
    /// First byte of the tensor.
    pub offset: usize,
    /// How they are stored.
    pub stored: Stored,
    /// Elements from one row to the next, and from group to group.
    pub strides: (usize, usize),
    /// Rows of the matrix that share a scale.
    pub rows: usize,
    /// What all are divided by.
    pub divisor: f32,
}

/// Element types of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// As weights are stored.
    Float(DType),
    /// 8-bit floats.
    E4M3,
    /// Powers of two: `2^(byte - 127)`.
    E8M0,
}

/// The integers of a word in order.
pub const IN_ORDER: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

impl Ints {
    /// The integer of a row and column.
    fn at(&self, row: usize, column: usize) -> u8 {
        let per = self.word * 8 / usize::from(self.bits); // a power of two
        let (shift, mask) = (per.trailing_zeros(), per - 1);
        let (row, column, within) =
            if self.along_rows { (row >> shift, column, row & mask) } else { (row, column >> shift, column & mask) };
        let word = self.offset + (row * self.strides.0 + column * self.strides.1) * self.word;
        let bit = usize::from(self.order[within]) * usize::from(self.bits);
        let byte = self.file.all()[word + bit / 8];
        if self.bits == 8 { byte ^ self.flip } else { byte >> (bit % 8) & 15 }
    }
}

impl Scales {
    /// The scale of a row and group.
    fn at(&self, row: usize, group: usize) -> Result<f32> {
        let index = row / self.rows * self.strides.0 + group * self.strides.1;
        let bytes = |size: usize| &self.file.all()[self.offset + index * size..][..size];
        let scale = match self.stored {
            Stored::Float(DType::F16) => f16::from_le_bytes([bytes(2)[0], bytes(2)[1]]).to_f32(),
            Stored::Float(DType::BF16) => bf16::from_le_bytes([bytes(2)[0], bytes(2)[1]]).to_f32(),
            Stored::Float(_) => bytes(4).first_chunk().map_or(f32::NAN, |b| f32::from_le_bytes(*b)),
            Stored::E4M3 => e4m3(bytes(1)[0]),
            Stored::E8M0 if bytes(1)[0] == 255 => f32::NAN,
            Stored::E8M0 => (f32::from(bytes(1)[0]) - 127.0).exp2(),
        };
        let scale = scale / self.divisor;
        if !scale.is_finite() {
            bail!(Input, "the scale of group {group} is {scale}");
        }
        Ok(scale)
    }
}

impl Grid {
    /// A row as quant blocks of `dtype`, whose groups are those of the grid or parts of them. Scales become f16, to nearest.
    ///
    /// # Errors
    /// Where a zero point is not the format's, or a scale does not fit f16.
    pub fn blocks(&self, row: usize, columns: usize, dtype: DType) -> Result<Vec<u8>> {
        let (format, Groups::Of(wide)) = (dtype.format(), &self.groups) else {
            bail!(Internal, "columns in an order of their own cannot be stored as {dtype}");
        };
        let (Some(int), Some(size)) = (format.int, dtype.bytes(columns)) else {
            bail!(Internal, "no row of {columns} is stored as {dtype}");
        };
        let figures = |column: usize| -> Result<(f32, f32)> {
            let group = column / wide;
            let (scale, zero) = (self.scales.at(row, group)?, self.zero(row, group));
            match int.zero {
                Zero::Point => Ok((scale, f32::from(zero.unwrap_or(0)))),
                Zero::E2M1 => Ok((0.5 * scale, 0.0)),
                Zero::E4M3 => Ok((E4M3_UNIT * scale, 0.0)),
                Zero::Fixed(fixed) if zero.is_none_or(|zero| zero == u16::from(fixed)) => Ok((scale, 0.0)),
                _ => bail!(Input, "the zero point of group {group} is {zero:?}, expected one that {dtype} has"),
            }
        };
        let (mut out, mut codes) = (vec![0; size], vec![0; format.block]);
        for (index, out) in out.chunks_exact_mut(format.block_bytes).enumerate() {
            let first = index * format.block;
            for (code, column) in codes.iter_mut().zip(first..) {
                *code = self.codes.at(row, column);
            }
            let (scale, mut second) = figures(first)?;
            if int.group < format.block {
                second = figures(first + int.group)?.0;
            }
            let magnitude = match int.zero {
                Zero::E2M1 => 7,
                Zero::E4M3 => 127,
                _ => 0,
            };
            if magnitude == 127
                && let Some(column) = codes.iter().position(|code| is_e4m3_nan(*code))
            {
                bail!(Input, "column {} is no number", first + column);
            }
            // Zeros may have any scale.
            if magnitude > 0 && codes.iter().all(|code| code & magnitude == 0) {
                out.fill(0);
                continue;
            }
            join(dtype, &codes, (half(scale)?, half(second)?), out)?;
        }
        Ok(out)
    }

    /// A row as reals.
    ///
    /// # Errors
    /// Where a scale or a code is no number.
    pub fn reals(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let (mut last, mut scale, mut zero) = (usize::MAX, 0.0, None);
        for (column, x) in out.iter_mut().enumerate() {
            let group = match &self.groups {
                Groups::Of(wide) => column / wide,
                Groups::Listed(groups) => groups[column] as usize,
            };
            if group != last {
                (last, scale, zero) = (group, self.scales.at(row, group)?, self.zero(row, group));
            }
            let code = self.codes.at(row, column);
            *x = scale
                * match self.code {
                    Code::Int(fixed) => f32::from(code) - f32::from(zero.unwrap_or(fixed.into())),
                    Code::E2M1 => 0.5 * Zero::E2M1.real(code, 1.0, 0.0),
                    Code::E4M3 => e4m3(code),
                };
            if !x.is_finite() {
                bail!(Input, "column {column} is {x}");
            }
        }
        Ok(())
    }

    fn zero(&self, row: usize, group: usize) -> Option<u16> {
        self.zeros.as_ref().map(|(zeros, more)| u16::from(zeros.at(row, group)) + u16::from(*more))
    }
}

/// To nearest, where f16 has as many digits there as an 8-bit float.
fn half(x: f32) -> Result<f16> {
    let half = f16::from_f32(x);
    if !half.is_finite() || (half.to_f32() - x).abs() > x.abs() / 16.0 {
        bail!(Input, "a scale of {x:e} does not fit f16");
    }
    Ok(half)
}
