//! Contractions for many tokens on tensor cores: a warp multiplies a strip's 16 rows with 32 tokens.
//!
//! ```text
//! for 32 columns:  a = strip[16 rows, 32 columns]                     from memory as it is packed, codes unpacked once
//!   for 8 tokens:  d = a x[32 columns, 8 tokens]                      mma.sync m16n8k32 of bytes, sums in i32
//!                  acc += float(d) * (scale_w * scale_x)              and with a minimum, acc += min_w * (scale_x * sum(x))
//! ```
//!
//! bf16 is multiplied 16 columns at a time, with sums in f32. Lane `4 g + t` has words `t` and `t + 4` of rows `2 g` and
//! `2 g + 1`, which are neighbours in memory: the unit's rows `g` and `g + 8`. Its sums are those rows' with tokens `2 t`
//! and `2 t + 1`.
//!
//! Where there is enough to do for every warp of the grid, each has a strip and panel for itself and waits for nobody. Else
//! the warps of a block divide the columns of one strip and panel, and their sums meet in shared memory.

use super::super::weights::{self, Figures, Packed, Quad};
use super::{Component, Contraction, Device, Place, each, internal, strips};
use crate::cpu::contract::Dot;
use crate::emit::{Cmp, Emitter, F32, I32, Val, WARP};
use mansard_ir::formats::IntFormat;
use mansard_ir::layout::{A8, STRIP, StripLayout, row_bytes};
use mansard_ir::{DType, Result, ValueId};
use std::collections::BTreeMap;

/// Tokens of one product.
const COLUMNS: usize = 8;

/// Products side by side.
const TILES: usize = 4;

/// Tokens of a warp's panel.
const TOKENS: usize = COLUMNS * TILES;

/// Rows of a strip that a lane has.
const ROWS: usize = 2;

/// Sums of a product that a lane has: two rows with two tokens.
const SUMS: usize = 4;

/// Tensor cores multiply what every contraction of a component does: int8 with codes in units of 32, or bf16.
pub(super) fn suits(component: &Component) -> bool {
    component.dots.iter().all(|dot| match dot.dtype.int() {
        Some(int) => int.unit() == A8::GROUP && dot.activations.planes().is_some(),
        None => dot.dtype == DType::BF16 && dot.activations == DType::BF16 && dot.k.is_multiple_of(16),
    })
}

/// Emits a kernel whose components all suit: warps, or blocks, share the panels of tokens of every strip.
pub(super) fn emit(e: &mut Emitter, d: &Device<'_>, components: &[Component], rows: Val) -> Result<()> {
    let (lane, warp) = e.lane_and_warp();
    let (size, zero, one, four) = (e.i64(TOKENS as i64), e.i64(0), e.i64(1), e.i64(4));
    let padded = e.scaled(rows, 1, TOKENS - 1);
    let panels = e.div(padded, size);
    let counts = strips(components);
    let strips = e.i64(counts.iter().sum::<usize>() as i64);
    let items = e.mul(panels, strips);
    let warps = e.i64((e.block_threads() / WARP) as i64);
    let (before, all) = (e.mul(d.k.thread, warps), e.mul(d.k.threads, warps));
    let own = e.add(before, warp);
    let few = e.cmp(Cmp::Lt, items, all);
    let (first, step) = (e.select(few, d.k.thread, own), e.select(few, d.k.threads, all));
    let parts = Parts { few, part: e.select(few, warp, zero), parts: e.select(few, warps, one) };
    let (group, pair, last) = (e.div(lane, four), e.rem(lane, four), e.sub(rows, one));
    let mut result = Ok(());
    e.for_loop((first, items, step), &[], |e, index, _| {
        let (panel, strip) = (e.rem(index, panels), e.div(index, panels));
        let panel = Panel { first: e.mul(panel, size), last, group, pair };
        result = each(e, components, &counts, strip, |e, component, strip| {
            let mut sums = BTreeMap::new();
            for dot in &component.dots {
                sums.insert(dot.value, product(e, d, dot, strip, &panel, &parts)?);
            }
            let (mut alone, mut together) = (Ok(()), Ok(()));
            let contraction = Contraction { d, component };
            e.either(
                parts.few,
                |e| together = join(e, &contraction, strip, &panel, &sums),
                |e| {
                    let each = |i: usize| sums.iter().map(|(value, sums)| (*value, sums[i])).collect();
                    alone = (0..TILES * SUMS).try_for_each(|i| {
                        let number = e.i64(i as i64);
                        let place = panel.place(e, strip, number);
                        contraction.epilogue(e, each(i), place)
                    });
                },
            );
            alone.and(together)
        });
        vec![]
    });
    result
}

/// Which columns a warp multiplies: those of unit `part`, and every so many units further.
struct Parts {
    /// The warps of a block share an item.
    few: Val,
    part: Val,
    parts: Val,
}

/// Adds up what the warps of a block have of the same outputs; every thread stores some of them.
fn join(
    e: &mut Emitter,
    contraction: &Contraction<'_>,
    strip: Val,
    panel: &Panel,
    sums: &BTreeMap<ValueId, Vec<Val>>,
) -> Result<()> {
    const OUTPUTS: usize = STRIP * TOKENS;
    let threads = e.block_threads();
    e.scoped(|e| {
        let (lane, warp) = e.lane_and_warp();
        let mut parts = BTreeMap::new();
        for (value, sums) in sums {
            let memory = e.shared(4 * OUTPUTS * threads / WARP);
            let to = e.row(memory, warp, 4 * OUTPUTS);
            let to = e.row(to, lane, 4);
            for (i, sum) in sums.iter().enumerate() {
                let to = e.gep_const(to, 4 * WARP * i);
                e.store(*sum, to, 4);
            }
            parts.insert(*value, memory);
        }
        e.barrier();
        // A thread has the outputs of its lane in every warp.
        let four = e.i64(4);
        let panel = Panel { group: e.div(lane, four), pair: e.rem(lane, four), ..*panel };
        for first in (0..OUTPUTS).step_by(threads) {
            let number = e.scaled(warp, 1, first / WARP);
            let mut start = BTreeMap::new();
            for (value, memory) in &parts {
                let from = e.row(*memory, number, 4 * WARP);
                let from = e.row(from, lane, 4);
                let all = (0..threads / WARP).map(|warp| {
                    let at = e.gep_const(from, 4 * OUTPUTS * warp);
                    e.load(at, F32, 4)
                });
                let all: Vec<Val> = all.collect();
                let zero = e.float(F32, 0.0);
                start.insert(*value, all.into_iter().fold(zero, |sum, part| e.add(sum, part)));
            }
            let place = panel.place(e, strip, number);
            contraction.epilogue(e, start, place)?;
        }
        e.barrier();
        Ok(())
    })
}

/// A warp's tokens, as a lane sees them.
struct Panel {
    /// The first token.
    first: Val,
    /// The last of the step: what lies beyond is computed as it is.
    last: Val,
    /// `lane / 4` and `lane % 4`.
    group: Val,
    pair: Val,
}

impl Panel {
    /// Token `tile * 8 + offset` of the panel, or the last.
    fn token(&self, e: &mut Emitter, tile: usize, offset: Val) -> Val {
        let ahead = e.scaled(offset, 1, tile * COLUMNS);
        let token = e.add(self.first, ahead);
        e.min(token, self.last)
    }

    /// Where the lane's sum number `i` goes: `tile * 4 + row * 2 + token`.
    fn place(&self, e: &mut Emitter, strip: Val, i: Val) -> Place {
        let (sums, two) = (e.i64(SUMS as i64), e.i64(2));
        let (tile, within) = (e.div(i, sums), e.rem(i, sums));
        let (row, column) = (e.div(within, two), e.rem(within, two));
        let rows = e.scaled(self.group, ROWS, 0);
        let row = e.add(rows, row);
        let first = e.scaled(strip, STRIP, 0);
        let element = e.add(first, row);
        let own = e.scaled(self.pair, 2, 0);
        let own = e.add(own, column);
        let before = e.scaled(tile, COLUMNS, 0);
        let ahead = e.add(before, own);
        let token = e.add(self.first, ahead);
        let counts = e.cmp(Cmp::Le, token, self.last);
        Place { token: e.min(token, self.last), element, column: element, counts }
    }
}

/// One contraction's strip times a panel, as far as the warp's part goes: sums `[tile][row][token]` of a lane.
fn product(e: &mut Emitter, d: &Device<'_>, dot: &Dot, strip: Val, panel: &Panel, parts: &Parts) -> Result<Vec<Val>> {
    let stride = row_bytes(d.kernel.body.ty(dot.x)).ok_or_else(|| internal(&d.kernel.body))?;
    let (base, weight) = (d.pointer(dot.x)?, d.pointer(dot.weight)?);
    let strip = e.row(weight, strip, StripLayout::new(dot.dtype, dot.k).bytes);
    // A lane brings the words of one token of a tile, and has the sums of two.
    let second = e.scaled(panel.pair, 2, 1);
    let own = e.scaled(panel.pair, 2, 0);
    let tiles: Vec<[Val; 3]> = (0..TILES)
        .map(|tile| {
            [panel.group, own, second].map(|offset| {
                let token = panel.token(e, tile, offset);
                e.row(base, token, stride)
            })
        })
        .collect();
    let packed = Packed { rows: ROWS, ..Packed::new(dot.dtype, dot.k) };
    let product = Product { dot, packed, strip, panel, tiles };
    let (columns, nothing) = (if dot.dtype.int().is_some() { A8::GROUP } else { 16 }, e.float(F32, 0.0));
    let end = e.i64((dot.k / columns) as i64);
    Ok(e.for_loop((parts.part, end, parts.parts), &[nothing; TILES * SUMS], |e, step, acc| {
        let mut acc = acc.to_vec();
        match dot.dtype.int() {
            Some(int) => product.codes(e, int, step, &mut acc),
            None => product.floats(e, step, &mut acc),
        }
        acc
    }))
}

struct Product<'a> {
    dot: &'a Dot,
    packed: Packed,
    strip: Val,
    panel: &'a Panel,
    /// Of each tile the rows of the token whose words the lane brings, and of those whose sums it has.
    tiles: Vec<[Val; 3]>,
}

impl Product<'_> {
    /// Words `t` and `t + 4` from `at` on.
    fn words(&self, e: &mut Emitter, at: Val) -> [Val; 2] {
        let first = e.row(at, self.panel.pair, 4);
        let second = e.gep_const(first, 16);
        [first, second].map(|at| e.load(at, I32, 4))
    }

    /// 16 columns of bf16.
    fn floats(&self, e: &mut Emitter, step: Val, acc: &mut [Val]) {
        let lines = e.row(self.strip, step, 8 * 4 * STRIP);
        let line = e.row(lines, self.panel.pair, 4 * STRIP);
        let line = e.row(line, self.panel.group, 4 * ROWS);
        let mut a = vec![];
        for more in [0, 4 * 4 * STRIP] {
            let at = e.gep_const(line, more);
            let rows = e.load(at, I32.x(ROWS), 4 * ROWS);
            a.extend((0..ROWS).map(|r| e.extract(rows, r)));
        }
        for (tile, acc) in self.tiles.iter().zip(acc.as_chunks_mut::<SUMS>().0) {
            let at = e.row(tile[0], step, 32);
            let b = self.words(e, at);
            *acc = e.matrix_product("m16n8k16.row.col.bf16", &a, &b, *acc);
        }
    }

    /// The fragment of a unit of codes: two words of each row.
    fn fragment(&self, e: &mut Emitter, int: IntFormat, unit: Val) -> Vec<Val> {
        let (lines, group) = (if int.bits == 8 { 8 } else { 4 }, self.panel.group);
        let first = e.scaled(unit, lines, 0);
        let line = e.add(first, self.panel.pair);
        let mut lines = vec![line];
        if int.bits == 8 {
            lines.push(e.scaled(line, 1, 4));
        }
        let quads = lines.into_iter().flat_map(|line| {
            let [codes, ..] = self.packed.places(e, self.strip, line, group);
            self.packed.quads(e, int, (self.strip, line, group), codes.unwrap_or(line))
        });
        let quads: Vec<Quad> = quads.collect();
        quads.into_iter().flat_map(|quad| quad.codes).collect()
    }

    /// 32 columns of codes.
    fn codes(&self, e: &mut Emitter, int: IntFormat, unit: Val, acc: &mut [Val]) {
        let a = self.fragment(e, int, unit);
        let figures = self.packed.figures_at(e, int, self.strip, unit, self.panel.group);
        let figures = self.packed.figures(e, int, figures);
        let (signed, zero) = weights::offset(int);
        let name = if signed { "m16n8k32.row.col.s8" } else { "m16n8k32.row.col.u8.s8" };
        for (tile, acc) in self.tiles.iter().zip(acc.as_chunks_mut::<SUMS>().0) {
            for plane in 0..self.dot.planes {
                let line = |e: &mut Emitter, row: Val| {
                    let line = e.row(row, unit, A8::LINE * self.dot.planes);
                    e.gep_const(line, plane * A8::LINE)
                };
                let at = line(e, tile[0]);
                let b = self.words(e, at);
                // Scale, minus the sum of the codes, and the scaled sum lie side by side.
                let of_tokens = [tile[1], tile[2]].map(|row| {
                    let at = line(e, row);
                    let at = e.gep_const(at, A8::SCALE);
                    e.load(at, I32.x(4), 16)
                });
                let starts = of_tokens.map(|x| {
                    let (negative, zero) = (e.extract(x, 1), e.int(I32, zero.into()));
                    e.mul(negative, zero)
                });
                let sums = e.matrix_product(name, &a, &b, [starts[0], starts[1], starts[0], starts[1]]);
                for (i, (acc, sum)) in acc.iter_mut().zip(sums).enumerate() {
                    *acc = scaled(e, &figures, i / 2, of_tokens[i % 2], sum, *acc);
                }
            }
        }
    }
}

/// Adds an integer sum of a row and a token to an accumulator.
fn scaled(e: &mut Emitter, figures: &Figures, row: usize, of_token: Val, sum: Val, acc: Val) -> Val {
    let real = |e: &mut Emitter, lane: usize| {
        let bits = e.extract(of_token, lane);
        e.convert("bitcast", bits, F32)
    };
    let (sum, scale) = (e.convert("sitofp", sum, F32), real(e, 0));
    let both = e.mul(figures.scales[row], scale);
    let acc = e.fma(sum, both, acc);
    match &figures.mins {
        Some(mins) => {
            let real_sum = real(e, 2);
            e.fma(mins[row], real_sum, acc)
        }
        None => acc,
    }
}

const _: () = assert!(A8::NEG_SUM == A8::SCALE + 4 && A8::REAL_SUM == A8::SCALE + 8);
