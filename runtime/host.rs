//! Steps on workers of this process.

use crate::artifact::Artifact;
use crate::bind::{Addresses, copied_at, copy_weights, make_weights, weight_addresses};
use crate::code::{Executable, Image, Job, Running, choose};
use crate::cores::physical_cores;
use crate::engine::{EngineOptions, WeightPages};
use crate::memory::Arena;
use crate::place::Place;
use crate::profile::{Recorder, StepProfile};
use crate::spmd::Team;
use crate::step::{Logits, StepArrays};
use mansard_ir::artifact::Code;
use mansard_ir::{Error, Kind, Result, bail};
use std::borrow::Cow;
use std::sync::Arc;

/// The best machine code, memory and workers.
pub struct Host {
    // First, so that workers have stopped before the memory they use goes.
    team: Team<Job>,
    executable: Arc<Executable>,
    recorder: Option<Arc<Recorder>>,
    arena: Arena,
    scratch: Arena,
    // Kept for the launches, which hold its address.
    weights: Option<Arena>,
    artifact: Arc<Artifact>,
}

impl Host {
    /// Maps the best machine code, reserves memory, and starts workers. The pools and `arrays` outlive them.
    ///
    /// # Errors
    /// Where no code runs on this machine, or the system refuses memory or threads.
    pub fn new(
        artifact: Arc<Artifact>,
        options: &EngineOptions,
        pools: Vec<*mut u8>,
        arrays: &StepArrays,
    ) -> Result<Host> {
        let place = |e: Error| e.at(artifact.path().display().to_string());
        let program = &artifact.manifest().program;
        let code = image(&artifact.manifest().code, options.image).and_then(choose).map_err(place)?;
        let Some(bytes) = artifact.section(&code.section) else {
            bail!(Input, "expected section `{}`, found none of that name", code.section);
        };
        let image = Image::map(bytes, &code.entries)?;
        let threads = options.threads.unwrap_or_else(physical_cores);
        let arena = Arena::huge("activations", program.arena_bytes)?;
        let scratch = Arena::new("scratch of workers", program.scratch_bytes.saturating_mul(threads))?;
        let weights = match (&artifact.manifest().synthetic, options.weights) {
            (Some(synthetic), _) => Some(make_weights(program, synthetic.seed, threads)?),
            (None, WeightPages::Mapped) => None,
            (None, WeightPages::Huge) => Some(copy_weights(&artifact, threads, options.pin)?),
        };
        let addresses = Addresses {
            arena: &arena,
            pools,
            weights: weight_addresses(&artifact, weights.as_ref())?,
            arrays: arrays.addresses(),
        };
        let executable = Arc::new(Executable::new(image, addresses.bind(program))?);
        let recorder = options.profile.then(|| Arc::new(Recorder::new(threads, executable.most_launches())));
        let running = Running { executable: executable.clone(), recorder: recorder.clone() };
        let team = Team::new(threads, options.pin, running)?;
        Ok(Host { team, executable, recorder, arena, scratch, weights, artifact: artifact.clone() })
    }
}

impl Place for Host {
    fn run(&mut self, variant: usize, arrays: &StepArrays, logits: Logits, launch: Option<usize>) -> Result<()> {
        let step = arrays.args(self.scratch.at(0), self.artifact.manifest().program.scratch_bytes, logits);
        if let (Some(recorder), None) = (&self.recorder, launch) {
            recorder.begin();
        }
        self.team.run(Job { variant, step, launch });
        Ok(())
    }

    fn output(&self, index: usize, len: usize) -> &[f32] {
        let program = &self.artifact.manifest().program;
        let buffer = program.outputs[index].buffer;
        self.arena.f32s(program.buffers[buffer.0 as usize].offset, len)
    }

    fn read(&self, offset: usize, len: usize) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(self.arena.f32s(offset, len)))
    }

    fn profile(&self, variant: usize) -> Option<StepProfile> {
        Some(self.recorder.as_ref()?.step(variant, self.executable.launches(variant)))
    }

    fn replace_weight(&mut self, index: usize, bytes: &[u8]) -> Result<()> {
        let Some(arena) = &mut self.weights else {
            bail!(Unsupported, "weights that are read where they are mapped cannot be replaced");
        };
        let range = copied_at(&self.artifact.manifest().program, index)?;
        if range.len() != bytes.len() {
            bail!(Internal, "weight {index} of {} bytes, {} to replace them", range.len(), bytes.len());
        }
        arena.bytes_mut()[range].copy_from_slice(bytes);
        Ok(())
    }

    fn threads(&self) -> usize {
        self.team.threads()
    }

    fn name(&self) -> String {
        "cpu".into()
    }
}

/// The images to choose from.
fn image(images: &[Code], asked: Option<usize>) -> Result<&[Code]> {
    let Some(index) = asked else { return Ok(images) };
    let one = index.checked_add(1).and_then(|end| images.get(index..end));
    one.ok_or_else(|| Error::new(Kind::Usage, format!("expected one of {} images, found {index}", images.len())))
}
