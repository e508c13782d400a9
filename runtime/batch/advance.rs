//! A step is run -> what its rows bring is told to its requests; ends, forks and shared prefixes.

use super::choose::{self, Choosing, Heard};
use super::request::Event;
use super::run::{Live, Part, Run};
use super::stats::Stats;
use super::{Batcher, RequestId, start};
use crate::engine::{SequenceId, Work};
use crate::generate::Finish;
use crate::step::Logits;
use mansard_ir::Error;
use std::time::Instant;

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
        let now = Instant::now();
        let (time, tokens) = (now - before, work.iter().map(|w| w.tokens.len()).sum::<usize>());
        self.stats.steps += 1;
        self.stats.step_seconds.add_time(time);
        self.stats.step_sequences.add(work.len() as f64);
        self.stats.step_tokens.add(tokens as f64);
        if parts.iter().all(|part| !part.prompt) {
            self.pace.learn(tokens, time);
        }
        let choosing = Choosing { output: &output, tokens: self.tokens.as_ref(), capacity: self.capacity, now };
        let heard = choosing.all(&mut self.running, &parts, self.choosers, self.vocab);
        for (part, mut heard) in parts.iter().zip(heard) {
            let forked = std::mem::take(&mut heard.forked);
            self.tell(part.request, part.guesses().len(), heard, now);
            forked.into_iter().for_each(|run| self.join(run, part.sequence));
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

    /// Tells a request what became of its part, and counts it.
    fn tell(&mut self, request: RequestId, guessed: usize, heard: Heard, now: Instant) {
        for (is_first, time) in &heard.times {
            let Stats { first_token_seconds, next_token_seconds, .. } = &mut self.stats;
            let seconds = if *is_first { first_token_seconds } else { next_token_seconds };
            seconds.add_time(*time);
            self.stats.generated_tokens += 1;
        }
        self.stats.drafted += guessed as u64;
        self.stats.accepted += heard.right as u64;
        // After another of its choices has failed, nobody listens.
        let Some(live) = self.live.get_mut(&request).filter(|live| !live.gone) else { return };
        for event in heard.events {
            live.left -= usize::from(matches!(event, Event::Done { .. }));
            live.send(event);
        }
        if live.left == 0 {
            live.gone = true;
            self.stats.request_seconds.add_time(now - live.arrived);
        }
        if let Some(error) = heard.error {
            fail(self.live.get_mut(&request), &mut self.stats, error);
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
        let mut heard = Heard::default();
        heard.error = choose::end(&mut run, Finish::Context, &mut heard).err();
        self.tell(run.request, 0, heard, Instant::now());
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
