//! Contractions of bf16 activations for many tokens: a block multiplies some strips with 64 tokens on tensor cores.
//!
//! ```text
//! activations   64 tokens x 64 columns a step, by asynchronous copies, four steps in shared memory
//! weights       from memory to the registers of the warp whose strips they are, a step ahead; codes become bf16 there
//! a warp        a strip (or two, or one of each contraction), all columns      a block: 8 or 16 strips
//!               few items: a quarter of the columns                            2 or 4 strips, sums of four meet
//! results       through shared memory, so that neighbouring threads store neighbouring rows
//! ```
//!
//! A product takes 16 columns in any order that both sides have. Lane `4 g + t` brings columns `4 t .. 4 t + 3` of rows `2 g` and
//! `2 g + 1` of its strip, and the same columns of token `g`: eight bytes of a row, and a word of codes.

use super::super::weights::{self, Packed, Quad};
use super::{Component, Contraction, Device, Place, each, internal};
use crate::cpu::contract::Dot;
use crate::emit::{BF16, Cmp, Emitter, F32, I32, Val, WARP};
use mansard_ir::formats::{IntFormat, Zero};
use mansard_ir::layout::{STRIP, StripLayout, row_bytes};
use mansard_ir::{DType, Result, ValueId};
use std::collections::BTreeMap;

/// Tokens of a block.
const TOKENS: usize = 64;

/// Columns of a step, and of a product.
const STEP: usize = 64;
const DEPTH: usize = 16;

/// Products of a step, one after the other, and tokens of one.
const PRODUCTS: usize = STEP / DEPTH;
const COLUMNS: usize = 8;

/// Steps in shared memory: a power of two.
const SLOTS: usize = 4;

/// Bytes from token to token there: four rows of a product lie in different banks.
const TOKEN_BYTES: usize = 2 * STEP + 32;

/// Rows of a strip that a lane has.
const ROWS: usize = 2;

/// Sums of a product that a lane has.
const SUMS: usize = 4;

/// Registers of a warp's fragment.
const WORDS: usize = 4;

/// Strips that a warp multiplies at once, over all contractions of a component.
const UNITS: usize = 2;

/// Bytes that a copy takes.
const COPIED: usize = 16;

/// Whole steps of bf16 activations, the same for all contractions of a component.
pub(super) fn suits(component: &Component) -> bool {
    let first = &component.dots[0];
    component.dots.len() <= UNITS
        && component.dots.iter().all(|dot| {
            let packed = dot.dtype.int().map_or(dot.dtype == DType::BF16, |int| int.unit() == 32);
            let shared = (dot.x, dot.k) == (first.x, first.k);
            packed && shared && dot.activations == DType::BF16 && dot.k.is_multiple_of(STEP)
        })
}

/// How the warps of a block share its work.
#[derive(Clone, Copy)]
struct Shape {
    /// Warps that share the columns of a strip: one, or one for each product of a step.
    quarters: usize,
}

impl Shape {
    /// Strips of a component that a warp has.
    fn of_warp(component: &Component) -> usize {
        UNITS / component.dots.len()
    }

    /// Strips of a component that a block has.
    fn of_block(self, e: &Emitter, component: &Component) -> usize {
        e.block_threads() / WARP / self.quarters * Self::of_warp(component)
    }

    fn blocks(self, e: &Emitter, component: &Component) -> usize {
        component.n.div_ceil(STRIP).div_ceil(self.of_block(e, component))
    }
}

/// Emits the many-token part of a kernel whose components all suit.
pub(super) fn emit(e: &mut Emitter, d: &Device<'_>, components: &[Component], rows: Val) -> Result<()> {
    let (size, last) = (e.i64(TOKENS as i64), e.scaled(rows, 1, TOKENS - 1));
    let panels = e.div(last, size);
    let items = |e: &mut Emitter, shape: Shape| {
        let blocks: usize = components.iter().map(|component| shape.blocks(e, component)).sum();
        e.scaled(panels, blocks, 0)
    };
    let (whole, quarters) = (Shape { quarters: 1 }, Shape { quarters: PRODUCTS });
    let [all, parts] = [whole, quarters].map(|shape| items(e, shape));
    let enough = e.cmp(Cmp::Ge, all, d.k.threads);
    let run = |e: &mut Emitter, shape: Shape, items: Val| {
        let mut result = Ok(());
        e.for_loop((d.k.thread, items, d.k.threads), &[], |e, index, _| {
            let (panel, block) = (e.rem(index, panels), e.div(index, panels));
            let first = e.mul(panel, size);
            let blocks: Vec<usize> = components.iter().map(|component| shape.blocks(e, component)).collect();
            result = each(e, components, &blocks, block, |e, component, block| {
                e.scoped(|e| Tile::new(e, d, component, shape, (block, first, rows))?.emit(e))
            });
            vec![]
        });
        result
    };
    let (mut of_whole, mut of_quarters) = (Ok(()), Ok(()));
    e.either(enough, |e| of_whole = run(e, whole, all), |e| of_quarters = run(e, quarters, parts));
    of_whole.and(of_quarters)
}

/// One block's strips and tokens, as a thread sees them.
struct Tile<'a> {
    d: &'a Device<'a>,
    component: &'a Component,
    shape: Shape,
    /// The block's first strip, and this warp's.
    base: Val,
    strip: Val,
    /// Its first token, and the last of the step: what lies beyond is computed as it is.
    first: Val,
    last: Val,
    /// `lane / 4` and `lane % 4`; which quarter of the columns is the warp's.
    group: Val,
    pair: Val,
    quarter: Val,
    /// Shared memory: steps of activations, then sums `f32[quarters][tokens][rows]` of each contraction.
    steps: Val,
    sums: Vec<Val>,
}

impl<'a> Tile<'a> {
    fn new(
        e: &mut Emitter,
        d: &'a Device<'a>,
        component: &'a Component,
        shape: Shape,
        (block, first, rows): (Val, Val, Val),
    ) -> Result<Tile<'a>> {
        let (lane, warp) = e.lane_and_warp();
        let (four, one, quarters) = (e.i64(4), e.i64(1), e.i64(shape.quarters as i64));
        let base = e.scaled(block, shape.of_block(e, component), 0);
        let (number, quarter) = (e.div(warp, quarters), e.rem(warp, quarters));
        let own = e.scaled(number, Shape::of_warp(component), 0);
        let mut tile = Tile {
            d,
            component,
            shape,
            base,
            strip: e.add(base, own),
            first,
            last: e.sub(rows, one),
            group: e.div(lane, four),
            pair: e.rem(lane, four),
            quarter,
            steps: e.shared(SLOTS * TOKENS * TOKEN_BYTES),
            sums: vec![],
        };
        let bytes = shape.quarters * TOKENS * tile.sum_bytes(e);
        tile.sums = component.dots.iter().map(|_| e.shared(bytes)).collect();
        Ok(tile)
    }

    /// Rows of a block, and bytes from token to token of its sums.
    fn rows(&self, e: &Emitter) -> usize {
        STRIP * self.shape.of_block(e, self.component)
    }

    fn sum_bytes(&self, e: &Emitter) -> usize {
        4 * (self.rows(e) + 4)
    }

    fn emit(&self, e: &mut Emitter) -> Result<()> {
        let dot = &self.component.dots[0];
        let sources = self.sources(e, dot)?;
        let steps = e.i64((dot.k / STEP) as i64);
        for step in 0..SLOTS - 1 {
            let step = e.i64(step as i64);
            self.fetch(e, &sources, step, steps);
        }
        let (zero, one, nothing) = (e.i64(0), e.i64(1), e.float(F32, 0.0));
        let mut carried = self.fragments(e, zero)?;
        let words = carried.len();
        carried.extend(vec![nothing; UNITS * TOKENS / COLUMNS * SUMS]);
        let mut result = Ok(());
        let carried = e.for_loop((zero, steps, one), &carried, |e, step, carried| {
            e.await_copies(SLOTS - 2);
            // Everyone's copies are there, and everyone is done with the step before, whose slot is next.
            e.barrier();
            let ahead = e.scaled(step, 1, SLOTS - 1);
            self.fetch(e, &sources, ahead, steps);
            let (next, last) = (e.add(step, one), e.sub(steps, one));
            let next = e.min(next, last);
            let mut after = self.fragments(e, next).unwrap_or_else(|error| {
                result = Err(error);
                carried[..words].to_vec()
            });
            let mut acc = carried[words..].to_vec();
            self.multiply(e, step, &carried[..words], &mut acc);
            after.extend(acc);
            after
        });
        result?;
        self.leave(e, &carried[words..]);
        e.barrier();
        self.results(e)?;
        e.barrier();
        Ok(())
    }

    /// What this thread copies of a step: where it begins in memory, and its place in a slot.
    fn sources(&self, e: &mut Emitter, dot: &Dot) -> Result<Vec<(Val, Val)>> {
        let stride = row_bytes(self.d.kernel.body.ty(dot.x)).ok_or_else(|| internal(&self.d.kernel.body))?;
        let (base, thread) = (self.d.pointer(dot.x)?, e.thread());
        const PARTS: usize = 2 * STEP / COPIED;
        let pieces = (0..TOKENS * PARTS).step_by(e.block_threads()).map(|before| {
            let number = e.scaled(thread, 1, before);
            let parts = e.i64(PARTS as i64);
            let (own, part) = (e.div(number, parts), e.rem(number, parts));
            let token = e.add(self.first, own);
            let token = e.min(token, self.last);
            let [from, to] = [(base, token, stride), (self.steps, own, TOKEN_BYTES)].map(|(base, token, stride)| {
                let row = e.row(base, token, stride);
                e.row(row, part, COPIED)
            });
            (from, to)
        });
        Ok(pieces.collect())
    }

    /// Begins to copy a step, where there is one.
    fn fetch(&self, e: &mut Emitter, sources: &[(Val, Val)], step: Val, steps: Val) {
        let there = e.cmp(Cmp::Lt, step, steps);
        e.when(there, |e| {
            for (from, to) in sources {
                let from = e.row(*from, step, 2 * STEP);
                let to = self.in_slot(e, *to, step);
                e.copy_async(to, from, COPIED);
            }
        });
        e.commit_copies();
    }

    /// A place of the first slot in that of a step.
    fn in_slot(&self, e: &mut Emitter, place: Val, step: Val) -> Val {
        let last = e.i64(SLOTS as i64 - 1);
        let slot = e.and(step, last);
        e.row(place, slot, TOKENS * TOKEN_BYTES)
    }

    /// Products of a step that are this warp's: each one's number.
    fn products(&self, e: &mut Emitter) -> Vec<Val> {
        if self.shape.quarters > 1 {
            return vec![self.quarter];
        }
        (0..PRODUCTS).map(|q| e.i64(q as i64)).collect()
    }

    /// The warp's weights of a step: `[product][unit][word]`.
    fn fragments(&self, e: &mut Emitter, step: Val) -> Result<Vec<Val>> {
        let products = self.products(e);
        let mut words = vec![];
        for product in products {
            let before = e.scaled(step, PRODUCTS, 0);
            let index = e.add(before, product);
            for dot in &self.component.dots {
                let layout = StripLayout::new(dot.dtype, dot.k);
                let weight = self.d.pointer(dot.weight)?;
                for strip in 0..Shape::of_warp(self.component) {
                    let most = e.i64(self.component.n.div_ceil(STRIP) as i64 - 1);
                    let strip = e.scaled(self.strip, 1, strip);
                    let strip = e.min(strip, most);
                    let strip = e.row(weight, strip, layout.bytes);
                    let packed = Packed { rows: ROWS, ..Packed::new(dot.dtype, dot.k) };
                    match dot.dtype.int() {
                        Some(int) => words.extend(self.widened(e, &packed, int, strip, index)),
                        None => words.extend(self.pairs(e, strip, index)),
                    }
                }
            }
        }
        Ok(words)
    }

    /// 16 columns of bf16.
    fn pairs(&self, e: &mut Emitter, strip: Val, index: Val) -> Vec<Val> {
        let lines = e.row(strip, index, DEPTH / 2 * 4 * STRIP);
        let line = e.row(lines, self.pair, 2 * 4 * STRIP);
        let line = e.row(line, self.group, 4 * ROWS);
        let mut words = vec![];
        for more in [0, 4 * STRIP] {
            let at = e.gep_const(line, more);
            let rows = e.load(at, I32.x(ROWS), 4 * ROWS);
            words.extend((0..ROWS).map(|row| e.extract(rows, row)));
        }
        words
    }

    /// 16 columns of codes as bf16: half a unit.
    fn widened(&self, e: &mut Emitter, packed: &Packed, int: IntFormat, strip: Val, index: Val) -> Vec<Val> {
        let two = e.i64(2);
        let (unit, half) = (e.div(index, two), e.rem(index, two));
        let lines = if int.bits == 8 { 8 } else { 4 };
        let line = e.scaled(unit, lines, 0);
        let line = e.add(line, self.pair);
        let line = if int.bits == 8 {
            let more = e.scaled(half, 4, 0);
            e.add(line, more)
        } else {
            line
        };
        let [codes, scales, mins] = packed.places(e, strip, line, self.group);
        let mut quads = packed.quads(e, int, (strip, line, self.group), codes.unwrap_or(strip));
        let figures = packed.figures(e, int, [scales, mins]);
        let quad = match (quads.pop(), quads.pop()) {
            // A line of narrow codes has a quad of either half.
            (Some(high), Some(low)) => {
                let zero = e.i64(0);
                let first = e.cmp(Cmp::Eq, half, zero);
                let codes = low.codes.iter().zip(&high.codes).map(|(low, high)| e.select(first, *low, *high));
                Quad { column: low.column, codes: codes.collect() }
            }
            (only, _) => only.unwrap_or(Quad { column: line, codes: vec![] }),
        };
        let rows: Vec<[Val; 2]> = (0..ROWS)
            .map(|row| {
                let min = figures.mins.as_ref().map(|mins| mins[row]);
                bf16_of_codes(e, int, quad.codes[row], (figures.scales[row], min))
            })
            .collect();
        vec![rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
    }

    /// Multiplies the warp's part of a step.
    fn multiply(&self, e: &mut Emitter, step: Val, words: &[Val], acc: &mut [Val]) {
        let slot = self.in_slot(e, self.steps, step);
        let token = e.row(slot, self.group, TOKEN_BYTES);
        let columns = e.row(token, self.pair, 8);
        for (product, words) in self.products(e).into_iter().zip(words.chunks_exact(UNITS * WORDS)) {
            let columns = e.row(columns, product, 2 * DEPTH);
            for tile in 0..TOKENS / COLUMNS {
                let at = e.gep_const(columns, tile * COLUMNS * TOKEN_BYTES);
                let both = e.load(at, I32.x(2), 8);
                let b = [e.extract(both, 0), e.extract(both, 1)];
                for (unit, a) in words.chunks_exact(WORDS).enumerate() {
                    let sums = &mut acc[(unit * TOKENS / COLUMNS + tile) * SUMS..][..SUMS];
                    let c = [sums[0], sums[1], sums[2], sums[3]];
                    sums.copy_from_slice(&e.matrix_product("m16n8k16.row.col.bf16", a, &b, c));
                }
            }
        }
    }

    /// Stores a warp's sums where every thread of the block finds them.
    fn leave(&self, e: &mut Emitter, acc: &[Val]) {
        let bytes = self.sum_bytes(e);
        let own = e.sub(self.strip, self.base);
        for (unit, sums) in acc.chunks_exact(TOKENS / COLUMNS * SUMS).enumerate() {
            let strips = Shape::of_warp(self.component);
            let to = e.row(self.sums[unit / strips], self.quarter, TOKENS * bytes);
            let to = e.row(to, own, 4 * STRIP);
            let to = e.gep_const(to, unit % strips * 4 * STRIP);
            let to = e.row(to, self.group, 4 * ROWS);
            let to = e.row(to, self.pair, 2 * bytes);
            for (i, sum) in sums.iter().enumerate() {
                let (tile, row, token) = (i / SUMS, i % SUMS / 2, i % 2);
                let to = e.gep_const(to, (tile * COLUMNS + token) * bytes + 4 * row);
                e.store(*sum, to, 4);
            }
        }
    }

    /// The epilogue, a row of the block a thread, token by token.
    fn results(&self, e: &mut Emitter) -> Result<()> {
        let (contraction, mut result) = (Contraction { d: self.d, component: self.component }, Ok(()));
        let (rows, bytes) = (self.rows(e), self.sum_bytes(e));
        let strips = e.i64((self.component.n.div_ceil(STRIP) * STRIP) as i64);
        e.strided(TOKENS * rows, |e, i| {
            let size = e.i64(rows as i64);
            let (token, row) = (e.div(i, size), e.rem(i, size));
            let mut values: BTreeMap<ValueId, Val> = BTreeMap::new();
            for (dot, sums) in self.component.dots.iter().zip(&self.sums) {
                let from = e.row(*sums, token, bytes);
                let from = e.row(from, row, 4);
                let parts = (0..self.shape.quarters).map(|quarter| {
                    let at = e.gep_const(from, quarter * TOKENS * bytes);
                    e.load(at, F32, 4)
                });
                let parts: Vec<Val> = parts.collect();
                values.insert(dot.value, parts.into_iter().reduce(|a, b| e.add(a, b)).unwrap_or(from));
            }
            let (token, before, one) = (e.add(self.first, token), e.scaled(self.base, STRIP, 0), e.i64(1));
            let (column, end) = (e.add(before, row), e.sub(strips, one));
            let (there, wanted) = (e.cmp(Cmp::Lt, column, strips), e.cmp(Cmp::Le, token, self.last));
            let (column, counts) = (e.min(column, end), e.and(there, wanted));
            let place = Place { token: e.min(token, self.last), element: column, column, counts };
            result = contraction.epilogue(e, values, place);
        });
        result
    }
}

/// Four codes as reals in two pairs of bf16: `(code - zero) * scale`, with a minimum `code * scale + min`.
fn bf16_of_codes(e: &mut Emitter, int: IntFormat, codes: Val, (scale, min): (Val, Option<Val>)) -> [Val; 2] {
    // 2^23 has its lowest digit at 1: a byte there is an integer added to it, without a conversion.
    const UNIT: i64 = 0x4b00_0000;
    if int.zero == Zero::E4M3 {
        let reals = weights::reals_of_codes(e, int, codes).map(|code| e.mul(code, scale));
        return bf16_pairs(e, reals);
    }
    let (signed, zero) = weights::offset(int);
    let (codes, zero) = if signed {
        let flip = e.int(I32, 0x8080_8080_u32.cast_signed().into());
        (e.xor(codes, flip), 128.0)
    } else {
        (codes, f32::from(zero))
    };
    let reals = [0, 8, 16, 24].map(|by| {
        let (byte, unit, low) = (e.shr(codes, by), e.int(I32, UNIT), e.int(I32, 255));
        let byte = e.and(byte, low);
        let real = e.or(byte, unit);
        let (real, offset) = (e.convert("bitcast", real, F32), e.float(F32, 8_388_608.0 + zero));
        let code = e.sub(real, offset);
        match min {
            Some(min) => e.fma(code, scale, min),
            None => e.mul(code, scale),
        }
    });
    bf16_pairs(e, reals)
}

/// Rounds four reals to two pairs of bf16.
fn bf16_pairs(e: &mut Emitter, reals: [Val; 4]) -> [Val; 2] {
    [0, 2].map(|first| {
        let both = e.intrinsic("llvm.nvvm.ff2bf16x2.rn", &[reals[first + 1], reals[first]], BF16.x(2));
        let word = e.bitcast(both, I32.x(1));
        e.extract(word, 0)
    })
}
