//! A prompt -> tokens, one at a time, until something ends it.

use crate::engine::{Engine, SequenceId, Work};
use crate::sample::{Sampler, SamplerOptions};
use crate::step::Rows;
use mansard_ir::{Result, bail};
use std::time::{Duration, Instant};

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The most tokens.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampler: SamplerOptions,
    /// Ids that end the text; the model's own where `None`.
    pub stop_tokens: Option<Vec<u32>>,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions { max_tokens: 256, sampler: SamplerOptions::default(), stop_tokens: None }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so, with this token, which `on_token` has not seen.
    StopToken(u32),
    /// As many tokens as asked for.
    MaxTokens,
    /// The context is full.
    Context,
    /// `on_token` said so.
    Caller,
}

/// A generation in figures.
#[derive(Clone, Debug)]
pub struct Generated {
    /// What `on_token` has seen. The last is not in the sequence yet: nothing had to follow it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Time of the prompt.
    pub prefill: Duration,
    /// Time of everything after.
    pub decode: Duration,
}

/// Appends `prompt` to a sequence and generates what follows. `on_token` sees each token at once, and ends the generation
/// by giving `false`.
///
/// # Errors
/// Where the prompt is empty or too long, options are out of range, or `on_token` fails.
pub fn generate(
    engine: &mut Engine,
    sequence: SequenceId,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> Result<bool>,
) -> Result<Generated> {
    let mut sampler = Sampler::new(options.sampler)?;
    let model = &engine.artifact().manifest().model;
    if options.max_tokens == 0 {
        bail!(Usage, "expected at least one token to generate, found 0");
    }
    if model.encoder {
        bail!(Usage, "a {} model is an encoder: it embeds text and generates none", model.architecture);
    }
    let stop_tokens = options.stop_tokens.clone().unwrap_or_else(|| model.end_tokens.clone());
    let start = Instant::now();
    let (mut history, logits) = (prompt.to_vec(), options.sampler.logits());
    let mut next = sampler.sample(engine.prefill_for(sequence, prompt, logits)?.logits(0)?, &history)?;
    let prefill = start.elapsed();

    let finish = loop {
        if stop_tokens.contains(&next) {
            break Finish::StopToken(next);
        }
        history.push(next);
        if !on_token(next)? {
            break Finish::Caller;
        }
        if history.len() - prompt.len() == options.max_tokens {
            break Finish::MaxTokens;
        }
        if engine.length(sequence)? == engine.limits().context {
            break Finish::Context;
        }
        let output = engine.step_for(&[Work { sequence, tokens: &[next], rows: Rows::Last }], logits)?;
        next = sampler.sample(output.logits(0)?, &history)?;
    };
    Ok(Generated { tokens: history.split_off(prompt.len()), finish, prefill, decode: start.elapsed() - prefill })
}
