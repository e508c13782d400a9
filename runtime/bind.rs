//! A program -> launches with addresses: where activations, caches and weights lie for as long as an engine lives.

use crate::artifact::Artifact;
use crate::code::{BoundLaunch, BoundVariant};
use crate::engine::WeightPages;
use crate::memory::{Arena, Pages, available_memory};
use crate::step::StepArrays;
use mansard_ir::plan::{Arg, Program};
use mansard_ir::{Result, bail};

/// A cache pool of fewer bytes stays on small pages: it is one of many, and one huge page for each would commit more
/// memory than a short prompt fills.
const HUGE_POOL_BYTES: usize = 16 << 20;

/// Where everything is that a launch may name.
pub struct Addresses<'a> {
    /// Activations.
    pub arena: &'a Arena,
    /// The pool of each cache.
    pub pools: Vec<*mut u8>,
    /// Each packed weight.
    pub weights: Vec<*mut u8>,
    /// The step's arrays, which do not move.
    pub arrays: &'a StepArrays,
}

impl Addresses<'_> {
    /// The program's variants with addresses for arguments.
    pub fn bind(&self, program: &Program) -> Vec<BoundVariant> {
        let address = |arg: &Arg| match *arg {
            Arg::Buffer(b) => self.arena.at(program.buffers[b.0 as usize].offset),
            Arg::Weight(w) => self.weights[w.0 as usize],
            Arg::Cache(c) => self.pools[c.0 as usize],
            Arg::Tokens => self.arrays.tokens.as_ptr().cast_mut().cast(),
            Arg::Positions => self.arrays.positions.as_ptr().cast_mut().cast(),
            Arg::Rows => self.arrays.rows.as_ptr().cast_mut().cast(),
        };
        let variants = program.variants.iter().map(|variant| {
            let launches = variant.launches.iter().map(|launch| BoundLaunch {
                kernel: launch.kernel.0 as usize,
                args: launch.args.iter().map(address).collect(),
                barrier: launch.barrier,
            });
            BoundVariant { tokens: variant.tokens, launches: launches.collect() }
        });
        variants.collect()
    }
}

/// One arena for the pools of all caches, and the offset of each.
///
/// # Errors
/// Where the system refuses memory.
pub fn make_pools(program: &Program, blocks: usize) -> Result<(Arena, Vec<usize>)> {
    let mut offsets = vec![];
    let mut bytes = 0usize;
    for cache in &program.caches {
        offsets.push(bytes);
        let pool = cache.block_bytes.checked_mul(blocks).and_then(|pool| bytes.checked_add(pool));
        let Some(end) = pool else {
            bail!(
                Usage,
                "{blocks} cache blocks of {} bytes in {} caches: no such memory",
                cache.block_bytes,
                offsets.len()
            );
        };
        bytes = end;
    }
    let huge = bytes / program.caches.len().max(1) >= HUGE_POOL_BYTES;
    let arena = Arena::new("caches", bytes, if huge { Pages::Huge } else { Pages::Small })?;
    Ok((arena, offsets))
}

/// The weights side by side on huge pages, where that is wanted.
///
/// # Errors
/// Where the system refuses memory.
pub fn copy_weights(artifact: &Artifact, pages: WeightPages, threads: usize) -> Result<Option<Arena>> {
    let weights = artifact.weights()?;
    let total: usize = weights.iter().map(|w| w.len()).sum();
    let copy = match pages {
        WeightPages::Mapped => false,
        WeightPages::Huge => true,
        WeightPages::Auto => available_memory().is_some_and(|free| total <= free / 2),
    };
    if !copy {
        return Ok(None);
    }
    let mut arena = Arena::new("weights", total, Pages::Huge)?;
    // Each thread copies a run of weights of about the same number of bytes.
    std::thread::scope(|scope| {
        let (mut target, mut weights) = (arena.bytes_mut(), &weights[..]);
        for left in (1..=threads.max(1)).rev() {
            let goal = target.len().div_ceil(left);
            let (mut count, mut bytes) = (0, 0);
            while bytes < goal && count < weights.len() {
                bytes += weights[count].len();
                count += 1;
            }
            let (run, rest) = weights.split_at(count);
            let (place, further) = std::mem::take(&mut target).split_at_mut(bytes);
            (weights, target) = (rest, further);
            scope.spawn(move || copy_run(run, place));
        }
    });
    Ok(Some(arena))
}

/// Address of each packed weight, in its section or in the copy.
///
/// # Errors
/// Where a weight has no section.
pub fn weight_addresses(artifact: &Artifact, copy: Option<&Arena>) -> Result<Vec<*mut u8>> {
    let weights = artifact.weights()?;
    let mut offset = 0;
    let addresses = weights.iter().map(|weight| match copy {
        // Kernels do not write to weights; the mapping would fault.
        None => weight.as_ptr().cast_mut(),
        Some(arena) => {
            let address = arena.at(offset);
            offset += weight.len();
            address
        }
    });
    Ok(addresses.collect())
}

fn copy_run(weights: &[&[u8]], target: &mut [u8]) {
    let mut rest = target;
    for weight in weights {
        let (place, further) = rest.split_at_mut(weight.len());
        place.copy_from_slice(weight);
        rest = further;
    }
}
