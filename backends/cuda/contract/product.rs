//! Inner products of a strip's 16 rows with some rows of activations, by all threads of a block.
//!
//! ```text
//! thread 32 w + 4 g + q:   lines 8 w + g, 8 w + g + 64 ..  of rows 4 q .. 4 q + 3
//! partials f32[tokens][64][16], a few words more from token to token      part 8 w + g of every output
//! ```

use super::super::weights::{self, Figures, Packed, Places, ROWS};
use super::ring::{Feed, part_and_quarter};
use crate::cpu::contract::Dot;
use crate::emit::{BF16, Emitter, F32, I32, Val};
use crate::math;
use mansard_ir::formats::IntFormat;
use mansard_ir::layout::{A8, STRIP};
use mansard_ir::{DType, Result, bail};

/// Parts that the sum of an output has.
pub(super) const PARTS: usize = super::THREADS / ROWS;

/// Bytes from token to token: the rows of two tokens lie in different banks.
const TOKEN_BYTES: usize = (PARTS + 1) * STRIP * 4;

/// Bytes of the partial sums of so many tokens.
pub(in crate::cuda) fn partial_bytes(tokens: usize) -> usize {
    tokens * TOKEN_BYTES
}

/// One contraction's strip and rows, as a thread sees them.
struct Product<'a> {
    dot: &'a Dot,
    packed: Packed,
    strip: Val,
    rows: &'a [Val],
    /// Which quarter of the strip's rows is the thread's.
    quarter: Val,
}

/// Leaves each thread's sums at `partials`; weights come through a ring where there is one.
///
/// # Errors
/// Where no kernel reads such weights.
pub(in crate::cuda) fn partial_sums(
    e: &mut Emitter,
    dot: &Dot,
    (strip, feed): (Val, Option<Feed<'_>>),
    rows: &[Val],
    partials: Val,
) -> Result<()> {
    let packed = Packed::new(dot.dtype, dot.k);
    let (part, quarter) = part_and_quarter(e);
    let product = Product { dot, packed, strip, rows, quarter };
    let nothing = e.float(F32, 0.0);
    let mut carried = vec![part];
    carried.extend(vec![nothing; rows.len() * ROWS]);
    // Several lines at a time, so that many loads are under way at once.
    let together = if rows.len() > 2 { 2 } else { 4 };
    let (lines, mut result) = (packed.lines(), Ok(()));
    let rest = e.i64(PARTS as i64);
    let mut add = |e: &mut Emitter, line: Val, places: Option<Places>, acc: &mut [Val]| {
        result = std::mem::replace(&mut result, Ok(())).and(product.line(e, line, places, acc));
    };
    if let Some(feed) = feed {
        let acc = feed.each(e, &carried[1..], |e, line, places, acc| add(e, line, Some(places), acc));
        carried = vec![e.scaled(part, 1, feed.rounds() * PARTS)];
        carried.extend(acc);
    } else if lines > PARTS * (together - 1) {
        let (end, step) = (e.i64((lines - PARTS * (together - 1)) as i64), e.i64((PARTS * together) as i64));
        carried = e.for_loop((part, end, step), &carried, |e, line, carried| {
            let mut acc = carried[1..].to_vec();
            for i in 0..together {
                let line = e.scaled(line, 1, i * PARTS);
                add(e, line, None, &mut acc);
            }
            let mut next = vec![e.add(line, step)];
            next.extend(acc);
            next
        });
    }
    let end = e.i64(lines as i64);
    let acc = e.for_loop((carried[0], end, rest), &carried[1..], |e, line, acc| {
        let mut acc = acc.to_vec();
        add(e, line, None, &mut acc);
        acc
    });
    let to = e.row(partials, part, STRIP * 4);
    let to = e.row(to, quarter, ROWS * 4);
    for (i, sum) in acc.into_iter().enumerate() {
        let to = e.gep_const(to, i / ROWS * TOKEN_BYTES + i % ROWS * 4);
        e.store(sum, to, 4);
    }
    result
}

/// The output of this thread: the sum over all parts, for token `thread / 16 % tokens` and row `thread % 16`.
pub(in crate::cuda) fn sum_of_parts(e: &mut Emitter, tokens: usize, partials: Val) -> Val {
    const STRAIGHT: usize = 8;
    let (thread, lanes, outputs) = (e.thread(), e.i64(STRIP as i64), e.i64((STRIP * tokens) as i64));
    let own = e.rem(thread, outputs);
    let (token, row) = (e.div(own, lanes), e.rem(own, lanes));
    let from = e.row(partials, token, TOKEN_BYTES);
    let from = e.row(from, row, 4);
    let (zero, end, step, nothing) = (e.i64(0), e.i64(PARTS as i64), e.i64(STRAIGHT as i64), e.float(F32, 0.0));
    e.for_loop((zero, end, step), &[nothing], |e, part, sum| {
        let from = e.row(from, part, STRIP * 4);
        let sum = (0..STRAIGHT).fold(sum[0], |sum, i| {
            let at = e.gep_const(from, i * STRIP * 4);
            let x = e.load(at, F32, 4);
            e.add(sum, x)
        });
        vec![sum]
    })[0]
}

impl Product<'_> {
    /// Adds the products of one line, which lies in its strip or at `places`, to the sums `[token][row]`.
    fn line(&self, e: &mut Emitter, line: Val, places: Option<Places>, acc: &mut [Val]) -> Result<()> {
        let places = places.unwrap_or_else(|| self.packed.places(e, self.strip, line, self.quarter));
        let [Some(at), scales, mins] = places else { bail!(Internal, "a line of {} is nowhere", self.dot.dtype) };
        match self.dot.dtype.int() {
            Some(int) => {
                let quads = self.packed.quads(e, int, (self.strip, line, self.quarter), at);
                let figures = self.packed.figures(e, int, [scales, mins]);
                self.codes(e, int, &quads, &figures, acc);
                Ok(())
            }
            None => self.floats(e, line, at, acc),
        }
    }

    fn floats(&self, e: &mut Emitter, line: Val, at: Val, acc: &mut [Val]) -> Result<()> {
        let reals = self.packed.reals(e, at)?;
        let first = e.scaled(line, reals.len(), 0);
        for (i, reals) in reals.iter().enumerate() {
            let column = e.scaled(first, 1, i);
            for (t, row) in self.rows.iter().enumerate() {
                let mut x = self.real(e, *row, column);
                if i > 0 && !self.dot.k.is_multiple_of(2) {
                    // What follows an odd last column may be anything.
                    let (end, zero) = (e.i64(self.dot.k as i64), e.float(F32, 0.0));
                    let inside = e.cmp(crate::emit::Cmp::Lt, column, end);
                    x = e.select(inside, x, zero);
                }
                for (r, w) in reals.iter().enumerate() {
                    acc[t * ROWS + r] = e.fma(*w, x, acc[t * ROWS + r]);
                }
            }
        }
        Ok(())
    }

    /// The activation in a column of a row of floats.
    fn real(&self, e: &mut Emitter, row: Val, column: Val) -> Val {
        let (ty, bytes) = if self.dot.activations == DType::BF16 { (BF16, 2) } else { (F32, 4) };
        let at = e.row(row, column, bytes);
        let x = e.load(at, ty, bytes);
        weights::widened(e, x)
    }

    fn codes(&self, e: &mut Emitter, int: IntFormat, quads: &[weights::Quad], figures: &Figures, acc: &mut [Val]) {
        for quad in quads {
            for (t, row) in self.rows.iter().enumerate() {
                let acc = &mut acc[t * ROWS..][..ROWS];
                if self.dot.activations == DType::BF16 {
                    self.widened(e, int, figures, quad, *row, acc);
                } else if !self.dot.dtype.is_integer() {
                    self.exact(e, int, figures, quad, *row, acc);
                } else {
                    for plane in 0..self.dot.planes {
                        self.quad(e, int, figures, quad, (*row, plane), acc);
                    }
                }
            }
        }
    }

    /// A quad times int8 activations: integer products, then the scales of both.
    fn quad(
        &self,
        e: &mut Emitter,
        int: IntFormat,
        figures: &Figures,
        quad: &weights::Quad,
        (row, plane): (Val, usize),
        acc: &mut [Val],
    ) {
        let size = e.i64(A8::GROUP as i64);
        let (group, within) = (e.div(quad.column, size), e.rem(quad.column, size));
        let group = e.row(row, group, A8::LINE * self.dot.planes);
        let group = e.gep_const(group, plane * A8::LINE);
        let scale = e.gep_const(group, A8::SCALE);
        let scale = e.load(scale, F32, 4);
        let at = e.gep(group, within);
        let x = e.load(at, I32, 4);
        let (signed, zero) = weights::offset(int);
        let (none, ones) = (e.int(I32, 0), e.int(I32, 0x0101_0101));
        let mut first = none;
        let needs_sum = zero > 0 || figures.mins.is_some();
        let sum_of_x = if needs_sum { e.dot4(false, ones, x, none) } else { none };
        if zero > 0 {
            let minus = e.int(I32, -i64::from(zero));
            first = e.mul(sum_of_x, minus);
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            let sum = e.dot4(signed, quad.codes[r], x, first);
            let sum = e.convert("sitofp", sum, F32);
            let both = e.mul(figures.scales[r], scale);
            *acc = e.fma(sum, both, *acc);
        }
        if let Some(mins) = &figures.mins {
            let real = e.convert("sitofp", sum_of_x, F32);
            let real = e.mul(real, scale);
            for (acc, min) in acc.iter_mut().zip(mins) {
                *acc = e.fma(*min, real, *acc);
            }
        }
    }

    /// A quad times bf16 activations: codes become reals, as bf16 too.
    fn widened(
        &self,
        e: &mut Emitter,
        int: IntFormat,
        figures: &Figures,
        quad: &weights::Quad,
        row: Val,
        acc: &mut [Val],
    ) {
        let x = [0, 1, 2, 3].map(|byte| {
            let column = e.scaled(quad.column, 1, byte);
            self.real(e, row, column)
        });
        for (r, acc) in acc.iter_mut().enumerate() {
            for (code, x) in weights::reals_of_codes(e, int, quad.codes[r]).into_iter().zip(x) {
                let real = match &figures.mins {
                    Some(mins) => e.fma(code, figures.scales[r], mins[r]),
                    None => e.mul(code, figures.scales[r]),
                };
                let real = math::round_bf16(e, real);
                let real = weights::widened(e, real);
                *acc = e.fma(real, x, *acc);
            }
        }
    }

    /// A quad of 8-bit floats times f32 activations: their products, then the scale.
    fn exact(
        &self,
        e: &mut Emitter,
        int: IntFormat,
        figures: &Figures,
        quad: &weights::Quad,
        row: Val,
        acc: &mut [Val],
    ) {
        let at = e.row(row, quad.column, 4);
        let x = e.load(at, F32.x(4), 16);
        let x = [0, 1, 2, 3].map(|column| e.extract(x, column));
        for (r, acc) in acc.iter_mut().enumerate() {
            let nothing = e.float(F32, 0.0);
            let codes = weights::reals_of_codes(e, int, quad.codes[r]).into_iter().zip(x);
            let sum = codes.fold(nothing, |sum, (code, x)| e.fma(code, x, sum));
            *acc = e.fma(sum, figures.scales[r], *acc);
        }
    }
}
