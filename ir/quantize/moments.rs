//! What a matrix is multiplied with: second moments of its inputs, which say what an error in its weights does to its results.
//!
//! ```text
//! y = x w^T, w off by e (a row)   ->   sum over rows x of (x e)^2  =  e (sum of x^T x) e^T
//! ```
//!
//! Where matrices before it are quantized already, its inputs `x` are not those `z` of the float model. Then the best for its
//! results is not `w` any more but `w + w M`, where `M = (sum of (z - x)^T x) (sum of x^T x)^-1`; the first factor is the *shift*.
//! (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025, have the same in another form.)
//!
//! Sums of rows of more than [`WIDEST`] columns are kept for neighbouring columns only: diagonal blocks of equal width, so
//! that memory grows with columns, not with their square. Sums are in f32, of a few hundred rows at a time.

use crate::{Result, bail};
use ndarray::{Array2, ArrayView2, linalg::general_mat_mul, s};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most columns of one diagonal block.
pub const WIDEST: usize = 8192;

/// Every quant block lies in one diagonal block.
const QUANT_BLOCK: usize = 256;

/// Columns of a square of sums that is taken at a time.
const TILE: usize = 192;

/// The sums of one matrix's inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    columns: usize,
    /// Diagonal blocks one after the other, each row-major; only what is on or right of the diagonal counts.
    sums: Vec<f32>,
    /// Blocks likewise, of which everything counts; empty where nothing has shifted.
    shift: Vec<f32>,
}

/// One diagonal block.
pub struct Block<'a> {
    /// Its columns.
    pub range: Range<usize>,
    /// Sums of products of inputs.
    pub sums: &'a [f32],
    /// Sums of products of what they are short of with them: a line for each column of the first.
    pub shift: Option<&'a [f32]>,
}

/// Columns of each diagonal block.
fn ranges(columns: usize) -> impl Iterator<Item = Range<usize>> {
    let width = columns.div_ceil(columns.div_ceil(WIDEST).max(1)).next_multiple_of(QUANT_BLOCK);
    (0..columns).step_by(width.max(1)).map(move |first| first..(first + width).min(columns))
}

impl Moments {
    /// Sums of nothing.
    pub fn new(columns: usize) -> Moments {
        let size = ranges(columns).map(|r| r.len() * r.len()).sum();
        Moments { columns, sums: vec![0.0; size], shift: vec![] }
    }

    /// Columns of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Adds rows, one after the other in `rows`, on several threads; their number changes no sum.
    ///
    /// # Errors
    /// Where they are no whole rows.
    pub fn add(&mut self, rows: &[f32], threads: usize) -> Result<()> {
        let (rows, mut first) = (self.view(rows)?, 0);
        for range in ranges(self.columns) {
            let size = range.len();
            let rows = rows.slice(s![.., range]);
            add_products(&mut self.sums[first..first + size * size], (rows, rows), true, threads);
            first += size * size;
        }
        Ok(())
    }

    /// Adds rows that should be `wanted`.
    ///
    /// # Errors
    /// Where they are no whole rows, or not as many.
    pub fn add_shifted(&mut self, rows: &[f32], wanted: &[f32], threads: usize) -> Result<()> {
        self.add(rows, threads)?;
        if rows.len() != wanted.len() {
            bail!(Internal, "{} inputs that should be {}", rows.len(), wanted.len());
        }
        let short: Vec<f32> = wanted.iter().zip(rows).map(|(z, x)| z - x).collect();
        let (rows, short, mut first) = (self.view(rows)?, self.view(&short)?, 0);
        self.shift.resize(self.sums.len(), 0.0);
        for range in ranges(self.columns) {
            let size = range.len();
            let pair = (short.slice(s![.., range.clone()]), rows.slice(s![.., range]));
            add_products(&mut self.shift[first..first + size * size], pair, false, threads);
            first += size * size;
        }
        Ok(())
    }

    fn view<'a>(&self, rows: &'a [f32]) -> Result<ArrayView2<'a, f32>> {
        let count = rows.len() / self.columns.max(1);
        match ArrayView2::from_shape((count, self.columns), rows) {
            Ok(view) if rows.len() == count * self.columns => Ok(view),
            _ => bail!(Internal, "{} inputs of {} columns", rows.len(), self.columns),
        }
    }

    /// Mean squares but for a factor: the sum of squares of every column.
    pub fn diagonal(&self) -> Vec<f32> {
        self.blocks().flat_map(|b| (0..b.range.len()).map(move |i| b.sums[i * b.range.len() + i])).collect()
    }

    /// The sum of squares of what a row of weights makes of the inputs.
    pub fn square(&self, row: &[f32]) -> f64 {
        let mut sum = 0.0;
        for block in self.blocks() {
            let row = &row[block.range.clone()];
            for (i, line) in block.sums.chunks_exact(row.len().max(1)).enumerate() {
                let later: f32 = line[i + 1..].iter().zip(&row[i + 1..]).map(|(h, x)| h * x).sum();
                sum += f64::from(row[i]) * f64::from(line[i] * row[i] + 2.0 * later);
            }
        }
        sum
    }

    /// The diagonal blocks.
    pub fn blocks(&self) -> impl Iterator<Item = Block<'_>> {
        let mut first = 0;
        ranges(self.columns).map(move |range| {
            let size = range.len() * range.len();
            first += size;
            Block { range, sums: &self.sums[first - size..first], shift: self.shift.get(first - size..first) }
        })
    }
}

/// `sums += a^T b`, square by square; `upper`: only those on or right of the diagonal.
fn add_products(sums: &mut [f32], (a, b): (ArrayView2<'_, f32>, ArrayView2<'_, f32>), upper: bool, threads: usize) {
    let size = a.ncols();
    let tile = |i: usize| i..size.min(i + TILE);
    let firsts = || (0..size).step_by(TILE);
    let tiles: Vec<(usize, usize)> =
        firsts().flat_map(|i| firsts().map(move |j| (i, j))).filter(|(i, j)| !upper || i <= j).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut made = vec![];
        while let Some((i, j)) = tiles.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (a, b) = (a.slice(s![.., tile(*i)]), b.slice(s![.., tile(*j)]));
            let mut sum = Array2::zeros((a.ncols(), b.ncols()));
            general_mat_mul(1.0, &a.t(), &b, 0.0, &mut sum);
            made.push((*i, *j, sum));
        }
        made
    };
    let made: Vec<_> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(tiles.len())).map(|_| scope.spawn(work)).collect();
        let mine = work();
        let others = others.into_iter().flat_map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        mine.into_iter().chain(others).collect()
    });
    for (i, j, sum) in made {
        for (line, sum) in sums.chunks_exact_mut(size).skip(i).zip(sum.outer_iter()) {
            line[j..].iter_mut().zip(sum).for_each(|(to, x)| *to += x);
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
