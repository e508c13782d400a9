//! Experts: each token's row times the matrices of the experts it was routed to.
//!
//! A step's *entries* are its pairs (token, j), numbered `token * top + j`: entry `i` is also row `i` of a result
//! `[t, top, n]` seen as `[t * top, n]`. A lone token walks its `top` experts side by side. More tokens are sorted by
//! expert first, by every worker for itself, so that a step reads an expert's weights once:
//!
//! ```text
//! chosen [2 0] [0 1] [2 1]   ->   starts 0 2 4 6, entries 1 2 | 3 5 | 0 4
//! for expert
//!   for cache tile of the worker's strips
//!     for tile of up to 16 of the expert's entries: gather their rows
//!       for strip: products -> epilogue -> store
//! ```
//!
//! A tile that is not full repeats the expert's last entry.

use super::shape::Shape;
use super::{Contraction, Dot, Place, internal};
use crate::cpu::{StepField, step_field};
use crate::emit::{Cmp, Emitter, I8, I32, I64, Val};
use mansard_ir::layout::{A8, ALIGN, STRIP, StripLayout, aligned, row_bytes};
use mansard_ir::{Result, Type, ValueId, bail};

/// Bytes of a worker's stack that gathered rows may take.
const GATHERED_BYTES: usize = 512 << 10;

/// How the tokens of a step are routed.
#[derive(Clone, Copy)]
struct Routed {
    /// Rows of `i32[top]`, of that many bytes.
    chosen: Val,
    stride: usize,
    top: usize,
    experts: usize,
    /// `i64`: tokens of the step.
    tokens: Val,
}

/// Entries in order of expert.
#[derive(Clone, Copy)]
struct Sorted {
    /// `i32[t * top]`.
    entries: Val,
    /// `i32[experts + 1]`: where each expert's entries start.
    starts: Val,
}

/// Some of the entries of one expert.
#[derive(Clone, Copy)]
struct Chosen {
    expert: Val,
    /// The first one's place among the sorted entries.
    first: Val,
    /// The place behind the expert's last entry.
    end: Val,
}

/// Rows of one activation, one after another.
struct Gathered {
    x: ValueId,
    memory: Val,
    stride: usize,
}

impl Contraction<'_> {
    /// Every chosen pair (token, j) against its expert's strips.
    pub(super) fn emit_experts(&self, e: &mut Emitter) -> Result<()> {
        let n = self.component.n;
        if !n.is_multiple_of(STRIP) {
            bail!(Unsupported, "experts with {n} output rows: a multiple of {STRIP} is needed");
        }
        let strips = e.i64((n / STRIP) as i64);
        let share = e.share(self.k, strips);
        let routing = self.component.dots[0].routing.ok_or_else(|| internal(self.body))?;
        let Type::Routing { top, experts } = *self.body.ty(routing) else { return Err(internal(self.body)) };
        let stride = row_bytes(self.body.ty(routing)).ok_or_else(|| internal(self.body))?;
        let tokens = step_field(e, self.k, StepField::T);
        let routed = Routed { chosen: self.pointer(routing)?, stride, top, experts, tokens };
        if self.kernel.range.max == 1 {
            return self.lone_token(e, routed, share);
        }
        let sorted = self.sort(e, routed);
        let shapes = self.gathered_shapes();
        let gathered = self.gathered(e, &shapes)?;
        let (zero, experts) = (e.i64(0), e.i64(experts as i64));
        let mut result = Ok(());
        e.repeat(zero, experts, 1, |e, expert| {
            let first = load_i32(e, sorted.starts, expert, 0);
            let end = load_i32(e, sorted.starts, expert, 1);
            let none = e.cmp(Cmp::Eq, first, end);
            let high = e.select(none, share.0, share.1); // no entries, no strips
            e.repeat(share.0, high, self.cache_tile(), |e, from| {
                let size = e.i64(self.cache_tile());
                let to = e.add(from, size);
                let to = e.min(to, share.1);
                let chosen = Chosen { expert, first, end };
                result = self.entry_tiles(e, (routed, sorted), chosen, &shapes, &gathered, (from, to));
            });
        });
        result
    }

    /// One token: its experts side by side for each strip.
    fn lone_token(&self, e: &mut Emitter, routed: Routed, (low, high): (Val, Val)) -> Result<()> {
        let mut result = Ok(());
        e.repeat(low, high, 1, |e, strip| {
            for j in 0..routed.top {
                let at = e.gep_const(routed.chosen, 4 * j);
                let expert = e.load(at, I32, 4);
                let expert = e.convert("extui", expert, I64);
                if result.is_ok() {
                    result = self.lone_entry(e, j, expert, strip);
                }
            }
        });
        result
    }

    fn lone_entry(&self, e: &mut Emitter, j: usize, expert: Val, strip: Val) -> Result<()> {
        let mut tiles = vec![];
        for dot in &self.component.dots {
            let strip = self.expert_strip(e, dot, expert, strip)?;
            let (width, own) = self.entry_width(dot.x);
            let first = e.gep_const(self.pointer(dot.x)?, if own { j * width } else { 0 });
            tiles.push((vec![strip], dot.rows(first, width, 1)));
        }
        let products = self.products(e, &tiles).into_iter().map(|(v, p)| (v, p[0])).collect();
        let n = self.component.n;
        let (first, column) = (e.i64(0), e.scaled(strip, STRIP * 4, 0));
        let offset = e.scaled(strip, STRIP * 4, j * n * 4);
        self.epilogue(e, products, Place { first, row: 0, offset, column })
    }

    /// Address of a strip of one expert's matrix.
    fn expert_strip(&self, e: &mut Emitter, dot: &Dot, expert: Val, strip: Val) -> Result<Val> {
        let bytes = StripLayout::new(dot.dtype, dot.k).bytes;
        let matrix = e.row(self.pointer(dot.weight)?, expert, self.component.n / STRIP * bytes);
        Ok(e.row(matrix, strip, bytes))
    }

    /// Bytes of an entry's activations, and whether each entry has its own (`[t, top, k]`) or a token's share them.
    fn entry_width(&self, x: ValueId) -> (usize, bool) {
        let Some((dtype, shape)) = self.body.ty(x).as_tensor() else { return (0, false) };
        let k = self.component.dots.iter().find(|d| d.x == x).map_or(0, |d| d.k);
        let width = dtype.planes().map_or(k * dtype.format().block_bytes, |planes| k / A8::GROUP * A8::LINE * planes);
        (width, shape.len() == 3)
    }

    /// Sorts a step's entries by expert, those of one expert in order of token.
    fn sort(&self, e: &mut Emitter, routed: Routed) -> Sorted {
        let entries = e.stack(aligned(self.kernel.range.max * routed.top * 4));
        // Beside `starts` lies `ends`, one further: what counts entries at first and then moves along them.
        let starts = e.stack(aligned((routed.experts + 2) * 4));
        let ends = e.gep_const(starts, 4);
        let (zero, one) = (e.i64(0), e.i64(1));
        let (none, single) = (e.int(I32, 0), e.int(I32, 1));
        let bins = e.i64(routed.experts as i64 + 2);
        e.repeat(zero, bins, 1, |e, bin| {
            let at = e.row(starts, bin, 4);
            e.store(none, at, 4);
        });
        // Entries of expert `i` are counted at `ends[i + 1]`, so that the sums below leave at `ends[i]` where they start.
        self.each_entry(e, routed, |e, expert, _| {
            let next = e.add(expert, one);
            let at = e.row(ends, next, 4);
            let count = e.load(at, I32, 4);
            let count = e.add(count, single);
            e.store(count, at, 4);
        });
        let last = e.i64(routed.experts as i64);
        e.for_loop((zero, last, one), &[none], |e, bin, sum| {
            let at = e.row(ends, bin, 4);
            let count = e.load(at, I32, 4);
            let sum = e.add(sum[0], count);
            e.store(sum, at, 4);
            vec![sum]
        });
        // Each start moves to the end of its expert, where the next one's entries start: `ends[i]` is `starts[i + 1]`.
        self.each_entry(e, routed, |e, expert, entry| {
            let at = e.row(ends, expert, 4);
            let place = e.load(at, I32, 4);
            let next = e.add(place, single);
            e.store(next, at, 4);
            let place = e.convert("extui", place, I64);
            let at = e.row(entries, place, 4);
            let entry = e.convert("trunci", entry, I32);
            e.store(entry, at, 4);
        });
        Sorted { entries, starts }
    }

    /// Calls `visit` with the expert and number of every entry.
    fn each_entry(&self, e: &mut Emitter, routed: Routed, visit: impl FnOnce(&mut Emitter, Val, Val)) {
        let (zero, top) = (e.i64(0), e.i64(routed.top as i64));
        e.repeat(zero, routed.tokens, 1, |e, token| {
            let row = e.row(routed.chosen, token, routed.stride);
            let first = e.mul(token, top);
            e.repeat(zero, top, 1, |e, j| {
                let expert = load_i32(e, row, j, 0);
                let entry = e.add(first, j);
                visit(e, expert, entry);
            });
        });
    }

    /// Register tiles whose gathered rows fit the stack.
    fn gathered_shapes(&self) -> Vec<Shape> {
        let shapes = self.shapes();
        let bytes: usize = self.activations().map(|x| self.gathered_stride(x)).sum();
        let fits = |s: &Shape| s.tokens == 1 || s.tokens * bytes <= GATHERED_BYTES;
        shapes.into_iter().filter(fits).collect()
    }

    /// What the contractions read, each value once.
    fn activations(&self) -> impl Iterator<Item = ValueId> {
        let mut all: Vec<ValueId> = self.component.dots.iter().map(|d| d.x).collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter()
    }

    /// Bytes from one gathered row to the next.
    fn gathered_stride(&self, x: ValueId) -> usize {
        aligned(self.entry_width(x).0)
    }

    fn gathered(&self, e: &mut Emitter, shapes: &[Shape]) -> Result<Vec<Gathered>> {
        let most = shapes.iter().map(|s| s.tokens).max().ok_or_else(|| internal(self.body))?;
        let rows = |x| {
            let stride = self.gathered_stride(x);
            Gathered { x, memory: e.stack(stride * most), stride }
        };
        Ok(self.activations().map(rows).collect())
    }

    /// Strips that stay in the second-level cache while all entries of an expert pass.
    fn cache_tile(&self) -> i64 {
        let bytes: usize = self.component.dots.iter().map(|d| StripLayout::new(d.dtype, d.k).bytes).sum();
        (self.choice.cache_bytes / bytes).max(1) as i64
    }

    /// Full tiles of an expert's entries, then the smallest tile that holds the rest.
    fn entry_tiles(
        &self,
        e: &mut Emitter,
        lists: (Routed, Sorted),
        chosen: Chosen,
        shapes: &[Shape],
        gathered: &[Gathered],
        strips: (Val, Val),
    ) -> Result<()> {
        let mut result = Ok(());
        let mut tile = |e: &mut Emitter, shape: Shape, first: Val| {
            if result.is_ok() {
                let chosen = Chosen { first, ..chosen };
                result = self.entry_tile(e, lists, chosen, shape, gathered, strips);
            }
        };
        let main = shapes[0];
        let count = e.sub(chosen.end, chosen.first);
        let tokens = e.i64(main.tokens as i64);
        let rest = e.rem(count, tokens);
        let full = e.sub(chosen.end, rest);
        e.repeat(chosen.first, full, main.tokens as i64, |e, first| tile(e, main, first));
        for (i, shape) in shapes.iter().enumerate() {
            let above = e.i64(shapes.get(i + 1).map_or(0, |s| s.tokens) as i64);
            let upto = e.i64(if i == 0 { main.tokens as i64 - 1 } else { shape.tokens as i64 });
            let (fits, small) = (e.cmp(Cmp::Gt, rest, above), e.cmp(Cmp::Le, rest, upto));
            let here = e.and(fits, small);
            e.when(here, |e| tile(e, *shape, full));
        }
        result
    }

    /// Gathers the rows of a tile and multiplies them with strips `from..to` of the expert.
    fn entry_tile(
        &self,
        e: &mut Emitter,
        (routed, sorted): (Routed, Sorted),
        chosen: Chosen,
        shape: Shape,
        gathered: &[Gathered],
        (from, to): (Val, Val),
    ) -> Result<()> {
        let one = e.i64(1);
        let last = e.sub(chosen.end, one);
        let mut entries = vec![];
        for r in 0..shape.tokens {
            let ahead = e.i64(r as i64);
            let place = e.add(chosen.first, ahead);
            let place = e.min(place, last);
            entries.push(load_i32(e, sorted.entries, place, 0));
        }
        for rows in gathered {
            self.gather(e, routed.top, rows, &entries)?;
        }
        let mut result = Ok(());
        e.repeat(from, to, 1, |e, strip| result = self.entry_products(e, chosen.expert, &entries, gathered, strip));
        result
    }

    /// Copies the rows of `entries` one after another.
    fn gather(&self, e: &mut Emitter, top: usize, rows: &Gathered, entries: &[Val]) -> Result<()> {
        let stride = row_bytes(self.body.ty(rows.x)).ok_or_else(|| internal(self.body))?;
        let (x, (width, own)) = (self.pointer(rows.x)?, self.entry_width(rows.x));
        let (zero, top) = (e.i64(0), e.i64(top as i64));
        for (r, entry) in entries.iter().enumerate() {
            let token = e.div(*entry, top);
            let mut from = e.row(x, token, stride);
            if own {
                let j = e.rem(*entry, top);
                from = e.row(from, j, width);
            }
            let to = e.gep_const(rows.memory, r * rows.stride);
            let (whole, end) = (e.i64((width / ALIGN * ALIGN) as i64), e.i64(width as i64));
            e.repeat(zero, whole, ALIGN as i64, |e, at| copy(e, I8.x(ALIGN), (from, to), at));
            e.repeat(whole, end, 4, |e, at| copy(e, I32, (from, to), at));
        }
        Ok(())
    }

    /// Products of a tile with one strip, epilogue, stores.
    fn entry_products(
        &self,
        e: &mut Emitter,
        expert: Val,
        entries: &[Val],
        gathered: &[Gathered],
        strip: Val,
    ) -> Result<()> {
        let mut tiles = vec![];
        for dot in &self.component.dots {
            let strip = self.expert_strip(e, dot, expert, strip)?;
            let x = gathered.iter().find(|g| g.x == dot.x).ok_or_else(|| internal(self.body))?;
            tiles.push((vec![strip], dot.rows(x.memory, x.stride, entries.len())));
        }
        let products = self.products(e, &tiles);
        let (zero, column) = (e.i64(0), e.scaled(strip, STRIP * 4, 0));
        for (r, entry) in entries.iter().enumerate() {
            // Rows `[top, n]` of f32 lie without gaps: n is a multiple of 16.
            let offset = e.scaled(*entry, self.component.n * 4, 0);
            let offset = e.add(offset, column);
            let start = products.iter().map(|(v, p)| (*v, p[r])).collect();
            self.epilogue(e, start, Place { first: zero, row: 0, offset, column })?;
        }
        Ok(())
    }
}

/// `i32[index + ahead]` as `i64`.
fn load_i32(e: &mut Emitter, base: Val, index: Val, ahead: usize) -> Val {
    let at = e.row(base, index, 4);
    let at = e.gep_const(at, 4 * ahead);
    let value = e.load(at, I32, 4);
    e.convert("extui", value, I64)
}

/// Copies one value `at` bytes in.
fn copy(e: &mut Emitter, ty: crate::emit::Ty, (from, to): (Val, Val), at: Val) {
    let (from, to) = (e.gep(from, at), e.gep(to, at));
    let value = e.load(from, ty, 4);
    e.store(value, to, 4);
}
