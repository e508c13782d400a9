//! Packed weights as threads read them: single elements, and whole lines of a strip.
//!
//! A strip interleaves 16 rows ([`mansard_ir::layout`]), so its lines serve a GPU as they are: 4 lanes with 4 rows each
//! read a line of 64 bytes, and a warp 8 neighbouring lines at once.
//!
//! ```text
//! line of 8-bit codes    [row][4 columns]     lane 4 g + q reads 16 bytes of line g: 4 columns of rows 4 q .. 4 q + 3
//! line of 4-bit codes    the same, 8 columns
//! line of bf16           [row][2 columns]
//! ```

use crate::cpu::dot::{part_at, zero_point};
use crate::emit::{BF16, Cmp, Emitter, F16, F32, I8, I16, I32, I64, Val};
use crate::math::e4m3_quad;
use mansard_ir::formats::{IntFormat, Zero};
use mansard_ir::layout::{A8, STRIP, StripLayout, code_bytes, high_bytes};
use mansard_ir::planes::PlanesLayout;
use mansard_ir::{DType, Result, bail};

/// Rows of a strip that a lane has where 16 bytes are loaded at once.
pub const ROWS: usize = 4;

/// How a matrix of rows of `k` is packed.
#[derive(Clone, Copy)]
pub struct Packed {
    pub dtype: DType,
    pub k: usize,
    pub layout: StripLayout,
    /// Neighbouring rows of a strip that a lane has: four, or two.
    pub rows: usize,
}

/// Pieces of a line: codes or floats, scales, and minima.
pub const PIECES: usize = 3;

/// Where a lane's pieces of a line lie, those that there are.
pub type Places = [Option<Val>; PIECES];

/// A lane's part of a line of codes: four columns of each of its rows.
pub struct Quad {
    /// The first column.
    pub column: Val,
    /// For each row four bytes; signed where the format is.
    pub codes: Vec<Val>,
}

/// Scales, and minima where there are any, of a lane's rows.
pub struct Figures {
    pub scales: Vec<Val>,
    pub mins: Option<Vec<Val>>,
}

impl Packed {
    pub fn new(dtype: DType, k: usize) -> Packed {
        Packed { dtype, k, layout: StripLayout::new(dtype, k), rows: ROWS }
    }

    /// Columns of a line: what a lane multiplies at once.
    pub fn columns(&self) -> usize {
        match (self.dtype.int(), self.dtype) {
            (Some(int), _) => {
                if int.bits == 8 {
                    4
                } else {
                    8
                }
            }
            (None, DType::BF16) => 2,
            _ => 1,
        }
    }

    /// Lines of a strip.
    pub fn lines(&self) -> usize {
        self.k.div_ceil(self.columns())
    }

    /// Bytes of a lane's pieces of a line, 0 where there is none.
    pub fn pieces(&self) -> [usize; PIECES] {
        match self.dtype.int() {
            Some(int) => [4 * self.rows, 2 * self.rows, if int.zero.has_mins() { 2 * self.rows } else { 0 }],
            None => [self.rows * self.columns() * self.dtype.format().block_bytes, 0, 0],
        }
    }

    /// Where the pieces of a line lie in its strip, those of the lane's rows `rows * place ..`.
    pub fn places(&self, e: &mut Emitter, strip: Val, line: Val, place: Val) -> Places {
        let Some(int) = self.dtype.int() else {
            let bytes = self.columns() * self.dtype.format().block_bytes;
            let at = e.row(strip, line, STRIP * bytes);
            return [Some(e.row(at, place, self.rows * bytes)), None, None];
        };
        let (unit, within) = unit_of(e, int, line);
        let codes = self.part(e, strip, unit, (self.layout.codes, int.unit(), code_bytes(int)));
        let at = e.row(codes, within, 64);
        let [scales, mins] = self.figures_at(e, int, strip, unit, place);
        [Some(e.row(at, place, 4 * self.rows)), scales, mins]
    }

    /// The reals of a line of floats: for each column those of the lane's rows.
    ///
    /// # Errors
    /// Where no kernel reads such weights.
    pub fn reals(&self, e: &mut Emitter, at: Val) -> Result<Vec<Vec<Val>>> {
        let lanes = |e: &mut Emitter, x: Val| (0..self.rows).map(|r| e.extract(x, r)).collect::<Vec<Val>>();
        Ok(match self.dtype {
            DType::F32 => {
                let x = e.load(at, F32.x(self.rows), 4 * self.rows);
                vec![lanes(e, x)]
            }
            DType::F16 => {
                let x = e.load(at, F16.x(self.rows), 2 * self.rows);
                let x = e.convert("extf", x, F32);
                vec![lanes(e, x)]
            }
            DType::BF16 => {
                let pairs = e.load(at, I32.x(self.rows), 4 * self.rows);
                crate::math::bf16_pair(e, pairs).map(|x| lanes(e, x)).to_vec()
            }
            other => bail!(Unsupported, "products with weights of {other}"),
        })
    }

    /// The quads of a line of codes that lie at `at`.
    pub fn quads(&self, e: &mut Emitter, int: IntFormat, (strip, line, place): (Val, Val, Val), at: Val) -> Vec<Quad> {
        let (lines, (unit, within)) = (code_bytes(int) / 64, unit_of(e, int, line));
        let packed = e.load(at, I32.x(self.rows), 4 * self.rows);
        let rows: Vec<Val> = (0..self.rows).map(|r| e.extract(packed, r)).collect();
        let first = e.scaled(unit, int.unit(), 0);
        let before = e.scaled(within, 4, 0);
        let column = e.add(first, before);
        if int.bits == 8 {
            return vec![Quad { column, codes: rows }];
        }
        let mask = e.int(I32, 0x0f0f_0f0f);
        let halves = [0, 1].map(|half| {
            let codes = rows.iter().map(|row| {
                let row = if half == 0 { *row } else { e.shr(*row, 4) };
                e.and(row, mask)
            });
            let mut codes: Vec<Val> = codes.collect();
            let quad = e.scaled(within, 1, half * lines);
            if high_bytes(int) > 0 {
                let high = self.part(e, strip, unit, (self.layout.high, int.unit(), high_bytes(int)));
                let upper = if int.bits == 5 {
                    fifth_bits(e, high, quad, (place, self.rows))
                } else {
                    pairs(e, high, quad, (place, self.rows))
                };
                codes = codes.into_iter().zip(upper).map(|(code, bits)| e.or(code, bits)).collect();
            }
            if int.zero == Zero::E2M1 {
                codes = codes.into_iter().map(|code| twice_e2m1(e, code)).collect();
            }
            Quad { column: e.scaled(column, 1, half * lines * 4), codes }
        });
        halves.into()
    }

    /// Where the scales and minima of the lane's rows lie, those of the group of a unit.
    pub fn figures_at(&self, e: &mut Emitter, int: IntFormat, strip: Val, unit: Val, place: Val) -> [Option<Val>; 2] {
        let units = e.i64((int.group / int.unit()) as i64);
        let group = e.div(unit, units);
        let mut at = |offset| {
            let at = self.part(e, strip, group, (offset, int.group, 2 * STRIP));
            Some(e.row(at, place, 2 * self.rows))
        };
        [at(self.layout.scales), if int.zero.has_mins() { at(self.layout.mins) } else { None }]
    }

    /// Scales and minima that lie at `scales` and `mins`.
    pub fn figures(&self, e: &mut Emitter, int: IntFormat, [scales, mins]: [Option<Val>; 2]) -> Figures {
        let real = |e: &mut Emitter, at: Val| {
            let x = e.load(at, F16.x(self.rows), 2 * self.rows);
            let x = e.convert("extf", x, F32);
            (0..self.rows).map(|r| e.extract(x, r)).collect::<Vec<Val>>()
        };
        let scales = scales.map_or_else(Vec::new, |at| real(e, at));
        let mins = mins.map(|at| {
            let seconds = real(e, at);
            let min = |(scale, second): (&Val, &Val)| {
                if int.zero == Zero::Point { zero_point(e, *scale, *second) } else { *second }
            };
            scales.iter().zip(&seconds).map(min).collect()
        });
        Figures { scales, mins }
    }

    fn part(&self, e: &mut Emitter, strip: Val, index: Val, (offset, columns, bytes): (usize, usize, usize)) -> Val {
        part_at(e, &self.layout, strip, index, (offset, self.layout.chunk / columns, bytes))
    }
}

/// The unit of columns that a line of codes belongs to, and which line of it that is.
fn unit_of(e: &mut Emitter, int: IntFormat, line: Val) -> (Val, Val) {
    let lines = e.i64((code_bytes(int) / 64) as i64);
    (e.div(line, lines), e.rem(line, lines))
}

/// Codes of the format as products see them: whether they are signed, and what is to be taken off each.
pub fn offset(int: IntFormat) -> (bool, u8) {
    match int.zero {
        Zero::E2M1 => (true, 0),
        zero => (false, zero.fixed().unwrap_or(0)),
    }
}

/// What the four codes of a row stand for, but for its scale and minimum.
pub fn reals_of_codes(e: &mut Emitter, int: IntFormat, codes: Val) -> [Val; 4] {
    if int.zero == Zero::E4M3 {
        return e4m3_quad(e, codes);
    }
    let (signed, zero) = offset(int);
    let zero = e.int(I32, zero.into());
    [24, 16, 8, 0].map(|by| {
        let code = e.shl(codes, by);
        let code = if signed { e.sar(code, 24) } else { e.shr(code, 24) };
        let code = e.sub(code, zero);
        e.convert("sitofp", code, F32)
    })
}

/// Bit 4 of each byte of a quad's codes: 4 bits a row of a 64-bit word, of which a lane has those of its rows.
fn fifth_bits(e: &mut Emitter, high: Val, quad: Val, (place, rows): (Val, usize)) -> Vec<Val> {
    let at = e.row(high, quad, 8);
    let at = e.row(at, place, rows / 2);
    let word = e.load(at, if rows == ROWS { I16 } else { I8 }, rows / 2);
    let word = e.convert("extui", word, I32);
    let (four, spread, bits) = (e.int(I32, 15), e.int(I32, 0x0020_4081), e.int(I32, 0x0101_0101));
    let row = |r: usize| {
        let row = e.shr(word, 4 * r as i64);
        let row = e.and(row, four);
        // The product has bit i of the row at bit 8 i, among others.
        let row = e.mul(row, spread);
        let row = e.and(row, bits);
        e.shl(row, 4)
    };
    (0..rows).map(row).collect()
}

/// Bits 4 and 5 of each byte of a quad's codes.
fn pairs(e: &mut Emitter, high: Val, quad: Val, (place, rows): (Val, usize)) -> Vec<Val> {
    let four = e.i64(4);
    let (line, within) = (e.div(quad, four), e.rem(quad, four));
    let at = e.row(high, line, 64);
    let at = e.row(at, place, 4 * rows);
    let words = e.load(at, I32.x(rows), 4 * rows);
    let within = e.shl(within, 1);
    let (by, two) = (e.convert("trunci", within, I32), e.int(I32, 0x0303_0303));
    let row = |r: usize| {
        let word = e.extract(words, r);
        let word = e.shift("arith.shrui", word, by);
        let word = e.and(word, two);
        e.shl(word, 4)
    };
    (0..rows).map(row).collect()
}

/// Twice the 4-bit floats in four bytes, as signed bytes.
fn twice_e2m1(e: &mut Emitter, codes: Val) -> Val {
    let mut all = e.int(I32, 0);
    for byte in 0..4 {
        let fifteen = e.int(I32, 15);
        let code = e.shr(codes, 8 * byte);
        let code = e.and(code, fifteen);
        let real = one_e2m1(e, code);
        let low = e.int(I32, 255);
        let real = e.and(real, low);
        let real = e.shl(real, 8 * byte);
        all = e.or(all, real);
    }
    all
}

/// Twice a 4-bit float, as an `i32`.
fn one_e2m1(e: &mut Emitter, code: Val) -> Val {
    // Magnitudes 0 1 2 3 4 6 8 12, a digit each.
    let digits = e.int(I32, 0xc864_3210_u32.cast_signed().into());
    let (seven, fifteen, eight, zero) = (e.int(I32, 7), e.int(I32, 15), e.int(I32, 8), e.int(I32, 0));
    let by = e.and(code, seven);
    let by = e.shl(by, 2);
    let magnitude = e.shift("arith.shrui", digits, by);
    let magnitude = e.and(magnitude, fifteen);
    let sign = e.and(code, eight);
    let negative = e.cmp(Cmp::Ne, sign, zero);
    let negated = e.sub(zero, magnitude);
    e.select(negative, negated, magnitude)
}

/// The real at `(row, column)` of a packed matrix.
///
/// # Errors
/// Where no kernel reads such weights.
pub fn element(e: &mut Emitter, matrix: Val, (dtype, k): (DType, usize), row: Val, column: Val) -> Result<Val> {
    let packed = Packed::new(dtype, k);
    let lanes = e.i64(STRIP as i64);
    let (strip, row) = (e.div(row, lanes), e.rem(row, lanes));
    let strip = e.row(matrix, strip, packed.layout.bytes);
    if let Some(int) = dtype.int() {
        return Ok(code_element(e, packed, int, strip, row, column));
    }
    let (bytes, ty) = match dtype {
        DType::F32 => (4, F32),
        DType::F16 => (2, F16),
        DType::BF16 => (2, BF16),
        other => {
            bail!(Unsupported, "embedding from a table of {other}: f32, f16, bf16 or a quantized format is needed")
        }
    };
    let columns = e.i64(packed.columns() as i64);
    let (line, within) = (e.div(column, columns), e.rem(column, columns));
    let at = e.row(strip, line, STRIP * bytes * packed.columns());
    let at = e.row(at, row, bytes * packed.columns());
    let at = e.row(at, within, bytes);
    let x = e.load(at, ty, bytes);
    Ok(widened(e, x))
}

/// A float as f32.
pub fn widened(e: &mut Emitter, x: Val) -> Val {
    match x.ty {
        F32 => x,
        BF16 => {
            let bits = e.convert("bitcast", x, I16);
            let bits = e.convert("extui", bits, I32);
            let bits = e.shl(bits, 16);
            e.convert("bitcast", bits, F32)
        }
        _ => e.convert("extf", x, F32),
    }
}

fn code_element(e: &mut Emitter, p: Packed, int: IntFormat, strip: Val, row: Val, column: Val) -> Val {
    let size = e.i64(int.unit() as i64);
    let (unit, within) = (e.div(column, size), e.rem(column, size));
    let four = e.i64(4);
    let (quad, byte) = (e.div(within, four), e.rem(within, four));
    let codes = p.part(e, strip, unit, (p.layout.codes, int.unit(), code_bytes(int)));
    let lines = e.i64((code_bytes(int) / 64) as i64);
    let (half, line) = (e.div(quad, lines), e.rem(quad, lines));
    let place = e.row(codes, line, 64);
    let place = e.row(place, row, 4);
    let place = e.gep(place, byte);
    let mut code = load_byte(e, place);
    if int.bits < 8 {
        let (by, fifteen) = (e.shl(half, 2), e.int(I32, 15));
        let by = e.convert("trunci", by, I32);
        code = e.shift("arith.shrui", code, by);
        code = e.and(code, fifteen);
        let high = p.part(e, strip, unit, (p.layout.high, int.unit(), high_bytes(int)));
        let bits = match int.bits {
            5 => Some(fifth_bit(e, high, (quad, row, byte))),
            6 => Some(upper_pair(e, high, (quad, row, byte))),
            _ => None,
        };
        if let Some(bits) = bits {
            let bits = e.shl(bits, 4);
            code = e.or(code, bits);
        }
    }
    if int.zero == Zero::E2M1 {
        code = one_e2m1(e, code);
    } else if let Some(zero) = int.zero.fixed() {
        let zero = e.int(I32, zero.into());
        code = e.sub(code, zero);
    }
    let units = e.i64((int.group / int.unit()) as i64);
    let group = e.div(unit, units);
    let figure = |e: &mut Emitter, offset| {
        let at = p.part(e, strip, group, (offset, int.group, 2 * STRIP));
        let at = e.row(at, row, 2);
        let x = e.load(at, F16, 2);
        e.convert("extf", x, F32)
    };
    let scale = figure(e, p.layout.scales);
    let code = if int.zero == Zero::E4M3 { e4m3_quad(e, code)[0] } else { e.convert("sitofp", code, F32) };
    let real = e.mul(code, scale);
    if !int.zero.has_mins() {
        return real;
    }
    let second = figure(e, p.layout.mins);
    let min = if int.zero == Zero::Point { zero_point(e, scale, second) } else { second };
    e.add(real, min)
}

fn load_byte(e: &mut Emitter, at: Val) -> Val {
    let byte = e.load(at, I8, 1);
    e.convert("extui", byte, I32)
}

/// Bit `row * 4 + byte` of the quad's word.
fn fifth_bit(e: &mut Emitter, high: Val, (quad, row, byte): (Val, Val, Val)) -> Val {
    let at = e.row(high, quad, 8);
    let word = e.load(at, I64, 8);
    let by = e.shl(row, 2);
    let by = e.add(by, byte);
    let (word, one) = (e.shift("arith.shrui", word, by), e.int(I32, 1));
    let word = e.convert("trunci", word, I32);
    e.and(word, one)
}

/// Bits `2 c ..` of byte `row * 4 + byte`, where `quad = 4 line + c`.
fn upper_pair(e: &mut Emitter, high: Val, (quad, row, byte): (Val, Val, Val)) -> Val {
    let four = e.i64(4);
    let (line, within) = (e.div(quad, four), e.rem(quad, four));
    let at = e.row(high, line, 64);
    let at = e.row(at, row, 4);
    let at = e.gep(at, byte);
    let (word, three) = (load_byte(e, at), e.int(I32, 3));
    let by = e.shl(within, 1);
    let by = e.convert("trunci", by, I32);
    let word = e.shift("arith.shrui", word, by);
    e.and(word, three)
}

/// The real at `(row, column)` of a matrix of `n` rows in two planes.
pub fn of_planes(e: &mut Emitter, matrix: Val, (n, k): (usize, usize), row: Val, column: Val) -> Val {
    let layout = PlanesLayout::new(k);
    let lanes = e.i64(STRIP as i64);
    let (strip, within) = (e.div(row, lanes), e.rem(row, lanes));
    let strip = e.row(matrix, strip, layout.strip_bytes);
    let upper = Packed { dtype: DType::Q4_0, k, layout: layout.strip, rows: ROWS };
    let lower = e.gep_const(matrix, layout.upper_bytes(n));
    let lower = e.row(lower, row, layout.row_bytes);
    let Some(int) = DType::Q4_0.int() else { return e.float(F32, f32::NAN) };
    // 16 (upper - 8) + lower, with the group's scale.
    let upper = code_element(e, upper, int, strip, within, column);
    let (scale, low) = lower_code(e, layout, lower, column);
    let (low, sixteen) = (e.convert("sitofp", low, F32), e.float(F32, 16.0));
    let low = e.mul(low, scale);
    e.fma(upper, sixteen, low)
}

/// The scale and the lower code of a column of a row of the second plane.
pub fn lower_code(e: &mut Emitter, layout: PlanesLayout, row: Val, column: Val) -> (Val, Val) {
    let size = e.i64(A8::GROUP as i64);
    let (group, within) = (e.div(column, size), e.rem(column, size));
    let at = e.row(row, group, 2);
    let scale = e.load(at, F16, 2);
    let scale = e.convert("extf", scale, F32);
    let codes = e.gep_const(row, layout.codes);
    let codes = e.row(codes, group, A8::GROUP / 2);
    let half = e.i64(A8::GROUP as i64 / 2);
    let (upper, byte) = (e.div(within, half), e.rem(within, half));
    let at = e.gep(codes, byte);
    let code = load_byte(e, at);
    let (by, fifteen) = (e.shl(upper, 2), e.int(I32, 15));
    let by = e.convert("trunci", by, I32);
    let code = e.shift("arith.shrui", code, by);
    (scale, e.and(code, fifteen))
}
