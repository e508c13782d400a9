//! Appends: one token's heads into its slot of the cache pool.
//!
//! ```text
//! slot = slots[token]; cache block = slot / 64
//! keys   [heads][dim][64]   element (head, d) goes to column slot % 64 of line head * dim + d
//! values [heads][64][dim]   a head's elements stay together
//! ```
//!
//! In int8, codes lie so, and a head's scale is `max |x| / 127`, as the interpreter has it to the bit.

use super::Rows;
use super::walk::{self, Chunk, LANES};
use crate::cpu::cached::Stored;
use crate::cpu::slots;
use crate::emit::{Emitter, F32, Val};
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales};
use mansard_ir::{CacheRole, Node, Result, Type, bail};

impl Rows<'_> {
    /// Emits `append` for this token.
    pub(super) fn append(&self, e: &mut Emitter, node: &Node) -> Result<()> {
        let ty = self.graph.ty(node.operands[0]);
        let (Type::Cache { role, heads, dim, dtype, .. }, Some(block_bytes)) = (ty, cache_block_bytes(ty)) else {
            bail!(Internal, "{ty} is no cache")
        };
        let (role, heads, dim, stored) = (*role, *heads, *dim, Stored::of(*dtype)?);
        let (pool, from) = (self.memory(node.operands[0])?, self.row_of(node.operands[1])?);
        let slots = slots(e, self.k, ty)?;
        let slot = walk::load_index(e, slots, self.row);
        let positions = e.i64(CACHE_BLOCK as i64);
        let (block, position) = (e.div(slot, positions), e.rem(slot, positions));
        let block = e.row(pool, block, block_bytes);
        let scales = e.gep_const(block, cache_scales(heads, dim, 0));
        let scales = e.row(scales, position, 4);
        let align = walk::head_align(heads, dim);
        walk::heads(e, heads, dim, &mut |e, head, offset| {
            let from = e.gep(from, offset);
            let scale = (stored == Stored::Code).then(|| {
                let scale = scale_of(e, from, dim, align);
                let to = e.row(scales, head, CACHE_BLOCK * 4);
                e.store(scale, to, 4);
                scale
            });
            let to = e.row(block, head, dim * CACHE_BLOCK * stored.bytes());
            walk::visit(e, dim, &mut |e, chunk| {
                let x = chunk.load(e, from, align);
                let x = stored.narrow(e, x, scale);
                store(e, x, chunk, (role, dim, stored), to, position);
            });
        });
        Ok(())
    }
}

/// Stores some neighbouring elements of a head that starts at `to`.
fn store(
    e: &mut Emitter,
    x: Val,
    chunk: Chunk,
    (role, dim, stored): (CacheRole, usize, Stored),
    to: Val,
    position: Val,
) {
    let (first, bytes) = (chunk.index(e), stored.bytes());
    match role {
        CacheRole::Keys => {
            let to = e.row(to, first, CACHE_BLOCK * bytes);
            let to = e.row(to, position, bytes);
            for lane in 0..chunk.lanes {
                let value = e.extract(x, lane);
                let to = e.gep_const(to, lane * CACHE_BLOCK * bytes);
                e.store(value, to, bytes);
            }
        }
        CacheRole::Values => {
            let to = e.row(to, position, dim * bytes);
            let to = e.row(to, first, bytes);
            e.store(x, to, bytes);
        }
    }
}

/// The scale of the codes of `dim` elements.
fn scale_of(e: &mut Emitter, from: Val, dim: usize, align: usize) -> Val {
    let none = e.float(F32.x(LANES), 0.0);
    let most = walk::walk(e, dim, &[none], &mut |e, chunk, most| {
        let x = chunk.load(e, from, align);
        let x = e.math("absf", x);
        let x = walk::widen(e, x);
        vec![e.max(x, most[0])]
    });
    let most = e.reduce_max(most[0]);
    Stored::scale(e, most)
}
