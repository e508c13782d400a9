//! Mean KL divergence of an artifact from a reference, over the positions of a text.
//!
//! ```text
//! text -> windows of 512 tokens, as `mansard eval` reads them, each from an empty context -> sum p (log p - log q), p: the reference, q: the other
//! ```
//!
//! The reference's log-probabilities are kept for as many windows as [`KEPT_BYTES`] has room for, and computed again for
//! the rest.

use mansard_ir::{Result, bail};
use mansard_runtime::{Engine, EngineOptions, Model, SequenceId};

/// Tokens read from an empty context.
pub const WINDOW: usize = 512;

/// Of which so many are read, and compared, at a time, over and over: programs compute steps of many tokens in another way than
/// those of few, so either has half the text. Two vocabularies of rows lie in memory.
const STEPS: [usize; 5] = [128, 32, 32, 32, 32];

/// Cuts a window into steps: the index of each one's first token, and its tokens.
pub fn steps(window: &[u32]) -> impl Iterator<Item = (usize, &[u32])> {
    let mut first = 0;
    STEPS.iter().cycle().map_while(move |length| {
        let step = window.get(first..window.len().min(first + length)).filter(|step| !step.is_empty())?;
        first += step.len();
        Some((first - step.len(), step))
    })
}

/// Memory for the reference's distributions.
const KEPT_BYTES: usize = 256 << 20;

/// A model that others are compared with, on one text.
pub struct Reference {
    engine: Engine,
    windows: Vec<Vec<u32>>,
    /// Log-probabilities of every row of the first windows.
    kept: Vec<Vec<f32>>,
}

impl Reference {
    /// `model` reading at most `most` of `tokens`.
    ///
    /// # Errors
    /// Where there are fewer than two tokens, or no engine can be made.
    pub fn new(model: &Model, tokens: &[u32], most: usize, threads: usize) -> Result<Reference> {
        if tokens.len() < 2 {
            bail!(Input, "expected a text of at least 2 tokens, found {}", tokens.len());
        }
        let window = WINDOW.min(model.artifact().manifest().program.limits.context);
        let windows =
            tokens[..tokens.len().min(most)].chunks(window).filter(|w| w.len() > 1).map(<[u32]>::to_vec).collect();
        Ok(Reference { engine: engine(model, threads)?, windows, kept: vec![] })
    }

    /// Mean divergence of `model` over all positions, in nats.
    ///
    /// # Errors
    /// Where it has another vocabulary, or a step fails.
    pub fn divergence(&mut self, model: &Model, threads: usize) -> Result<f64> {
        let vocab = self.engine.artifact().manifest().model.vocab;
        if model.info().vocab != vocab {
            bail!(Internal, "expected a vocabulary of {vocab} tokens, found {}", model.info().vocab);
        }
        let mut other = engine(model, threads)?;
        let (mut sum, mut count) = (0.0, 0usize);
        for index in 0..self.windows.len() {
            let read;
            let reference = match self.kept.get(index) {
                Some(kept) => kept,
                None => {
                    let rows = log_probabilities(&mut self.engine, &self.windows[index])?;
                    let room = KEPT_BYTES / (4 * WINDOW * vocab).max(1);
                    if self.kept.len() == index && index < room {
                        self.kept.push(rows);
                        &self.kept[index]
                    } else {
                        read = rows;
                        &read
                    }
                }
            };
            each_row(&mut other, &self.windows[index], |row, logits| {
                sum += divergence(&reference[row * vocab..][..vocab], logits);
                count += 1;
            })?;
        }
        Ok(sum / count.max(1) as f64)
    }
}

fn engine(model: &Model, threads: usize) -> Result<Engine> {
    model.engine(&EngineOptions { threads: Some(threads), ..EngineOptions::default() })
}

fn each_row(engine: &mut Engine, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
    let sequence: SequenceId = engine.new_sequence();
    for (first, step) in steps(tokens) {
        engine.each_row(sequence, step, "logits", |row, logits| {
            visit(first + row, logits);
            Ok(())
        })?;
    }
    engine.release(sequence)
}

fn log_probabilities(engine: &mut Engine, tokens: &[u32]) -> Result<Vec<f32>> {
    let mut rows = vec![];
    each_row(engine, tokens, |_, logits| {
        let all = log_sum(logits);
        rows.extend(logits.iter().map(|x| (*x as f64 - all) as f32));
    })?;
    Ok(rows)
}

/// Logarithm of the sum of exponentials.
pub fn log_sum(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    most + logits.iter().map(|x| (*x as f64 - most).exp()).sum::<f64>().ln()
}

/// Of the distribution of `logits` from the one of these log-probabilities.
fn divergence(reference: &[f32], logits: &[f32]) -> f64 {
    let all = log_sum(logits);
    reference.iter().zip(logits).map(|(p, x)| divergence_term(*p as f64, *x as f64 - all)).sum()
}

/// What a token of log-probability `p`, and `q` of the other distribution, adds to a divergence; one that never comes, nothing.
pub fn divergence_term(p: f64, q: f64) -> f64 {
    if p > -700.0 { p.exp() * (p - q) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let p = [0.5f32.ln(), 0.25f32.ln(), 0.25f32.ln()];
        assert!(divergence(&p, &[1.0 + 2f32.ln(), 1.0, 1.0]).abs() < 1e-7);
        let uniform = 0.5 * (1.5f64).ln() + 0.5 * (0.75f64).ln();
        assert!((divergence(&p, &[3.0, 3.0, 3.0]) - uniform).abs() < 1e-7);
    }
}
