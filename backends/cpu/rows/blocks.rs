//! Int4 keys of a cache block that this token completes, from the f16 ones beside them.
//!
//! ```text
//! line = recent[head][dim]     64 positions: scale = (max - min) / 15, middle = min + 8 scale, code = (line - middle) / scale
//! keys [heads][dim / 2][64]    codes of dims d and d + 16 share bytes; then f16 scales[dim] and middles[dim] of every head
//! ```
//!
//! Scales, middles and codes are the interpreter's, to the bit.

use super::Rows;
use super::walk::{self, LANES};
use crate::cpu::cached::{At, Stored, channel};
use crate::cpu::slots;
use crate::emit::{Cmp, Emitter, I8, Val};
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales, cache_scales_bytes};
use mansard_ir::{Node, Result, Type, ValueId, bail};

/// Vectors of a line.
const VECTORS: usize = CACHE_BLOCK / LANES;

/// Bytes of a line in f16.
const LINE: usize = 2 * CACHE_BLOCK;

impl Rows<'_> {
    /// Emits `append_blocks` for this token.
    pub(super) fn append_blocks(&self, e: &mut Emitter, node: &Node) -> Result<()> {
        let (cache, recent) = (node.operands[0], node.operands[1]);
        let ty = self.graph.ty(cache);
        let Type::Cache { heads, dim, .. } = *ty else { bail!(Internal, "{ty} is no cache") };
        let [(slot, to), (_, from)] = [self.cache_block(e, cache)?, self.cache_block(e, recent)?];
        let (size, last) = (e.i64(CACHE_BLOCK as i64), e.i64(CACHE_BLOCK as i64 - 1));
        let position = e.rem(slot, size);
        let whole = e.cmp(Cmp::Eq, position, last);
        let figures = e.gep_const(to, cache_scales(ty, 0));
        e.when(whole, |e| {
            let (zero, heads, lines) = (e.i64(0), e.i64(heads as i64), e.i64((dim / 2) as i64));
            e.repeat(zero, heads, 1, |e, head| {
                let (from, to) = (e.row(from, head, dim * LINE), e.row(to, head, dim / 2 * CACHE_BLOCK));
                let figures = e.row(figures, head, cache_scales_bytes(ty));
                e.repeat(zero, lines, 1, |e, line| {
                    let group = e.i64(-(LANES as i64));
                    let before = e.and(line, group);
                    let low = e.add(line, before);
                    let high = e.scaled(low, 1, LANES);
                    let [low, high] = [low, high].map(|d| codes(e, from, (figures, dim), d));
                    let to = e.row(to, line, CACHE_BLOCK);
                    for (i, (low, high)) in low.into_iter().zip(high).enumerate() {
                        let lower = e.int(I8.x(LANES), 15);
                        let (low, high) = (e.and(low, lower), e.shl(high, 4));
                        let (bytes, to) = (e.or(low, high), e.gep_const(to, i * LANES));
                        e.store(bytes, to, LANES);
                    }
                });
            });
        });
        Ok(())
    }

    /// This token's slot in a cache, and its cache block.
    fn cache_block(&self, e: &mut Emitter, cache: ValueId) -> Result<(Val, Val)> {
        let (ty, pool) = (self.graph.ty(cache), self.memory(cache)?);
        let Some(bytes) = cache_block_bytes(ty) else { bail!(Internal, "{ty} is no cache") };
        let slots = slots(e, self.k, ty)?;
        let slot = walk::load_index(e, slots, self.row);
        let positions = e.i64(CACHE_BLOCK as i64);
        let block = e.div(slot, positions);
        Ok((slot, e.row(pool, block, bytes)))
    }
}

/// The codes of dim `d` of a head; its scale and middle are stored.
fn codes(e: &mut Emitter, from: Val, (figures, dim): (Val, usize), d: Val) -> Vec<Val> {
    let line = e.row(from, d, LINE);
    let mut load = |i: usize| {
        let at = At { byte: e.gep_const(line, i * 2 * LANES), bit: 0 };
        Stored::F16.load(e, at, LANES, 2 * LANES)
    };
    let line: Vec<Val> = (0..VECTORS).map(&mut load).collect();
    let below: Vec<Val> = line.iter().map(|x| e.neg(*x)).collect();
    let [below, most] = [below, line.clone()].map(|of| {
        let most = of.into_iter().reduce(|a, b| e.max(a, b));
        most.map(|most| e.reduce_max(most))
    });
    let (Some(below), Some(most)) = (below, most) else { return vec![] };
    let least = e.neg(below);
    let (scale, middle) = channel(e, least, most);
    let at = e.row(figures, d, 2);
    for (figure, offset) in [(scale, 0), (middle, 2 * dim)] {
        let at = e.gep_const(at, offset);
        Stored::Nibble.store_scale(e, figure, at);
    }
    let middle = e.broadcast(middle, LANES);
    line.into_iter()
        .map(|x| {
            let x = e.sub(x, middle);
            Stored::Nibble.narrow(e, x, Some(scale))
        })
        .collect()
}
