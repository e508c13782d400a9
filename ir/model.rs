//! A model: calls of straight-line graphs, and a weight table.
//!
//! A 30-layer model is `embed; layer x 30; head`: three graphs, 32 calls. A call prefixes the graph's weight names (`%w =
//! weight "mlp.down_proj.weight"` under `model.layers.3.`) and binds the graph's inputs by name: first to what earlier
//! calls returned under that name, then to the step's own inputs (`tokens: i32[t]`, `positions: i32[t]`, `rows: i32[r]`,
//! `step: step[s]`). Inputs of cache type are state: call 7's `keys` is a cache of its own, threaded from step to step.
//! Nothing is unrolled; layers that differ (attention kind, weight formats) have a graph per kind.

use crate::file::MappedFile;
use crate::formats::{DType, dequantize};
use crate::graph::Graph;
use crate::grid::Grid;
use crate::quantize::quantize;
use crate::types::{Dim, Type};
use crate::{Error, Kind, Place, Result, bail};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// A program and its weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// Printed `@smollm2`.
    pub name: String,
    /// Distinct graphs.
    pub graphs: Vec<Graph>,
    /// What runs, in order.
    pub calls: Vec<Call>,
    /// Names of the values that leave a step: `logits`, or `hidden` and `embedding`.
    pub outputs: Vec<String>,
    /// Where every weight's bytes are.
    pub weights: WeightTable,
    /// What a runtime must know beside the program.
    pub info: ModelInfo,
}

/// One run of a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Name of the graph. Variants of one graph for different steps share it.
    pub graph: String,
    /// Put before the graph's weight names and the names of its caches; ends in `.` or is empty.
    pub prefix: String,
}

/// Facts about a model that are no part of its program.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ModelInfo {
    /// As the file says: `llama`, `gemma3`, `bert`...
    pub architecture: String,
    /// Positions a sequence may have.
    pub context: usize,
    /// Rows of the token table.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// An encoder has no logits: it returns hidden states and a pooled embedding.
    pub encoder: bool,
    /// Ids that end a generation.
    pub end_tokens: Vec<u32>,
    /// The tokenizer, where the file has one.
    pub tokenizer: Option<TokenizerInfo>,
}

/// A tokenizer in the form the `tokenizers` crate reads, and how prompts are put to it.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TokenizerInfo {
    /// `tokenizer.json`. Stored as a section of its own in an artifact.
    #[serde(skip)]
    pub json: String,
    /// Begin-of-sequence token put before a prompt; `None` where the model wants none.
    pub begin: Option<u32>,
    /// Text of the begin-of-sequence token, for templates.
    pub begin_text: String,
    /// Text of the end-of-sequence token, for templates.
    pub end_text: String,
    /// Jinja chat template.
    pub chat_template: Option<String>,
}

/// Name -> weight, in order of name.
#[derive(Clone, Debug, Default)]
pub struct WeightTable(BTreeMap<String, Weight>);

/// A logical weight: the type the program sees and where its values come from.
#[derive(Clone, Debug)]
pub struct Weight {
    /// `f32[n]` or `dtype[n, k]`, or `dtype[experts, n, k]`. Its dtype may be wider than the source's.
    pub ty: Type,
    /// The bytes.
    pub source: Source,
}

/// Where a weight's values come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Pieces of files, concatenated along the first axis (rows of the logical weight).
    Parts(Vec<Part>),
    /// Values the importer computed (rope frequencies), row-major.
    Values(Arc<[f32]>),
    /// Bytes in memory, in file order: like one part of a file, for weights that are made and not read.
    Bytes {
        /// Stored format.
        dtype: DType,
        /// All rows.
        bytes: Arc<[u8]>,
    },
    /// Seeded pseudo-random values of a plausible size, made when read: any shape can be compiled without its file.
    Synthetic {
        /// Same seed, same values.
        seed: u64,
    },
    /// Computed from other weights when read.
    Made(Arc<crate::recipe::Made>),
}

/// Rows of one matrix stored in a file.
#[derive(Clone, Debug)]
pub struct Part {
    /// The mapped file.
    pub file: Arc<MappedFile>,
    /// First byte of the stored tensor.
    pub offset: usize,
    /// Stored format.
    pub dtype: DType,
    /// Stored rows and columns, row-major; a vector is `(1, n)` or `(n, 1)`.
    pub stored: (usize, usize),
    /// The logical matrix is the stored one transposed (float dtypes only).
    pub transposed: bool,
    /// Rows of the logical matrix that this part contributes.
    pub rows: Range<usize>,
    /// Where scales and zero points are in tensors of their own: what `file` and `offset` do not tell.
    pub grid: Option<Arc<Grid>>,
}

impl WeightTable {
    /// Adds or replaces a weight.
    pub fn insert(&mut self, name: impl Into<String>, weight: Weight) {
        self.0.insert(name.into(), weight);
    }

    /// The weight of that name.
    ///
    /// # Errors
    /// Where there is none.
    pub fn get(&self, name: &str) -> Result<&Weight> {
        self.0.get(name).ok_or_else(|| Error::new(Kind::Input, format!("the model has no weight `{name}`")))
    }

    /// The weight of that name, to change.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Weight> {
        self.0.get_mut(name)
    }

    /// In order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.0.iter().map(|(n, w)| (n.as_str(), w))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Weight {
    /// Dtype and extents.
    pub fn dtype_shape(&self) -> (DType, Vec<usize>) {
        let (dtype, shape) = self.ty.as_tensor().expect("weights are tensors");
        let fixed = |d: &Dim| if let Dim::N(n) = d { *n } else { unreachable!("weights have fixed extents") };
        (dtype, shape.iter().map(fixed).collect())
    }

    /// The same values, rounded or quantized to another dtype.
    pub fn with_dtype(&self, to: DType) -> Weight {
        let mut weight = self.clone();
        if let Type::Tensor { dtype, .. } = &mut weight.ty {
            *dtype = to;
        }
        weight
    }

    /// Rows (all axes but the last) and columns.
    pub fn rows_columns(&self) -> (usize, usize) {
        let (_, shape) = self.dtype_shape();
        let columns = shape.last().copied().unwrap_or(1);
        (shape.iter().product::<usize>() / columns.max(1), columns)
    }

    /// All rows have been stored in `dtype`, so [`Weight::quantized_row`] gives them as they are.
    pub fn stored_as(&self, dtype: DType) -> bool {
        match &self.source {
            Source::Parts(parts) => parts.iter().all(|p| p.dtype == dtype && !p.transposed),
            Source::Bytes { dtype: stored, .. } => *stored == dtype,
            Source::Made(made) => made.stored_as(dtype),
            Source::Values(_) | Source::Synthetic { .. } => false,
        }
    }

    /// The stored bytes of one row, for weights that are [`Weight::stored_as`] their dtype.
    ///
    /// # Errors
    /// Where the file is too short or the row is not stored.
    fn raw_row(&self, row: usize) -> Result<&[u8]> {
        if let Source::Bytes { dtype, bytes } = &self.source {
            let (rows, columns) = self.rows_columns();
            let range = dtype.bytes(columns).filter(|_| row < rows).map(|len| row * len..(row + 1) * len);
            return range.and_then(|range| bytes.get(range)).ok_or_else(|| {
                let message = format!("row {row} of {rows} of {columns} {dtype} is not in the {} bytes", bytes.len());
                Error::new(Kind::Internal, message)
            });
        }
        let (part, row) = self.part(row)?;
        let bytes = part.dtype.bytes(part.stored.1);
        let Some(bytes) = bytes else {
            bail!(Input, "a row of {} elements does not fill whole blocks of {}", part.stored.1, part.dtype);
        };
        part.file.bytes(part.offset + row * bytes, bytes)
    }

    /// The bytes of one row of a weight of a quantized type: as stored, or its reals quantized.
    ///
    /// # Errors
    /// Where the row cannot be read, or its reals cannot be quantized.
    pub fn quantized_row(&self, row: usize) -> Result<Cow<'_, [u8]>> {
        let (dtype, (_, columns)) = (self.dtype_shape().0.in_file(), self.rows_columns());
        if let Source::Made(made) = &self.source
            && let Some(moved) = made.moved_row(row)
        {
            return moved;
        }
        if self.stored_as(dtype) {
            if let Source::Parts(_) = self.source
                && let (part, row) = self.part(row)?
                && let Some(grid) = &part.grid
            {
                return Ok(Cow::Owned(grid.blocks(row, columns, dtype)?));
            }
            return Ok(Cow::Borrowed(self.raw_row(row)?));
        }
        let Some(bytes) = dtype.bytes(columns) else {
            bail!(Input, "a row of {columns} elements does not fill whole groups of {dtype}");
        };
        let (mut reals, mut out) = (vec![0.0; columns], vec![0; bytes]);
        self.read_source(row, &mut reals)?;
        quantize(dtype, &reals, &mut out)?;
        Ok(Cow::Owned(out))
    }

    /// Row `row` (of the logical matrix) as f32: dequantized, and rounded or quantized where the weight's type is narrower
    /// than its source.
    ///
    /// # Errors
    /// Where the file is too short, or its values cannot be quantized.
    pub fn read_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let dtype = self.dtype_shape().0.in_file();
        if dtype.int().is_some() {
            dequantize(dtype, &self.quantized_row(row)?, out);
            return Ok(());
        }
        self.read_source(row, out)?;
        match dtype {
            DType::BF16 => out.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32()),
            DType::F16 => out.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
            _ => {}
        }
        Ok(())
    }

    fn read_source(&self, row: usize, out: &mut [f32]) -> Result<()> {
        match &self.source {
            Source::Values(values) => out.copy_from_slice(&values[row * out.len()..][..out.len()]),
            Source::Bytes { dtype, .. } => dequantize(*dtype, self.raw_row(row)?, out),
            Source::Synthetic { seed } => synthetic_row(*seed, row, out),
            Source::Made(made) => made.read_row(row, out)?,
            Source::Parts(_) => {
                let (part, row) = self.part(row)?;
                if let Some(grid) = &part.grid {
                    return grid.reals(row, out);
                }
                if !part.transposed {
                    if part.stored.1 != out.len() {
                        bail!(Input, "expected rows of {}, the file has {}", out.len(), part.stored.1);
                    }
                    dequantize(part.dtype, self.raw_row_of(part, row)?, out);
                    return Ok(());
                }
                let element = part.dtype.format().block_bytes;
                for (k, x) in out.iter_mut().enumerate() {
                    let at = part.offset + (k * part.stored.1 + row) * element;
                    dequantize(part.dtype, part.file.bytes(at, element)?, std::slice::from_mut(x));
                }
            }
        }
        Ok(())
    }

    /// All values, row-major, in f32: for the interpreter and for vectors.
    ///
    /// # Errors
    /// Where the file is too short.
    pub fn read_all(&self) -> Result<Vec<f32>> {
        let (rows, columns) = self.rows_columns();
        let mut out = vec![0.0; rows * columns];
        for (row, out) in out.chunks_exact_mut(columns.max(1)).enumerate() {
            self.read_row(row, out).at(|| format!("row {row}"))?;
        }
        Ok(out)
    }

    fn raw_row_of<'a>(&self, part: &'a Part, row: usize) -> Result<&'a [u8]> {
        let Some(bytes) = part.dtype.bytes(part.stored.1) else {
            bail!(Input, "a row of {} elements does not fill whole blocks of {}", part.stored.1, part.dtype);
        };
        part.file.bytes(part.offset + row * bytes, bytes)
    }

    /// The part that holds logical row `row`, and the row inside the part's stored matrix.
    fn part(&self, row: usize) -> Result<(&Part, usize)> {
        let Source::Parts(parts) = &self.source else {
            bail!(Internal, "row {row} of a weight that is in no file");
        };
        let mut first = 0;
        for part in parts {
            if row < first + part.rows.len() {
                return Ok((part, part.rows.start + row - first));
            }
            first += part.rows.len();
        }
        bail!(Internal, "row {row} of a weight with {first} rows")
    }
}

/// Uniform values of variance about `1 / columns`, from a counter-based generator (SplitMix64), so that rows can be made
/// in any order.
fn synthetic_row(seed: u64, row: usize, out: &mut [f32]) {
    let amplitude = (3.0 / out.len() as f32).sqrt();
    for (k, x) in out.iter_mut().enumerate() {
        let mut z = seed.wrapping_add((row as u64) << 32 | k as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        *x = ((z ^ z >> 31) >> 40) as f32 / (1 << 23) as f32 * amplitude - amplitude;
    }
}

impl Model {
    /// The graphs a call may run: one, or its variants by number of tokens.
    pub fn graphs_of<'a>(&'a self, call: &'a Call) -> impl Iterator<Item = &'a Graph> {
        self.graphs.iter().filter(move |g| g.name == call.graph)
    }
}
