//! Inner products of a register tile: `tokens` activation rows times the 16 rows of each of a few strips.
//!
//! ```text
//! result[strip * rows + row][lane] = sum over k of x[row][k] * w[strip * 16 + lane][k]
//! ```
//!
//! [`integer`] multiplies int8 activations with packed codes, [`float`] and [`float8`] widen weights; [`isa`] holds the one instruction
//! that machines differ in.

pub mod amx;
mod float;
mod float8;
mod integer;
pub(super) mod isa;
pub mod unpack;

pub use isa::dot4;

use crate::emit::{Emitter, F32, PTR, Val};
pub use integer::{Weights, zero_point};
use mansard_ir::formats::DType;
use mansard_ir::layout::{STRIP, StripLayout};
use mansard_ir::target::Target;

/// Activation rows of a tile, and what follows it.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// First row.
    pub first: Val,
    /// Bytes from row to row.
    pub stride: usize,
    /// How many.
    pub count: usize,
    /// Their type: f32, bf16, or int8 planes.
    pub dtype: DType,
    /// Planes of int8 codes, for integer formats.
    pub planes: usize,
    /// Bytes by which integer weights are asked for ahead of their use; 0: not at all.
    pub prefetch: usize,
    /// Bytes from a line of weights to one that a later tile reads from main memory, and this tile asks for.
    pub ahead: Option<Val>,
}

/// Products of `rows` and of each strip: `result[strip * rows.count + row]` is an f32 vector of 16 outputs.
pub fn tile(e: &mut Emitter, target: &Target, dtype: DType, k: usize, strips: &[Val], rows: Rows) -> Vec<Val> {
    let zero = e.float(F32.x(STRIP), 0.0);
    let accumulators = vec![zero; strips.len() * rows.count];
    match dtype.int() {
        Some(int) if !dtype.is_integer() => {
            let weights = Weights { target, int, layout: StripLayout::new(dtype, k) };
            float8::tile(e, weights, k, strips, rows, &accumulators)
        }
        Some(int) => integer::tile(e, target, (int, StripLayout::new(dtype, k)), k, strips, rows, &accumulators),
        None => float::tile(e, target, dtype, k, strips, rows, &accumulators),
    }
}

/// Address of strip `index` of a packed matrix.
pub fn strip_at(e: &mut Emitter, weight: Val, index: Val, dtype: DType, k: usize) -> Val {
    debug_assert_eq!(weight.ty, PTR);
    e.row(weight, index, StripLayout::new(dtype, k).bytes)
}

/// Address of part `index` of a packed strip, of those that lie at `offset` of each chunk, `count` a chunk, each of `bytes`.
pub fn part_at(
    e: &mut Emitter,
    layout: &StripLayout,
    strip: Val,
    index: Val,
    (offset, count, bytes): (usize, usize, usize),
) -> Val {
    let count = e.i64(count as i64);
    let (chunk, within) = (e.div(index, count), e.rem(index, count));
    let chunk = e.row(strip, chunk, layout.chunk_bytes);
    let within = e.scaled(within, bytes, offset);
    e.gep(chunk, within)
}
