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
//! and `2 t + 1`. Warps wait for nobody.

use super::super::weights::{self, Figures, Packed};
use super::{Component, Contraction, Device, Place, each, internal};
use crate::cpu::contract::Dot;
use crate::emit::{Cmp, Emitter, F32, I32, Val, WARP};
use mansard_ir::formats::IntFormat;
use mansard_ir::layout::{A8, STRIP, StripLayout, row_bytes};
use mansard_ir::{DType, Result};
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
        Some(int) => int.unit() == A8::GROUP && dot.activations != DType::BF16,
        None => dot.dtype == DType::BF16 && dot.activations == DType::BF16 && dot.k.is_multiple_of(16),
    })
}

/// Emits a kernel whose components all suit: warps share the panels of tokens of every strip.
pub(super) fn emit(e: &mut Emitter, d: &Device<'_>, components: &[Component], rows: Val) -> Result<()> {
    let (lane, warp) = e.lane_and_warp();
    let (size, one, four) = (e.i64(TOKENS as i64), e.i64(1), e.i64(4));
    let padded = e.scaled(rows, 1, TOKENS - 1);
    let panels = e.div(padded, size);
    let strips = e.i64(components.iter().map(|c| c.n.div_ceil(STRIP)).sum::<usize>() as i64);
    let items = e.mul(panels, strips);
    let warps = e.i64((e.block_threads() / WARP) as i64);
    let before = e.mul(d.k.thread, warps);
    let (first, step) = (e.add(before, warp), e.mul(d.k.threads, warps));
    let (group, pair, last) = (e.div(lane, four), e.rem(lane, four), e.sub(rows, one));
    let mut result = Ok(());
    e.for_loop((first, items, step), &[], |e, index, _| {
        let (panel, strip) = (e.rem(index, panels), e.div(index, panels));
        let panel = Panel { first: e.mul(panel, size), last, group, pair };
        result = each(e, components, strip, |e, component, strip| {
            let contraction = Contraction { d, component };
            let mut sums = BTreeMap::new();
            for dot in &component.dots {
                sums.insert(dot.value, product(e, d, dot, strip, &panel)?);
            }
            for i in 0..TILES * SUMS {
                let start = sums.iter().map(|(value, sums)| (*value, sums[i])).collect();
                let place = panel.place(e, strip, i);
                contraction.epilogue(e, start, place)?;
            }
            Ok(())
        });
        vec![]
    });
    result
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

    /// Where the lane's sum `i` goes.
    fn place(&self, e: &mut Emitter, strip: Val, i: usize) -> Place {
        let (tile, row, column) = (i / SUMS, i % SUMS / 2, i % 2);
        let row = e.scaled(self.group, ROWS, row);
        let first = e.scaled(strip, STRIP, 0);
        let element = e.add(first, row);
        let ahead = e.scaled(self.pair, 2, tile * COLUMNS + column);
        let token = e.add(self.first, ahead);
        let counts = e.cmp(Cmp::Le, token, self.last);
        Place { token: e.min(token, self.last), element, column: element, counts }
    }
}

/// One contraction's strip times a panel: sums `[tile][row][token]` of a lane.
fn product(e: &mut Emitter, d: &Device<'_>, dot: &Dot, strip: Val, panel: &Panel) -> Result<Vec<Val>> {
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
    let (zero, end, one) = (e.i64(0), e.i64((dot.k / columns) as i64), e.i64(1));
    Ok(e.for_loop((zero, end, one), &[nothing; TILES * SUMS], |e, step, acc| {
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
        let mut quads = self.packed.quads(e, int, self.strip, line, group).1;
        if int.bits == 8 {
            let line = e.scaled(line, 1, 4);
            quads.extend(self.packed.quads(e, int, self.strip, line, group).1);
        }
        quads.into_iter().flat_map(|quad| quad.codes).collect()
    }

    /// 32 columns of codes.
    fn codes(&self, e: &mut Emitter, int: IntFormat, unit: Val, acc: &mut [Val]) {
        let a = self.fragment(e, int, unit);
        let figures = self.packed.figures(e, int, self.strip, unit, self.panel.group);
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
