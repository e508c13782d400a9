//! Gathers and angles: a row of a packed table as f32, a row of another value, the rope table of a position.
//!
//! A row of a packed table is every sixteenth value of its strip, so this reads four codes (or one float) at a time: slow
//! for its size, but a token has one such row.

use super::Rows;
use super::walk::{self, LANES};
use crate::cpu::dot::{part_at, zero_point};
use crate::emit::{Cmp, Emitter, F16, F32, I8, I32, I64, Val};
use crate::math;
use mansard_ir::formats::{IntFormat, Zero};
use mansard_ir::layout::{STRIP, StripLayout, code_bytes, high_bytes};
use mansard_ir::{DType, Dim, Node, Result, ValueId, bail};

/// One row inside a strip.
#[derive(Clone, Copy)]
struct StripRow {
    /// The strip's first byte.
    strip: Val,
    /// Row number in the strip.
    row: Val,
    layout: StripLayout,
}

impl StripRow {
    /// Address of the strip's part `index`, of those at `offset` of a chunk that stand for so many columns and bytes.
    fn part(&self, e: &mut Emitter, index: Val, (offset, columns, bytes): (usize, usize, usize)) -> Val {
        part_at(e, &self.layout, self.strip, index, (offset, self.layout.chunk / columns, bytes))
    }
}

impl Rows<'_> {
    /// `embed`: row `tokens[t]` of a packed table.
    pub(super) fn embed(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let (table, dtype) = (self.memory(node.operands[1])?, self.dtype(node.operands[1])?);
        let k = super::schedule::width(self.graph, v)?;
        let token = self.index(e, node.operands[0])?;
        let lanes = e.i64(STRIP as i64);
        let (strip, row) = (e.div(token, lanes), e.rem(token, lanes));
        if let Some((DType::Q8_PLANES, [Dim::N(n), _])) = self.graph.ty(node.operands[1]).as_tensor() {
            super::planes::row(e, table, (*n, k), (strip, row), to);
            return Ok(());
        }
        let layout = StripLayout::new(dtype, k);
        let at = StripRow { strip: e.row(table, strip, layout.bytes), row, layout };
        match (dtype.int(), dtype) {
            (Some(int), _) => unpack_row(e, int, k, at, to),
            (None, DType::F32 | DType::F16) => float_row(e, dtype, k, at, to),
            (None, DType::BF16) => pair_row(e, k, at, to),
            _ => {
                bail!(Unsupported, "embedding from a table of {dtype}: f32, f16, bf16 or a quantized format is needed")
            }
        }
        Ok(())
    }

    /// `rope_table`: cosines, then sines, of position times frequency.
    pub(super) fn angles(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let frequencies = self.memory(node.operands[1])?;
        let half = super::schedule::width(self.graph, v)? / 2;
        let sines = e.gep_const(to, 4 * half);
        let position = self.index(e, node.operands[0])?;
        let position = e.convert("sitofp", position, F32);
        let scale = node.attrs.float("scale") as f32;
        let align = if half.is_multiple_of(LANES) { 64 } else { 4 };
        walk::visit(e, half, &mut |e, chunk| {
            let frequency = chunk.load(e, frequencies, 64);
            let position = e.broadcast(position, chunk.lanes);
            let (cos, sin) = math::cos_sin_of_product(e, position, frequency);
            let scale = e.float(F32.x(chunk.lanes), scale);
            let (cos, sin) = (e.mul(cos, scale), e.mul(sin, scale));
            chunk.store(e, cos, to, 64);
            chunk.store(e, sin, sines, align);
        });
        Ok(())
    }
}

/// One float at a time, a cache line apart.
fn float_row(e: &mut Emitter, dtype: DType, k: usize, at: StripRow, to: Val) {
    let bytes = dtype.format().block_bytes;
    let from = e.row(at.strip, at.row, bytes);
    let (zero, count) = (e.i64(0), e.i64(k as i64));
    e.repeat(zero, count, 1, |e, i| {
        let from = e.row(from, i, bytes * STRIP);
        let value = if dtype == DType::F32 {
            e.load(from, F32, 4)
        } else {
            let value = e.load(from, F16, 2);
            e.convert("extf", value, F32)
        };
        let to = e.row(to, i, 4);
        e.store(value, to, 4);
    });
}

/// One pair of bf16 at a time, a cache line apart; the zero after an odd last column falls into the row's padding.
fn pair_row(e: &mut Emitter, k: usize, at: StripRow, to: Val) {
    let from = e.row(at.strip, at.row, 4);
    let (zero, count) = (e.i64(0), e.i64(k.div_ceil(2) as i64));
    e.repeat(zero, count, 1, |e, i| {
        let from = e.row(from, i, 4 * STRIP);
        let pair = e.load(from, I32, 4);
        let [even, odd] = math::bf16_pair(e, pair);
        let to = e.row(to, i, 8);
        e.store(even, to, 8);
        let to = e.gep_const(to, 4);
        e.store(odd, to, 4);
    });
}

/// Unit by unit, four codes at a time.
fn unpack_row(e: &mut Emitter, int: IntFormat, k: usize, at: StripRow, to: Val) {
    let (zero, count) = (e.i64(0), e.i64((k / int.unit()) as i64));
    let units = e.i64((int.group / int.unit()) as i64);
    e.repeat(zero, count, 1, |e, unit| {
        let group = e.div(unit, units);
        let figure = |e: &mut Emitter, offset: usize| {
            let base = at.part(e, group, (offset, int.group, STRIP * 2));
            let from = e.row(base, at.row, 2);
            let value = e.load(from, F16, 2);
            let value = e.convert("extf", value, F32);
            e.broadcast(value, 4)
        };
        let scale = figure(e, at.layout.scales);
        let second = int.zero.has_mins().then(|| figure(e, at.layout.mins));
        let min = second.map(|second| if int.zero == Zero::Point { zero_point(e, scale, second) } else { second });
        let to = e.row(to, unit, int.unit() * 4);
        for (quad, codes) in codes(e, int, unit, at).into_iter().enumerate() {
            let codes = match int.zero {
                Zero::E4M3 => codes,
                Zero::Fixed(zero) => {
                    let zero = e.int(codes.ty, zero as i64);
                    e.sub(codes, zero)
                }
                Zero::E2M1 => twice_e2m1(e, codes),
                Zero::Min | Zero::Point => codes,
            };
            let reals = if int.zero == Zero::E4M3 { e4m3(e, codes) } else { e.convert("sitofp", codes, F32) };
            let mut reals = e.mul(reals, scale);
            if let Some(min) = min {
                reals = e.add(reals, min);
            }
            let to = e.gep_const(to, quad * 16);
            e.store(reals, to, 16);
        }
    });
}

/// Twice the 4-bit floats of some codes.
fn twice_e2m1(e: &mut Emitter, codes: Val) -> Val {
    // Magnitudes 0 1 2 3 4 6 8 12, a digit each.
    let digits = e.int(codes.ty, 0xc864_3210_u32.cast_signed().into());
    let (seven, fifteen, sign) = (e.int(codes.ty, 7), e.int(codes.ty, 15), e.int(codes.ty, 8));
    let by = e.and(codes, seven);
    let by = e.shl(by, 2);
    let magnitude = e.op(codes.ty, format_args!("arith.shrui {digits}, {by} : {}", codes.ty));
    let magnitude = e.and(magnitude, fifteen);
    let (sign, zero) = (e.and(codes, sign), e.int(codes.ty, 0));
    let negative = e.cmp(Cmp::Ne, sign, zero);
    let negated = e.sub(zero, magnitude);
    e.select(negative, negated, magnitude)
}

/// Some 8-bit floats, of a 256th.
fn e4m3(e: &mut Emitter, codes: Val) -> Val {
    let quads = math::e4m3_quad(e, codes);
    quads[0]
}

/// The codes of one unit of the row, a quad of k at a time, as `i32`.
fn codes(e: &mut Emitter, int: IntFormat, unit: Val, at: StripRow) -> Vec<Val> {
    let quads = int.unit() / 4;
    let base = at.part(e, unit, (at.layout.codes, int.unit(), code_bytes(int)));
    let base = e.row(base, at.row, 4);
    let load = |e: &mut Emitter, base: Val, line: usize| {
        let from = e.gep_const(base, line * 64);
        let bytes = e.load(from, I8.x(4), 4);
        e.convert("extui", bytes, I32)
    };
    if int.bits == 8 {
        return (0..quads).map(|quad| load(e, base, quad)).collect();
    }
    let lines: Vec<Val> = (0..quads / 2).map(|line| load(e, base, line)).collect();
    let fifteen = e.int(I32.x(4), 15);
    let low: Vec<Val> = lines.iter().map(|line| e.and(*line, fifteen)).collect();
    let high = lines.iter().map(|line| e.shr(*line, 4)).collect::<Vec<_>>();
    let mut codes: Vec<Val> = low.into_iter().chain(high).collect();
    let upper = at.part(e, unit, (at.layout.high, int.unit(), high_bytes(int)));
    for (quad, code) in codes.iter_mut().enumerate() {
        let bits = match int.bits {
            5 => fifth_bits(e, upper, quad, at.row),
            6 => upper_pairs(e, upper, quad, at.row),
            _ => continue,
        };
        let bits = e.shl(bits, 4);
        *code = e.or(*code, bits);
    }
    codes
}

/// Bits `row * 4 ..` of the quad's 64-bit word, one a lane.
fn fifth_bits(e: &mut Emitter, upper: Val, quad: usize, row: Val) -> Val {
    let from = e.gep_const(upper, quad * 8);
    let word = e.load(from, I64, 8);
    let by = e.shl(row, 2);
    let word = e.op(I64, format_args!("arith.shrui {word}, {by} : i64"));
    let word = e.convert("trunci", word, I32);
    let word = e.broadcast(word, 4);
    let lanes = e.sequence(I32.x(4));
    let bits = e.op(I32.x(4), format_args!("arith.shrui {word}, {lanes} : {}", word.ty));
    let one = e.int(I32.x(4), 1);
    e.and(bits, one)
}

/// Bits `2 c ..` of byte `row * 4 + i`, where `quad = 4 line + c`.
fn upper_pairs(e: &mut Emitter, upper: Val, quad: usize, row: Val) -> Val {
    let line = e.gep_const(upper, quad / 4 * 64);
    let from = e.row(line, row, 4);
    let bytes = e.load(from, I8.x(4), 4);
    let bits = e.convert("extui", bytes, I32);
    let bits = e.shr(bits, 2 * (quad % 4) as i64);
    let three = e.int(I32.x(4), 3);
    e.and(bits, three)
}
