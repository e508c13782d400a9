//! What steps take by their number of tokens -> how many guesses are worth their time.

use std::collections::BTreeMap;
use std::time::Duration;

/// Guesses are made where tokens then come so much faster, or more: what is measured is never quite what comes.
const WORTH: f64 = 1.05;

/// Seconds of decoding steps by their number of tokens.
#[derive(Clone, Debug, Default)]
pub(in crate::batch) struct Pace(BTreeMap<usize, f64>);

impl Pace {
    /// A step took that long.
    pub fn learn(&mut self, tokens: usize, time: Duration) {
        let time = time.as_secs_f64();
        let seconds = self.0.entry(tokens).or_insert(time);
        // A step that was interrupted says little: at most half as long again.
        *seconds = 0.9 * *seconds + 0.1 * time.min(1.5 * *seconds);
    }

    /// A step took that long; the shortest counts.
    pub fn at_best(&mut self, tokens: usize, time: Duration) {
        let seconds = self.0.entry(tokens).or_insert(f64::INFINITY);
        *seconds = seconds.min(time.as_secs_f64());
    }

    /// Seconds of a step of so many tokens: on the line between the nearest that were measured, or beyond them on that through
    /// the first and the last. Nothing where none was.
    pub fn seconds(&self, tokens: usize) -> f64 {
        let point = |(tokens, seconds): (&usize, &f64)| (*tokens as f64, *seconds);
        let (first, last) = (self.0.first_key_value().map(point), self.0.last_key_value().map(point));
        let (Some(first), Some(last)) = (first, last) else { return 0.0 };
        let below = self.0.range(..=tokens).next_back().map(point);
        let above = self.0.range(tokens..).next().map(point);
        let ((x0, y0), (x1, y1)) = match (below, above) {
            (Some(below), Some(above)) => (below, above),
            (Some(_), None) => (first, last),
            (None, _) => return first.1,
        };
        let slope = if x1 > x0 { ((y1 - y0) / (x1 - x0)).max(0.0) } else { 0.0 };
        let (x, y) = if above.is_none() { last } else { (x0, y0) };
        y + slope * (tokens as f64 - x)
    }
}

/// A step that is being made up: a token of each answer, and guesses.
pub(in crate::batch) struct Plan<'a> {
    pace: &'a Pace,
    /// Answers, and guesses that are expected to be right.
    pub come: f64,
    /// Tokens, and the most there may be.
    pub tokens: usize,
    pub most: usize,
    /// Guesses are made whether they pay or not.
    pub always: bool,
}

impl<'a> Plan<'a> {
    /// A step of so many answers.
    pub fn new(pace: &'a Pace, answers: usize, most: usize) -> Plan<'a> {
        Plan { pace, come: answers as f64, tokens: answers, most, always: false }
    }

    /// How much faster tokens come with so many tokens more in the step, of which `right` are expected to be right, where
    /// making them up takes `seconds`.
    pub fn gain(&self, more: usize, right: f64, seconds: f64) -> f64 {
        let [without, with] = [0, more].map(|more| self.pace.seconds(self.tokens + more));
        if self.tokens + more > self.most {
            return 0.0;
        }
        if self.always { 1.0 + more as f64 } else { (self.come + right) / self.come * without / (with + seconds) }
    }

    /// Adds as many guesses as pay best, and gives how many. `chances` are of each to be right, where those before it are.
    pub fn add(&mut self, chances: &[f64]) -> usize {
        let expected = chances.iter().scan((1.0, 0.0), |(all, sum), chance| {
            *all *= chance;
            *sum += *all;
            Some(*sum)
        });
        let gains = expected.zip(1..).map(|(right, more)| (self.gain(more, right, 0.0), more, right));
        let Some((gain, more, right)) = gains.max_by(|a, b| a.0.total_cmp(&b.0)) else { return 0 };
        if gain < WORTH {
            return 0;
        }
        self.come += right;
        self.tokens += more;
        more
    }

    /// How many guesses a draft model should make for each answer, up to `most`: each is right with the answer's chance where
    /// those before it are, and takes a step of `seconds`. 0 where none pay.
    pub fn length(&self, chances: &[f64], most: usize, seconds: f64) -> usize {
        let expected =
            |length: usize| chances.iter().map(|p| (1..=length as i32).map(|i| p.powi(i)).sum::<f64>()).sum();
        let gain = |length: usize| self.gain(length * chances.len(), expected(length), seconds * length as f64);
        let best = (1..=most).max_by(|a, b| gain(*a).total_cmp(&gain(*b)));
        best.filter(|length| gain(*length) >= WORTH).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(points: &[(usize, u64)]) -> Pace {
        let mut pace = Pace::default();
        points.iter().for_each(|(tokens, ms)| pace.learn(*tokens, Duration::from_millis(*ms)));
        pace
    }

    #[test]
    fn between_what_was_measured() {
        let pace = pace(&[(1, 10), (5, 18), (9, 18)]);
        let ms = [1, 3, 5, 7, 9, 13].map(|tokens| (pace.seconds(tokens) * 1e3).round());
        assert_eq!(ms, [10.0, 14.0, 18.0, 18.0, 18.0, 22.0]);
        assert_eq!(Pace::default().seconds(4), 0.0);
    }

    #[test]
    fn guesses_must_be_worth_their_time() {
        let pace = pace(&[(1, 10), (5, 14)]);
        let add = |answers, chances: &[f64]| Plan::new(&pace, answers, 32).add(chances);
        assert_eq!(add(1, &[0.9; 4]), 4);
        assert_eq!(add(1, &[0.1; 4]), 0, "a tenth of a token for a tenth of a step");
        assert_eq!(add(1, &[0.5, 0.05]), 1);
        assert_eq!(add(1, &[]), 0);
        assert_eq!(Plan::new(&pace, 1, 3).add(&[0.9; 4]), 2, "no more than a step holds");
    }

    #[test]
    fn a_draft_model_must_be_fast_and_right() {
        let pace = pace(&[(1, 10), (5, 14)]);
        let length = |chance, seconds| Plan::new(&pace, 1, 32).length(&[chance], 4, seconds);
        assert_eq!((length(0.95, 0.001), length(0.3, 0.001), length(1.0, 0.020)), (4, 1, 0));
        assert_eq!(Plan::new(&pace, 8, 32).length(&[0.9; 8], 4, 0.001), 3, "32 tokens");
    }
}
