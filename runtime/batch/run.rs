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
    /// Answers that fork off where the prompt ends.
    pub more_choices: usize,
    pub usage: Usage,
    /// When the last token came; at first, when the request did.
    pub last_token: Instant,
    pub drafter: Option<Drafter>,
    /// It has lost its cache blocks, and comes first when there are some.
    pub preempted: bool,
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
    pub rows: Rows,
    pub prompt: bool,
    pub logits: Logits,
    /// Where the run stands among shared prefixes.
    pub node: Option<Node>,
}

impl Part {
    pub fn wish(&self) -> Wish {
        let tokens = self.tokens.len();
        Wish { tokens, rows: self.rows.of(tokens), prompt: self.prompt }
    }

    /// Tokens that were guessed: all but the first of those whose rows all leave.
    pub fn guesses(&self) -> &[u32] {
        if self.rows == Rows::All { &self.tokens[1..] } else { &[] }
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

    /// Tokens of the piece of the prompt that follows the first `done` tokens; `None` after the prompt.
    pub fn piece(&self, done: usize, longest: usize) -> Option<usize> {
        let prompt = self.generation.prompt;
        (done < prompt).then(|| pieces::next(done, prompt, longest))
    }

    /// A piece of the prompt, or the next token: the last one, whose row tells what follows, or one that is computed again.
    pub fn next_part(&self, engine: &Engine, longest: usize) -> Option<Part> {
        let sequence = self.sequence?;
        let done = engine.length(sequence).ok()?;
        let piece = self.piece(done, longest);
        let history = &self.generation.history;
        let tokens = history.get(done..done + piece.unwrap_or(1))?.to_vec();
        let last = done + tokens.len() == history.len();
        Some(Part {
            request: self.request,
            choice: self.choice,
            sequence,
            rows: if last { Rows::Last } else { Rows::None },
            prompt: piece.is_some(),
            logits: if self.logprobs.is_some() { Logits::All } else { self.generation.logits() },
            node: self.node,
            tokens,
        })
    }
}
