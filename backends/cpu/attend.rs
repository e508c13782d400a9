//! Attention over paged caches, with a running softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).
//!
//! ```text
//! item = some tokens x the query heads of one key-value head          rows = tokens x heads
//! for span of up to 4 cache blocks of 64 positions in sight
//!   scores[row][64]  = q[row] . keys        keys are dim-major: 64 positions are whole vectors, no horizontal sums
//!   scores           = 2^(scores - max)     masked only in blocks that some row sees in part
//!   out[row]         = out[row] * 2^(old max - max) + scores[row] . values
//! result = out / sum
//! ```
//!
//! Both products are one loop: `sum over k of a[row][k] * b[k][lanes]`, with as many accumulators as registers allow. Keys
//! and values are read once for all rows of an item. Few rows (decoding) take long spans, so that a row's maximum costs
//! little; many rows (prefill) short ones, so that scores stay in the first-level cache. Work is shared out by cache blocks
//! (`items.rs`).
//!
//! `attend_mixed` reads a token's own cache block from the recent caches: an item lies in one cache block then, so all of its
//! rows read a block from the same caches.

pub(crate) mod items;
mod product;
mod shape;
mod softmax;
mod source;
#[cfg(test)]
mod tests;
mod tiled;

use super::cached::load_channels;
use super::{StepField, step_field};
use crate::cpu::dot::amx::{self, Operands};
use crate::cpu::rows::walk::{self, LANES, load_index};
use crate::emit::{BF16, Cmp, Emitter, F32, I32, Val};
use items::{Attend, Extents, Item, Others, StepPointers};
use mansard_ir::layout::{AttentionItem, CACHE_BLOCK};
use mansard_ir::ops::Class;
use mansard_ir::plan::Kernel;
use mansard_ir::{Error, Kind, Result, Target, ValueId};
use product::{Product, Shared};
use shape::Shape;
use softmax::{FAR_BELOW, Span, State};
use source::Source;

/// Rows up to which an item takes long spans.
const FEW_ROWS: i64 = 32;

/// Emits an `attend` kernel.
///
/// # Errors
/// Where the body is no attention over caches in memory.
pub fn emit(kernel: &Kernel, target: &Target) -> Result<String> {
    let body = &kernel.body;
    let broken = || Error::new(Kind::Internal, format!("`{}` is no attention over caches in memory", body.name));
    let (mut e, k) = Emitter::kernel(kernel, target);
    let memory = super::memory(&mut e, k, body);
    let attends = |v: &ValueId| body.node(*v).filter(|n| n.op.class() == Class::Attend);
    let (value, node) = body.values().find_map(|v| Some((v, attends(&v)?))).ok_or_else(broken)?;
    let at = |v: ValueId| memory[v.0 as usize].ok_or_else(broken);
    let shape = Shape::new(target, node, body.ty(node.operands[0]), body.ty(node.operands[1]))?;
    let stride = step_field(&mut e, k, StepField::TableStride);
    let source = |e: &mut Emitter, keys: usize| {
        let [keys, values] = [node.operands[keys], node.operands[keys + 1]];
        let tables = super::tables(e, k, body.ty(keys), stride)?;
        Source::new([(at(keys)?, body.ty(keys)), (at(values)?, body.ty(values))], tables)
    };
    let step = StepPointers::new(&mut e, k, stride);
    let attention = Attention {
        q: at(node.operands[0])?,
        caches: source(&mut e, 1)?,
        recent: if shape.mixed { Some(source(&mut e, 3)?) } else { None },
        results: (value.0 as usize..body.len()).filter_map(|v| memory[v]).collect(),
        buffers: Buffers::new(&mut e, &shape),
        shape,
        step,
    };
    if attention.shape.tiled {
        Operands::Pairs.configure(&mut e);
    }
    items::emit(&attention, &mut e, k);
    if attention.shape.tiled {
        amx::release(&mut e);
    }
    Ok(e.finish())
}

/// A worker's memory for one item, on its stack.
struct Buffers {
    /// `[rows][dim]`: queries, scaled.
    q: Val,
    /// `[rows][dim]`, and `[rows]`: queries for int4 keys, see [`Attention::scale_queries`].
    scaled: (Val, Val),
    /// `[rows][4 * 64]`, and a line.
    scores: Val,
    /// A partial, for items that are nobody else's.
    state: Val,
    /// `[rows]`: largest scores to come.
    most: Val,
    /// `[rows]`: factors for what was summed before.
    factors: Val,
    /// `i32[rows]`: first position in sight.
    starts: Val,
    /// `i32[rows]`: first position beyond.
    ends: Val,
    /// A head of a cache block as matrix units read it.
    panel: Val,
    /// A head's values that are all 0.
    nothing: Val,
}

impl Buffers {
    fn new(e: &mut Emitter, shape: &Shape) -> Buffers {
        let rows = shape.item.rows();
        let nothing = zeros(e, if shape.tiled { shape.stride() } else { 0 });
        Buffers {
            q: e.stack(rows * shape.stride()),
            scaled: if shape.by_dim { (e.stack(rows * shape.stride()), e.stack(rows * 4)) } else { (nothing, nothing) },
            scores: e.stack(rows * AttentionItem::score_bytes()),
            state: e.stack(shape.item.partial_bytes()),
            most: e.stack(rows * 4),
            factors: e.stack(rows * 4),
            starts: e.stack(rows * 4),
            ends: e.stack(rows * 4),
            panel: e.stack(if shape.tiled { tiled::panel_bytes(shape.dim) } else { 0 }),
            nothing,
        }
    }
}

fn zeros(e: &mut Emitter, bytes: usize) -> Val {
    let zeros = e.stack(bytes);
    for offset in (0..bytes).step_by(64) {
        let (at, zero) = (e.gep_const(zeros, offset), e.int(I32.x(LANES), 0));
        e.store(zero, at, 64);
    }
    zeros
}

/// What multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Units {
    Vector,
    Matrix,
}

struct Attention {
    shape: Shape,
    q: Val,
    caches: Source,
    /// What an item reads its own cache block from, where not from `caches`.
    recent: Option<Source>,
    /// Every buffer that wants the result.
    results: Vec<Val>,
    buffers: Buffers,
    step: StepPointers,
}

impl Attend for Attention {
    fn extents(&self) -> Extents {
        let Shape { item, slices, parts, mixed, causal, window, .. } = self.shape;
        Extents { item, slices, parts, halves: true, mixed, causal, window }
    }

    fn step(&self) -> StepPointers {
        self.step
    }

    fn sum_up(&self, e: &mut Emitter, item: &Item, (from, to): (Val, Val), whole: Val, partial: Val) {
        let out = e.select(whole, self.buffers.state, partial);
        let state = self.state(e, out);
        let middle = items::middle(e, item.blocks);
        let end = e.select(whole, middle, to);
        self.positions(e, item, &state, (from, end));
        let more = e.cmp(Cmp::Lt, middle, to);
        let both = e.and(whole, more);
        e.when(both, |e| {
            let second = self.state(e, partial);
            self.positions(e, item, &second, (middle, to));
            self.combine(e, item, &state, &second);
        });
    }

    fn finish(&self, e: &mut Emitter, item: &Item) {
        let state = self.state(e, self.buffers.state);
        self.store(e, item, &state);
    }

    fn count(&self, e: &mut Emitter, counter: Val, done: Val) -> Val {
        e.atomic_add(counter, done)
    }

    fn merge(&self, e: &mut Emitter, item: &Item, first: Val, others: &Others<'_>) {
        let sum = self.state(e, first);
        others(e, &|e, part| {
            let part = self.state(e, part);
            self.combine(e, item, &sum, &part);
        });
        self.store(e, item, &sum);
    }
}

impl Attention {
    /// Sums up cache blocks `from..to` of an item.
    fn positions(&self, e: &mut Emitter, item: &Item, state: &State, (from, to): (Val, Val)) {
        let run = (e.add(item.low, from), e.add(item.low, to));
        let (few, one, long) = (e.i64(FEW_ROWS), e.i64(1), e.i64(AttentionItem::SPAN as i64));
        let few = e.cmp(Cmp::Le, item.rows, few);
        if self.shape.tiled {
            e.either(
                few,
                |e| self.spans(e, item, state, run, (long, Units::Vector)),
                |e| self.spans(e, item, state, run, (one, Units::Matrix)),
            );
        } else {
            let most = e.select(few, long, one);
            self.spans(e, item, state, run, (most, Units::Vector));
        }
    }

    /// Sums up cache blocks `from..to`, `most` at a time.
    fn spans(&self, e: &mut Emitter, item: &Item, state: &State, (from, to): (Val, Val), (most, units): (Val, Units)) {
        self.begin(e, item, state, units);
        e.for_loop((from, to, most), &[], |e, first, _| {
            let left = e.sub(to, first);
            let span = Span { first, blocks: e.min(left, most), end: to };
            self.scores(e, item, span, units);
            self.soften(e, item, state, span, units);
            self.weigh(e, item, state, span, units);
            vec![]
        });
    }

    /// Copies the queries, resets sums and finds what each row sees.
    fn begin(&self, e: &mut Emitter, item: &Item, state: &State, units: Units) {
        let (shape, b) = (&self.shape, &self.buffers);
        let zero = e.i64(0);
        e.repeat(zero, item.count, 1, |e, token| {
            let token_id = e.add(item.first, token);
            let position = load_index(e, self.step.positions, token_id);
            let one = e.i64(1);
            let own = e.add(position, one);
            let end = if shape.causal { e.min(own, item.length) } else { item.length };
            let window = e.i64(shape.window as i64);
            let start = if shape.window > 0 { e.sub(own, window) } else { zero };
            let (start, end) = (e.convert("trunci", start, I32), e.convert("trunci", end, I32));
            let head_bytes = shape.dim * if shape.halves { 2 } else { 4 };
            let from = e.row(self.q, token_id, shape.query_bytes);
            let from = e.row(from, item.head, head_bytes);
            let heads = e.i64(shape.item.heads as i64);
            let row = e.mul(token, heads);
            e.repeat(zero, heads, 1, |e, head| {
                let (row, from) = (e.add(row, head), e.row(from, head, head_bytes));
                for (to, value) in [(b.starts, start), (b.ends, end)] {
                    let to = e.row(to, row, 4);
                    e.store(value, to, 4);
                }
                let most = e.row(state.most, row, 4);
                let below = e.float(F32, FAR_BELOW);
                e.store(below, most, 4);
                let (q, out) = (e.row(b.q, row, shape.stride()), e.row(state.out, row, shape.item.row_bytes));
                self.copy_query(e, from, q, units);
                let none = e.float(F32.x(LANES), 0.0);
                for i in 0..shape.item.row_bytes / (LANES * 4) {
                    let at = e.gep_const(out, i * LANES * 4);
                    e.store(none, at, 64);
                }
            });
        });
    }

    /// Queries of f32 are scaled; those of bf16 become f32 for vector units, and stay for matrix units.
    fn copy_query(&self, e: &mut Emitter, from: Val, to: Val, units: Units) {
        let shape = &self.shape;
        if units == Units::Matrix {
            for i in 0..shape.dim / (2 * LANES) {
                let [from, to] = [from, to].map(|at| e.gep_const(at, i * 64));
                let x = e.load(from, I32.x(LANES), 64);
                e.store(x, to, 64);
            }
            return;
        }
        walk::visit(e, shape.dim, &mut |e, chunk| {
            if shape.halves {
                let from = chunk.halved(e, from);
                let x = e.load(from, BF16.x(chunk.lanes), 32);
                let x = e.convert("extf", x, F32);
                return chunk.store(e, x, to, 64);
            }
            let x = chunk.load(e, from, walk::head_align(2, shape.dim));
            let scale = e.float(x.ty, shape.query_factor());
            let x = e.mul(x, scale);
            chunk.store(e, x, to, 64);
        });
    }

    /// Emits `body` for the caches that the item reads this cache block from.
    fn source_of(&self, e: &mut Emitter, item: &Item, block: Val, body: &dyn Fn(&mut Emitter, &Source)) {
        match &self.recent {
            None => body(e, &self.caches),
            Some(recent) => {
                let own = e.cmp(Cmp::Eq, block, item.own);
                e.either(own, |e| body(e, recent), |e| body(e, &self.caches));
            }
        }
    }

    /// Scores of a span.
    fn scores(&self, e: &mut Emitter, item: &Item, span: Span, units: Units) {
        let zero = e.i64(0);
        e.repeat(zero, span.blocks, 1, |e, index| {
            let block = e.add(span.first, index);
            let scores = e.row(self.buffers.scores, index, CACHE_BLOCK * 4);
            self.source_of(e, item, block, &|e, source| match units {
                Units::Vector => self.scores_of(e, source, item, block, scores),
                Units::Matrix => self.tiled_scores(e, source, item, block, scores),
            });
        });
    }

    /// Queries for keys of a scale and a middle for each dim: `sum of q (scale code + middle)` is `sum of (q scale) code`, and
    /// `sum of q middle` beside it.
    fn scale_queries(&self, e: &mut Emitter, item: &Item, channels: Val) {
        let (dim, stride, (scaled, sums), zero) = (self.shape.dim, self.shape.stride(), self.buffers.scaled, e.i64(0));
        e.repeat(zero, item.rows, 1, |e, row| {
            let (from, to) = (e.row(self.buffers.q, row, stride), e.row(scaled, row, stride));
            let nothing = e.float(F32.x(LANES), 0.0);
            let sum = walk::walk(e, dim, &[nothing], &mut |e, chunk, sum| {
                let (q, at) = (chunk.load(e, from, 64), chunk.halved(e, channels));
                let [scale, middle] = load_channels(e, at, 2 * dim, chunk.lanes, 2 * chunk.lanes);
                let x = e.mul(q, scale);
                chunk.store(e, x, to, 64);
                vec![e.fma(q, middle, sum[0])]
            });
            let (sum, at) = (e.reduce_add(sum[0]), e.row(sums, row, 4));
            e.store(sum, at, 4);
        });
    }

    /// `scores[row][position] = sum over d of q[row][d] * keys[d][position]`.
    fn scores_of(&self, e: &mut Emitter, source: &Source, item: &Item, block: Val, scores: Val) {
        let (shape, stored, stride) = (&self.shape, source.stored, AttentionItem::score_bytes());
        let chunks: Vec<(usize, usize)> = (0..CACHE_BLOCK / LANES).map(|i| (i * LANES, LANES)).collect();
        let depth = e.i64(shape.dim as i64);
        let b = source.head(e, item, source.keys, block);
        let next = source.head(e, item, source.values, block);
        let scales = source.scales(e, item, source.keys, block);
        let channels = source.channels(e, item, block);
        if let Some(channels) = channels {
            self.scale_queries(e, item, channels);
        }
        let queries = if channels.is_some() { self.buffers.scaled.0 } else { self.buffers.q };
        self.row_groups(e, item.rows, &mut |e, row, rows| {
            let (a, to) = (e.row(queries, row, shape.stride()), e.row(scores, row, stride));
            let before: Vec<Val> = (0..rows).map(|i| self.before(e, channels.is_some(), (row, i))).collect();
            for chunks in chunks.chunks(shape.vectors(rows)) {
                let (a_stride, b_stride) = (shape.stride(), CACHE_BLOCK * stored.bytes());
                let (shared, align) = (Shared::Lines, LANES * stored.bytes());
                let product = Product { rows, depth, a, a_stride, b, b_stride, stored, shared, align, chunks, next };
                let before: Vec<Val> = before.iter().flat_map(|x| vec![*x; chunks.len()]).collect();
                for (i, sum) in product.emit(e, &before).into_iter().enumerate() {
                    let (row, chunk) = (i / chunks.len(), chunks[i % chunks.len()]);
                    let to = e.gep_const(to, row * stride + chunk.0 * 4);
                    let score = match scales {
                        Some(scales) => {
                            let scale = stored.load_scales(e, scales, chunk.0, chunk.1);
                            e.mul(sum, scale)
                        }
                        None => sum,
                    };
                    e.store(score, to, 64);
                }
            }
        });
    }

    /// What the scores of a row begin with.
    fn before(&self, e: &mut Emitter, by_dim: bool, (first, row): (Val, usize)) -> Val {
        if !by_dim {
            return e.float(F32.x(LANES), 0.0);
        }
        let at = e.row(self.buffers.scaled.1, first, 4);
        let at = e.gep_const(at, 4 * row);
        let sum = e.load(at, F32, 4);
        e.broadcast(sum, LANES)
    }

    /// Weighted values of a span.
    fn weigh(&self, e: &mut Emitter, item: &Item, state: &State, span: Span, units: Units) {
        let zero = e.i64(0);
        e.repeat(zero, span.blocks, 1, |e, index| {
            let block = e.add(span.first, index);
            let scores = e.row(self.buffers.scores, index, CACHE_BLOCK * 4);
            let (further, one) = (e.add(block, span.blocks), e.i64(1));
            let last = e.sub(span.end, one);
            let further = e.min(further, last);
            let next = self.caches.head(e, item, self.caches.keys, further);
            self.source_of(e, item, block, &|e, source| match units {
                Units::Vector => self.weigh_of(e, source, item, state, (block, scores, next)),
                Units::Matrix => self.tiled_weigh(e, source, item, state, (block, scores)),
            });
        });
    }

    /// `out[row] += sum over positions of scores[row][position] * values[position]`. Positions beyond the item's last one
    /// are left out: their memory may never have been written.
    fn weigh_of(
        &self,
        e: &mut Emitter,
        source: &Source,
        item: &Item,
        state: &State,
        (block, scores, next): (Val, Val, Val),
    ) {
        let (shape, stored) = (&self.shape, source.stored);
        let element = stored.bytes();
        let align = if shape.dim.is_multiple_of(LANES) { LANES * element } else { element };
        let (b, all) = (source.head(e, item, source.values, block), shape.chunks());
        let first = e.scaled(block, CACHE_BLOCK, 0);
        let left = e.sub(item.high, first);
        let positions = e.i64(CACHE_BLOCK as i64);
        let depth = e.min(left, positions);
        self.row_groups(e, item.rows, &mut |e, row, rows| {
            let a_stride = AttentionItem::score_bytes();
            let (a, out) = (e.row(scores, row, a_stride), e.row(state.out, row, shape.item.row_bytes));
            for chunks in all.chunks(shape.vectors(rows)) {
                let at = |i: usize| i / chunks.len() * shape.item.row_bytes + chunks[i % chunks.len()].0 * 4;
                let mut sums = vec![];
                for i in 0..rows * chunks.len() {
                    let lanes = chunks[i % chunks.len()].1;
                    let from = e.gep_const(out, at(i));
                    sums.push(e.load(from, F32.x(lanes), lanes * 4));
                }
                let (b_stride, shared) = (source.value_bytes(), Shared::Lanes);
                let product = Product { rows, depth, a, a_stride, b, b_stride, stored, shared, align, chunks, next };
                for (i, sum) in product.emit(e, &sums).into_iter().enumerate() {
                    let to = e.gep_const(out, at(i));
                    e.store(sum, to, sum.ty.lanes * 4);
                }
            }
        });
    }

    /// Divides by the sums and stores the result.
    fn store(&self, e: &mut Emitter, item: &Item, state: &State) {
        let (shape, zero) = (&self.shape, e.i64(0));
        let heads = e.i64(shape.item.heads as i64);
        e.repeat(zero, item.count, 1, |e, token| {
            let (token_id, first) = (e.add(item.first, token), e.mul(token, heads));
            e.repeat(zero, heads, 1, |e, head| {
                let row = e.add(first, head);
                let from = e.row(state.out, row, shape.item.row_bytes);
                let sums = e.gep_const(from, shape.stride());
                let sums = e.load(sums, F32.x(LANES), 64);
                let sum = e.reduce_add(sums);
                let one = e.float(F32, 1.0);
                let by = e.div(one, sum);
                let head = e.add(head, item.head);
                let to: Vec<Val> = self
                    .results
                    .iter()
                    .map(|result| {
                        let to = e.row(*result, token_id, shape.row_bytes);
                        e.row(to, head, shape.dim * 4)
                    })
                    .collect();
                walk::visit(e, shape.dim, &mut |e, chunk| {
                    let x = chunk.load(e, from, 64);
                    let by = e.broadcast(by, chunk.lanes);
                    let x = e.mul(x, by);
                    for to in &to {
                        chunk.store(e, x, *to, walk::head_align(2, shape.dim));
                    }
                });
            });
        });
    }

    /// Emits `body(first row, rows)` for all rows: a loop over groups that fill the registers, then what is left.
    fn row_groups(&self, e: &mut Emitter, rows: Val, body: &mut dyn FnMut(&mut Emitter, Val, usize)) {
        let size = AttentionItem::REGISTER_ROWS;
        let (zero, groups) = (e.i64(0), e.i64(size as i64));
        let left = e.rem(rows, groups);
        let whole = e.sub(rows, left);
        if self.shape.item.tokens * self.shape.item.heads >= size {
            e.repeat(zero, whole, size as i64, |e, row| body(e, row, size));
        }
        for odd in self.shape.odd_rows() {
            let some = e.i64(odd as i64);
            let some = e.cmp(Cmp::Eq, left, some);
            e.when(some, |e| body(e, whole, odd));
        }
    }
}
