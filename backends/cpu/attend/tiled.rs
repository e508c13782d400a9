//! Both products of attention on matrix units (AMX), for items of many rows whose queries are bf16.
//!
//! ```text
//! keys     [dim][64]   ->  panel [64 / 16][dim / 2] lines of 16 pairs       scores[16][16]  = q[16][dim] . panel
//! values   [64][dim]   ->  panel [dim / 16][64 / 2] lines of 16 pairs       out[16][16]    += weights[16][64] . panel
//! ```
//!
//! A head of a cache block is read once for all rows of an item, and rounded to bf16 then; so are weights, in place of their
//! scores. Sums are f32. Rows past the item's last one are computed along with the others, from whatever their memory holds:
//! nobody reads them.

use super::softmax::State;
use super::source::Source;
use super::{Attention, Item};
use crate::cpu::cached::{At, Stored, load_channels};
use crate::cpu::dot::amx::{self, Sums};
use crate::cpu::dot::{Rows, unpack};
use crate::cpu::rows::walk::LANES;
use crate::emit::{Cmp, Emitter, F32, Val};
use mansard_ir::DType;
use mansard_ir::layout::{AttentionItem, CACHE_BLOCK};

/// Dims that are packed at a time; in caches of int4, those that share bytes.
const DIMS: usize = 32;

/// Vectors of a cache block's positions.
const VECTORS: usize = CACHE_BLOCK / LANES;

/// Bytes of the widest panel: a head of a cache block in bf16.
pub(super) fn panel_bytes(dim: usize) -> usize {
    CACHE_BLOCK * dim * 2
}

impl Attention {
    /// `scores[row][position]`, as [`Attention::scores_of`].
    pub(super) fn tiled_scores(&self, e: &mut Emitter, source: &Source, item: &Item, block: Val, scores: Val) {
        let (dim, panel) = (self.shape.dim, self.buffers.panel);
        let keys = source.head(e, item, source.keys, block);
        let channels = source.channels(e, item, block);
        pack_keys(e, source.stored, dim, (keys, channels), panel);
        let strips: Vec<Val> = (0..VECTORS).map(|i| e.gep_const(panel, i * LANES * dim * 2)).collect();
        let stride = AttentionItem::score_bytes();
        amx::tiles(e, item.rows, |e, row, count| {
            let first = e.row(self.buffers.q, row, self.shape.stride());
            let sums = Sums { first: e.row(scores, row, stride), row: stride, strip: LANES * 4, add: false };
            amx::pairs(e, dim, &strips, halves(first, self.shape.stride(), count), None, sums);
        });
        if let Some(scales) = source.scales(e, item, source.keys, block) {
            let scales: Vec<Val> =
                (0..VECTORS).map(|i| source.stored.load_scales(e, scales, i * LANES, LANES)).collect();
            let zero = e.i64(0);
            e.repeat(zero, item.rows, 1, |e, row| {
                let scores = e.row(scores, row, stride);
                for (i, scale) in scales.iter().enumerate() {
                    let at = e.gep_const(scores, i * LANES * 4);
                    let score = e.load(at, F32.x(LANES), 64);
                    let score = e.mul(score, *scale);
                    e.store(score, at, 64);
                }
            });
        }
    }

    /// `out[row] += weights[row] . values`, as [`Attention::weigh_of`]; weights are bf16.
    pub(super) fn tiled_weigh(
        &self,
        e: &mut Emitter,
        source: &Source,
        item: &Item,
        state: &State,
        (block, weights): (Val, Val),
    ) {
        let (dim, panel, row_bytes) = (self.shape.dim, self.buffers.panel, self.shape.item.row_bytes);
        let values = source.head(e, item, source.values, block);
        let first = e.scaled(block, CACHE_BLOCK, 0);
        let depth = e.sub(item.high, first);
        self.pack_values(e, source, values, depth);
        let strips: Vec<Val> = (0..dim / LANES).map(|i| e.gep_const(panel, i * LANES * CACHE_BLOCK * 2)).collect();
        let stride = AttentionItem::score_bytes();
        amx::tiles(e, item.rows, |e, row, count| {
            let first = e.row(weights, row, stride);
            let sums = Sums { first: e.row(state.out, row, row_bytes), row: row_bytes, strip: LANES * 4, add: true };
            amx::pairs(e, CACHE_BLOCK, &strips, halves(first, stride, count), None, sums);
        });
    }

    /// Values of neighbouring positions become pairs. Positions from `depth` on are none: their memory may never have been
    /// written, and what is no number stays none when it is multiplied with 0.
    fn pack_values(&self, e: &mut Emitter, source: &Source, values: Val, depth: Val) {
        let (dim, stored, bytes) = (self.shape.dim, source.stored, source.value_bytes());
        let (zero, pairs) = (e.i64(0), e.i64(CACHE_BLOCK as i64 / 2));
        e.repeat(zero, pairs, 1, |e, pair| {
            let to = e.row(self.buffers.panel, pair, 4 * LANES);
            let rows = [0, 1].map(|odd| {
                let position = e.scaled(pair, 2, odd);
                let there = e.cmp(Cmp::Lt, position, depth);
                let row = e.row(values, position, bytes);
                e.select(there, row, self.buffers.nothing)
            });
            for i in 0..dim / LANES {
                let first = i * LANES;
                let (byte, bit) = match stored.sharing() {
                    1 => (first * stored.bytes(), 0),
                    _ => (first / DIMS * LANES, 4 * (i % 2) as i64),
                };
                let pair = rows.map(|row| {
                    let at = At { byte: e.gep_const(row, byte), bit };
                    stored.load(e, at, LANES, LANES * stored.bytes())
                });
                let at = e.gep_const(to, first * CACHE_BLOCK * 2);
                let pair = unpack::pairs(e, pair);
                e.store(pair, at, 64);
            }
        });
    }
}

/// Keys of neighbouring dims become pairs, for each 16 positions.
fn pack_keys(e: &mut Emitter, stored: Stored, dim: usize, (keys, channels): (Val, Option<Val>), panel: Val) {
    let line = CACHE_BLOCK * stored.bytes();
    let (zero, groups) = (e.i64(0), e.i64((dim / DIMS) as i64));
    e.repeat(zero, groups, 1, |e, group| {
        let (from, to) = (e.row(keys, group, DIMS / stored.sharing() * line), e.row(panel, group, DIMS * 2 * LANES));
        let channels = channels.map(|channels| e.row(channels, group, DIMS * 2));
        for pair in 0..DIMS / 2 {
            let figures = [2 * pair, 2 * pair + 1].map(|d| {
                let at = e.gep_const(channels?, 2 * d);
                let figures = load_channels(e, at, 2 * dim, 0, 2);
                Some(figures.map(|x| e.broadcast(x, LANES)))
            });
            for vector in 0..VECTORS {
                let pairs = [2 * pair, 2 * pair + 1].map(|d| {
                    let (lines, bit) = if stored.sharing() == 1 { (d, 0) } else { (d % LANES, 4 * (d / LANES) as i64) };
                    let at = At { byte: e.gep_const(from, lines * line + vector * LANES * stored.bytes()), bit };
                    let key = stored.load(e, at, LANES, LANES * stored.bytes());
                    match figures[d % 2] {
                        Some([scale, middle]) => e.fma(scale, key, middle),
                        None => key,
                    }
                });
                let at = e.gep_const(to, vector * LANES * dim * 2 + pair * 4 * LANES);
                let pairs = unpack::pairs(e, pairs);
                e.store(pairs, at, 64);
            }
        }
    });
}

fn halves(first: Val, stride: usize, count: usize) -> Rows {
    Rows { first, stride, count, dtype: DType::BF16, planes: 1, prefetch: 0, ahead: None }
}
