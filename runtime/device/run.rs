//! Steps on a GPU: one copy in, the launches of the step's variant, the rows asked for back.
//!
//! ```text
//!  step of 3 tokens   StepArgs and arrays -----> GPU      at the same place in every step
//!                     launches for up to 4 tokens         recorded the second time such a step comes, replayed from then on
//!                     logits of the rows <------ GPU
//! ```
//!
//! Launches take addresses alone, which never change, and read from memory how many tokens there are. So what is recorded for
//! a variant and a power of two of tokens stays right for as long as the engine lives; only the grids depend on it.

use super::layout::StepLayout;
use super::plan::MemoryPlan;
use super::{Address, DeviceMemory, Driver, Entry, Facts, Function, Recorded, Shape, choose, cubin, grid, weights};
use crate::artifact::Artifact;
use crate::code::BoundVariant;
use crate::memory::{Arena, Memory};
use crate::place::Place;
use crate::profile::{LaunchProfile, StepProfile};
use crate::step::{Logits, StepArrays};
use mansard_ir::artifact::PtxCode;
use mansard_ir::layout::aligned;
use mansard_ir::plan::{KernelSpec, Program, RowCount};
use mansard_ir::{Graph, Place as _, Result, bail};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// So many bytes of outputs are copied at full speed.
const PINNED: usize = 16 << 20;

/// What a GPU is given of an artifact, before its launches are known.
pub struct Loaded {
    driver: Arc<dyn Driver>,
    artifact: Arc<Artifact>,
    arena: DeviceMemory,
    weights: DeviceMemory,
    weight_offsets: Vec<usize>,
    step: DeviceMemory,
    scratch: DeviceMemory,
    layout: StepLayout,
}

/// A GPU with everything that steps need.
pub struct Device {
    loaded: Loaded,
    kernels: Vec<Kernel>,
    variants: Vec<Vec<(usize, Vec<Address>)>>,
    /// By variant and most tokens; nothing where such a step has been once.
    recorded: BTreeMap<(usize, usize), Option<Recorded>>,
    /// Marks are set around launches.
    profile: bool,
    bytes: Vec<u8>,
    /// Rows of the outputs of the last step, one output after the other.
    outputs: Arena,
    output_offsets: Vec<usize>,
    failed: bool,
}

struct Kernel {
    function: Function,
    shape: Shape,
    /// Without one, the grid is as large as it can be.
    body: Option<Graph>,
}

impl Loaded {
    /// Takes memory as planned, and copies the weights; `progress` hears how many bytes of how many.
    ///
    /// # Errors
    /// Where the artifact has no code for the GPU, or the plan does not fit what is free, both before memory is taken; or
    /// where the driver refuses.
    pub fn new(
        driver: Arc<dyn Driver>,
        artifact: Arc<Artifact>,
        plan: MemoryPlan,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Loaded> {
        let program = &artifact.manifest().program;
        choose(&artifact.manifest().ptx, driver.facts())?;
        plan.check(driver.free_memory()?, driver.facts().memory)?;
        let weights = DeviceMemory::new(&driver, "weights", plan.weights)?;
        let arena = DeviceMemory::new(&driver, "activations", plan.activations)?;
        let step = DeviceMemory::new(&driver, "a step", plan.step)?;
        let scratch = DeviceMemory::new(&driver, "scratch of blocks", plan.scratch)?;
        let layout = StepLayout::new(program);
        match &artifact.manifest().synthetic {
            Some(synthetic) => weights::make(&driver, &artifact, synthetic, &weights, &plan.weight_offsets, progress)?,
            None => weights::copy(&driver, &artifact, &weights, &plan.weight_offsets, progress)?,
        }
        Ok(Loaded {
            driver,
            arena,
            weights,
            weight_offsets: plan.weight_offsets,
            step,
            scratch,
            layout,
            artifact: artifact.clone(),
        })
    }

    /// Activations.
    pub fn arena(&self) -> &dyn Memory {
        &self.arena
    }

    /// Address of each packed weight.
    pub fn weights(&self) -> Vec<*mut u8> {
        self.weight_offsets.iter().map(|offset| self.weights.at(*offset)).collect()
    }

    /// Addresses of the step's tokens, positions and rows.
    pub fn arrays(&self) -> [*mut u8; 3] {
        [self.layout.tokens, self.layout.positions, self.layout.rows].map(|offset| self.step.at(offset))
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// Where the driver does not take them.
    pub fn bind(self, variants: &[BoundVariant], profile: bool) -> Result<Device> {
        let manifest = self.artifact.manifest();
        let program = &manifest.program;
        let code = choose(&manifest.ptx, self.driver.facts())?;
        let launches = |variant: &BoundVariant| {
            let addresses = |args: &[*mut u8]| args.iter().map(|at| at.addr() as Address).collect();
            variant.launches.iter().map(|launch| (launch.kernel, addresses(&launch.args))).collect()
        };
        let variants: Vec<Vec<(usize, Vec<Address>)>> = variants.iter().map(launches).collect();
        let mut arities = vec![None; program.kernels.len()];
        for (kernel, args) in variants.iter().flatten() {
            arities[*kernel] = Some(args.len());
        }
        let kernels = load(&*self.driver, &self.artifact, code, &arities)?;
        let most = |output: &mansard_ir::plan::Output| {
            let buffer = &program.buffers[output.buffer.0 as usize];
            aligned(buffer.rows.most(&program.limits).saturating_mul(buffer.row_bytes))
        };
        let (mut output_offsets, mut end) = (vec![], 0usize);
        for output in &program.outputs {
            output_offsets.push(end);
            end = end.saturating_add(most(output));
        }
        let mut outputs = Arena::new("outputs", end)?;
        let pinned = end.min(PINNED);
        self.driver.pin(&mut outputs.bytes_mut()[..pinned])?;
        let (recorded, bytes, failed) = (BTreeMap::new(), vec![], false);
        Ok(Device { loaded: self, kernels, variants, recorded, profile, bytes, outputs, output_offsets, failed })
    }
}

/// Kernels that are launched, from the code of one chip.
fn load(driver: &dyn Driver, artifact: &Artifact, code: &PtxCode, arities: &[Option<usize>]) -> Result<Vec<Kernel>> {
    let Some(text) = artifact.section(&code.section) else {
        bail!(Input, "expected section `{}`, found none of that name", code.section);
    };
    let program = &artifact.manifest().program;
    let entry = |((kernel, shared_bytes), arity): ((&KernelSpec, &usize), &Option<usize>)| Entry {
        name: kernel.name.clone(),
        threads: code.threads,
        shared_bytes: *shared_bytes,
        // The step comes last.
        arguments: arity.unwrap_or(0) + 1,
    };
    let entries: Vec<Entry> = program.kernels.iter().zip(&code.shared_bytes).zip(arities).map(entry).collect();
    let most = driver.facts().shared_bytes;
    if let Some(entry) = entries.iter().find(|entry| entry.shared_bytes > most) {
        let Entry { name, shared_bytes, .. } = entry;
        bail!(
            Unsupported,
            "kernel `{name}` needs {shared_bytes} bytes of shared memory, the GPU has {most} for a block"
        );
    }
    let waits = waiting(&String::from_utf8_lossy(text));
    let machine_code = cubin(code, driver.facts()).and_then(|cubin| artifact.section(&cubin.section));
    let functions = driver.load(machine_code.unwrap_or(text), &entries).at(|| format!("code for {}", code.chip))?;
    let kernels = functions.into_iter().zip(&entries).zip(&program.kernels).map(|((function, entry), spec)| Kernel {
        function,
        shape: Shape {
            blocks: 1,
            threads: entry.threads as u32,
            shared_bytes: entry.shared_bytes as u32,
            dependent: waits.contains(&entry.name),
        },
        body: spec.body().ok(),
    });
    Ok(kernels.collect())
}

/// Kernels that wait themselves for the launches before them, and so may begin before those have ended.
fn waiting(ptx: &str) -> Vec<String> {
    let kernels = ptx.split(".entry ").skip(1).filter(|kernel| kernel.contains("griddepcontrol.wait"));
    kernels.filter_map(|kernel| kernel.split(['(', ' ', '\n']).next()).map(str::to_owned).collect()
}

impl Device {
    fn facts(&self) -> &Facts {
        self.loaded.driver.facts()
    }

    fn program(&self) -> &Program {
        &self.loaded.artifact.manifest().program
    }

    /// Makes some launches of a variant, with grids for at most `tokens` tokens.
    fn launch(&self, variant: usize, launches: std::ops::Range<usize>, tokens: usize) -> Result<()> {
        let (driver, processors) = (&self.loaded.driver, self.facts().processors);
        for index in launches {
            let (kernel, args) = &self.variants[variant][index];
            let Kernel { function, shape, body } = &self.kernels[*kernel];
            let blocks = grid::size(body.as_ref(), tokens, (processors, function.resident)) as u32;
            // The first waits for the step; later ones may read it at once.
            let dependent = shape.dependent && index > 0;
            let args: Vec<Address> = args.iter().copied().chain([self.loaded.step.address(0)]).collect();
            if self.profile {
                driver.mark(index)?;
            }
            let place = || format!("kernel `{}`", self.program().kernels[*kernel].name);
            driver.launch(function.id, Shape { blocks, dependent, ..*shape }, &args).at(place)?;
        }
        if self.profile { driver.mark(self.variants[variant].len()) } else { Ok(()) }
    }

    /// All launches of a variant: one by one, recorded, or replayed.
    fn launch_all(&mut self, variant: usize, tokens: usize) -> Result<()> {
        let (most, all) =
            (tokens.next_power_of_two().min(self.program().limits.tokens), 0..self.variants[variant].len());
        if self.profile {
            return self.launch(variant, all, most);
        }
        let driver = self.loaded.driver.clone();
        match self.recorded.get(&(variant, most)) {
            // What the driver does with a kernel's first launch cannot be recorded.
            None => {
                self.launch(variant, all, most)?;
                self.recorded.insert((variant, most), None);
                Ok(())
            }
            Some(None) => {
                let recorded = driver.record(&mut || self.launch(variant, all.clone(), most))?;
                self.recorded.insert((variant, most), Some(recorded));
                driver.replay(recorded)
            }
            Some(Some(recorded)) => driver.replay(*recorded),
        }
    }

    fn step(&mut self, variant: usize, arrays: &StepArrays, logits: Logits, launch: Option<usize>) -> Result<()> {
        let Loaded { driver, step, scratch, layout, .. } = &self.loaded;
        let scratch = (scratch.address(0), self.loaded.artifact.manifest().program.scratch_bytes);
        layout.write(step.address(0), scratch, (arrays, logits), &mut self.bytes);
        driver.copy_in(step.address(0), &self.bytes)?;
        let tokens = arrays.tokens.len();
        match launch {
            Some(index) => self.launch(variant, index..index + 1, tokens)?,
            None => self.launch_all(variant, tokens)?,
        }
        let last = launch.is_none_or(|index| index + 1 == self.variants[variant].len());
        if last { self.fetch(arrays) } else { self.loaded.driver.finish(&mut []) }
    }

    /// Waits for the step, and copies the rows of its outputs.
    fn fetch(&mut self, arrays: &StepArrays) -> Result<()> {
        let program = &self.loaded.artifact.manifest().program;
        let mut copies = vec![];
        let (mut rest, mut at) = (self.outputs.bytes_mut(), 0);
        for (output, offset) in program.outputs.iter().zip(&self.output_offsets) {
            let buffer = &program.buffers[output.buffer.0 as usize];
            let count = match buffer.rows {
                RowCount::Tokens => arrays.tokens.len(),
                RowCount::Sequences => arrays.sequences.len(),
                RowCount::Rows => arrays.rows.len(),
            };
            let bytes = count * buffer.row_bytes;
            let (to, further) = std::mem::take(&mut rest)[offset - at..].split_at_mut(bytes);
            (rest, at) = (further, offset + bytes);
            // A copy lies in pinned memory, or outside.
            let (pinned, other) = to.split_at_mut(PINNED.saturating_sub(*offset).min(bytes));
            let from = self.loaded.arena.address(buffer.offset);
            let later = from + pinned.len() as Address;
            copies.extend([(from, pinned), (later, other)].into_iter().filter(|(_, to)| !to.is_empty()));
        }
        self.loaded.driver.finish(&mut copies)
    }
}

impl Place for Device {
    fn run(&mut self, variant: usize, arrays: &StepArrays, logits: Logits, launch: Option<usize>) -> Result<()> {
        if self.failed {
            bail!(Io, "the GPU has failed in a step before: open the artifact again");
        }
        let ran = self.step(variant, arrays, logits, launch);
        self.failed = ran.is_err();
        ran.at(|| format!("cuda:{}", self.facts().index))
    }

    fn output(&self, index: usize, len: usize) -> &[f32] {
        self.outputs.f32s(self.output_offsets[index], len)
    }

    fn read(&self, offset: usize, len: usize) -> Result<Cow<'_, [f32]>> {
        self.loaded.arena.read(offset, len)
    }

    fn profile(&self, variant: usize) -> Option<StepProfile> {
        let count = self.variants.get(variant)?.len();
        let seconds = |from: usize, to: usize| self.loaded.driver.seconds(from, to).ok();
        let launch = |i| seconds(i, i + 1).map(|busy| LaunchProfile { busy, slowest: busy, wait: 0.0 });
        let launches = self.profile.then(|| (0..count).map(launch).collect::<Option<_>>())??;
        Some(StepProfile { variant, seconds: seconds(0, count)?, start: 0.0, launches })
    }

    fn weight(&self, index: usize) -> Option<Address> {
        self.loaded.weight_offsets.get(index).map(|offset| self.loaded.weights.address(*offset))
    }

    fn threads(&self) -> usize {
        self.facts().processors
    }

    fn name(&self) -> String {
        let Facts { index, name, .. } = self.facts();
        format!("cuda:{index} ({name})")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let pinned = self.outputs.bytes_mut();
        let bytes = pinned.len().min(PINNED);
        self.loaded.driver.unpin(&mut pinned[..bytes]);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kernels_that_wait_are_found_in_their_text() {
        let ptx = ".visible .entry a(\n.param .u64 p\n)\n{\nret;\n}\n.visible .entry b(\n)\n{\ngriddepcontrol.wait;\nret;\n}\n";
        assert_eq!(super::waiting(ptx), ["b"]);
        assert!(super::waiting("").is_empty());
    }
}
