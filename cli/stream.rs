//! A prompt -> an answer as it comes, for commands with one stream: plainly, or in a batch of one where it is guessed ahead or
//! the context moves on.

use crate::report::EngineArguments;
use mansard_ir::{Error, Kind, Result};
use mansard_runtime::{
    BatchOptions, Batcher, Engine, EngineOptions, Event, Finish, GenerateOptions, Generated, Model, Request,
    SequenceId, generate,
};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Instant;

/// Guesses, and what is seen of long texts.
#[derive(clap::Args)]
pub struct StreamArguments {
    /// A small artifact of the same vocabulary, whose answers are guesses that one step checks. Answers stay the same
    #[arg(long, value_name = "ARTIFACT")]
    pub draft: Option<PathBuf>,
    /// Most tokens to guess, by what came before and by the draft, and check in one step; 0 for none. Answers stay the same
    /// [default: 0; 4 with a draft]
    #[arg(long, value_name = "N")]
    guesses: Option<usize>,
    /// See the first 64 positions and the last N, instead of all: caches keep no more (attention sinks)
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Where the context is full, go on with its first N tokens [64] and the last half of the others
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "64")]
    pub context_shift: Option<usize>,
}

impl StreamArguments {
    /// Most tokens guessed.
    pub fn guesses(&self) -> usize {
        self.guesses.unwrap_or(if self.draft.is_some() { 4 } else { 0 })
    }

    /// With the window.
    pub fn engine(&self, options: EngineOptions) -> EngineOptions {
        EngineOptions { window: self.window, ..options }
    }

    /// The draft's model, where there is one.
    ///
    /// # Errors
    /// Where it does not open.
    pub fn draft(&self, arguments: &EngineArguments) -> Result<Option<Model>> {
        self.draft.as_deref().map(|path| arguments.open(path)).transpose()
    }
}

/// What answers one prompt after another. What they begin with in common stays in the cache.
pub enum Stream {
    /// Token by token, and what is in the cache.
    Plain(Box<Engine>, SequenceId, Vec<u32>),
    /// A batch of one.
    Batch(Box<Batcher>),
}

/// An answer, and what it took.
pub struct Answer {
    /// Its tokens and times.
    pub generated: Generated,
    /// Tokens of the prompt that had to be computed.
    pub computed: usize,
    /// Tokens guessed, and those of them that were right.
    pub guessed: (u64, u64),
}

impl Stream {
    /// Starts the engines.
    ///
    /// # Errors
    /// Where one does not start, or the draft's vocabulary is another.
    pub fn open(model: &Model, arguments: &EngineArguments, stream: &StreamArguments) -> Result<Stream> {
        let mut engine = arguments.engine(model, &stream.engine(arguments.options()))?;
        if stream.guesses() == 0 && stream.draft.is_none() && stream.context_shift.is_none() {
            let sequence = engine.new_sequence();
            return Ok(Stream::Plain(Box::new(engine), sequence, vec![]));
        }
        let limits = *engine.limits();
        let (piece, guesses) = (limits.tokens, stream.guesses());
        let options = BatchOptions { running: Some(1), piece, guesses, ..BatchOptions::default() };
        let mut batcher = Batcher::new(engine, None, &options)?;
        if let Some(draft) = stream.draft(arguments)? {
            let options = EngineOptions { positions: Some(limits.context), ..arguments.options() };
            batcher = batcher.with_draft(arguments.engine(&draft, &options)?)?;
        }
        Ok(Stream::Batch(Box::new(batcher)))
    }

    /// Answers a prompt; `on_token` sees each token at once.
    ///
    /// # Errors
    /// Where the prompt is empty or too long, or `on_token` fails.
    pub fn answer(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> Result<()>,
    ) -> Result<Answer> {
        match self {
            Stream::Plain(engine, sequence, cached) => {
                // At least one token must run, to give the next.
                let limit = prompt.len().saturating_sub(1);
                let common = cached.iter().zip(&prompt[..limit]).take_while(|(a, b)| a == b).count();
                // Layers that see a window may have let go of what the common part needs.
                let common = if common < engine.shortest(*sequence)? { 0 } else { common };
                engine.truncate(*sequence, common)?;
                let generated = generate(engine, *sequence, &prompt[common..], options, |token| {
                    on_token(token)?;
                    Ok(true)
                })?;
                *cached = [prompt, &generated.tokens[..]].concat();
                // The last token is not in the cache yet.
                cached.truncate(engine.length(*sequence)?);
                Ok(Answer { generated, computed: prompt.len() - common, guessed: (0, 0) })
            }
            Stream::Batch(batcher) => in_batch(batcher, prompt, options, on_token),
        }
    }
}

fn in_batch(
    batcher: &mut Batcher,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> Result<()>,
) -> Result<Answer> {
    let (sender, events) = channel();
    let before = (batcher.stats().drafted, batcher.stats().accepted);
    let start = Instant::now();
    let sink = Box::new(move |event| sender.send(event).is_ok());
    batcher.submit(Request::new(prompt.to_vec(), options.clone()), sink)?;
    let (mut tokens, mut prefill, mut end) = (vec![], None, None);
    while end.is_none() {
        batcher.step();
        for event in events.try_iter() {
            match event {
                Event::Token { token, .. } => {
                    prefill.get_or_insert_with(|| start.elapsed());
                    tokens.push(token);
                    on_token(token)?;
                }
                Event::Done { finish, usage, .. } => end = Some((finish, usage)),
                Event::Failed(error) => return Err(error),
                Event::Prompt(_) => {}
            }
        }
        if end.is_none() && batcher.pending() == 0 {
            return Err(Error::new(Kind::Internal, "the answer ended before its time"));
        }
    }
    let (finish, usage) = end.unwrap_or((Finish::Caller, Default::default()));
    let prefill = prefill.unwrap_or_else(|| start.elapsed());
    let guessed = (batcher.stats().drafted - before.0, batcher.stats().accepted - before.1);
    let generated = Generated { tokens, finish, prefill, decode: start.elapsed() - prefill };
    Ok(Answer { generated, computed: prompt.len() - usage.cached, guessed })
}
