//! Attention of prompts on tensor cores: tokens of a block share what is read of keys and values (FlashAttention-2; Dao, 2023).
//!
//! ```text
//! a block      128 rows (token, query head) of one key-value head            a warp: 16 of them, in registers
//! cache block  copied while the one before is multiplied, rows a little apart so that fragments come without conflicts
//!   s[16, 64] = q[16, dim] k[dim, 64]           as queries are rounded to what keys are stored as, so are weights
//!   p = 2^(s - largest), sums                   four lanes have a row
//!   o[16, dim] = o * 2^(old - new largest) + p[16, 64] v[64, dim]
//! ```

use super::{Attention, FAR_BELOW, SLOTS, half_at};
use crate::cpu::attend::items::{self, Item, sight};
use crate::cpu::cached::Stored;
use crate::cpu::rows::walk::load_index;
use crate::cpu::{StepField, step_field};
use crate::cuda::rows::real_at;
use crate::cuda::{Device, THREADS};
use crate::emit::{BF16, Cmp, Emitter, F16, F32, I32, Val, WARP};
use crate::math;
use mansard_ir::layout::CACHE_BLOCK;

/// Rows of a product, which a warp has, and of a block.
const ROWS: usize = 16;
const BLOCK_ROWS: usize = ROWS * THREADS / WARP;

/// Depth of a product, and its columns.
const DEPTH: usize = 16;
const COLUMNS: usize = 8;

/// Sums of a product that a lane has: two rows of two columns.
const SUMS: usize = 4;

/// Bytes that a copy takes; also what rows lie further apart, so that eight lie in different banks.
const COPIED: usize = 16;

/// Bytes from row to row of keys in shared memory.
const KEY_BYTES: usize = 2 * CACHE_BLOCK + COPIED;

/// Widest head whose queries and result stay in registers.
const WIDEST: usize = 128;

/// Tokens for every tile of the step from which on tokens are taken together.
const TOGETHER: usize = 8;

/// Caches in halves, and heads in whole products.
pub(super) fn suits(attention: &Attention) -> bool {
    let halves = matches!(attention.caches.stored, Stored::F16 | Stored::Bf16);
    halves && attention.recent.is_none() && attention.dim.is_multiple_of(DEPTH) && attention.dim <= WIDEST
}

/// The step is one of prompts, and half of the blocks have something to do.
pub(super) fn pays(attention: &Attention, e: &mut Emitter, d: &Device<'_>) -> Val {
    let (tokens, tiles) = (step_field(e, d.k, StepField::T), step_field(e, d.k, StepField::Tiles));
    let (least, size) = (e.scaled(tiles, TOGETHER, 0), e.i64(own_tokens(attention) as i64));
    let are_many = e.cmp(Cmp::Ge, tokens, least);
    let whole = e.div(tokens, size);
    let items = e.max(whole, tiles);
    let twice = e.scaled(items, 2 * attention.extents.slices, 0);
    let enough = e.cmp(Cmp::Ge, twice, d.k.threads);
    e.and(are_many, enough)
}

/// Tokens of a block.
fn own_tokens(attention: &Attention) -> usize {
    BLOCK_ROWS / attention.heads
}

/// Emits this block's items, of all that the step's tiles fall into.
pub(super) fn emit(attention: &Attention, e: &mut Emitter, d: &Device<'_>) {
    let (tiles, records) = (step_field(e, d.k, StepField::Tiles), step_field(e, d.k, StepField::Tile));
    let value_bytes = 2 * attention.dim + COPIED;
    let keys = e.shared(SLOTS * attention.dim * KEY_BYTES);
    let prompt = Prompt { a: attention, keys, values: e.shared(SLOTS * CACHE_BLOCK * value_bytes), value_bytes };
    let (zero, one, slices) = (e.i64(0), e.i64(1), e.i64(attention.extents.slices as i64));
    let size = e.i64(own_tokens(attention) as i64);
    e.for_loop((zero, tiles, one), &[zero], |e, tile, before| {
        let record = e.row(records, tile, 16);
        let [first, count, sequence, length] = [0, 1, 2, 3].map(|i| {
            let i = e.i64(i);
            load_index(e, record, i)
        });
        let parts = e.scaled(count, 1, own_tokens(attention) - 1);
        let parts = e.div(parts, size);
        let items = e.mul(parts, slices);
        // Items are counted through all tiles, and a block has every so many.
        let done = e.rem(before[0], d.k.threads);
        let own = e.add(d.k.thread, d.k.threads);
        let own = e.sub(own, done);
        let own = e.rem(own, d.k.threads);
        e.for_loop((own, items, d.k.threads), &[], |e, index, _| {
            let (part, slice) = (e.div(index, slices), e.rem(index, slices));
            let from = e.mul(part, size);
            let (left, first) = (e.sub(count, from), e.add(first, from));
            let count = e.min(left, size);
            let item = items::item(attention, e, (first, count), (sequence, length));
            let item = item.of_slice(e, &attention.extents, slice);
            prompt.item(e, &item);
            vec![]
        });
        vec![e.add(before[0], items)]
    });
}

struct Prompt<'a> {
    a: &'a Attention,
    /// Shared memory: two cache blocks' keys `[dim][64]` and values `[64][dim]`.
    keys: Val,
    values: Val,
    /// Bytes from row to row of values.
    value_bytes: usize,
}

/// A row that a lane has a part of.
#[derive(Clone, Copy)]
struct Row {
    token: Val,
    head: Val,
    /// The item has it.
    wanted: Val,
    /// First position that it sees, and the first beyond.
    from: Val,
    to: Val,
    query: Val,
}

/// What a lane carries from cache block to cache block.
struct State {
    out: Vec<[Val; SUMS]>,
    /// Of both rows: the largest score, and the lane's part of the sum of weights.
    most: [Val; 2],
    sum: [Val; 2],
}

impl State {
    fn carried(&self) -> Vec<Val> {
        self.out.iter().flatten().chain(&self.most).chain(&self.sum).copied().collect()
    }

    fn of(carried: &[Val]) -> State {
        let (out, rest) = carried.split_at(carried.len() - 4);
        State { out: out.as_chunks().0.to_vec(), most: [rest[0], rest[1]], sum: [rest[2], rest[3]] }
    }
}

impl Prompt<'_> {
    fn item(&self, e: &mut Emitter, item: &Item) {
        let (lane, four) = (e.lane_and_warp().0, e.i64(4));
        let (group, pair) = (e.div(lane, four), e.rem(lane, four));
        let rows = [0, ROWS / 2].map(|more| self.row(e, item, (group, more)));
        let queries: Vec<_> = (0..self.a.dim / DEPTH).map(|depth| self.query(e, &rows, pair, depth)).collect();
        let end = e.add(item.low, item.blocks);
        self.fetch(e, item, (item.low, end));
        let (nothing, least, one) = (e.float(F32, 0.0), e.float(F32, FAR_BELOW), e.i64(1));
        let out = vec![[nothing; SUMS]; self.a.dim / COLUMNS];
        let state = State { out, most: [least; 2], sum: [nothing; 2] };
        let carried = e.for_loop((item.low, end, one), &state.carried(), |e, block, carried| {
            let next = e.add(block, one);
            self.fetch(e, item, (next, end));
            e.await_copies(SLOTS - 1);
            e.barrier();
            let mut state = State::of(carried);
            let mut scores = self.scores(e, &queries, block);
            self.mask(e, &mut scores, (&rows, pair), block);
            self.soften(e, &mut scores, &mut state);
            self.weigh(e, &scores, &mut state, block);
            e.barrier();
            state.carried()
        });
        self.finish(e, item, State::of(&carried), (&rows, pair));
    }

    /// Row `16 warp + group + more` of the block.
    fn row(&self, e: &mut Emitter, item: &Item, (group, more): (Val, usize)) -> Row {
        let (warp, heads, one) = (e.lane_and_warp().1, e.i64(self.a.heads as i64), e.i64(1));
        let row = e.scaled(warp, ROWS, more);
        let row = e.add(row, group);
        let (token, last) = (e.div(row, heads), e.sub(item.count, one));
        let (token, head, wanted) = (e.min(token, last), e.rem(row, heads), e.cmp(Cmp::Lt, row, item.rows));
        let number = e.add(item.first, token);
        let position = load_index(e, self.a.step.positions, number);
        let (from, to) = sight(e, (self.a.extents.causal, self.a.extents.window), position, item.length);
        let query = e.row(self.a.q, number, self.a.query_bytes);
        let own = e.add(item.head, head);
        let query = e.row(query, own, self.a.dim * if self.a.halves { 2 } else { 4 });
        Row { token, head, wanted, from, to, query }
    }

    /// A fragment of queries, scaled, in units of ln 2 unless a cap comes between.
    fn query(&self, e: &mut Emitter, rows: &[Row; 2], pair: Val, depth: usize) -> Vec<Val> {
        let units = if self.a.softcap > 0.0 { 1.0 } else { std::f32::consts::LOG2_E };
        let scale = e.float(F32, self.a.scale * units);
        let mut words = vec![];
        for half in 0..2 {
            for row in rows {
                let [low, high] = [0, 1].map(|i| {
                    let column = e.scaled(pair, 2, depth * DEPTH + half * COLUMNS + i);
                    let x = if self.a.halves { half_at(e, row.query, column) } else { real_at(e, row.query, column) };
                    e.mul(x, scale)
                });
                words.push(self.both(e, low, high));
            }
        }
        words
    }

    /// Two reals as caches store them, in one operand of a product.
    fn both(&self, e: &mut Emitter, low: Val, high: Val) -> Val {
        if self.a.caches.stored == Stored::F16 {
            return e.intrinsic("llvm.nvvm.ff2f16x2.rn", &[high, low], F16.x(2));
        }
        let both = e.intrinsic("llvm.nvvm.ff2bf16x2.rn", &[high, low], BF16.x(2));
        let word = e.bitcast(both, I32.x(1));
        e.extract(word, 0)
    }

    /// `sums += a b` for two neighbouring products, whose `b` lies at `at`.
    fn multiply(&self, e: &mut Emitter, a: &[Val], at: Val, sums: [&mut [Val; SUMS]; 2]) {
        let words = e.load_matrices(at);
        let f16 = self.a.caches.stored == Stored::F16;
        for (sums, words) in sums.into_iter().zip(words.as_chunks::<2>().0) {
            let b = words.map(|word| {
                let one = e.broadcast(word, 1);
                if f16 { e.bitcast(one, F16.x(2)) } else { word }
            });
            let name = if f16 { "m16n8k16.row.col.f32.f32" } else { "m16n8k16.row.col.bf16" };
            *sums = e.matrix_product(name, a, &b, *sums);
        }
    }

    /// Where this lane's row of four matrices of eight rows begins: two below each other, then two beside them.
    fn own_row(&self, e: &mut Emitter, base: Val, bytes: usize) -> Val {
        let (lane, sixteen) = (e.lane_and_warp().0, e.i64(16));
        let (row, beside) = (e.rem(lane, sixteen), e.div(lane, sixteen));
        let at = e.row(base, row, bytes);
        e.row(at, beside, COPIED)
    }

    /// Begins to copy a cache block, where it comes before `end`; values beyond what anyone sees are zeros.
    fn fetch(&self, e: &mut Emitter, item: &Item, (block, end): (Val, Val)) {
        let there = e.cmp(Cmp::Lt, block, end);
        e.when(there, |e| {
            let [(keys, _), (values, _)] = self.a.caches.heads(e, item, block);
            let [to_keys, to_values] = self.slots(e, block);
            let piece = |e: &mut Emitter, i: Val, pieces: usize| {
                let pieces = e.i64(pieces as i64);
                (e.div(i, pieces), e.rem(i, pieces))
            };
            const OF_KEYS: usize = 2 * CACHE_BLOCK / COPIED;
            e.strided(self.a.dim * OF_KEYS, |e, i| {
                let (row, piece) = piece(e, i, OF_KEYS);
                let to = e.row(to_keys, row, KEY_BYTES);
                let (to, from) = (e.row(to, piece, COPIED), e.row(keys, i, COPIED));
                e.copy_async(to, from, COPIED);
            });
            let of_values = 2 * self.a.dim / COPIED;
            e.strided(CACHE_BLOCK * of_values, |e, i| {
                let (row, piece) = piece(e, i, of_values);
                let to = e.row(to_values, row, self.value_bytes);
                let (to, from) = (e.row(to, piece, COPIED), e.row(values, i, COPIED));
                let before = e.scaled(block, CACHE_BLOCK, 0);
                let position = e.add(before, row);
                let seen = e.cmp(Cmp::Lt, position, item.high);
                e.either(
                    seen,
                    |e| e.copy_async(to, from, COPIED),
                    |e| {
                        let zero = e.int(I32, 0);
                        let zeros = e.broadcast(zero, COPIED / 4);
                        e.store(zeros, to, COPIED);
                    },
                );
            });
        });
        e.commit_copies();
    }

    /// Where a cache block's keys and values are in shared memory.
    fn slots(&self, e: &mut Emitter, block: Val) -> [Val; 2] {
        let last = e.i64(SLOTS as i64 - 1);
        let slot = e.and(block, last);
        [(self.keys, self.a.dim * KEY_BYTES), (self.values, CACHE_BLOCK * self.value_bytes)]
            .map(|(base, bytes)| e.row(base, slot, bytes))
    }

    /// Scores of the lane's rows, eight positions a product.
    fn scores(&self, e: &mut Emitter, queries: &[Vec<Val>], block: Val) -> Vec<[Val; SUMS]> {
        let nothing = e.float(F32, 0.0);
        let mut scores = vec![[nothing; SUMS]; CACHE_BLOCK / COLUMNS];
        let [keys, _] = self.slots(e, block);
        let own = self.own_row(e, keys, KEY_BYTES);
        for (depth, query) in queries.iter().enumerate() {
            for (i, [low, high]) in scores.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let at = e.gep_const(own, depth * DEPTH * KEY_BYTES + i * 2 * 2 * COLUMNS);
                self.multiply(e, query, at, [low, high]);
            }
        }
        scores
    }

    /// Applies the cap, after which scores are in units of ln 2, and hides what a row does not see.
    fn mask(&self, e: &mut Emitter, scores: &mut [[Val; SUMS]], (rows, pair): (&[Row; 2], Val), block: Val) {
        let first = e.scaled(block, CACHE_BLOCK, 0);
        let own = e.scaled(pair, 2, 0);
        let first = e.add(first, own);
        let limits = rows.map(|row| {
            [row.from, row.to].map(|limit| {
                let limit = e.sub(limit, first);
                e.convert("trunci", limit, I32)
            })
        });
        let hidden = e.float(F32, 2.0 * FAR_BELOW);
        for (product, scores) in scores.iter_mut().enumerate() {
            for (i, score) in scores.iter_mut().enumerate() {
                let (place, [from, to]) = (e.int(I32, (product * COLUMNS + i % 2) as i64), limits[i / 2]);
                let (after, before) = (e.cmp(Cmp::Ge, place, from), e.cmp(Cmp::Lt, place, to));
                let seen = e.and(after, before);
                let capped = self.a.capped(e, *score);
                *score = e.select(seen, capped, hidden);
            }
        }
    }

    /// Scores become weights; what was summed before shrinks as the largest score grows.
    fn soften(&self, e: &mut Emitter, scores: &mut [[Val; SUMS]], state: &mut State) {
        for row in 0..2 {
            let own: Vec<Val> = scores.iter().flat_map(|s| [s[2 * row], s[2 * row + 1]]).collect();
            let mut most = own.into_iter().fold(state.most[row], |most, score| e.max(most, score));
            for lanes in [1, 2] {
                let other = e.across(most, lanes);
                most = e.max(most, other);
            }
            let below = e.sub(state.most[row], most);
            let factor = math::exp2(e, below);
            let mut sum = e.mul(state.sum[row], factor);
            for score in scores.iter_mut().flat_map(|s| &mut s[2 * row..2 * row + 2]) {
                let below = e.sub(*score, most);
                *score = math::exp2(e, below);
                sum = e.add(sum, *score);
            }
            for out in state.out.iter_mut().flat_map(|out| &mut out[2 * row..2 * row + 2]) {
                *out = e.mul(*out, factor);
            }
            (state.most[row], state.sum[row]) = (most, sum);
        }
    }

    /// Adds the weighted values.
    fn weigh(&self, e: &mut Emitter, weights: &[[Val; SUMS]], state: &mut State, block: Val) {
        let [_, values] = self.slots(e, block);
        let own = self.own_row(e, values, self.value_bytes);
        for (depth, pair) in weights.as_chunks::<2>().0.iter().enumerate() {
            let a: Vec<Val> = pair.iter().flat_map(|w| [self.both(e, w[0], w[1]), self.both(e, w[2], w[3])]).collect();
            for (i, [low, high]) in state.out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let at = e.gep_const(own, depth * DEPTH * self.value_bytes + i * 2 * 2 * COLUMNS);
                self.multiply(e, &a, at, [low, high]);
            }
        }
    }

    /// Divides by the sums of weights and stores.
    fn finish(&self, e: &mut Emitter, item: &Item, state: State, (rows, pair): (&[Row; 2], Val)) {
        for (i, row) in rows.iter().enumerate() {
            let mut sum = state.sum[i];
            for lanes in [1, 2] {
                let other = e.across(sum, lanes);
                sum = e.add(sum, other);
            }
            e.when(row.wanted, |e| {
                for result in &self.a.results {
                    let to = self.a.row(e, *result, item);
                    let to = e.row(to, row.token, self.a.row_bytes);
                    let to = e.row(to, row.head, 4 * self.a.dim);
                    let to = e.row(to, pair, 8);
                    for (product, out) in state.out.iter().enumerate() {
                        for column in 0..2 {
                            let y = e.div(out[2 * i + column], sum);
                            let at = e.gep_const(to, 4 * (product * COLUMNS + column));
                            e.store(y, at, 4);
                        }
                    }
                }
            });
        }
    }
}
