//! A GPU whose kernels run in the emulator: artifacts with PTX run on it end to end, with the runtime's own launches, memory,
//! cache blocks and batches.
//!
//! ```text
//! model --passes, ptx, artifact::write--> artifact --Engine::on_device--> launches --kernels by name--> emulator
//! ```
//!
//! What comes out is compared with the logits of an independent implementation, and with what the same artifact computes on a CPU.

#[path = "../../runtime/tests/support/gpu.rs"]
mod gpu;

use super::emulated;
use crate::artifact::{self, Contents};
use crate::cuda::emulator::SCHEDULES;
use crate::cuda::{self, ptx};
use crate::{compile_kernels, target};
use gpu::{Blocks, Kernels};
pub use gpu::{Gpu, facts};
use mansard_frontend as frontend;
use mansard_ir::artifact::Provenance;
use mansard_ir::plan::{Kernel, Program};
use mansard_ir::{TokenRange, Tuning, synthetic};
use mansard_passes::{self as passes, Event, Hooks, Options, State, manager};
use mansard_runtime::device::{Address, Driver, Entry, Shape};
use mansard_runtime::{
    Artifact, BatchOptions, Batcher, Engine, EngineOptions, Event as Answer, GenerateOptions, Logits, OpenOptions,
    Request, Rows, SamplerOptions, Work,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Blocks of a grid that are emulated at most; any grid is right.
const BLOCKS: u32 = 2;

/// The kernels of an artifact.
struct Emulated {
    kernels: BTreeMap<String, Kernel>,
    launches: usize,
}

impl Kernels for Emulated {
    fn launch(&mut self, _: &mut Blocks, entry: &Entry, shape: Shape, args: &[Address]) -> Result<(), String> {
        let source = match self.kernels.get(&entry.name) {
            Some(kernel) => cuda::emit(kernel, cuda::Chip::Sm90a).map_err(|e| e.to_string())?,
            None if entry.name == synthetic::KERNEL => cuda::synthetic::emit(),
            None => return Err("no such kernel".into()),
        };
        assert_eq!((entry.shared_bytes, entry.threads), (source.shared_bytes, cuda::THREADS), "`{}`", entry.name);
        self.launches += 1;
        let schedule = SCHEDULES[self.launches % SCHEDULES.len()];
        emulated::launch_source(&source, args, shape.blocks.min(BLOCKS), schedule)
    }
}

/// A GPU for one program.
pub fn gpu(program: &Program) -> Arc<Gpu> {
    let kernel = |spec: &mansard_ir::plan::KernelSpec| {
        let body = spec.body().unwrap();
        let range = body.range.unwrap_or(TokenRange { min: 1, max: program.limits.tokens });
        Kernel { name: spec.name.clone(), body, range, groups: program.groups.clone() }
    };
    gpu_of(&program.kernels.iter().map(kernel).collect::<Vec<_>>())
}

/// A GPU for some kernels.
pub fn gpu_of(kernels: &[Kernel]) -> Arc<Gpu> {
    let kernels = kernels.iter().map(|kernel| (kernel.name.clone(), kernel.clone())).collect();
    Arc::new(Gpu::new(facts(), Box::new(Emulated { kernels, launches: 0 })))
}

pub fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

/// A checkpoint of the goldens with code for this CPU and a GPU.
pub fn artifact(family: &str, synthetic: Option<u64>) -> (tempfile::TempDir, Arc<Artifact>) {
    let model = frontend::open(&golden(family), &frontend::Options::default()).unwrap();
    let host = target("x86-64-v3").unwrap();
    let mut options = Options::new(host.clone());
    options.limits.context = Some(512);
    let mut sink = |_: Event<'_>| {};
    let (state, _) = manager::run(passes::PIPELINE, State::new(model), &options, &mut Hooks::new(&mut sink)).unwrap();
    let plan = state.plan.unwrap();
    let image = compile_kernels(&plan.kernels, &host, &Tuning::default(), 1, &mut |_, _| {}).unwrap();
    let ptx = [("sm_90a".to_owned(), ptx::compile(&plan.kernels, "sm_90a").unwrap())];
    let contents = Contents {
        plan: &plan,
        info: &state.model.info,
        weights: &state.model.weights,
        images: &[(host, image)],
        ptx: &ptx,
        synthetic,
        provenance: &Provenance::default(),
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.mansard");
    artifact::write(&path, &contents, 1, &mut |_, _| {}).unwrap();
    let artifact = Artifact::open(&path, &OpenOptions::default()).unwrap();
    (folder, Arc::new(artifact))
}

fn options_of_engines() -> EngineOptions {
    EngineOptions { threads: Some(1), positions: Some(512), ..EngineOptions::default() }
}

pub fn on_gpu(artifact: &Arc<Artifact>) -> (Engine, Arc<Gpu>) {
    let gpu = gpu(&artifact.manifest().program);
    let engine = Engine::on_device(artifact.clone(), &options_of_engines(), gpu.clone(), &mut |_, _| {});
    (engine.unwrap_or_else(|e| panic!("{e}")), gpu)
}

fn tokens(family: &str) -> Vec<u32> {
    serde_json::from_slice(&std::fs::read(golden(family).join("tokens.json")).unwrap()).unwrap()
}

/// Largest difference from an independent implementation, in standard deviations of its logits.
fn distance(family: &str, output: &str) -> f32 {
    let ((_folder, artifact), tokens) = (artifact(family, None), tokens(family));
    let npy = std::fs::read(golden(family).join("logits.npy")).unwrap();
    let data = &npy[10 + usize::from(u16::from_le_bytes([npy[8], npy[9]]))..];
    let want: Vec<f32> = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let (mut engine, gpu) = on_gpu(&artifact);
    let sequence = engine.new_sequence();
    // An encoder sees all at once; others go on token by token, the last time with what was recorded.
    let last = if output == "hidden" { 0 } else { 3 };
    let (first, rest) = tokens.split_at(tokens.len() - last);
    let mut got: Vec<f32> = vec![];
    for tokens in std::iter::once(first).chain(rest.chunks(1)) {
        let step = engine.step(&[Work { sequence, tokens, rows: Rows::All }]).unwrap();
        got.extend(step.rows(output).unwrap().iter().flatten());
    }
    assert_eq!((got.len(), gpu.uses().replayed), (want.len(), last.saturating_sub(1)), "{family}");
    drop(engine);
    assert_eq!(gpu.left(), (0, 0), "{family}");
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

/// The answers to prompts with a common beginning, computed together.
fn answers(engine: Engine, tokens: &[u32], guesses: usize) -> Vec<Vec<u32>> {
    let mut batch = Batcher::new(engine, None, &BatchOptions { guesses, ..BatchOptions::default() }).unwrap();
    let sampler = SamplerOptions::greedy();
    let options = GenerateOptions { max_tokens: 6, sampler, stop_tokens: Some(vec![]), ..Default::default() };
    let mut submit = |end: usize| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let request = Request::new(tokens[..end].to_vec(), options.clone());
        batch.submit(request, Box::new(move |event| sender.send(event).is_ok())).unwrap();
        receiver
    };
    let events = [tokens.len(), tokens.len() - 2, 5].map(&mut submit);
    while batch.step() {}
    let token = |event| match event {
        Answer::Token { token, .. } => Some(token),
        Answer::Failed(error) => panic!("{error}"),
        Answer::Done { .. } | Answer::Prompt(_) => None,
    };
    events.iter().map(|events| events.try_iter().filter_map(token).collect()).collect()
}

/// Weights made up on a GPU are those made up on a CPU, byte by byte, and logits are what they should be.
#[test]
fn made_up_weights_are_the_same_everywhere() {
    for family in ["llama", "mixtral"] {
        let (_folder, artifact) = artifact(family, Some(5));
        assert!(artifact.sections().iter().all(|section| !section.name.starts_with("weights/")));
        let (mut on_gpu, gpu) = on_gpu(&artifact);
        let weights = &artifact.manifest().program.weights;
        for (index, spec) in weights.iter().enumerate() {
            let mut want = vec![0; spec.bytes];
            for fill in synthetic::fills(spec, index, 5).unwrap() {
                fill.write(0, &mut want[fill.at..fill.at + fill.bytes]);
            }
            let at = on_gpu.weight_address(index).unwrap();
            let mut found = vec![0; spec.bytes];
            gpu.finish(&mut [(at, &mut found)]).unwrap();
            assert!(found == want, "{family}: `{}`", spec.name);
        }
        let mut on_cpu = Engine::new(artifact.clone(), &options_of_engines()).unwrap();
        let [a, b] = [&mut on_gpu, &mut on_cpu].map(|engine| {
            let sequence = engine.new_sequence();
            engine.prefill(sequence, &[1, 2, 3]).unwrap().logits(0).unwrap().to_vec()
        });
        let largest = b.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        assert!(a.iter().all(|x| x.is_finite()) && largest > 0.1, "{family}: {largest}");
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-3 * largest), "{family}");
    }
}

/// Forks, rollback, a batch with shared prefixes and guesses: what a GPU computes leads to the CPU's tokens and logits.
#[test]
fn batches_and_rollback_are_those_of_a_cpu() {
    let ((_folder, artifact), tokens) = (artifact("llama", None), tokens("llama"));
    let (on_gpu, on_cpu) = (|| on_gpu(&artifact).0, || Engine::new(artifact.clone(), &options_of_engines()).unwrap());
    let prompt: Vec<u32> = tokens.iter().cycle().take(70).copied().collect();
    let want = answers(on_cpu(), &prompt, 0);
    assert!(want.iter().all(|answer| answer.len() == 6), "{want:?}");
    assert_eq!(answers(on_gpu(), &prompt, 2), want);
    let [gpu, cpu] = [on_gpu(), on_cpu()].map(|mut engine| {
        let mut all = vec![];
        let a = engine.new_sequence();
        all.extend(engine.prefill(a, &prompt).unwrap().logits(0).unwrap().to_vec());
        let (b, c) = (engine.fork(a).unwrap(), engine.duplicate(a).unwrap());
        engine.truncate(b, 66).unwrap();
        let work = |sequence, tokens, rows| Work { sequence, tokens, rows };
        let step =
            [work(a, &tokens[..1], Rows::Last), work(b, &tokens[1..4], Rows::All), work(c, &tokens[..1], Rows::Last)];
        let output = engine.step_for(&step, Logits::Largest(1)).unwrap();
        (0..5).for_each(|row| all.extend(output.logits(row).unwrap()));
        all
    });
    let (worst, largest) = gpu
        .iter()
        .zip(&cpu)
        .fold((0f32, 0f32), |(worst, largest), (a, b)| (worst.max((a - b).abs()), largest.max(b.abs())));
    assert!(gpu.len() == cpu.len() && worst <= 1e-3 * largest, "{worst} of {largest}");
}

/// Where a GPU fails in the middle of a batch, every request hears of it; where its memory is held, none begins.
#[test]
fn what_a_gpu_refuses_is_heard() {
    let (_folder, artifact) = artifact("llama", None);
    let (engine, gpu) = on_gpu(&artifact);
    let mut batch = Batcher::new(engine, None, &BatchOptions::default()).unwrap();
    let options = GenerateOptions {
        max_tokens: 6,
        sampler: SamplerOptions::greedy(),
        stop_tokens: Some(vec![]),
        ..Default::default()
    };
    let (sender, receiver) = std::sync::mpsc::channel();
    let request = Request::new(vec![1, 2, 3], options);
    batch.submit(request, Box::new(move |event| sender.send(event).is_ok())).unwrap();
    gpu.fail_after(3);
    while batch.step() {}
    let failed = receiver.try_iter().find_map(|event| if let Answer::Failed(e) = event { Some(e) } else { None });
    assert!(failed.is_some_and(|error| error.to_string().contains("has failed")));
    let gpu = self::gpu(&artifact.manifest().program);
    gpu.hold(facts().memory);
    let error = Engine::on_device(artifact, &options_of_engines(), gpu.clone(), &mut |_, _| {}).err().unwrap();
    assert!(error.exit_code() == 5 && gpu.uses().allocations == 0, "{error}");
}
