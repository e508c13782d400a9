//! Figures of a batch, from its start.

use std::time::Duration;

/// How often values were at most so large.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Upper bounds, ascending.
    pub bounds: &'static [f64],
    /// Values in each, not those below; one more for what is larger than all.
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    pub(super) fn add(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }

    pub(super) fn add_time(&mut self, time: Duration) {
        self.add(time.as_secs_f64());
    }

    /// Values.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their mean; 0 where there are none.
    pub fn mean(&self) -> f64 {
        self.sum / self.count().max(1) as f64
    }
}

const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// Figures of a batch, from its start; the first seven are of now.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Requests, and preempted answers, that wait.
    pub waiting: usize,
    /// Answers on their way.
    pub running: usize,
    /// Cache blocks in use, of the group of layers that has fewest free; those kept for later prompts are.
    pub blocks_taken: usize,
    /// Cache blocks of a group.
    pub blocks_total: usize,
    /// Cache blocks of a draft model in use.
    pub draft_blocks_taken: usize,
    /// Cache blocks of a draft model.
    pub draft_blocks_total: usize,
    /// Pieces of prompts kept for later.
    pub prefixes: usize,
    /// Steps.
    pub steps: u64,
    /// Steps of a draft model.
    pub draft_steps: u64,
    /// Requests taken in.
    pub requests: u64,
    /// Requests that nobody listened to any more.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Of those, what other requests had computed.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Answers that lost their cache blocks to others and were computed again.
    pub preempted: u64,
    /// Pieces of prompts let go.
    pub evicted: u64,
    /// Tokens guessed.
    pub drafted: u64,
    /// Of those, what the model said too.
    pub accepted: u64,
    /// Sequences of a step.
    pub step_sequences: Histogram,
    /// Tokens of a step.
    pub step_tokens: Histogram,
    /// Seconds of a step.
    pub step_seconds: Histogram,
    /// Seconds from a request's arrival to its first token.
    pub first_token_seconds: Histogram,
    /// Seconds from one token of an answer to the next.
    pub next_token_seconds: Histogram,
    /// Seconds from a request's arrival to its end.
    pub request_seconds: Histogram,
}

impl Stats {
    pub(super) fn new() -> Stats {
        let [sizes, seconds] = [SIZES, SECONDS].map(Histogram::new);
        Stats {
            waiting: 0,
            running: 0,
            blocks_taken: 0,
            blocks_total: 0,
            draft_blocks_taken: 0,
            draft_blocks_total: 0,
            prefixes: 0,
            steps: 0,
            draft_steps: 0,
            requests: 0,
            cancelled: 0,
            failed: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
            preempted: 0,
            evicted: 0,
            drafted: 0,
            accepted: 0,
            step_sequences: sizes.clone(),
            step_tokens: sizes,
            step_seconds: seconds.clone(),
            first_token_seconds: seconds.clone(),
            next_token_seconds: seconds.clone(),
            request_seconds: seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_at_or_below_their_bound() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 9.0].into_iter().for_each(|x| histogram.add(x));
        assert_eq!((&histogram.counts[..], histogram.count(), histogram.mean()), (&[2, 1, 1][..], 4, 3.0));
    }
}
