//! One cache block of an item: scores, their weights under the running softmax, and the weighted sum of values.
//!
//! ```text
//! scores[head][64] = q[head] . keys          a score a thread: keys are dim-major, so neighbours read neighbours; barrier
//! scores = 2^(scores - max), sums            a warp a head; barrier
//! out[head] = out[head] * 2^(old max - max) + scores[head] . values      an element a thread; barrier
//! ```

use super::{Attention, FAR_BELOW, Pool, SLOTS, STATE, Source};
use crate::cpu::attend::items::Item;
use crate::cpu::cached::{At, Stored, load_channels};
use crate::cpu::rows::walk::load_index;
use crate::cuda::group;
use crate::cuda::rows::{put_real, real_at};
use crate::emit::{Cmp, Emitter, F32, I64, Val, WARP};
use crate::math;
use mansard_ir::layout::CACHE_BLOCK;

/// Bytes that a copy takes.
const COPIED: usize = 16;

impl Attention {
    /// One cache block of a source.
    pub(super) fn block(&self, e: &mut Emitter, source: &Source, item: &Item, block: Val) {
        let first = e.scaled(block, CACHE_BLOCK, 0);
        let [mut keys, mut values] = source.heads(e, item, block);
        if let Some(copies) = self.copies(e, block) {
            [keys.0, values.0] = copies;
        }
        self.score(e, source, item, keys, first);
        e.barrier();
        self.soften(e, source, values.1);
        e.barrier();
        let (left, all) = (e.sub(item.high, first), e.i64(CACHE_BLOCK as i64));
        let positions = e.min(left, all);
        self.weigh(e, source, values.0, positions);
        e.barrier();
    }

    /// Begins to copy a cache block, where it comes before `end`.
    pub(super) fn fetch(&self, e: &mut Emitter, item: &Item, (block, end): (Val, Val)) {
        let Some(to) = self.copies(e, block) else { return };
        let there = e.cmp(Cmp::Lt, block, end);
        e.when(there, |e| {
            self.with_source(e, item, block, &|e, source| {
                for ((from, _), to) in source.heads(e, item, block).into_iter().zip(to) {
                    e.strided(source.head_bytes() / COPIED, |e, i| {
                        let (to, from) = (e.row(to, i, COPIED), e.row(from, i, COPIED));
                        e.copy_async(to, from, COPIED);
                    });
                }
            });
        });
        e.commit_copies();
    }

    /// Where the copies of a cache block's keys and values are.
    fn copies(&self, e: &mut Emitter, block: Val) -> Option<[Val; 2]> {
        let staged = self.staged?;
        let last = e.i64(SLOTS as i64 - 1);
        let slot = e.and(block, last);
        let keys = e.row(staged.memory, slot, 2 * staged.bytes);
        Some([keys, e.gep_const(keys, staged.bytes)])
    }

    /// `scores[head][position] = sum over d of q[head][d] * keys[d][position]`.
    fn score(&self, e: &mut Emitter, source: &Source, item: &Item, (keys, scales): (Val, Val), first: Val) {
        e.strided(self.heads * CACHE_BLOCK, |e, i| {
            let size = e.i64(CACHE_BLOCK as i64);
            let (head, slot) = (e.div(i, size), e.rem(i, size));
            let query = e.row(self.queries, head, 4 * self.dim);
            let column = e.row(keys, slot, source.stored.bytes());
            let (zero, one, nothing) = (e.i64(0), e.i64(1), e.float(F32, 0.0));
            let end = e.i64((self.dim / source.stored.sharing()) as i64);
            let sum = e.for_loop((zero, end, one), &[nothing], |e, d, sum| {
                let at = e.row(column, d, CACHE_BLOCK * source.stored.bytes());
                let parts = source.dims(e, d).into_iter();
                vec![parts.fold(sum[0], |sum, (d, bit)| {
                    let key = source.stored.load(e, At { byte: at, bit }, 0, source.stored.bytes());
                    let key = source.beside_middle(e, scales, d, key);
                    let q = real_at(e, query, d);
                    e.fma(q, key, sum)
                })]
            })[0];
            let sum = match source.scale_at(e, source.keys, scales, slot) {
                Some(scale) => e.mul(sum, scale),
                None => sum,
            };
            let score = self.capped(e, sum);
            let position = e.add(first, slot);
            let (from, to) = (e.cmp(Cmp::Ge, position, item.start), e.cmp(Cmp::Lt, position, item.end));
            let (seen, masked) = (e.and(from, to), e.float(F32, 2.0 * FAR_BELOW));
            let score = e.select(seen, score, masked);
            put_real(e, score, self.scores, i);
        });
    }

    /// Applies the cap, after which scores are in units of ln 2.
    pub(super) fn capped(&self, e: &mut Emitter, score: Val) -> Val {
        if self.softcap <= 0.0 {
            return score;
        }
        let (cap, units) = (e.float(F32, self.softcap), e.float(F32, std::f32::consts::LOG2_E));
        let score = math::softcap(e, score, cap);
        e.mul(score, units)
    }

    /// Scores become weights, times the scales of the values where those have some; a warp a head.
    fn soften(&self, e: &mut Emitter, source: &Source, scales: Val) {
        let (lane, warp) = e.lane_and_warp();
        let (heads, warps) = (e.i64(self.heads as i64), (e.block_threads() / WARP) as i64);
        e.repeat(warp, heads, warps, |e, head| {
            let scores = e.row(self.scores, head, CACHE_BLOCK * 4);
            let state = e.row(self.state, head, STATE);
            let slots: Vec<Val> = (0..CACHE_BLOCK / WARP).map(|i| e.scaled(lane, 1, i * WARP)).collect();
            let own: Vec<Val> = slots.iter().map(|slot| real_at(e, scores, *slot)).collect();
            let most = own.iter().copied().reduce(|a, b| e.max(a, b)).unwrap_or(lane);
            let most = group::warp(e, most, &group::largest);
            let before = e.load(state, F32, 4);
            let most = e.max(most, before);
            let mut sum = e.float(F32, 0.0);
            for (slot, score) in slots.iter().zip(own) {
                let below = e.sub(score, most);
                let weight = math::exp2(e, below);
                sum = e.add(sum, weight);
                let weight = match source.scale_at(e, source.values, scales, *slot) {
                    Some(scale) => e.mul(weight, scale),
                    None => weight,
                };
                put_real(e, weight, scores, *slot);
            }
            let sum = group::warp(e, sum, &group::sum);
            let below = e.sub(before, most);
            let factor = math::exp2(e, below);
            let zero = e.i64(0);
            let first = e.cmp(Cmp::Eq, lane, zero);
            // All have read what one of them replaces.
            e.warp_barrier();
            e.when(first, |e| {
                let (sum_at, factor_at) = (e.gep_const(state, 4), e.gep_const(state, 8));
                let all = e.load(sum_at, F32, 4);
                let all = e.fma(all, factor, sum);
                e.store(most, state, 4);
                e.store(all, sum_at, 4);
                e.store(factor, factor_at, 4);
            });
        });
    }

    /// `out[head][d] = out[head][d] * factor[head] + sum over positions of weight[head][position] * values[position][d]`.
    /// Positions beyond the last one in sight are left out: their memory may never have been written.
    fn weigh(&self, e: &mut Emitter, source: &Source, values: Val, positions: Val) {
        let sharing = source.stored.sharing();
        e.strided(self.heads * self.dim / sharing, |e, i| {
            let size = e.i64((self.dim / sharing) as i64);
            let (head, place) = (e.div(i, size), e.rem(i, size));
            let weights = e.row(self.scores, head, CACHE_BLOCK * 4);
            let column = e.row(values, place, source.stored.bytes());
            let factor = e.row(self.state, head, STATE);
            let factor = e.gep_const(factor, 8);
            let factor = e.load(factor, F32, 4);
            let out = e.row(self.out, head, 4 * self.dim);
            let parts = source.dims(e, place);
            let sums: Vec<Val> = parts
                .iter()
                .map(|(d, _)| {
                    let x = real_at(e, out, *d);
                    e.mul(x, factor)
                })
                .collect();
            let (zero, one) = (e.i64(0), e.i64(1));
            let sums = e.for_loop((zero, positions, one), &sums, |e, slot, sums| {
                let weight = real_at(e, weights, slot);
                let at = e.row(column, slot, source.dim / sharing * source.stored.bytes());
                let add = |((_, bit), sum): (&(Val, i64), &Val)| {
                    let value = source.stored.load(e, At { byte: at, bit: *bit }, 0, source.stored.bytes());
                    e.fma(weight, value, *sum)
                };
                parts.iter().zip(sums).map(add).collect()
            });
            for ((d, _), sum) in parts.iter().zip(sums) {
                put_real(e, sum, out, *d);
            }
        });
    }
}

impl Source {
    /// Bytes of the keys, or values, of a head of a cache block.
    pub(super) fn head_bytes(&self) -> usize {
        self.dim / self.stored.sharing() * self.stored.bytes() * CACHE_BLOCK
    }

    /// The item's head of a cache block: where its keys and their scales are, and its values and their scales.
    pub(super) fn heads(&self, e: &mut Emitter, item: &Item, block: Val) -> [(Val, Val); 2] {
        let table = e.row(self.tables, item.table, 4);
        let id = load_index(e, table, block);
        [self.keys, self.values].map(|pool| {
            let block = e.row(pool.memory, id, pool.block_bytes);
            let scales = e.gep_const(block, pool.scales.0);
            (e.row(block, item.kv_head, self.head_bytes()), e.row(scales, item.kv_head, pool.scales.1))
        })
    }

    /// The dims that share place `place` of a head, and each one's first bit there.
    fn dims(&self, e: &mut Emitter, place: Val) -> Vec<(Val, i64)> {
        debug_assert_eq!(place.ty, I64);
        if self.stored != Stored::Nibble {
            return vec![(place, 0)];
        }
        let last = e.i64(15);
        let within = e.and(place, last);
        let before = e.sub(place, within);
        let before = e.shl(before, 1);
        let low = e.add(before, within);
        vec![(low, 0), (e.scaled(low, 1, 16), 4)]
    }

    /// The scale of a position, where codes have one.
    fn scale_at(&self, e: &mut Emitter, pool: Pool, scales: Val, slot: Val) -> Option<Val> {
        (self.stored.has_scales() && !pool.by_dim).then(|| {
            let at = e.row(scales, slot, self.stored.scale_bytes());
            self.stored.load_scales(e, at, 0, 0)
        })
    }

    /// A key by its code, where dims have scales and middles.
    fn beside_middle(&self, e: &mut Emitter, scales: Val, d: Val, key: Val) -> Val {
        if !self.keys.by_dim {
            return key;
        }
        let at = e.row(scales, d, 2);
        let [scale, middle] = load_channels(e, at, 2 * self.dim, 0, 2);
        e.fma(scale, key, middle)
    }
}
