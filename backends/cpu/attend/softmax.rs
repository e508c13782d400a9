//! The running softmax: scores of a span become weights, and sums move on to a larger maximum.
//!
//! ```text
//! row by row     most' = max(most, scores)                      in units of ln 2: weights are powers of two
//! 16 rows        factor = 2^(most - most')
//! row by row     scores = 2^(scores - most'), sums = sums * factor + scores, out = out * factor
//! ```
//!
//! A row that sees nothing of a span keeps its maximum, far below every score; what such weights add is wiped out by the
//! factor of its first real score, and every token sees itself.

use super::{Attention, Item, Units};
use crate::cpu::rows::walk::LANES;
use crate::emit::{Cmp, Emitter, F32, I32, Val};
use crate::math;
use mansard_ir::layout::{AttentionItem, CACHE_BLOCK};

/// Below every score, and finite, so that differences of two are numbers.
pub(super) const FAR_BELOW: f32 = -1e30;
/// Scores out of sight: further below.
const OUT_OF_SIGHT: f32 = -2e30;
/// Vectors of a cache block's scores.
const VECTORS: usize = CACHE_BLOCK / LANES;

/// What an item has summed up so far: a partial, see [`AttentionItem`].
#[derive(Clone, Copy)]
pub(super) struct State {
    /// `[rows]`: sums of weighted values, then 16 sums of weights.
    pub(super) out: Val,
    /// `[rows]`: largest score.
    pub(super) most: Val,
}

/// Some neighbouring cache blocks of an item.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// The first.
    pub(super) first: Val,
    /// How many: at most [`AttentionItem::SPAN`].
    pub(super) blocks: Val,
    /// One beyond the last cache block of the spans to come.
    pub(super) end: Val,
}

impl Attention {
    /// The state at `out`.
    pub(super) fn state(&self, e: &mut Emitter, out: Val) -> State {
        let item = &self.shape.item;
        State { out, most: e.gep_const(out, item.rows() * item.row_bytes) }
    }

    fn row_of_scores(&self, e: &mut Emitter, row: Val) -> Val {
        e.row(self.buffers.scores, row, AttentionItem::score_bytes())
    }

    /// Scores of a span become weights; `out`, sums and maxima move on.
    pub(super) fn soften(&self, e: &mut Emitter, item: &Item, state: &State, span: Span, units: Units) {
        self.prepare(e, item, span);
        let zero = e.i64(0);
        e.repeat(zero, item.rows, 1, |e, row| self.maximum(e, state, span, row));
        self.factors(e, item, state.most, self.buffers.most);
        e.repeat(zero, item.rows, 1, |e, row| self.weights(e, item, state, (span, row), units));
    }

    /// Caps scores, and masks those of positions that not every row sees.
    fn prepare(&self, e: &mut Emitter, item: &Item, span: Span) {
        let zero = e.i64(0);
        e.repeat(zero, span.blocks, 1, |e, index| {
            let block = e.add(span.first, index);
            let first = e.scaled(block, CACHE_BLOCK, 0);
            let positions = e.i64(CACHE_BLOCK as i64);
            let beyond = e.add(first, positions);
            let cut = e.cmp(Cmp::Gt, beyond, item.end);
            let late = e.cmp(Cmp::Lt, first, item.start);
            let masked = e.or(cut, late);
            let rows = |e: &mut Emitter, first: Option<Val>| {
                e.repeat(zero, item.rows, 1, |e, row| {
                    let scores = self.row_of_scores(e, row);
                    let scores = e.row(scores, index, CACHE_BLOCK * 4);
                    self.prepare_row(e, scores, row, first);
                });
            };
            if self.shape.softcap > 0.0 {
                e.either(masked, |e| rows(e, Some(first)), |e| rows(e, None));
            } else {
                e.when(masked, |e| rows(e, Some(first)));
            }
        });
    }

    /// One row of one cache block, which is masked where its first position is given.
    fn prepare_row(&self, e: &mut Emitter, scores: Val, row: Val, masked: Option<Val>) {
        let ty = F32.x(LANES);
        for vector in 0..VECTORS {
            let at = e.gep_const(scores, vector * LANES * 4);
            let mut score = e.load(at, ty, 64);
            if self.shape.softcap > 0.0 {
                score = by(e, score, self.shape.capped_factor());
                let cap = e.float(ty, self.shape.softcap);
                score = math::softcap(e, score, cap);
                let log2e = e.float(ty, std::f32::consts::LOG2_E);
                score = e.mul(score, log2e);
            }
            if let Some(first) = masked {
                let seen = self.seen(e, row, first, vector);
                let below = e.float(ty, OUT_OF_SIGHT / self.shape.score_factor());
                score = e.select(seen, score, below);
            }
            e.store(score, at, 64);
        }
    }

    /// Which of 16 positions a row sees.
    fn seen(&self, e: &mut Emitter, row: Val, first: Val, vector: usize) -> Val {
        let ty = I32.x(LANES);
        let first = e.convert("trunci", first, I32);
        let first = e.broadcast(first, LANES);
        let lanes = e.lanes(I32, LANES, vector * LANES);
        let positions = e.add(first, lanes);
        let limit = |e: &mut Emitter, limits: Val| {
            let at = e.row(limits, row, 4);
            let limit = e.load(at, I32, 4);
            e.broadcast(limit, ty.lanes)
        };
        let end = limit(e, self.buffers.ends);
        let seen = e.cmp(Cmp::Lt, positions, end);
        if self.shape.window == 0 {
            return seen;
        }
        let start = limit(e, self.buffers.starts);
        let late = e.cmp(Cmp::Ge, positions, start);
        e.and(seen, late)
    }

    /// Sixteen scores of a row.
    fn score(&self, e: &mut Emitter, scores: Val, index: usize) -> Val {
        let score = load_vector(e, scores, index);
        by(e, score, self.shape.score_factor())
    }

    /// The row's largest score, with this span.
    fn maximum(&self, e: &mut Emitter, state: &State, span: Span, row: Val) {
        let (zero, one) = (e.i64(0), e.i64(1));
        let scores = self.row_of_scores(e, row);
        let before = e.row(state.most, row, 4);
        let before = e.load(before, F32, 4);
        let before = e.broadcast(before, LANES);
        let most = e.for_loop((zero, span.blocks, one), &[before], |e, index, most| {
            let scores = e.row(scores, index, CACHE_BLOCK * 4);
            let x: Vec<Val> = (0..VECTORS).map(|i| self.score(e, scores, i)).collect();
            let (a, b) = (e.max(x[0], x[1]), e.max(x[2], x[3]));
            let most_here = e.max(a, b);
            vec![e.max(most_here, most[0])]
        });
        let most = e.reduce_max(most[0]);
        let to = e.row(self.buffers.most, row, 4);
        e.store(most, to, 4);
    }

    /// `factors = 2^(most - new)` for 16 rows at a time; `new` becomes `most`.
    fn factors(&self, e: &mut Emitter, item: &Item, most: Val, new: Val) {
        let zero = e.i64(0);
        e.repeat(zero, item.rows, LANES as i64, |e, row| {
            let (from, to) = (e.row(most, row, 4), e.row(new, row, 4));
            let (before, after) = (load_vector(e, from, 0), load_vector(e, to, 0));
            let down = e.sub(before, after);
            let factor = math::exp2(e, down);
            let at = e.row(self.buffers.factors, row, 4);
            e.store(factor, at, 64);
            e.store(after, from, 64);
        });
    }

    /// The row's weights in this span, times the scales of values; its sums, by the factor.
    fn weights(&self, e: &mut Emitter, item: &Item, state: &State, (span, row): (Span, Val), units: Units) {
        let (zero, one) = (e.i64(0), e.i64(1));
        let scores = self.row_of_scores(e, row);
        let most = e.row(self.buffers.most, row, 4);
        let most = e.load(most, F32, 4);
        let most = e.broadcast(most, LANES);
        let none = e.float(F32.x(LANES), 0.0);
        let sums = e.for_loop((zero, span.blocks, one), &[none], |e, index, sums| {
            let scores = e.row(scores, index, CACHE_BLOCK * 4);
            let block = e.add(span.first, index);
            let scales = self.caches.scales(e, item, self.caches.values, block);
            let weights: Vec<Val> = (0..VECTORS)
                .map(|i| {
                    let score = self.score(e, scores, i);
                    let below = e.sub(score, most);
                    let weight = math::exp2(e, below);
                    let scaled = match scales {
                        Some(scales) => {
                            let scale = self.caches.stored.load_scales(e, scales, i * LANES, LANES);
                            let scale = self.scale_in(e, item, block, scale);
                            e.mul(weight, scale)
                        }
                        None => weight,
                    };
                    match units {
                        Units::Vector => {
                            let at = e.gep_const(scores, i * LANES * 4);
                            e.store(scaled, at, 64);
                        }
                        // Never beyond the scores that have been read.
                        Units::Matrix => {
                            let (at, scaled) = (e.gep_const(scores, i * LANES * 2), math::round_bf16(e, scaled));
                            e.store(scaled, at, 32);
                        }
                    }
                    weight
                })
                .collect();
            let (a, b) = (e.add(weights[0], weights[1]), e.add(weights[2], weights[3]));
            let new = e.add(a, b);
            vec![e.add(sums[0], new)]
        });
        let factor = e.row(self.buffers.factors, row, 4);
        let factor = e.load(factor, F32, 4);
        let out = e.row(state.out, row, self.shape.item.row_bytes);
        self.scale_row(e, out, factor, sums[0]);
    }

    /// The scale of values in a cache block: none in an item's own, where that is read from other caches.
    fn scale_in(&self, e: &mut Emitter, item: &Item, block: Val, scale: Val) -> Val {
        if self.recent.is_none() {
            return scale;
        }
        let (own, one) = (e.cmp(Cmp::Eq, block, item.own), e.float(scale.ty, 1.0));
        e.select(own, one, scale)
    }

    /// `out = out * factor`, and the row's sums of weights likewise, plus `sums`.
    fn scale_row(&self, e: &mut Emitter, out: Val, factor: Val, sums: Val) {
        let factor = e.broadcast(factor, LANES);
        let vectors = self.shape.dim.div_ceil(LANES);
        for i in 0..vectors {
            let at = e.gep_const(out, i * LANES * 4);
            let x = e.load(at, F32.x(LANES), 64);
            let x = e.mul(x, factor);
            e.store(x, at, 64);
        }
        let at = e.gep_const(out, vectors * LANES * 4);
        let before = e.load(at, F32.x(LANES), 64);
        let sums = e.fma(before, factor, sums);
        e.store(sums, at, 64);
    }

    /// Adds what another worker has summed up.
    pub(super) fn combine(&self, e: &mut Emitter, item: &Item, sum: &State, part: &State) {
        let (zero, lanes) = (e.i64(0), LANES as i64);
        // The larger of both maxima, then a factor for either side.
        e.repeat(zero, item.rows, lanes, |e, row| {
            let [a, b] = [sum.most, part.most].map(|most| {
                let at = e.row(most, row, 4);
                load_vector(e, at, 0)
            });
            let most = e.max(a, b);
            let to = e.row(self.buffers.most, row, 4);
            e.store(most, to, 64);
        });
        self.factors(e, item, part.most, self.buffers.most);
        e.repeat(zero, item.rows, 1, |e, row| {
            let factor = e.row(self.buffers.factors, row, 4);
            let factor = e.load(factor, F32, 4);
            let none = e.float(F32.x(LANES), 0.0);
            let out = e.row(part.out, row, self.shape.item.row_bytes);
            self.scale_row(e, out, factor, none);
        });
        self.factors(e, item, sum.most, self.buffers.most);
        e.repeat(zero, item.rows, 1, |e, row| {
            let factor = e.row(self.buffers.factors, row, 4);
            let factor = e.load(factor, F32, 4);
            let factor = e.broadcast(factor, LANES);
            let bytes = self.shape.item.row_bytes;
            let (to, from) = (e.row(sum.out, row, bytes), e.row(part.out, row, bytes));
            for i in 0..bytes / (LANES * 4) {
                let (x, more) = (load_vector(e, to, i), load_vector(e, from, i));
                let x = e.fma(x, factor, more);
                let at = e.gep_const(to, i * LANES * 4);
                e.store(x, at, 64);
            }
        });
    }
}

fn by(e: &mut Emitter, x: Val, factor: f32) -> Val {
    if factor == 1.0 {
        return x;
    }
    let factor = e.float(x.ty, factor);
    e.mul(x, factor)
}

fn load_vector(e: &mut Emitter, base: Val, index: usize) -> Val {
    let at = e.gep_const(base, index * LANES * 4);
    e.load(at, F32.x(LANES), 64)
}
