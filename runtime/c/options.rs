//! What callers ask for, as C has it: zero means the default wherever zero makes no sense itself.
#![allow(unsafe_code)]

use crate::memory::{Place, list, text};
use crate::status::{Failure, Result, guard, mansard_status};
use mansard_grammar::Format;
use mansard_runtime::{
    BatchOptions, Constraint, EngineOptions, GenerateOptions, Request, SamplerOptions, ServiceOptions, WeightPages,
};
use std::ffi::c_char;

/// For mansard_model_open: trust the weights, that is, do not check their hashes. Everything else is always checked.
pub const MANSARD_TRUST_WEIGHTS: u32 = 1;

/// For an answer's format: any text.
pub const MANSARD_TEXT: u32 = 0;
/// For an answer's format: any JSON object.
pub const MANSARD_JSON: u32 = 1;
/// For an answer's format: JSON of the schema in `grammar`.
pub const MANSARD_SCHEMA: u32 = 2;
/// For an answer's format: what the regular expression in `grammar` matches from its beginning to its end; in Rust's syntax,
/// without look-around.
pub const MANSARD_REGEX: u32 = 3;
/// For an answer's format: what the context-free grammar in `grammar` generates, which is in Lark's form.
pub const MANSARD_LARK: u32 = 4;

/// How a model is run. All zero: all physical cores, weights read where they are mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct mansard_engine_options {
    /// Worker threads; 0 for one on each physical core.
    pub threads: u32,
    /// Not 0: keep each worker to a core of its own.
    pub pin: u32,
    /// Not 0: copy the weights to huge pages instead of reading them where they are mapped.
    pub huge_pages: u32,
    /// Positions of cache over all sequences; 0 for one context, of a service for sixteen. Memory is taken as they are filled.
    pub positions: usize,
}

/// How requests are run together. All zero: the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct mansard_service_options {
    /// How the model is run.
    pub engine: mansard_engine_options,
    /// Most answers on their way at once; 0 for as many as a step has room for.
    pub running: u32,
    /// Most requests that wait; 0 for 256.
    pub queue: u32,
    /// Most tokens of a prompt that run at once beside others' answers, 64, 128, 256...; 0 for 128.
    pub piece: u32,
    /// Most tokens that are guessed by what came before and checked in one step. Answers stay the same.
    pub guesses: u32,
    /// Not 0: keep nothing of a prompt for others that begin like it.
    pub no_sharing: u32,
}

/// What to generate. Begin with what mansard_options_default writes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct mansard_options {
    /// Most tokens of an answer.
    pub max_tokens: u32,
    /// Answers to the prompt, each with random numbers of its own.
    pub choices: u32,
    /// Divides logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Mass kept; 1 keeps all.
    pub top_p: f32,
    /// Least probability kept, as a share of the likeliest's; 0 keeps all.
    pub min_p: f32,
    /// Mass kept of the tokens whose surprise is nearest to the expected; 1 keeps all.
    pub typical: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Tokens that count as recent, the prompt's included.
    pub repetition_window: u32,
    /// Taken off a token's logit for each time it was generated.
    pub frequency_penalty: f32,
    /// Taken off a token's logit if it was generated at all.
    pub presence_penalty: f32,
    /// Start of the random numbers. The same seed gives the same answer, whatever else runs.
    pub seed: u64,
    /// Tokens whose logits are changed.
    pub bias_tokens: *const u32,
    /// By how much, for each of them.
    pub biases: *const f32,
    /// How many they are.
    pub bias_count: usize,
    /// Texts that end an answer, and are no part of it.
    pub stop: *const *const c_char,
    /// How many they are.
    pub stop_count: usize,
    /// Not 0: go on where the model would end.
    pub ignore_end: u32,
    /// Log probabilities that are told with each token: its own and those of so many of the likeliest; -1 for none.
    pub logprobs: i32,
    /// What an answer has to look like: MANSARD_TEXT, MANSARD_JSON... Tokens that cannot go on like that are not drawn. The model
    /// must have a vocabulary of bytes, which byte-level BPE and SentencePiece are.
    pub format: u32,
    /// The schema, regular expression or grammar that `format` speaks of; not read for MANSARD_TEXT and MANSARD_JSON.
    pub grammar: *const c_char,
    /// Who asks: those who have fewest answers on their way come first.
    pub client: u64,
}

/// Writes the defaults: 256 tokens, one answer, temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, seed 0. Any thread.
///
/// `options` is null or a place for them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_options_default(options: *mut mansard_options) -> mansard_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { Place::new("options", options) }.map(|place| place.put(mansard_options::default())))
}

impl Default for mansard_options {
    fn default() -> mansard_options {
        let GenerateOptions { max_tokens, sampler, .. } = GenerateOptions::default();
        mansard_options {
            max_tokens: max_tokens as u32,
            choices: 1,
            temperature: sampler.temperature,
            top_k: sampler.top_k as u32,
            top_p: sampler.top_p,
            min_p: sampler.min_p,
            typical: sampler.typical,
            repetition_penalty: sampler.repetition_penalty,
            repetition_window: sampler.repetition_window as u32,
            frequency_penalty: sampler.frequency_penalty,
            presence_penalty: sampler.presence_penalty,
            seed: sampler.seed,
            bias_tokens: std::ptr::null(),
            biases: std::ptr::null(),
            bias_count: 0,
            stop: std::ptr::null(),
            stop_count: 0,
            ignore_end: 0,
            logprobs: -1,
            format: MANSARD_TEXT,
            grammar: std::ptr::null(),
            client: 0,
        }
    }
}

impl mansard_options {
    /// What the answer has to look like; `None` for any text.
    ///
    /// # Safety
    /// `grammar` is as its description says.
    unsafe fn format(&self) -> Result<Option<Format>> {
        // SAFETY: the caller's word.
        let grammar = || unsafe { text("grammar", self.grammar) }.map(String::from);
        Ok(Some(match self.format {
            MANSARD_TEXT => return Ok(None),
            MANSARD_JSON => Format::Json,
            MANSARD_SCHEMA => Format::Schema(grammar()?),
            MANSARD_REGEX => Format::Regex(grammar()?),
            MANSARD_LARK => Format::Lark(grammar()?),
            other => {
                return Err(Failure::usage(format!("format: expected MANSARD_TEXT to MANSARD_LARK, found {other}")));
            }
        }))
    }

    /// The request for an answer to `prompt`, kept to its format by `constraint`.
    ///
    /// # Safety
    /// What its pointers point to is as their descriptions say.
    pub unsafe fn request(
        &self,
        prompt: &[u32],
        constraint: impl FnOnce(&Format) -> Result<Box<dyn Constraint>>,
    ) -> Result<Request> {
        // SAFETY: the caller's word.
        let constraint = unsafe { self.format() }?.as_ref().map(constraint).transpose()?;
        // SAFETY: the caller's word.
        let (tokens, biases, stop) = unsafe {
            (
                list("bias_tokens", self.bias_tokens, self.bias_count)?,
                list("biases", self.biases, self.bias_count)?,
                list("stop", self.stop, self.stop_count)?,
            )
        };
        // SAFETY: the caller's word.
        let stop = stop.iter().map(|stop| unsafe { text("stop", *stop) }.map(String::from)).collect::<Result<_>>()?;
        let logprobs = match self.logprobs {
            -1 => None,
            count => Some(usize::try_from(count).map_err(|_| {
                Failure::usage(format!("logprobs: expected -1 for none, or their number, found {count}"))
            })?),
        };
        let sampler = SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k as usize,
            top_p: self.top_p,
            min_p: self.min_p,
            typical: self.typical,
            repetition_penalty: self.repetition_penalty,
            repetition_window: self.repetition_window as usize,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: tokens.iter().copied().zip(biases.iter().copied()).collect(),
            seed: self.seed,
        };
        let stop_tokens = (self.ignore_end != 0).then(Vec::new);
        let options =
            GenerateOptions { max_tokens: self.max_tokens as usize, sampler, stop_tokens, ..Default::default() };
        let (choices, client) = (self.choices as usize, self.client);
        Ok(Request { choices, stop, logprobs, constraint, client, ..Request::new(prompt.to_vec(), options) })
    }
}

impl mansard_engine_options {
    /// As the runtime takes them; `positions` is meant by zero.
    pub fn options(&self, positions: usize) -> EngineOptions {
        EngineOptions {
            threads: given(self.threads),
            positions: Some(if self.positions == 0 { positions } else { self.positions }),
            weights: if self.huge_pages != 0 { WeightPages::Huge } else { WeightPages::Mapped },
            pin: self.pin != 0,
            ..EngineOptions::default()
        }
    }
}

impl mansard_service_options {
    /// As the runtime takes them.
    pub fn options(&self) -> ServiceOptions {
        let ServiceOptions { queue, batch } = ServiceOptions::default();
        let batch = BatchOptions {
            running: given(self.running),
            piece: given(self.piece).unwrap_or(batch.piece),
            share: self.no_sharing == 0,
            guesses: self.guesses as usize,
            ..batch
        };
        ServiceOptions { queue: given(self.queue).unwrap_or(queue), batch }
    }
}

fn given(value: u32) -> Option<usize> {
    (value != 0).then_some(value as usize)
}
