//! What is known of an attention kernel when it is emitted: extents, rules, and how its work falls into rows and registers.

use crate::cpu::rows::walk::LANES;
use mansard_ir::layout::{AttentionItem, row_bytes};
use mansard_ir::{DType, Node, Result, Target, Type, bail};

/// Registers that a product leaves to what it reads.
const SPARE: usize = 8;
/// The same where there are sixteen in all.
const SPARE_OF_16: usize = 4;

/// Extents and rules, all known now.
pub(super) struct Shape {
    /// Width of a head.
    pub(super) dim: usize,
    /// What is computed at once.
    pub(super) item: AttentionItem,
    /// Items of each token: key-value heads, times the parts of a group that is too large for one.
    pub(super) slices: usize,
    /// Items of each token and key-value head.
    pub(super) parts: usize,
    /// An item's own cache block is read from other caches.
    pub(super) mixed: bool,
    /// Keys have scales and middles of dims.
    pub(super) by_dim: bool,
    /// Bytes from token to token of queries.
    pub(super) query_bytes: usize,
    /// Bytes from token to token of results.
    pub(super) row_bytes: usize,
    /// Queries are bf16.
    pub(super) halves: bool,
    /// Matrix units multiply them, where an item has many rows.
    pub(super) tiled: bool,
    pub(super) scale: f32,
    pub(super) causal: bool,
    pub(super) window: usize,
    pub(super) softcap: f32,
    registers: usize,
    /// Registers that 16 lanes take.
    per_vector: usize,
}

impl Shape {
    pub(super) fn new(target: &Target, node: &Node, q: &Type, cache: &Type) -> Result<Shape> {
        let (Type::Cache { heads: kv_heads, dim, .. }, Some(width), Some(query_bytes), Some(row_bytes)) =
            (cache, q.row_width(), row_bytes(q), row_bytes(&node.ty))
        else {
            bail!(Internal, "attention of {q} over {cache}")
        };
        let group = width / dim / kv_heads;
        let item = AttentionItem::new(group, *dim);
        let parts = group / item.heads;
        let halves = q.dtype() == Some(DType::BF16);
        Ok(Shape {
            dim: *dim,
            item,
            slices: kv_heads * parts,
            parts,
            mixed: node.operands.len() > 4,
            by_dim: cache.kept(1) == 0,
            query_bytes,
            row_bytes,
            halves,
            tiled: halves && target.has("amx-bf16"),
            scale: node.attrs.float("scale") as f32,
            causal: node.attrs.bool("causal"),
            window: node.attrs.size("window"),
            softcap: node.attrs.float("softcap") as f32,
            registers: target.registers,
            per_vector: (LANES * 4).div_ceil(target.vector_bytes),
        })
    }

    /// Scores are in units of ln 2, unless a cap comes between.
    fn units(&self) -> f32 {
        if self.softcap > 0.0 { 1.0 } else { std::f32::consts::LOG2_E }
    }

    /// What queries are multiplied with before all else: those of bf16 stay as they are.
    pub(super) fn query_factor(&self) -> f32 {
        if self.halves { 1.0 } else { self.scale * self.units() }
    }

    /// What scores are multiplied with before they are capped.
    pub(super) fn capped_factor(&self) -> f32 {
        if self.halves { self.scale } else { 1.0 }
    }

    /// What scores are multiplied with on their way to weights.
    pub(super) fn score_factor(&self) -> f32 {
        if self.halves && self.softcap == 0.0 { self.scale * self.units() } else { 1.0 }
    }

    /// Bytes of a row of queries: a head in whole vectors.
    pub(super) fn stride(&self) -> usize {
        self.dim.next_multiple_of(LANES) * 4
    }

    /// Vectors of 16 lanes that go with `rows` rows into one pass of a product.
    pub(super) fn vectors(&self, rows: usize) -> usize {
        let spare = if self.registers >= 32 { SPARE } else { SPARE_OF_16 };
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

    /// How many rows an item can have beyond whole groups of [`AttentionItem::REGISTER_ROWS`].
    pub(super) fn odd_rows(&self) -> Vec<usize> {
        let rows = (1..=self.item.tokens).map(|tokens| tokens * self.item.heads % AttentionItem::REGISTER_ROWS);
        let odd: std::collections::BTreeSet<usize> = rows.filter(|r| *r > 0).collect();
        odd.into_iter().collect()
    }
}
