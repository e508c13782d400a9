//! An artifact on a GPU: what the runtime needs of a driver, and which code of an artifact a GPU takes.
//!
//! ```text
//!  choose     facts of the GPU, PTX of the artifact      --> the code it runs, or why there is none
//!  plan       weights, activations, caches, step arrays  --> bytes of each, compared with what is free
//!  run        step arrays in; launches, or a graph of them; rows out
//! ```
//!
//! [`Driver`] is all that is asked of a GPU. [`cuda`] answers it with NVIDIA's driver, opened at run time; tests answer it in
//! memory of their own and check every use.

pub mod cuda;
mod grid;
mod layout;
mod measure;
mod memory;
mod plan;
pub(crate) mod run;
mod select;
mod weights;

pub use measure::copy_bandwidth;
pub use memory::DeviceMemory;
pub use plan::MemoryPlan;
pub use select::{Choice, choose, cubin, needed_driver};

use mansard_ir::Result;
use std::fmt;

/// Blocks of the largest grid that a GPU is given.
pub(crate) fn largest_grid(facts: &Facts) -> usize {
    grid::most(facts.processors)
}

/// A place in a GPU's memory.
pub type Address = u64;

/// What is known of a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Number, as in `cuda:0`.
    pub index: usize,
    /// `NVIDIA H200`.
    pub name: String,
    /// Compute capability: `(9, 0)` of Hopper.
    pub capability: (u32, u32),
    /// Newest CUDA version that the driver knows: `(13, 0)`.
    pub driver: (u32, u32),
    /// Multiprocessors.
    pub processors: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_bytes: usize,
    /// Bytes of its memory.
    pub memory: usize,
}

/// A kernel to be looked up in a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its symbol.
    pub name: String,
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of shared memory of a block.
    pub shared_bytes: usize,
    /// Addresses it takes.
    pub arguments: usize,
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// The driver's own number of it.
    pub id: usize,
    /// Blocks of it that a multiprocessor holds at once.
    pub resident: usize,
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks of the grid.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
    /// It may begin before the launch before it has ended, and waits for that itself.
    pub dependent: bool,
}

/// Launches that are made together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded(pub usize);

/// One GPU with one queue of work: everything asked for happens in order, after the call has returned, unless said otherwise.
///
/// Addresses are numbers: memory of this process is touched only through slices, and nothing reads or writes a slice once
/// its call has returned. A driver may be used by any thread. Every error names the call and what the driver said.
pub trait Driver: Send + Sync + fmt::Debug {
    /// What it is.
    fn facts(&self) -> &Facts;

    /// Bytes that nobody holds.
    fn free_memory(&self) -> Result<usize>;

    /// Memory at a multiple of 256.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives back what [`Driver::allocate`] gave, once all work is done.
    fn free(&self, at: Address);

    /// Zeros.
    fn clear(&self, at: Address, bytes: usize) -> Result<()>;

    /// Copies from this process.
    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()>;

    /// Copies inside the GPU's memory.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Waits until everything is done, then for each of these copies.
    fn finish(&self, copies: &mut [(Address, &mut [u8])]) -> Result<()>;

    /// Makes copies to this memory fast, until [`Driver::unpin`]. Copies lie either inside or outside of it.
    fn pin(&self, _memory: &mut [u8]) -> Result<()> {
        Ok(())
    }

    /// Before the memory goes.
    fn unpin(&self, _memory: &mut [u8]) {}

    /// Assembles PTX, or takes machine code, and looks up kernels; loaded for as long as the driver lives.
    fn load(&self, code: &[u8], entries: &[Entry]) -> Result<Vec<Function>>;

    /// Runs a kernel on so many addresses.
    fn launch(&self, function: usize, shape: Shape, args: &[Address]) -> Result<()>;

    /// Records the launches that `launches` makes instead of running them.
    fn record(&self, launches: &mut dyn FnMut() -> Result<()>) -> Result<Recorded>;

    /// Runs recorded launches.
    fn replay(&self, recorded: Recorded) -> Result<()>;

    /// Notes the time at which everything before is done, under a small number.
    fn mark(&self, mark: usize) -> Result<()>;

    /// Seconds between two marks, after [`Driver::finish`].
    fn seconds(&self, from: usize, to: usize) -> Result<f64>;
}
