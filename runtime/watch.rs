//! A step stopped between two launches: what is in memory then, as values of the interpreter.
//!
//! ```text
//!  Before  launch 7: k3 buf0 w12 buf4     read its inputs
//!          ... every worker runs its share ...
//!  After   launch 7                       read its results
//! ```
//!
//! For finding out which kernel computes something else than it should, and for quantizing a model while it runs: a step can wait
//! for another's, and go on with other weights. Nothing here is on the way of an ordinary step.

use crate::caches::Sequence;
use crate::engine::{Engine, StepOutput, Work};
use crate::step::Logits;
use mansard_ir::eval::{Cache, Step, Value};
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{Arg, Launch, RowCount};
use mansard_ir::{Result, Type, bail, decode};
use std::sync::Arc;

/// When a launch is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Its inputs are there.
    Before,
    /// Its results are there.
    After,
}

/// Memory around one launch.
pub struct Watch<'a> {
    pub(crate) engine: &'a Engine,
    /// Those of the step, in order.
    pub(crate) sequences: &'a [Sequence],
    /// Index of the variant.
    pub variant: usize,
    /// Index of the launch in it.
    pub launch: usize,
}

/// A step whose launches are run one by one.
pub struct SlowStep<'e, 'w> {
    pub(crate) engine: &'e mut Engine,
    pub(crate) work: &'w [Work<'w>],
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) variant: usize,
    /// The next one.
    pub(crate) launch: usize,
}

impl<'e> SlowStep<'e, '_> {
    /// Memory before the next launch; `None` after the last.
    pub fn watch(&self) -> Option<Watch<'_>> {
        let launches = &self.engine.program().variants[self.variant].launches;
        (self.launch < launches.len()).then(|| self.around(self.launch))
    }

    /// Memory after the launch that was run last.
    pub(crate) fn last(&self) -> Watch<'_> {
        self.around(self.launch.saturating_sub(1))
    }

    fn around(&self, launch: usize) -> Watch<'_> {
        Watch { engine: self.engine, sequences: &self.sequences, variant: self.variant, launch }
    }

    /// Runs the next launch.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn advance(&mut self) -> Result<()> {
        let Engine { place, arrays, .. } = &mut *self.engine;
        place.run(self.variant, arrays, Logits::All, Some(self.launch))?;
        self.launch += 1;
        Ok(())
    }

    /// Launches from now on read other bytes of a packed weight.
    ///
    /// # Errors
    /// Where the engine has no copy of the weights ([`crate::WeightPages::Huge`]), or the weight is not as long.
    pub fn replace_weight(&mut self, index: usize, bytes: &[u8]) -> Result<()> {
        self.engine.place.replace_weight(index, bytes)
    }

    /// What the step leaves, all launches having been run.
    ///
    /// # Errors
    /// Where some have not.
    pub fn finish(self) -> Result<StepOutput<'e>> {
        if self.watch().is_some() {
            bail!(Internal, "launch {} of a step has not been run", self.launch);
        }
        let SlowStep { engine, work, .. } = self;
        engine.end(work)?;
        Ok(engine.output())
    }
}

impl Watch<'_> {
    /// The launch.
    pub fn launch(&self) -> &Launch {
        &self.engine.program().variants[self.variant].launches[self.launch]
    }

    /// The step.
    pub fn step(&self) -> Step {
        let lengths = self.engine.arrays.sequences.iter().map(|[_, count]| *count as usize);
        Step::new(&self.sequences.iter().map(|s| s.length).zip(lengths).collect::<Vec<_>>())
    }

    /// What an argument holds, read as `ty`. Of a cache the positions before the step, and with `new` those of the step.
    ///
    /// # Errors
    /// Where that is no type of the argument.
    pub fn read(&self, arg: Arg, ty: &Type, new: bool) -> Result<Value> {
        let (program, arrays) = (self.engine.program(), &self.engine.arrays);
        match arg {
            Arg::Tokens => Ok(Value::from_ints(arrays.tokens.clone())),
            Arg::Positions => Ok(Value::from_ints(arrays.positions.clone())),
            Arg::Rows => Ok(Value::from_ints(arrays.rows.clone())),
            Arg::Buffer(id) => {
                let buffer = &program.buffers[id.0 as usize];
                let rows = match buffer.rows {
                    RowCount::Tokens => arrays.tokens.len(),
                    RowCount::Sequences => arrays.sequences.len(),
                    RowCount::Rows => arrays.rows.len(),
                };
                let words = self.engine.place.read(buffer.offset, rows * buffer.row_bytes / 4)?;
                decode::rows(ty, &bytes(&words), rows)
            }
            Arg::Weight(id) => {
                let Some((dtype, shape)) = ty.as_tensor() else { bail!(Internal, "{ty} is no weight") };
                let extents: Vec<usize> = shape.iter().filter_map(|d| d.fixed()).collect();
                let packed = self.engine.artifact().weights()?;
                decode::operand(dtype, &extents, packed[id.0 as usize])
            }
            Arg::Cache(id) => self.cache(id.0 as usize, ty, new),
        }
    }

    fn cache(&self, index: usize, ty: &Type, new: bool) -> Result<Value> {
        let Some(mut cache) = Cache::empty(ty, self.sequences.len()) else { bail!(Internal, "{ty} is no cache") };
        for (s, (sequence, step)) in self.sequences.iter().zip(self.step().sequences).enumerate() {
            let length = ty.kept(step.past + if new { step.len } else { 0 });
            let mut values = Vec::with_capacity(length * cache.heads * cache.dim);
            for first in (0..length).step_by(CACHE_BLOCK) {
                if !self.engine.caches.holds(index, sequence, first) {
                    // Out of every token's sight.
                    values.resize((first + CACHE_BLOCK) * cache.heads * cache.dim, 0.0);
                    continue;
                }
                let block = bytes(&self.engine.caches.block(index, sequence, first)?);
                for slot in 0..CACHE_BLOCK.min(length - first) {
                    for (head, d) in (0..cache.heads).flat_map(|head| (0..cache.dim).map(move |d| (head, d))) {
                        values.push(decode::cached(ty, &block, (head, slot, d))?);
                    }
                }
            }
            cache.sequences[s] = Arc::new(values);
        }
        Ok(Value::Cache(cache))
    }
}

fn bytes(words: &[f32]) -> Vec<u8> {
    words.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect()
}
