//! A test of the matrix -> the ragged steps that run it.
//!
//! ```text
//! pp512 b2, limits of 512 tokens   [seq 0: 512]  [seq 1: 512]
//! pp128 b8                         [seq 0..3: 128 each]  [seq 4..7: 128 each]
//! tg64 b8 @ d2048                  64 times [seq 0..7: 1 token each]
//! ```
//!
//! Every sequence has a cache of its own, filled to the test's depth; the first shares what it does not write to with one
//! that is kept to start from again. A decoded token is the likeliest of the logits before
//! it, so a step's time holds what it takes to read every sequence's row; only the likeliest is asked for.

use crate::eval::DEFAULT_TEXT;
use mansard_ir::cost::Workload;
use mansard_ir::plan::Limits;
use mansard_ir::{Result, bail};
use mansard_runtime::{Before, Engine, Logits, Model, Rows, Sampler, SamplerOptions, SequenceId, Work};
use std::time::Instant;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `pp`: whole prompts, of each of which one row leaves.
    Prefill,
    /// `tg`: one token of every sequence at a time.
    Decode,
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// What is measured.
    pub kind: Kind,
    /// Tokens of each sequence.
    pub count: usize,
    /// Sequences.
    pub batch: usize,
    /// Tokens in each sequence's cache before.
    pub depth: usize,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Index of the sequence.
    pub sequence: usize,
    /// Tokens it has before.
    pub before: usize,
    /// New tokens.
    pub count: usize,
    /// Rows that leave the step.
    pub rows: Rows,
}

impl Test {
    /// As it is called in reports: `tg128 b8 @ d2048`.
    pub fn name(&self) -> String {
        let kind = if self.kind == Kind::Prefill { "pp" } else { "tg" };
        let batch = if self.batch > 1 { format!(" b{}", self.batch) } else { String::new() };
        let depth = if self.depth > 0 { format!(" @ d{}", self.depth) } else { String::new() };
        format!("{kind}{}{batch}{depth}", self.count)
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.count * self.batch
    }

    /// Tokens of one sequence, those before included.
    pub fn length(&self) -> usize {
        self.depth.saturating_add(self.count)
    }

    /// Refuses what a step or a sequence has no room for.
    ///
    /// # Errors
    /// Names the test and the limit.
    pub fn check(&self, limits: &Limits, encoder: bool) -> Result<()> {
        let (name, Test { count, depth, batch, .. }) = (self.name(), *self);
        if self.length() > limits.context {
            bail!(Usage, "{name}: {count} tokens after {depth} exceed the context of {}", limits.context);
        }
        if encoder && count > limits.tokens {
            bail!(Usage, "{name}: expected texts of at most {} tokens, which an encoder reads at once", limits.tokens);
        }
        let most = limits.sequences.min(limits.rows).min(limits.tokens);
        if self.kind == Kind::Decode && batch > most {
            bail!(Usage, "{name}: expected at most {most} sequences in a step, found {batch}");
        }
        Ok(())
    }

    /// As few steps as the limits allow; of an encoder each text is whole.
    pub fn steps(&self, limits: &Limits, encoder: bool) -> Vec<Vec<Part>> {
        if self.kind == Kind::Decode {
            let part = |sequence, i| Part { sequence, before: self.depth + i, count: 1, rows: Rows::Last };
            return (0..self.count).map(|i| (0..self.batch).map(|sequence| part(sequence, i)).collect()).collect();
        }
        let mut steps: Vec<Vec<Part>> = vec![];
        for sequence in 0..self.batch {
            let mut done = 0;
            while done < self.count {
                let least = if encoder { self.count } else { 1 };
                let room = match steps.last() {
                    Some(step) if step.len() < limits.sequences.min(limits.rows) => {
                        limits.tokens - step.iter().map(|part| part.count).sum::<usize>()
                    }
                    _ => 0,
                };
                if room < least {
                    steps.push(vec![]);
                    continue;
                }
                let count = room.min(self.count - done);
                let last = !encoder && done + count == self.count;
                let rows = if last { Rows::Last } else { Rows::None };
                let part = Part { sequence, before: self.depth + done, count, rows };
                steps.last_mut().into_iter().for_each(|step| step.push(part));
                done += count;
            }
        }
        steps
    }
}

/// What a step asks of a roofline. A token sees those before it and itself; of an encoder, the whole text.
pub fn workload(step: &[Part], encoder: bool) -> Workload {
    let tokens: usize = step.iter().map(|part| part.count).sum();
    let seen = |part: &Part| match encoder {
        true => part.count as f64,
        false => part.before as f64 + (part.count + 1) as f64 / 2.0,
    };
    let rows: usize = step.iter().map(|part| part.rows.of(part.count)).sum();
    Workload {
        tokens: tokens as f64,
        sequences: step.len() as f64,
        rows: rows as f64,
        candidates: Logits::largest(1, rows).candidates(rows),
        context: step.iter().map(|part| seen(part) * part.count as f64).sum::<f64>() / tokens as f64,
    }
}

/// An engine, and sequences of one depth that tests share.
pub struct Runner {
    /// Runs the steps.
    pub engine: Engine,
    prompts: Prompts,
    sampler: Sampler,
    /// A sequence of some depth that no test goes on with.
    start: Option<(usize, SequenceId)>,
    sequences: Vec<SequenceId>,
}

impl Runner {
    /// Without sequences yet, for an engine of that model.
    ///
    /// # Errors
    /// Where the model's tokenizer is damaged.
    pub fn new(engine: Engine, model: &Model) -> Result<Runner> {
        let (prompts, sampler) = (Prompts::of(model)?, Sampler::new(SamplerOptions::greedy())?);
        Ok(Runner { engine, prompts, sampler, start: None, sequences: vec![] })
    }

    /// Sequences of the test's depth: cut back to it, or made anew where they no longer keep what is needed for that.
    fn ready(&mut self, test: &Test) -> Result<()> {
        let start = self.start_at(test.depth)?;
        let engine = &mut self.engine;
        for sequence in self.sequences.split_off(test.batch.min(self.sequences.len())) {
            engine.release(sequence)?;
        }
        for (index, sequence) in self.sequences.iter_mut().enumerate() {
            if test.depth == 0 || engine.shortest(*sequence)? <= test.depth {
                engine.truncate(*sequence, test.depth)?;
            } else {
                engine.release(*sequence)?;
                *sequence = if index == 0 { engine.fork(start)? } else { engine.duplicate(start)? };
            }
        }
        while self.sequences.len() < test.batch {
            let next = if self.sequences.is_empty() { engine.fork(start)? } else { engine.duplicate(start)? };
            self.sequences.push(next);
        }
        Ok(())
    }

    /// The sequence to start from, filled to that depth.
    fn start_at(&mut self, depth: usize) -> Result<SequenceId> {
        let engine = &mut self.engine;
        if let Some((found, start)) = self.start {
            if found == depth {
                return Ok(start);
            }
            self.sequences.drain(..).try_for_each(|sequence| engine.release(sequence))?;
            engine.release(start)?;
        }
        let start = engine.new_sequence();
        self.start = Some((depth, start));
        if depth > 0 {
            engine.prefill(start, &self.prompts.tokens(0, depth))?;
        }
        Ok(start)
    }

    /// Runs a test's steps once and gives the seconds they took together; `after` hears of each step when it is done.
    ///
    /// # Errors
    /// Where the cache has no room, or `after` fails.
    pub fn run(
        &mut self,
        test: &Test,
        steps: &[Vec<Part>],
        mut after: impl FnMut(&Engine, &[Part]) -> Result<()>,
    ) -> Result<f64> {
        self.ready(test)?;
        let mut tokens: Vec<Vec<u32>> = (1..=test.batch).map(|seed| self.prompts.tokens(seed, test.count)).collect();
        let start = Instant::now();
        for step in steps {
            let work = step.iter().map(|part| {
                let first = part.before - test.depth;
                let tokens = &tokens[part.sequence][first..first + part.count];
                Work { sequence: self.sequences[part.sequence], tokens, rows: part.rows }
            });
            // A greedy sampler looks at the largest.
            let rows = step.iter().map(|part| part.rows.of(part.count)).sum();
            let output = self.engine.step_for(&work.collect::<Vec<_>>(), Logits::largest(1, rows))?;
            if test.kind == Kind::Decode {
                for (row, part) in step.iter().enumerate() {
                    let next = self.sampler.sample(output.logits(row)?, Before::default(), None)?;
                    let place = tokens[part.sequence].get_mut(part.before - test.depth + 1);
                    place.into_iter().for_each(|place| *place = next);
                }
            }
            after(&self.engine, step)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// What sequences begin with, the same in every run: how much of a vocabulary is rescored, and which experts are asked, depends on
/// what is read.
struct Prompts {
    /// Of the evaluation's text; empty where the model has no tokenizer.
    text: Vec<u32>,
    vocab: usize,
}

impl Prompts {
    fn of(model: &Model) -> Result<Prompts> {
        let info = model.info();
        let known = info.tokenizer.is_some();
        let text = if known { model.tokens()?.encode(DEFAULT_TEXT, false)? } else { vec![] };
        Ok(Prompts { text, vocab: info.vocab })
    }

    /// Some of the text, from a place of its own for each seed; tokens of no meaning where there is none.
    fn tokens(&self, seed: usize, count: usize) -> Vec<u32> {
        if !self.text.is_empty() {
            let first = seed.wrapping_mul(APART) % self.text.len();
            return self.text.iter().cycle().skip(first).take(count).copied().collect();
        }
        let first = (seed as u64) << 32;
        let number = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % self.vocab as u32;
        (first..first + count as u64).map(number).collect()
    }
}

/// Tokens of the text between the beginnings of two sequences.
const APART: usize = 257;

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { tokens: 512, rows: 128, sequences: 64, context: 2048, tile: 4 };

    fn test(kind: Kind, count: usize, batch: usize, depth: usize) -> Test {
        Test { kind, count, batch, depth }
    }

    #[test]
    fn names_say_what_differs() {
        assert_eq!(test(Kind::Prefill, 512, 1, 0).name(), "pp512");
        assert_eq!(test(Kind::Decode, 128, 8, 2048).name(), "tg128 b8 @ d2048");
    }

    #[test]
    fn prompts_fill_steps_and_encoders_read_whole_texts() {
        let shape = |test: Test, encoder| -> Vec<Vec<(usize, usize)>> {
            let steps = test.steps(&LIMITS, encoder);
            steps.iter().map(|step| step.iter().map(|p| (p.sequence, p.count)).collect()).collect()
        };
        let prompts = test(Kind::Prefill, 300, 3, 0);
        assert_eq!(shape(prompts, false), [vec![(0, 300), (1, 212)], vec![(1, 88), (2, 300)]]);
        assert_eq!(shape(prompts, true), [vec![(0, 300)], vec![(1, 300)], vec![(2, 300)]]);
        assert_eq!(shape(test(Kind::Prefill, 2, 70, 0), true).iter().map(Vec::len).collect::<Vec<_>>(), [64, 6]);
        let rows: Vec<usize> = prompts.steps(&LIMITS, false).iter().map(|s| workload(s, false).rows as usize).collect();
        assert_eq!(rows, [1, 2]);
        assert_eq!(shape(test(Kind::Decode, 2, 3, 9), false), [[(0, 1), (1, 1), (2, 1)]; 2]);
    }

    #[test]
    fn a_token_sees_what_is_before_it_and_itself() {
        let deep = test(Kind::Decode, 4, 2, 100).steps(&LIMITS, false);
        let context: Vec<f64> = deep.iter().map(|step| workload(step, false).context).collect();
        assert_eq!(context, [101.0, 102.0, 103.0, 104.0]);
        assert_eq!(workload(&test(Kind::Prefill, 3, 1, 10).steps(&LIMITS, false)[0], false).context, 12.0);
        assert_eq!(workload(&test(Kind::Prefill, 3, 2, 0).steps(&LIMITS, true)[0], true).context, 3.0);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let says = |test: Test, encoder, word: &str| {
            let error = test.check(&LIMITS, encoder).unwrap_err();
            assert!(error.message().contains(word) && error.exit_code() == 2, "{error}");
        };
        says(
            test(Kind::Decode, 128, 1, 2000),
            false,
            "tg128 @ d2000: 128 tokens after 2000 exceed the context of 2048",
        );
        says(test(Kind::Decode, 1, 1, usize::MAX), false, "exceed the context of 2048");
        says(test(Kind::Decode, 1, 65, 0), false, "at most 64 sequences in a step, found 65");
        says(test(Kind::Prefill, 513, 1, 0), true, "at most 512 tokens");
        assert!(test(Kind::Prefill, 2048, 1000, 0).check(&LIMITS, false).is_ok());
    }

    #[test]
    fn sequences_read_different_tokens_of_the_vocabulary() {
        for text in [vec![], (0..1000).map(|i| i % 7).collect()] {
            let prompts = Prompts { text, vocab: 7 };
            assert!(prompts.tokens(3, 2000).iter().all(|t| *t < 7));
            assert_eq!(
                (prompts.tokens(2, 2000).len(), prompts.tokens(1, 8)),
                (2000, prompts.tokens(1, 9)[..8].to_vec())
            );
            assert_ne!(prompts.tokens(1, 8), prompts.tokens(2, 8));
        }
    }
}
