//! Models on a GPU beside what is known of them.

use crate::{Opened, engine, read_npy};
use mansard_ir::{Result, bail};
use mansard_runtime::{EngineOptions, GenerateOptions, Rows, SamplerOptions, Work, generate};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Decoded one by one at the end of a golden's tokens; the last steps are replayed.
const DECODED: usize = 3;

/// A checkpoint and the logits (of an encoder: hidden states) that an independent implementation computed.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// For the report.
    pub name: String,
    artifact: PathBuf,
    tokens: Vec<u32>,
    output: String,
    expected: PathBuf,
    /// Most difference, in standard deviations of what is expected.
    tolerance: f32,
}

impl Golden {
    /// Whether it is near enough, and how near.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn check(&self, folder: &Path, opened: Opened<'_>) -> Result<(bool, Value)> {
        let (artifact, driver) = opened(&self.artifact)?;
        let mut engine = engine(artifact, driver, &EngineOptions::default())?;
        let want = read_npy(&folder.join(&self.expected))?;
        let sequence = engine.new_sequence();
        let last = if engine.artifact().manifest().model.encoder { 0 } else { DECODED.min(self.tokens.len() - 1) };
        let (first, rest) = self.tokens.split_at(self.tokens.len() - last);
        let mut got: Vec<f32> = vec![];
        for tokens in std::iter::once(first).chain(rest.chunks(1)) {
            let step = engine.step(&[Work { sequence, tokens, rows: Rows::All }])?;
            got.extend(step.rows(&self.output)?.iter().flatten());
        }
        let off = distance(&got, &want)?;
        Ok((off <= self.tolerance, json!({"off": off, "tolerance": self.tolerance})))
    }
}

/// A language model, and what it answers on the CPU that packed it.
#[derive(Debug, Deserialize)]
pub struct Answer {
    /// For the report.
    pub name: String,
    artifact: PathBuf,
    prompt: Vec<u32>,
    /// Decoded greedily.
    answer: Vec<u32>,
    /// Logits of every token of the prompt.
    expected: PathBuf,
    /// Most difference, in standard deviations of what is expected.
    tolerance: f32,
}

impl Answer {
    /// Whether logits are near enough; and how many tokens of the answer agree before one does not.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn check(&self, folder: &Path, opened: Opened<'_>) -> Result<(bool, Value)> {
        let (artifact, driver) = opened(&self.artifact)?;
        let mut engine = engine(artifact, driver, &EngineOptions::default())?;
        let want = read_npy(&folder.join(&self.expected))?;
        let sequence = engine.new_sequence();
        let mut got = vec![];
        engine.each_row(sequence, &self.prompt, "logits", |_, row| {
            got.extend_from_slice(row);
            Ok(())
        })?;
        let off = distance(&got, &want)?;
        engine.truncate(sequence, 0)?;
        let sampler = SamplerOptions::greedy();
        let options =
            GenerateOptions { max_tokens: self.answer.len(), sampler, stop_tokens: Some(vec![]), ..Default::default() };
        let found = generate(&mut engine, sequence, &self.prompt, &options, |_| Ok(true))?.tokens;
        let agree = found.iter().zip(&self.answer).take_while(|(a, b)| a == b).count();
        // Sums in another order may turn a near tie; the first tokens of an answer are none.
        let holds = off <= self.tolerance && agree > 0;
        let json = json!({"off": off, "tolerance": self.tolerance, "tokens": self.answer.len(), "tokens_agree": agree});
        Ok((holds, json))
    }
}

/// The largest difference, in standard deviations of what is expected; infinite where a value is no number.
fn distance(got: &[f32], want: &[f32]) -> Result<f32> {
    if got.len() != want.len() || want.is_empty() {
        bail!(Input, "expected {} values, found {}", want.len(), got.len());
    }
    let mean = want.iter().sum::<f32>() / want.len() as f32;
    let deviation = (want.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / want.len() as f32).sqrt();
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs());
    let worst = worst.fold(0f32, |worst, off| if off.is_nan() { f32::INFINITY } else { worst.max(off) });
    Ok(worst / deviation)
}
