//! One answer on its way, and what it wants of the next step.

use super::draft::Drafter;
use super::pieces;
use super::request::{Event, RequestId, Sink, Usage};
use super::schedule::Wish;
use crate::engine::{Engine, SequenceId};
use crate::generate::Generation;
use crate::prefix::Node;
use crate::step::{Logits, Rows};
use crate::stop::Text;
use std::time::Instant;

/// A request that is not done.
pub(super) struct Live {
    pub sink: Sink,
    /// Answers that are not done.
    pub left: usize,
    pub arrived: Instant,
    /// Nobody listens any more, or all has been said.
    pub gone: bool,
}

impl Live {
    /// Tells an event, where somebody listens.
    pub fn send(&mut self, event: Event) {
        self.gone = self.gone || !(self.sink)(event);
    }
}

/// An answer.
pub(super) struct Run {
    pub request: RequestId,
    pub choice: usize,
    pub client: u64,
    pub generation: Generation,
    /// Where its tokens are cached; `None` while it waits.
    pub sequence: Option<SequenceId>,
    /// Where it stands among shared prefixes, as long as all its tokens are shared.
    pub node: Option<Node>,
    pub text: Text,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    /// Tokens of the prompt, from its second on, whose log probabilities have been told.
    pub told: usize,
    /// Answers that fork off where the prompt ends.
    pub more_choices: usize,
    pub usage: Usage,
    /// When the last token came; at first, when the request did.
    pub last_token: Instant,
    pub drafter: Option<Drafter>,
    /// It has lost its cache blocks, and comes first when there are some.
    pub preempted: bool,
    /// Its context has been shifted: what it has is to be computed anew.
    pub shifted: bool,
    /// Its last token has come.
    pub ended: bool,
    /// Dropped when it is taken in.
    pub ticket: Option<Box<dyn Send>>,
}

/// What a run wants of a step.
pub(super) struct Part {
    pub request: RequestId,
    pub choice: usize,
    pub sequence: SequenceId,
    pub tokens: Vec<u32>,
    /// Tokens before them.
    pub start: usize,
    pub rows: Rows,
    pub prompt: bool,
    pub logits: Logits,
    /// Tokens at the end that were guessed.
    pub guessed: usize,
    /// Where the run stands among shared prefixes.
    pub node: Option<Node>,
}

impl Part {
    pub fn wish(&self) -> Wish {
        let tokens = self.tokens.len();
        Wish { tokens, rows: self.rows.of(tokens), prompt: self.prompt }
    }

    /// Tokens that were guessed.
    pub fn guesses(&self) -> &[u32] {
        &self.tokens[self.tokens.len() - self.guessed..]
    }

    /// The last token of an answer, whose row tells what follows.
    pub fn is_last_token(&self) -> bool {
        !self.prompt && self.rows == Rows::Last
    }

    /// What may follow.
    pub fn guess(&mut self, tokens: &[u32]) {
        if !tokens.is_empty() {
            self.tokens.extend_from_slice(tokens);
            self.guessed += tokens.len();
            self.rows = Rows::All;
        }
    }

    /// No guesses.
    pub fn forget_guesses(&mut self) {
        if self.guessed > 0 {
            self.tokens.truncate(self.tokens.len() - self.guessed);
            (self.guessed, self.rows) = (0, Rows::Last);
        }
    }

    pub fn is_of(&self, run: &Run) -> bool {
        self.request == run.request && self.choice == run.choice
    }
}

impl Run {
    /// Order of arrival.
    pub fn order(&self) -> (RequestId, usize) {
        (self.request, self.choice)
    }

    /// Rows of its prompt are still to be told.
    pub fn tells_prompt(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// Tokens of the piece of the prompt that follows the first `done` tokens; `None` after the prompt.
    pub fn piece(&self, done: usize, longest: usize) -> Option<usize> {
        let begun = self.generation.begun;
        (done < begun).then(|| pieces::next(done, begun, longest))
    }

    /// A piece of the prompt, or the next token: the last one, whose row tells what follows, or one that is computed again.
    pub fn next_part(&self, engine: &Engine, longest: usize) -> Option<Part> {
        let sequence = self.sequence?;
        let done = engine.length(sequence).ok()?;
        let piece = self.piece(done, longest);
        let context = &self.generation.context;
        let tokens = context.get(done..done + piece.unwrap_or(1))?.to_vec();
        let last = done + tokens.len() == context.len();
        let told = piece.is_some() && self.tells_prompt();
        Some(Part {
            request: self.request,
            choice: self.choice,
            sequence,
            rows: if told {
                Rows::All
            } else if last {
                Rows::Last
            } else {
                Rows::None
            },
            prompt: piece.is_some(),
            logits: if told || self.logprobs.is_some() { Logits::All } else { self.generation.logits() },
            start: done,
            guessed: 0,
            node: self.node,
            tokens,
        })
    }
}
