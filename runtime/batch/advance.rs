//! A step is run -> every row's token, told to its request; ends, forks and shared prefixes.

use super::request::Event;
use super::run::{Live, Part, Run};
use super::stats::Stats;
use super::{Batcher, RequestId, start};
use crate::engine::{SequenceId, StepOutput, Work};
use crate::generate::{Chosen, Finish};
use crate::logprobs::Logprobs;
use crate::sample::seed_of_choice;
use crate::step::Logits;
use crate::stop::Shown;
use crate::tokens::Tokens;
use mansard_ir::{Error, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// What tokens are chosen, told and counted with.
struct Telling<'a> {
    live: &'a mut BTreeMap<RequestId, Live>,
    stats: &'a mut Stats,
    tokens: Option<&'a Arc<Tokens>>,
    capacity: usize,
    now: Instant,
}

impl Batcher {
    /// Runs a step of these parts.
    pub(super) fn advance(&mut self, parts: Vec<Part>) {
        let work: Vec<Work<'_>> =
            parts.iter().map(|p| Work { sequence: p.sequence, tokens: &p.tokens, rows: p.rows }).collect();
        let rows: usize = work.iter().map(|w| w.rows.of(w.tokens.len())).sum();
        let logits = parts.iter().filter(|p| p.wish().rows > 0).map(|p| p.logits).reduce(Logits::and);
        let logits = match logits {
            Some(Logits::Largest(count)) => Logits::largest(count, rows),
            _ => Logits::All,
        };
        let before = Instant::now();
        let output = match self.engine.step_for(&work, logits) {
            Ok(output) => output,
            Err(error) => return self.fail(&parts, &error),
        };
        let mut telling = Telling {
            live: &mut self.live,
            stats: &mut self.stats,
            tokens: self.tokens.as_ref(),
            capacity: self.capacity,
            now: Instant::now(),
        };
        let (time, tokens) = (telling.now - before, work.iter().map(|w| w.tokens.len()).sum::<usize>());
        telling.stats.steps += 1;
        telling.stats.step_seconds.add_time(time);
        telling.stats.step_sequences.add(work.len() as f64);
        telling.stats.step_tokens.add(tokens as f64);
        if parts.iter().all(|part| !part.prompt) {
            self.pace.learn(tokens, time);
        }
        let forked = telling.rows(&mut self.running, &parts, &output);
        for (run, from) in forked {
            self.join(run, from);
        }
        self.begin_anew();
        parts.iter().filter(|part| !part.guesses().is_empty()).for_each(|part| self.take_back(part));
        parts.iter().for_each(|part| self.publish(part));
        let mut ended = self.running.extract_if(.., |run| run.ended).collect::<Vec<_>>();
        ended.iter_mut().for_each(|run| self.release(run));
        if let Some(draft) = &mut self.draft {
            draft.keep(|key| self.running.iter().any(|run| run.order() == key));
        }
    }

    /// What was guessed and not chosen. The last token chosen is in no cache yet.
    fn take_back(&mut self, part: &Part) {
        let Some(run) = self.running.iter().find(|run| part.is_of(run)) else { return };
        if run.sequence != Some(part.sequence) {
            return;
        }
        if let Err(error) = self.engine.truncate(part.sequence, run.generation.context.len() - 1) {
            fail(self.live.get_mut(&part.request), &mut self.stats, error);
        }
    }

    /// Answers whose context was shifted: what is left of it is computed as a prompt is.
    fn begin_anew(&mut self) {
        for run in &mut self.running {
            if !std::mem::take(&mut run.shifted) {
                continue;
            }
            let Some(sequence) = run.sequence.replace(self.engine.new_sequence()) else { continue };
            let released = self.engine.release(sequence);
            debug_assert!(released.is_ok(), "{released:?}");
            run.node = start(self.share);
            if let Some(draft) = &mut self.draft {
                draft.let_go(run.order());
            }
        }
    }

    /// A choice that goes on from where another's prompt ended.
    fn join(&mut self, mut run: Run, from: SequenceId) {
        match self.engine.fork(from) {
            Ok(sequence) => {
                run.sequence = Some(sequence);
                self.running.push(run);
            }
            Err(error) => {
                fail(self.live.get_mut(&run.request), &mut self.stats, error);
            }
        }
    }

    /// The requests of a step that could not be run.
    pub(super) fn fail(&mut self, parts: &[Part], error: &Error) {
        for part in parts {
            let copy = Error::new(error.kind(), error.to_string());
            fail(self.live.get_mut(&part.request), &mut self.stats, copy);
        }
    }

    /// The caches are full with this answer alone.
    pub(super) fn end_of_cache(&mut self, mut run: Run) {
        let mut telling = Telling {
            live: &mut self.live,
            stats: &mut self.stats,
            tokens: None,
            capacity: self.capacity,
            now: Instant::now(),
        };
        if let Err(error) = telling.end(&mut run, Finish::Context) {
            fail(self.live.get_mut(&run.request), &mut self.stats, error);
        }
        self.release(&mut run);
    }
}

/// Ends a request with an error.
fn fail(live: Option<&mut Live>, stats: &mut Stats, error: Error) {
    if let Some(live) = live.filter(|live| live.left > 0 && !live.gone) {
        live.send(Event::Failed(error));
        (live.left, live.gone) = (0, true);
        stats.failed += 1;
    }
}

impl Telling<'_> {
    /// Gives every row of a step to its answer. Answers that fork off come back, with the sequences they go on from.
    fn rows(&mut self, running: &mut [Run], parts: &[Part], output: &StepOutput<'_>) -> Vec<(Run, SequenceId)> {
        let (mut forked, mut row) = (vec![], 0);
        for part in parts {
            let count = part.wish().rows;
            if let Some(run) = running.iter_mut().find(|run| part.is_of(run)) {
                let told = self.part(run, part, row, output, &mut forked);
                told.unwrap_or_else(|error| fail(self.live.get_mut(&part.request), self.stats, error));
            }
            row += count;
        }
        forked
    }

    /// Gives an answer its rows, from `row` on, as long as what was guessed is what is chosen.
    fn part(
        &mut self,
        run: &mut Run,
        part: &Part,
        row: usize,
        output: &StepOutput<'_>,
        forked: &mut Vec<(Run, SequenceId)>,
    ) -> Result<()> {
        let guesses = part.guesses();
        let (mut right, mut row, mut rows) = (0, row, part.wish().rows);
        if part.prompt && run.tells_prompt() {
            (row, rows) = self.prompt(run, part, row, output)?;
        }
        for index in 0..rows {
            let logits = output.logits(row + index)?;
            forked.extend(self.fork(run, logits)?.into_iter().map(|twin| (twin, part.sequence)));
            self.choose(run, logits)?;
            if run.ended || run.shifted || run.generation.history.last() != guesses.get(index) {
                break;
            }
            right += 1;
        }
        if let (Some(drafter), false) = (&mut run.drafter, guesses.is_empty()) {
            if drafter.by_model {
                drafter.model.learn(guesses.len(), right);
            }
            self.stats.drafted += guesses.len() as u64;
            self.stats.accepted += right as u64;
        }
        Ok(())
    }

    /// Tells the log probabilities of a piece of a prompt. What is left is the row after its end, where that is there.
    fn prompt(&mut self, run: &mut Run, part: &Part, row: usize, output: &StepOutput<'_>) -> Result<(usize, usize)> {
        let (first, end) = (part.start + 1, part.start + part.tokens.len());
        let after = &run.generation.context[first..run.generation.prompt.min(end + 1)];
        let most = run.prompt_logprobs.unwrap_or(0);
        let tell = |(token, row): (&u32, usize)| Logprobs::new(output.logits(row)?, *token, most);
        // What is computed a second time has been told.
        let told = after.iter().zip(row..).skip(run.told.saturating_sub(part.start)).map(tell);
        let told = told.collect::<Result<Vec<_>>>()?;
        run.told = run.told.max(part.start + after.len());
        if let Some(live) = self.live.get_mut(&run.request) {
            live.send(Event::Prompt(told));
        }
        let is_last = end == run.generation.prompt;
        if is_last {
            run.prompt_logprobs = None;
        }
        Ok((row + after.len(), usize::from(is_last)))
    }

    /// Where the prompt ends: the other choices, each with its first token.
    fn fork(&mut self, run: &mut Run, logits: &[f32]) -> Result<Vec<Run>> {
        let (first, mut twins) = (run.choice + 1, vec![]);
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
            self.choose(&mut twin, logits)?;
            twins.extend(Some(twin).filter(|twin| !twin.ended));
        }
        Ok(twins)
    }

    /// An answer's next token, by its logits.
    fn choose(&mut self, run: &mut Run, logits: &[f32]) -> Result<()> {
        if run.generation.tokens_left() == 0 {
            return self.end(run, Finish::MaxTokens);
        }
        let token = match run.generation.choose(logits)? {
            Chosen::Token(token) => token,
            Chosen::End(finish) => return self.end(run, finish),
        };
        let logprobs = run.logprobs.map(|count| Logprobs::new(logits, token, count)).transpose()?;
        let Shown { text, stopped } = run.text.push(token)?;
        self.time(run);
        if let Some(live) = self.live.get_mut(&run.request) {
            live.send(Event::Token { choice: run.choice, token, text, logprobs });
        }
        // The token itself is in no cache yet.
        let positions = self.capacity - (run.generation.context.len() - 1);
        match run.generation.limit(positions) {
            _ if stopped => self.end(run, Finish::StopText),
            Some(Finish::Context) if run.generation.shift(self.capacity) => {
                run.shifted = true;
                Ok(())
            }
            Some(finish) => self.end(run, finish),
            None => Ok(()),
        }
    }

    fn time(&mut self, run: &mut Run) {
        let seconds = match run.usage.generated {
            0 => &mut self.stats.first_token_seconds,
            _ => &mut self.stats.next_token_seconds,
        };
        seconds.add_time(self.now - run.last_token);
        run.last_token = self.now;
        run.usage.generated += 1;
        self.stats.generated_tokens += 1;
    }

    /// The end of an answer, and perhaps of its request.
    fn end(&mut self, run: &mut Run, finish: Finish) -> Result<()> {
        run.ended = true;
        let rest = if finish == Finish::StopText { None } else { Some(run.text.finish()?) };
        let stopped = rest.as_ref().is_some_and(|rest| rest.stopped);
        let finish = if stopped { Finish::StopText } else { finish };
        let text = rest.map(|rest| rest.text).unwrap_or_default();
        let Some(live) = self.live.get_mut(&run.request) else { return Ok(()) };
        live.send(Event::Done { choice: run.choice, finish, text, usage: run.usage });
        live.left -= 1;
        if live.left == 0 {
            live.gone = true;
            self.stats.request_seconds.add_time(self.now - live.arrived);
        }
        Ok(())
    }
}
