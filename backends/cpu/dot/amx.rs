//! Products of whole tiles, on machines with matrix units (AMX): 16 activation rows times the 16 rows of a strip.
//!
//! ```text
//! bf16    C[16][16] += A[16][32] . B[32][16]                       one instruction for 32 columns; C stays in its register
//! codes   C[16][16]  = A[16][u] . B[u][16]; acc += C * scales      a unit of u = 32 or 16 columns has scales of its own
//! ```
//!
//! A tile of B has a line of 64 bytes for each pair of columns (each quad, of int8): just what packed strips hold. Codes are
//! unpacked first ([`super::unpack`]): beside int8 activations into signed bytes, beside bf16 ones into reals.
//!
//! Registers are chosen here, not by LLVM: 0 to 3 hold C, 4 and 5 A, 6 and 7 B.
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, chapter "Programming with Intel AMX".

use super::Rows;
use super::integer::{self, Weights};
use crate::emit::{Cmp, Emitter, F32, I8, I16, I32, Val};
use mansard_ir::formats::DType;
use mansard_ir::layout::{A8, STRIP};
use mansard_ir::target::Target;

/// Activation rows of a tile.
pub const TOKENS: usize = 16;

/// Bytes of a stored C.
const TILE_BYTES: usize = TOKENS * STRIP * 4;

/// Columns of a tile of bf16.
const COLUMNS: usize = 32;

/// Register of the first A, and of the first B.
const A: usize = 4;
const B: usize = 6;

/// What tiles hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// bf16 on both sides.
    Pairs,
    /// Signed bytes on both sides, so many columns at a time.
    Codes(usize),
}

impl Operands {
    /// For a product of `activations` and `weights`, where the target has matrix units that take them.
    pub fn of(target: &Target, activations: DType, weights: DType, k: usize) -> Option<Operands> {
        match (activations, weights.int()) {
            (DType::A8 | DType::A16, Some(int)) if target.has("amx-int8") => Some(Operands::Codes(int.unit())),
            (DType::BF16, int) if target.has("amx-bf16") && k.is_multiple_of(COLUMNS) => match int {
                None if weights != DType::BF16 => None,
                _ => Some(Operands::Pairs),
            },
            _ => None,
        }
    }

    /// Bytes that [`peak`] multiplies.
    pub const PEAK_BYTES: usize = 4 * TILE_BYTES;

    /// Products of the four tiles of [`peak`].
    pub fn products(self) -> usize {
        let columns = if self == Operands::Pairs { COLUMNS } else { self.shape().0 };
        4 * TOKENS * STRIP * columns
    }

    /// Bytes of a row of A, and lines of B.
    fn shape(self) -> (usize, usize) {
        match self {
            Operands::Pairs => (2 * COLUMNS, COLUMNS / 2),
            Operands::Codes(unit) => (unit, unit / 4),
        }
    }

    /// Shapes the registers; what they held is lost.
    pub fn configure(self, e: &mut Emitter) {
        let (row, lines) = self.shape();
        let memory = e.stack(64);
        let zeros = e.int(I8.x(64), 0);
        e.store(zeros, memory, 64);
        let mut set = |offset: usize, ty, value: usize| {
            let (at, value) = (e.gep_const(memory, offset), e.int(ty, value as i64));
            e.store(value, at, 1);
        };
        set(0, I8, 1); // the palette
        for register in 0..8 {
            let (bytes, rows) = match register {
                0..A => (4 * STRIP, TOKENS),
                A..B => (row, TOKENS),
                _ => (4 * STRIP, lines),
            };
            set(16 + 2 * register, I16, bytes);
            set(48 + register, I8, rows);
        }
        e.act("llvm.x86.ldtilecfg", &[memory]);
    }
}

/// Gives the registers back.
pub fn release(e: &mut Emitter) {
    e.act("llvm.x86.tilerelease", &[]);
}

/// Four tiles of sums of what lies at `panel`, `rounds` times `steps` times: products, and loads of what they multiply from the
/// first-level cache. Gives a line of the result.
pub fn peak(e: &mut Emitter, operands: Operands, panel: Val, rounds: Val, steps: usize) -> Val {
    let out = e.stack(TILE_BYTES);
    operands.configure(e);
    (0..A).for_each(|sum| zero(e, sum));
    let name = if operands == Operands::Pairs { "llvm.x86.tdpbf16ps" } else { "llvm.x86.tdpbssd" };
    let (low, high) = (e.i64(0), e.scaled(rounds, steps, 0));
    e.repeat(low, high, 1, |e, _| {
        for (i, register) in (A..B + 2).enumerate() {
            let at = e.gep_const(panel, i * TILE_BYTES);
            load(e, register, at, 4 * STRIP);
        }
        for sum in 0..A {
            multiply(e, name, sum, A + sum % 2, B + sum / 2);
        }
    });
    store(e, 0, out, 4 * STRIP);
    release(e);
    e.load(out, I32.x(STRIP), 64)
}

/// Emits `body(first row, rows)` for tiles of 32 rows, the last of 16 where that is enough.
pub fn tiles(e: &mut Emitter, rows: Val, mut body: impl FnMut(&mut Emitter, Val, usize)) {
    let (zero, half, whole) = (e.i64(0), e.i64(TOKENS as i64), e.i64(2 * TOKENS as i64));
    let rest = e.rem(rows, whole);
    let wide = e.cmp(Cmp::Gt, rest, half);
    let full = e.sub(rows, rest);
    let end = e.select(wide, rows, full);
    e.repeat(zero, end, 2 * TOKENS as i64, |e, first| body(e, first, 2 * TOKENS));
    let narrow = e.cmp(Cmp::Lt, end, rows);
    e.when(narrow, |e| body(e, full, TOKENS));
}

/// Bytes of a strip with its codes unpacked.
pub fn panel_bytes(operands: Operands, k: usize) -> usize {
    match operands {
        Operands::Codes(_) => STRIP * k,
        Operands::Pairs => STRIP * k * 2,
    }
}

/// Where sums of [`pairs`] go.
#[derive(Clone, Copy)]
pub struct Sums {
    /// That of the first row with the first output.
    pub first: Val,
    /// Bytes from row to row.
    pub row: usize,
    /// Bytes from strip to strip.
    pub strip: usize,
    /// They are added to what is there.
    pub add: bool,
}

/// Rows that will be read later, and are asked for meanwhile.
#[derive(Clone, Copy)]
pub struct Later {
    /// The first.
    pub first: Val,
    /// How many.
    pub count: usize,
}

/// Products of 16 rows, or twice as many, with bf16 strips. Rows to come lie as far apart as these.
pub fn pairs(e: &mut Emitter, k: usize, strips: &[Val], rows: Rows, later: Option<Later>, out: Sums) {
    let tiles = rows.count / TOKENS;
    for (c, strips) in strips.chunks(2).enumerate() {
        let used = || (0..strips.len()).flat_map(|s| (0..tiles).map(move |a| (s, a, 2 * s + a)));
        let at = |e: &mut Emitter, s: usize, a: usize| {
            e.gep_const(out.first, (2 * c + s) * out.strip + a * TOKENS * out.row)
        };
        for (s, a, sum) in used() {
            if out.add {
                let from = at(e, s, a);
                load(e, sum, from, out.row);
            } else {
                zero(e, sum);
            }
        }
        let (low, high) = (e.i64(0), e.i64((k / COLUMNS) as i64));
        e.repeat(low, high, 1, |e, step| {
            let x = e.row(rows.first, step, 2 * COLUMNS);
            for a in 0..tiles {
                let at = e.gep_const(x, a * TOKENS * rows.stride);
                load(e, A + a, at, rows.stride);
            }
            for (s, strip) in strips.iter().enumerate() {
                let at = e.row(*strip, step, COLUMNS * STRIP * 2);
                load(e, B + s, at, 4 * STRIP);
            }
            used().for_each(|(s, a, sum)| multiply(e, "llvm.x86.tdpbf16ps", sum, A + a, B + s));
            if let Some(later) = later.filter(|_| c == 0) {
                let line = e.row(later.first, step, 2 * COLUMNS);
                for row in 0..later.count {
                    let offset = e.i64((row * rows.stride) as i64);
                    e.prefetch(line, offset, 1);
                }
            }
        });
        for (s, a, sum) in used() {
            let to = at(e, s, a);
            store(e, sum, to, out.row);
        }
    }
}

/// Gives lines of int8 activations past the last of `count` rows, as far as [`codes`] reads them, scales of 0: any bits may be
/// there, also such that take long to compute with.
pub fn clear_padding(e: &mut Emitter, first: Val, stride: usize, count: Val) {
    let (tile, last) = (e.i64(TOKENS as i64), e.i64(TOKENS as i64 - 1));
    let end = e.add(count, last);
    let end = e.div(end, tile);
    let end = e.mul(end, tile);
    e.repeat(count, end, 1, |e, row| {
        let row = e.row(first, row, stride);
        let (zero, lines) = (e.i64(0), e.i64((stride / A8::LINE) as i64));
        e.repeat(zero, lines, 1, |e, line| {
            let at = e.row(row, line, A8::LINE);
            let (at, none) = (e.gep_const(at, A8::SCALE), e.int(I8.x(A8::LINE - A8::SCALE), 0));
            e.store(none, at, 32);
        });
    });
}

/// Bytes of memory for the sums of [`codes`].
pub fn sum_bytes(weights: Weights<'_>, planes: usize) -> usize {
    units(weights, planes).max(2) * TILE_BYTES
}

/// Products of a line of activations.
fn units(weights: Weights<'_>, planes: usize) -> usize {
    weights.units() * planes
}

/// Products of 16 rows of int8 activations with a strip, whose codes are in `panel`. Row `r` of the result is stored at
/// `out + r * stride`; `sums` is memory for stored tiles.
pub fn codes(
    e: &mut Emitter,
    weights: Weights<'_>,
    k: usize,
    (strip, panel): (Val, Val),
    rows: Rows,
    (sums, out, stride): (Val, Val, usize),
) {
    let product = Codes { weights, strip, panel, rows, sums };
    let lines = k / A8::GROUP;
    // Two products at a time, at least: one waits for its sums while the other is scaled.
    let together = (2 / units(weights, rows.planes)).max(1);
    let zero = e.float(F32.x(STRIP), 0.0);
    let (low, high, step) = (e.i64(0), e.i64((lines / together * together) as i64), e.i64(together as i64));
    let start = vec![zero; TOKENS];
    let mut acc = e.for_loop((low, high, step), &start, |e, line, acc| product.lines(e, line, together, acc));
    if !lines.is_multiple_of(together) {
        acc = product.lines(e, high, 1, &acc);
    }
    for (r, value) in acc.iter().enumerate() {
        let at = e.gep_const(out, r * stride);
        e.store(*value, at, 64);
    }
}

struct Codes<'a> {
    weights: Weights<'a>,
    strip: Val,
    panel: Val,
    rows: Rows,
    sums: Val,
}

impl Codes<'_> {
    /// `count` lines of 32 columns, all their units, in every plane.
    fn lines(&self, e: &mut Emitter, line: Val, count: usize, acc: &[Val]) -> Vec<Val> {
        let (unit, parts, planes) = (self.weights.int.unit(), self.weights.units(), self.rows.planes);
        let first = e.row(self.rows.first, line, A8::LINE * planes);
        let panel = e.row(self.panel, line, A8::GROUP * STRIP);
        let sums: Vec<Val> = (0..count * parts * planes).map(|i| e.gep_const(self.sums, i * TILE_BYTES)).collect();
        for (i, sum) in sums.iter().enumerate() {
            let (codes, plane) = (i / planes, i % planes);
            let (line, part) = (codes / parts, codes % parts);
            let x = e.gep_const(first, (line * planes + plane) * A8::LINE + part * unit);
            load(e, A + i % 2, x, self.rows.stride);
            if plane == 0 {
                let at = e.gep_const(panel, codes * unit * STRIP);
                load(e, B + codes % 2, at, 4 * STRIP);
            }
            zero(e, i % A);
            multiply(e, "llvm.x86.tdpbssd", i % A, A + i % 2, B + codes % 2);
            store(e, i % A, *sum, 4 * STRIP);
        }
        let mut acc = acc.to_vec();
        for codes in 0..count * parts {
            let figures = self.weights.unit_figures(e, self.strip, (line, codes));
            let (line, part) = (codes / parts, codes % parts);
            for (r, acc) in acc.iter_mut().enumerate() {
                for plane in 0..planes {
                    let at = e.gep_const(sums[codes * planes + plane], r * 4 * STRIP);
                    let value = e.load(at, I32.x(STRIP), 64);
                    let x = e.gep_const(first, r * self.rows.stride + (line * planes + plane) * A8::LINE);
                    *acc = integer::scaled(e, figures, (parts, part), x, value, *acc);
                }
            }
        }
        acc
    }
}

fn register(e: &mut Emitter, index: usize) -> Val {
    e.int(I8, index as i64)
}

fn zero(e: &mut Emitter, to: usize) {
    let to = register(e, to);
    e.act("llvm.x86.tilezero", &[to]);
}

fn load(e: &mut Emitter, to: usize, at: Val, stride: usize) {
    let (to, stride) = (register(e, to), e.i64(stride as i64));
    e.act("llvm.x86.tileloadd64", &[to, at, stride]);
}

fn store(e: &mut Emitter, from: usize, at: Val, stride: usize) {
    let (from, stride) = (register(e, from), e.i64(stride as i64));
    e.act("llvm.x86.tilestored64", &[from, at, stride]);
}

fn multiply(e: &mut Emitter, name: &str, sum: usize, a: usize, b: usize) {
    let operands = [register(e, sum), register(e, a), register(e, b)];
    e.act(name, &operands);
}
