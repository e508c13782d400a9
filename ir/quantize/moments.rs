//! Second moments of the rows that a matrix is multiplied with: what an error in its weights does to its results.
//!
//! ```text
//! y = x w^T, w off by e (a row)   ->   sum over rows x of (x e)^2  =  e (sum of x^T x) e^T
//! ```
//!
//! Sums of rows of more than [`WIDEST`] columns are kept for neighbouring columns only: diagonal blocks of equal width, so
//! that memory grows with columns, not with their square. Sums are in f32, added up some hundred rows at a time.

use super::linear::add;
use crate::{Result, bail};
use std::ops::Range;

/// Most columns of one diagonal block.
pub const WIDEST: usize = 8192;

/// Every quant block lies in one diagonal block.
const QUANT_BLOCK: usize = 256;

/// Rows that are added up at a time, while a row of sums is at hand.
const TOGETHER: usize = 16;

/// The sums of one matrix's inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    columns: usize,
    /// Diagonal blocks one after the other, each row-major; only what is on or right of the diagonal counts.
    sums: Vec<f32>,
}

/// Columns of each diagonal block.
fn ranges(columns: usize) -> impl Iterator<Item = Range<usize>> {
    let width = columns.div_ceil(columns.div_ceil(WIDEST).max(1)).next_multiple_of(QUANT_BLOCK);
    (0..columns).step_by(width.max(1)).map(move |first| first..(first + width).min(columns))
}

impl Moments {
    /// Sums of nothing.
    pub fn new(columns: usize) -> Moments {
        Moments { columns, sums: vec![0.0; Moments::len(columns)] }
    }

    /// Figures that the sums of so many columns are.
    pub fn len(columns: usize) -> usize {
        ranges(columns).map(|r| r.len() * r.len()).sum()
    }

    /// From figures that were kept.
    ///
    /// # Errors
    /// Where they are not as many as there must be.
    pub fn from_sums(columns: usize, sums: Vec<f32>) -> Result<Moments> {
        if sums.len() != Moments::len(columns) {
            bail!(Input, "expected {} sums for {columns} columns, found {}", Moments::len(columns), sums.len());
        }
        Ok(Moments { columns, sums })
    }

    /// Columns of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The figures, to be kept.
    pub fn sums(&self) -> &[f32] {
        &self.sums
    }

    /// Adds rows, one after the other in `rows`, on several threads; their number changes no sum.
    pub fn add(&mut self, rows: &[f32], threads: usize) {
        let columns = self.columns;
        let mut rest = self.sums.as_mut_slice();
        for range in ranges(columns) {
            let (block, after) = rest.split_at_mut(range.len() * range.len());
            rest = after;
            // Threads take lines in turn: upper ones are longer.
            let mut lines: Vec<Vec<(usize, &mut [f32])>> = (0..threads.max(1)).map(|_| vec![]).collect();
            for (i, line) in block.chunks_exact_mut(range.len().max(1)).enumerate() {
                lines[i / 4 % threads.max(1)].push((i, line));
            }
            std::thread::scope(|scope| {
                for mut lines in lines {
                    let range = range.clone();
                    scope.spawn(move || add_to(&mut lines, rows, columns, range));
                }
            });
        }
    }

    /// Mean squares but for a factor: the sum of squares of every column.
    pub fn diagonal(&self) -> Vec<f32> {
        self.blocks().flat_map(|(range, block)| (0..range.len()).map(move |i| block[i * range.len() + i])).collect()
    }

    /// Columns and sums of each diagonal block.
    pub fn blocks(&self) -> impl Iterator<Item = (Range<usize>, &[f32])> {
        let mut first = 0;
        ranges(self.columns).map(move |range| {
            let size = range.len() * range.len();
            first += size;
            (range, &self.sums[first - size..first])
        })
    }
}

/// Adds rows to some lines of a diagonal block, right of the diagonal.
fn add_to(lines: &mut [(usize, &mut [f32])], rows: &[f32], columns: usize, range: Range<usize>) {
    for some in rows.chunks(columns * TOGETHER) {
        let some: Vec<&[f32]> = some.chunks_exact(columns).map(|row| &row[range.clone()]).collect();
        let mut factors = [0.0; TOGETHER];
        for (i, line) in lines.iter_mut() {
            factors.iter_mut().zip(&some).for_each(|(factor, row)| *factor = row[*i]);
            add(&mut line[*i..], &factors[..some.len()], |r| &some[r][*i..]);
        }
    }
}
/// Mean squares on a scale of their own, none of them nothing: what was never seen should still be about right.
pub(super) fn importance(squares: &[f32]) -> Vec<f32> {
    let mean = squares.iter().map(|x| f64::from(*x)).sum::<f64>() / squares.len().max(1) as f64;
    if mean <= 0.0 {
        return vec![1.0; squares.len()];
    }
    squares.iter().map(|x| (f64::from(*x) / mean + 1e-2) as f32).collect()
}
