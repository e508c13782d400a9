//! Appends: one token's heads into its slot of the cache pool.
//!
//! ```text
//! slot = slots[token]; cache block = slot / 64
//! keys   [heads][dim][64]   element (head, d) goes to column slot % 64 of line head * dim + d
//! values [heads][64][dim]   a head's elements stay together
//! ```
//!
//! Codes lie so, too, two int4 codes a byte; a head's scale is found as the interpreter does, to the bit.

use super::Rows;
use super::walk::{self, LANES};
use crate::cpu::cached::Stored;
use crate::cpu::slots;
use crate::emit::{Emitter, F32, I8, Val};
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales};
use mansard_ir::{CacheRole, Node, Result, Type, bail};

/// Where a token's heads go.
struct Place {
    role: CacheRole,
    dim: usize,
    stored: Stored,
    /// Of the token in its cache block.
    position: Val,
}

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
        let scales = e.gep_const(block, cache_scales(ty, 0));
        let scales = e.row(scales, position, stored.scale_bytes());
        let align = walk::head_align(heads, dim);
        let place = Place { role, dim, stored, position };
        walk::heads(e, heads, dim, &mut |e, head, offset| {
            let from = e.gep(from, offset);
            let scale = stored.has_scales().then(|| {
                let scale = scale_of(e, stored, from, dim, align);
                let to = e.row(scales, head, CACHE_BLOCK * stored.scale_bytes());
                stored.store_scale(e, scale, to);
                scale
            });
            let to = e.row(block, head, dim / stored.sharing() * CACHE_BLOCK * stored.bytes());
            if stored == Stored::Nibble {
                return place.pairs(e, from, scale, to);
            }
            walk::visit(e, dim, &mut |e, chunk| {
                let x = chunk.load(e, from, align);
                let (x, first) = (stored.narrow(e, x, scale), chunk.index(e));
                place.store(e, x, first, to);
            });
        });
        Ok(())
    }
}

impl Place {
    /// Stores some neighbouring elements, from byte or element `first` on, of a head that starts at `to`.
    fn store(&self, e: &mut Emitter, x: Val, first: Val, to: Val) {
        let bytes = self.stored.bytes();
        match self.role {
            CacheRole::Keys => {
                let to = e.row(to, first, CACHE_BLOCK * bytes);
                let to = e.row(to, self.position, bytes);
                for lane in 0..x.ty.lanes {
                    let value = e.extract(x, lane);
                    let to = e.gep_const(to, lane * CACHE_BLOCK * bytes);
                    e.store(value, to, bytes);
                }
            }
            CacheRole::Values => {
                let to = e.row(to, self.position, self.dim / self.stored.sharing() * bytes);
                let to = e.row(to, first, bytes);
                e.store(x, to, bytes);
            }
        }
    }

    /// Stores a head of int4 codes, 32 dims at a time.
    fn pairs(&self, e: &mut Emitter, from: Val, scale: Option<Val>, to: Val) {
        for first in (0..self.dim).step_by(2 * LANES) {
            let mut codes = |d: usize| {
                let at = e.gep_const(from, 4 * d);
                let x = e.load(at, F32.x(LANES), 64);
                self.stored.narrow(e, x, scale)
            };
            let (low, high) = (codes(first), codes(first + LANES));
            let lower = e.int(I8.x(LANES), 15);
            let (low, high) = (e.and(low, lower), e.shl(high, 4));
            let (bytes, first) = (e.or(low, high), e.i64((first / 2) as i64));
            self.store(e, bytes, first, to);
        }
    }
}

/// The scale of the codes of `dim` elements.
fn scale_of(e: &mut Emitter, stored: Stored, from: Val, dim: usize, align: usize) -> Val {
    let none = e.float(F32.x(LANES), 0.0);
    let ends = walk::walk(e, dim, &[none, none], &mut |e, chunk, ends| {
        let x = chunk.load(e, from, align);
        let x = walk::widen(e, x);
        vec![e.min(x, ends[0]), e.max(x, ends[1])]
    });
    let below = e.neg(ends[0]);
    let (below, most) = (e.reduce_max(below), e.reduce_max(ends[1]));
    let least = e.neg(below);
    stored.scale(e, least, most)
}
