//! A program -> launches with addresses: where activations, caches and weights lie for as long as an engine lives.

use crate::artifact::Artifact;
use crate::code::{BoundLaunch, BoundVariant};
use crate::cores::placement;
use crate::memory::{Arena, Cpus};
use crate::step::StepArrays;
use mansard_ir::Result;
use mansard_ir::plan::{Arg, Program};

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

/// A copy of the weights, side by side on huge pages. Thread `i` copies the `i`-th part of each, which is what worker `i`
/// will read: where memory has several nodes, a page comes from the node of whoever writes to it first.
///
/// # Errors
/// Where the system refuses memory, or a thread the place it is pinned to.
pub fn copy_weights(artifact: &Artifact, threads: usize, pin: bool) -> Result<Arena> {
    let weights = artifact.weights()?;
    let mut arena = Arena::huge("weights", weights.iter().map(|w| w.len()).sum())?;
    let places = if pin { placement(threads)? } else { vec![] };
    let mut parts: Vec<Vec<(&[u8], &mut [u8])>> = (0..threads).map(|_| vec![]).collect();
    let mut target = arena.bytes_mut();
    for mut weight in weights {
        for (i, part) in parts.iter_mut().enumerate() {
            let (from, rest) = weight.split_at(weight.len() / (threads - i));
            let (to, further) = std::mem::take(&mut target).split_at_mut(from.len());
            part.push((from, to));
            (weight, target) = (rest, further);
        }
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
