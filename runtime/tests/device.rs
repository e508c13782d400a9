//! Engines on a GPU in memory, which checks every use: the model that counts gives what it gives on workers.
#![cfg(target_arch = "x86_64")]

#[path = "support/gpu.rs"]
mod gpu;
mod support;

use gpu::{Blocks, Gpu, Kernels, Uses, facts};
use mansard_ir::artifact::{Cubin, PtxCode};
use mansard_runtime::device::{Address, Driver, Entry, Facts, Shape};
use mansard_runtime::{
    Engine, EngineOptions, GenerateOptions, Logits, Model, Rows, SamplerOptions, SequenceId, Work, generate,
};
use std::sync::Arc;

/// What the machine code of `support` does.
struct Counting;

fn words(bytes: &[u8]) -> impl Iterator<Item = i64> {
    bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b))
}

fn ints(blocks: &mut Blocks, at: i64, count: i64) -> Vec<usize> {
    let bytes = &blocks.from(at as Address)[..4 * count as usize];
    bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b) as usize).collect()
}

fn put(blocks: &mut Blocks, at: Address, index: usize, word: [u8; 4]) {
    blocks.from(at)[4 * index..][..4].copy_from_slice(&word);
}

impl Kernels for Counting {
    fn launch(&mut self, blocks: &mut Blocks, entry: &Entry, _: Shape, args: &[Address]) -> Result<(), String> {
        let step: Vec<i64> = words(&blocks.from(*args.last().unwrap())[..120]).collect();
        let [t, _, r, tiles, stride, tokens, _, rows, slots, tile, tables, ..] = step[..] else { panic!("a step") };
        match entry.name.as_str() {
            "count" => {
                let (tokens, rows) = (ints(blocks, tokens, t), ints(blocks, rows, r));
                for (row, token) in rows.iter().map(|row| tokens[*row]).enumerate() {
                    (0..8).for_each(|i| put(blocks, args[0], 16 * row + i, 0f32.to_le_bytes()));
                    put(blocks, args[0], 16 * row + (token + 1) % 8, 64f32.to_le_bytes());
                }
            }
            "tally" => {
                let (more, sum) = (ints(blocks, args[1] as i64, 1)[0], ints(blocks, args[0] as i64, 1)[0]);
                put(blocks, args[0], 0, ((more + sum) as i32).to_le_bytes());
            }
            "remember" => {
                let (slots, tokens) = (ints(blocks, slots, t), ints(blocks, args[1] as i64, t));
                slots.iter().zip(tokens).for_each(|(slot, token)| {
                    put(blocks, args[0], *slot, (token as i32).to_le_bytes());
                });
            }
            "recall" => {
                for tile in ints(blocks, tile, 4 * tiles).chunks(4) {
                    let table = ints(blocks, tables + 4 * stride * tile[2] as i64, stride);
                    let sum = |p: usize, blocks: &mut Blocks| {
                        ints(blocks, args[0] as i64 + 4 * (table[p / 64] * 64 + p % 64) as i64, 1)[0]
                    };
                    let sum: usize = (0..tile[3]).map(|p| sum(p, blocks)).sum();
                    put(blocks, args[1], 16 * tile[2], (sum as f32).to_le_bytes());
                }
            }
            other => return Err(format!("there is no `{other}`")),
        }
        Ok(())
    }
}

const PTX: &str = "\
.visible .entry count(.param .u64 a, .param .u64 step)
.visible .entry tally(.param .u64 a, .param .u64 b, .param .u64 step)
.visible .entry remember(.param .u64 a, .param .u64 b, .param .u64 step)
.visible .entry recall(.param .u64 a, .param .u64 b, .param .u64 step)
";

fn model(with_ptx: bool) -> Model {
    let mut parts = if with_ptx { parts() } else { support::counting_parts() };
    Model::open(parts.write().path()).unwrap()
}

/// The model that counts, with PTX.
fn parts() -> support::Parts {
    let mut parts = support::counting_parts();
    let code = PtxCode {
        section: "code/sm_90a".into(),
        chip: "sm_90a".into(),
        version: "9.0".into(),
        threads: 256,
        shared_bytes: vec![0, 64 << 10, 128, 0],
        cubin: None,
    };
    parts.manifest.ptx.push(code);
    let mut text = PTX.as_bytes().to_vec();
    text.resize(text.len().next_multiple_of(64), b'\n');
    parts.sections.push(("code/sm_90a".into(), text));
    parts
}

/// The same with machine code beside PTX: `begins` is what it begins with.
fn with_machine_code(begins: &[u8]) -> mansard_ir::Result<Model> {
    let mut parts = parts();
    let mut code = [begins, PTX.as_bytes()].concat();
    code.resize(code.len().next_multiple_of(64), 0);
    parts.manifest.ptx[0].cubin = Some(Cubin { section: "cubin/sm_90a".into(), version: "13.0.88".into() });
    parts.sections.push(("cubin/sm_90a".into(), code));
    Model::open(parts.write().path())
}

fn gpu_with(facts: Facts) -> Arc<Gpu> {
    Arc::new(Gpu::new(facts, Box::new(Counting)))
}

fn options() -> EngineOptions {
    EngineOptions { threads: Some(1), positions: Some(512), ..EngineOptions::default() }
}

fn engine_on(gpu: &Arc<Gpu>, options: &EngineOptions) -> mansard_ir::Result<Engine> {
    Engine::on_device(model(true).artifact().clone(), options, gpu.clone(), &mut |_, _| {})
}

/// An engine of each kind, and the GPU.
fn both() -> ([Engine; 2], Arc<Gpu>) {
    let gpu = gpu_with(facts());
    ([model(true).engine(&options()).unwrap(), engine_on(&gpu, &options()).unwrap()], gpu)
}

fn rows(engine: &mut Engine, work: &[Work<'_>], logits: Logits) -> Vec<Vec<f32>> {
    let output = engine.step_for(work, logits).unwrap();
    ["logits", "sum"].iter().flat_map(|name| output.rows(name).unwrap().iter().map(<[f32]>::to_vec)).collect()
}

#[test]
fn steps_forks_and_rollback_are_those_of_workers() {
    let (mut engines, gpu) = both();
    let each: Vec<Vec<Vec<f32>>> = engines
        .iter_mut()
        .map(|engine| {
            let mut all = vec![];
            let (a, b) = (engine.new_sequence(), engine.new_sequence());
            let last = |sequence: SequenceId, tokens| Work { sequence, tokens, rows: Rows::Last };
            all.extend(rows(engine, &[last(b, &[1, 2, 3, 4, 5]), last(a, &[6])], Logits::All));
            let all_rows = Work { sequence: a, tokens: &[7, 3], rows: Rows::All };
            all.extend(rows(engine, &[all_rows], Logits::Largest(1)));
            // A shared cache block is copied before it is written, a duplicate's at once.
            let (c, d) = (engine.fork(b).unwrap(), engine.duplicate(b).unwrap());
            all.extend(rows(engine, &[last(b, &[1]), last(c, &[2, 2]), last(d, &[3])], Logits::All));
            engine.truncate(c, 3).unwrap();
            all.extend(rows(engine, &[last(c, &[7]), last(b, &[7])], Logits::All));
            engine.release(b).unwrap();
            all.extend(rows(engine, &[Work { sequence: a, tokens: &[1; 16], rows: Rows::None }], Logits::All));
            all
        })
        .collect();
    assert_eq!(each[0], each[1]);
    assert_eq!(each[0].len(), 2 + 2 + 2 + 1 + 3 + 3 + 2 + 2 + 1);
    drop(engines);
    assert_eq!(gpu.left(), (0, 0), "everything is given back");
}

#[test]
fn generation_is_that_of_workers() {
    let (engines, _) = both();
    let [host, device] = engines.map(|mut engine| {
        let sequence = engine.new_sequence();
        let sampler = SamplerOptions { temperature: 1.0, seed: 3, ..SamplerOptions::default() };
        let options = GenerateOptions { max_tokens: 60, sampler, stop_tokens: Some(vec![]), ..Default::default() };
        generate(&mut engine, sequence, &[3; 40], &options, |_| Ok(true)).unwrap().tokens
    });
    assert_eq!(host, device);
    assert_eq!(host.len(), 60);
}

#[test]
fn a_step_is_recorded_the_second_time_it_comes() {
    let gpu = gpu_with(facts());
    let mut engine = engine_on(&gpu, &options()).unwrap();
    assert_eq!((engine.device(), engine.threads()), ("cuda:0 (an emulated GPU)".into(), 3));
    let allocations = gpu.uses().allocations;
    let sequence = engine.new_sequence();
    let mut step = |tokens: usize| {
        let before = gpu.uses();
        engine.step(&[Work { sequence, tokens: &vec![1; tokens], rows: Rows::Last }]).unwrap();
        let Uses { recorded, replayed, launches, fetched, .. } = gpu.uses();
        assert_eq!(launches - before.launches, 5);
        // One row of logits, one of sums and one of the tally.
        assert_eq!(fetched - before.fetched, 3 * 64);
        (recorded - before.recorded, replayed - before.replayed)
    };
    // Of one token twice, then of three and four, which are one kind of step.
    assert_eq!(
        [1, 1, 1, 3, 4, 3, 2, 16, 9].map(&mut step),
        [(0, 0), (1, 1), (0, 1), (0, 0), (1, 1), (0, 1), (0, 0), (0, 0), (1, 1)]
    );
    assert_eq!(gpu.uses().allocations, allocations, "steps allocate nothing");
}

#[test]
fn profiles_take_the_time_of_every_launch() {
    let gpu = gpu_with(facts());
    let mut engine = engine_on(&gpu, &EngineOptions { profile: true, ..options() }).unwrap();
    let sequence = engine.new_sequence();
    for _ in 0..3 {
        engine.step(&[Work { sequence, tokens: &[1], rows: Rows::Last }]).unwrap();
    }
    let profile = engine.profile().unwrap();
    assert_eq!((profile.variant, profile.launches.len(), gpu.uses().recorded), (0, 5, 0));
    assert!((profile.seconds - 5e-6).abs() < 1e-12 && profile.launches.iter().all(|l| l.busy > 0.0), "{profile:?}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_allocated() {
    let gpu = gpu_with(Facts { memory: 40 << 10, ..facts() });
    let options = EngineOptions { positions: Some(1 << 16), ..options() };
    let error = engine_on(&gpu, &options).err().unwrap();
    assert_eq!((error.exit_code(), gpu.uses().allocations), (5, 0));
    assert!(error.to_string().starts_with("cuda:0: expected 0.3 MB (weights 0.0 MB, activations"), "{error}");
    assert!(error.advice().unwrap().contains("fewer positions"), "{error:?}");
    let gpu = gpu_with(Facts { memory: 1 << 30, ..facts() });
    gpu.hold((1 << 30) - 1000);
    let error = engine_on(&gpu, &options).err().unwrap();
    assert!(error.advice().unwrap().contains("are held, by other processes"), "{error:?}");
    assert_eq!(gpu.uses().allocations, 0);
}

#[test]
fn code_that_the_gpu_does_not_run_is_refused() {
    let refused = |facts: Facts| {
        let gpu = gpu_with(facts);
        let error = engine_on(&gpu, &options()).err().unwrap();
        assert_eq!((error.exit_code(), gpu.uses().allocations), (4, 0));
        error.to_string()
    };
    assert!(refused(Facts { capability: (7, 5), ..facts() }).contains("expected 8.0 (A100) or later"));
    assert!(refused(Facts { driver: (12, 4), ..facts() }).contains("CUDA 12.4, expected 13.0 or later for PTX 9.0"));
    assert!(refused(Facts { capability: (8, 0), ..facts() }).contains("has code for sm_90a"));
    let gpu = gpu_with(Facts { shared_bytes: 48 << 10, ..facts() });
    let error = engine_on(&gpu, &options()).err().unwrap();
    assert!(error.message().contains("`tally` needs 65536 bytes of shared memory, the GPU has 49152"), "{error}");
    assert_eq!(gpu.left(), (0, 0));
    let gpu = gpu_with(facts());
    let error = Engine::on_device(model(false).artifact().clone(), &options(), gpu, &mut |_, _| {}).err().unwrap();
    assert_eq!(error.message(), "the artifact has no code for GPUs");
    assert!(error.advice().unwrap().contains("--target native,sm_90a"));
}

#[test]
fn machine_code_is_taken_where_it_fits() {
    let model = with_machine_code(b"\x7fELF").unwrap();
    for (driver, cubins) in [((13, 0), 1), ((14, 1), 1)] {
        let gpu = gpu_with(Facts { driver, ..facts() });
        let mut engine = Engine::on_device(model.artifact().clone(), &options(), gpu.clone(), &mut |_, _| {}).unwrap();
        let sequence = engine.new_sequence();
        engine.step(&[Work { sequence, tokens: &[1], rows: Rows::Last }]).unwrap();
        assert_eq!(gpu.uses().cubins, cubins);
    }
    let gpu = gpu_with(facts());
    drop(engine_on(&gpu, &options()).unwrap());
    assert_eq!(gpu.uses().cubins, 0, "PTX, where there is nothing else");
    let error = with_machine_code(b"PELF").err().unwrap();
    assert!(error.exit_code() == 3 && error.to_string().contains("expected an ELF file in section `cubin/sm_90a`"));
}

#[test]
fn an_engine_whose_gpu_failed_says_so() {
    let gpu = gpu_with(facts());
    let mut engine = engine_on(&gpu, &options()).unwrap();
    let sequence = engine.new_sequence();
    let work = [Work { sequence, tokens: &[1, 2], rows: Rows::Last }];
    engine.step(&work).unwrap();
    gpu.fail_after(3);
    let error = engine.step(&work).err().unwrap();
    assert!(error.to_string().contains("cuda:0: ") && error.message().contains("has failed"), "{error}");
    assert_eq!(engine.length(sequence).unwrap(), 2, "the step has not been");
    gpu.fail_after(1000);
    let error = engine.step(&work).err().unwrap();
    assert!(error.message().contains("open the artifact again"), "{error}");
    drop(engine);
    assert_eq!(gpu.left(), (0, 0));
}

#[test]
fn weights_are_copied_with_progress() {
    let mut heard = vec![];
    let gpu = gpu_with(facts());
    Engine::on_device(model(true).artifact().clone(), &options(), gpu, &mut |done, of| heard.push((done, of))).unwrap();
    assert_eq!(heard, [(64, 64)]);
}

/// Wrong uses, each of which the GPU in memory must notice.
#[test]
fn wrong_uses_are_noticed() {
    let noticed = |what: &str, wrong: fn(&Gpu, Address, Shape)| {
        let gpu = gpu_with(facts());
        let at = gpu.allocate(100).unwrap();
        let entry = |name: &str, arguments| Entry { name: name.into(), threads: 256, shared_bytes: 64, arguments };
        gpu.load(PTX.as_bytes(), &[entry("count", 2), entry("recall", 3)]).unwrap();
        let shape = Shape { blocks: 1, threads: 256, shared_bytes: 64, dependent: false };
        let wrong = std::panic::AssertUnwindSafe(|| wrong(&gpu, at, shape));
        let panic = std::panic::catch_unwind(wrong).expect_err(what);
        let said = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(said.contains(what), "expected `{what}`, found `{said}`");
    };
    noticed("101 bytes from", |gpu, at, _| gpu.copy_in(at, &[0; 101]).unwrap());
    noticed("100 bytes into an allocation of 100", |gpu, at, shape| gpu.launch(0, shape, &[at, at + 100]).unwrap());
    noticed("arguments", |gpu, at, shape| gpu.launch(0, shape, &[at]).unwrap());
    noticed("nobody's memory", |gpu, at, _| {
        gpu.free(at);
        gpu.clear(at, 1).unwrap();
    });
    noticed("memory is allocated while", |gpu, _, _| _ = gpu.record(&mut || gpu.allocate(1).map(|_| ())));
    noticed("no allocation", |gpu, at, _| gpu.free(at + 1));
    noticed("without blocks", |gpu, at, shape| gpu.launch(0, Shape { blocks: 0, ..shape }, &[at, at]).unwrap());
    noticed("left: (256, 64)", |gpu, at, shape| {
        gpu.launch(0, Shape { shared_bytes: 65, ..shape }, &[at, at]).unwrap();
    });
    noticed("`count`: 2 parameters", |gpu, _, _| {
        let entry = Entry { name: "count".into(), threads: 256, shared_bytes: 0, arguments: 3 };
        gpu.load(PTX.as_bytes(), &[entry]).unwrap();
    });
}
