//! Tokens that came before -> guesses of what comes next, which one step checks (prompt lookup; Saxena, 2023).
//!
//! ```text
//!  ... the quick brown fox jumps ... the quick brown     guess: fox jumps
//!  step [brown fox jumps] -> rows: fox, jumps, over      all three are the model's own: two guesses saved two steps
//! ```
//!
//! A row's token is chosen as ever, with its own random number; guesses go on as long as they are what was chosen. So answers
//! are the same with guesses and without (for sampled ones this is rejection sampling of a draft that is certain; Leviathan
//! et al., 2023), as long as rows are the same in steps of several tokens: [`exact`] finds up to how many they are.

use crate::engine::{Engine, Work};
use crate::step::Rows;
use mansard_ir::Result;
use std::collections::HashMap;
use std::time::Duration;

/// Tokens that a guess goes on from.
const CONTEXT: usize = 3;
/// Tokens that an answer goes without guesses after a wrong one.
const FIRST_PAUSE: usize = 4;
/// Most tokens that an answer goes without guesses after wrong ones.
const LONGEST_PAUSE: usize = 64;

/// One answer's guesses.
#[derive(Debug)]
pub(super) struct Drafter {
    /// Where the last occurrence of these tokens is followed.
    followed: HashMap<[u32; CONTEXT], usize>,
    /// Tokens that `followed` knows.
    known: usize,
    most: usize,
    /// Guesses made next.
    length: usize,
    /// Tokens until the next guess, and after the next wrong one.
    pause: usize,
    next_pause: usize,
    /// Share of guesses that were right, the last ones counting most.
    pub right: f64,
}

impl Drafter {
    /// Guesses of at most `most` tokens.
    pub fn new(most: usize) -> Drafter {
        Drafter { followed: HashMap::new(), known: 0, most, length: 1, pause: 0, next_pause: FIRST_PAUSE, right: 0.5 }
    }

    /// One that has guessed nothing yet.
    pub fn anew(&self) -> Drafter {
        Drafter::new(self.most)
    }

    /// What may follow `history`: as many tokens as followed when its end came before.
    pub fn guess<'a>(&mut self, history: &'a [u32], most: usize) -> &'a [u32] {
        let ends = self.known.max(CONTEXT)..history.len();
        for end in ends {
            if let Some(tokens) = history[..end].last_chunk() {
                self.followed.insert(*tokens, end);
            }
        }
        self.known = history.len();
        if self.pause > 0 {
            self.pause -= 1;
            return &[];
        }
        let at = history.last_chunk().and_then(|end| self.followed.get(end));
        let guess = at.map_or(&[][..], |at| &history[*at..]);
        &guess[..guess.len().min(most).min(self.length)]
    }

    /// How many of the last guess were right.
    pub fn learn(&mut self, guessed: usize, right: usize) {
        self.right = 0.8 * self.right + 0.2 * (right as f64 / guessed as f64);
        match right {
            0 => {
                self.pause = self.next_pause;
                self.next_pause = (2 * self.next_pause).min(LONGEST_PAUSE);
                self.length = (self.length / 2).max(1);
            }
            _ => {
                self.next_pause = FIRST_PAUSE;
                self.length = if right == guessed { (2 * self.length).min(self.most) } else { right };
            }
        }
    }
}

/// Seconds of decoding steps by their number of tokens, in powers of two: what further tokens cost.
#[derive(Debug, Default)]
pub(super) struct Pace([f64; 8]);

impl Pace {
    fn bucket(tokens: usize) -> usize {
        (tokens.max(1).next_power_of_two().ilog2() as usize).min(7)
    }

    /// A step took that long.
    pub fn learn(&mut self, tokens: usize, time: Duration) {
        let (seconds, time) = (&mut self.0[Pace::bucket(tokens)], time.as_secs_f64());
        *seconds = if *seconds == 0.0 { time } else { 0.9 * *seconds + 0.1 * time };
    }

    /// Whether `more` guesses, each right with that probability where those before it are, are worth their time in a step
    /// that decodes a token of each of `answers` and has `tokens` already. What was never measured is tried.
    pub fn is_worth(&self, answers: usize, tokens: usize, more: usize, right: f64) -> bool {
        let [before, after] = [tokens, tokens + more].map(|tokens| self.0[Pace::bucket(tokens)]);
        let gain: f64 = (1..=more as i32).map(|i| right.powi(i)).sum();
        before == 0.0 || after == 0.0 || after / before < 1.0 + gain / answers.max(1) as f64
    }
}

/// The most tokens, up to `most`, whose rows are the same bit for bit in one step as in a step each. It runs some: attention
/// takes its sums in another order where a step has many rows.
///
/// # Errors
/// Where the caches have no room.
pub(super) fn exact(engine: &mut Engine, most: usize) -> Result<usize> {
    let (limits, vocab) = (*engine.limits(), engine.artifact().manifest().model.vocab);
    let room = engine.caches.free().1.saturating_mul(mansard_ir::layout::CACHE_BLOCK).min(limits.context);
    let most = most.min(limits.rows).min(limits.tokens);
    // As many positions as attention reads at once, and more.
    let before = 300.min(room.saturating_sub(2 * most));
    let tokens: Vec<u32> = (0..before + 2 * most).map(|i| ((i * i + 7 * i) % vocab) as u32).collect();
    let single = rows(engine, &tokens, before, 1)?;
    for count in (2..=most).rev() {
        if rows(engine, &tokens, before, count)? == single {
            return Ok(count);
        }
    }
    Ok(1)
}

/// The bits of the rows of all tokens but the first, `count` in a step.
fn rows(engine: &mut Engine, tokens: &[u32], first: usize, count: usize) -> Result<Vec<u32>> {
    let sequence = engine.new_sequence();
    let mut bits = vec![];
    let run = (|| {
        if first > 0 {
            engine.prefill(sequence, &tokens[..first])?;
        }
        for chunk in tokens[first..].chunks(count) {
            let output = engine.step(&[Work { sequence, tokens: chunk, rows: Rows::All }])?;
            bits.extend(output.rows("logits")?.iter().flatten().map(|x| x.to_bits()));
        }
        Ok(())
    })();
    engine.release(sequence)?;
    run.map(|()| bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_before_is_guessed() {
        let history = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3];
        let mut drafter = sure();
        assert_eq!(drafter.guess(&history[..10], 4), [0; 0]);
        assert_eq!(drafter.guess(&history, 4), [4, 5, 6, 7]);
        assert_eq!(drafter.guess(&history, 2), [4, 5]);
        assert_eq!(sure().guess(&[1, 2], 4), [0; 0]);
        // The last occurrence counts, and itself never.
        assert_eq!(sure().guess(&[1, 1, 1, 1, 1], 4), [1]);
    }

    /// A drafter whose guesses were right.
    fn sure() -> Drafter {
        let mut drafter = Drafter::new(4);
        [1, 2].into_iter().for_each(|right| drafter.learn(right, right));
        drafter
    }

    #[test]
    fn wrong_guesses_become_rare_and_right_ones_long() {
        let history = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3];
        let mut drafter = Drafter::new(4);
        assert_eq!(drafter.guess(&history, 4), [4]);
        let empty = |drafter: &mut Drafter| (0..).take_while(|_| drafter.guess(&history, 4).is_empty()).count();
        drafter.learn(1, 0);
        assert_eq!(empty(&mut drafter), FIRST_PAUSE);
        drafter.learn(1, 0);
        assert_eq!(empty(&mut drafter), 2 * FIRST_PAUSE);
        [1, 2].into_iter().for_each(|right| drafter.learn(right, right));
        assert_eq!(drafter.guess(&history, 4), [4, 5, 6, 7]);
        drafter.learn(4, 2);
        assert_eq!(drafter.guess(&history, 4), [4, 5]);
    }

    #[test]
    fn guesses_must_be_worth_their_time() {
        let mut pace = Pace::default();
        assert!(pace.is_worth(1, 1, 4, 0.1), "never measured");
        pace.learn(1, Duration::from_millis(10));
        pace.learn(5, Duration::from_millis(15));
        assert!(pace.is_worth(1, 1, 4, 0.5) && !pace.is_worth(1, 1, 4, 0.3));
        assert!(!pace.is_worth(8, 1, 4, 0.9), "of eight answers one gains");
    }
}
