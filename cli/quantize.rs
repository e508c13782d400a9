//! Matrices of a compiled model -> codes, by a quantizer that knows what they are multiplied with.
//!
//! ```text
//! the model runs (calibration/inputs.rs)
//!   moments of q, k, v  -->  factors  --rows-->  blocks of q, k, v, with which the model goes on
//! ```
//!
//! So every matrix is quantized for what the quantized ones before it give, and for the results that the float model has there.
//! The blocks take the place of the weights' sources: packing finds them as a model file would have stored them. They are
//! kept under the hash of what decides them ([`STORED_BYTES`] at most). The bytes do not depend on the number of threads.

use crate::calibration::{self, inputs};
use crate::driver::{CompileOptions, Progress};
use mansard_ir::model::{Source, Weight};
use mansard_ir::quantize::awq::Sample;
use mansard_ir::quantize::moments::Moments;
use mansard_ir::quantize::{Needs, Prepared, Quantizer, ROWS, can_quantize, input_scales};
use mansard_ir::{DType, Error, Kind, Model, Place, Result, bail};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Largest file of codes that is kept for another time.
const STORED_BYTES: usize = 2 << 30;

/// The quantizer that is asked for; else the best that was measured below 8 bits, where there is a tokenizer to calibrate with.
///
/// # Errors
/// Where one is asked for that takes a tokenizer, and there is none.
pub fn choose(model: &Model, options: &CompileOptions) -> Result<Quantizer> {
    if let Some(quantizer) = options.quantizer {
        if quantizer.row().needs != Needs::Weights && model.info.tokenizer.is_none() {
            let message =
                format!("--quantizer {quantizer}: the model has no tokenizer to read a calibration text with");
            return Err(Error::new(Kind::Usage, message).help("--quantizer nearest takes no text"));
        }
        return Ok(quantizer);
    }
    let coarse = |d: &DType| d.int().is_some_and(|int| int.bits < 8);
    let coarse = options.weights.iter().chain(options.formats.values()).any(coarse);
    let text = model.info.tokenizer.is_some() && options.synthetic_seed.is_none();
    Ok(if coarse && text { Quantizer::Gptq } else { Quantizer::Nearest })
}

/// What the options' quantizer is chosen by: the hash of the calibration text; `None` where it takes none.
///
/// # Errors
/// Where the text cannot be read.
pub fn calibrated_on(quantizer: Quantizer, options: &CompileOptions) -> Result<Option<String>> {
    if quantizer.row().needs == Needs::Weights {
        return Ok(None);
    }
    calibration::hash(options.calibration.as_deref()).map(Some)
}

/// Quantizes those products of `model` that are to be, and puts the codes in the place of their sources.
///
/// # Errors
/// Where the model cannot be calibrated, or a row cannot be read or quantized.
pub fn quantize(
    model: &mut Model,
    input: &Path,
    options: &CompileOptions,
    quantizer: Quantizer,
    progress: &mut dyn Progress,
) -> Result<()> {
    let wanted = |weight: &Weight| {
        let dtype = weight.dtype_shape().0;
        dtype.int().is_some() && can_quantize(dtype) && !weight.stored_as(dtype)
    };
    let jobs = model.weights.iter().filter(|(_, weight)| wanted(weight));
    let jobs: BTreeMap<String, Weight> = jobs.map(|(name, weight)| (name.to_owned(), weight.clone())).collect();
    if quantizer.row().needs == Needs::Weights || jobs.is_empty() {
        return Ok(());
    }
    let text = calibration::text(options.calibration.as_deref())?;
    let formats = jobs.iter().map(|(name, weight)| format!("{name} {}", weight.dtype_shape().0));
    let more: Vec<String> = [quantizer.to_string()].into_iter().chain(formats).collect();
    let key = calibration::key(input, options, &text, more.iter().map(String::as_str))?;
    let path = calibration::stored("codes", &key);
    let kept = path.as_ref().and_then(|path| kept(&std::fs::read(path).ok()?));
    let codes = match kept {
        Some(codes) => codes,
        None => {
            let mut visitor = Visitor { model, jobs: &jobs, quantizer, threads: options.threads, codes: vec![] };
            inputs::visit(input, options, &text, &mut visitor, progress)?;
            if let Some(path) = path {
                keep(&path, &visitor.codes);
            }
            visitor.codes
        }
    };
    for (name, bytes) in codes {
        if let Some(weight) = model.weights.get_mut(&name) {
            weight.source = match weight.dtype_shape().0 {
                // Scales.
                DType::F32 => Source::Values(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
                dtype => Source::Bytes { dtype, bytes },
            };
        }
    }
    Ok(())
}

/// Rows of a matrix that scales are chosen by.
const SAMPLED_ROWS: usize = 64;

/// Names and blocks of matrices.
type Codes = Vec<(String, Arc<[u8]>)>;

/// Quantizes matrices as their moments come.
struct Visitor<'a> {
    model: &'a Model,
    /// Matrices to be quantized, in the type that they will have.
    jobs: &'a BTreeMap<String, Weight>,
    quantizer: Quantizer,
    threads: usize,
    codes: Codes,
}

impl inputs::Visitor for Visitor<'_> {
    fn wants(&self, names: &[String]) -> bool {
        names.iter().any(|name| self.jobs.contains_key(name))
    }

    fn replaces(&self) -> bool {
        self.quantizer.row().needs == Needs::Moments
    }

    fn see(&mut self, names: &[String], moments: &Moments) -> Result<Vec<(String, Weight)>> {
        // A matrix that is multiplied with twice is quantized for its first inputs.
        let jobs = names.iter().filter(|name| self.codes.iter().all(|(known, _)| known != *name));
        let jobs: Vec<(&String, &Weight)> = jobs.filter_map(|name| self.jobs.get_key_value(name)).collect();
        let scales = names.iter().map(|name| input_scales(name)).find(|name| self.model.weights.get(name).is_ok());
        let (mut scaled, mut samples) = (vec![], vec![]);
        for (name, weight) in jobs.iter().filter(|(_, weight)| self.quantizer.row().scales_inputs && is_scaled(weight))
        {
            if scales.is_none() {
                bail!(Internal, "`{name}` reads inputs that are scaled for other matrices");
            }
            scaled.push(*name);
            samples.push(sample(weight).at(|| format!("weight `{name}`"))?);
        }
        let prepared = match self.quantizer.row().scales_inputs && samples.is_empty() {
            true => Prepared::Nearest,
            false => Prepared::new(self.quantizer, moments, &samples, self.threads)?,
        };
        let mut new = vec![];
        for (name, weight) in jobs {
            let prepared = match &prepared {
                Prepared::Awq(_) if !scaled.contains(&name) => &Prepared::Nearest,
                prepared => prepared,
            };
            let bytes: Arc<[u8]> = blocks(weight, prepared, self.threads).at(|| format!("weight `{name}`"))?.into();
            let source = Source::Bytes { dtype: weight.dtype_shape().0, bytes: bytes.clone() };
            let mut coded = Weight { source, ..weight.with_dtype(DType::F32) };
            if let Prepared::Awq(scales) = prepared {
                let mut values = coded.read_all()?;
                values.iter_mut().zip(scales.iter().cycle()).for_each(|(w, s)| *w /= s);
                coded.source = Source::Values(values.into());
            }
            self.codes.push((name.clone(), bytes));
            new.push((name.clone(), coded));
        }
        // What the model multiplies these inputs with.
        if let (Prepared::Awq(found), Some(name)) = (&prepared, scales) {
            self.codes.push((name, found.iter().flat_map(|s| (1.0 / s).to_le_bytes()).collect()));
        }
        Ok(new)
    }
}

/// Its inputs are scaled where a quantizer does that: see `passes/scales.rs`.
fn is_scaled(weight: &Weight) -> bool {
    let (dtype, shape) = weight.dtype_shape();
    shape.len() == 2 && dtype.int().is_some_and(|int| int.bits < 8)
}

/// Rows spread over a matrix.
fn sample(weight: &Weight) -> Result<Sample> {
    let (dtype, (rows, columns)) = (weight.dtype_shape().0, weight.rows_columns());
    let reals = weight.with_dtype(DType::F32);
    let mut sample = Sample { dtype, rows: vec![] };
    for row in (0..rows).step_by(rows.div_ceil(SAMPLED_ROWS).max(1)) {
        let first = sample.rows.len();
        sample.rows.resize(first + columns, 0.0);
        reals.read_row(row, &mut sample.rows[first..])?;
    }
    Ok(sample)
}

/// The blocks of all rows, some rows at a time on each thread.
fn blocks(weight: &Weight, prepared: &Prepared, threads: usize) -> Result<Vec<u8>> {
    let (dtype, (rows, columns)) = (weight.dtype_shape().0, weight.rows_columns());
    let Some(bytes) = dtype.bytes(columns) else { bail!(Internal, "rows of {columns} {dtype}") };
    let mut out = vec![0; rows * bytes];
    // Its reals, whatever it is to be stored as.
    let reals = &weight.with_dtype(DType::F32);
    let share = rows.div_ceil(threads.max(1)).next_multiple_of(ROWS);
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let parts = out.chunks_mut((share * bytes).max(1)).enumerate();
        let workers = parts.map(|(worker, out)| {
            scope.spawn(move || {
                for (tile, out) in out.chunks_mut(ROWS * bytes).enumerate() {
                    let first = worker * share + tile * ROWS;
                    let mut values = vec![0.0; out.len() / bytes * columns];
                    for (row, values) in values.chunks_exact_mut(columns).enumerate() {
                        reals.read_row(first + row, values)?;
                    }
                    prepared.quantize(dtype, columns, &values, out)?;
                }
                Ok(())
            })
        });
        let workers: Vec<_> = workers.collect();
        workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(out)
}

/// A file of codes: BLAKE3 of the rest, names and sizes, blocks. What cannot be kept is made again the next time.
fn keep(path: &Path, codes: &Codes) {
    let index: Vec<(&str, usize)> = codes.iter().map(|(name, bytes)| (name.as_str(), bytes.len())).collect();
    let Ok(index) = serde_json::to_vec(&index) else { return };
    let length = (index.len() as u64).to_le_bytes();
    let parts = || [&length[..], &index].into_iter().chain(codes.iter().map(|(_, bytes)| &bytes[..]));
    if parts().map(<[u8]>::len).sum::<usize>() > STORED_BYTES {
        return;
    }
    let mut hasher = blake3::Hasher::new();
    parts().for_each(|part| {
        hasher.update(part);
    });
    let write = || -> std::io::Result<()> {
        use std::io::Write;
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(hasher.finalize().as_bytes())?;
        parts().try_for_each(|part| file.write_all(part))?;
        file.persist(path)?;
        Ok(())
    };
    let _ = write();
}

/// What such a file holds; `None` where it is damaged.
fn kept(file: &[u8]) -> Option<Codes> {
    let (hash, rest) = file.split_first_chunk::<32>()?;
    if blake3::hash(rest).as_bytes() != hash {
        return None;
    }
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let (index, mut rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let index: Vec<(String, usize)> = serde_json::from_slice(index).ok()?;
    let mut codes = vec![];
    for (name, size) in index {
        let (bytes, further) = rest.split_at_checked(size)?;
        codes.push((name, bytes.into()));
        rest = further;
    }
    Some(codes)
}
