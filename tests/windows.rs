//! Caches of sliding windows, end to end: a model with two kinds of layers against the interpreter, and far beyond the
//! window against the same model whose caches keep every position, bit by bit.

use mansard::driver::CompileOptions;
use mansard_ir::eval::Interpreter;
use mansard_ir::{DType, Model, sample, text};
use mansard_passes::LimitsRequest;
use mansard_runtime::{Artifact, Engine, EngineOptions, OpenOptions, Rows, SequenceId, Work};
use mansard_tests::oracle;
use std::path::Path;
use std::sync::Arc;

const WINDOW: usize = 100;
const VOCAB: usize = 40;

/// Layers that see a window, and layers that see everything; `kept` goes into the types of the former's caches.
fn model(kept: &str) -> Model {
    let layer = |name: &str, kept: &str, window: usize| {
        format!(
            "graph @{name}(%x: f32[t, 32], %rope: f32[t, 16], %keys: keys<f16{kept}>[c, 1, 32], \
             %values: values<f16{kept}>[c, 1, 32], %step: step[s]) stage imported {{
               %n = rms_normalize %x {{eps = 1e-5}}
               %wq = weight \"q\" : f32[64, 32] %wk = weight \"k\" : f32[32, 32] %wv = weight \"v\" : f32[32, 32]
               %q0 = matmul %n, %wq %k0 = matmul %n, %wk %v0 = matmul %n, %wv
               %q1 = split_heads %q0 {{heads = 2}} %k1 = split_heads %k0 {{heads = 1}} %v = split_heads %v0 {{heads = 1}}
               %q = rope %q1, %rope {{pairing = \"half\"}} %k = rope %k1, %rope {{pairing = \"half\"}}
               %ks = append %keys, %k, %step %vs = append %values, %v, %step
               %a = attend %q, %ks, %vs, %step {{scale = 0.25, causal = true, window = {window}, softcap = 0}}
               %o = merge_heads %a %wo = weight \"o\" : f32[32, 64] %y = matmul %o, %wo %z = add %x, %y
               return x = %z, keys = %ks, values = %vs }}"
        )
    };
    let text = [
        format!(
            "graph @embed(%tokens: i32[t], %positions: i32[t]) stage imported {{ %table = weight \"embed\" : f32[{VOCAB}, 32]
               %x = embed %tokens, %table %f = weight \"frequencies\" : f32[8]
               %rope = rope_table %positions, %f {{scale = 1}} return x = %x, rope = %rope }}"
        ),
        layer("local", kept, WINDOW),
        layer("global", "", 0),
        format!(
            "graph @head(%x: f32[t, 32], %rows: i32[r]) stage imported {{ %n = rms_normalize %x {{eps = 1e-5}}
               %last = select_rows %n, %rows %w = weight \"head\" : f32[{VOCAB}, 32] %logits = matmul %last, %w
               return logits = %logits }}
             model @windows {{
               info {{architecture = \"windows\", context = 16384, vocab = {VOCAB}, hidden = 32, encoder = false}}
               call @embed call @local with \"0.\" call @global with \"1.\" call @local with \"2.\" call @head
               output logits }}"
        ),
    ];
    let mut model = text::parse("windows", &text.join("\n")).unwrap_or_else(|e| panic!("{e}"));
    sample::fill_weights(&mut model, 3).unwrap();
    model
}

fn ring() -> Model {
    model(&format!(", window = {WINDOW}"))
}

fn engine(model: Model, positions: usize) -> (Model, Engine) {
    engine_with(model, positions, None, None)
}

fn engine_with(model: Model, positions: usize, kv: Option<DType>, window: Option<usize>) -> (Model, Engine) {
    let folder = tempfile::tempdir().unwrap();
    let (model, artifact) = artifact(model, folder.path(), kv);
    let options = EngineOptions { threads: Some(2), positions: Some(positions), window, ..EngineOptions::default() };
    (model, Engine::new(artifact, &options).unwrap())
}

fn artifact(model: Model, folder: &Path, kv: Option<DType>) -> (Model, Arc<Artifact>) {
    let path = folder.join("model.mansard");
    let limits = LimitsRequest { tokens: 256, rows: 64, ..LimitsRequest::default() };
    let options = CompileOptions { limits, kv, ..CompileOptions::default() };
    let target = mansard_backends::target("native").unwrap();
    let model = oracle::assemble(model, target, &options, &path).unwrap();
    (model, Arc::new(Artifact::open(&path, &OpenOptions::default()).unwrap()))
}

fn tokens(from: usize, count: usize) -> Vec<u32> {
    (from..from + count).map(|i| (i * i % 31 + i % 9) as u32).collect()
}

/// Logits of the last of some more tokens.
fn go_on(engine: &mut Engine, sequence: SequenceId, tokens: &[u32]) -> Vec<f32> {
    let output = engine.step(&[Work { sequence, tokens, rows: Rows::Last }]).unwrap();
    output.logits(0).unwrap().to_vec()
}

/// Cache blocks taken in each group: those that keep everything, then those with a window.
fn taken(engine: &Engine) -> [usize; 2] {
    let [all, windows] = engine.cache_use()[..] else { panic!("expected two cache groups") };
    assert_eq!((all.window, windows.window), (0, WINDOW));
    assert_eq!(windows.block_bytes, 2 * all.block_bytes);
    [all.taken, windows.taken]
}

#[test]
fn beyond_the_window_as_the_interpreter_says() {
    let (optimized, mut engine) = engine(ring(), 1024);
    let lengths = as_the_interpreter_says(&optimized, &mut engine, 5e-3, &STEPS, None);
    assert_eq!(lengths, [334, 204]);
    let blocks = |length: usize| length.div_ceil(64) - (length - 1 + 1 - WINDOW - 64) / 64;
    assert_eq!(taken(&engine), [6 + 4, blocks(lengths[0]) + blocks(lengths[1])]);
}

/// Layers of int4 caches, each with one of f16 for its last positions.
#[test]
fn int4_caches_as_the_interpreter_says() {
    let (optimized, mut engine) = engine_with(ring(), 1024, Some(DType::I4), None);
    // Where attention multiplies in bf16, some code of a later layer's cache comes out as its neighbour.
    as_the_interpreter_says(&optimized, &mut engine, 5e-2, &STEPS, None);
    let groups: Vec<(usize, usize)> = engine.cache_use().iter().map(|group| (group.window, group.taken)).collect();
    // Of 334 and 204 positions.
    assert_eq!(groups, [(0, 6 + 4), (64, 3 + 3), (WINDOW, 4 + 4)]);
    let bytes: Vec<usize> = engine.cache_use().iter().map(|group| group.block_bytes).collect();
    assert_eq!(bytes, [2 * 64 * 18, 6 * 64 * 64, 4 * 64 * 18]);
}

/// Tokens of two sequences in each step.
const STEPS: [[usize; 2]; 8] = [[70, 1], [130, 60], [1, 9], [40, 1], [1, 1], [1, 130], [90, 1], [1, 1]];

/// The first 64 positions and the last ones, as an interpreter that is told what to forget: in caches of f16 and int4, of layers
/// that see all and of layers that see a window by themselves.
#[test]
fn sinks_as_the_interpreter_says() {
    let more = [[100, 1], [1, 200], [64, 1], [1, 63], [130, 70], [1, 1], [3, 250], [1, 1], [1, 1]];
    let steps = [&STEPS[..], &more].concat();
    for (kv, tolerance) in [(None, 5e-3), (Some(DType::I4), 5e-2)] {
        let (optimized, mut engine) = engine_with(ring(), 1024, kv, Some(128));
        let lengths = as_the_interpreter_says(&optimized, &mut engine, tolerance, &steps, Some(128));
        assert_eq!(lengths, [636, 792]);
        let all = engine.cache_use()[0];
        assert!(all.window == 0 && all.taken <= 2 * (1 + 128 / 64 + 3), "{all:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(ring(), folder.path(), None).1;
    let options = EngineOptions { window: Some(WINDOW - 1), ..EngineOptions::default() };
    let error = Engine::new(artifact, &options).err().unwrap();
    assert!(error.exit_code() == 2 && error.message().contains("at least 100 positions"), "{error}");
}

/// Cutting back to where the same is seen gives the same; further back there is nothing.
#[test]
fn what_was_dropped_cannot_be_cut_back_to() {
    let (_, mut engine) = engine_with(model(""), 2048, None, Some(200));
    let sequence = engine.new_sequence();
    tokens(0, 700).chunks(50).for_each(|chunk| _ = go_on(&mut engine, sequence, chunk));
    let (fork, shortest) = (engine.fork(sequence).unwrap(), engine.shortest(sequence).unwrap());
    assert!((600..=650).contains(&shortest), "{shortest}");
    let error = engine.truncate(sequence, shortest - 1).unwrap_err();
    assert!(error.message().contains(&format!("at least {shortest} of 700")), "{error}");
    engine.truncate(sequence, 650).unwrap();
    go_on(&mut engine, sequence, &tokens(650, 50));
    assert!(go_on(&mut engine, sequence, &tokens(900, 1)) == go_on(&mut engine, fork, &tokens(900, 1)));
    engine.release(fork).unwrap();
    engine.release(sequence).unwrap();
    assert_eq!(engine.cache_use()[0].taken, 0);
}

/// Several steps of two sequences, whose logits are off by that share of the largest at most; gives their lengths.
fn as_the_interpreter_says(
    optimized: &Model,
    engine: &mut Engine,
    tolerance: f32,
    steps: &[[usize; 2]],
    recent: Option<usize>,
) -> [usize; 2] {
    let mut interpreter = Interpreter::new(optimized);
    let sequences = [engine.new_sequence(), engine.new_sequence()];
    let (mut lengths, mut dropped) = ([0, 0], [0, 0]);
    for step in steps {
        for (s, dropped) in dropped.iter_mut().enumerate() {
            let unseen = (lengths[s] + 1usize).saturating_sub(recent.unwrap_or(usize::MAX - 64) + 64) / 64;
            let before = std::mem::replace(dropped, unseen.saturating_sub(1) * 64);
            interpreter.forget(s, 64..64 + *dropped - before);
        }
        let new = [0, 1].map(|s| tokens(1000 * s + lengths[s], step[s]));
        let work = [0, 1].map(|s| Work { sequence: sequences[s], tokens: &new[s], rows: Rows::Last });
        let output = engine.step(&work).unwrap();
        let last = [step[0] - 1, step[0] + step[1] - 1];
        let want = interpreter.step(&[(0, &new[0]), (1, &new[1])], &last).unwrap().remove("logits").unwrap();
        let largest = want.data.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (row, want) in want.rows().enumerate() {
            for (found, want) in output.logits(row).unwrap().iter().zip(want) {
                assert!((found - want).abs() <= tolerance * largest, "{found}, not {want}, at {lengths:?} + {step:?}");
            }
        }
        lengths = [0, 1].map(|s| lengths[s] + step[s]);
    }
    lengths
}

#[test]
fn a_deep_context_takes_a_window_and_says_the_same() {
    let (_, mut all) = engine(model(""), 8704);
    let (_, mut ring) = engine(ring(), 8704);
    let sequences = [&mut all, &mut ring].map(|engine| engine.new_sequence());
    let prompt = tokens(0, 8192);
    let mut check = |tokens: &[u32]| {
        let [found, want] = [(&mut ring, sequences[1]), (&mut all, sequences[0])].map(|(e, s)| go_on(e, s, tokens));
        assert!(found == want, "after {}", all.length(sequences[0]).unwrap());
        if let [_, taken] = taken(&ring)[..] {
            assert!(taken <= (WINDOW + 64 + tokens.len()).div_ceil(64) + 1, "{taken} cache blocks");
        }
    };
    prompt.chunks(256).for_each(&mut check);
    tokens(8192, 300).chunks(1).for_each(&mut check);
    assert_eq!(taken(&ring), [133, 3]);
    assert_eq!(all.cache_use()[0].taken, 133);
}

#[test]
fn forks_and_rollbacks_around_the_window() {
    let (_, mut all) = engine(model(""), 4096);
    let (_, mut ring) = engine(ring(), 4096);
    let mut said = vec![];
    for engine in [&mut all, &mut ring] {
        let (a, mut rows) = (engine.new_sequence(), vec![]);
        for chunk in tokens(0, 500).chunks(125) {
            rows.push(go_on(engine, a, chunk));
        }
        let b = engine.fork(a).unwrap();
        let c = engine.duplicate(a).unwrap();
        // Drafts are taken back, of which one is a window long.
        for (sequence, count) in [(a, 5), (b, 110), (c, 1)] {
            rows.push(go_on(engine, sequence, &tokens(700, count)));
            engine.truncate(sequence, 500).unwrap();
            rows.push(go_on(engine, sequence, &tokens(500, 1)));
        }
        // And tokens that several steps brought, up to a cache block.
        for i in 0..64 {
            go_on(engine, a, &tokens(501 + i, 1));
        }
        engine.truncate(a, 501).unwrap();
        for (sequence, count) in [(a, 1), (b, 200), (c, 130)] {
            rows.push(go_on(engine, sequence, &tokens(900, count)));
            rows.push(go_on(engine, sequence, &tokens(901, 1)));
        }
        said.push(rows);
    }
    assert!(said[0] == said[1]);
    // Further back there is nothing any more, and a refusal changes nothing.
    let sequence = ring.new_sequence();
    ring.prefill(sequence, &tokens(0, 1000)).unwrap();
    let (shortest, before) = (ring.shortest(sequence).unwrap(), taken(&ring));
    let error = ring.truncate(sequence, shortest - 1).unwrap_err();
    assert!(error.exit_code() == 2 && error.message().contains(&format!("at least {shortest} of 1000")), "{error}");
    assert_eq!((ring.length(sequence).unwrap(), taken(&ring)), (1000, before));
    ring.truncate(sequence, shortest).unwrap();
    ring.truncate(sequence, 0).unwrap();
    let fresh = all.new_sequence();
    assert!(go_on(&mut ring, sequence, &tokens(0, 200)) == go_on(&mut all, fresh, &tokens(0, 200)));
}
