//! Int4 keys of a cache block that this token completes, from the f16 ones beside them: two dims, which share bytes, a thread.

use super::Rows;
use crate::cpu::cached::{At, Stored, channel};
use crate::cpu::rows::walk::load_index;
use crate::cpu::slots;
use crate::emit::{Cmp, Emitter, F32, I8, Val};
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales, cache_scales_bytes};
use mansard_ir::{Node, Result, Type, ValueId, bail};

/// Dims between those that share bytes.
const APART: usize = 16;

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
            e.strided(heads * dim / 2, |e, index| {
                let (lines, apart) = (e.i64((dim / 2) as i64), e.i64(APART as i64));
                let (head, line) = (e.div(index, lines), e.rem(index, lines));
                let figures = e.row(figures, head, cache_scales_bytes(ty));
                let from = e.row(from, head, dim * CACHE_BLOCK * 2);
                let within = e.rem(line, apart);
                let before = e.sub(line, within);
                let low = e.add(line, before);
                let high = e.scaled(low, 1, APART);
                let dims = [low, high].map(|d| Line::new(e, from, (figures, dim), d));
                let to = e.row(to, index, CACHE_BLOCK);
                let zero = e.i64(0);
                e.repeat(zero, size, 1, |e, position| {
                    let [low, high] = dims.map(|line| line.code(e, position));
                    let lower = e.int(I8, 15);
                    let (low, high) = (e.and(low, lower), e.shl(high, 4));
                    let (byte, to) = (e.or(low, high), e.row(to, position, 1));
                    e.store(byte, to, 1);
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
        let slot = load_index(e, slots, self.row);
        let positions = e.i64(CACHE_BLOCK as i64);
        let block = e.div(slot, positions);
        Ok((slot, e.row(pool, block, bytes)))
    }
}

/// A dim of a head in a cache block.
#[derive(Clone, Copy)]
struct Line {
    at: Val,
    scale: Val,
    middle: Val,
}

impl Line {
    /// Finds and stores scale and middle.
    fn new(e: &mut Emitter, from: Val, (figures, dim): (Val, usize), d: Val) -> Line {
        let at = e.row(from, d, CACHE_BLOCK * 2);
        let (one, end) = (e.i64(1), e.i64(CACHE_BLOCK as i64));
        let first = half(e, at);
        let ends = e.for_loop((one, end, one), &[first, first], |e, position, ends| {
            let at = e.row(at, position, 2);
            let x = half(e, at);
            vec![e.min(x, ends[0]), e.max(x, ends[1])]
        });
        let (scale, middle) = channel(e, ends[0], ends[1]);
        let to = e.row(figures, d, 2);
        for (figure, offset) in [(scale, 0), (middle, 2 * dim)] {
            let to = e.gep_const(to, offset);
            Stored::Nibble.store_scale(e, figure, to);
        }
        Line { at, scale, middle }
    }

    fn code(self, e: &mut Emitter, position: Val) -> Val {
        let at = e.row(self.at, position, 2);
        let x = half(e, at);
        let x = e.sub(x, self.middle);
        Stored::Nibble.narrow(e, x, Some(self.scale))
    }
}

fn half(e: &mut Emitter, byte: Val) -> Val {
    let x = Stored::F16.load(e, At { byte, bit: 0 }, 0, 2);
    debug_assert_eq!(x.ty, F32);
    x
}
