//! Rows of reals -> codes that disturb a matrix's results least, given the second moments `H` of its inputs.
//!
//! ```text
//! columns in order of their inputs' squares, the largest first:
//!   q[k] = nearest(w[k] + sum over earlier i of (w[i] - q[i]) U[i, k])          H = U D U^T
//! then, for the least (w - q) H (w - q)^T:
//!   each group's scale (and minimum) given its codes; each code given all others, twice
//! ```
//!
//! The first part is GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
//! Transformers", 2022) in the form of LDLQ (Chee et al., "QuIP", 2023), which it equals. Scales are chosen before, from all
//! columns, so columns may be taken in any order while the format's groups stay those of neighbours. The second part is
//! coordinate descent (Behdin et al., "QuantEase", 2023), which never makes it worse. Rows are independent; several are done
//! together because they read the same factors.

use super::linear::{add, factor};
use super::moments::{Moments, importance};
use super::{Blocks, Line, MOST, Reals, float4, put_figures};
use crate::formats::{DType, Zero};
use crate::{Result, bail};
use half::f16;
use std::ops::Range;

/// What is added to each column's own square, as a share of their mean. The usual 0.01 follows a text of few rows for each column
/// too closely: matrices are further off on other texts.
const DAMPING: f64 = 0.05;

/// Rounds of scales and codes.
const ROUNDS: usize = 2;

/// Columns whose errors are handed to all later ones at once.
const BATCH: usize = 32;

/// Rows that are done together.
const TILE: usize = 8;

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
}

impl Prepared {
    /// Factors `moments`.
    ///
    /// # Errors
    /// Where they are not those of any rows of numbers.
    pub fn new(moments: &Moments) -> Result<Prepared> {
        let parts = moments.blocks().map(|(range, sums)| Part::new(range, sums)).collect::<Result<_>>()?;
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
        let tiles = rows.chunks(TILE * self.columns).zip(out.chunks_mut(TILE * bytes));
        for (rows, out) in tiles {
            for part in &self.parts {
                let mut tile = rows.chunks_exact(self.columns).zip(out.chunks_exact_mut(bytes));
                let size = blocks.format.block;
                let of = |at: usize| at / size * blocks.format.block_bytes;
                let tile = tile.by_ref().map(|(row, out)| {
                    let outer = float4::outer_scale(row);
                    Row::new(
                        blocks,
                        part,
                        &row[part.range.clone()],
                        outer,
                        &mut out[of(part.range.start)..of(part.range.end)],
                    )
                });
                let mut tile: Vec<Row<'_>> = tile.collect::<Result<_>>()?;
                part.pass_on(&mut tile);
                part.descend(&mut tile);
                tile.iter_mut().for_each(Row::finish);
            }
        }
        Ok(())
    }
}

impl Part {
    fn new(range: Range<usize>, sums: &[f32]) -> Result<Part> {
        let n = range.len();
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
                return Ok(Part { range, moments, order, share, importance: importance(&squares) });
            }
        }
        bail!(Input, "the second moments of columns {range:?} are not those of any rows");
    }

    /// Every column once, its error shared among those that come later.
    fn pass_on(&self, tile: &mut [Row<'_>]) {
        let n = self.range.len();
        for row in tile.iter_mut() {
            row.work = self.order.iter().map(|c| row.reals[*c]).collect();
        }
        for first in (0..n).step_by(BATCH) {
            let last = n.min(first + BATCH);
            for row in tile.iter_mut() {
                let mut off = [0.0; BATCH];
                for k in first..last {
                    let column = self.order[k];
                    row.choose(column, row.work[k]);
                    off[k - first] = row.off[column];
                    add(&mut row.work[k + 1..last], &[row.off[column]], |_| &self.share[k * n + k + 1..]);
                }
                add(&mut row.work[last..], &off[..last - first], |k| &self.share[(first + k) * n + last..]);
            }
        }
    }

    /// Scales given codes and codes given scales, one at a time, each the best for the whole row.
    fn descend(&self, tile: &mut [Row<'_>]) {
        let n = self.range.len();
        let moments = |j: usize| &self.moments[j * n..][..n];
        // From here on `work` is what the errors come to: off H.
        for row in tile.iter_mut() {
            row.work.fill(0.0);
        }
        for first in (0..n).step_by(BATCH) {
            for row in tile.iter_mut() {
                add(&mut row.work, &row.off[first..n.min(first + BATCH)], |j| moments(first + j));
            }
        }
        for _ in 0..ROUNDS {
            let groups = tile.first().map_or(0, |row| row.lines.len());
            for group in 0..groups {
                tile.iter_mut().for_each(|row| row.refit(self, group));
            }
            for j in 0..n {
                for row in tile.iter_mut() {
                    let before = row.off[j];
                    row.choose(j, row.reals[j] - before + row.work[j] / moments(j)[j]);
                    if row.off[j] != before {
                        add(&mut row.work, &[row.off[j] - before], |_| moments(j));
                    }
                }
            }
        }
    }
}

/// One row within one diagonal block.
struct Row<'a> {
    blocks: Blocks,
    reals: &'a [f32],
    out: &'a mut [u8],
    /// What the codes of each group stand for.
    lines: Vec<Line>,
    codes: Vec<u8>,
    /// What each column is off: its real less what its code stands for.
    off: Vec<f32>,
    work: Vec<f32>,
}

impl<'a> Row<'a> {
    fn new(blocks: Blocks, part: &Part, reals: &'a [f32], outer: f32, out: &'a mut [u8]) -> Result<Row<'a>> {
        let (size, mut lines) = (blocks.format.block, vec![]);
        let all = reals.chunks_exact(size).zip(part.importance.chunks_exact(size));
        for ((values, importance), out) in all.zip(out.chunks_exact_mut(blocks.format.block_bytes)) {
            let figures = blocks.fit(Reals { values, importance, outer }, out)?;
            lines.extend((0..size / blocks.int.group).map(|group| Line::new(blocks.int, figures.of(group))));
        }
        Ok(Row { blocks, reals, out, lines, codes: vec![0; reals.len()], off: vec![0.0; reals.len()], work: vec![] })
    }

    /// Gives a column the code nearest to `wanted`.
    fn choose(&mut self, column: usize, wanted: f32) {
        let line = &self.lines[column / self.blocks.int.group];
        let code = line.nearest(wanted);
        self.codes[column] = code;
        self.off[column] = self.reals[column] - line.real(code);
    }

    /// Moves the scale, and the minimum, of a group to where the row is off least; for formats whose blocks are one group
    /// with figures of their own.
    fn refit(&mut self, part: &Part, group: usize) {
        let (int, n) = (self.blocks.int, self.reals.len());
        if self.blocks.format.block != int.group || matches!(int.zero, Zero::E2M1 | Zero::E4M3) {
            return;
        }
        let range = group * int.group..(group + 1) * int.group;
        let steps: &[bool] = if int.zero == Zero::Min { &[true, false] } else { &[true] };
        for scale in steps {
            let (line, mut along) = (self.lines[group], [0f32; MOST.0]);
            let unit = Line::new(int, if *scale { (1.0, line.figures.1) } else { (0.0, 1.0) });
            for (x, code) in along.iter_mut().zip(&self.codes[range.clone()]) {
                *x = unit.real(*code) - if *scale && int.zero == Zero::Min { line.figures.1 } else { 0.0 };
            }
            let mut moved = vec![0.0; n];
            add(&mut moved, &along[..int.group], |j| &part.moments[(range.start + j) * n..][..n]);
            let product = |y: &[f32]| along.iter().zip(&y[range.clone()]).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let (slope, curve) = (product(&self.work), product(&moved));
            let (old, other) = if *scale { line.figures } else { (line.figures.1, line.figures.0) };
            let new = f16::from_f32(old + (slope / curve) as f32).to_f32();
            let by = f64::from(new - old);
            if !(curve > 0.0 && new.is_finite() && by * (by * curve - 2.0 * slope) < 0.0) {
                continue;
            }
            self.lines[group] = Line::new(int, if *scale { (new, other) } else { (other, new) });
            add(&mut self.work, &[-by as f32], |_| &moved);
            for (j, code) in range.clone().zip(&self.codes[range.clone()]) {
                self.off[j] = self.reals[j] - self.lines[group].real(*code);
            }
            let (first, second) = self.lines[group].figures;
            let block = &mut self.out[group * self.blocks.format.block_bytes..];
            put_figures(int, (f16::from_f32(first), f16::from_f32(second)), block);
        }
    }

    /// Puts the codes beside the figures.
    fn finish(&mut self) {
        let blocks = self.codes.chunks_exact(self.blocks.format.block);
        for (codes, out) in blocks.zip(self.out.chunks_exact_mut(self.blocks.format.block_bytes)) {
            self.blocks.put(codes, out);
        }
    }
}
