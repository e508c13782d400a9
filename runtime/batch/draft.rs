//! Guesses of what comes next, which one step checks: many tokens for little more than the time of one.
//!
//! ```text
//!  history       ... the quick brown        guess: fox jumps, by what came before (`lookup.rs`) or a draft model (`model.rs`)
//!  step          [brown fox jumps] -> rows: fox, jumps, over      all three are the model's own: two guesses saved two steps
//! ```
//!
//! A row's token is chosen as ever, with its own random number; guesses go on as long as they are what was chosen. So answers
//! are the same with guesses and without, as long as rows are the same in steps of several tokens that fall into one cache
//! block: [`exact`] finds up to how many they are. (Speculative decoding; Leviathan et al., 2023. That a draft which draws with the same random numbers leaves
//! the very tokens as they are: Daliri, Musco and Suresh, 2024.)
//!
//! How many are guessed follows from how often guesses were right and what steps take (`pace.rs`): none where none pay.

mod lookup;
mod model;
mod pace;

pub(super) use lookup::Lookup;
pub(super) use model::{DraftModel, Record, check_pair};
pub(super) use pace::{Pace, Plan};

use super::Batcher;
use super::run::Part;
use crate::engine::{Engine, Work};
use crate::step::Rows;
use mansard_ir::Result;
use mansard_ir::layout::CACHE_BLOCK;
use std::time::Instant;

/// What an answer's guesses go by.
#[derive(Clone, Debug, Default)]
pub(super) struct Drafter {
    /// What came before.
    pub lookup: Lookup,
    /// How often the draft model was right.
    pub model: Record,
    /// The draft model made the last guess.
    pub by_model: bool,
}

impl Batcher {
    /// Adds guesses to what is decoded, where they are worth their time.
    ///
    /// # Errors
    /// Where the draft model's step fails.
    fn guess(&mut self, wishes: &mut [Part]) -> Result<()> {
        if self.guesses == 0 {
            return Ok(());
        }
        // What a step takes beside a piece of a prompt is not known.
        if wishes.iter().any(|part| part.prompt) {
            return Ok(());
        }
        let answers = wishes.len();
        let most = self.bounds.limits.tokens.min(self.bounds.limits.rows).min(self.bounds.many - 1);
        let mut plan = Plan::new(&self.pace, answers, most);
        plan.always = self.always_guess;
        let mut rest = vec![];
        for (index, part) in wishes.iter_mut().enumerate().filter(|(_, part)| part.is_last_token()) {
            let Some(run) = self.running.iter_mut().find(|run| part.is_of(run)) else { continue };
            let (generation, Some(drafter)) = (&run.generation, &mut run.drafter) else { continue };
            let room = (self.capacity - generation.context.len()).min(generation.tokens_left().saturating_sub(1));
            let room = room.min(self.guesses).min(self.engine.steady(part.sequence)? - 1);
            drafter.by_model = false;
            drafter.lookup.learn(&generation.history);
            let chances = drafter.lookup.chances(&generation.history, room);
            match plan.add(&chances) {
                0 if room > 0 => rest.push((index, room)),
                count => part.guess(drafter.lookup.guess(&generation.history, count)),
            }
        }
        match &mut self.draft {
            Some(model) => model.guess(&mut self.running, wishes, &rest, &plan),
            None => Ok(()),
        }
    }

    /// The same for a step that has its cache blocks; for guesses nobody gives up any.
    pub(super) fn with_guesses(&mut self, mut parts: Vec<Part>) -> Vec<Part> {
        if let Err(error) = self.guess(&mut parts) {
            self.fail(&parts, &error);
            return vec![];
        }
        let work = parts.iter().map(|part| (part.sequence, part.tokens.len()));
        if self.engine.lacking(work).is_ok_and(|lacking| lacking > 0) {
            parts.iter_mut().for_each(Part::forget_guesses);
        }
        parts
    }
}

/// The most tokens, up to `most`, whose rows are the same bit for bit in one step as in a step each, and what steps of so many
/// take. It runs some: attention takes its sums in another order where a step has many rows.
///
/// # Errors
/// Where the caches have no room.
pub(super) fn exact(engine: &mut Engine, most: usize) -> Result<(usize, Pace)> {
    let (limits, vocab) = (*engine.limits(), engine.artifact().manifest().model.vocab);
    let room = engine.caches.free().1.saturating_mul(CACHE_BLOCK).min(limits.context);
    let most = most.min(limits.rows).min(limits.tokens);
    // As many positions as attention reads at once, so that what follows falls into one cache block; and none dropped.
    let room = room.min(engine.caches.until_dropped());
    let before = 256.min(room.saturating_sub(2 * most) / CACHE_BLOCK * CACHE_BLOCK);
    let tokens: Vec<u32> = (0..before + 2 * most).map(|i| ((i * i + 7 * i) % vocab) as u32).collect();
    let mut pace = Pace::default();
    let single = rows(engine, &tokens, before, 1, &mut pace)?;
    let mut exact = 1;
    for count in 2..=most {
        if rows(engine, &tokens, before, count, &mut pace)? != single {
            break;
        }
        exact = count;
    }
    Ok((exact, pace))
}

/// The bits of the rows of all tokens but the first, `count` in a step.
fn rows(engine: &mut Engine, tokens: &[u32], first: usize, count: usize, pace: &mut Pace) -> Result<Vec<u32>> {
    let sequence = engine.new_sequence();
    let mut bits = vec![];
    let run = (|| {
        if first > 0 {
            engine.prefill(sequence, &tokens[..first])?;
        }
        for chunk in tokens[first..].chunks(count) {
            let start = Instant::now();
            let output = engine.step(&[Work { sequence, tokens: chunk, rows: Rows::All }])?;
            pace.at_best(chunk.len(), start.elapsed());
            bits.extend(output.rows("logits")?.iter().flatten().map(|x| x.to_bits()));
        }
        Ok(())
    })();
    engine.release(sequence)?;
    run.map(|()| bits)
}
