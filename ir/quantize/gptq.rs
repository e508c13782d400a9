//! Rows of reals -> codes that disturb a matrix's results least, given the second moments `H` of its inputs.
//!
//! ```text
//! w = the row, or what results want instead where the inputs have shifted (moments.rs)
//! columns in order of their inputs' squares, the largest first:
//!   q[k] = nearest(w[k] + sum over earlier i of (w[i] - q[i]) U[i, k])          H = U D U^T
//! then, for the least (w - q) H (w - q)^T:
//!   each group's scale (and minimum) given its codes; each code given all others, twice
//! ```
//!
//! The first part is GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
//! Transformers", 2022) in the form of LDLQ (Chee et al., "QuIP", 2023), which it equals. Scales are chosen before, from all
//! columns, so columns may be taken in any order while the format's groups stay those of neighbours. The second part is
//! coordinate descent (Behdin et al., "QuantEase", 2023), which never makes it worse. Rows are independent; many are done
//! together, block of columns after block, so that what a block does to the others is a product of matrices.

use super::linear::{add, factor, solve};
use super::moments::{self, Moments, importance};
use super::{Blocks, Line, Reals, float4, put_figures};
use crate::formats::{DType, Zero};
use crate::{Result, bail};
use half::f16;
use ndarray::{ArrayView2, ArrayViewMut2, linalg::general_mat_mul, s};
use std::ops::Range;

/// What is added to each column's own square, as a share of their mean. The usual 0.01 follows a text of few rows for each column
/// too closely: matrices are further off on other texts.
const DAMPING: f64 = 0.05;

/// Rounds of scales and codes.
const ROUNDS: usize = 2;

/// Columns that are gone through before the others hear of it: whole quant blocks, or so many where those are narrower.
const BATCH: usize = 64;

/// Rows that are done together; many at a time are faster.
pub const TILE: usize = 128;

/// Factors of one matrix's second moments.
pub struct Prepared {
    columns: usize,
    parts: Vec<Part>,
}

/// Of one diagonal block.
struct Part {
    range: Range<usize>,
    /// Damped moments, all of them.
    moments: Vec<f32>,
    /// Columns in the order they are taken.
    order: Vec<usize>,
    /// Right of the diagonal: how much of an earlier column's error a later one takes, in that order.
    share: Vec<f32>,
    importance: Vec<f32>,
    /// What of a row its results want to be added to it, where inputs have shifted.
    shift: Option<Vec<f32>>,
}

impl Prepared {
    /// Factors `moments`, on several threads, whose number changes nothing.
    ///
    /// # Errors
    /// Where they are not those of any rows of numbers.
    pub fn new(moments: &Moments, threads: usize) -> Result<Prepared> {
        let parts = moments.blocks().map(|block| Part::new(&block, threads)).collect::<Result<_>>()?;
        Ok(Prepared { columns: moments.columns(), parts })
    }

    /// Quantizes rows, one after the other in `rows` and in `out`.
    ///
    /// # Errors
    /// As [`super::quantize`].
    pub fn quantize(&self, dtype: DType, rows: &[f32], out: &mut [u8]) -> Result<()> {
        let blocks = Blocks::of(dtype)?;
        let bytes = blocks.format.dtype.bytes(self.columns).filter(|bytes| *bytes > 0);
        let Some(bytes) = bytes.filter(|bytes| out.len() / bytes * self.columns == rows.len()) else {
            bail!(Input, "rows of {} do not fill whole groups of {dtype}", self.columns);
        };
        blocks.check(rows, out)?;
        let of = |at: usize| at / blocks.format.block * blocks.format.block_bytes;
        for (rows, out) in rows.chunks(TILE * self.columns).zip(out.chunks_mut(TILE * bytes)) {
            for part in &self.parts {
                let (range, place) = (part.range.clone(), of(part.range.start)..of(part.range.end));
                let reals = rows.chunks_exact(self.columns).map(|row| (&row[range.clone()], float4::outer_scale(row)));
                let out = out.chunks_exact_mut(bytes).map(|out| &mut out[place.clone()]);
                let mut tile = Tile::new(blocks, part, &reals.collect::<Vec<_>>(), out.collect())?;
                tile.pass_on();
                tile.descend();
                tile.finish();
            }
        }
        Ok(())
    }
}

impl Part {
    fn new(block: &moments::Block<'_>, threads: usize) -> Result<Part> {
        let (range, sums, n) = (block.range.clone(), block.sums, block.range.len());
        let at = |i: usize, j: usize| f64::from(if i <= j { sums[i * n + j] } else { sums[j * n + i] });
        let squares: Vec<f32> = (0..n).map(|i| sums[i * n + i]).collect();
        let mean = squares.iter().map(|x| f64::from(*x)).sum::<f64>() / n.max(1) as f64;
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| squares[*b].total_cmp(&squares[*a]));
        // Sums of fewer rows than columns, or in f32, may need more to be positive.
        for damping in [DAMPING, 10.0 * DAMPING, 1.0] {
            let more = if mean > 0.0 { damping * mean } else { 1.0 };
            let mut a = vec![0.0; n * n];
            for (line, i) in a.chunks_exact_mut(n.max(1)).zip(&order) {
                line.iter_mut().zip(&order).for_each(|(x, j)| *x = at(*i, *j) + if i == j { more } else { 0.0 });
            }
            if factor(&mut a, n).is_some() {
                let share = a.iter().map(|x| *x as f32).collect();
                let damped = |k: usize| at(k / n, k % n) + if k / n == k % n { more } else { 0.0 };
                let moments = (0..n * n).map(|k| damped(k) as f32).collect();
                let shift = block.shift.map(|shift| solved(&a, &order, shift, threads));
                return Ok(Part { range, moments, order, share, importance: importance(&squares), shift });
            }
        }
        bail!(Input, "the second moments of columns {range:?} are not those of any rows");
    }

    fn matrix<'a>(&self, values: &'a [f32]) -> ArrayView2<'a, f32> {
        matrix(values, self.range.len())
    }
}

/// Rows of `n`.
fn matrix(values: &[f32], n: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((values.len() / n.max(1), n), values).expect("whole rows")
}

fn matrix_mut(values: &mut [f32], n: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((values.len() / n.max(1), n), values).expect("whole rows")
}

/// `shift H^-1`, of whose factors columns are in that order.
fn solved(factors: &[f64], order: &[usize], shift: &[f32], threads: usize) -> Vec<f32> {
    let n = order.len();
    let mut solved = vec![0.0; n * n];
    let lines = n.div_ceil(threads.max(1)).next_multiple_of(TILE);
    std::thread::scope(|scope| {
        for (shift, out) in shift.chunks(lines * n).zip(solved.chunks_mut(lines * n)) {
            scope.spawn(move || {
                for (shift, out) in shift.chunks(TILE * n).zip(out.chunks_mut(TILE * n)) {
                    let ordered = |line: &[f32]| order.iter().map(|c| f64::from(line[*c])).collect::<Vec<_>>();
                    let mut rows: Vec<f64> = shift.chunks_exact(n).flat_map(ordered).collect();
                    solve(factors, n, &mut rows);
                    for (row, out) in rows.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
                        row.iter().zip(order).for_each(|(x, c)| out[*c] = *x as f32);
                    }
                }
            });
        }
    });
    solved
}

/// Some rows within one diagonal block. Matrices are row-major.
struct Tile<'a> {
    blocks: Blocks,
    part: &'a Part,
    reals: Vec<f32>,
    out: Vec<&'a mut [u8]>,
    /// What the codes of each row and group stand for.
    lines: Vec<Line>,
    codes: Vec<u8>,
    /// What each column is off: its real less what its code stands for.
    off: Vec<f32>,
    /// What errors so far come to.
    work: Vec<f32>,
}

impl<'a> Tile<'a> {
    /// Of rows, each with what its scales are multiples of, their figures put.
    fn new(blocks: Blocks, part: &'a Part, rows: &[(&[f32], f32)], out: Vec<&'a mut [u8]>) -> Result<Tile<'a>> {
        let (n, size, count) = (part.range.len(), blocks.format.block, rows.len());
        let mut reals: Vec<f32> = rows.iter().flat_map(|(row, _)| row.iter().copied()).collect();
        if let Some(shift) = &part.shift {
            let given = reals.clone();
            general_mat_mul(1.0, &matrix(&given, n), &part.matrix(shift), 1.0, &mut matrix_mut(&mut reals, n));
        }
        let room = || vec![0.0; count * n];
        let mut tile =
            Tile { blocks, part, lines: vec![], codes: vec![0; count * n], off: room(), work: room(), out, reals };
        for ((row, (_, outer)), out) in tile.reals.chunks_exact(n).zip(rows).zip(&mut tile.out) {
            let all = row.chunks_exact(size).zip(part.importance.chunks_exact(size));
            for ((values, importance), out) in all.zip(out.chunks_exact_mut(blocks.format.block_bytes)) {
                let figures = blocks.fit(Reals { values, importance, outer: *outer }, out)?;
                let groups = 0..size / blocks.int.group;
                tile.lines.extend(groups.map(|group| Line::new(blocks.int, figures.of(group))));
            }
        }
        Ok(tile)
    }

    /// Every column once, its error shared among those that come later.
    fn pass_on(&mut self) {
        let n = self.part.range.len();
        for (work, row) in self.work.chunks_exact_mut(n).zip(self.reals.chunks_exact(n)) {
            work.iter_mut().zip(&self.part.order).for_each(|(work, c)| *work = row[*c]);
        }
        for first in (0..n).step_by(BATCH) {
            let last = n.min(first + BATCH);
            let mut off = vec![0.0; self.out.len() * (last - first)];
            for (row, off) in off.chunks_exact_mut(last - first).enumerate() {
                for k in first..last {
                    let column = self.part.order[k];
                    self.choose(row, column, self.work[row * n + k]);
                    off[k - first] = self.off[row * n + column];
                    let later = &mut self.work[row * n + k + 1..row * n + last];
                    add(later, &[off[k - first]], |_| &self.part.share[k * n + k + 1..]);
                }
            }
            let share = self.part.matrix(&self.part.share);
            let mut work = matrix_mut(&mut self.work, n);
            let mut later = work.slice_mut(s![.., last..]);
            general_mat_mul(1.0, &matrix(&off, last - first), &share.slice(s![first..last, last..]), 1.0, &mut later);
        }
    }

    /// Scales given codes and codes given scales, one at a time, each the best for the whole row.
    fn descend(&mut self) {
        let n = self.part.range.len();
        let moments = self.part.matrix(&self.part.moments);
        // From here on `work` is what the errors come to: off H.
        general_mat_mul(1.0, &matrix(&self.off, n), &moments, 0.0, &mut matrix_mut(&mut self.work, n));
        let batch = BATCH.max(self.blocks.format.block);
        for _ in 0..ROUNDS {
            for first in (0..n).step_by(batch) {
                let last = n.min(first + batch);
                let mut moved = vec![0.0; self.out.len() * (last - first)];
                for (row, moved) in moved.chunks_exact_mut(last - first).enumerate() {
                    let own = row * n + first..row * n + last;
                    moved.copy_from_slice(&self.off[own.clone()]);
                    let mut work = self.work[own.clone()].to_vec();
                    for at in (first..last).step_by(self.blocks.int.group) {
                        self.refit(row, at, first, &mut work);
                    }
                    for column in first..last {
                        self.improve(row, column, first, &mut work);
                    }
                    moved.iter_mut().zip(&self.off[own]).for_each(|(moved, off)| *moved = off - *moved);
                }
                let (moved, mut work) = (matrix(&moved, last - first), matrix_mut(&mut self.work, n));
                general_mat_mul(1.0, &moved, &moments.slice(s![first..last, ..]), 1.0, &mut work);
            }
        }
    }

    /// Gives a column the code nearest to `wanted`.
    fn choose(&mut self, row: usize, column: usize, wanted: f32) {
        let n = self.part.range.len();
        let line = &self.lines[(row * n + column) / self.blocks.int.group];
        let code = line.nearest(wanted);
        self.codes[row * n + column] = code;
        self.off[row * n + column] = self.reals[row * n + column] - line.real(code);
    }

    /// Gives a column the best code given all others. `work` is that of the columns from `first` on.
    fn improve(&mut self, row: usize, column: usize, first: usize, work: &mut [f32]) {
        let n = self.part.range.len();
        let (at, moments) = (row * n + column, &self.part.moments[column * n..][..n]);
        let before = self.off[at];
        self.choose(row, column, self.reals[at] - before + work[column - first] / moments[column]);
        if self.off[at] != before {
            add(work, &[self.off[at] - before], |_| &moments[first..]);
        }
    }

    /// Moves the scale, and the minimum, of the group from column `at` on to where the row is off least; for formats whose
    /// blocks are one group with figures of their own.
    fn refit(&mut self, row: usize, at: usize, first: usize, work: &mut [f32]) {
        let (int, n) = (self.blocks.int, self.part.range.len());
        if self.blocks.format.block != int.group || matches!(int.zero, Zero::E2M1 | Zero::E4M3) {
            return;
        }
        let (own, group) = (row * n + at..row * n + at + int.group, (row * n + at) / int.group);
        let steps: &[bool] = if int.zero == Zero::Min { &[true, false] } else { &[true] };
        for scale in steps {
            let line = self.lines[group];
            let unit = Line::new(int, if *scale { (1.0, line.figures.1) } else { (0.0, 1.0) });
            let constant = if *scale && int.zero == Zero::Min { line.figures.1 } else { 0.0 };
            let along: Vec<f32> = self.codes[own.clone()].iter().map(|code| unit.real(*code) - constant).collect();
            let mut moved = vec![0.0; work.len()];
            add(&mut moved, &along, |j| &self.part.moments[(at + j) * n + first..(at + j + 1) * n]);
            let product = |y: &[f32]| along.iter().zip(&y[at - first..]).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let (slope, curve) = (product(work), product(&moved));
            let (old, other) = if *scale { line.figures } else { (line.figures.1, line.figures.0) };
            let new = f16::from_f32(old + (slope / curve) as f32).to_f32();
            let by = f64::from(new - old);
            if !(curve > 0.0 && new.is_finite() && by * (by * curve - 2.0 * slope) < 0.0) {
                continue;
            }
            let line = Line::new(int, if *scale { (new, other) } else { (other, new) });
            self.lines[group] = line;
            add(work, &[-by as f32], |_| &moved);
            for j in own.clone() {
                self.off[j] = self.reals[j] - line.real(self.codes[j]);
            }
            let (first, second) = line.figures;
            let block = &mut self.out[row][at / int.group * self.blocks.format.block_bytes..];
            put_figures(int, (f16::from_f32(first), f16::from_f32(second)), block);
        }
    }

    /// Puts the codes beside the figures.
    fn finish(&mut self) {
        let n = self.part.range.len();
        for (codes, out) in self.codes.chunks_exact(n).zip(&mut self.out) {
            let blocks = codes.chunks_exact(self.blocks.format.block);
            for (codes, out) in blocks.zip(out.chunks_exact_mut(self.blocks.format.block_bytes)) {
                self.blocks.put(codes, out);
            }
        }
    }
}
