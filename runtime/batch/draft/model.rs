//! A smaller model's answers -> guesses of a larger one's.
//!
//! ```text
//!  answers' tokens      a b c                  x y              each has a sequence of the draft model's own, which follows it
//!  draft steps          [c] [x' of y]          all answers advance together, a token in a step
//!  guesses              d e                    z w
//! ```
//!
//! The draft model draws with the random numbers that the answer's own tokens will be drawn with: the nearer its
//! distribution, the more often it draws the same. Its caches are its own; what was guessed wrong is cut off them, and where
//! they are full, answers that are not being guessed for are let go and followed again later.

use super::Plan;
use super::pace::Pace;
use crate::artifact::Artifact;
use crate::batch::run::{Part, Run};
use crate::batch::{MOST_CHECKED, RequestId};
use crate::engine::{Engine, SequenceId, Work};
use crate::generate::Preview;
use crate::step::{Logits, Rows};
use crate::tokens::Tokens;
use mansard_ir::{Place, Result, bail};
use std::collections::BTreeMap;
use std::time::Instant;

/// Tokens that an answer goes without a guess where guesses do not pay; doubled each time, up to the second.
const PAUSES: (usize, usize) = (64, 256);

/// How often guesses for an answer were right.
#[derive(Clone, Debug)]
pub(in crate::batch) struct Record {
    /// Share of guesses that were, the last ones counting most, of those whose predecessors were.
    right: f64,
    /// Steps until one is made although it does not pay, and after that one.
    pause: usize,
    next_pause: usize,
}

impl Default for Record {
    fn default() -> Record {
        Record { right: 0.7, pause: PAUSES.0, next_pause: 2 * PAUSES.0 }
    }
}

impl Record {
    /// Of so many guesses the first `right` were.
    pub fn learn(&mut self, guessed: usize, right: usize) {
        (0..guessed.min(right + 1)).for_each(|i| self.right = 0.9 * self.right + 0.1 * f64::from(u8::from(i < right)));
        (self.pause, self.next_pause) = if right > 0 { PAUSES } else { (self.pause, self.next_pause) };
    }

    /// Guesses do not pay; whether one is made all the same, to see whether they might.
    fn waits(&mut self) -> bool {
        self.pause = self.pause.saturating_sub(1);
        let over = self.pause == 0;
        if over {
            (self.pause, self.next_pause) = (self.next_pause, (2 * self.next_pause).min(PAUSES.1));
        }
        !over
    }
}

/// A model whose answers are guesses, and its sequences by answer.
pub(in crate::batch) struct DraftModel {
    engine: Engine,
    pace: Pace,
    followers: BTreeMap<(RequestId, usize), SequenceId>,
    /// Tokens of a prompt that are caught up with beside a step, and most that a first guess may lack.
    piece: usize,
    at_once: usize,
    /// Steps it has run.
    pub steps: u64,
}

/// An answer that is guessed for.
struct Guess<'a> {
    key: (RequestId, usize),
    /// Index of its wish.
    wish: usize,
    sequence: SequenceId,
    /// Tokens that its sequence lacks.
    lacking: Vec<u32>,
    preview: Preview<'a>,
    logits: Logits,
    guessed: Vec<u32>,
}

impl DraftModel {
    /// A model that has followed nothing yet, what its steps take measured.
    ///
    /// # Errors
    /// Where its caches have no room for that.
    pub fn new(mut engine: Engine, piece: usize) -> Result<DraftModel> {
        let (_, pace) = super::exact(&mut engine, 8)?;
        let most = engine.limits().tokens;
        let (piece, at_once) = (piece.min(most), (PAUSES.1 + 2 * MOST_CHECKED).min(most));
        Ok(DraftModel { engine, pace, followers: BTreeMap::new(), piece, at_once, steps: 0 })
    }

    /// Cache blocks in use, and all.
    pub fn blocks(&self) -> (usize, usize) {
        let (free, total) = self.engine.caches.free();
        (total - free, total)
    }

    /// Lets go of answers that are not on their way any more.
    pub fn keep(&mut self, is_running: impl Fn((RequestId, usize)) -> bool) {
        let gone: Vec<_> = self.followers.keys().copied().filter(|key| !is_running(*key)).collect();
        gone.into_iter().for_each(|key| self.let_go(key));
    }

    /// An answer's sequence is of no use any more.
    pub fn let_go(&mut self, key: (RequestId, usize)) {
        if let Some(sequence) = self.followers.remove(&key) {
            let released = self.engine.release(sequence);
            debug_assert!(released.is_ok(), "{released:?}");
        }
    }

    /// Guesses for answers, given by index of their wish and the most tokens of each, as many as `plan` says pay.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn guess(
        &mut self,
        running: &mut [Run],
        wishes: &mut [Part],
        answers: &[(usize, usize)],
        plan: &Plan<'_>,
    ) -> Result<()> {
        let limits = self.engine.limits();
        let most = limits.sequences.min(limits.rows).min(limits.tokens / 2);
        let mut asked: Vec<(usize, usize, &mut Run)> = vec![];
        for run in running.iter_mut().filter(|run| run.generation.can_be_previewed()) {
            let found = answers.iter().find(|(wish, _)| wishes[*wish].is_of(run));
            asked.extend(found.map(|(wish, room)| (*wish, *room, run)));
        }
        asked.truncate(most);
        let record = |run: &mut Run| run.drafter.as_ref().map_or(0.0, |drafter| drafter.model.right);
        let chances: Vec<f64> = asked.iter_mut().map(|(_, _, run)| record(run)).collect();
        let room = asked.iter().map(|(_, room, _)| *room).max().unwrap_or(0);
        let mut length = plan.length(&chances, room, self.pace.seconds(asked.len()));
        if length == 0 {
            // Not even a draft that is always right would pay, or it is seen now and then whether it is.
            let perfect = plan.length(&vec![1.0; asked.len()], room, self.pace.seconds(asked.len()));
            asked.retain_mut(|(_, _, run)| perfect > 0 && run.drafter.as_mut().is_some_and(|d| !d.model.waits()));
            length = 1;
        }
        let mut guesses = self.follow(&asked)?;
        for round in 0..length {
            guesses.retain(|guess| asked.iter().any(|(wish, room, _)| guess.wish == *wish && *room > round));
            self.step(&mut guesses)?;
            for guess in &guesses {
                let token = guess.guessed.last().copied();
                token.into_iter().for_each(|token| wishes[guess.wish].guess(&[token]));
            }
            guesses.retain(|guess| guess.guessed.len() > round);
        }
        for (_, _, run) in asked {
            if let Some(drafter) = &mut run.drafter {
                drafter.by_model = true;
            }
        }
        Ok(())
    }

    /// Sequences for answers, each lacking a few tokens at most; a piece of one that lacks more is run now.
    fn follow<'a>(&mut self, asked: &'a [(usize, usize, &mut Run)]) -> Result<Vec<Guess<'a>>> {
        let mut guesses = vec![];
        let mut caught_up = false;
        for (wish, _, run) in asked {
            let (key, context) = ((run.request, run.choice), &run.generation.context);
            let sequence = *self.followers.entry(key).or_insert_with(|| self.engine.new_sequence());
            let known = self.engine.length(sequence)?.min(context.len() - 1);
            let known = if known < self.engine.shortest(sequence)? { 0 } else { known };
            self.engine.truncate(sequence, known)?;
            let lacking = &context[known..];
            let room = self.engine.limits().context.saturating_sub(context.len() + MOST_CHECKED);
            if lacking.len() <= self.at_once && room > 0 {
                let (preview, logits) = (run.generation.preview(), run.generation.logits());
                let lacking = lacking.to_vec();
                guesses.push(Guess { key, wish: *wish, sequence, lacking, preview, logits, guessed: vec![] });
            } else if !caught_up && room > 0 {
                caught_up = true;
                let tokens = &lacking[..self.piece.min(lacking.len() - 1)];
                if self.make_room(&[(sequence, tokens.len())], &[key])? {
                    self.engine.step(&[Work { sequence, tokens, rows: Rows::None }])?;
                    self.steps += 1;
                }
            }
        }
        Ok(guesses)
    }

    /// One more token of each; those that there is no room for are left out.
    fn step(&mut self, guesses: &mut Vec<Guess<'_>>) -> Result<()> {
        loop {
            let work: Vec<_> = guesses.iter().map(|guess| (guess.sequence, guess.lacking.len())).collect();
            let keys: Vec<_> = guesses.iter().map(|guess| guess.key).collect();
            let tokens = work.iter().map(|(_, tokens)| tokens).sum::<usize>();
            if tokens <= self.engine.limits().tokens && self.make_room(&work, &keys)? {
                break;
            }
            guesses.pop();
        }
        if guesses.is_empty() {
            return Ok(());
        }
        let work: Vec<Work<'_>> =
            guesses.iter().map(|g| Work { sequence: g.sequence, tokens: &g.lacking, rows: Rows::Last }).collect();
        let logits = guesses.iter().map(|guess| guess.logits).fold(Logits::Largest(1), Logits::and);
        let logits = if let Logits::Largest(count) = logits { Logits::largest(count, work.len()) } else { logits };
        let tokens = work.iter().map(|w| w.tokens.len()).sum();
        let start = Instant::now();
        let output = self.engine.step_for(&work, logits)?;
        self.pace.learn(tokens, start.elapsed());
        self.steps += 1;
        for (row, guess) in guesses.iter_mut().enumerate() {
            // Where the answer would end, there is nothing to guess.
            if let Some(token) = guess.preview.choose(output.logits(row)?)? {
                guess.guessed.push(token);
                guess.lacking = vec![token];
            }
        }
        Ok(())
    }

    /// Whether there is room for so many tokens more of these sequences; others' are let go for it.
    fn make_room(&mut self, work: &[(SequenceId, usize)], keys: &[(RequestId, usize)]) -> Result<bool> {
        while self.engine.lacking(work.iter().copied())? > 0 {
            let Some(other) = self.followers.keys().copied().find(|key| !keys.contains(key)) else { return Ok(false) };
            self.let_go(other);
        }
        Ok(true)
    }
}

/// Refuses a draft whose tokens are not the target's.
///
/// # Errors
/// Then, saying what differs.
pub(in crate::batch) fn check_pair(target: &Artifact, draft: &Artifact) -> Result<()> {
    let (ours, theirs) = (&target.manifest().model, &draft.manifest().model);
    if theirs.encoder || ours.vocab != theirs.vocab {
        let found = if theirs.encoder { "an encoder".into() } else { format!("{} tokens", theirs.vocab) };
        bail!(Usage, "expected a draft model of the target's {} tokens, found {found}", ours.vocab);
    }
    let vocabulary = |artifact: &Artifact| match (artifact.tokenizer_json()?, &artifact.manifest().model.tokenizer) {
        (Some(json), Some(info)) => Tokens::new(json, info).map(|tokens| Some(tokens.vocabulary())),
        _ => Ok(None),
    };
    let place = |artifact: &Artifact| artifact.path().display().to_string();
    let ours = vocabulary(target).at(|| place(target))?;
    let theirs = vocabulary(draft).at(|| place(draft))?;
    if let (Some(ours), Some(theirs)) = (ours, theirs)
        && ours != theirs
    {
        let other = ours.iter().find(|(text, id)| theirs.get(*text) != Some(id));
        let other = other.map_or(String::new(), |(text, id)| {
            let found = theirs.get(text).map_or_else(|| "no such token".into(), |id| format!("token {id}"));
            format!(": `{text}` is token {id}, and {found} of the draft model's")
        });
        bail!(Usage, "expected a draft model with the target's vocabulary, found another{other}");
    }
    Ok(())
}
