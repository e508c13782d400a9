//! A step stopped between two launches: what is in memory then, as values of the interpreter.
//!
//! ```text
//!  Before  launch 7: k3 buf0 w12 buf4     read its inputs
//!          ... every worker runs its share ...
//!  After   launch 7                       read its results
//! ```
//!
//! For finding out which kernel computes something else than it should; nothing here is on the way of an ordinary step.

use crate::caches::Sequence;
use crate::engine::Engine;
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
