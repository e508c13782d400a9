//! Logits -> one token.
//!
//! In this order: the repetition penalty, the temperature, then what may be drawn at all - the `top_k` likeliest, of them
//! those at least `min_p` times as likely as the likeliest, of them the fewest that reach the mass `top_p` - and a draw.
//! At temperature 0 the likeliest token is taken (ties: the lowest id). Same seed, same logits, same tokens.

use crate::step::Logits;
use mansard_ir::{Error, Kind, Result, bail};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: usize,
    /// Mass kept; 1 keeps all.
    pub top_p: f32,
    /// Least probability kept, as a share of the likeliest's; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Tokens that count as recent.
    pub repetition_window: usize,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> SamplerOptions {
        SamplerOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Always the likeliest token.
    pub fn greedy() -> SamplerOptions {
        SamplerOptions { temperature: 0.0, ..SamplerOptions::default() }
    }

    /// The logits that these options look at: a penalty may leave any token the likeliest.
    pub fn logits(&self) -> Logits {
        match *self {
            SamplerOptions { repetition_penalty, .. } if repetition_penalty != 1.0 => Logits::All,
            SamplerOptions { temperature: 0.0, .. } => Logits::Largest(1),
            SamplerOptions { top_k: 1.., .. } => Logits::Largest(self.top_k),
            _ => Logits::All,
        }
    }
}

/// Options, the state of the random numbers, and scratch memory.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    state: u64,
    candidates: Vec<Candidate>,
}

/// A token that may be drawn. After the softmax `score` is its share of the likeliest's probability.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f32,
    token: u32,
}

impl Sampler {
    /// A sampler at the start of its seed.
    ///
    /// # Errors
    /// Where an option is out of its range.
    pub fn new(options: SamplerOptions) -> Result<Sampler> {
        let SamplerOptions { temperature, top_p, min_p, repetition_penalty, .. } = options;
        let ranges = [
            ("temperature of 0 or more", temperature, temperature >= 0.0),
            ("top-p above 0 and up to 1", top_p, top_p > 0.0 && top_p <= 1.0),
            ("min-p of 0 to 1", min_p, (0.0..=1.0).contains(&min_p)),
            ("repetition penalty above 0", repetition_penalty, repetition_penalty > 0.0),
        ];
        for (expected, found, legal) in ranges {
            if !legal || !found.is_finite() {
                bail!(Usage, "expected a {expected}, found {found}");
            }
        }
        Ok(Sampler { options, state: options.seed, candidates: vec![] })
    }

    /// Chooses the token after `history`, whose logits are `logits[vocab]`.
    ///
    /// # Errors
    /// Where no logit is a number.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        let o = self.options;
        if o.temperature == 0.0 && o.repetition_penalty == 1.0 {
            return likeliest(logits).ok_or_else(|| no_numbers(logits));
        }
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(i, x)| Candidate { score: *x, token: i as u32 }));
        if o.repetition_penalty != 1.0 {
            self.penalize(&history[history.len().saturating_sub(o.repetition_window)..]);
        }
        self.candidates.retain(|c| !c.score.is_nan());
        // Of equals the first: ids ascend.
        let best = self.candidates.iter().copied().reduce(|a, b| if b.score > a.score { b } else { a });
        let best = best.filter(|b| b.score.is_finite()).ok_or_else(|| no_numbers(logits))?;
        if o.temperature == 0.0 {
            return Ok(best.token);
        }
        self.keep(best.score);
        Ok(self.draw())
    }

    fn penalize(&mut self, recent: &[u32]) {
        let mut recent = recent.to_vec();
        recent.sort_unstable();
        recent.dedup();
        for token in recent {
            if let Some(c) = self.candidates.get_mut(token as usize) {
                let penalty = self.options.repetition_penalty;
                c.score = if c.score > 0.0 { c.score / penalty } else { c.score * penalty };
            }
        }
    }

    /// Leaves the candidates that may be drawn, likeliest first, with `score` their probability over the best's.
    fn keep(&mut self, best: f32) {
        let o = self.options;
        let likeliest_first = |a: &Candidate, b: &Candidate| b.score.total_cmp(&a.score).then(a.token.cmp(&b.token));
        if o.top_k > 0 && o.top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(o.top_k - 1, likeliest_first);
            self.candidates.truncate(o.top_k);
        }
        for c in &mut self.candidates {
            c.score = ((c.score - best) / o.temperature).exp();
        }
        self.candidates.retain(|c| c.score > 0.0 && c.score >= o.min_p);
        self.candidates.sort_unstable_by(likeliest_first);
        if o.top_p < 1.0 {
            let goal = self.total() * f64::from(o.top_p);
            let (mut count, mut mass) = (0, 0.0);
            while mass < goal && count < self.candidates.len() {
                mass += f64::from(self.candidates[count].score);
                count += 1;
            }
            self.candidates.truncate(count);
        }
    }

    fn draw(&mut self) -> u32 {
        let mut at = self.uniform() * self.total();
        for c in &self.candidates {
            at -= f64::from(c.score);
            if at < 0.0 {
                return c.token;
            }
        }
        // Rounding may leave a trace of mass after the last; the likeliest comes first and is always there.
        self.candidates[0].token
    }

    fn total(&self) -> f64 {
        self.candidates.iter().map(|c| f64::from(c.score)).sum()
    }

    /// The next number of SplitMix64, in 0..1.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn no_numbers(logits: &[f32]) -> Error {
    Error::new(Kind::Internal, format!("expected {} logits that are numbers, found none", logits.len()))
}

/// The first of the largest, where that is a number. Without copies: a large vocabulary takes a share of a small model's step.
fn likeliest(logits: &[f32]) -> Option<u32> {
    let mut most = [f32::NEG_INFINITY; 64];
    for chunk in logits.chunks(most.len()) {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = if *x > *most { *x } else { *most };
        }
    }
    let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let index = logits.iter().position(|x| *x == most)?;
    most.is_finite().then_some(index as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: SamplerOptions = SamplerOptions {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        repetition_window: 64,
        seed: 7,
    };

    fn shares(options: SamplerOptions, logits: &[f32], history: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..100_000 {
            counts[sampler.sample(logits, history).unwrap() as usize] += 1e-5;
        }
        counts
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.006), "{found:?} {expected:?}");
    }

    fn logs(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = logs(&[0.1, 0.6, 0.3]);
        close(&shares(ALL, &logits, &[]), &[0.1, 0.6, 0.3]);
        let flat = 0.1f64.sqrt() + 0.6f64.sqrt() + 0.3f64.sqrt();
        let expected = [0.1f64, 0.6, 0.3].map(|p| p.sqrt() / flat);
        close(&shares(SamplerOptions { temperature: 2.0, ..ALL }, &logits, &[]), &expected);
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits = logs(&[0.1, 0.5, 0.25, 0.15]);
        close(&shares(SamplerOptions { top_k: 2, ..ALL }, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
        close(&shares(SamplerOptions { top_p: 0.7, ..ALL }, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
        close(&shares(SamplerOptions { top_p: 0.01, ..ALL }, &logits, &[]), &[0.0, 1.0, 0.0, 0.0]);
        close(&shares(SamplerOptions { min_p: 0.4, ..ALL }, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
        close(&shares(SamplerOptions { min_p: 1.0, ..ALL }, &logits, &[]), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn the_penalty_reaches_recent_tokens_only() {
        let options = SamplerOptions { repetition_penalty: 2.0, repetition_window: 2, temperature: 0.0, ..ALL };
        let mut sampler = Sampler::new(options).unwrap();
        assert_eq!(sampler.sample(&[4.0, 3.0, -1.0], &[0, 0]).unwrap(), 1);
        assert_eq!(sampler.sample(&[4.0, 3.0, -1.0], &[0, 2, 2]).unwrap(), 0);
        assert_eq!(sampler.sample(&[-4.0, -3.0, -2.0], &[2, 1]).unwrap(), 0);
        assert_eq!(sampler.sample(&[-4.0, -3.0], &[900]).unwrap(), 1);
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_skips_nan() {
        let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
        assert_eq!(sampler.sample(&[f32::NAN, 1.0, 3.0, 3.0], &[]).unwrap(), 2);
        assert!(sampler.sample(&[f32::NAN; 3], &[]).is_err());
        assert!(sampler.sample(&[], &[]).is_err());
    }

    #[test]
    fn options_say_which_logits_they_look_at() {
        assert_eq!(SamplerOptions::greedy().logits(), Logits::Largest(1));
        assert_eq!(SamplerOptions { top_k: 7, ..ALL }.logits(), Logits::Largest(7));
        assert_eq!(ALL.logits(), Logits::All);
        assert_eq!(SamplerOptions { repetition_penalty: 1.1, ..SamplerOptions::greedy() }.logits(), Logits::All);
    }

    #[test]
    fn seeds_repeat() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(SamplerOptions { seed, ..ALL }).unwrap();
            (0..50).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<u32>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for options in [
            SamplerOptions { temperature: -1.0, ..ALL },
            SamplerOptions { temperature: f32::NAN, ..ALL },
            SamplerOptions { top_p: 0.0, ..ALL },
            SamplerOptions { min_p: 1.5, ..ALL },
            SamplerOptions { repetition_penalty: 0.0, ..ALL },
        ] {
            assert_eq!(Sampler::new(options).unwrap_err().exit_code(), 2);
        }
    }
}
