//! Requests -> tokens, many at a time: continuous batching over ragged steps.
//!
//! ```text
//!  submit ---> waiting --admit--> running --step--> tokens to each request's sink
//!                 ^                  |
//!                 +----preempt-------+      when cache blocks run out: computed again later
//! ```
//!
//! Before every step sequences may join or leave. A step holds a token of each answer on its way and pieces of prompts beside
//! them (`schedule.rs`); prompts with a common beginning share what is computed of it (`prefix.rs`). One request's tokens
//! depend on its seed and its prompt alone, bit for bit: prompts are cut by their own length (`pieces.rs`), an answer's tokens
//! run one at a time, also when they are computed again, and every answer has random numbers of its own.
//!
//! A [`Batcher`] is driven by whoever holds it; [`crate::Service`] drives one on a thread.

mod advance;
mod choose;
mod draft;
mod pieces;
mod request;
mod room;
mod run;
mod schedule;
mod stats;

pub use request::{Event, Request, RequestId, Sink, Usage};
pub use stats::{Histogram, Stats};

use crate::engine::Engine;
use crate::generate::Generation;
use crate::prefix::{Prefixes, ROOT};
use crate::stop::Text;
use crate::tokens::Tokens;
use draft::{DraftModel, Drafter, Pace};
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::{Result, bail};
use run::{Live, Run};
use schedule::Bounds;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// How a batch is run.
#[derive(Clone, Copy, Debug)]
pub struct BatchOptions {
    /// Most answers on their way at once; as many as a step has room for where `None`.
    pub running: Option<usize>,
    /// Most tokens of a piece of a prompt: 64, doubled some times. What is decoded waits for no more than one.
    pub piece: usize,
    /// Keep what prompts compute for others with the same beginning.
    pub share: bool,
    /// Most tokens that are guessed, by what came before or a draft model, and checked in one step; 0 for none.
    pub guesses: usize,
    /// Guess wherever there is something to guess, whether it pays or not.
    pub always_guess: bool,
}

impl Default for BatchOptions {
    fn default() -> BatchOptions {
        BatchOptions { running: None, piece: 128, share: true, guesses: 0, always_guess: false }
    }
}

/// Most tokens of an answer in one step.
const MOST_CHECKED: usize = 16;

/// An engine, the requests it works on, and what it keeps for later ones.
pub struct Batcher {
    engine: Engine,
    tokens: Option<Arc<Tokens>>,
    bounds: Bounds,
    /// Tokens of a prompt's longest piece, and of one whose rows are told.
    piece: usize,
    told_piece: usize,
    most_running: usize,
    /// Threads that choose tokens, and of how many.
    choosers: usize,
    vocab: usize,
    share: bool,
    /// Most tokens guessed at once: as many as asked for, and no more than leave an answer as it is.
    guesses: usize,
    always_guess: bool,
    pace: Pace,
    draft: Option<DraftModel>,
    /// Positions that a sequence can have.
    capacity: usize,
    waiting: Vec<Run>,
    running: Vec<Run>,
    live: BTreeMap<RequestId, Live>,
    prefixes: Prefixes,
    stats: Stats,
    next: u64,
    /// Whose turn it is.
    prompts_first: bool,
}

impl Batcher {
    /// A batch without requests. Without `tokens` there is no text, only ids.
    ///
    /// # Errors
    /// Where the model generates nothing, or options are out of range.
    pub fn new(mut engine: Engine, tokens: Option<Arc<Tokens>>, options: &BatchOptions) -> Result<Batcher> {
        let limits = *engine.limits();
        let model = &engine.artifact().manifest().model;
        if model.encoder {
            bail!(Usage, "a {} model is an encoder: it embeds text and generates none", model.architecture);
        }
        if options.piece == 0 || options.running == Some(0) {
            bail!(Usage, "expected at least one token in a piece of a prompt and one answer at once, found 0");
        }
        let piece = pieces::longest(options.piece.min(limits.tokens));
        let many = schedule::many(engine.program());
        let most = limits.sequences.min(limits.rows).min(limits.tokens);
        let capacity = engine.caches.free().1.saturating_mul(CACHE_BLOCK).min(limits.context);
        let (guesses, pace) = match options.guesses {
            0 => (0, Pace::default()),
            most => {
                let (exact, pace) = draft::exact(&mut engine, most.saturating_add(1).min(MOST_CHECKED))?;
                (exact - 1, pace)
            }
        };
        let mut stats = Stats::new();
        stats.blocks_total = engine.caches.free().1;
        Ok(Batcher {
            choosers: engine.threads().min(std::thread::available_parallelism().map_or(1, |n| n.get())),
            vocab: engine.artifact().manifest().model.vocab,
            bounds: Bounds { limits, beside: piece, many },
            piece,
            told_piece: pieces::longest(piece.min(limits.rows)),
            most_running: options.running.unwrap_or(most).min(most),
            share: options.share,
            guesses,
            always_guess: options.always_guess,
            pace,
            draft: None,
            capacity,
            waiting: vec![],
            running: vec![],
            live: BTreeMap::new(),
            prefixes: Prefixes::new(),
            stats,
            next: 0,
            prompts_first: false,
            engine,
            tokens,
        })
    }

    /// The same, with a draft model: its answers are guesses that one step of this batch's model checks, and answers stay as
    /// they are. Its engine has caches of its own, best of as many positions.
    ///
    /// # Errors
    /// Where its vocabulary is not this model's, or nothing may be guessed: by the options, or because rows of this model
    /// are not the same in steps of several tokens.
    pub fn with_draft(mut self, draft: Engine) -> Result<Batcher> {
        draft::check_pair(self.engine.artifact(), draft.artifact())?;
        if self.guesses == 0 {
            bail!(Usage, "expected at least one guess for a draft model to make, found 0");
        }
        self.draft = Some(DraftModel::new(draft, self.piece)?);
        self.count();
        Ok(self)
    }

    /// Takes a request in. `sink` hears of it from [`Batcher::step`].
    ///
    /// # Errors
    /// Where it makes no sense or can never be done; nothing has changed then.
    pub fn submit(&mut self, request: Request, sink: Sink) -> Result<RequestId> {
        let run = self.run_of(request)?;
        Ok(self.insert(run, sink))
    }

    /// [`Batcher::submit`] that tells the sink what is wrong.
    pub(crate) fn submit_or_tell(&mut self, request: Request, mut sink: Sink) -> Option<RequestId> {
        match self.run_of(request) {
            Ok(run) => Some(self.insert(run, sink)),
            Err(error) => {
                self.stats.failed += 1;
                sink(Event::Failed(error));
                None
            }
        }
    }

    fn insert(&mut self, run: Run, sink: Sink) -> RequestId {
        let id = run.request;
        self.next += 1;
        self.stats.requests += 1;
        self.stats.prompt_tokens += run.usage.prompt as u64;
        self.live.insert(id, Live { sink, left: run.more_choices + 1, arrived: run.last_token, gone: false });
        self.waiting.push(run);
        id
    }

    fn run_of(&self, request: Request) -> Result<Run> {
        self.check(&request)?;
        let model = &self.engine.artifact().manifest().model;
        let mut generation = Generation::new(&request.prompt, &request.options, model, request.constraint)?;
        if request.prompt.len() > self.capacity {
            generation.shift(self.capacity);
        }
        Ok(Run {
            request: RequestId(self.next),
            choice: 0,
            client: request.client,
            usage: Usage { prompt: request.prompt.len(), ..Usage::default() },
            generation,
            sequence: None,
            node: None,
            text: Text::new(self.tokens.as_ref(), request.stop.into())?,
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            told: 0,
            more_choices: request.choices - 1,
            last_token: Instant::now(),
            drafter: (self.guesses > 0).then(Drafter::default),
            preempted: false,
            shifted: false,
            ended: false,
            ticket: request.ticket,
        })
    }

    fn check(&self, request: &Request) -> Result<()> {
        let (prompt, vocab) = (&request.prompt, self.engine.artifact().manifest().model.vocab);
        if prompt.is_empty() {
            bail!(Usage, "expected a prompt of at least one token, found none");
        }
        let shifts = request.options.shift.is_some() && request.prompt_logprobs.is_none();
        if prompt.len() > self.capacity && !shifts {
            bail!(Usage, "expected a prompt of at most {} tokens, found {}", self.capacity, prompt.len());
        }
        if let Some(token) = prompt.iter().find(|token| **token as usize >= vocab) {
            bail!(Usage, "expected tokens below {vocab}, found {token}");
        }
        if request.options.max_tokens == 0 && request.prompt_logprobs.is_none() {
            bail!(Usage, "expected at least one token to generate, found 0");
        }
        let most = self.bounds.limits.sequences;
        if !(1..=most).contains(&request.choices) {
            bail!(Usage, "expected 1 to {most} choices, found {}", request.choices);
        }
        Ok(())
    }

    /// Ends a request, of which nothing more is heard.
    pub fn cancel(&mut self, request: RequestId) {
        if let Some(live) = self.live.get_mut(&request) {
            live.gone = true;
        }
    }

    /// Runs one step. Gives `false` where there was nothing to do.
    pub fn step(&mut self) -> bool {
        self.sweep();
        self.admit();
        self.adopt();
        let parts = self.plan();
        let parts = self.make_room(parts);
        let parts = self.with_guesses(parts);
        if !parts.is_empty() {
            self.advance(parts);
        }
        self.sweep();
        self.count();
        !self.live.is_empty()
    }

    /// Requests that are not done.
    pub fn pending(&self) -> usize {
        self.live.len()
    }

    /// Ends every request with an error.
    pub fn abort(&mut self, why: impl Fn() -> mansard_ir::Error) {
        for live in self.live.values_mut() {
            live.send(Event::Failed(why()));
            live.gone = true;
        }
        self.sweep();
    }

    /// Lets go of all that is kept for later requests.
    pub fn forget(&mut self) {
        while self.prefixes.let_go(&mut self.engine.caches) {}
        self.count();
    }

    /// Figures from the start.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// What runs the steps.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The most tokens that a prompt and its answer can have together.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn count(&mut self) {
        self.stats.waiting = self.waiting.len();
        self.stats.running = self.running.len();
        self.stats.prefixes = self.prefixes.len();
        let (free, total) = self.engine.caches.free();
        self.stats.blocks_taken = total - free;
        if let Some(draft) = &self.draft {
            (self.stats.draft_blocks_taken, self.stats.draft_blocks_total) = draft.blocks();
            self.stats.draft_steps = draft.steps;
        }
    }

    /// Removes what nobody listens to any more.
    fn sweep(&mut self) {
        let gone: Vec<RequestId> = self.live.iter().filter(|(_, live)| live.gone).map(|(id, _)| *id).collect();
        if gone.is_empty() {
            return;
        }
        for id in &gone {
            let live = self.live.remove(id);
            self.stats.cancelled += u64::from(live.is_some_and(|live| live.left > 0));
        }
        self.waiting.retain(|run| !gone.contains(&run.request));
        let mut ended = self.running.extract_if(.., |run| gone.contains(&run.request)).collect::<Vec<_>>();
        ended.iter_mut().for_each(|run| self.release(run));
    }

    /// Gives a run's cache blocks back.
    fn release(&mut self, run: &mut Run) {
        if let Some(sequence) = run.sequence.take() {
            // It is this batch's own, and released once.
            let released = self.engine.release(sequence);
            debug_assert!(released.is_ok(), "{released:?}");
        }
    }

    /// What every running sequence wants next, and which of it makes up the step.
    fn plan(&mut self) -> Vec<run::Part> {
        let mut wishes: Vec<run::Part> = vec![];
        for run in &self.running {
            let piece = if run.tells_prompt() { self.told_piece } else { self.piece };
            let Some(part) = run.next_part(&self.engine, piece) else { continue };
            // What another computes now can be had after this step.
            let same =
                |other: &run::Part| part.node.is_some() && other.node == part.node && other.tokens == part.tokens;
            if !(part.prompt && pieces::is_whole(part.tokens.len()) && wishes.iter().any(same)) {
                wishes.push(part);
            }
        }
        wishes.sort_by_key(|part| part.prompt);
        let sizes: Vec<schedule::Wish> = wishes.iter().map(run::Part::wish).collect();
        let chosen = schedule::choose(&sizes, &self.bounds, self.prompts_first);
        let mixed = sizes.iter().any(|wish| wish.prompt) && sizes.iter().any(|wish| !wish.prompt);
        self.prompts_first = mixed && !self.prompts_first;
        let mut wishes: Vec<Option<run::Part>> = wishes.into_iter().map(Some).collect();
        chosen.into_iter().filter_map(|index| wishes[index].take()).collect()
    }
}

/// Where a sequence without tokens stands among shared prefixes.
fn start(share: bool) -> Option<crate::prefix::Node> {
    share.then_some(ROOT)
}
