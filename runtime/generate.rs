//! A prompt -> tokens, one at a time, until something ends it.

use crate::engine::{Engine, SequenceId, Work};
use crate::sample::{Before, Constraint, Sampler, SamplerOptions};
use crate::step::{Logits, Rows};
use mansard_ir::model::ModelInfo;
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
    /// Where the context is full, go on with so many tokens of its beginning and the last half of the others, computed anew at
    /// their new positions: what was between is forgotten. `None` ends there.
    pub shift: Option<usize>,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions { max_tokens: 256, sampler: SamplerOptions::default(), stop_tokens: None, shift: None }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so, with this token, which `on_token` has not seen.
    StopToken(u32),
    /// As many tokens as asked for.
    MaxTokens,
    /// The context is full, or what the caches hold.
    Context,
    /// One of the request's stop strings came.
    StopText,
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
    let mut generation = Generation::new(prompt, options, &engine.artifact().manifest().model, None)?;
    if options.max_tokens == 0 {
        bail!(Usage, "expected at least one token to generate, found 0");
    }
    if options.shift.is_some() && engine.length(sequence)? > 0 {
        bail!(Usage, "a context that is to be shifted must begin with the prompt: expected an empty sequence");
    }
    let start = Instant::now();
    let logits = generation.logits();
    if prompt.len() > engine.limits().context {
        generation.shift(engine.limits().context);
    }
    let mut chosen = generation.choose(engine.prefill_for(sequence, &generation.context, logits)?.logits(0)?)?;
    let prefill = start.elapsed();

    let finish = loop {
        let next = match chosen {
            Chosen::Token(next) => next,
            Chosen::End(finish) => break finish,
        };
        if !on_token(next)? {
            break Finish::Caller;
        }
        let context = engine.limits().context;
        match generation.limit(context - engine.length(sequence)?) {
            Some(Finish::Context) if generation.shift(context) => {
                engine.truncate(sequence, 0)?;
                let output = engine.prefill_for(sequence, &generation.context, logits)?;
                chosen = generation.choose(output.logits(0)?)?;
                continue;
            }
            Some(finish) => break finish,
            None => {}
        }
        let output = engine.step_for(&[Work { sequence, tokens: &[next], rows: Rows::Last }], logits)?;
        chosen = generation.choose(output.logits(0)?)?;
    };
    let tokens = generation.generated().to_vec();
    Ok(Generated { tokens, finish, prefill, decode: start.elapsed() - prefill })
}

/// A generation on its way: what has come, and how what comes next is chosen.
pub(crate) struct Generation {
    /// The prompt, then what was generated.
    pub history: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// What the model sees of it: all, until the context is shifted.
    pub context: Vec<u32>,
    /// Tokens at its beginning that are computed as prompts are.
    pub begun: usize,
    shift: Option<usize>,
    sampler: Sampler,
    stop_tokens: Vec<u32>,
    max_tokens: usize,
    constraint: Option<Box<dyn Constraint>>,
}

/// What a row of logits brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// A token, which is in the history now.
    Token(u32),
    /// The end.
    End(Finish),
}

impl Generation {
    /// Before the first token.
    ///
    /// # Errors
    /// Where options are out of range, or the model generates nothing.
    pub fn new(
        prompt: &[u32],
        options: &GenerateOptions,
        model: &ModelInfo,
        constraint: Option<Box<dyn Constraint>>,
    ) -> Result<Generation> {
        let sampler = Sampler::new(options.sampler.clone())?;
        if model.encoder {
            bail!(Usage, "a {} model is an encoder: it embeds text and generates none", model.architecture);
        }
        let stop_tokens = options.stop_tokens.clone().unwrap_or_else(|| model.end_tokens.clone());
        let (history, context, prompt) = (prompt.to_vec(), prompt.to_vec(), prompt.len());
        let GenerateOptions { max_tokens, shift, .. } = *options;
        Ok(Generation { history, prompt, context, begun: prompt, shift, sampler, stop_tokens, max_tokens, constraint })
    }

    /// The same, with random numbers of another seed.
    ///
    /// # Errors
    /// None but those of [`Generation::new`].
    pub fn fork(&self, seed: u64) -> Result<Generation> {
        let sampler = Sampler::new(SamplerOptions { seed, ..self.sampler.options().clone() })?;
        let (history, context, stop_tokens) = (self.history.clone(), self.context.clone(), self.stop_tokens.clone());
        let constraint = self.constraint.as_ref().map(|c| c.fork());
        Ok(Generation { history, context, stop_tokens, sampler, constraint, ..*self })
    }

    /// The logits that are looked at.
    pub fn logits(&self) -> Logits {
        if self.constraint.is_some() { Logits::All } else { self.sampler.options().logits() }
    }

    /// Start of the random numbers.
    pub fn seed(&self) -> u64 {
        self.sampler.options().seed
    }

    /// What came after the prompt.
    pub fn generated(&self) -> &[u32] {
        &self.history[self.prompt..]
    }

    /// Tokens that may come.
    pub fn tokens_left(&self) -> usize {
        self.max_tokens.saturating_sub(self.generated().len())
    }

    /// Chooses what comes next by its logits.
    ///
    /// # Errors
    /// Where no logit is a number, or a constraint allows nothing.
    pub fn choose(&mut self, logits: &[f32]) -> Result<Chosen> {
        let before = Before { history: &self.history, prompt: self.prompt };
        let allowed = self.constraint.as_mut().map(|c| c.allowed()).transpose()?;
        let token = self.sampler.sample(logits, before, allowed)?;
        if self.stop_tokens.contains(&token) {
            return Ok(Chosen::End(Finish::StopToken(token)));
        }
        self.constraint.as_mut().map_or(Ok(()), |c| c.accept(token))?;
        self.history.push(token);
        self.context.push(token);
        Ok(Chosen::Token(token))
    }

    /// What another model's logits make of the same random numbers.
    pub fn preview(&self) -> Preview<'_> {
        let history = if self.sampler.options().adjusts() { self.history.clone() } else { vec![] };
        Preview { sampler: self.sampler.ahead(), history, generation: self }
    }

    /// Whether [`Generation::preview`] knows all that decides: a constraint it does not.
    pub fn can_be_previewed(&self) -> bool {
        self.constraint.is_none()
    }

    /// Where a context of `capacity` tokens is full and may be: leaves the tokens at its beginning that are to be kept (half of
    /// it at most), and the last half of the others.
    pub fn shift(&mut self, capacity: usize) -> bool {
        let Some(keep) = self.shift.map(|keep| keep.min(capacity / 2)) else { return false };
        let last = (capacity - keep).div_ceil(2);
        self.context.drain(keep..self.context.len().saturating_sub(last).max(keep));
        self.begun = self.context.len();
        true
    }

    /// Why nothing can follow the last token, where it fills the last of as many tokens as asked for or there is no position
    /// left for it.
    pub fn limit(&self, positions: usize) -> Option<Finish> {
        if self.generated().len() >= self.max_tokens {
            return Some(Finish::MaxTokens);
        }
        (positions == 0).then_some(Finish::Context)
    }
}

/// Tokens that another model would choose.
pub(crate) struct Preview<'a> {
    generation: &'a Generation,
    sampler: Sampler,
    /// Where it matters.
    history: Vec<u32>,
}

impl Preview<'_> {
    /// The next one; `None` for the end.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn choose(&mut self, logits: &[f32]) -> Result<Option<u32>> {
        let before = Before { history: &self.history, prompt: self.generation.prompt };
        let token = self.sampler.sample(logits, before, None)?;
        self.history.push(token);
        Ok(Some(token).filter(|token| !self.generation.stop_tokens.contains(token)))
    }
}
