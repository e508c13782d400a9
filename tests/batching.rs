//! Batches against single streams: whatever else is in a step, whoever comes and goes, and however often cache blocks run
//! out, a request's tokens are those it gets alone, and in the end every cache block is free.

use mansard::driver::CompileOptions;
use mansard_ir::DType;
use mansard_runtime::{
    Artifact, BatchOptions, Batcher, Engine, EngineOptions, Event, Finish, GenerateOptions, Request, RequestId,
    SamplerOptions, Usage,
};
use mansard_tests::{compiled, here};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What a request has heard.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    /// By choice: tokens, and how they ended.
    choices: BTreeMap<usize, (Vec<u32>, Option<Finish>)>,
    usage: Usage,
    failed: Option<String>,
}

impl Heard {
    fn is_done(&self, choices: usize) -> bool {
        self.choices.values().filter(|(_, finish)| finish.is_some()).count() == choices
    }
}

fn submit(batcher: &mut Batcher, request: Request) -> (RequestId, Arc<Mutex<Heard>>) {
    let heard = Arc::new(Mutex::new(Heard::default()));
    let theirs = heard.clone();
    let sink = move |event| {
        let mut heard = theirs.lock().unwrap();
        match event {
            Event::Token { choice, token, .. } => heard.choices.entry(choice).or_default().0.push(token),
            Event::Done { choice, finish, usage, .. } => {
                heard.choices.entry(choice).or_default().1 = Some(finish);
                heard.usage = usage;
            }
            Event::Failed(error) => heard.failed = Some(error.to_string()),
        }
        true
    };
    (batcher.submit(request, Box::new(sink)).unwrap(), heard)
}

fn batcher(artifact: &Arc<Artifact>, positions: usize, options: &BatchOptions) -> Batcher {
    let engine = EngineOptions { threads: Some(2), positions: Some(positions), ..EngineOptions::default() };
    Batcher::new(Engine::new(artifact.clone(), &engine).unwrap(), None, options).unwrap()
}

struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }
}

/// What a request asks, to be asked twice.
#[derive(Clone, Debug)]
struct Ask {
    prompt: Vec<u32>,
    options: GenerateOptions,
    choices: usize,
}

impl Ask {
    /// One of a few beginnings, and an end of its own.
    fn random(random: &mut Random, vocab: usize) -> Ask {
        let (common, own, which) = (random.below(150), 1 + random.below(50), random.below(2));
        let beginning = (0..common).map(|i| ((i * i + which) % vocab) as u32);
        let mut prompt: Vec<u32> = beginning.collect();
        prompt.extend((0..own).map(|_| random.below(vocab) as u32));
        let sampler = SamplerOptions { seed: random.below(1000) as u64, ..SamplerOptions::plain() };
        let sampler = match random.below(4) {
            0 => SamplerOptions::greedy(),
            1 => SamplerOptions { top_k: 5, temperature: 0.7, ..sampler },
            2 => SamplerOptions { frequency_penalty: 0.5, repetition_penalty: 1.2, top_p: 0.9, ..sampler },
            _ => sampler,
        };
        let max_tokens = 1 + random.below(50);
        let options = GenerateOptions { max_tokens, sampler, stop_tokens: Some(vec![3]) };
        Ask { prompt, options, choices: if random.below(4) == 0 { 1 + random.below(3) } else { 1 } }
    }

    fn request(&self, client: u64) -> Request {
        Request { choices: self.choices, client, ..Request::new(self.prompt.clone(), self.options.clone()) }
    }
}

/// Nothing is held any more.
fn is_empty(batcher: &mut Batcher) {
    batcher.forget();
    let taken: Vec<usize> = batcher.engine().cache_use().iter().map(|group| group.taken).collect();
    assert!(taken.iter().all(|taken| *taken == 0), "cache blocks still taken: {taken:?}");
    let stats = batcher.stats();
    assert_eq!((stats.running, stats.waiting, stats.blocks_taken, stats.prefixes), (0, 0, 0, 0));
}

/// Guesses, as many as leave answers as they are, or none.
const GUESSING: BatchOptions = BatchOptions { running: None, piece: 128, share: true, guesses: 7 };

/// Random requests come at random times, some are cancelled; caches hold a few of them at once.
fn any_schedule(family: &str, kv: Option<DType>, seed: u64) {
    let options = CompileOptions { kv, ..CompileOptions::default() };
    any_schedule_of(family, &here().join("goldens").join(family), &options, seed);
}

fn any_schedule_of(family: &str, model: &Path, options: &CompileOptions, seed: u64) {
    let (_files, artifact) = compiled(model, options).unwrap();
    let vocab = artifact.manifest().model.vocab;
    let mut random = Random(seed);
    let asks: Vec<Ask> = (0..40).map(|_| Ask::random(&mut random, vocab)).collect();
    let alone: Vec<Heard> = asks
        .iter()
        .map(|ask| {
            let mut batcher = batcher(&artifact, 2048, &BatchOptions { share: false, ..BatchOptions::default() });
            let (_, heard) = submit(&mut batcher, ask.request(0));
            while batcher.step() {}
            is_empty(&mut batcher);
            let heard = heard.lock().unwrap().clone();
            assert!(heard.is_done(ask.choices) && heard.usage.cached == 0, "{heard:?}");
            heard
        })
        .collect();

    let options = if seed.is_multiple_of(2) { GUESSING } else { BatchOptions::default() };
    let mut batcher = batcher(&artifact, 640, &options);
    let mut open: Vec<(usize, RequestId, Arc<Mutex<Heard>>)> = vec![];
    let (mut next, mut cancelled) = (0, vec![]);
    loop {
        while next < asks.len() && batcher.pending() < 24 && random.below(3) > 0 {
            let (id, heard) = submit(&mut batcher, asks[next].request(random.below(3) as u64));
            open.push((next, id, heard));
            next += 1;
        }
        if random.below(20) == 0 && cancelled.len() < 5 && !open.is_empty() {
            let (index, id, _) = &open[random.below(open.len())];
            batcher.cancel(*id);
            cancelled.push(*index);
        }
        let more = batcher.step() || next < asks.len();
        assert!(batcher.stats().steps < 20_000, "{family}: {:?}", batcher.stats());
        if !more {
            break;
        }
    }
    for (index, _, heard) in open {
        let heard = heard.lock().unwrap();
        let (ask, alone) = (&asks[index], &alone[index]);
        assert_eq!(heard.failed, None, "{family}");
        assert!(heard.is_done(ask.choices) || cancelled.contains(&index), "{family}: request {index}: {heard:?}");
        for (choice, (tokens, finish)) in &heard.choices {
            let (expected, end) = &alone.choices[choice];
            assert!(
                if finish.is_some() { (tokens, finish) == (expected, end) } else { expected.starts_with(tokens) },
                "{family}: request {index}, choice {choice}: {tokens:?}, alone {expected:?}: {ask:?}"
            );
        }
    }
    let stats = batcher.stats().clone();
    println!("{family}: {} steps, {} preempted, {} evicted", stats.steps, stats.preempted, stats.evicted);
    assert!(stats.preempted > 0 && stats.evicted > 0 && stats.cached_tokens > 0 && stats.cancelled > 0, "{stats:?}");
    assert_eq!(stats.drafted > 0, options.guesses > 0);
    is_empty(&mut batcher);
}

/// A text that repeats itself takes fewer steps, and stays the same.
#[test]
fn guesses_save_steps() {
    let (_files, artifact) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let run = |options: &BatchOptions, sampler: SamplerOptions| {
        let mut batcher = batcher(&artifact, 2048, options);
        let prompt: Vec<u32> = (0..90).map(|i| i % 9 + 4).collect();
        // Only tokens of the prompt, and nearly always the same after the same.
        let logit_bias = (4..13).map(|token| (token, 60.0)).collect();
        let sampler = SamplerOptions { logit_bias, ..sampler };
        let options = GenerateOptions { max_tokens: 150, sampler, stop_tokens: Some(vec![]) };
        let (_, heard) = submit(&mut batcher, Request::new(prompt, options));
        while batcher.step() {}
        let stats = batcher.stats().clone();
        is_empty(&mut batcher);
        (heard.lock().unwrap().choices[&0].0.clone(), stats)
    };
    for sampler in [SamplerOptions::greedy(), SamplerOptions { temperature: 0.3, seed: 5, ..SamplerOptions::plain() }] {
        let ((plain, _), (guessed, stats)) = (run(&BatchOptions::default(), sampler.clone()), run(&GUESSING, sampler));
        assert!(plain == guessed && plain.len() == 150);
        println!("{} steps, {} guessed, {} right", stats.steps, stats.drafted, stats.accepted);
        assert_eq!(stats.steps + stats.accepted, 151, "one step for the prompt, and one for each token not guessed");
        // How many are made depends on what steps take; the first always is.
        assert!(stats.drafted > 0 && (stats.accepted > 0 || stats.drafted < 60), "{stats:?}");
    }
}

/// A second prompt computes its end only, and gets the logits that it would have got alone.
#[test]
fn a_common_beginning_is_computed_once() {
    let (_files, artifact) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let mut batcher = batcher(&artifact, 2048, &BatchOptions::default());
    let options = GenerateOptions { max_tokens: 1, sampler: SamplerOptions::greedy(), ..GenerateOptions::default() };
    let mut usage = |end: u32, length: u32| {
        let prompt = (0..200).map(|i| i * 5 % 96).chain((0..length).map(|_| end)).collect();
        let (_, heard) = submit(&mut batcher, Request::new(prompt, options.clone()));
        while batcher.step() {}
        let usage = heard.lock().unwrap().usage;
        (usage.prompt, usage.cached)
    };
    // Pieces of 128, 64 and 18; of 128 and 82, whose 64 are the same.
    assert_eq!(
        [usage(1, 10), usage(2, 10), usage(1, 10), usage(3, 40)],
        [(210, 0), (210, 192), (210, 192), (240, 192)]
    );
    assert_eq!(usage(4, 56), (256, 128), "the last piece is computed for its last row");
    // Together, one waits for what the other computes.
    let heard: Vec<_> = (0..4)
        .map(|i| {
            let prompt = (0..130).map(|i| i * 11 % 96).chain([i]).collect();
            submit(&mut batcher, Request::new(prompt, options.clone())).1
        })
        .collect();
    while batcher.step() {}
    let mut cached: Vec<usize> = heard.iter().map(|heard| heard.lock().unwrap().usage.cached).collect();
    cached.sort_unstable();
    assert_eq!(cached, [0, 128, 128, 128]);
    is_empty(&mut batcher);
}

#[test]
fn any_schedule_gives_the_tokens_of_one_stream() {
    any_schedule("llama", None, 1);
    any_schedule("llama", None, 2);
}

#[test]
fn any_schedule_with_windows() {
    any_schedule("gemma3", None, 3);
}

#[test]
fn any_schedule_with_experts_and_integer_caches() {
    any_schedule("mixtral", Some(DType::I8), 4);
}

/// Caches of int4, beside which a token's own cache block is kept in f16; heads of 32, which those need.
#[test]
fn any_schedule_with_int4_caches() {
    let folder = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(here().join("goldens/llama/config.json")).unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.replace("\"head_dim\": 16", "\"head_dim\": 32")).unwrap();
    let options = CompileOptions { kv: Some(DType::I4), synthetic_seed: Some(9), ..CompileOptions::default() };
    any_schedule_of("int4 caches", &path, &options, 7);
    any_schedule_of("int4 caches", &path, &options, 8);
}

/// Where there are matrix units, this one computes steps of 65 tokens and more otherwise.
#[test]
fn any_schedule_with_integer_weights() {
    any_schedule("quantized/gptq", None, 5);
    any_schedule("quantized/awq", Some(DType::I8), 6);
}
