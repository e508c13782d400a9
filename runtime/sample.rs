//! Logits -> one token.
//!
//! In this order: biases, penalties, what a [`Constraint`] allows; the temperature; then what may be drawn at all - the
//! `top_k` likeliest, of them the most `typical` up to that mass, of them those at least `min_p` times as likely as the
//! likeliest, of them the fewest that reach the mass `top_p` - and a draw. At temperature 0 the likeliest token is taken
//! (ties: the lowest id). Every token takes one random number, so the same seed and the same logits give the same tokens,
//! whatever else is in a step.

use crate::step::Logits;
use mansard_ir::{Result, bail};
use std::cell::Cell;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: usize,
    /// Mass kept; 1 keeps all.
    pub top_p: f32,
    /// Least probability kept, as a share of the likeliest's; 0 keeps all.
    pub min_p: f32,
    /// Mass kept of the tokens whose surprise is nearest to the expected (Meister et al., 2022); 1 keeps all.
    pub typical: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Tokens that count as recent, the prompt's included.
    pub repetition_window: usize,
    /// Taken off a token's logit for each time it was generated.
    pub frequency_penalty: f32,
    /// Taken off a token's logit if it was generated at all.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> SamplerOptions {
        SamplerOptions { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, ..SamplerOptions::plain() }
    }
}

impl SamplerOptions {
    /// The model's own distribution: temperature 1, nothing left out.
    pub const fn plain() -> SamplerOptions {
        SamplerOptions {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical: 1.0,
            repetition_penalty: 1.0,
            repetition_window: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: vec![],
            seed: 0,
        }
    }

    /// Always the likeliest token.
    pub fn greedy() -> SamplerOptions {
        SamplerOptions { temperature: 0.0, ..SamplerOptions::default() }
    }

    /// The logits that these options look at: a penalty or a bias may leave any token the likeliest.
    pub fn logits(&self) -> Logits {
        match *self {
            _ if self.adjusts() => Logits::All,
            SamplerOptions { temperature: 0.0, .. } => Logits::Largest(1),
            SamplerOptions { top_k: 1.., .. } => Logits::Largest(self.top_k),
            _ => Logits::All,
        }
    }

    /// Every token may be drawn.
    fn keeps_all(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0 && self.typical >= 1.0
    }

    /// Logits are changed before anything is chosen.
    pub(crate) fn adjusts(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
            || !self.logit_bias.is_empty()
    }

    fn check(&self) -> Result<()> {
        let SamplerOptions { temperature, top_p, min_p, typical, repetition_penalty, .. } = *self;
        let ranges = [
            ("temperature of 0 or more", temperature, temperature >= 0.0),
            ("top-p above 0 and up to 1", top_p, top_p > 0.0 && top_p <= 1.0),
            ("min-p of 0 to 1", min_p, (0.0..=1.0).contains(&min_p)),
            ("typical mass above 0 and up to 1", typical, typical > 0.0 && typical <= 1.0),
            ("repetition penalty above 0", repetition_penalty, repetition_penalty > 0.0),
            ("frequency penalty that is a number", self.frequency_penalty, true),
            ("presence penalty that is a number", self.presence_penalty, true),
        ];
        let biases = self.logit_bias.iter().map(|(_, bias)| ("logit bias that is a number", *bias, true));
        for (expected, found, legal) in ranges.into_iter().chain(biases) {
            if !legal || !found.is_finite() {
                bail!(Usage, "expected a {expected}, found {found}");
            }
        }
        Ok(())
    }
}

/// What came before a token.
#[derive(Clone, Copy, Debug, Default)]
pub struct Before<'a> {
    /// Prompt, then what was generated.
    pub history: &'a [u32],
    /// Tokens of the prompt.
    pub prompt: usize,
}

/// Says which tokens may come next, as a grammar does.
pub trait Constraint: Send {
    /// Bit `i % 32` of word `i / 32` is set where token `i` may come next; no more words than needed for the last.
    ///
    /// # Errors
    /// Where nothing may.
    fn allowed(&mut self) -> Result<&[u32]>;

    /// The token that did.
    ///
    /// # Errors
    /// Where it was not allowed.
    fn accept(&mut self, token: u32) -> Result<()>;

    /// Another at the same place.
    fn fork(&self) -> Box<dyn Constraint>;
}

/// Options, the state of the random numbers, and scratch memory.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    state: u64,
    /// Logits as changed by biases, penalties and a constraint.
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// A token that may be drawn. After the softmax `score` is its share of the likeliest's probability.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f32,
    token: u32,
}

thread_local! {
    /// Memory for a vocabulary's candidates, which all samplers of a thread use in turn: it stays in a cache.
    static CANDIDATES: Cell<Vec<Candidate>> = const { Cell::new(vec![]) };
}

fn likeliest_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.score.total_cmp(&a.score).then(a.token.cmp(&b.token))
}

impl Sampler {
    /// A sampler at the start of its seed.
    ///
    /// # Errors
    /// Where an option is out of its range.
    pub fn new(options: SamplerOptions) -> Result<Sampler> {
        options.check()?;
        Ok(Sampler { state: options.seed, options, adjusted: vec![], candidates: vec![] })
    }

    /// Its options.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Another one, whose next random numbers are this one's next.
    pub(crate) fn ahead(&self) -> Sampler {
        Sampler { options: self.options.clone(), state: self.state, adjusted: vec![], candidates: vec![] }
    }

    /// Chooses the token after `before`, whose logits are `logits[vocab]`, among those that `allowed` has a bit for.
    ///
    /// # Errors
    /// Where no logit is a number, or nothing is allowed.
    pub fn sample(&mut self, logits: &[f32], before: Before<'_>, allowed: Option<&[u32]>) -> Result<u32> {
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let scores = match self.options.adjusts() || allowed.is_some() {
            true => {
                self.adjust(&mut adjusted, logits, before, allowed);
                &adjusted[..]
            }
            false => logits,
        };
        let chosen = self.choose(scores);
        self.adjusted = adjusted;
        chosen
    }

    fn choose(&mut self, scores: &[f32]) -> Result<u32> {
        // Also where nothing is drawn, so that a token's number is that of its place.
        let uniform = self.uniform();
        let Some(best) = likeliest(scores) else {
            bail!(Internal, "expected {} logits that are numbers, found none", scores.len());
        };
        if self.options.temperature == 0.0 {
            return Ok(best);
        }
        if self.options.keeps_all() {
            return Ok(self.draw_of_all(scores, best, uniform));
        }
        self.candidates = CANDIDATES.take();
        self.gather(scores);
        self.keep(scores[best as usize]);
        let token = self.draw(uniform);
        CANDIDATES.set(std::mem::take(&mut self.candidates));
        Ok(token)
    }

    /// Biases, penalties, and what is not allowed at minus infinity.
    fn adjust(&self, out: &mut Vec<f32>, logits: &[f32], before: Before<'_>, allowed: Option<&[u32]>) {
        let o = &self.options;
        out.clear();
        out.extend_from_slice(logits);
        for (token, bias) in &o.logit_bias {
            out.get_mut(*token as usize).into_iter().for_each(|x| *x += bias);
        }
        let history = before.history;
        if o.repetition_penalty != 1.0 {
            let penalize = |x: f32| if x > 0.0 { x / o.repetition_penalty } else { x * o.repetition_penalty };
            for (token, _) in counts(&history[history.len().saturating_sub(o.repetition_window)..]) {
                out.get_mut(token as usize).into_iter().for_each(|x| *x = penalize(*x));
            }
        }
        if o.frequency_penalty != 0.0 || o.presence_penalty != 0.0 {
            for (token, count) in counts(&history[before.prompt.min(history.len())..]) {
                let penalty = o.frequency_penalty * count as f32 + o.presence_penalty;
                out.get_mut(token as usize).into_iter().for_each(|x| *x -= penalty);
            }
        }
        if let Some(allowed) = allowed {
            let bit = |i: usize| allowed.get(i / 32).is_some_and(|word| word >> (i % 32) & 1 == 1);
            out.iter_mut().enumerate().filter(|(i, _)| !bit(*i)).for_each(|(_, x)| *x = f32::NEG_INFINITY);
        }
    }

    /// The `top_k` likeliest, in any order. A large vocabulary is read once, 64 logits at a time, of which few pass.
    fn gather(&mut self, scores: &[f32]) {
        let candidates = &mut self.candidates;
        candidates.clear();
        let most = self.options.top_k;
        if most == 0 {
            let number = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
            candidates.extend(scores.iter().zip(0..).map(|(x, token)| Candidate { score: number(*x), token }));
            return;
        }
        let full = most.saturating_mul(2).max(256);
        // What is as good as the last that is kept, but has a higher id, is not.
        let mut least = f32::NEG_INFINITY;
        for (chunk, first) in scores.chunks(64).zip((0..).step_by(64)) {
            if !chunk.iter().fold(false, |any, x| any | (*x > least)) {
                continue;
            }
            let tokens = chunk.iter().zip(first..).filter(|(x, _)| **x > least);
            candidates.extend(tokens.map(|(x, token)| Candidate { score: *x, token }));
            if candidates.len() > full {
                least = shorten(candidates, most);
            }
        }
        shorten(candidates, most);
    }

    /// Leaves the candidates that may be drawn, with `score` their probability over the best's.
    fn keep(&mut self, best: f32) {
        let SamplerOptions { temperature, min_p, top_p, typical, .. } = self.options;
        for c in &mut self.candidates {
            c.score = exp((c.score - best) / temperature);
        }
        if typical < 1.0 {
            self.candidates.retain(|c| c.score > 0.0);
            self.keep_typical(f64::from(typical));
        }
        if min_p > 0.0 {
            let least = min_p * self.candidates.iter().map(|c| c.score).fold(0.0, f32::max);
            self.candidates.retain(|c| c.score >= least);
        }
        if top_p < 1.0 {
            self.keep_likeliest(f64::from(top_p));
        }
    }

    /// The fewest that reach the mass.
    fn keep_likeliest(&mut self, share: f64) {
        let goal = self.total() * share;
        // Most often they are among those not much less likely than the likeliest: only these need an order then.
        for least in [1e-2, 1e-3, 1e-4, 1e-5] {
            let scores = self.candidates.iter().map(|c| if c.score >= least { f64::from(c.score) } else { 0.0 });
            if scores.sum::<f64>() >= goal {
                self.candidates.retain(|c| c.score >= least);
                break;
            }
        }
        self.candidates.sort_unstable_by(likeliest_first);
        self.keep_mass(goal);
    }

    /// Orders by how far a token's surprise is from the entropy, and keeps that mass.
    fn keep_typical(&mut self, mass: f64) {
        let total = self.total();
        let surprise = |c: &Candidate| -(f64::from(c.score) / total).ln();
        let entropy: f64 = self.candidates.iter().map(|c| f64::from(c.score) / total * surprise(c)).sum();
        let off = |c: &Candidate| (surprise(c) - entropy).abs();
        self.candidates.sort_unstable_by(|a, b| off(a).total_cmp(&off(b)).then(a.token.cmp(&b.token)));
        self.keep_mass(total * mass);
    }

    /// The first that reach the goal.
    fn keep_mass(&mut self, goal: f64) {
        let (mut count, mut mass) = (0, 0.0);
        while mass < goal && count < self.candidates.len() {
            mass += f64::from(self.candidates[count].score);
            count += 1;
        }
        self.candidates.truncate(count);
    }

    /// Draws from a whole vocabulary, of which only sums over 64 tokens each are kept.
    fn draw_of_all(&self, scores: &[f32], best: u32, uniform: f64) -> u32 {
        let (most, temperature) = (scores[best as usize], self.options.temperature);
        let mass = |x: f32| exp(if x.is_nan() { f32::NEG_INFINITY } else { (x - most) / temperature });
        // Sixteen sums, so that additions need not wait for one another.
        let sum = |chunk: &[f32]| {
            let mut sums = [0f32; 16];
            for part in chunk.chunks(16) {
                sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += mass(*x));
            }
            f64::from(sums.iter().sum::<f32>())
        };
        let sums: Vec<f64> = scores.chunks(64).map(sum).collect();
        let mut at = uniform * sums.iter().sum::<f64>();
        let chunk = sums.iter().position(|sum| {
            let here = at < *sum;
            at -= if here { 0.0 } else { *sum };
            here
        });
        let first = chunk.map_or(scores.len(), |chunk| 64 * chunk);
        let mut tokens = scores.iter().zip(0u32..).skip(first).take(64);
        let drawn = tokens.find(|(x, _)| {
            at -= f64::from(mass(**x));
            at < 0.0
        });
        // Rounding may leave a trace of mass after the last; the likeliest is always there.
        drawn.map_or(best, |(_, token)| token)
    }

    fn draw(&self, uniform: f64) -> u32 {
        let mut at = uniform * self.total();
        for c in &self.candidates {
            at -= f64::from(c.score);
            if at < 0.0 {
                return c.token;
            }
        }
        // Rounding may leave a trace of mass after the last; the likeliest is always there.
        let likeliest = self.candidates.iter().copied().reduce(|a, b| if b.score > a.score { b } else { a });
        likeliest.map_or(0, |c| c.token)
    }

    fn total(&self) -> f64 {
        // Eight sums, so that additions need not wait for one another.
        let (chunks, rest) = self.candidates.as_chunks::<8>();
        let mut sums = [0.0; 8];
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, c)| *sum += f64::from(c.score));
        }
        sums.iter().sum::<f64>() + rest.iter().map(|c| f64::from(c.score)).sum::<f64>()
    }

    /// The next number of SplitMix64, in 0..1.
    fn uniform(&mut self) -> f64 {
        (next(&mut self.state) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The seed of a request's choice: its own for the first, and far from the others' for the rest.
pub fn seed_of_choice(seed: u64, choice: usize) -> u64 {
    let mut state = seed ^ (choice as u64).wrapping_mul(0xd134_2543_de82_ef95);
    if choice == 0 { seed } else { next(&mut state) }
}

/// `e^x` for `x <= 0`, to within some 1e-7 of it, and 0 below -87; without a call, so that loops over a vocabulary are vectors.
fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with an integer n, which adding and taking away 1.5 * 2^23 rounds to.
    const ROUND: f32 = 12_582_912.0;
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let n = x.max(-100.0) * std::f32::consts::LOG2_E + ROUND - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    // Taylor's series; |r| is at most ln 2 / 2.
    let series = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let e = series.into_iter().fold(0.0, |sum, term| sum * r + term);
    let power = f32::from_bits(((n as i32 + 127).max(0) as u32) << 23);
    if x < -87.0 { 0.0 } else { e * power }
}

/// Keeps the `most` likeliest and gives the last one's score.
fn shorten(candidates: &mut Vec<Candidate>, most: usize) -> f32 {
    if most >= candidates.len() {
        return f32::NEG_INFINITY;
    }
    let (_, last, _) = candidates.select_nth_unstable_by(most - 1, likeliest_first);
    let least = last.score;
    candidates.truncate(most);
    least
}

/// Different tokens, and how often each occurs.
fn counts(tokens: &[u32]) -> Vec<(u32, usize)> {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    sorted.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

/// The first of the largest, where that is a number. Without copies: a large vocabulary takes a share of a small model's step.
pub(crate) fn likeliest(logits: &[f32]) -> Option<u32> {
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
#[path = "sample_tests.rs"]
mod tests;
