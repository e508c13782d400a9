//! Attention over paged caches, with a running softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).
//!
//! ```text
//! item = key-value head x attention tile            rows = tokens of the tile x query heads of the group
//! for cache block of 64 positions in sight
//!   scores[row][64]  = q[row] . keys        keys are dim-major: 64 positions are whole vectors, no horizontal sums
//!   scores           = exp(scores - max)    masked only in blocks that some row sees in part
//!   out[row]         = out[row] * exp(old max - max) + scores[row] . values
//! result = out / sum
//! ```
//!
//! Both products are one loop: `sum over k of a[row][k] * b[k][lanes]`, with as many accumulators as registers allow. Four
//! tokens of a tile are computed together; what is left of a tile, and tokens of a decode step, one at a time. Keys and
//! values are read once for all rows of an item.

mod product;
mod shape;
#[cfg(test)]
mod tests;

use super::{StepField, step_field};
use crate::cpu::rows::walk::{self, LANES, load_index};
use crate::emit::{Cmp, Emitter, F32, I32, KernelArgs, Val};
use crate::math;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::ops::Class;
use mansard_ir::plan::Kernel;
use mansard_ir::{Error, Kind, Result, Target, ValueId, bail};
use product::Product;
use shape::{SCRATCH_BYTES, Shape, TOKENS, row_groups, tokens_together};

/// Below every score, and finite, so that differences of two are numbers.
const FAR_BELOW: f32 = -1e30;

/// Emits an `attend` kernel.
///
/// # Errors
/// Where the body is no attention over caches in memory, or its rows need too much stack.
pub fn emit(kernel: &Kernel, target: &Target) -> Result<String> {
    let body = &kernel.body;
    let broken = || Error::new(Kind::Internal, format!("`{}` is no attention over caches in memory", body.name));
    let (mut e, k) = Emitter::kernel(&kernel.name);
    let memory = super::memory(&mut e, k, body);
    let attends = |v: &ValueId| body.node(*v).filter(|n| n.op.class() == Class::Attend);
    let (value, node) = body.values().find_map(|v| Some((v, attends(&v)?))).ok_or_else(broken)?;
    let at = |v: ValueId| memory[v.0 as usize].ok_or_else(broken);
    let shape = Shape::new(kernel, target, node, body.ty(node.operands[0]), body.ty(node.operands[1]))?;
    let step = StepPointers {
        positions: step_field(&mut e, k, StepField::Positions),
        tables: step_field(&mut e, k, StepField::Tables),
        stride: step_field(&mut e, k, StepField::TableStride),
    };
    let rows = tokens_together(kernel) * shape.heads;
    let attention = Attention {
        q: at(node.operands[0])?,
        keys: at(node.operands[1])?,
        values: at(node.operands[2])?,
        results: (value.0 as usize..body.len()).filter_map(|v| memory[v]).collect(),
        scratch: Scratch::new(&mut e, rows, shape.dim)?,
        shape,
        step,
    };
    attention.items(&mut e, k, rows > attention.shape.heads);
    Ok(e.finish())
}

/// A worker's memory for one item. Rows are those of the item, or of a lone token.
struct Scratch {
    /// `[rows][dim]`: queries, scaled.
    q: Val,
    /// `[rows][dim]`: sums of weighted values.
    out: Val,
    /// `[rows][64]`.
    scores: Val,
    /// `[rows][16]`: sums of exponentials, lane by lane.
    sums: Val,
    /// `[rows][4]`: largest score so far; factor for what was summed before; first position in sight, and first beyond.
    figures: Val,
}

const FIGURES_BYTES: usize = 16;
const FACTOR: usize = 4;
const START: usize = 8;
const END: usize = 12;

impl Scratch {
    fn bytes(rows: usize, dim: usize) -> usize {
        rows * (2 * dim.next_multiple_of(LANES) * 4 + CACHE_BLOCK * 4 + LANES * 4 + FIGURES_BYTES)
    }

    fn new(e: &mut Emitter, rows: usize, dim: usize) -> Result<Scratch> {
        if Scratch::bytes(rows, dim) > SCRATCH_BYTES {
            bail!(Unsupported, "attention heads of {dim}: {rows} rows of it do not fit {SCRATCH_BYTES} bytes of stack");
        }
        let stride = dim.next_multiple_of(LANES) * 4;
        Ok(Scratch {
            q: e.stack(rows * stride),
            out: e.stack(rows * stride),
            scores: e.stack(rows * CACHE_BLOCK * 4),
            sums: e.stack(rows * LANES * 4),
            figures: e.stack(rows * FIGURES_BYTES),
        })
    }
}

struct StepPointers {
    positions: Val,
    tables: Val,
    stride: Val,
}

struct Attention {
    shape: Shape,
    q: Val,
    keys: Val,
    values: Val,
    /// Every buffer that wants the result.
    results: Vec<Val>,
    scratch: Scratch,
    step: StepPointers,
}

/// What is computed at once.
#[derive(Clone, Copy)]
struct Item {
    /// Tokens, known now.
    tokens: usize,
    /// The first one.
    first: Val,
    /// The sequence's row of the block table.
    table: Val,
    /// Positions of the sequence.
    length: Val,
    /// Key-value head.
    kv_head: Val,
    /// First query head.
    head: Val,
}

/// Positions that an item's rows see: from the first row's `low` and the last row's `start` to the first row's `end` and
/// the last row's `high`.
#[derive(Clone, Copy)]
struct Sight {
    low: Val,
    start: Val,
    end: Val,
    high: Val,
}

impl Attention {
    /// Shares out tiles x key-value heads x parts, heads outermost. Tiles are taken in the order first, last, second, last
    /// but one...: under a causal mask early tiles are short and late ones long, and so every run of them is as long.
    fn items(&self, e: &mut Emitter, k: KernelArgs, together: bool) {
        let shape = &self.shape;
        let tiles = step_field(e, k, StepField::Tiles);
        let records = step_field(e, k, StepField::Tile);
        let slices = e.i64((shape.kv_heads * shape.parts) as i64);
        let count = e.mul(tiles, slices);
        let (low, high) = e.share(k, count);
        e.repeat(low, high, 1, |e, item| {
            let (slice, order) = (e.div(item, tiles), e.rem(item, tiles));
            let (one, zero) = (e.i64(1), e.i64(0));
            let half = e.shr(order, 1);
            let odd = e.and(order, one);
            let from_end = e.sub(tiles, half);
            let from_end = e.sub(from_end, one);
            let is_odd = e.cmp(Cmp::Ne, odd, zero);
            let tile = e.select(is_odd, from_end, half);
            let record = e.row(records, tile, 16);
            let field = |e: &mut Emitter, i: i64| {
                let i = e.i64(i);
                load_index(e, record, i)
            };
            let (first, count, sequence, length) = (field(e, 0), field(e, 1), field(e, 2), field(e, 3));
            let row = e.mul(sequence, self.step.stride);
            let (per_slice, parts) = (e.i64(shape.heads as i64), e.i64(shape.parts as i64));
            let start = Item {
                tokens: 1,
                first,
                table: e.row(self.step.tables, row, 4),
                length,
                kv_head: e.div(slice, parts),
                head: e.mul(slice, per_slice),
            };
            let mut done = zero;
            if together {
                let tokens = e.i64(TOKENS as i64);
                let rest = e.rem(count, tokens);
                done = e.sub(count, rest);
                e.repeat(zero, done, TOKENS as i64, |e, from| {
                    let first = e.add(start.first, from);
                    self.item(e, Item { tokens: TOKENS, first, ..start });
                });
            }
            e.repeat(done, count, 1, |e, from| {
                let first = e.add(start.first, from);
                self.item(e, Item { first, ..start });
            });
        });
    }

    fn item(&self, e: &mut Emitter, item: Item) {
        let sight = self.begin(e, item);
        let positions = e.i64(CACHE_BLOCK as i64);
        let low = e.div(sight.low, positions);
        let most = e.i64(CACHE_BLOCK as i64 - 1);
        let high = e.add(sight.high, most);
        let high = e.div(high, positions);
        e.repeat(low, high, 1, |e, block| {
            let id = load_index(e, item.table, block);
            let head = e.scaled(item.kv_head, self.shape.dim * CACHE_BLOCK * self.shape.element, 0);
            let pool = |e: &mut Emitter, pool: Val| {
                let block = e.row(pool, id, self.shape.cache_block_bytes);
                e.gep(block, head)
            };
            let (keys, values) = (pool(e, self.keys), pool(e, self.values));
            self.scores(e, item, keys);
            self.soften(e, item, sight, block);
            self.weigh(e, item, sight, block, values);
        });
        self.finish(e, item);
    }

    fn rows(&self, item: Item) -> usize {
        item.tokens * self.shape.heads
    }

    /// Copies the queries, resets sums and finds what each token sees.
    fn begin(&self, e: &mut Emitter, item: Item) -> Sight {
        let (shape, s) = (&self.shape, &self.scratch);
        let mut seen = vec![];
        for token in 0..item.tokens {
            let more = e.i64(token as i64);
            let token_id = e.add(item.first, more);
            let position = load_index(e, self.step.positions, token_id);
            let (one, zero) = (e.i64(1), e.i64(0));
            let own = e.add(position, one);
            let end = if shape.causal { e.min(own, item.length) } else { item.length };
            let start = if shape.window > 0 {
                let window = e.i64(shape.window as i64);
                let start = e.sub(own, window);
                e.max(start, zero)
            } else {
                zero
            };
            seen.push((start, end));
            let (narrow_start, narrow_end) = (e.convert("trunci", start, I32), e.convert("trunci", end, I32));
            let from = e.row(self.q, token_id, shape.row_bytes);
            let from = e.row(from, item.head, shape.dim * 4);
            let first = e.i64((token * shape.heads) as i64);
            let end = e.i64(((token + 1) * shape.heads) as i64);
            e.repeat(first, end, 1, |e, row| {
                let head = e.sub(row, first);
                let from = e.row(from, head, shape.dim * 4);
                let (q, out) = (e.row(s.q, row, shape.stride()), e.row(s.out, row, shape.stride()));
                walk::visit(e, shape.dim, &mut |e, chunk| {
                    let x = chunk.load(e, from, walk::head_align(2, shape.dim));
                    let scale = e.float(x.ty, shape.scale);
                    let x = e.mul(x, scale);
                    chunk.store(e, x, q, 64);
                    let zero = e.float(x.ty, 0.0);
                    chunk.store(e, zero, out, 64);
                });
                let sums = e.row(s.sums, row, LANES * 4);
                let zeros = e.float(F32.x(LANES), 0.0);
                e.store(zeros, sums, 64);
                let figures = e.row(s.figures, row, FIGURES_BYTES);
                let least = e.float(F32, FAR_BELOW);
                e.store(least, figures, 4);
                for (at, value) in [(START, narrow_start), (END, narrow_end)] {
                    let at = e.gep_const(figures, at);
                    e.store(value, at, 4);
                }
            });
        }
        let last = item.tokens - 1;
        Sight { low: seen[0].0, start: seen[last].0, end: seen[0].1, high: seen[last].1 }
    }

    /// `scores[row][position] = sum over d of q[row][d] * keys[d][position]`.
    fn scores(&self, e: &mut Emitter, item: Item, keys: Val) {
        let (shape, s) = (&self.shape, &self.scratch);
        let chunks: Vec<(usize, usize)> = (0..CACHE_BLOCK / LANES).map(|i| (i * LANES, LANES)).collect();
        let depth = e.i64(shape.dim as i64);
        self.row_groups(e, self.rows(item), &mut |e, row, rows| {
            let (a, to) = (e.row(s.q, row, shape.stride()), e.row(s.scores, row, CACHE_BLOCK * 4));
            for chunks in chunks.chunks(shape.vectors(rows)) {
                let product = Product {
                    rows,
                    depth,
                    a,
                    a_stride: shape.stride(),
                    b: keys,
                    b_stride: CACHE_BLOCK * shape.element,
                    element: shape.element,
                    align: LANES * shape.element,
                    chunks,
                };
                let zeros: Vec<Val> = (0..rows).flat_map(|_| chunks).map(|c| e.float(F32.x(c.1), 0.0)).collect();
                let sums = product.emit(e, &zeros);
                for (i, sum) in sums.into_iter().enumerate() {
                    let (row, chunk) = (i / chunks.len(), chunks[i % chunks.len()]);
                    let to = e.gep_const(to, row * CACHE_BLOCK * 4 + chunk.0 * 4);
                    e.store(sum, to, 64);
                }
            }
        });
    }

    /// Scores become exponentials; sums and largest scores move on.
    fn soften(&self, e: &mut Emitter, item: Item, sight: Sight, block: Val) {
        let first = e.scaled(block, CACHE_BLOCK, 0);
        let positions = e.i64(CACHE_BLOCK as i64);
        let beyond = e.add(first, positions);
        let cut = e.cmp(Cmp::Gt, beyond, sight.end);
        let late = e.cmp(Cmp::Lt, first, sight.start);
        let masked = e.or(cut, late);
        let (zero, rows) = (e.i64(0), e.i64(self.rows(item) as i64));
        e.either(
            masked,
            |e| e.repeat(zero, rows, 1, |e, row| self.soften_row(e, row, Some(first))),
            |e| e.repeat(zero, rows, 1, |e, row| self.soften_row(e, row, None)),
        );
    }

    /// One row; `masked` gives the cache block's first position where not all of them may be in sight.
    fn soften_row(&self, e: &mut Emitter, row: Val, masked: Option<Val>) {
        let s = &self.scratch;
        let (scores, figures) = (e.row(s.scores, row, CACHE_BLOCK * 4), e.row(s.figures, row, FIGURES_BYTES));
        let ty = F32.x(LANES);
        let (mut x, mut masks) = (vec![], vec![]);
        for i in 0..CACHE_BLOCK / LANES {
            let at = e.gep_const(scores, i * LANES * 4);
            let mut score = e.load(at, ty, 64);
            if self.shape.softcap > 0.0 {
                let cap = e.float(ty, self.shape.softcap);
                score = math::softcap(e, score, cap);
            }
            if let Some(first) = masked {
                let mask = self.mask(e, figures, first, i);
                let below = e.float(ty, FAR_BELOW);
                score = e.select(mask, score, below);
                masks.push(mask);
            }
            x.push(score);
        }
        let (a, b) = (e.max(x[0], x[1]), e.max(x[2], x[3]));
        let most = e.max(a, b);
        let most = e.reduce_max(most);
        let before = e.load(figures, F32, 4);
        let most = e.max(most, before);
        let down = e.sub(before, most);
        let factor = math::exp(e, down);
        let all = e.broadcast(most, LANES);
        for (i, x) in x.iter_mut().enumerate() {
            let below = e.sub(*x, all);
            *x = math::exp(e, below);
            if let Some(mask) = masks.get(i) {
                let zero = e.float(ty, 0.0);
                *x = e.select(*mask, *x, zero);
            }
            let at = e.gep_const(scores, i * LANES * 4);
            e.store(*x, at, 64);
        }
        let (a, b) = (e.add(x[0], x[1]), e.add(x[2], x[3]));
        let new = e.add(a, b);
        let at = e.row(s.sums, row, LANES * 4);
        let sums = e.load(at, ty, 64);
        let factors = e.broadcast(factor, LANES);
        let sums = e.fma(sums, factors, new);
        e.store(sums, at, 64);
        e.store(most, figures, 4);
        let at = e.gep_const(figures, FACTOR);
        e.store(factor, at, 4);
    }

    /// Which of 16 positions a row sees.
    fn mask(&self, e: &mut Emitter, figures: Val, first: Val, vector: usize) -> Val {
        let ty = I32.x(LANES);
        let first = e.convert("trunci", first, I32);
        let first = e.broadcast(first, LANES);
        let (lanes, more) = (e.sequence(ty), e.int(ty, (vector * LANES) as i64));
        let positions = e.add(first, lanes);
        let positions = e.add(positions, more);
        let limit = |e: &mut Emitter, at: usize| {
            let at = e.gep_const(figures, at);
            let limit = e.load(at, I32, 4);
            e.broadcast(limit, LANES)
        };
        let end = limit(e, END);
        let seen = e.cmp(Cmp::Lt, positions, end);
        if self.shape.window == 0 {
            return seen;
        }
        let start = limit(e, START);
        let late = e.cmp(Cmp::Ge, positions, start);
        e.and(seen, late)
    }

    /// `out[row] = out[row] * factor[row] + sum over positions of scores[row][position] * values[position]`. Positions
    /// beyond the item's last one are left out: their memory may never have been written.
    fn weigh(&self, e: &mut Emitter, item: Item, sight: Sight, block: Val, values: Val) {
        let (shape, s) = (&self.shape, &self.scratch);
        let first = e.scaled(block, CACHE_BLOCK, 0);
        let left = e.sub(sight.high, first);
        let positions = e.i64(CACHE_BLOCK as i64);
        let depth = e.min(left, positions);
        let align = if shape.dim.is_multiple_of(LANES) { LANES * shape.element } else { shape.element };
        let all = shape.chunks();
        self.row_groups(e, self.rows(item), &mut |e, row, rows| {
            let (a, out) = (e.row(s.scores, row, CACHE_BLOCK * 4), e.row(s.out, row, shape.stride()));
            let figures = e.row(s.figures, row, FIGURES_BYTES);
            for chunks in all.chunks(shape.vectors(rows)) {
                let at = |i: usize| i / chunks.len() * shape.stride() + chunks[i % chunks.len()].0 * 4;
                let mut sums = vec![];
                for i in 0..rows * chunks.len() {
                    let lanes = chunks[i % chunks.len()].1;
                    let from = e.gep_const(figures, i / chunks.len() * FIGURES_BYTES + FACTOR);
                    let factor = e.load(from, F32, 4);
                    let factor = e.broadcast(factor, lanes);
                    let from = e.gep_const(out, at(i));
                    let sum = e.load(from, F32.x(lanes), lanes * 4);
                    sums.push(e.mul(sum, factor));
                }
                let b_stride = shape.dim * shape.element;
                let (a_stride, element) = (CACHE_BLOCK * 4, shape.element);
                let product = Product { rows, depth, a, a_stride, b: values, b_stride, element, align, chunks };
                let sums = product.emit(e, &sums);
                for (i, sum) in sums.into_iter().enumerate() {
                    let to = e.gep_const(out, at(i));
                    e.store(sum, to, sum.ty.lanes * 4);
                }
            }
        });
    }

    /// Divides by the sums and stores the result.
    fn finish(&self, e: &mut Emitter, item: Item) {
        let (shape, s) = (&self.shape, &self.scratch);
        for token in 0..item.tokens {
            let more = e.i64(token as i64);
            let token_id = e.add(item.first, more);
            let (first, end) = (e.i64((token * shape.heads) as i64), e.i64(((token + 1) * shape.heads) as i64));
            e.repeat(first, end, 1, |e, row| {
                let sums = e.row(s.sums, row, LANES * 4);
                let sums = e.load(sums, F32.x(LANES), 64);
                let sum = e.reduce_add(sums);
                let one = e.float(F32, 1.0);
                let by = e.div(one, sum);
                let head = e.sub(row, first);
                let head = e.add(head, item.head);
                let from = e.row(s.out, row, shape.stride());
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
        }
    }

    /// Emits `body(first row, rows)` for all rows: a loop over groups of one size, then a smaller group.
    fn row_groups(&self, e: &mut Emitter, rows: usize, body: &mut dyn FnMut(&mut Emitter, Val, usize)) {
        let [(size, count), (rest, _)] = row_groups(rows);
        let whole = size * count;
        let (zero, end) = (e.i64(0), e.i64(whole as i64));
        if count == 1 {
            body(e, zero, size);
        } else {
            e.repeat(zero, end, size as i64, |e, row| body(e, row, size));
        }
        if rest > 0 {
            body(e, end, rest);
        }
    }
}
