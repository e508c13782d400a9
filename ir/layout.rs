//! Memory layouts that code and data must agree on: packed weights, activation rows, cache blocks.
//!
//! A matrix `[n, k]` is packed in *strips* of 16 output rows, one after the other. An integer strip is a run of *chunks* of
//! columns, two groups or 64 columns, so that a kernel reads a matrix from front to back as one stream:
//!
//! Float strips are `k` lines of 16 values; of bf16 `k / 2` lines of 16 pairs (`[row][2]`, the last one half empty where `k` is
//! odd), since dot products of pairs leave one sum per lane.

use crate::formats::{DType, IntFormat};
use crate::planes::PlanesLayout;
use crate::types::{CacheRole, Type};

/// Output rows of a strip, and lanes of every vector in generated code.
pub const STRIP: usize = 16;

/// Token positions of a cache block.
pub const CACHE_BLOCK: usize = 64;

/// Everything a kernel loads as a vector starts on this boundary.
pub const ALIGN: usize = 64;

/// Rounds up to a multiple of 64 bytes.
pub const fn aligned(bytes: usize) -> usize {
    bytes.div_ceil(ALIGN) * ALIGN
}

/// Where the parts of one packed strip lie. Offsets are those in a chunk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StripLayout {
    /// Columns of a chunk.
    pub chunk: usize,
    /// Bytes of a chunk.
    pub chunk_bytes: usize,
    /// `f16[groups][16]`.
    pub scales: usize,
    /// `f16[groups][16]`: minima or zero points, present where the format has them.
    pub mins: usize,
    /// Fifth bits (one 64-bit word a quad, bit `row * 4 + i`) or bits 4-5 (byte `row * 4 + i` holds quad
    /// `4 * line + c` of the unit at bit `2 c`).
    pub high: usize,
    /// Low 4 bits (two quads a line), whole bytes (one quad a line), or floats (one k a line; of bf16 two).
    pub codes: usize,
    /// The whole strip.
    pub bytes: usize,
}

impl StripLayout {
    /// The layout of a strip of a `[n, k]` matrix in `dtype`.
    pub fn new(dtype: DType, k: usize) -> StripLayout {
        let Some(int) = dtype.int() else {
            let columns = if dtype == DType::BF16 { k.next_multiple_of(2) } else { k };
            let bytes = aligned(columns * STRIP * dtype.format().block_bytes);
            return StripLayout { chunk: k, chunk_bytes: bytes, scales: 0, mins: 0, high: 0, codes: 0, bytes };
        };
        let chunk = (2 * int.group).max(64);
        let figures = aligned(chunk / int.group * STRIP * 2);
        let high = if int.zero.has_mins() { 2 * figures } else { figures };
        let codes = high + aligned(chunk / int.unit() * high_bytes(int));
        let through = |columns: usize| codes + columns / int.unit() * code_bytes(int);
        let last = if k.is_multiple_of(chunk) { 0 } else { through(k % chunk) };
        let bytes = k / chunk * through(chunk) + last;
        StripLayout { chunk, chunk_bytes: through(chunk), scales: 0, mins: figures, high, codes, bytes }
    }

    /// Where part `index` of a strip begins, of those that lie at `offset` of each chunk, `count` a chunk, each of `bytes`.
    pub const fn at(&self, offset: usize, (index, count): (usize, usize), bytes: usize) -> usize {
        index / count * self.chunk_bytes + offset + index % count * bytes
    }

    /// Where the scales (or minima) of group `group` begin; `offset` is that of the scales (or minima).
    pub const fn figures_at(&self, offset: usize, int: IntFormat, group: usize) -> usize {
        self.at(offset, (group, self.chunk / int.group), 2 * STRIP)
    }

    /// Where the codes of unit `unit` begin.
    pub const fn codes_at(&self, int: IntFormat, unit: usize) -> usize {
        self.at(self.codes, (unit, self.chunk / int.unit()), code_bytes(int))
    }

    /// Where the upper bits of the codes of unit `unit` begin.
    pub const fn high_at(&self, int: IntFormat, unit: usize) -> usize {
        self.at(self.high, (unit, self.chunk / int.unit()), high_bytes(int))
    }
}

/// Bytes of the codes of one unit of a strip.
pub const fn code_bytes(int: IntFormat) -> usize {
    STRIP * int.unit() * if int.bits == 8 { 8 } else { 4 } / 8
}

/// Bytes of the upper bits of one unit of a strip.
pub const fn high_bytes(int: IntFormat) -> usize {
    match int.bits {
        5 => STRIP * int.unit() / 8,
        6 => STRIP * int.unit() / 4,
        _ => 0,
    }
}

/// Bytes of a packed weight: `[n]` vectors are f32 padded to 16, `[.., n, k]` matrices are strips.
pub fn packed_bytes(dtype: DType, shape: &[usize]) -> usize {
    match *shape {
        [n] => aligned(n * 4),
        [n, k] if dtype == DType::Q8_PLANES => PlanesLayout::new(k).bytes(n),
        [ref outer @ .., n, k] => {
            outer.iter().product::<usize>() * n.div_ceil(STRIP) * StripLayout::new(dtype, k).bytes
        }
        [] => ALIGN,
    }
}

/// One group of 32 activations: a 64-byte line of 32 signed codes followed by what the dot products need of them.
/// A row of `k` is `k / 32` such lines; with two planes (`a16`) the line of a group's codes is followed by the line of what
/// they leave.
pub struct A8;

impl A8 {
    /// Activations that share a scale.
    pub const GROUP: usize = 32;
    /// Bytes of one group's line.
    pub const LINE: usize = 64;
    /// `f32`: real = scale * code.
    pub const SCALE: usize = 32;
    /// `i32`: minus the sum of the 32 codes.
    pub const NEG_SUM: usize = 36;
    /// `f32`: scale * sum of the 32 codes.
    pub const REAL_SUM: usize = 40;
    /// `i32[2]`: minus the sums of either 16 codes.
    pub const NEG_SUM_16: usize = 48;
    /// `f32[2]`: scale * sums of either 16 codes.
    pub const REAL_SUM_16: usize = 56;
}

/// Bytes from one row of an activation to the next: f32, bf16 and i32 rows are padded to 16 elements, so kernels store
/// whole vectors. A routing row is `i32[top]`, then `f32[top]`.
pub fn row_bytes(ty: &Type) -> Option<usize> {
    match ty {
        Type::Tensor { dtype: dtype @ (DType::A8 | DType::A16), .. } => {
            Some(ty.row_width()? / A8::GROUP * A8::LINE * dtype.planes()?)
        }
        Type::Tensor { dtype: DType::F32, .. } => Some(aligned(ty.row_width()? * 4)),
        Type::Tensor { dtype: DType::BF16, .. } => Some(aligned(ty.row_width()? * 2)),
        Type::Tensor { dtype: DType::I32, .. } => Some(4 * ty.row_width()?),
        Type::Routing { top, .. } => Some(aligned(top * 8)),
        _ => None,
    }
}

/// Bytes of one cache block (64 positions, all heads): keys `[heads][dim][64]`, values `[heads][64][dim]`; of codes then
/// the scales of every head. Of 32 neighbouring dims in int4 the last 16 share their bytes with the first.
pub fn cache_block_bytes(ty: &Type) -> Option<usize> {
    Some(cache_position_bytes(ty)? * CACHE_BLOCK)
}

/// Bytes that a position takes in a cache.
pub fn cache_position_bytes(ty: &Type) -> Option<usize> {
    match ty {
        Type::Cache { heads, dim, dtype, .. } => {
            Some(heads * (dtype.bytes(*dim)? + cache_scales_bytes(ty) / CACHE_BLOCK))
        }
        _ => None,
    }
}

/// Bytes of the scales of a head of a cache block: `f32[64]` of int8 codes, `f16[64]` of int4 values; of int4 keys
/// `f16[dim]`, and as many middles.
pub const fn cache_scales_bytes(ty: &Type) -> usize {
    match ty {
        Type::Cache { dtype: DType::I8, .. } => 4 * CACHE_BLOCK,
        Type::Cache { dtype: DType::I4, role: CacheRole::Values, .. } => 2 * CACHE_BLOCK,
        Type::Cache { dtype: DType::I4, role: CacheRole::Keys, dim, .. } => 4 * *dim,
        _ => 0,
    }
}

/// Byte offset of a head's scales inside a cache block of codes.
pub fn cache_scales(ty: &Type, head: usize) -> usize {
    let codes = match ty {
        Type::Cache { heads, dim, dtype, .. } => heads * dtype.bytes(*dim).unwrap_or(0) * CACHE_BLOCK,
        _ => 0,
    };
    codes + head * cache_scales_bytes(ty)
}

/// What attention computes at once, and the memory in which workers share what they have of it.
///
/// An item is some tokens with the query heads of one key-value head. Where several workers compute different positions of
/// an item, each leaves a *partial*: for every row its sums of weighted values and of weights, and its largest score.
/// A worker's scratch is a line with a counter, then two partials: of an item that an earlier worker began, and of one
/// that a later worker ends. It is zero before the first step, and its counter after every launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionItem {
    /// Most tokens.
    pub tokens: usize,
    /// Query heads: those of a key-value head, or an equal part where they are very many.
    pub heads: usize,
    /// Bytes of a row of a partial: the head, then 16 sums of weights, in f32.
    pub row_bytes: usize,
}

impl AttentionItem {
    /// Rows (token, query head) whose sums share the registers.
    pub const REGISTER_ROWS: usize = 6;
    /// Cache blocks whose scores a row keeps.
    pub const SPAN: usize = 4;
    /// Most rows.
    const ROWS: usize = 64;
    /// Most tokens.
    const TOKENS: usize = 32;
    /// Memory of an item, to stay in the second-level cache.
    const BYTES: usize = 256 << 10;

    /// The item for `group` query heads of `dim` on each key-value head.
    pub fn new(group: usize, dim: usize) -> AttentionItem {
        let row_bytes = (dim.next_multiple_of(STRIP) + STRIP) * 4;
        let rows = (Self::BYTES / (2 * row_bytes + Self::score_bytes())).clamp(1, Self::ROWS);
        let heads = (1..=group).rev().find(|h| group.is_multiple_of(*h) && *h <= rows).unwrap_or(1);
        let most = (rows / heads).clamp(1, Self::TOKENS);
        let even = (most / 2..=most).rev().find(|t| *t > 0 && (t * heads).is_multiple_of(Self::REGISTER_ROWS));
        AttentionItem { tokens: even.unwrap_or(most), heads, row_bytes }
    }

    /// Most rows, in whole vectors.
    pub fn rows(&self) -> usize {
        (self.tokens * self.heads).next_multiple_of(STRIP)
    }

    /// Bytes of a row of scores: one line more, so that rows do not meet in the same lines of a cache.
    pub const fn score_bytes() -> usize {
        Self::SPAN * CACHE_BLOCK * 4 + ALIGN
    }

    /// Bytes of a partial: rows, then the largest scores.
    pub fn partial_bytes(&self) -> usize {
        self.rows() * (self.row_bytes + 4)
    }

    /// Bytes of a worker's scratch.
    pub fn scratch_bytes(&self) -> usize {
        ALIGN + 2 * self.partial_bytes()
    }
}

/// Byte offset of `(head, position in block, d)` inside a cache block, and of its first bit in that byte.
pub fn cache_offset(ty: &Type, (head, slot, d): (usize, usize, usize)) -> Option<(usize, usize)> {
    let Type::Cache { role, dim, dtype, .. } = *ty else { return None };
    let (bytes, (d, bit)) = match dtype {
        DType::I4 => (1, (d / 32 * 16 + d % 16, d % 32 / 16 * 4)),
        _ => (dtype.format().block_bytes, (d, 0)),
    };
    let width = dtype.bytes(dim)? / bytes;
    let at = match role {
        CacheRole::Keys => (head * width + d) * CACHE_BLOCK + slot,
        CacheRole::Values => (head * CACHE_BLOCK + slot) * width + d,
    };
    Some((at * bytes, bit))
}
