//! What is known of an attention kernel when it is emitted: extents, rules, and how its work falls into items, rows and
//! registers.

use super::Scratch;
use crate::cpu::rows::walk::LANES;
use mansard_ir::layout::{cache_block_bytes, row_bytes};
use mansard_ir::plan::Kernel;
use mansard_ir::{DType, Node, Result, Target, Type, bail};

/// Tokens that are computed together.
pub(super) const TOKENS: usize = 4;

/// Most rows whose accumulators share the registers.
pub(super) const ROWS: usize = 6;

/// Bytes of stack that an item's rows may take before its group is cut: what stays in the second-level cache.
pub(super) const SCRATCH_BYTES: usize = 256 << 10;

/// Tokens of a step from which its tiles alone keep the workers busy.
const MANY_TOKENS: usize = 9;

/// Tokens of a tile that this kernel computes at once: steps of fewer have no full tiles.
pub(super) fn tokens_together(kernel: &Kernel) -> usize {
    if kernel.range.max < TOKENS { 1 } else { TOKENS }
}

/// Extents and rules, all known now.
pub(super) struct Shape {
    /// Width of a head.
    pub(super) dim: usize,
    /// Query heads of an item: a group, or a part of one.
    pub(super) heads: usize,
    /// Items of each key-value head and tile.
    pub(super) parts: usize,
    pub(super) kv_heads: usize,
    /// Bytes of a stored key or value.
    pub(super) element: usize,
    pub(super) cache_block_bytes: usize,
    /// Bytes from token to token of queries and results.
    pub(super) row_bytes: usize,
    pub(super) scale: f32,
    pub(super) causal: bool,
    pub(super) window: usize,
    pub(super) softcap: f32,
    pub(super) registers: usize,
    /// Registers that 16 lanes take.
    pub(super) per_vector: usize,
}

impl Shape {
    pub(super) fn new(kernel: &Kernel, target: &Target, node: &Node, q: &Type, cache: &Type) -> Result<Shape> {
        let (Type::Cache { heads: kv_heads, dim, dtype, .. }, Some(width)) = (cache, q.row_width()) else {
            bail!(Internal, "attention of {q} over {cache}")
        };
        let (Some(row_bytes), Some(cache_block_bytes)) = (row_bytes(q), cache_block_bytes(cache)) else {
            bail!(Internal, "attention of {q} over {cache}")
        };
        let element = match dtype {
            DType::F32 => 4,
            DType::F16 => 2,
            other => bail!(Unsupported, "a cache of {other}: f32 or f16 is needed"),
        };
        let group = width / dim / kv_heads;
        let workers = Some(target.machine.threads).filter(|_| kernel.range.min < MANY_TOKENS);
        let tokens = tokens_together(kernel);
        let parts = parts(*kv_heads, group, workers, &|heads| Scratch::bytes(tokens * heads, *dim) <= SCRATCH_BYTES);
        Ok(Shape {
            dim: *dim,
            heads: group / parts,
            parts,
            kv_heads: *kv_heads,
            element,
            cache_block_bytes,
            row_bytes,
            scale: node.attrs.float("scale") as f32,
            causal: node.attrs.bool("causal"),
            window: node.attrs.size("window"),
            softcap: node.attrs.float("softcap") as f32,
            registers: target.registers,
            per_vector: (LANES * 4).div_ceil(target.vector_bytes),
        })
    }

    /// Bytes of a row of scratch: a head in whole vectors.
    pub(super) fn stride(&self) -> usize {
        self.dim.next_multiple_of(LANES) * 4
    }

    /// Vectors of 16 lanes that go with `rows` rows into one pass of a product.
    pub(super) fn vectors(&self, rows: usize) -> usize {
        let spare = if self.registers >= 32 { 8 } else { 4 };
        ((self.registers - spare) / (rows * self.per_vector)).max(1)
    }

    /// How a head's width falls into vectors: `(first element, lanes)`.
    pub(super) fn chunks(&self) -> Vec<(usize, usize)> {
        let mut chunks: Vec<(usize, usize)> = (0..self.dim / LANES).map(|i| (i * LANES, LANES)).collect();
        let mut first = self.dim / LANES * LANES;
        for lanes in [8, 4, 2, 1] {
            if self.dim & lanes != 0 {
                chunks.push((first, lanes));
                first += lanes;
            }
        }
        chunks
    }
}

/// Into how many parts to cut each group. `fits` tells whether a worker's memory holds the rows of so many heads.
///
/// Where tiles are few, a part more reads the cache once more, which costs as much as the work of about two rows; a part
/// fewer may leave workers idle.
pub(super) fn parts(kv_heads: usize, group: usize, workers: Option<usize>, fits: &dyn Fn(usize) -> bool) -> usize {
    let cost = |parts: usize| match workers {
        Some(workers) => (kv_heads * parts).div_ceil(workers.max(1)) * (2 + group / parts),
        None => parts,
    };
    let divisors = (1..=group).filter(|p| group.is_multiple_of(*p) && fits(group / p));
    divisors.min_by_key(|p| cost(*p)).unwrap_or(group)
}

/// `(rows, how often)`: as few and as equal groups of rows as go into registers.
pub(super) fn row_groups(rows: usize) -> [(usize, usize); 2] {
    let size = rows.div_ceil(rows.div_ceil(ROWS));
    [(size, rows / size), (rows % size, 1)]
}
