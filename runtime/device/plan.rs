//! What an engine takes of a GPU's memory, before it takes any.

use super::layout::StepLayout;
use mansard_ir::plan::Program;
use mansard_ir::{Error, Kind, Result, bail};
use std::fmt;

/// What everything in a GPU's memory is aligned to.
pub const ALIGN: usize = 256;

/// Bytes of each part, and where in it weights and cache pools begin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// All packed weights.
    pub weights: usize,
    /// Offset of each.
    pub weight_offsets: Vec<usize>,
    /// The arena.
    pub activations: usize,
    /// The pools of all caches.
    pub caches: usize,
    /// Offset of each pool.
    pub cache_offsets: Vec<usize>,
    /// What describes a step.
    pub step: usize,
    /// What the blocks of the largest grid share.
    pub scratch: usize,
}

impl MemoryPlan {
    /// For caches of `blocks` cache blocks, and grids of at most `grid` blocks.
    ///
    /// # Errors
    /// Where there is no such number of bytes.
    pub fn new(program: &Program, blocks: usize, grid: usize) -> Result<MemoryPlan> {
        let pool = |bytes: usize| bytes.checked_mul(blocks);
        let (weight_offsets, weights) = side_by_side(program.weights.iter().map(|w| Some(w.bytes)))?;
        let (cache_offsets, caches) = side_by_side(program.caches.iter().map(|c| pool(c.block_bytes)))?;
        let step = StepLayout::new(program).bytes;
        let (activations, scratch) = (program.arena_bytes, program.scratch_bytes.saturating_mul(grid));
        Ok(MemoryPlan { weights, weight_offsets, activations, caches, cache_offsets, step, scratch })
    }

    /// All of it.
    pub fn bytes(&self) -> usize {
        let parts = [self.weights, self.activations, self.caches, self.step, self.scratch];
        parts.into_iter().fold(0, usize::saturating_add)
    }

    /// Refuses what does not fit into `free` of `total` bytes.
    ///
    /// # Errors
    /// Then, with every number.
    pub fn check(&self, free: usize, total: usize) -> Result<()> {
        if self.bytes() <= free {
            return Ok(());
        }
        let held = total.saturating_sub(free);
        let message = format!("expected {self} of GPU memory, found {} free", megabytes(free));
        let error = Error::new(Kind::Io, message);
        // What a driver takes for itself is far less.
        Err(if self.bytes() <= total && held > total / 16 {
            error.help(format!("{} of {} are held, by other processes or engines", megabytes(held), megabytes(total)))
        } else {
            error.help("ask for fewer positions, or compile with narrower formats of weights and caches")
        })
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps = self.step.saturating_add(self.scratch);
        let [all, weights, activations, caches, steps] =
            [self.bytes(), self.weights, self.activations, self.caches, steps].map(megabytes);
        write!(f, "{all} (weights {weights}, activations {activations}, caches {caches}, steps {steps})")
    }
}

fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Where each of some parts begins, and where the last ends.
fn side_by_side(parts: impl Iterator<Item = Option<usize>>) -> Result<(Vec<usize>, usize)> {
    let (mut offsets, mut end) = (vec![], 0usize);
    for bytes in parts {
        offsets.push(end);
        let next = bytes.and_then(|b| end.checked_add(b)).and_then(|end| end.checked_next_multiple_of(ALIGN));
        end = match next {
            Some(end) => end,
            None => bail!(Usage, "there is no such GPU memory: ask for fewer positions"),
        };
    }
    Ok((offsets, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mansard_ir::plan::{CacheGroup, CacheSpec, Limits, WeightSpec};

    fn program() -> Program {
        let weight = |bytes| WeightSpec { name: "w".into(), ty: "f32[1]".into(), bytes, recipe: None };
        let cache = |block_bytes| CacheSpec { name: "c".into(), ty: "f32[1]".into(), block_bytes, group: 0 };
        Program {
            limits: Limits { tokens: 16, rows: 8, sequences: 4, context: 256, tile: 4 },
            arena_bytes: 4096,
            scratch_bytes: 128,
            weights: vec![weight(64), weight(1024), weight(64)],
            caches: vec![cache(320), cache(64)],
            groups: CacheGroup::all(),
            ..Program::default()
        }
    }

    #[test]
    fn parts_lie_side_by_side() {
        let plan = MemoryPlan::new(&program(), 3, 5).unwrap();
        assert_eq!((plan.weight_offsets.as_slice(), plan.weights), (&[0, 256, 1280][..], 1536));
        assert_eq!((plan.cache_offsets.as_slice(), plan.caches), (&[0, 1024][..], 1280));
        assert_eq!(plan.scratch, 5 * 128);
        assert_eq!(plan.bytes(), 1536 + 4096 + 1280 + plan.step + plan.scratch);
        assert!(MemoryPlan::new(&program(), usize::MAX / 64, 1).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_numbers() {
        let plan = MemoryPlan { weights: 16 << 30, caches: 4 << 30, ..MemoryPlan::default() };
        assert!(plan.check(21 << 30, 80 << 30).is_ok());
        let error = plan.check(8 << 30, 80 << 30).unwrap_err();
        assert_eq!(error.exit_code(), 5);
        let numbers = "expected 21474.8 MB (weights 17179.9 MB, activations 0.0 MB, caches 4295.0 MB, steps 0.0 MB) of GPU memory, found 8589.9 MB free";
        assert_eq!(error.message(), numbers);
        assert!(error.advice().unwrap().contains("held, by other processes"));
        assert!(plan.check(8 << 30, 8 << 30).unwrap_err().advice().unwrap().contains("fewer positions"));
    }
}
