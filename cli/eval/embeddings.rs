//! How far an encoder's vectors are from those of the model that it was made of.
//!
//! ```text
//! text --at blank lines--> paragraphs --> vectors a of the artifact, b of the other     error of each: 1 - cos(a, b)
//! ```

use super::{Arguments, mean, reference, text};
use crate::report;
use mansard_ir::{Error, Result, bail};
use mansard_runtime::{EngineOptions, Model, embed, embedded_positions};
use serde::Serialize;

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Distances {
    /// Paragraphs that were embedded.
    pub texts: usize,
    /// Mean of 1 - cosine.
    pub cosine_error_mean: f64,
    /// One standard error of it.
    pub cosine_error_error: f64,
    /// Of the paragraph that is furthest away.
    pub cosine_error_max: f64,
}

/// Compares the embeddings of a text's paragraphs, each cut to what the model reads at once.
///
/// # Errors
/// Where there is nothing to compare with, or it is no encoder of the same width; where there is no text.
pub fn compare(model: &Model, arguments: &Arguments) -> Result<Distances> {
    let Some(against) = &arguments.against else {
        let architecture = &model.info().architecture;
        let message = format!("a {architecture} model is an encoder: it predicts no next token");
        return Err(Error::new(mansard_ir::Kind::Usage, message).help("--against compares its vectors with another's"));
    };
    if arguments.tokens_file.is_some() {
        bail!(Usage, "--tokens-file: an encoder's paragraphs are those of a text");
    }
    let folder = tempfile::tempdir().map_err(|e| Error::io("a temporary folder", e))?;
    let other = reference(against, folder.path(), &arguments.engine)?;
    let text = arguments.text.as_deref().map_or_else(|| Ok(super::DEFAULT_TEXT.to_owned()), text)?;
    let (ours, theirs) = (vectors(model, arguments, &text)?, vectors(&other, arguments, &text)?);
    if ours.is_empty() {
        bail!(Input, "expected a text, found none");
    }
    if ours.iter().zip(&theirs).any(|(a, b)| a.len() != b.len()) {
        bail!(Usage, "--against: expected an encoder with vectors of as many numbers");
    }
    let errors: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| 1.0 - cosine(a, b)).collect();
    let (cosine_error_mean, cosine_error_error) = mean(&errors);
    let cosine_error_max = errors.iter().copied().fold(0.0, f64::max);
    Ok(Distances { texts: errors.len(), cosine_error_mean, cosine_error_error, cosine_error_max })
}

fn vectors(model: &Model, arguments: &Arguments, text: &str) -> Result<Vec<Vec<f32>>> {
    if !model.info().encoder {
        bail!(Usage, "--against: expected an encoder, found a {} model", model.info().architecture);
    }
    let limits = &model.artifact().manifest().program.limits;
    let positions = Some(embedded_positions(limits));
    let options = EngineOptions { positions, ..arguments.engine.options() };
    let mut engine = arguments.engine.engine(model, &options)?;
    let most = limits.context.min(limits.tokens).min(arguments.window);
    let text = text.replace("\r\n", "\n");
    let paragraphs = text.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty());
    let mut tokens = paragraphs.map(|p| model.tokens()?.encode(p, true)).collect::<Result<Vec<_>>>()?;
    let mut left = arguments.limit.unwrap_or(usize::MAX);
    tokens.iter_mut().for_each(|tokens| tokens.truncate(most));
    tokens.retain(|tokens| {
        let fits = tokens.len() <= left;
        left = if fits { left - tokens.len() } else { 0 };
        fits
    });
    embed(&mut engine, &tokens)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    product(a, b) / (product(a, a) * product(b, b)).sqrt()
}

/// For people.
pub fn table(found: &Distances) -> String {
    report::table(&[
        vec!["paragraphs".to_string(), found.texts.to_string()],
        vec!["1 - cosine, mean".into(), format!("{:.5} ± {:.5}", found.cosine_error_mean, found.cosine_error_error)],
        vec!["1 - cosine, most".into(), format!("{:.5}", found.cosine_error_max)],
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        assert!((cosine(&[1.0, 2.0], &[2.0, 4.0]) - 1.0).abs() < 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 3.0]).abs() < 1e-12);
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5f64.sqrt()).abs() < 1e-12);
    }
}
