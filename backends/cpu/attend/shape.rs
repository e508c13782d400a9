//! What is known of an attention kernel when it is emitted: extents, rules, and how its work falls into rows and registers.

use crate::cpu::rows::walk::LANES;
use mansard_ir::layout::{AttentionItem, row_bytes};
use mansard_ir::{Node, Result, Target, Type, bail};

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
    /// Bytes from token to token of queries and results.
    pub(super) row_bytes: usize,
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
        let (Type::Cache { heads: kv_heads, dim, .. }, Some(width), Some(row_bytes)) =
            (cache, q.row_width(), row_bytes(q))
        else {
            bail!(Internal, "attention of {q} over {cache}")
        };
        let group = width / dim / kv_heads;
        let item = AttentionItem::new(group, *dim);
        let parts = group / item.heads;
        Ok(Shape {
            dim: *dim,
            item,
            slices: kv_heads * parts,
            parts,
            mixed: node.operands.len() > 4,
            row_bytes,
            scale: node.attrs.float("scale") as f32,
            causal: node.attrs.bool("causal"),
            window: node.attrs.size("window"),
            softcap: node.attrs.float("softcap") as f32,
            registers: target.registers,
            per_vector: (LANES * 4).div_ceil(target.vector_bytes),
        })
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
