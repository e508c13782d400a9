//! What each alternative of a budget costs in accuracy, measured on a text with the model's own compiled code.
//!
//! ```text
//! the model in f32, compiled once
//!   for each decision: its matrices replaced by what one coarse format makes of them   ->   KL divergence d
//!   sensitivity = d / relative squared error of that format;   of another format: sensitivity * its relative squared error
//! ```
//!
//! Small errors add up: the divergence grows with the square of the noise, and noise of different places is independent.
//! Activations of integer products are rounded too, which is the same noise at the same places: its size is found by one
//! model in int8 throughout. Caches are measured type by type. Weights are replaced inside the artifact's file, so nothing
//! is compiled but the reference, that model and the caches' types.

use super::divergence::Reference;
use crate::calibration;
use crate::driver::{self, CompileOptions, Progress, Quiet};
use mansard_backends as backends;
use mansard_ir::artifact::WEIGHTS_PREFIX;
use mansard_ir::formats::dequantize;
use mansard_ir::model::{Source, Weight};
use mansard_ir::recipe::matrices;
use mansard_ir::{DType, Error, Model, Place, Result, bail};
use mansard_passes::budget::{Decisions, Subject};
use mansard_runtime::{self as runtime, OpenOptions};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Tokens of the text that are read.
const TOKENS: usize = 512;

/// Rows of a matrix that its error is measured on.
const SAMPLED_ROWS: usize = 128;

/// Formats with larger relative squared errors are no small disturbance.
const COARSEST: f64 = 0.02;

/// Relative squared error of rounding to bf16: steps of 2^-8 at most, uniform in them, over one binade on average.
const BF16_ERROR: f64 = 1.0 / (24.0 * 65536.0);

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// By decision.
    pub sensitivities: BTreeMap<String, Sensitivity>,
    /// Relative squared error of int8 activations, as the model feels it.
    pub int8_activations: f64,
    /// KL divergence by the caches' type.
    pub caches: BTreeMap<String, f64>,
}

/// How a model feels errors in some of its matrices.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// KL divergence for a relative squared error of 1, by extrapolation.
    pub per_error: f64,
    /// Relative squared error of each format.
    pub errors: BTreeMap<String, f64>,
}

impl Calibration {
    /// Fills in the errors of all alternatives, `scale` times what was measured here. `model` says the file's own formats.
    ///
    /// # Errors
    /// Where a weight is missing.
    pub fn fill(&self, decisions: &mut Decisions, model: &Model, scale: f64) -> Result<()> {
        for decision in &mut decisions.all {
            for alternative in &mut decision.alternatives {
                alternative.error = scale
                    * match &decision.subject {
                        Subject::Caches => self.cache_error(alternative.format),
                        Subject::Weights { names, vocabulary } => {
                            let dtype =
                                |name: &String| -> Result<DType> { Ok(model.weights.get(name)?.dtype_shape().0) };
                            let own = names.first().map(dtype);
                            let computed = alternative.format.map(Ok).or(own).transpose()?;
                            self.weight_error(&decision.name, alternative.format, computed, *vocabulary)
                        }
                    };
            }
        }
        Ok(())
    }

    fn cache_error(&self, kv: Option<DType>) -> f64 {
        kv.and_then(|kv| self.caches.get(&kv.to_string())).copied().unwrap_or(0.0)
    }

    fn weight_error(&self, decision: &str, stored: Option<DType>, computed: Option<DType>, vocabulary: bool) -> f64 {
        let Some(sensitivity) = self.sensitivities.get(decision) else { return 0.0 };
        let weights = stored.and_then(|f| sensitivity.errors.get(&f.to_string())).copied().unwrap_or(0.0);
        let activations = match computed {
            Some(DType::BF16) => BF16_ERROR,
            Some(format) if format.is_integer() && !vocabulary => self.int8_activations,
            _ => 0.0,
        };
        sensitivity.per_error * (weights + activations)
    }
}

/// What to calibrate with.
pub struct Subjects<'a> {
    /// The model file.
    pub input: &'a Path,
    /// As for the artifact that is to be made.
    pub options: &'a CompileOptions,
    /// What is to be decided.
    pub decisions: &'a Decisions,
    /// A text; the default where there is none.
    pub text: Option<&'a Path>,
    /// For artifacts that are needed for a while.
    pub folder: &'a Path,
    /// The reference in f32.
    pub reference: &'a Path,
}

impl Subjects<'_> {
    /// What an earlier calibration of the same found, or one now; it is kept under `$XDG_CACHE_HOME/mansard`.
    ///
    /// # Errors
    /// Whatever compiling and running says.
    pub fn calibrate(&self, progress: &mut dyn Progress) -> Result<Calibration> {
        let text = calibration::text(self.text)?;
        let path = calibration::stored("calibration", &format!("{}.json", self.key(&text)?));
        if let Some(path) = &path
            && let Ok(json) = std::fs::read(path)
            && let Ok(known) = serde_json::from_slice(&json)
        {
            return Ok(known);
        }
        let found = self.measure(&text, progress)?;
        if let (Some(path), Ok(json)) = (path, serde_json::to_vec_pretty(&found)) {
            // What cannot be kept is measured again the next time.
            let _ = path.parent().map(std::fs::create_dir_all);
            let _ = std::fs::write(path, json);
        }
        Ok(found)
    }

    /// Hash of everything that decides what is measured.
    fn key(&self, text: &str) -> Result<String> {
        let mut more = vec![format!("{:?}", self.options.targets)];
        for decision in &self.decisions.all {
            more.push(decision.name.clone());
            more.extend(decision.alternatives.iter().map(|a| format!("{:?}", a.format)));
        }
        calibration::key(self.input, self.options, text, more.iter().map(String::as_str))
    }

    fn measure(&self, text: &str, progress: &mut dyn Progress) -> Result<Calibration> {
        let threads = self.options.threads;
        let opened = runtime::Model::open(self.reference)?;
        let tokens = opened.tokens()?.encode(text, true)?;
        let mut reference = Reference::new(&opened, &tokens, TOKENS, threads)?;
        let model = driver::import(self.input, &driver::reference_options(self.options))?;
        let mut found = Calibration::default();
        progress.stage("calibrate", self.decisions.all.len() + 1);
        // The reference stays as it is: another file is changed.
        let trial = self.folder.join("trial.mansard");
        std::fs::copy(self.reference, &trial).map_err(|e| Error::io(&trial, e))?;
        for (index, decision) in self.decisions.all.iter().enumerate() {
            progress.advance(index);
            match &decision.subject {
                Subject::Weights { names, .. } => {
                    let formats: Vec<DType> = decision.alternatives.iter().filter_map(|a| a.format).collect();
                    let sensitivity = self.sensitivity(&model, names, &formats, &trial, &mut reference)?;
                    found.sensitivities.insert(decision.name.clone(), sensitivity);
                }
                Subject::Caches => {
                    for kv in decision.alternatives.iter().filter_map(|a| a.format).filter(|kv| *kv != DType::F32) {
                        let options = CompileOptions { kv: Some(kv), ..driver::reference_options(self.options) };
                        found.caches.insert(kv.to_string(), self.compiled(&options, &trial, &mut reference)?);
                    }
                }
            }
        }
        progress.advance(self.decisions.all.len());
        found.int8_activations = self.int8_activations(&found, &trial, &mut reference)?;
        let _ = std::fs::remove_file(&trial);
        Ok(found)
    }

    /// Divergence of the model compiled with some options.
    fn compiled(&self, options: &CompileOptions, path: &Path, reference: &mut Reference) -> Result<f64> {
        let mut sink = |_: mansard_passes::Event<'_>| {};
        driver::compile(self.input, path, options, &mut Quiet, &mut mansard_passes::Hooks::new(&mut sink))?;
        reference.divergence(&runtime::Model::open(path)?, self.options.threads)
    }

    fn sensitivity(
        &self,
        model: &Model,
        names: &[String],
        formats: &[DType],
        trial: &Path,
        reference: &mut Reference,
    ) -> Result<Sensitivity> {
        let mut errors = BTreeMap::new();
        for format in formats {
            let of = names.iter().map(|name| relative_error(model.weights.get(name)?, *format).at(|| name.clone()));
            let of: Vec<f64> = of.collect::<Result<_>>()?;
            errors.insert(*format, of.iter().sum::<f64>() / of.len().max(1) as f64);
        }
        let coarse = |limit: f64| errors.iter().filter(move |(_, e)| **e <= limit).max_by(|a, b| a.1.total_cmp(b.1));
        let probe = coarse(COARSEST).filter(|(_, e)| **e > 0.0).or_else(|| coarse(f64::INFINITY));
        let mut per_error = 0.0;
        if let Some((format, error)) = probe.filter(|(_, e)| **e > 0.0) {
            replace(trial, model, names, Some(*format), self.options.threads)?;
            let opened = runtime::Model::open_with(trial, &OpenOptions { verify_weights: false })?;
            per_error = reference.divergence(&opened, self.options.threads)? / error;
            drop(opened);
            replace(trial, model, names, None, self.options.threads)?;
        }
        Ok(Sensitivity { per_error, errors: errors.into_iter().map(|(f, e)| (f.to_string(), e)).collect() })
    }

    /// What the rounding of activations adds to a model in int8, as an error of the same kind as that of weights.
    fn int8_activations(&self, found: &Calibration, trial: &Path, reference: &mut Reference) -> Result<f64> {
        let int8 = DType::Q8_0;
        let (mut formats, mut of_weights, mut felt) = (BTreeMap::new(), 0.0, 0.0);
        for decision in &self.decisions.all {
            let Subject::Weights { names, vocabulary: false } = &decision.subject else { continue };
            let Some(sensitivity) = found.sensitivities.get(&decision.name) else { continue };
            if let Some(error) = sensitivity.errors.get(&int8.to_string()) {
                formats.extend(names.iter().map(|name| (name.clone(), int8)));
                (of_weights, felt) = (of_weights + sensitivity.per_error * error, felt + sensitivity.per_error);
            }
        }
        if felt <= 0.0 {
            return Ok(0.0);
        }
        let options = CompileOptions { formats, ..driver::reference_options(self.options) };
        let all = self.compiled(&options, trial, reference)?;
        Ok((all - of_weights).max(0.0) / felt)
    }
}

/// Relative squared error of rows spread over a matrix.
fn relative_error(weight: &Weight, format: DType) -> Result<f64> {
    let ((rows, columns), stored) = (weight.rows_columns(), weight.with_dtype(format));
    let (mut exact, mut found) = (vec![0.0; columns], vec![0.0; columns]);
    let (mut off, mut all) = (0.0, 0.0);
    for row in (0..rows).step_by(rows.div_ceil(SAMPLED_ROWS).max(1)) {
        weight.read_row(row, &mut exact)?;
        stored.read_row(row, &mut found)?;
        off += exact.iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        all += exact.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
    }
    Ok(if all > 0.0 { off / all } else { 0.0 })
}

/// Overwrites matrices in an artifact of the reference with what `format` makes of them, or with what they were.
fn replace(path: &Path, model: &Model, names: &[String], format: Option<DType>, threads: usize) -> Result<()> {
    let artifact = runtime::Artifact::open(path, &OpenOptions { verify_weights: false })?;
    let mut weights = model.weights.clone();
    for name in names {
        if let Some(format) = format {
            weights.insert(name.clone(), noisy(model.weights.get(name)?, format)?);
        }
    }
    let mut file = std::fs::OpenOptions::new().write(true).open(path).map_err(|e| Error::io(path, e))?;
    let mut replaced = std::collections::BTreeSet::new();
    for spec in &artifact.manifest().program.weights {
        let recipe = spec.pack()?.recipe;
        let read: Vec<&str> = matrices(&recipe).into_iter().filter(|m| names.iter().any(|name| name == m)).collect();
        let section = format!("{WEIGHTS_PREFIX}{}", spec.name);
        let Some(section) = artifact.sections().iter().find(|s| s.name == section && !read.is_empty()) else {
            continue;
        };
        replaced.extend(read.iter().map(|name| name.to_string()));
        file.seek(SeekFrom::Start(section.range.start as u64)).map_err(|e| Error::io(path, e))?;
        let mut sink = |bytes: &[u8]| file.write_all(bytes).map_err(|e| Error::io(path, e));
        backends::pack::pack(&weights.make(&recipe)?, threads, &mut sink)?;
    }
    match names.iter().find(|name| !replaced.contains(*name)) {
        Some(name) => bail!(Internal, "the reference has no weight `{name}`"),
        None => Ok(()),
    }
}

/// A weight of the same type with the values that `format` has instead.
fn noisy(weight: &Weight, format: DType) -> Result<Weight> {
    let ((rows, columns), stored) = (weight.rows_columns(), weight.with_dtype(format));
    let mut values = vec![0.0; rows * columns];
    for (row, values) in values.chunks_exact_mut(columns.max(1)).enumerate() {
        if format.int().is_some() {
            dequantize(format, &stored.quantized_row(row)?, values);
        } else {
            stored.read_row(row, values)?;
        }
    }
    Ok(Weight { ty: weight.ty.clone(), source: Source::Values(values.into()) })
}
