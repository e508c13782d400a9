//! Steps of a model whose weights are made up, timed.

use crate::{Opened, engine};
use mansard_ir::Result;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_runtime::{Engine, EngineOptions, Logits, Rows, SequenceId, Work};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// Decoded steps before any is timed: the first is launched, the second recorded.
const WARMING: usize = 4;

/// A model of some shape.
#[derive(Debug, Deserialize)]
pub struct Speed {
    /// For the report: `llama-1b int8`.
    pub name: String,
    artifact: PathBuf,
    /// Positions before what is decoded.
    context: usize,
    /// Sequences at once.
    batches: Vec<usize>,
    /// Decoded tokens of each sequence that are timed.
    decode: usize,
    /// Tokens of prompts that are timed.
    prefill: Vec<usize>,
}

impl Speed {
    /// Seconds of a decoded step and of a prompt.
    ///
    /// # Errors
    /// Where it does not run, or does not fit.
    pub fn measure(&self, opened: Opened<'_>) -> Result<(bool, Value)> {
        let (artifact, driver) = opened(&self.artifact)?;
        let bytes: usize = artifact.manifest().program.weights.iter().map(|w| w.bytes).sum();
        let most = self.batches.iter().max().copied().unwrap_or(1);
        let longest = self.context + self.decode + WARMING;
        let positions = (longest.max(self.prefill.iter().max().copied().unwrap_or(0)) / CACHE_BLOCK + 2) * CACHE_BLOCK;
        let options = EngineOptions { positions: Some(positions * (most + 1)), ..EngineOptions::default() };
        let start = Instant::now();
        let mut engine = engine(artifact, driver, &options)?;
        let opening = start.elapsed().as_secs_f64();
        let (mut prompts, mut steps) = (vec![], vec![]);
        for tokens in &self.prefill {
            prompts.push(json!({"tokens": tokens, "seconds": prefill(&mut engine, *tokens)?}));
        }
        for batch in &self.batches {
            let (seconds, is_finite) = self.decode(&mut engine, *batch)?;
            steps.push(json!({"batch": batch, "context": self.context, "seconds": seconds, "is_finite": is_finite}));
        }
        let is_finite = steps.iter().all(|step| step["is_finite"] == true);
        let json = json!({"weight_bytes": bytes, "open_seconds": opening, "prefill": prompts, "decode": steps});
        Ok((is_finite, json))
    }

    /// The least seconds of a step of one token a sequence, and whether all logits were numbers.
    fn decode(&self, engine: &mut Engine, batch: usize) -> Result<(f64, bool)> {
        let first = engine.new_sequence();
        engine.prefill(first, &tokens(self.context, engine))?;
        let mut sequences: Vec<SequenceId> = vec![first];
        for _ in 1..batch {
            sequences.push(engine.duplicate(first)?);
        }
        let (mut next, mut least, mut is_finite) = (vec![1u32; batch], f64::INFINITY, true);
        for step in 0..WARMING + self.decode {
            let start = Instant::now();
            let each = sequences.iter().zip(&next);
            let work: Vec<Work<'_>> = each
                .map(|(sequence, token)| Work {
                    sequence: *sequence,
                    tokens: std::slice::from_ref(token),
                    rows: Rows::Last,
                })
                .collect();
            let output = engine.step_for(&work, Logits::largest(1, batch))?;
            let mut likeliest = vec![];
            for row in output.rows("logits")?.iter() {
                likeliest.push(argmax(row));
                is_finite &= row.iter().all(|x| x.is_finite());
            }
            next = likeliest;
            if step >= WARMING {
                least = least.min(start.elapsed().as_secs_f64());
            }
        }
        sequences.into_iter().try_for_each(|sequence| engine.release(sequence))?;
        Ok((least, is_finite))
    }
}

/// The least seconds of a prompt, from an empty context.
fn prefill(engine: &mut Engine, count: usize) -> Result<f64> {
    let (tokens, mut least) = (tokens(count, engine), f64::INFINITY);
    for _ in 0..4 {
        let sequence = engine.new_sequence();
        let start = Instant::now();
        engine.prefill_for(sequence, &tokens, Logits::Largest(1))?;
        least = least.min(start.elapsed().as_secs_f64());
        engine.release(sequence)?;
    }
    Ok(least)
}

fn tokens(count: usize, engine: &Engine) -> Vec<u32> {
    let vocab = engine.artifact().manifest().model.vocab;
    (0..count).map(|i| (i * 7919 % vocab) as u32).collect()
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}
