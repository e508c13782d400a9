//! Where a step runs: workers of this process, or a GPU.

use crate::device::Address;
use crate::profile::StepProfile;
use crate::step::{Logits, StepArrays};
use mansard_ir::{Result, bail};
use std::borrow::Cow;

/// Memory and code of an opened artifact, ready to run steps.
pub trait Place: Send + Sync {
    /// Runs the launches of a variant on a step, or one of them after those before it.
    ///
    /// # Errors
    /// Where a GPU fails; workers do not.
    fn run(&mut self, variant: usize, arrays: &StepArrays, logits: Logits, launch: Option<usize>) -> Result<()>;

    /// The first `len` values of an output of the last step.
    fn output(&self, index: usize, len: usize) -> &[f32];

    /// `len` values of the arena from byte `offset`.
    ///
    /// # Errors
    /// As [`Place::run`].
    fn read(&self, offset: usize, len: usize) -> Result<Cow<'_, [f32]>>;

    /// Where the time of the last step went, which ran that variant.
    fn profile(&self, variant: usize) -> Option<StepProfile>;

    /// Where a packed weight lies in a GPU's memory.
    fn weight(&self, _index: usize) -> Option<Address> {
        None
    }

    /// Gives a packed weight other bytes, between two launches.
    ///
    /// # Errors
    /// Where weights are read where they are mapped, or lie on a GPU; where these are not as many bytes.
    fn replace_weight(&mut self, _index: usize, _bytes: &[u8]) -> Result<()> {
        bail!(Unsupported, "weights are replaced in copies of this process only, not on {}", self.name())
    }

    /// Workers; of a GPU multiprocessors.
    fn threads(&self) -> usize;

    /// For people: `cpu`, `cuda:0 (NVIDIA H200)`.
    fn name(&self) -> String;
}
