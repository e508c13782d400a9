//! Matrices of a compiled model -> codes, by a quantizer that knows what they are multiplied with.
//!
//! ```text
//! statistics (calibration/statistics.rs)  --group by group-->  factors  --row by row-->  blocks, in a file
//! ```
//!
//! The file takes the place of the weights' sources, so that packing finds them as a model file would have stored them.
//! Invariants: a thread has one group's factors in memory and some rows, and the bytes do not depend on the number of threads.

use crate::calibration::{self, statistics::Statistics};
use crate::driver::{CompileOptions, Progress};
use mansard_ir::file::MappedFile;
use mansard_ir::model::{Part, Source, Weight};
use mansard_ir::quantize::moments::WIDEST;
use mansard_ir::quantize::{Needs, Prepared, Quantizer, can_quantize};
use mansard_ir::{DType, Error, Kind, Model, Place, Result, bail};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Rows that are read, quantized and written at a time.
const ROWS: usize = 64;

/// Memory for factors.
const FACTOR_BYTES: usize = 4 << 30;

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

/// One matrix to be quantized, and where its rows go.
struct Job<'a> {
    name: &'a str,
    weight: &'a Weight,
    dtype: DType,
    offset: u64,
}

/// Quantizes those products of `model` that are to be; they are then read from a file in the folder that is returned, which
/// lies beside `output` and goes when it is dropped.
///
/// # Errors
/// Where the model cannot be calibrated, a row cannot be read or quantized, or the file cannot be written.
pub fn quantize(
    model: &mut Model,
    input: &Path,
    options: &CompileOptions,
    quantizer: Quantizer,
    output: &Path,
    progress: &mut dyn Progress,
) -> Result<Option<tempfile::TempDir>> {
    let wanted = |weight: &Weight| {
        let dtype = weight.dtype_shape().0;
        dtype.int().is_some() && can_quantize(dtype) && !weight.stored_as(dtype)
    };
    if quantizer.row().needs == Needs::Weights || !model.weights.iter().any(|(_, w)| wanted(w)) {
        return Ok(None);
    }
    let text = calibration::text(options.calibration.as_deref())?;
    let statistics = Statistics::of(input, options, &text, progress)?;
    let (mut groups, mut size) = (vec![], 0);
    for (group, names) in statistics.groups().into_iter().enumerate() {
        let mut jobs = vec![];
        for name in names {
            let weight = model.weights.get(name)?;
            if wanted(weight) {
                let (dtype, (rows, columns)) = (weight.dtype_shape().0, weight.rows_columns());
                let Some(bytes) = dtype.bytes(columns) else { bail!(Internal, "rows of {columns} {dtype}") };
                jobs.push(Job { name, weight, dtype, offset: size });
                size += (rows * bytes) as u64;
            }
        }
        if !jobs.is_empty() {
            groups.push((group, jobs));
        }
    }
    if size == 0 {
        return Ok(None);
    }
    let place = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = tempfile::Builder::new().prefix(".mansard-quantized-").tempdir_in(place);
    let folder = folder.map_err(|e| Error::io(output, e))?;
    let path = folder.path().join("quantized");
    let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
    progress.stage("quantize", groups.len());
    run(&groups, &statistics, quantizer, &file, options.threads, progress).at(|| path.display().to_string())?;
    let file = Arc::new(MappedFile::open(&path)?);
    let stored = groups.iter().flat_map(|(_, jobs)| jobs).map(|job| {
        let (rows, columns) = job.weight.rows_columns();
        let (file, offset) = (file.clone(), job.offset as usize);
        let stored = (rows, columns);
        (
            job.name.to_string(),
            Part { file, offset, dtype: job.dtype, stored, transposed: false, rows: 0..rows, grid: None },
        )
    });
    for (name, part) in stored.collect::<Vec<_>>() {
        if let Some(weight) = model.weights.get_mut(&name) {
            weight.source = Source::Parts(vec![part]);
        }
    }
    Ok(Some(folder))
}

/// All groups, several at a time, those with most columns first.
fn run(
    groups: &[(usize, Vec<Job<'_>>)],
    statistics: &Statistics,
    quantizer: Quantizer,
    file: &File,
    threads: usize,
    progress: &mut dyn Progress,
) -> Result<()> {
    let columns = |at: &usize| groups[*at].1.first().map_or(0, |job| job.weight.rows_columns().1);
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(columns(at)));
    let widest = order.first().map_or(0, columns).min(WIDEST);
    let workers = threads.min(FACTOR_BYTES / (16 * widest * widest).max(1)).max(1);
    let (next, done, failed) = (AtomicUsize::new(0), Mutex::new(0), Mutex::new(None));
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (next, order, done, failed, sender) = (&next, &order, &done, &failed, sender.clone());
            scope.spawn(move || {
                while let Some(at) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (group, jobs) = &groups[*at];
                    let result = prepare(statistics, *group, quantizer)
                        .and_then(|prepared| jobs.iter().try_for_each(|job| one(job, &prepared, file)));
                    if let Err(error) = result {
                        failed.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
                        return;
                    }
                    let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
                    *done += 1;
                    let _ = sender.send(*done);
                }
            });
        }
        drop(sender);
        receiver.iter().for_each(|done| progress.advance(done));
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn prepare(statistics: &Statistics, group: usize, quantizer: Quantizer) -> Result<Prepared> {
    Prepared::new(quantizer, &statistics.moments(group)?)
}

/// One matrix, some rows at a time.
fn one(job: &Job<'_>, prepared: &Prepared, file: &File) -> Result<()> {
    let (rows, columns) = job.weight.rows_columns();
    let bytes = job.dtype.bytes(columns).unwrap_or(0);
    // Its reals, whatever it is to be stored as.
    let reals = job.weight.with_dtype(DType::F32);
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let (mut values, mut out) = (vec![0.0; count * columns], vec![0; count * bytes]);
        for (row, values) in values.chunks_exact_mut(columns).enumerate() {
            reals.read_row(first + row, values).at(|| format!("weight `{}`", job.name))?;
        }
        prepared.quantize(job.dtype, columns, &values, &mut out).at(|| format!("weight `{}`", job.name))?;
        file.write_all_at(&out, job.offset + (first * bytes) as u64).map_err(|e| Error::io("quantized weights", e))?;
    }
    Ok(())
}
