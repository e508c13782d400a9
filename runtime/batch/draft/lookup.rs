//! Tokens that came before -> guesses of what comes next (prompt lookup; Saxena, 2023).
//!
//! ```text
//!  ... the quick brown fox jumps ... the quick brown     at: fox, which `followed` knows; streak 0
//!  ... the quick brown fox                               at: jumps, streak 1
//! ```
//!
//! Whether the next token is what `at` says is watched all the time, which costs nothing. So how often it is right is
//! known by how long it has been, before anything is guessed.

use std::collections::HashMap;

/// Tokens that a guess goes on from.
const CONTEXT: usize = 3;
/// Streaks from 0, 1, 2, 4 and 8 tokens on: how often the next was right at first, as if seen `SEEN` times.
const RIGHT: [f64; 5] = [0.25, 0.4, 0.5, 0.7, 0.9];
const SEEN: f64 = 4.0;

/// What one answer's guesses go by.
#[derive(Clone, Debug, Default)]
pub(in crate::batch) struct Lookup {
    /// Where the last occurrence of these tokens is followed.
    followed: HashMap<[u32; CONTEXT], usize>,
    /// Tokens that are known.
    known: usize,
    /// Where what comes next is thought to have come before, and how often in a row that was so.
    at: Option<usize>,
    streak: usize,
    /// How often the next one was and was not, by streak.
    right: [f64; RIGHT.len()],
    wrong: [f64; RIGHT.len()],
}

fn class(streak: usize) -> usize {
    streak.checked_ilog2().map_or(0, |log| log as usize + 1).min(RIGHT.len() - 1)
}

impl Lookup {
    /// Reads what has come since.
    pub fn learn(&mut self, history: &[u32]) {
        for (end, token) in (self.known + 1..).zip(&history[self.known..]) {
            let class = class(self.streak);
            self.at = match self.at.filter(|at| history[*at] == *token) {
                Some(at) => {
                    self.right[class] += 1.0;
                    self.streak += 1;
                    Some(at + 1)
                }
                None => {
                    self.wrong[class] += f64::from(u8::from(self.at.is_some()));
                    self.streak = 0;
                    None
                }
            };
            if let Some(tokens) = history[..end].last_chunk() {
                let before = self.followed.insert(*tokens, end);
                self.at = self.at.or(before);
            }
        }
        self.known = history.len();
    }

    /// The chances of up to `most` guesses, each where those before it are right.
    pub fn chances(&self, history: &[u32], most: usize) -> Vec<f64> {
        let known = self.at.map_or(0, |at| history.len() - at);
        let chance =
            |class: usize| (self.right[class] + SEEN * RIGHT[class]) / (self.right[class] + self.wrong[class] + SEEN);
        (self.streak..).take(known.min(most)).map(|streak| chance(class(streak))).collect()
    }

    /// So many guesses.
    pub fn guess<'a>(&self, history: &'a [u32], count: usize) -> &'a [u32] {
        self.at.and_then(|at| history.get(at..at + count)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(history: &[u32]) -> Lookup {
        let mut lookup = Lookup::default();
        lookup.learn(history);
        lookup
    }

    #[test]
    fn what_came_before_is_guessed() {
        let history = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3];
        let lookup = after(&history);
        assert_eq!(lookup.guess(&history, 4), [4, 5, 6, 7]);
        assert_eq!(lookup.chances(&history, 4).len(), 4);
        assert!(after(&history[..10]).chances(&history[..10], 4).is_empty());
        // What is not there yet cannot be guessed.
        let repeated = [1, 1, 1, 1, 1];
        assert_eq!(after(&repeated).chances(&repeated, 4).len(), 1);
        assert_eq!(after(&repeated).guess(&repeated, 1), [1]);
    }

    #[test]
    fn it_makes_no_difference_when_tokens_are_read() {
        let history: Vec<u32> = (0..200).map(|i| i * i % 23).collect();
        let mut lookup = Lookup::default();
        (0..=history.len()).for_each(|end| lookup.learn(&history[..end]));
        let at_once = after(&history);
        assert_eq!((lookup.at, lookup.streak, lookup.right), (at_once.at, at_once.streak, at_once.right));
    }

    #[test]
    fn chances_follow_what_happened() {
        let copied: Vec<u32> = (0..120).map(|i| i % 40).collect();
        let sure = after(&copied).chances(&copied, 4);
        assert!(sure.iter().all(|chance| *chance > 0.98), "{sure:?}");
        // The same three tokens, always followed by others.
        let broken: Vec<u32> = (0..120).map(|i| if i % 4 == 3 { 100 + i } else { i % 4 }).collect();
        let mut broken = broken;
        broken.truncate(119);
        let chance = after(&broken).chances(&broken, 1)[0];
        assert!(chance < 0.05, "{chance}");
    }
}
