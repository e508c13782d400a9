//! A program -> launches with addresses: where activations, caches and weights lie for as long as an engine lives.

use crate::artifact::Artifact;
use crate::code::{BoundLaunch, BoundVariant};
use crate::cores::placement;
use crate::memory::{Arena, Cpus, Memory};
use mansard_ir::layout::aligned;
use mansard_ir::plan::{Arg, Program};
use mansard_ir::{Result, bail, synthetic};
use std::ops::Range;

/// Where everything is that a launch may name.
pub struct Addresses<'a> {
    /// Activations.
    pub arena: &'a dyn Memory,
    /// The pool of each cache.
    pub pools: Vec<*mut u8>,
    /// Each packed weight.
    pub weights: Vec<*mut u8>,
    /// The step's tokens, positions and rows, which do not move.
    pub arrays: [*mut u8; 3],
}

impl Addresses<'_> {
    /// The program's variants with addresses for arguments.
    pub fn bind(&self, program: &Program) -> Vec<BoundVariant> {
        let address = |arg: &Arg| match *arg {
            Arg::Buffer(b) => self.arena.at(program.buffers[b.0 as usize].offset),
            Arg::Weight(w) => self.weights[w.0 as usize],
            Arg::Cache(c) => self.pools[c.0 as usize],
            Arg::Tokens => self.arrays[0],
            Arg::Positions => self.arrays[1],
            Arg::Rows => self.arrays[2],
        };
        let variants = program.variants.iter().map(|variant| {
            let launches = variant.launches.iter().map(|launch| BoundLaunch {
                kernel: launch.kernel.0 as usize,
                args: launch.args.iter().map(address).collect(),
                barrier: launch.barrier,
            });
            BoundVariant { launches: launches.collect() }
        });
        variants.collect()
    }
}

/// A copy of the weights, side by side on huge pages. Thread `i` copies the `i`-th part of each, which is what worker `i`
/// will read: where memory has several nodes, a page comes from the node of whoever writes to it first.
///
/// # Errors
/// Where the system refuses memory, or a thread the place it is pinned to.
pub fn copy_weights(artifact: &Artifact, threads: usize, pin: bool) -> Result<Arena> {
    let weights = artifact.weights()?;
    let mut arena = Arena::huge("weights", weights.iter().map(|w| aligned(w.len())).sum())?;
    let places = if pin { placement(threads)? } else { vec![] };
    let mut parts: Vec<Vec<(&[u8], &mut [u8])>> = (0..threads).map(|_| vec![]).collect();
    let mut target = arena.bytes_mut();
    for mut weight in weights {
        let (mut room, further) = std::mem::take(&mut target).split_at_mut(aligned(weight.len()));
        for (i, part) in parts.iter_mut().enumerate() {
            let (from, rest) = weight.split_at(weight.len() / (threads - i));
            let (to, left) = std::mem::take(&mut room).split_at_mut(from.len());
            part.push((from, to));
            (weight, room) = (rest, left);
        }
        target = further;
    }
    std::thread::scope(|scope| {
        let mut copies = vec![];
        for (i, part) in parts.into_iter().enumerate() {
            let place = places.get(i);
            copies.push(scope.spawn(move || -> Result<()> {
                place.map(Cpus::hold_me).transpose()?;
                part.into_iter().for_each(|(from, to)| to.copy_from_slice(from));
                Ok(())
            }));
        }
        copies.into_iter().try_for_each(|c| c.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(arena)
}

/// Weights made up, side by side on huge pages.
///
/// # Errors
/// Where the system refuses memory.
pub fn make_weights(program: &Program, seed: u64, threads: usize) -> Result<Arena> {
    let mut arena = Arena::huge("weights", program.weights.iter().map(|w| aligned(w.bytes)).sum())?;
    let mut rest = arena.bytes_mut();
    for (index, weight) in program.weights.iter().enumerate() {
        let (bytes, further) = std::mem::take(&mut rest).split_at_mut(aligned(weight.bytes));
        for fill in synthetic::fills(weight, index, seed)? {
            let bytes = &mut bytes[fill.at..fill.at + fill.bytes];
            let part = (fill.bytes / 4).div_ceil(threads.max(1)).max(1);
            std::thread::scope(|scope| {
                for (worker, part_of) in bytes.chunks_mut(4 * part).enumerate() {
                    let fill = &fill;
                    scope.spawn(move || fill.write(worker * part, part_of));
                }
            });
        }
        rest = further;
    }
    Ok(arena)
}

/// Address of each packed weight, in its section or in the copy.
///
/// # Errors
/// Where a weight has no section.
pub fn weight_addresses(artifact: &Artifact, copy: Option<&Arena>) -> Result<Vec<*mut u8>> {
    let Some(arena) = copy else {
        // Kernels do not write to weights; the mapping would fault.
        return Ok(artifact.weights()?.iter().map(|weight| weight.as_ptr().cast_mut()).collect());
    };
    let program = &artifact.manifest().program;
    (0..program.weights.len()).map(|index| Ok(arena.at(copied_at(program, index)?.start))).collect()
}

/// Where in the copy a packed weight lies.
///
/// # Errors
/// Where there is none of that number.
pub fn copied_at(program: &Program, index: usize) -> Result<Range<usize>> {
    let Some(weight) = program.weights.get(index) else { bail!(Internal, "no weight {index}") };
    let start = program.weights[..index].iter().map(|w| aligned(w.bytes)).sum();
    Ok(start..start + weight.bytes)
}
