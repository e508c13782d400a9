//! Integer products: unsigned weight codes times signed int8 activations.
//!
//! For each unit of codes (32 columns, or a group where that is less) every token has an integer accumulator for each strip.
//! Quads of codes are unpacked one or two at a time and multiplied with all tokens at once, so that neighbouring dot
//! products do not wait for one another:
//!
//! ```text
//! sum[token]   = -zero * sum(x)                     0 for formats with a minimum, and where codes are signed bytes
//! for quad:  for token:  sum[token] += codes[quad] . x[token][quad]
//! acc[token]  += float(sum) * (scale_w * scale_x)   and, with a minimum, acc += min_w * (scale_x * sum(x))
//! ```
//!
//! A zero point of a group is a minimum: `-scale_w * zero`, exact in f32. 4-bit floats are looked up in a table of integers
//! when they are unpacked.

use super::isa::{self, dot4};
use super::{Rows, part_at};
use crate::emit::{Emitter, F16, F32, I8, I32, Val};
use mansard_ir::formats::{DType, E2M1, E2M1_ZERO, IntFormat, Zero};
use mansard_ir::layout::{A8, ALIGN, STRIP, StripLayout, code_bytes, high_bytes};
use mansard_ir::target::Target;

/// Every row against every strip, weight group by weight group where those are wide, else line of activations by line.
pub fn tile(
    e: &mut Emitter,
    target: &Target,
    (int, layout): (IntFormat, StripLayout),
    k: usize,
    strips: &[Val],
    rows: Rows,
    accumulators: &[Val],
) -> Vec<Val> {
    let weights = Weights { target, int, layout };
    let dot = Tile { weights, strips, rows };
    let lines = (int.group / A8::GROUP).max(1);
    let (low, high, step) = (e.i64(0), e.i64((k / A8::GROUP) as i64), e.i64(lines as i64));
    e.for_loop((low, high, step), accumulators, |e, line, acc| {
        if lines == 1 {
            return dot.line(e, line, None, acc);
        }
        let group = e.div(line, step);
        let figures: Vec<Figures> = strips.iter().map(|s| weights.figures(e, *s, group)).collect();
        let (end, one) = (e.add(line, step), e.i64(1));
        e.for_loop((line, end, one), acc, |e, line, acc| dot.line(e, line, Some(&figures), acc))
    })
}

/// Scales and minima of one weight group of 16 rows, as f32.
#[derive(Clone, Copy)]
pub struct Figures {
    scale: Val,
    min: Option<Val>,
}

/// How a matrix's strips are read.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// What for.
    pub target: &'a Target,
    /// The format's row of the table.
    pub int: IntFormat,
    /// Where the parts of a strip lie.
    pub layout: StripLayout,
}

/// A register tile.
struct Tile<'a> {
    weights: Weights<'a>,
    strips: &'a [Val],
    rows: Rows,
}

impl<'a> Weights<'a> {
    /// A matrix of `k` columns; `None` where `dtype` is of reals.
    pub fn of(target: &'a Target, dtype: DType, k: usize) -> Option<Weights<'a>> {
        Some(Weights { target, int: dtype.int()?, layout: StripLayout::new(dtype, k) })
    }

    /// Figures of unit `unit` from line `line` on.
    pub fn unit_figures(&self, e: &mut Emitter, strip: Val, (line, unit): (Val, usize)) -> Figures {
        let column = e.scaled(line, A8::GROUP, unit * self.int.unit());
        let group = e.i64(self.int.group as i64);
        let group = e.div(column, group);
        self.figures(e, strip, group)
    }

    /// Units of a line.
    pub fn units(&self) -> usize {
        A8::GROUP / self.int.unit()
    }

    /// Unit `part` of line `line`.
    pub fn unit(self, strip: Val, line: Val, part: usize) -> UnitAt<'a> {
        UnitAt { weights: self, strip, line, units: self.units(), part }
    }

    /// Figures of group `group` of a strip.
    pub fn figures(&self, e: &mut Emitter, strip: Val, group: Val) -> Figures {
        let real = |e: &mut Emitter, offset| {
            let at = part_at(e, &self.layout, strip, group, (offset, self.layout.chunk / self.int.group, 2 * STRIP));
            half_reals(e, at)
        };
        let scale = real(e, self.layout.scales);
        let second = self.int.zero.has_mins().then(|| real(e, self.layout.mins));
        Figures::new(e, self.int, scale, second)
    }
}

impl Figures {
    /// Of a scale, and of a minimum or a zero point where the format has them.
    fn new(e: &mut Emitter, int: IntFormat, scale: Val, second: Option<Val>) -> Figures {
        let min = second.map(|second| if int.zero == Zero::Point { zero_point(e, scale, second) } else { second });
        Figures { scale, min }
    }

    /// Adds a group's sum, of what its codes alone stand for.
    pub fn scaled(self, e: &mut Emitter, sum: Val, acc: Val) -> Val {
        e.fma(sum, self.scale, acc)
    }

    /// The reals of 16 rows with these codes, less a zero point that all share.
    pub fn reals(self, e: &mut Emitter, codes: Val) -> Val {
        match self.min {
            Some(min) => e.fma(codes, self.scale, min),
            None => e.mul(codes, self.scale),
        }
    }
}

/// What a zero point adds to every real: `-scale * zero`.
pub fn zero_point(e: &mut Emitter, scale: Val, zero: Val) -> Val {
    let product = e.mul(scale, zero);
    e.neg(product)
}

/// Adds the integer sum of part `part` of a line's `parts` to an accumulator.
pub fn scaled(
    e: &mut Emitter,
    Figures { scale, min }: Figures,
    (parts, part): (usize, usize),
    x: Val,
    sum: Val,
    acc: Val,
) -> Val {
    let sum = e.convert("sitofp", sum, F32);
    let x_scale = splat(e, x, A8::SCALE, F32);
    let both = e.mul(scale, x_scale);
    let acc = e.fma(sum, both, acc);
    let Some(min) = min else { return acc };
    let real_sum = if parts == 1 { A8::REAL_SUM } else { A8::REAL_SUM_16 + 4 * part };
    let real_sum = splat(e, x, real_sum, F32);
    e.fma(min, real_sum, acc)
}

impl Tile<'_> {
    /// Asks for the weights that follow a line's, some way ahead: into the second-level cache, which waits for more lines at once.
    fn prefetch(&self, e: &mut Emitter, line: Val) {
        if self.rows.prefetch == 0 {
            return;
        }
        let bytes = self.weights.layout.chunk_bytes * A8::GROUP / self.weights.layout.chunk;
        for strip in self.strips {
            let from = e.row(*strip, line, bytes);
            for at in (0..bytes).step_by(ALIGN) {
                let ahead = e.i64((self.rows.prefetch + at) as i64);
                e.prefetch(from, ahead, 2);
            }
        }
    }

    /// One line of activations of every row against every strip; `figures` of each strip where several lines share them.
    fn line(&self, e: &mut Emitter, line: Val, figures: Option<&[Figures]>, acc: &[Val]) -> Vec<Val> {
        let (mut acc, rows) = (acc.to_vec(), self.rows);
        self.prefetch(e, line);
        let first = e.row(rows.first, line, A8::LINE * rows.planes);
        let at = |r: usize, plane: usize| r * rows.stride + plane * A8::LINE;
        let lines: Vec<usize> = (0..rows.count).flat_map(|r| (0..rows.planes).map(move |p| at(r, p))).collect();
        let lines: Vec<Val> = lines.into_iter().map(|at| e.gep_const(first, at)).collect(); // [row][plane]
        let parts = self.weights.units();
        for part in 0..parts {
            let units: Vec<UnitAt<'_>> = self.strips.iter().map(|s| self.weights.unit(*s, line, part)).collect();
            let sums = self.sums(e, &units, &lines); // [strip][row][plane]
            for (s, unit) in units.iter().enumerate() {
                let figures = match figures {
                    Some(figures) => figures[s],
                    None => unit.figures(e),
                };
                for (i, x) in lines.iter().enumerate() {
                    let acc = &mut acc[s * rows.count + i / rows.planes];
                    *acc = scaled(e, figures, (parts, part), *x, sums[s * lines.len() + i], *acc);
                }
            }
        }
        acc
    }

    /// Integer products of one unit of every strip with every line of activations: `sums[strip][line]`.
    fn sums(&self, e: &mut Emitter, units: &[UnitAt<'_>], lines: &[Val]) -> Vec<Val> {
        let mut sums: Vec<Val> = lines.iter().map(|x| units[0].first_sum(e, *x)).collect();
        sums = units.iter().flat_map(|_| sums.clone()).collect();
        for packed in 0..units[0].lines() {
            let codes: Vec<Vec<(usize, Val)>> = units.iter().map(|unit| unit.codes(e, packed)).collect();
            for i in 0..codes[0].len() {
                for (l, x) in lines.iter().enumerate() {
                    let (quad, _) = codes[0][i];
                    let dword = splat(e, *x, units[0].part * self.weights.int.unit() + 4 * quad, I32);
                    let bytes = e.bitcast(dword, I8.x(4 * STRIP));
                    for (s, codes) in codes.iter().enumerate() {
                        let sum = &mut sums[s * lines.len() + l];
                        *sum = dot4(e, self.weights.target, self.weights.int.bits, *sum, codes[i].1, bytes);
                    }
                }
            }
        }
        sums
    }
}

/// The f16 values of 16 rows, as f32.
fn half_reals(e: &mut Emitter, at: Val) -> Val {
    let value = e.load(at, F16.x(STRIP), 32);
    e.convert("extf", value, F32)
}

/// The 32-bit value at `x + offset` in every lane.
fn splat(e: &mut Emitter, x: Val, offset: usize, ty: crate::emit::Ty) -> Val {
    let at = e.gep_const(x, offset);
    let value = e.load(at, ty, 4);
    e.broadcast(value, STRIP)
}

/// Weights of a strip whose codes are packed together: unit `line * units + part`.
pub struct UnitAt<'a> {
    /// Of which strips.
    pub weights: Weights<'a>,
    strip: Val,
    line: Val,
    units: usize,
    part: usize,
}

impl UnitAt<'_> {
    /// Address of what this unit has at `offset` of its chunk, `bytes` a unit.
    fn at(&self, e: &mut Emitter, offset: usize, bytes: usize) -> Val {
        let lines = (offset, self.weights.layout.chunk / A8::GROUP, self.units * bytes);
        let p = part_at(e, &self.weights.layout, self.strip, self.line, lines);
        e.gep_const(p, self.part * bytes)
    }

    /// Scales and minima, where the unit is a group.
    fn figures(&self, e: &mut Emitter) -> Figures {
        let real = |e: &mut Emitter, offset| {
            let at = self.at(e, offset, 2 * STRIP);
            half_reals(e, at)
        };
        let scale = real(e, self.weights.layout.scales);
        let second = self.weights.int.zero.has_mins().then(|| real(e, self.weights.layout.mins));
        Figures::new(e, self.weights.int, scale, second)
    }

    /// What a line's integer sum starts from.
    fn first_sum(&self, e: &mut Emitter, x: Val) -> Val {
        match self.weights.int.zero.fixed() {
            Some(zero) if zero as i64 != isa::code_offset(self.weights.target, self.weights.int.bits) => {
                let neg = splat(e, x, if self.units == 1 { A8::NEG_SUM } else { A8::NEG_SUM_16 + 4 * self.part }, I32);
                e.shl(neg, zero.trailing_zeros() as i64)
            }
            _ => e.int(I32.x(STRIP), 0),
        }
    }

    /// Lines of 64 bytes that hold its codes, or the low 4 bits of them.
    pub fn lines(&self) -> usize {
        self.weights.int.unit() / if self.weights.int.bits == 8 { 4 } else { 8 }
    }

    /// One of these lines.
    pub fn packed(&self, e: &mut Emitter, line: usize) -> Val {
        let at = self.at(e, self.weights.layout.codes, code_bytes(self.weights.int));
        let at = e.gep_const(at, 64 * line);
        e.load(at, I8.x(4 * STRIP), 64)
    }

    /// The quads in line `packed` of the unit, each with its codes: 64 unsigned bytes.
    pub fn codes(&self, e: &mut Emitter, packed: usize) -> Vec<(usize, Val)> {
        let bytes = I8.x(4 * STRIP);
        let line = self.packed(e, packed);
        if self.weights.int.bits == 8 {
            return vec![(packed, isa::operand(e, self.weights.target, 8, line))];
        }
        let fifteen = e.int(bytes, 15);
        let low = e.and(line, fifteen);
        let high = e.shr(line, 4);
        let mut codes = [(packed, low), (packed + self.weights.int.unit() / 8, high)];
        if self.weights.int.zero == Zero::E2M1 {
            let table = E2M1.map(|twice| (twice + E2M1_ZERO.cast_signed()).cast_unsigned());
            codes = codes.map(|(quad, index)| (quad, isa::look_up(e, self.weights.target, table, index)));
        }
        codes.into_iter().map(|(quad, codes)| (quad, self.with_high_bits(e, quad, codes))).collect()
    }

    /// Adds bits 4 and 5, where the format has them.
    fn with_high_bits(&self, e: &mut Emitter, quad: usize, codes: Val) -> Val {
        let bytes = codes.ty;
        if high_bytes(self.weights.int) == 0 {
            return codes;
        }
        let at = self.at(e, self.weights.layout.high, high_bytes(self.weights.int));
        if self.weights.int.bits == 5 {
            let p = e.gep_const(at, 8 * quad);
            let bits = isa::where_bits(e, self.weights.target, p, 16);
            return e.or(codes, bits);
        }
        let p = e.gep_const(at, 64 * (quad / 4));
        let crumbs = e.load(p, bytes, 64);
        let moved = match quad % 4 {
            0 => e.shl(crumbs, 4),
            1 => e.shl(crumbs, 2),
            2 => crumbs,
            _ => e.shr(crumbs, 2),
        };
        let mask = e.int(bytes, 0x30);
        let bits = e.and(moved, mask);
        e.or(codes, bits)
    }
}
