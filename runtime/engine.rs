//! Sequences of tokens -> rows of logits, one ragged step at a time.
//!
//! ```text
//!  step([ (seq 1, 500 tokens of a prompt, Last), (seq 2, its next token, Last), (seq 3, 4 drafted tokens, All) ])
//!    -> 6 rows, in that order
//! ```
//!
//! Prefill, decode, a mixture of both, and the verification of a draft are the same call. A step either runs as a whole or
//! fails before anything has changed.

use crate::artifact::Artifact;
use crate::bind::Addresses;
use crate::caches::{CacheUse, Caches, Copied, Sequence, make_pools};
use crate::device::{self, run::Loaded};
use crate::device::{Address, DeviceMemory, Driver, MemoryPlan};
use crate::host::Host;
use crate::memory::Memory;
use crate::place::Place;
use crate::profile::StepProfile;
use crate::step::{Logits, Rows, Segment, StepArrays};
use crate::watch::{Moment, SlowStep, Watch};
use mansard_ir::plan::{Limits, Program, RowCount};
use mansard_ir::{Error, Kind, Result, bail};
use std::sync::Arc;

/// How an engine runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineOptions {
    /// Workers; all physical cores where `None`.
    pub threads: Option<usize>,
    /// Positions the caches hold over all sequences; one sequence of the longest context where `None`. Memory is taken as
    /// positions are filled.
    pub positions: Option<usize>,
    /// See the first 64 positions of a sequence and at least so many of its last ones, instead of all: caches then keep no
    /// more (attention sinks; Xiao et al., 2023). A step's tokens see what its first one does, and those between. Positions
    /// stay those of the text, up to the context; what was seen of it when a token ran is not forgotten by later ones.
    pub window: Option<usize>,
    /// Where kernels read weights from.
    pub weights: WeightPages,
    /// Each worker keeps to a core of its own.
    pub pin: bool,
    /// Take the time of every launch, for [`Engine::profile`].
    pub profile: bool,
    /// The image to run, by its index in the artifact; the best one where `None`.
    pub image: Option<usize>,
}

/// Where kernels read weights from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightPages {
    /// The mapped file: no second copy, and processes share it.
    #[default]
    Mapped,
    /// A copy on huge pages: memory for it, and some speed where the file lies on small pages.
    Huge,
}

/// Names a sequence of an engine. Never valid again after its release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    index: u32,
    generation: u32,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Its next tokens.
    pub tokens: &'a [u32],
    /// Rows that leave the step.
    pub rows: Rows,
}

/// An opened artifact ready to run.
pub struct Engine {
    // First, so that workers have stopped before the memory they use goes.
    pub(crate) place: Box<dyn Place>,
    pub(crate) arrays: StepArrays,
    pub(crate) caches: Caches,
    weights: WeightPages,
    artifact: Arc<Artifact>,
    slots: Vec<Slot>,
}

/// Room for a sequence.
#[derive(Default)]
struct Slot {
    generation: u32,
    sequence: Option<Sequence>,
}

impl Engine {
    /// Maps the best machine code, reserves memory, and starts workers.
    ///
    /// # Errors
    /// Where no code runs on this machine, or the system refuses memory or threads.
    pub fn new(artifact: Arc<Artifact>, options: &EngineOptions) -> Result<Engine> {
        let program = &artifact.manifest().program;
        let mut pools = vec![];
        let caches = Caches::new(program, (positions(program, options), options.window), |blocks| {
            let (arena, offsets) = make_pools(program, blocks)?;
            pools = offsets.iter().map(|offset| arena.at(*offset)).collect();
            Ok((Box::new(arena) as Box<dyn Memory>, offsets))
        })?;
        let arrays = StepArrays::new(program.limits.tokens, program.limits.rows);
        let place = Box::new(Host::new(artifact.clone(), options, pools, &arrays)?);
        Ok(Engine { place, arrays, caches, weights: options.weights, artifact, slots: vec![] })
    }

    /// An engine whose steps run on a GPU. `progress` hears how many bytes of how many of the weights are there.
    ///
    /// # Errors
    /// Where the artifact has no code for that GPU, its memory does not suffice - before any is taken -, or its driver refuses.
    pub fn on_device(
        artifact: Arc<Artifact>,
        options: &EngineOptions,
        driver: Arc<dyn Driver>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Engine> {
        let program = &artifact.manifest().program;
        let name = format!("cuda:{}", driver.facts().index);
        let (mut loaded, mut pools) = (None, vec![]);
        let caches = Caches::new(program, (positions(program, options), options.window), |blocks| {
            let plan = MemoryPlan::new(program, blocks, device::largest_grid(driver.facts()))?;
            let (bytes, offsets) = (plan.caches, plan.cache_offsets.clone());
            loaded = Some(Loaded::new(driver.clone(), artifact.clone(), plan, progress)?);
            let memory = DeviceMemory::new(&driver, "caches", bytes)?;
            pools = offsets.iter().map(|offset| memory.at(*offset)).collect();
            Ok((Box::new(memory) as Box<dyn Memory>, offsets))
        });
        let caches = caches.map_err(|e| e.at(name.clone()))?;
        let Some(loaded) = loaded else { bail!(Internal, "caches without memory") };
        let addresses = Addresses { arena: loaded.arena(), pools, weights: loaded.weights(), arrays: loaded.arrays() };
        let variants = addresses.bind(program);
        let place = Box::new(loaded.bind(&variants, options.profile).map_err(|e| e.at(name))?);
        let arrays = StepArrays::new(program.limits.tokens, program.limits.rows);
        Ok(Engine { place, arrays, caches, weights: WeightPages::Mapped, artifact, slots: vec![] })
    }

    /// Where packed weight number `index` of the program lies, of an engine on a GPU.
    pub fn weight_address(&self, index: usize) -> Option<Address> {
        self.place.weight(index)
    }

    /// Where steps run: `cpu`, `cuda:0 (NVIDIA H200)`.
    pub fn device(&self) -> String {
        self.place.name()
    }

    /// What it runs.
    pub fn artifact(&self) -> &Arc<Artifact> {
        &self.artifact
    }

    /// Bounds of one step and of a sequence.
    pub fn limits(&self) -> &Limits {
        &self.program().limits
    }

    /// Workers; of a GPU multiprocessors.
    pub fn threads(&self) -> usize {
        self.place.threads()
    }

    /// Where kernels read weights from: [`WeightPages::Mapped`] or [`WeightPages::Huge`].
    pub fn weight_pages(&self) -> WeightPages {
        self.weights
    }

    /// How full the caches are: one entry for each group of layers that see the same window; none without caches.
    pub fn cache_use(&self) -> Vec<CacheUse> {
        self.caches.usage()
    }

    /// An empty sequence.
    pub fn new_sequence(&mut self) -> SequenceId {
        let empty = self.caches.empty();
        self.insert(empty)
    }

    /// A sequence with the same tokens. They share cache blocks; one in which both go on is copied when that happens.
    ///
    /// # Errors
    /// Where the sequence has been released.
    pub fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        let twin = self.caches.share(find(&self.slots, sequence)?);
        Ok(self.insert(twin))
    }

    /// A sequence with the same tokens in cache blocks of its own.
    ///
    /// # Errors
    /// Where the sequence has been released or there are too few cache blocks free.
    pub fn duplicate(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        let copy = self.caches.copy(find(&self.slots, sequence)?)?;
        Ok(self.insert(copy))
    }

    /// Tokens the sequence has.
    ///
    /// # Errors
    /// Where the sequence has been released.
    pub fn length(&self, sequence: SequenceId) -> Result<usize> {
        let sequence = self.sequence(sequence)?;
        Ok(sequence.length + sequence.dropped)
    }

    /// The fewest tokens, beside none, to which [`Engine::truncate`] can cut the sequence: 1 where caches keep all. Caches of
    /// layers that see a window keep what the tokens of the last step and the 64 before it saw.
    ///
    /// # Errors
    /// Where the sequence has been released.
    pub fn shortest(&self, sequence: SequenceId) -> Result<usize> {
        let sequence = self.sequence(sequence)?;
        Ok(self.caches.shortest(sequence) + sequence.dropped)
    }

    /// Forgets all tokens but the first `length`.
    ///
    /// # Errors
    /// Where the sequence has been released, is shorter than that, or does not keep what a token after so few would see
    /// (see [`Engine::shortest`]).
    pub fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        let (found, shortest) = (self.length(sequence)?, self.shortest(sequence)?);
        if length > found {
            bail!(Usage, "expected a sequence of at least {length} tokens to cut to that, found {found}");
        }
        if length > 0 && length < shortest {
            let message = format!("expected at least {shortest} of {found} tokens to be left, or none, found {length}");
            let error = Error::new(Kind::Usage, message);
            return Err(error.help("layers that see a window keep no more than that: cut to 0 and begin again"));
        }
        let sequence = find_mut(&mut self.slots, sequence)?;
        let length = length.saturating_sub(sequence.dropped);
        self.caches.cut(sequence, length);
        Ok(())
    }

    /// Ends a sequence and frees its cache blocks.
    ///
    /// # Errors
    /// Where it has been released already.
    pub fn release(&mut self, sequence: SequenceId) -> Result<()> {
        self.truncate(sequence, 0)?;
        let slot = &mut self.slots[sequence.index as usize];
        *slot = Slot { generation: slot.generation.wrapping_add(1), sequence: None };
        Ok(())
    }

    /// Runs one ragged step: all of `work`, in one go.
    ///
    /// # Errors
    /// Before anything has changed, where the work is empty, exceeds [`Engine::limits`], has a token outside the vocabulary
    /// or needs more cache than is free.
    pub fn step(&mut self, work: &[Work<'_>]) -> Result<StepOutput<'_>> {
        self.step_for(work, Logits::All)
    }

    /// [`Engine::step`] of which only some logits must be exact.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step_for(&mut self, work: &[Work<'_>], logits: Logits) -> Result<StepOutput<'_>> {
        let variant = self.begin(work)?;
        self.place.run(variant, &self.arrays, logits, None)?;
        self.end(work)?;
        Ok(self.output())
    }

    /// [`Engine::step`] launch by launch, slowly, all logits exact: `watch` sees memory before and after each.
    ///
    /// # Errors
    /// As [`Engine::step`]; and those of `watch`, after which the step has not been.
    pub fn step_watched(
        &mut self,
        work: &[Work<'_>],
        watch: &mut dyn FnMut(Moment, &Watch<'_>) -> Result<()>,
    ) -> Result<StepOutput<'_>> {
        let mut step = self.step_slowly(work)?;
        while let Some(before) = step.watch() {
            watch(Moment::Before, &before)?;
            step.advance()?;
            watch(Moment::After, &step.last())?;
        }
        step.finish()
    }

    /// [`Engine::step`], all logits exact, whose launches are run one by one by the caller.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step_slowly<'e, 'w>(&'e mut self, work: &'w [Work<'w>]) -> Result<SlowStep<'e, 'w>> {
        let variant = self.begin(work)?;
        let sequences = work.iter().map(|w| find(&self.slots, w.sequence).cloned()).collect::<Result<_>>()?;
        Ok(SlowStep { engine: self, work, sequences, variant, launch: 0 })
    }

    /// Checks the work, takes cache blocks for it, and describes the step; gives the index of its variant.
    fn begin<'a>(&mut self, work: &[Work<'a>]) -> Result<usize> {
        self.check(work)?;
        for w in work {
            self.caches.grow(find_mut(&mut self.slots, w.sequence)?, w.tokens.len())?;
        }
        let segment = |w: &Work<'a>| {
            let Sequence { length, dropped, tables } = find(&self.slots, w.sequence)?;
            Ok(Segment { tokens: w.tokens, position: *length, dropped: *dropped, tables, rows: w.rows })
        };
        let segments: Vec<Segment<'_>> = work.iter().map(segment).collect::<Result<_>>()?;
        self.arrays.fill(&segments, self.artifact.manifest().program.limits.tile);
        match self.variant() {
            Some(variant) => Ok(variant),
            None => bail!(Internal, "no variant for {} tokens", self.arrays.tokens.len()),
        }
    }

    /// The tokens of the work are positions of their sequences now.
    pub(crate) fn end(&mut self, work: &[Work<'_>]) -> Result<()> {
        for w in work {
            find_mut(&mut self.slots, w.sequence)?.length += w.tokens.len();
        }
        Ok(())
    }

    /// Where the time of the last step went, for an engine made with [`EngineOptions::profile`].
    pub fn profile(&self) -> Option<StepProfile> {
        self.place.profile(self.variant()?)
    }

    /// Index of the variant of the last step.
    fn variant(&self) -> Option<usize> {
        let tokens = self.arrays.tokens.len();
        self.program().variants.iter().position(|variant| variant.tokens.contains(tokens))
    }

    /// Appends a prompt of any length, in steps of at most `limits().tokens`; returns the last step's output, whose one
    /// row is the last token's.
    ///
    /// # Errors
    /// As [`Engine::step`]; a prompt too long for the context or the cache fails before anything runs.
    pub fn prefill(&mut self, sequence: SequenceId, tokens: &[u32]) -> Result<StepOutput<'_>> {
        self.prefill_for(sequence, tokens, Logits::All)
    }

    /// [`Engine::prefill`] of which only some logits must be exact.
    ///
    /// # Errors
    /// As [`Engine::prefill`].
    pub fn prefill_for(&mut self, sequence: SequenceId, tokens: &[u32], logits: Logits) -> Result<StepOutput<'_>> {
        self.fits(sequence, tokens)?;
        let most = self.limits().tokens;
        let (first, last) = tokens.split_at(tokens.len().saturating_sub(1) / most * most);
        for chunk in first.chunks(most) {
            self.step(&[Work { sequence, tokens: chunk, rows: Rows::None }])?;
        }
        self.step_for(&[Work { sequence, tokens: last, rows: Rows::Last }], logits)
    }

    /// Appends tokens and gives `visit` every token's index and output row, in steps of at most `limits().rows`.
    ///
    /// # Errors
    /// As [`Engine::prefill`]; and those of `visit`.
    pub fn each_row(
        &mut self,
        sequence: SequenceId,
        tokens: &[u32],
        output: &str,
        mut visit: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.fits(sequence, tokens)?;
        let most = self.limits().tokens.min(self.limits().rows);
        let mut index = 0;
        for chunk in tokens.chunks(most) {
            let step = self.step(&[Work { sequence, tokens: chunk, rows: Rows::All }])?;
            for row in step.rows(output)?.iter() {
                visit(index, row)?;
                index += 1;
            }
        }
        Ok(())
    }

    /// Refuses what the context, the cache, or the vocabulary has no room for, before a first chunk runs.
    fn fits(&self, sequence: SequenceId, tokens: &[u32]) -> Result<()> {
        let most = self.limits().tokens;
        if self.artifact.manifest().model.encoder && tokens.len() > most {
            bail!(
                Usage,
                "expected a text of at most {most} tokens, which an encoder reads at once, found {}",
                tokens.len()
            );
        }
        self.check_work(&Work { sequence, tokens, rows: Rows::None })?;
        let needed = self.caches.needed(self.sequence(sequence)?, tokens.len(), most, &mut Copied::new());
        self.caches.check_free(&needed)
    }

    fn check(&self, work: &[Work<'_>]) -> Result<()> {
        let limits = self.limits();
        let tokens = work.iter().map(|w| w.tokens.len()).sum();
        let rows = work.iter().map(|w| w.rows.of(w.tokens.len())).sum();
        let figures = [
            ("sequences", work.len(), limits.sequences),
            ("tokens", tokens, limits.tokens),
            ("rows", rows, limits.rows),
        ];
        for (noun, found, most) in figures {
            if found > most {
                bail!(Usage, "expected a step of at most {most} {noun}, found {found}");
            }
        }
        if work.is_empty() {
            bail!(Usage, "expected at least one sequence in a step, found none");
        }
        for (i, w) in work.iter().enumerate() {
            self.check_work(w)?;
            if work[..i].iter().any(|v| v.sequence == w.sequence) {
                bail!(Usage, "a sequence occurs twice in a step");
            }
        }
        self.caches.check_free(&self.needed(work.iter().map(|w| (w.sequence, w.tokens.len())))?)
    }

    /// Cache blocks of each group that a step takes.
    fn needed(&self, work: impl Iterator<Item = (SequenceId, usize)>) -> Result<Vec<usize>> {
        let (mut needed, mut copied) = (vec![], Copied::new());
        for (sequence, tokens) in work {
            let more = self.caches.needed(self.sequence(sequence)?, tokens, tokens, &mut copied);
            needed.resize(more.len(), 0);
            needed.iter_mut().zip(more).for_each(|(needed, more)| *needed += more);
        }
        Ok(needed)
    }

    fn check_work(&self, work: &Work<'_>) -> Result<()> {
        let length = self.length(work.sequence)?;
        let (count, context) = (work.tokens.len(), self.limits().context);
        let model = &self.artifact.manifest().model;
        if count == 0 {
            bail!(Usage, "expected at least one token, found none");
        }
        if model.encoder && length > 0 {
            bail!(Usage, "an encoder reads a sequence at once: release this one and begin another");
        }
        if length.saturating_add(count) > context {
            let message = format!("{count} tokens after {length} exceed the context of {context}");
            return Err(Error::new(Kind::Usage, message).help("shorten the prompt or the history"));
        }
        if let Some(token) = work.tokens.iter().find(|t| **t as usize >= model.vocab) {
            bail!(Usage, "expected tokens below {}, found {token}", model.vocab);
        }
        Ok(())
    }

    pub(crate) fn output(&self) -> StepOutput<'_> {
        let counts = [self.arrays.tokens.len(), self.arrays.sequences.len(), self.arrays.rows.len()];
        StepOutput { engine: self, counts }
    }

    /// The caches, and what the sequence has of them.
    pub(crate) fn caches_of(&mut self, sequence: SequenceId) -> Result<(&mut Caches, &mut Sequence)> {
        Ok((&mut self.caches, find_mut(&mut self.slots, sequence)?))
    }

    /// So many tokens of a sequence see the same in one step as in a step each.
    pub(crate) fn steady(&self, sequence: SequenceId) -> Result<usize> {
        Ok(self.caches.steady(self.sequence(sequence)?))
    }

    /// Cache blocks that must become free before sequences can have so many tokens more, in the group that lacks most.
    pub(crate) fn lacking(&self, work: impl Iterator<Item = (SequenceId, usize)>) -> Result<usize> {
        Ok(self.caches.lacking(&self.needed(work)?))
    }

    pub(crate) fn program(&self) -> &Program {
        &self.artifact.manifest().program
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let index = self.slots.iter().position(|s| s.sequence.is_none()).unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[index].sequence = Some(sequence);
        SequenceId { index: index as u32, generation: self.slots[index].generation }
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        find(&self.slots, id)
    }
}

fn find(slots: &[Slot], id: SequenceId) -> Result<&Sequence> {
    let slot = slots.get(id.index as usize).filter(|s| s.generation == id.generation);
    slot.and_then(|s| s.sequence.as_ref()).ok_or_else(released)
}

fn find_mut(slots: &mut [Slot], id: SequenceId) -> Result<&mut Sequence> {
    let slot = slots.get_mut(id.index as usize).filter(|s| s.generation == id.generation);
    slot.and_then(|s| s.sequence.as_mut()).ok_or_else(released)
}

fn released() -> Error {
    Error::new(Kind::Usage, "the sequence has been released, or is another engine's")
}

/// What a step leaves behind, until the next one.
pub struct StepOutput<'a> {
    engine: &'a Engine,
    /// Tokens, sequences, rows of the step.
    counts: [usize; 3],
}

/// Rows of one output, `f32[count][width]` with some distance from row to row.
#[derive(Clone, Copy, Debug)]
pub struct OutputRows<'a> {
    values: &'a [f32],
    stride: usize,
    width: usize,
    count: usize,
}

impl<'a> StepOutput<'a> {
    /// The rows of the output of that name: `logits`; or `hidden` and `embedding` of an encoder. One for each row asked
    /// for in the order of the work, or for outputs by sequence one for each sequence.
    ///
    /// # Errors
    /// Where the model has no such output; lists those it has.
    pub fn rows(&self, name: &str) -> Result<OutputRows<'a>> {
        let program = self.engine.program();
        let Some(index) = program.outputs.iter().position(|o| o.name == name) else {
            let names: Vec<&str> = program.outputs.iter().map(|o| o.name.as_str()).collect();
            bail!(Usage, "expected one of the outputs {}, found `{name}`", names.join(", "));
        };
        let output = &program.outputs[index];
        let buffer = &program.buffers[output.buffer.0 as usize];
        let count = match buffer.rows {
            RowCount::Tokens => self.counts[0],
            RowCount::Sequences => self.counts[1],
            RowCount::Rows => self.counts[2],
        };
        let stride = buffer.row_bytes / 4;
        let values = self.engine.place.output(index, stride * count);
        Ok(OutputRows { values, stride, width: output.width, count })
    }

    /// Row `row` of `logits`.
    ///
    /// # Errors
    /// Where the model has no logits or the step no such row.
    pub fn logits(&self, row: usize) -> Result<&'a [f32]> {
        let rows = self.rows("logits")?;
        let count = rows.len();
        rows.row(row).ok_or_else(|| Error::new(Kind::Usage, format!("expected one of {count} rows, found {row}")))
    }
}

impl<'a> OutputRows<'a> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.count
    }

    /// No rows.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Row `index`, of the output's width.
    pub fn row(&self, index: usize) -> Option<&'a [f32]> {
        (index < self.count).then(|| &self.values[index * self.stride..][..self.width])
    }

    /// Every row.
    pub fn iter(&self) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let rows = *self;
        (0..rows.count).filter_map(move |index| rows.row(index))
    }
}

/// Positions that caches are made for.
fn positions(program: &Program, options: &EngineOptions) -> usize {
    options.positions.unwrap_or(program.limits.context)
}
