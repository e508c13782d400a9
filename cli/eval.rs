//! `mansard eval`: how well a model predicts a text, and how far an artifact is from the model it was made of.
//!
//! ```text
//! text -> tokens -> windows, each from an empty context
//!   perplexity     = exp(mean of -log q(next token))                 q: the artifact's distribution
//!   KL divergence  = mean over positions of sum p (log p - log q)    p: the other's, every weight and cache in f32
//!   top-1          = how often both hold the same token likeliest
//! an encoder's vectors are compared paragraph by paragraph (eval/embeddings.rs)
//! ```
//!
//! Distributions are compared whole, in f64, over the full vocabulary. A perplexity's error bar is one standard error of
//! the mean.

mod embeddings;

use crate::report::{self, EngineArguments, OpenArguments};
use mansard::budget::{WINDOW, divergence_term, log_sum, steps};
use mansard::check;
use mansard::driver::{self, CompileOptions, Quiet};
use mansard_ir::artifact::{LayerError, Quality, rounded};
use mansard_ir::{DType, Error, Result, bail};
use mansard_runtime::{Engine, Model, SequenceId};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Prose of some 1,500 tokens that ships with the compiler.
pub const DEFAULT_TEXT: &str = include_str!("evaluation.txt");

/// Measure perplexity on a text, and the divergence from another model
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// The text [default: some prose that ships with the compiler]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// A file with a JSON list of token ids, instead of a text
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    tokens_file: Option<PathBuf>,
    /// An artifact, or a model that is compiled with every weight and cache in f32
    #[arg(long, value_name = "MODEL")]
    against: Option<PathBuf>,
    /// Tokens read from an empty context before starting over
    #[arg(long, value_name = "TOKENS", default_value_t = WINDOW)]
    window: usize,
    /// Most tokens that are read [default: all]
    #[arg(long, value_name = "TOKENS")]
    limit: Option<usize>,
    /// Report in JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Positions with a next token.
    pub positions: usize,
    /// Of the artifact.
    pub perplexity: f64,
    /// One standard error of it.
    pub perplexity_error: f64,
    /// Against another model.
    #[serde(flatten)]
    pub divergence: Option<Divergence>,
}

/// How far two models' distributions are apart.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// Mean over positions, in nats.
    pub kl_divergence_mean: f64,
    /// One standard error of the mean.
    pub kl_divergence_error: f64,
    /// What 99.9% of the positions stay below.
    pub kl_divergence_p999: f64,
    /// Share of positions where the likeliest token is the same.
    pub top1_agreement: f64,
    /// Perplexity of the other model.
    pub reference_perplexity: f64,
}

/// Runs the command.
///
/// # Errors
/// Where a file does not open, the text is empty or no UTF-8, or an encoder has nothing to be compared with.
pub fn run(arguments: &Arguments) -> Result<()> {
    let model = arguments.engine.open(&arguments.artifact)?;
    if model.info().encoder {
        let found = embeddings::compare(&model, arguments)?;
        return report::print(if arguments.json { report::json(&found)? } else { embeddings::table(&found) });
    }
    let found = measure(
        &model,
        &arguments.engine,
        &Request {
            text: arguments.text.as_deref(),
            tokens: arguments.tokens_file.as_deref(),
            against: arguments.against.as_deref(),
            window: arguments.window,
            most: arguments.limit,
        },
    )?;
    report::print(if arguments.json { report::json(&found)? } else { table(&found) })
}

/// What to evaluate on.
pub struct Request<'a> {
    /// A file; the default text where there is none.
    pub text: Option<&'a Path>,
    /// A file of token ids, instead of a text.
    pub tokens: Option<&'a Path>,
    /// An artifact or a model file.
    pub against: Option<&'a Path>,
    /// Tokens from an empty context.
    pub window: usize,
    /// Most tokens of the text.
    pub most: Option<usize>,
}

/// The quality card of the artifact at `path`: what [`measure`] says of it on a text, beside the model it was made of.
///
/// # Errors
/// As [`run`].
pub fn card(path: &Path, text: Option<&Path>, against: &Path) -> Result<Quality> {
    let engine = EngineArguments { threads: None, opening: OpenArguments::default() };
    let model = engine.open(path)?;
    let window = WINDOW.min(model.artifact().manifest().program.limits.context);
    let request = Request { text, tokens: None, against: Some(against), window, most: None };
    let mut hash = blake3::Hasher::new();
    let text = tokens(&model, &request)?;
    text.iter().for_each(|token| _ = hash.update(&token.to_le_bytes()));
    let Evaluation { positions, perplexity, perplexity_error, divergence } =
        measured(&model, &engine, &request, &text)?;
    let Some(divergence) = divergence else { bail!(Internal, "nothing was compared") };
    let (layer_error_predicted, layers) = layers(&model, against, &text)?;
    let decided = model.artifact().manifest().provenance.decided.as_ref();
    Ok(Quality {
        text: hash.finalize().to_hex().to_string(),
        window,
        positions,
        perplexity,
        perplexity_error,
        reference_perplexity: divergence.reference_perplexity,
        kl_divergence_mean: divergence.kl_divergence_mean,
        kl_divergence_error: divergence.kl_divergence_error,
        kl_divergence_p999: divergence.kl_divergence_p999,
        top1_agreement: divergence.top1_agreement,
        kl_divergence_predicted: decided.map(|d| d.predicted),
        calibration: decided.map(|d| d.calibration.clone()),
        layer_error_predicted,
        layers,
    })
}

/// Tokens that layers are compared on: the interpreter is slow.
pub const COMPARED: usize = 12;

/// The error of each layer of an artifact that it is expected to have, and what it is on the first tokens of a text.
fn layers(model: &Model, against: &Path, tokens: &[u32]) -> Result<(f64, Vec<LayerError>)> {
    let artifact = model.artifact();
    let options = CompileOptions { float_weights: true, ..CompileOptions::default() };
    let exact = driver::import(against, &options)?;
    let bar = report::bar("layers", exact.calls.len());
    let found = check::layers(&check::Request {
        artifact,
        model: &exact,
        tokens: &tokens[..tokens.len().min(COMPARED)],
        tolerance: None,
        progress: &|done, _| bar.set_position(done as u64),
    });
    bar.finish_and_clear();
    // What is no number has no place in a manifest.
    let figure = |x: f64| rounded(x.min(f64::MAX));
    let error =
        |l: check::LayerCheck| LayerError { off: figure(l.off), accumulated: figure(l.accumulated), layer: l.layer };
    let expected = rounded(check::expected(&artifact.manifest().program, &exact));
    Ok((expected, found?.into_iter().map(error).collect()))
}

/// Evaluates `model`.
///
/// # Errors
/// As [`run`].
pub fn measure(model: &Model, engine: &EngineArguments, request: &Request<'_>) -> Result<Evaluation> {
    measured(model, engine, request, &tokens(model, request)?)
}

fn measured(model: &Model, engine: &EngineArguments, request: &Request<'_>, tokens: &[u32]) -> Result<Evaluation> {
    if model.info().encoder {
        bail!(Usage, "a {} model is an encoder: it predicts no next token", model.info().architecture);
    }
    if request.window < 2 {
        bail!(Usage, "--window: expected at least 2 tokens, found {}", request.window);
    }
    let folder = tempfile::tempdir().map_err(|e| Error::io("a temporary folder", e))?;
    let other = request.against.map(|path| reference(path, folder.path(), engine)).transpose()?;
    let windows: Vec<&[u32]> = tokens.chunks(request.window).filter(|w| w.len() > 1).collect();
    let mut ours = Reader::new(model, engine)?;
    let mut theirs = other.as_ref().map(|other| Reader::new(other, engine)).transpose()?;
    let mut sums = Sums::default();
    let bar = report::bar("tokens", tokens.len());
    for window in windows {
        ours.restart()?;
        if let Some(theirs) = &mut theirs {
            theirs.restart()?;
        }
        for (first, step) in steps(window) {
            let q = ours.read(step)?;
            let p = theirs.as_mut().map(|theirs| theirs.read(step)).transpose()?;
            for (i, q) in q.iter().enumerate() {
                let next = window.get(first + i + 1).map(|t| *t as usize);
                sums.add(q, p.as_ref().map(|p| p[i].as_slice()), next)?;
            }
            bar.inc(step.len() as u64);
        }
    }
    bar.finish_and_clear();
    sums.end(theirs.is_some())
}

fn tokens(model: &Model, request: &Request<'_>) -> Result<Vec<u32>> {
    let mut tokens = match (request.tokens, request.text) {
        (Some(path), _) => report::ids(path)?,
        (None, Some(path)) => {
            let text = text(path)?;
            model.tokens()?.encode(&text, true)?
        }
        (None, None) => model.tokens()?.encode(DEFAULT_TEXT, true)?,
    };
    tokens.truncate(request.most.unwrap_or(usize::MAX));
    if tokens.len() < 2 {
        bail!(Input, "expected a text of at least 2 tokens, found {}", tokens.len());
    }
    Ok(tokens)
}

fn text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes).or_else(|e| {
        let at = e.utf8_error().valid_up_to();
        bail!(Input, "{}: expected UTF-8 text, found another byte at {at}", path.display())
    })
}

/// An artifact as it is; any other model compiled without approximation.
fn reference(path: &Path, folder: &Path, engine: &EngineArguments) -> Result<Model> {
    if path.extension().is_some_and(|e| e == "mansard") {
        return engine.open(path);
    }
    let options = CompileOptions { float_weights: true, kv: Some(DType::F32), ..CompileOptions::default() };
    let artifact = folder.join("reference.mansard");
    let mut silent = |_: mansard_passes::Event<'_>| {};
    driver::compile(path, &artifact, &options, &mut Quiet, &mut mansard_passes::Hooks::new(&mut silent))?;
    engine.open(&artifact)
}

/// A model reading the text.
struct Reader {
    engine: Engine,
    sequence: Option<SequenceId>,
}

impl Reader {
    fn new(model: &Model, engine: &EngineArguments) -> Result<Reader> {
        Ok(Reader { engine: engine.engine(model, &engine.options())?, sequence: None })
    }

    /// From an empty context.
    fn restart(&mut self) -> Result<()> {
        if let Some(sequence) = self.sequence.take() {
            self.engine.release(sequence)?;
        }
        self.sequence = Some(self.engine.new_sequence());
        Ok(())
    }

    /// Log-probabilities of every token after each of `tokens`.
    fn read(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f64>>> {
        let sequence = self.sequence.unwrap_or_else(|| self.engine.new_sequence());
        let mut rows = vec![];
        self.engine.each_row(sequence, tokens, "logits", |_, row| {
            rows.push(log_softmax(row));
            Ok(())
        })?;
        Ok(rows)
    }
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let all = log_sum(row);
    row.iter().map(|x| *x as f64 - all).collect()
}

#[derive(Default)]
struct Sums {
    losses: Vec<f64>,
    reference_losses: Vec<f64>,
    divergences: Vec<f64>,
    agreeing: usize,
}

impl Sums {
    /// One position: our distribution, the other's, and the token that comes next.
    fn add(&mut self, q: &[f64], p: Option<&[f64]>, next: Option<usize>) -> Result<()> {
        self.losses.extend(next.map(|next| -q[next]));
        let Some(p) = p else { return Ok(()) };
        if p.len() != q.len() {
            bail!(Usage, "--against: expected a vocabulary of {} tokens, found {}", q.len(), p.len());
        }
        self.reference_losses.extend(next.map(|next| -p[next]));
        self.divergences.push(p.iter().zip(q).map(|(p, q)| divergence_term(*p, *q)).sum());
        self.agreeing += usize::from(likeliest(p) == likeliest(q));
        Ok(())
    }

    fn end(mut self, compared: bool) -> Result<Evaluation> {
        let (loss, error) = mean(&self.losses);
        let divergence = compared.then(|| {
            let (kl, kl_error) = mean(&self.divergences);
            self.divergences.sort_by(f64::total_cmp);
            let n = self.divergences.len();
            let rank = ((n as f64 * 0.999).ceil() as usize).clamp(1, n);
            Divergence {
                kl_divergence_mean: kl,
                kl_divergence_error: kl_error,
                kl_divergence_p999: self.divergences[rank - 1],
                top1_agreement: self.agreeing as f64 / n as f64,
                reference_perplexity: mean(&self.reference_losses).0.exp(),
            }
        });
        Ok(Evaluation {
            positions: self.losses.len(),
            perplexity: loss.exp(),
            perplexity_error: loss.exp() * error,
            divergence,
        })
    }
}

/// The first of the largest.
fn likeliest(row: &[f64]) -> usize {
    (0..row.len()).rev().max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap_or(0)
}

/// Mean and its standard error.
fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (variance / n).sqrt())
}

fn table(found: &Evaluation) -> String {
    let mut rows = vec![
        vec!["positions".to_string(), found.positions.to_string()],
        vec!["perplexity".into(), format!("{:.3} ± {:.3}", found.perplexity, found.perplexity_error)],
    ];
    if let Some(d) = &found.divergence {
        rows.push(vec!["reference perplexity".into(), format!("{:.3}", d.reference_perplexity)]);
        let kl = format!("{:.5} ± {:.5}", d.kl_divergence_mean, d.kl_divergence_error);
        rows.push(vec!["KL divergence, mean".into(), kl]);
        rows.push(vec!["KL divergence, 99.9%".into(), format!("{:.5}", d.kl_divergence_p999)]);
        rows.push(vec!["top-1 agreement".into(), format!("{:.2}%", 100.0 * d.top1_agreement)]);
    }
    report::table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_is_no_distance_from_itself() {
        let (p, q) = (log_softmax(&[1.0, 2.0, 3.0]), log_softmax(&[3.0, 2.0, 1.0]));
        let mut sums = Sums::default();
        sums.add(&p, Some(&p), Some(2)).unwrap();
        sums.add(&q, Some(&p), Some(2)).unwrap();
        let by_hand: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        let found = sums.end(true).unwrap().divergence.unwrap();
        assert!((found.kl_divergence_mean - by_hand / 2.0).abs() < 1e-12 && found.kl_divergence_p999 > 1.0);
        assert_eq!(found.top1_agreement, 0.5);
        assert!(Sums::default().add(&p, Some(&q[..2]), None).is_err());
    }

    #[test]
    fn of_equal_tokens_the_first_is_likeliest() {
        assert_eq!(likeliest(&[0.0, 2.0, 2.0]), 1);
    }
}
