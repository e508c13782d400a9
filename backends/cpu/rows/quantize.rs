//! Quantization to A8 lines: int8 codes per group of 32, followed by what dot products need of them.
//!
//! ```text
//! scale = max |x| / 127     code = roundeven(x / scale)     neg_sum = -sum(codes)     real_sum = scale * sum(codes)
//! ```
//!
//! With two planes, the line of what those codes leave follows, made the same way.
//!
//! Four groups at a time: the horizontal maxima and sums of several vectors share one tree of shuffles. Codes are those of
//! the interpreter to the bit.

use super::Rows;
use super::schedule::width;
use super::walk::LANES;
use crate::emit::{Emitter, F32, I8, I32, Val};
use mansard_ir::layout::A8;
use mansard_ir::{Node, Result, ValueId, bail};

/// Groups of one tree.
const TOGETHER: usize = 4;

impl Rows<'_> {
    /// Emits `quantize` or `quantize_fine` for this row.
    pub(super) fn quantize(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let (Some(to), from) = (self.destination(v), self.row_of(node.operands[0])?) else {
            bail!(Internal, "{v} is quantized for nobody")
        };
        let Some(planes) = self.dtype(v)?.planes() else { bail!(Internal, "{v} has no planes") };
        let (lines, bytes) = (width(self.graph, v)? / A8::GROUP, A8::LINE * planes);
        let whole = lines - lines % TOGETHER;
        let (zero, end) = (e.i64(0), e.i64(whole as i64));
        if whole > 0 {
            e.repeat(zero, end, TOGETHER as i64, |e, line| {
                let (from, to) = (e.row(from, line, A8::GROUP * 4), e.row(to, line, bytes));
                quantize_lines(e, from, to, TOGETHER, planes);
            });
        }
        if whole < lines {
            let (from, to) = (e.gep_const(from, whole * A8::GROUP * 4), e.gep_const(to, whole * bytes));
            quantize_lines(e, from, to, lines - whole, planes);
        }
        Ok(())
    }
}

/// Up to four neighbouring groups, in all their planes.
fn quantize_lines(e: &mut Emitter, from: Val, to: Val, count: usize, planes: usize) {
    let mut x: Vec<Val> = (0..2 * count)
        .map(|i| {
            let at = e.gep_const(from, i * LANES * 4);
            e.load(at, F32.x(LANES), 64)
        })
        .collect();
    for plane in 0..planes {
        let to = e.gep_const(to, plane * A8::LINE);
        x = quantize_plane(e, &x, to, A8::LINE * planes);
    }
}

/// One plane of some groups, two vectors each, whose lines lie `stride` bytes apart; gives what the codes leave. In vectors
/// of figures, lane `i` is group `i`, and lanes repeat every four.
fn quantize_plane(e: &mut Emitter, x: &[Val], to: Val, stride: usize) -> Vec<Val> {
    let most: Vec<Val> = x
        .chunks(2)
        .map(|pair| {
            let (a, b) = (e.math("absf", pair[0]), e.math("absf", pair[1]));
            e.max(a, b)
        })
        .collect();
    let most = across(e, &padded(most, TOGETHER), &mut |e, a, b| e.max(a, b));
    let by = e.float(most.ty, 127.0);
    let scales = e.div(most, by);
    let (mut sums, mut left) = (vec![], vec![]);
    for (i, x) in x.iter().enumerate() {
        let codes = codes(e, *x, scales, i / 2);
        sums.push(codes);
        let scale = e.shuffle(scales, scales, &[i / 2; LANES]);
        let reals = e.convert("sitofp", codes, F32);
        let reals = e.mul(scale, reals);
        left.push(e.sub(*x, reals));
        let codes = e.convert("trunci", codes, I8);
        let to = e.gep_const(to, i / 2 * stride + i % 2 * LANES);
        e.store(codes, to, LANES);
    }
    let halves = across(e, &padded(sums, 2 * TOGETHER), &mut |e, a, b| e.add(a, b));
    figures(e, scales, halves, to, (x.len() / 2, stride));
    left
}

/// Codes of 16 elements of a group as `i32`.
fn codes(e: &mut Emitter, x: Val, scales: Val, group: usize) -> Val {
    let scale = e.shuffle(scales, scales, &[group; LANES]);
    let q = e.div(x, scale);
    let q = e.math("roundeven", q);
    // Scales too small for f32's full precision can put a quotient beyond 127.
    let (low, high, zero) = (e.float(q.ty, -127.0), e.float(q.ty, 127.0), e.float(q.ty, 0.0));
    let q = e.max(q, low);
    let q = e.min(q, high);
    let some = e.op(crate::emit::I1.x(LANES), format_args!("arith.cmpf ogt, {scale}, {zero} : {}", q.ty));
    let q = e.select(some, q, zero);
    e.convert("fptosi", q, I32)
}

/// Writes scale, sums and real sums after the codes. Lane `2 i + h` of `halves` is the sum of half `h` of group `i`.
fn figures(e: &mut Emitter, scales: Val, halves: Val, to: Val, (count, stride): (usize, usize)) {
    let zero = e.int(halves.ty, 0);
    let even: Vec<usize> = (0..LANES).map(|i| i * 2 % 8).collect();
    let odd: Vec<usize> = even.iter().map(|i| i + 1).collect();
    let (low, high) = (e.shuffle(halves, halves, &even), e.shuffle(halves, halves, &odd));
    let sums = e.add(low, high);
    let own: Vec<usize> = (0..LANES).map(|i| i % 8 / 2).collect();
    let own_scales = e.shuffle(scales, scales, &own);
    let real = |e: &mut Emitter, sums: Val, scales: Val| {
        let sums = e.convert("sitofp", sums, F32);
        let sums = e.mul(sums, scales);
        e.convert("bitcast", sums, I32)
    };
    let (real_sums, real_halves) = (real(e, sums, scales), real(e, halves, own_scales));
    let (neg_sums, neg_halves) = (e.sub(zero, sums), e.sub(zero, halves));
    let scales = e.convert("bitcast", scales, I32);
    // Lanes: four scales, four sums, four real sums, then anything; eight halves, eight real halves.
    let first: Vec<usize> = (0..8).map(|i| if i < 4 { i } else { LANES + i - 4 }).chain([0; 8]).collect();
    let whole = e.shuffle(scales, neg_sums, &first);
    let second: Vec<usize> = (0..8).chain((0..8).map(|i| LANES + i % 4)).collect();
    let whole = e.shuffle(whole, real_sums, &second);
    let third: Vec<usize> = (0..8).chain((0..8).map(|i| LANES + i)).collect();
    let half = e.shuffle(neg_halves, real_halves, &third);
    for i in 0..count {
        let h = LANES + 2 * i;
        let line = e.shuffle(whole, half, &[i, 4 + i, 8 + i, 8 + i, h, h + 1, h + 8, h + 9]);
        let to = e.gep_const(to, i * stride + A8::SCALE);
        e.store(line, to, 32);
    }
    const { assert!(A8::NEG_SUM == A8::SCALE + 4 && A8::REAL_SUM == A8::SCALE + 8) };
    const { assert!(A8::NEG_SUM_16 == A8::SCALE + 16 && A8::REAL_SUM_16 == A8::SCALE + 24) };
}

/// Repeats the last vector up to `count`.
fn padded(mut vectors: Vec<Val>, count: usize) -> Vec<Val> {
    if let Some(last) = vectors.last().copied() {
        vectors.resize(count, last);
    }
    vectors
}

/// Combines all lanes of each of `n` vectors, a power of two: lane `i` is that of vector `i % n`.
fn across(e: &mut Emitter, vectors: &[Val], combine: &mut dyn FnMut(&mut Emitter, Val, Val) -> Val) -> Val {
    let even: Vec<usize> = (0..LANES).map(|i| 2 * i).collect();
    let odd: Vec<usize> = (0..LANES).map(|i| 2 * i + 1).collect();
    let mut vectors = vectors.to_vec();
    for _ in 0..LANES.ilog2() {
        if vectors.len() == 1 {
            vectors.push(vectors[0]);
        }
        vectors = vectors
            .chunks(2)
            .map(|pair| {
                let (a, b) = (e.shuffle(pair[0], pair[1], &even), e.shuffle(pair[0], pair[1], &odd));
                combine(e, a, b)
            })
            .collect();
    }
    vectors[0]
}
