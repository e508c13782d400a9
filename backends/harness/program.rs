//! Whole models as GPUs run them, emulated: the launches of a plan one after the other, as a runtime would make them.
//!
//! ```text
//! tokens of tests/goldens --steps: all but two, one, one--> launches over arena, packed weights, cache pools --> logits
//! ```
//!
//! What comes out is compared with the logits of an independent implementation.

use super::emulated;
use super::memory::{Memory, Pool, StepArrays};
use crate::{cuda, pack, target};
use cuda::Chip;
use cuda::emulator::{Code, SCHEDULES};
use mansard_frontend as frontend;
use mansard_ir::eval::Step;
use mansard_ir::layout::cache_block_bytes;
use mansard_ir::plan::{Arg, Plan, Variant};
use mansard_ir::{Model, text};
use mansard_passes::{self as passes, Event, Hooks, Options, State, manager};
use std::path::{Path, PathBuf};

/// Blocks of every grid.
const BLOCKS: u32 = 2;

/// Positions that the sequence has at most: those of one cache block.
const POSITIONS: usize = mansard_ir::layout::CACHE_BLOCK;

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn planned(family: &str) -> (Plan, Model) {
    let model = frontend::open(&golden(family), &frontend::Options::default()).unwrap();
    let mut options = Options::new(target("x86-64-v3").unwrap());
    options.limits.context = Some(512);
    let mut sink = |_: Event<'_>| {};
    let (state, _) = manager::run(passes::PIPELINE, State::new(model), &options, &mut Hooks::new(&mut sink)).unwrap();
    (state.plan.unwrap(), state.model)
}

/// A model in memory.
struct Machine {
    plan: Plan,
    code: Vec<Option<Code>>,
    arena: Memory,
    weights: Vec<Memory>,
    caches: Vec<Memory>,
}

impl Machine {
    fn new(plan: Plan, model: &Model) -> Machine {
        let program = &plan.program;
        let packed = |recipe: &mansard_ir::plan::Pack| {
            let (weight, mut bytes) = (model.weights.make(&recipe.recipe).unwrap(), vec![]);
            let sink = &mut |b: &[u8]| {
                bytes.extend_from_slice(b);
                Ok(())
            };
            pack::pack(&weight, 1, sink).unwrap();
            Memory::new(&bytes)
        };
        let pool = Pool::new(&Step::new(&[(0, POSITIONS)]), &program.groups);
        let cache = |ty: &str| {
            let bytes = cache_block_bytes(&text::parse_type(ty).unwrap()).unwrap();
            Memory::new(&vec![0; bytes * pool.blocks()])
        };
        Machine {
            code: plan.kernels.iter().map(|_| None).collect(),
            arena: Memory::new(&vec![0; program.arena_bytes]),
            weights: plan.packs.iter().map(packed).collect(),
            caches: program.caches.iter().map(|c| cache(&c.ty)).collect(),
            plan,
        }
    }

    /// One step of the only sequence, which had `past` positions; gives the rows of `output` for all its tokens.
    fn step(&mut self, past: usize, tokens: &[u32], output: &str) -> Vec<f32> {
        let (step, t) = (Step::new(&[(past, tokens.len())]), tokens.len());
        let pool = Pool::new(&step, &self.plan.program.groups);
        let mut tokens: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let (mut positions, mut rows) = (step.positions(), (0..t as i32).collect::<Vec<i32>>());
        let mut arrays =
            StepArrays::new(&step, rows.clone(), &pool, (self.plan.program.scratch_bytes, BLOCKS as usize));
        let args = arrays.args();
        let program = self.plan.program.clone();
        let of_step = |v: &&Variant| (v.tokens.min..=v.tokens.max).contains(&t);
        for (index, launch) in program.variants.iter().find(of_step).unwrap().launches.iter().enumerate() {
            let address = |arg: &Arg| match arg {
                Arg::Buffer(b) => self.arena.address() + program.buffers[b.0 as usize].offset,
                Arg::Weight(w) => self.weights[w.0 as usize].address(),
                Arg::Cache(c) => self.caches[c.0 as usize].address(),
                Arg::Tokens => tokens.as_mut_ptr() as usize,
                Arg::Positions => positions.as_mut_ptr() as usize,
                Arg::Rows => rows.as_mut_ptr() as usize,
            };
            let mut slots: Vec<u64> = launch.args.iter().map(address).map(|at| at as u64).collect();
            slots.push(std::ptr::from_ref(&args) as u64);
            let id = launch.kernel.0 as usize;
            let kernel = &self.plan.kernels[id];
            let code = self.code[id]
                .get_or_insert_with(|| Code::new(&cuda::emit(kernel, Chip::Sm90a).unwrap_or_else(|e| panic!("{e}"))));
            let launched = emulated::launch(code, &slots, BLOCKS, SCHEDULES[index % SCHEDULES.len()]);
            launched.unwrap_or_else(|fault| panic!("`{}`: {fault}", kernel.name));
        }
        let output = program.outputs.iter().find(|o| o.name == output).unwrap();
        let buffer = &program.buffers[output.buffer.0 as usize];
        let arena = self.arena.whole();
        let first = super::memory::GUARD * 64 + buffer.offset;
        let row = |row: usize| arena[first + row * buffer.row_bytes..][..4 * output.width].as_chunks::<4>().0;
        (0..t).flat_map(row).map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// Largest difference from an independent implementation, in standard deviations of its logits.
fn distance(family: &str, output: &str) -> f32 {
    let (plan, model) = planned(family);
    let tokens: Vec<u32> = serde_json::from_slice(&std::fs::read(golden(family).join("tokens.json")).unwrap()).unwrap();
    assert!(tokens.len() > 2 && tokens.len() <= POSITIONS, "{family}: {} tokens", tokens.len());
    let npy = std::fs::read(golden(family).join("logits.npy")).unwrap();
    let data = &npy[10 + usize::from(u16::from_le_bytes([npy[8], npy[9]]))..];
    let want: Vec<f32> = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mut machine = Machine::new(plan, &model);
    let mut got = vec![];
    // An encoder sees all at once.
    let ends =
        if output == "hidden" { vec![tokens.len()] } else { vec![tokens.len() - 2, tokens.len() - 1, tokens.len()] };
    let mut past = 0;
    for end in ends {
        got.extend(machine.step(past, &tokens[past..end], output));
        past = end;
    }
    assert_eq!(got.len(), want.len(), "{family}");
    let mean = want.iter().sum::<f32>() / want.len() as f32;
    let deviation = (want.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / want.len() as f32).sqrt();
    got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / deviation
}

#[test]
fn tiny_models_run_end_to_end() {
    for family in ["llama", "qwen3", "gemma3", "mixtral", "gpt2"] {
        let off = distance(family, "logits");
        assert!(off <= 2e-3, "{family}: {off} standard deviations");
    }
    let off = distance("bert", "hidden");
    assert!(off <= 2e-3, "bert: {off} standard deviations");
}
