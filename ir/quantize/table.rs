//! The table of quantizers: how codes and scales are chosen, and what must be known of a matrix's inputs for it.

use super::awq::{self, Sample};
use super::moments::Moments;
use super::moments::importance;
use super::{gptq, quantize_by_importance};
use crate::formats::DType;
use crate::{Result, bail};
use std::fmt;

/// How reals become codes: an index into [`QUANTIZERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
#[allow(missing_docs)] // the table documents them
pub enum Quantizer {
    #[default]
    Nearest,
    Importance,
    Gptq,
    Awq,
}

/// What a quantizer must know of the rows that a matrix is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Weights,
    /// The mean square of every column.
    Squares,
    /// Their second moments.
    Moments,
}

/// One row of the table.
pub struct Row {
    /// The quantizer of this row.
    pub quantizer: Quantizer,
    /// Its name on the command line.
    pub name: &'static str,
    /// What it must know.
    pub needs: Needs,
    /// It scales columns of inputs, too.
    pub scales_inputs: bool,
    /// One line of meaning; its source.
    pub meaning: &'static str,
}

/// The table, in the order of [`Quantizer`].
pub static QUANTIZERS: [Row; 4] = [
    Row {
        quantizer: Quantizer::Nearest,
        name: "nearest",
        needs: Needs::Weights,
        scales_inputs: false,
        meaning: "to nearest, scales of least squared error",
    },
    Row {
        quantizer: Quantizer::Importance,
        name: "importance",
        needs: Needs::Squares,
        scales_inputs: false,
        meaning: "to nearest, scales of least squared error weighted with the mean square of each column's inputs",
    },
    Row {
        quantizer: Quantizer::Gptq,
        name: "gptq",
        needs: Needs::Moments,
        scales_inputs: false,
        meaning: "column by column, errors passed on to later columns (GPTQ), then codes and scales one at a time",
    },
    Row {
        quantizer: Quantizer::Awq,
        name: "awq",
        needs: Needs::Moments,
        scales_inputs: true,
        meaning: "to nearest, after columns are scaled by a power of their inputs' size, which the inputs are divided by (AWQ)",
    },
];

impl Quantizer {
    /// Its row of the table.
    pub fn row(self) -> &'static Row {
        &QUANTIZERS[self as usize]
    }

    /// The quantizer of that name.
    pub fn parse(name: &str) -> Option<Quantizer> {
        QUANTIZERS.iter().find(|row| row.name == name).map(|row| row.quantizer)
    }
}

/// The weight that holds what the inputs of a matrix are multiplied with, named after that matrix.
pub fn input_scales(matrix: &str) -> String {
    format!("{matrix}.input_scales")
}

impl fmt::Display for Quantizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().name)
    }
}

/// What a quantizer makes of the second moments of a matrix's inputs, once for all matrices that share them.
pub enum Prepared {
    /// Nothing.
    Nearest,
    /// The importance of each column.
    Importance(Vec<f32>),
    /// Factors.
    Gptq(gptq::Prepared),
    /// What columns are multiplied with first.
    Awq(Vec<f32>),
}

impl Prepared {
    /// For quantizing by `quantizer`, made on several threads; `samples` of the matrices are for one that scales inputs.
    ///
    /// # Errors
    /// Where the moments are no numbers.
    pub fn new(quantizer: Quantizer, moments: &Moments, samples: &[Sample], threads: usize) -> Result<Prepared> {
        if moments.diagonal().iter().any(|x| !x.is_finite() || *x < 0.0) {
            bail!(Input, "the inputs of a matrix are no numbers on the calibration text");
        }
        Ok(match quantizer {
            Quantizer::Nearest => Prepared::Nearest,
            Quantizer::Importance => Prepared::Importance(importance(&moments.diagonal())),
            Quantizer::Awq => Prepared::Awq(awq::search(moments, samples)?),
            Quantizer::Gptq => Prepared::Gptq(gptq::Prepared::new(moments, threads)?),
        })
    }

    /// Quantizes some rows, one after the other in `rows` and in `out`.
    ///
    /// # Errors
    /// As [`super::quantize`].
    pub fn quantize(&self, dtype: DType, columns: usize, rows: &[f32], out: &mut [u8]) -> Result<()> {
        let Some(bytes) = dtype.bytes(columns).filter(|bytes| *bytes > 0) else {
            bail!(Input, "a row of {columns} elements does not fill whole groups of {dtype}");
        };
        let importance = match self {
            Prepared::Gptq(prepared) => return prepared.quantize(dtype, rows, out),
            Prepared::Importance(known) | Prepared::Awq(known) if known.len() != columns => {
                bail!(Internal, "rows of {columns}, where {} columns are known", known.len())
            }
            Prepared::Awq(scales) => {
                let scaled: Vec<f32> = rows.iter().zip(scales.iter().cycle()).map(|(w, s)| w * s).collect();
                return Prepared::Nearest.quantize(dtype, columns, &scaled, out);
            }
            Prepared::Importance(importance) => Some(importance.as_slice()),
            Prepared::Nearest => None,
        };
        for (row, out) in rows.chunks_exact(columns).zip(out.chunks_exact_mut(bytes)) {
            quantize_by_importance(dtype, row, importance, out)?;
        }
        Ok(())
    }
}
