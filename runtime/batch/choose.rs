//! A step's rows -> what each answer hears: its tokens, its end, answers that fork off.
//!
//! ```text
//!  rows --choose, by as many threads as pay--> a Heard for each part --tell, in order--> sinks (advance.rs)
//! ```
//!
//! An answer's tokens depend on its own state and rows alone, so nothing depends on which thread takes whom. Drawing from a
//! whole vocabulary takes so long that 32 answers would else wait for one thread a third of their time.

use super::request::Event;
use super::run::{Part, Run};
use crate::engine::StepOutput;
use crate::generate::{Chosen, Finish};
use crate::logprobs::Logprobs;
use crate::sample::seed_of_choice;
use crate::step::Logits;
use crate::stop::Shown;
use crate::tokens::Tokens;
use mansard_ir::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What tokens are chosen by.
pub(super) struct Choosing<'a> {
    pub output: &'a StepOutput<'a>,
    pub tokens: Option<&'a Arc<Tokens>>,
    /// Positions that a sequence can have.
    pub capacity: usize,
    pub now: Instant,
}

/// What became of a part.
#[derive(Default)]
pub(super) struct Heard {
    /// In order, each of a choice of the part's request.
    pub events: Vec<Event>,
    /// How long each token took, and whether it was its answer's first.
    pub times: Vec<(bool, Duration)>,
    /// Answers that go on from where its prompt ended.
    pub forked: Vec<Run>,
    /// Guesses that were what was chosen.
    pub right: usize,
    /// What went wrong after that.
    pub error: Option<Error>,
}

/// An answer, the index of its part, and its first row.
struct Job<'a> {
    run: &'a mut Run,
    part: usize,
    row: usize,
}

/// Logits read once for which another thread pays: some hundred microseconds' work, against some ten for a thread.
const WORTH: usize = 1 << 20;
/// What drawing from all logits takes, in times they are read.
const DRAWING: usize = 8;

impl Choosing<'_> {
    /// What every part of a step hears, in the order of the parts. `threads` may be used.
    pub fn all(&self, running: &mut [Run], parts: &[Part], threads: usize, vocab: usize) -> Vec<Heard> {
        let (mut jobs, mut row, mut effort) = (vec![], 0, 0usize);
        let rows = parts.iter().map(|part| (row, row += part.wish().rows).0).collect::<Vec<usize>>();
        for run in running.iter_mut() {
            let Some(part) = parts.iter().position(|part| part.is_of(run)) else { continue };
            let each = if parts[part].logits == Logits::All { DRAWING } else { 1 };
            let choices = run.more_choices + 1;
            effort = effort.saturating_add((parts[part].wish().rows * choices * each).saturating_mul(vocab));
            jobs.push(Job { run, part, row: rows[part] });
        }
        let helpers = (effort / WORTH).min(threads.saturating_sub(1)).min(jobs.len().saturating_sub(1));
        let heard: Vec<Mutex<Heard>> = parts.iter().map(|_| Mutex::default()).collect();
        let jobs = Mutex::new(jobs.into_iter());
        let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
        let take = || {
            while let Some(Job { run, part, row }) = next() {
                let found = self.part(run, &parts[part], row);
                *heard[part].lock().unwrap_or_else(PoisonError::into_inner) = found;
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..helpers {
                // Where the system has no thread left, this one does it all.
                let _ = std::thread::Builder::new().name("choose".into()).spawn_scoped(scope, take);
            }
            take();
        });
        heard.into_iter().map(|heard| heard.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    fn part(&self, run: &mut Run, part: &Part, row: usize) -> Heard {
        let mut heard = Heard::default();
        heard.error = self.rows(run, part, row, &mut heard).err();
        heard
    }

    /// Gives an answer its rows, from `row` on, as long as what was guessed is what is chosen.
    fn rows(&self, run: &mut Run, part: &Part, row: usize, heard: &mut Heard) -> Result<()> {
        let guesses = part.guesses();
        let (mut row, mut rows) = (row, part.wish().rows);
        if part.prompt && run.tells_prompt() {
            (row, rows) = self.prompt(run, part, row, heard)?;
        }
        for index in 0..rows {
            let logits = self.output.logits(row + index)?;
            self.fork(run, logits, heard)?;
            self.choose(run, logits, heard)?;
            if run.ended || run.shifted || run.generation.history.last() != guesses.get(index) {
                break;
            }
            heard.right += 1;
        }
        if let (Some(drafter), false) = (&mut run.drafter, guesses.is_empty())
            && drafter.by_model
        {
            drafter.model.learn(guesses.len(), heard.right);
        }
        Ok(())
    }

    /// Tells the log probabilities of a piece of a prompt. What is left is the row after its end, where that is there.
    fn prompt(&self, run: &mut Run, part: &Part, row: usize, heard: &mut Heard) -> Result<(usize, usize)> {
        let (first, end) = (part.start + 1, part.start + part.tokens.len());
        let after = &run.generation.context[first..run.generation.prompt.min(end + 1)];
        let most = run.prompt_logprobs.unwrap_or(0);
        let tell = |(token, row): (&u32, usize)| Logprobs::new(self.output.logits(row)?, *token, most);
        // What is computed a second time has been told.
        let told = after.iter().zip(row..).skip(run.told.saturating_sub(part.start)).map(tell);
        heard.events.push(Event::Prompt(told.collect::<Result<_>>()?));
        run.told = run.told.max(part.start + after.len());
        let is_last = end == run.generation.prompt;
        if is_last {
            run.prompt_logprobs = None;
        }
        Ok((row + after.len(), usize::from(is_last)))
    }

    /// Where the prompt ends: the other choices, each with its first token.
    fn fork(&self, run: &mut Run, logits: &[f32], heard: &mut Heard) -> Result<()> {
        let first = run.choice + 1;
        for choice in first..first + std::mem::take(&mut run.more_choices) {
            let mut twin = Run {
                choice,
                generation: run.generation.fork(seed_of_choice(run.generation.seed(), choice))?,
                sequence: None,
                node: None,
                text: run.text.anew(self.tokens),
                drafter: run.drafter.clone(),
                ticket: None,
                ..*run
            };
            self.choose(&mut twin, logits, heard)?;
            heard.forked.extend(Some(twin).filter(|twin| !twin.ended));
        }
        Ok(())
    }

    /// An answer's next token, by its logits.
    fn choose(&self, run: &mut Run, logits: &[f32], heard: &mut Heard) -> Result<()> {
        let token = match run.generation.tokens_left() {
            0 => Chosen::End(Finish::MaxTokens),
            _ => run.generation.choose(logits)?,
        };
        let token = match token {
            Chosen::Token(token) => token,
            Chosen::End(finish) => return end(run, finish, heard),
        };
        let logprobs = run.logprobs.map(|count| Logprobs::new(logits, token, count)).transpose()?;
        let Shown { text, stopped } = run.text.push(token)?;
        heard.times.push((run.usage.generated == 0, self.now - run.last_token));
        run.last_token = self.now;
        run.usage.generated += 1;
        heard.events.push(Event::Token { choice: run.choice, token, text, logprobs });
        // The token itself is in no cache yet.
        let positions = self.capacity - (run.generation.context.len() - 1);
        match run.generation.limit(positions) {
            _ if stopped => end(run, Finish::StopText, heard),
            Some(Finish::Context) if run.generation.shift(self.capacity) => {
                run.shifted = true;
                Ok(())
            }
            Some(finish) => end(run, finish, heard),
            None => Ok(()),
        }
    }
}

/// The end of an answer.
pub(super) fn end(run: &mut Run, finish: Finish, heard: &mut Heard) -> Result<()> {
    run.ended = true;
    let rest = if finish == Finish::StopText { None } else { Some(run.text.finish()?) };
    let stopped = rest.as_ref().is_some_and(|rest| rest.stopped);
    let finish = if stopped { Finish::StopText } else { finish };
    let text = rest.map(|rest| rest.text).unwrap_or_default();
    heard.events.push(Event::Done { choice: run.choice, finish, text, usage: run.usage });
    Ok(())
}
