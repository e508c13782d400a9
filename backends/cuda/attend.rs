//! Attention over paged caches on a GPU, with a running softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).
//!
//! ```text
//! item = a token x the query heads of one key-value head                 one block
//! for cache block of 64 positions in sight
//!   scores[head][64] = q[head] . keys          a score a thread: keys are dim-major, so neighbours read neighbours; barrier
//!   scores = 2^(scores - max), sums            a warp a head; barrier
//!   out[head] = out[head] * 2^(old max - max) + scores[head] . values      an element a thread; barrier
//! result = out / sum
//! ```
//!
//! `attend_mixed` reads a token's own cache block from the recent caches.

use super::rows::{put_real, real_at};
use super::{Device, group};
use crate::cpu::attend::sight;
use crate::cpu::cached::{At, Stored};
use crate::cpu::rows::walk::load_index;
use crate::cpu::{StepField, step_field, tables};
use crate::emit::{BF16, Cmp, Emitter, F32, I64, Val, WARP};
use crate::math;
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales, row_bytes};
use mansard_ir::ops::Class;
use mansard_ir::{DType, Error, Kind, Result, Type, ValueId, bail};

/// What no score is below, and what a masked one is: its power of two is zero beside any other.
const FAR_BELOW: f32 = -1e30;

/// Emits an `attend` kernel.
pub(super) fn emit(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let broken = || Error::new(Kind::Internal, format!("`{}` is no attention over caches in memory", body.name));
    let attends = |v: &ValueId| body.node(*v).filter(|n| n.op.class() == Class::Attend);
    let (value, node) = body.values().find_map(|v| Some((v, attends(&v)?))).ok_or_else(broken)?;
    let (q, keys) = (body.ty(node.operands[0]), body.ty(node.operands[1]));
    let (Type::Cache { heads: kv_heads, dim, .. }, Some(width)) = (keys, q.row_width()) else { return Err(broken()) };
    let (Some(query_bytes), Some(row_bytes)) = (row_bytes(q), row_bytes(&node.ty)) else { return Err(broken()) };
    let stride = step_field(e, d.k, StepField::TableStride);
    let source = |e: &mut Emitter, keys: usize| -> Result<Source> {
        let [keys, values] = [node.operands[keys], node.operands[keys + 1]];
        let (ty, tables) = (body.ty(keys), tables(e, d.k, body.ty(keys), stride)?);
        let (Type::Cache { heads, dim, dtype, .. }, Some(block_bytes)) = (ty, cache_block_bytes(ty)) else {
            bail!(Internal, "attention over {ty}")
        };
        let (stored, scales) = (Stored::of(*dtype)?, cache_scales(*dtype, *heads, *dim, 0));
        Ok(Source {
            keys: d.pointer(keys)?,
            values: d.pointer(values)?,
            tables,
            stored,
            dim: *dim,
            scales,
            block_bytes,
        })
    };
    let (caches, recent) = (source(e, 1)?, if node.operands.len() > 4 { Some(source(e, 3)?) } else { None });
    let group = width / dim / kv_heads;
    let attention = Attention {
        q: d.pointer(node.operands[0])?,
        caches,
        recent,
        results: (value.0 as usize..body.len()).filter_map(|v| d.memory[v]).collect(),
        group,
        dim: *dim,
        halves: q.dtype() == Some(DType::BF16),
        query_bytes,
        row_bytes,
        scale: node.attrs.float("scale") as f32,
        causal: node.attrs.bool("causal"),
        window: node.attrs.size("window"),
        softcap: node.attrs.float("softcap") as f32,
        queries: e.shared(group * dim * 4),
        scores: e.shared(group * CACHE_BLOCK * 4),
        out: e.shared(group * dim * 4),
        state: e.shared(group * STATE),
    };
    let tokens = step_field(e, d.k, StepField::T);
    let items = e.scaled(tokens, *kv_heads, 0);
    e.for_loop((d.k.thread, items, d.k.threads), &[], |e, item, _| {
        let heads = e.i64(*kv_heads as i64);
        let (token, kv_head) = (e.div(item, heads), e.rem(item, heads));
        let item = attention.item(e, &d, stride, (token, kv_head));
        attention.attend(e, &item);
        vec![]
    });
    Ok(())
}

/// Bytes of a head's state: largest score, sum of weights, factor for what was summed before.
const STATE: usize = 12;

/// Keys and values of every sequence, stored alike.
struct Source {
    keys: Val,
    values: Val,
    /// The block tables of their cache group.
    tables: Val,
    stored: Stored,
    dim: usize,
    /// Where the scales of a cache block begin.
    scales: usize,
    block_bytes: usize,
}

struct Attention {
    q: Val,
    caches: Source,
    /// What a token reads its own cache block from, where not from `caches`.
    recent: Option<Source>,
    /// Every buffer that wants the result.
    results: Vec<Val>,
    /// Query heads of a key-value head.
    group: usize,
    dim: usize,
    /// Queries are bf16.
    halves: bool,
    /// Bytes from token to token of queries.
    query_bytes: usize,
    /// Bytes from token to token of results.
    row_bytes: usize,
    scale: f32,
    causal: bool,
    window: usize,
    softcap: f32,
    /// Shared memory: `[group][dim]`, `[group][64]`, `[group][dim]`, and the heads' states.
    queries: Val,
    scores: Val,
    out: Val,
    state: Val,
}

/// What a block computes at once.
struct Item {
    token: Val,
    kv_head: Val,
    /// Where the sequence's row of a block table begins.
    table: Val,
    /// The token's position.
    own: Val,
    /// Positions in sight.
    start: Val,
    end: Val,
}

impl Attention {
    /// Finds the sequence of a token, and what it sees.
    fn item(&self, e: &mut Emitter, d: &Device<'_>, stride: Val, (token, kv_head): (Val, Val)) -> Item {
        let (tiles, tile) = (step_field(e, d.k, StepField::Tiles), step_field(e, d.k, StepField::Tile));
        let (zero, one) = (e.i64(0), e.i64(1));
        // Tiles are in order of token: the last that does not begin behind it is its own.
        let found = e.for_loop((zero, tiles, one), &[zero, zero], |e, index, found| {
            let record = e.row(tile, index, 16);
            let [first, sequence, length] = [0, 2, 3].map(|field| {
                let at = e.gep_const(record, 4 * field);
                load_index(e, at, zero)
            });
            let begun = e.cmp(Cmp::Le, first, token);
            vec![e.select(begun, sequence, found[0]), e.select(begun, length, found[1])]
        });
        let positions = step_field(e, d.k, StepField::Positions);
        let own = load_index(e, positions, token);
        let (start, end) = sight(e, (self.causal, self.window), own, found[1]);
        Item { token, kv_head, table: e.mul(found[0], stride), own, start, end }
    }

    fn attend(&self, e: &mut Emitter, item: &Item) {
        self.begin(e, item);
        e.barrier();
        let (positions, one) = (e.i64(CACHE_BLOCK as i64), e.i64(1));
        let low = e.div(item.start, positions);
        let high = e.scaled(item.end, 1, CACHE_BLOCK - 1);
        let high = e.div(high, positions);
        let own = e.div(item.own, positions);
        e.for_loop((low, high, one), &[], |e, block, _| {
            match &self.recent {
                None => self.block(e, &self.caches, item, block),
                Some(recent) => {
                    let recently = e.cmp(Cmp::Eq, block, own);
                    e.either(
                        recently,
                        |e| self.block(e, recent, item, block),
                        |e| self.block(e, &self.caches, item, block),
                    );
                }
            }
            vec![]
        });
        self.finish(e, item);
        e.barrier();
    }

    /// The address of the item's first head in row `token` of results.
    fn row(&self, e: &mut Emitter, base: Val, item: &Item) -> Val {
        let row = e.row(base, item.token, self.row_bytes);
        e.row(row, item.kv_head, self.group * self.dim * 4)
    }

    /// Scales the queries, in units of ln 2 unless a cap comes between, and resets the sums.
    fn begin(&self, e: &mut Emitter, item: &Item) {
        let units = if self.softcap > 0.0 { 1.0 } else { std::f32::consts::LOG2_E };
        let from = e.row(self.q, item.token, self.query_bytes);
        let from = e.row(from, item.kv_head, self.group * self.dim * if self.halves { 2 } else { 4 });
        e.strided(self.group * self.dim, |e, i| {
            let x = if self.halves { half_at(e, from, i) } else { real_at(e, from, i) };
            let (scale, zero) = (e.float(F32, self.scale * units), e.float(F32, 0.0));
            let x = e.mul(x, scale);
            put_real(e, x, self.queries, i);
            put_real(e, zero, self.out, i);
        });
        e.strided(self.group, |e, head| {
            let state = e.row(self.state, head, STATE);
            for (at, value) in [(0, FAR_BELOW), (4, 0.0), (8, 0.0)] {
                let (at, value) = (e.gep_const(state, at), e.float(F32, value));
                e.store(value, at, 4);
            }
        });
    }

    /// One cache block of a source.
    fn block(&self, e: &mut Emitter, source: &Source, item: &Item, block: Val) {
        let table = e.row(source.tables, item.table, 4);
        let id = load_index(e, table, block);
        let first = e.scaled(block, CACHE_BLOCK, 0);
        let head = |e: &mut Emitter, pool: Val| {
            let block = e.row(pool, id, source.block_bytes);
            let scales = e.gep_const(block, source.scales);
            let bytes = source.dim / source.stored.sharing() * source.stored.bytes() * CACHE_BLOCK;
            let scale_bytes = CACHE_BLOCK * source.stored.scale_bytes();
            (e.row(block, item.kv_head, bytes), e.row(scales, item.kv_head, scale_bytes))
        };
        let (keys, values) = (head(e, source.keys), head(e, source.values));
        self.score(e, source, item, keys, first);
        e.barrier();
        self.soften(e, source, values.1);
        e.barrier();
        self.weigh(e, source, values.0);
        e.barrier();
    }

    /// `scores[head][position] = sum over d of q[head][d] * keys[d][position]`.
    fn score(&self, e: &mut Emitter, source: &Source, item: &Item, (keys, scales): (Val, Val), first: Val) {
        e.strided(self.group * CACHE_BLOCK, |e, i| {
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
                    let q = real_at(e, query, d);
                    e.fma(q, key, sum)
                })]
            })[0];
            let sum = match source.scale_at(e, scales, slot) {
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
    fn capped(&self, e: &mut Emitter, score: Val) -> Val {
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
        let (heads, warps) = (e.i64(self.group as i64), (e.block_threads() / WARP) as i64);
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
                let weight = match source.scale_at(e, scales, *slot) {
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
    fn weigh(&self, e: &mut Emitter, source: &Source, values: Val) {
        let sharing = source.stored.sharing();
        e.strided(self.group * self.dim / sharing, |e, i| {
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
            let (zero, end, one) = (e.i64(0), e.i64(CACHE_BLOCK as i64), e.i64(1));
            let sums = e.for_loop((zero, end, one), &sums, |e, slot, sums| {
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

    /// Divides by the sums and stores the results.
    fn finish(&self, e: &mut Emitter, item: &Item) {
        let rows: Vec<Val> = self.results.iter().map(|result| self.row(e, *result, item)).collect();
        e.strided(self.group * self.dim, |e, i| {
            let size = e.i64(self.dim as i64);
            let head = e.div(i, size);
            let sum = e.row(self.state, head, STATE);
            let sum = e.gep_const(sum, 4);
            let (x, sum) = (real_at(e, self.out, i), e.load(sum, F32, 4));
            let y = e.div(x, sum);
            rows.iter().for_each(|row| put_real(e, y, *row, i));
        });
    }
}

/// The bf16 at `base[index]` as f32.
fn half_at(e: &mut Emitter, base: Val, index: Val) -> Val {
    let at = e.row(base, index, 2);
    let x = e.load(at, BF16, 2);
    e.convert("extf", x, F32)
}

impl Source {
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
    fn scale_at(&self, e: &mut Emitter, scales: Val, slot: Val) -> Option<Val> {
        self.stored.has_scales().then(|| {
            let at = e.row(scales, slot, self.stored.scale_bytes());
            self.stored.load_scales(e, at, 0, 0)
        })
    }
}
