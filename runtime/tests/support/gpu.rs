//! A GPU in this process's memory, which checks every use of it: what tests run engines on where no GPU is.
//!
//! It panics where a runtime would go wrong on a real one without noticing: addresses outside of what is allocated, or given
//! back; copies beyond an end; launches with too many arguments, too much shared memory or other threads than the code says;
//! anything but launches while launches are recorded. What kernels compute is [`Kernels`]' business.

use mansard_ir::{Error, Kind, Result};
use mansard_runtime::device::{Address, Driver, Entry, Facts, Function, Recorded, Shape};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes on either side of an allocation that nobody may write to.
const GUARD: usize = 256;
const CANARY: u8 = 0xA5;
/// What fresh memory holds: NaNs.
const FRESH: u8 = 0xFF;

/// What kernels do.
pub trait Kernels: Send {
    /// Runs one on memory, where its arguments lie.
    fn launch(&mut self, memory: &mut Blocks, entry: &Entry, shape: Shape, args: &[Address]) -> Result<(), String>;
}

/// Allocations by address.
#[derive(Default)]
pub struct Blocks(BTreeMap<Address, Block>);

struct Block {
    all: Vec<u8>,
    /// Where it begins in `all`, after the guard.
    begin: usize,
    bytes: usize,
}

impl Blocks {
    /// What lies from an address to the end of its allocation.
    pub fn from(&mut self, at: Address) -> &mut [u8] {
        let Some((first, block)) = self.0.range_mut(..=at).next_back() else { panic!("{at:#x} is nobody's memory") };
        let offset = (at - first) as usize;
        assert!(offset < block.bytes, "{at:#x} is {offset} bytes into an allocation of {}", block.bytes);
        &mut block.all[block.begin..][offset..block.bytes]
    }

    fn range(&mut self, at: Address, bytes: usize) -> &mut [u8] {
        let rest = self.from(at);
        assert!(bytes <= rest.len(), "{bytes} bytes from {at:#x}, {} are there", rest.len());
        &mut rest[..bytes]
    }
}

type Launch = (usize, Shape, Vec<Address>);

/// What has been asked of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Allocations ever made.
    pub allocations: usize,
    /// Kernels run.
    pub launches: usize,
    /// Recordings made.
    pub recorded: usize,
    /// Recordings run.
    pub replayed: usize,
    /// Bytes copied back.
    pub fetched: usize,
    /// Modules of machine code.
    pub cubins: usize,
}

/// The GPU.
pub struct Gpu {
    facts: Facts,
    state: Mutex<State>,
}

struct State {
    blocks: Blocks,
    kernels: Box<dyn Kernels>,
    functions: Vec<Entry>,
    recording: Option<Vec<Launch>>,
    recorded: Vec<Vec<Launch>>,
    pinned: Vec<(usize, usize)>,
    marks: BTreeMap<usize, usize>,
    uses: Uses,
    /// Launches after which every one fails.
    healthy: usize,
    /// Bytes that somebody else holds.
    held: usize,
}

/// Facts of a GPU such as an H100, with little memory.
pub fn facts() -> Facts {
    Facts {
        index: 0,
        name: "an emulated GPU".into(),
        capability: (9, 0),
        driver: (13, 0),
        processors: 3,
        shared_bytes: 163 << 10,
        memory: 256 << 20,
    }
}

impl Gpu {
    /// A GPU on which kernels do what `kernels` says.
    pub fn new(facts: Facts, kernels: Box<dyn Kernels>) -> Gpu {
        let state = State {
            blocks: Blocks::default(),
            kernels,
            functions: vec![],
            recording: None,
            recorded: vec![],
            pinned: vec![],
            marks: BTreeMap::new(),
            uses: Uses::default(),
            healthy: usize::MAX,
            held: 0,
        };
        Gpu { facts, state: Mutex::new(state) }
    }

    /// What has been asked of it.
    pub fn uses(&self) -> Uses {
        self.state().uses
    }

    /// Allocations and pinned memory that are still there.
    pub fn left(&self) -> (usize, usize) {
        let state = self.state();
        (state.blocks.0.len(), state.pinned.len())
    }

    /// Lets every launch fail after so many more.
    pub fn fail_after(&self, launches: usize) {
        let mut state = self.state();
        state.healthy = state.uses.launches + launches;
    }

    /// Another process takes memory.
    pub fn hold(&self, bytes: usize) {
        self.state().held = bytes;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing but launches may be recorded.
    fn idle(&self, what: &str) -> MutexGuard<'_, State> {
        let state = self.state();
        assert!(state.recording.is_none(), "{what} while launches are recorded");
        state
    }
}

impl State {
    fn run(&mut self, (function, shape, args): &Launch) -> Result<()> {
        args.iter().for_each(|at| _ = self.blocks.from(*at));
        if self.uses.launches >= self.healthy {
            return Err(Error::new(Kind::Io, "cuLaunchKernelEx: this test's GPU has failed"));
        }
        self.uses.launches += 1;
        let entry = &self.functions[*function];
        let ran = self.kernels.launch(&mut self.blocks, entry, *shape, args);
        ran.map_err(|fault| Error::new(Kind::Internal, format!("`{}`: {fault}", entry.name)))
    }
}

impl Driver for Gpu {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_memory(&self) -> Result<usize> {
        let state = self.state();
        let taken: usize = state.blocks.0.values().map(|block| block.bytes).sum();
        Ok(self.facts.memory.saturating_sub(taken + state.held))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let free = self.free_memory()?;
        let mut state = self.idle("memory is allocated");
        if bytes > free {
            return Err(Error::new(Kind::Io, "cuMemAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY)"));
        }
        let mut all = vec![CANARY; bytes + 3 * GUARD];
        let begin = all.as_ptr().align_offset(GUARD) + GUARD;
        all[begin..begin + bytes].fill(FRESH);
        let at = all[begin..].as_mut_ptr().expose_provenance() as Address;
        state.blocks.0.insert(at, Block { all, begin, bytes });
        state.uses.allocations += 1;
        Ok(at)
    }

    fn free(&self, at: Address) {
        let Some(Block { all, begin, bytes }) = self.idle("memory is given back").blocks.0.remove(&at) else {
            panic!("{at:#x} is given back, which is no allocation");
        };
        let around = all[begin - GUARD..begin].iter().chain(&all[begin + bytes..][..GUARD]);
        assert!(around.copied().all(|byte| byte == CANARY), "an allocation of {bytes} bytes was written around");
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.idle("memory is cleared").blocks.range(at, bytes).fill(0);
        Ok(())
    }

    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()> {
        self.idle("memory is copied").blocks.range(to, from.len()).copy_from_slice(from);
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        let mut state = self.idle("memory is copied");
        let copied = state.blocks.range(from, bytes).to_vec();
        state.blocks.range(to, bytes).copy_from_slice(&copied);
        Ok(())
    }

    fn finish(&self, copies: &mut [(Address, &mut [u8])]) -> Result<()> {
        let mut state = self.idle("work is waited for");
        for (from, to) in copies {
            let (begin, end) = (to.as_ptr() as usize, to.as_ptr() as usize + to.len());
            for (first, last) in &state.pinned {
                let inside = *first <= begin && end <= *last;
                assert!(inside || end <= *first || begin >= *last, "a copy into memory that is pinned in part");
            }
            to.copy_from_slice(state.blocks.range(*from, to.len()));
            state.uses.fetched += to.len();
        }
        Ok(())
    }

    fn pin(&self, memory: &mut [u8]) -> Result<()> {
        let begin = memory.as_ptr() as usize;
        self.state().pinned.push((begin, begin + memory.len()));
        Ok(())
    }

    fn unpin(&self, memory: &mut [u8]) {
        let begin = memory.as_ptr() as usize;
        let mut state = self.state();
        let place = state.pinned.iter().position(|range| *range == (begin, begin + memory.len()));
        state.pinned.remove(place.expect("memory that was pinned"));
    }

    fn load(&self, code: &[u8], entries: &[Entry]) -> Result<Vec<Function>> {
        let mut state = self.idle("code is loaded");
        // What follows is text in machine code, too: it is nobody's but a test's.
        let machine_code = code.strip_prefix(b"\x7fELF");
        state.uses.cubins += usize::from(machine_code.is_some());
        let text = std::str::from_utf8(machine_code.unwrap_or(code)).expect("PTX");
        let mut functions = vec![];
        for entry in entries {
            let declared = text.split(&format!(".entry {}(", entry.name)).nth(1);
            let parameters = declared.and_then(|rest| rest.split(')').next());
            let parameters = parameters.unwrap_or_else(|| panic!("the code holds no `{}`", entry.name));
            let declared = parameters.matches(".param").count();
            // A kernel that is never launched is looked up with its step alone.
            let unused = entry.arguments == 1;
            assert!(declared == entry.arguments || unused, "`{}`: {declared} parameters: {entry:?}", entry.name);
            assert!(entry.shared_bytes <= self.facts.shared_bytes, "{entry:?}");
            functions.push(Function { id: state.functions.len(), resident: 2 });
            state.functions.push(entry.clone());
        }
        Ok(functions)
    }

    fn launch(&self, function: usize, shape: Shape, args: &[Address]) -> Result<()> {
        let mut state = self.state();
        let entry = state.functions.get(function).expect("a function");
        assert_eq!(entry.arguments, args.len(), "`{}`: arguments", entry.name);
        assert_eq!((entry.threads, entry.shared_bytes), (shape.threads as usize, shape.shared_bytes as usize));
        assert!(shape.blocks > 0, "`{}`: a grid without blocks", entry.name);
        args.iter().for_each(|at| _ = state.blocks.from(*at));
        let launch = (function, shape, args.to_vec());
        match &mut state.recording {
            Some(recording) => recording.push(launch),
            None => return state.run(&launch),
        }
        Ok(())
    }

    fn record(&self, launches: &mut dyn FnMut() -> Result<()>) -> Result<Recorded> {
        self.idle("recording is begun").recording = Some(vec![]);
        let launched = launches();
        let mut state = self.state();
        let recorded = state.recording.take().expect("a recording");
        launched?;
        state.recorded.push(recorded);
        state.uses.recorded += 1;
        Ok(Recorded(state.recorded.len() - 1))
    }

    fn replay(&self, recorded: Recorded) -> Result<()> {
        let mut state = self.idle("a recording is run");
        state.uses.replayed += 1;
        let launches = state.recorded[recorded.0].clone();
        launches.iter().try_for_each(|launch| state.run(launch))
    }

    fn mark(&self, mark: usize) -> Result<()> {
        let mut state = self.idle("time is taken");
        let now = state.uses.launches;
        state.marks.insert(mark, now);
        Ok(())
    }

    fn seconds(&self, from: usize, to: usize) -> Result<f64> {
        let state = self.state();
        Ok(1e-6 * (state.marks[&to] - state.marks[&from]) as f64)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gpu")
    }
}
