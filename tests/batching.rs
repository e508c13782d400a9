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
            Event::Prompt(_) => {}
        }
        true
    };
    (batcher.submit(request, Box::new(sink)).unwrap(), heard)
}

fn engine(artifact: &Arc<Artifact>, positions: usize, window: Option<usize>) -> Engine {
    let options = EngineOptions { threads: Some(2), positions: Some(positions), window, ..EngineOptions::default() };
    Engine::new(artifact.clone(), &options).unwrap()
}

fn batcher(artifact: &Arc<Artifact>, positions: usize, options: &BatchOptions) -> Batcher {
    Batcher::new(engine(artifact, positions, None), None, options).unwrap()
}

/// What a schedule is tried with.
#[derive(Clone, Default)]
struct Setup {
    /// Only so many of the last positions are seen.
    window: Option<usize>,
    /// Contexts go on, with so many tokens of their beginning.
    shift: Option<usize>,
    /// Prompts and answers are so many times as long.
    longer: usize,
    /// A draft model guesses.
    draft: Option<Arc<Artifact>>,
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
    fn random(random: &mut Random, vocab: usize, setup: &Setup) -> Ask {
        let longer = setup.longer.max(1);
        let (common, own, which) = (random.below(150 * longer), 1 + random.below(50 * longer), random.below(2));
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
        let max_tokens = 1 + random.below(50 * longer);
        let options = GenerateOptions { max_tokens, sampler, stop_tokens: Some(vec![3]), shift: setup.shift };
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
    assert_eq!(stats.draft_blocks_taken, 0);
}

/// Guesses, as many as leave answers as they are, or none.
const GUESSING: BatchOptions = BatchOptions { running: None, piece: 128, share: true, guesses: 7, always_guess: true };

/// Random requests come at random times, some are cancelled; caches hold a few of them at once.
fn any_schedule(family: &str, kv: Option<DType>, seed: u64) {
    let options = CompileOptions { kv, ..CompileOptions::default() };
    any_schedule_of(family, &here().join("goldens").join(family), &options, seed, &Setup::default());
}

fn any_schedule_of(family: &str, model: &Path, options: &CompileOptions, seed: u64, setup: &Setup) {
    let (_files, artifact) = compiled(model, options).unwrap();
    let vocab = artifact.manifest().model.vocab;
    let mut random = Random(seed);
    let asks: Vec<Ask> = (0..40).map(|_| Ask::random(&mut random, vocab, setup)).collect();
    let alone: Vec<Heard> = asks
        .iter()
        .map(|ask| {
            let options = BatchOptions { share: false, ..BatchOptions::default() };
            let mut batcher = Batcher::new(engine(&artifact, 2048, setup.window), None, &options).unwrap();
            let (_, heard) = submit(&mut batcher, ask.request(0));
            while batcher.step() {}
            is_empty(&mut batcher);
            let heard = heard.lock().unwrap().clone();
            assert!(heard.is_done(ask.choices) && heard.usage.cached == 0, "{heard:?}");
            heard
        })
        .collect();

    let options = if seed.is_multiple_of(2) { GUESSING } else { BatchOptions::default() };
    let longer = 640 + 128 * setup.longer;
    let mut batcher = Batcher::new(engine(&artifact, longer, setup.window), None, &options).unwrap();
    if let Some(draft) = &setup.draft {
        // Of fewer positions than there are answers for.
        batcher = batcher.with_draft(engine(draft, 512, None)).unwrap();
    }
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
        let options = GenerateOptions { max_tokens: 150, sampler, stop_tokens: Some(vec![]), shift: None };
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
        assert!(stats.accepted > 40 && stats.drafted < 400, "{stats:?}");
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
    let (_folder, path) = config(&[("\"head_dim\": 16", "\"head_dim\": 32")]);
    let options = CompileOptions { kv: Some(DType::I4), synthetic_seed: Some(9), ..CompileOptions::default() };
    any_schedule_of("int4 caches", &path, &options, 7, &Setup::default());
    any_schedule_of("int4 caches", &path, &options, 8, &Setup { window: Some(64), ..Setup::default() });
}

/// Where there are matrix units, this one computes steps of 65 tokens and more otherwise.
#[test]
fn any_schedule_with_integer_weights() {
    any_schedule("quantized/gptq", None, 5);
    any_schedule("quantized/awq", Some(DType::I8), 6);
}

/// The tiny llama's configuration, changed.
fn config(changes: &[(&str, &str)]) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let mut config = std::fs::read_to_string(here().join("goldens/llama/config.json")).unwrap();
    let path = folder.path().join("config.json");
    for (from, to) in changes {
        assert!(config.contains(from));
        config = config.replace(from, to);
    }
    std::fs::write(&path, config).unwrap();
    (folder, path)
}

/// A context of 1024.
const LONG: (&str, &str) = ("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 1024");

/// Three heads for two workers: attention of long contexts is divided between them, and comes to the same however it is.
#[test]
fn any_schedule_with_an_odd_number_of_heads() {
    let heads = [
        ("\"num_attention_heads\": 4", "\"num_attention_heads\": 3"),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3"),
    ];
    let (_folder, path) = config(&[heads[0], heads[1], LONG]);
    let setup = Setup { longer: 4, ..Setup::default() };
    let options = CompileOptions { synthetic_seed: Some(9), ..CompileOptions::default() };
    any_schedule_of("odd heads", &path, &options, 17, &setup);
    any_schedule_of("odd heads", &path, &options, 18, &setup);
}

fn synthetic(path: &Path, seed: u64) -> (tempfile::TempDir, Arc<Artifact>) {
    compiled(path, &CompileOptions { synthetic_seed: Some(seed), ..CompileOptions::default() }).unwrap()
}

/// A vocabulary so large that several threads choose tokens: each is what it is alone, and by one thread.
#[test]
fn threads_share_what_is_chosen() {
    let (_folder, path) = config(&[("\"vocab_size\": 256", "\"vocab_size\": 65536")]);
    let (_files, artifact) = synthetic(&path, 9);
    let ask = |seed: u64| {
        let sampler = SamplerOptions { seed, top_k: 50 * (seed as usize % 2), min_p: 0.01, ..SamplerOptions::plain() };
        let options = GenerateOptions { max_tokens: 8, sampler, stop_tokens: Some(vec![]), shift: None };
        let prompt = (0..20).map(|i| 1 + i * seed as u32).collect();
        Ask { prompt, options, choices: 1 + seed as usize % 3 }
    };
    let alone = |seed| {
        let options = EngineOptions { threads: Some(1), positions: Some(2048), ..EngineOptions::default() };
        let engine = Engine::new(artifact.clone(), &options).unwrap();
        let mut batcher = Batcher::new(engine, None, &BatchOptions::default()).unwrap();
        let (_, heard) = submit(&mut batcher, ask(seed).request(0));
        while batcher.step() {}
        heard.lock().unwrap().clone()
    };
    let mut batcher = batcher(&artifact, 4096, &BatchOptions::default());
    let together: Vec<_> = (0..8).map(|seed| submit(&mut batcher, ask(seed).request(0)).1).collect();
    while batcher.step() {}
    for (seed, heard) in together.iter().enumerate() {
        let (heard, alone) = (heard.lock().unwrap(), alone(seed as u64));
        assert!(heard.is_done(1 + seed % 3) && heard.choices == alone.choices, "{heard:?}, alone {alone:?}");
    }
    assert_eq!(batcher.stats().generated_tokens, (0..8).map(|seed| 8 * (1 + seed % 3)).sum::<u64>());
    is_empty(&mut batcher);
}

/// Contexts that are full go on.
#[test]
fn any_schedule_with_shifts() {
    let setup = Setup { shift: Some(20), longer: 2, ..Setup::default() };
    let options = CompileOptions::default();
    // Prompts of up to 400 tokens in a context of 256.
    any_schedule_of("shifts", &here().join("goldens/llama"), &options, 11, &setup);
    any_schedule_of("shifts", &here().join("goldens/llama"), &options, 12, &setup);
}

/// Only the first positions and the last are seen, guessed ahead or not.
#[test]
fn any_schedule_with_sinks() {
    let (_folder, path) = config(&[LONG]);
    let setup = Setup { window: Some(64), shift: Some(8), longer: 4, draft: None };
    let options = CompileOptions { synthetic_seed: Some(9), ..CompileOptions::default() };
    any_schedule_of("sinks", &path, &options, 13, &setup);
    any_schedule_of("sinks", &path, &options, 14, &setup);
}

/// A draft model guesses for all, whose caches are too small for all.
#[test]
fn any_schedule_with_a_draft_model() {
    let (_files, draft) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let setup = Setup { draft: Some(draft), shift: Some(20), longer: 2, ..Setup::default() };
    any_schedule_of("drafts", &here().join("goldens/llama"), &CompileOptions::default(), 16, &setup);
}

/// Answers, and what they took: with a draft model, or without.
fn drafted(
    target: &Arc<Artifact>,
    draft: Option<&Arc<Artifact>>,
    asks: &[Request],
) -> (Vec<Vec<u32>>, mansard_runtime::Stats) {
    let options = if draft.is_some() { GUESSING } else { BatchOptions::default() };
    let mut batcher = batcher(target, 4096, &options);
    if let Some(draft) = draft {
        batcher = batcher.with_draft(engine(draft, 4096, None)).unwrap();
    }
    let again = |ask: &Request| Request::new(ask.prompt.clone(), ask.options.clone());
    let mut heard = vec![];
    // Few at a time: beside a piece of a prompt nothing is guessed.
    for asks in asks.chunks(12) {
        heard.extend(asks.iter().map(|ask| submit(&mut batcher, again(ask)).1));
        while batcher.step() {}
    }
    is_empty(&mut batcher);
    let tokens = heard.iter().map(|heard| heard.lock().unwrap().choices[&0].0.clone());
    (tokens.collect(), batcher.stats().clone())
}

/// The model itself guesses right, another wrong; answers stay the same, drawn ones too.
#[test]
fn draft_models_save_steps() {
    let (_files, target) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let (_other_files, other) = synthetic(&here().join("goldens/llama/config.json"), 5);
    let asks: Vec<Request> = (0..6)
        .map(|i| {
            let sampler = SamplerOptions { seed: u64::from(i), repetition_penalty: 1.1, ..SamplerOptions::plain() };
            let sampler = if i % 2 == 0 { SamplerOptions::greedy() } else { sampler };
            // Nothing that comes before comes again, for lookups to guess.
            let prompt = (0..40 + 30 * i).map(|j| (j * 7 + i) % 250).collect();
            Request::new(prompt, GenerateOptions { max_tokens: 60, sampler, stop_tokens: Some(vec![]), shift: None })
        })
        .collect();
    let (plain, without) = drafted(&target, None, &asks);
    let (same, itself) = drafted(&target, Some(&target), &asks);
    let (wrong, another) = drafted(&target, Some(&other), &asks);
    println!("steps {} alone, {} with itself, {} with another", without.steps, itself.steps, another.steps);
    println!("right: {} of {}, {} of {}", itself.accepted, itself.drafted, another.accepted, another.drafted);
    assert!(plain == same && plain == wrong && plain.iter().all(|tokens| tokens.len() == 60));
    assert!(itself.accepted * 10 > itself.drafted * 8 && itself.steps * 2 < without.steps, "{itself:?}");
    assert!(another.accepted * 3 < another.drafted && another.draft_steps > 0, "{another:?}");
}

/// Two tokens drawn 3000 times, the second guessed by another model: as often as the model's own logits say (chi-square).
#[test]
fn draft_models_leave_the_distribution() {
    const DRAWS: usize = 3000;
    let (_files, target) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let (_other_files, draft) = synthetic(&here().join("goldens/llama/config.json"), 5);
    let prompt: Vec<u32> = vec![40, 11, 91, 7];
    // Six tokens may come.
    let choices: Vec<u32> = (10..16).collect();
    let logit_bias: Vec<(u32, f32)> = choices.iter().map(|token| (*token, 50.0)).collect();
    let asks: Vec<Request> = (0..DRAWS as u64)
        .map(|seed| {
            let sampler = SamplerOptions { seed, logit_bias: logit_bias.clone(), ..SamplerOptions::plain() };
            Request::new(
                prompt.clone(),
                GenerateOptions { max_tokens: 3, sampler, stop_tokens: Some(vec![]), shift: None },
            )
        })
        .collect();
    let (answers, stats) = drafted(&target, Some(&draft), &asks);
    assert!(stats.drafted as usize > DRAWS / 2 && stats.accepted > 0 && stats.accepted < stats.drafted, "{stats:?}");

    let mut engine = engine(&target, 2048, None);
    let mut shares = |tokens: &[u32]| {
        let sequence = engine.new_sequence();
        let row = engine.prefill(sequence, tokens).unwrap().logits(0).unwrap().to_vec();
        engine.release(sequence).unwrap();
        let weights: Vec<f64> = choices.iter().map(|token| f64::from(row[*token as usize]).exp()).collect();
        weights.iter().map(|weight| weight / weights.iter().sum::<f64>()).collect::<Vec<f64>>()
    };
    let first = shares(&prompt);
    let (mut chi_square, mut cells) = (0.0, 0);
    for (one, share) in choices.iter().zip(first) {
        for (two, then) in choices.iter().zip(shares(&[&prompt[..], &[*one]].concat())) {
            let expected = DRAWS as f64 * share * then;
            let found = answers.iter().filter(|answer| answer[..2] == [*one, *two]).count() as f64;
            if expected >= 5.0 {
                chi_square += (found - expected).powi(2) / expected;
                cells += 1;
            }
        }
    }
    println!("chi-square {chi_square:.1} of {cells} cells");
    // Four standard deviations above the mean.
    let freedom = f64::from(cells - 1);
    assert!(cells > 20 && chi_square < freedom + 4.0 * (2.0 * freedom).sqrt(), "{chi_square} of {cells} cells");
}

#[test]
fn drafts_of_another_vocabulary_are_refused() {
    let (_files, target) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let (_folder, path) = config(&[("\"vocab_size\": 256", "\"vocab_size\": 128")]);
    let (_other_files, other) = synthetic(&path, 5);
    let error = batcher(&target, 640, &GUESSING).with_draft(engine(&other, 640, None)).err().unwrap();
    assert!(error.exit_code() == 2 && error.message().contains("256 tokens, found 128"), "{error}");
    let none = batcher(&target, 640, &BatchOptions::default()).with_draft(engine(&target, 640, None)).err().unwrap();
    assert!(none.message().contains("at least one guess"), "{none}");
}

/// A context that is full goes on as one that begins with what is kept of it.
#[test]
fn a_shifted_context_is_one_that_begins_there() {
    let (_files, artifact) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let prompt: Vec<u32> = (0..200).map(|i| i * 5 % 250).collect();
    let greedy = |max_tokens, shift| {
        let stop_tokens = Some(vec![]);
        GenerateOptions { max_tokens, sampler: SamplerOptions::greedy(), stop_tokens, shift }
    };
    let alone = |prompt: &[u32], options: GenerateOptions| {
        let mut engine = engine(&artifact, 256, None);
        let sequence = engine.new_sequence();
        mansard_runtime::generate(&mut engine, sequence, prompt, &options, |_| Ok(true)).unwrap()
    };
    let whole = alone(&prompt, greedy(100, Some(16)));
    assert_eq!((whole.tokens.len(), whole.finish), (100, Finish::MaxTokens));
    let ended = alone(&prompt, greedy(100, None));
    assert_eq!((&ended.tokens[..], ended.finish), (&whole.tokens[..57], Finish::Context));
    // 257 tokens, of which the last was in no cache: 16 and the last 120 go on.
    let all = [&prompt[..], &whole.tokens[..57]].concat();
    let kept = [&all[..16], &all[all.len() - 120..]].concat();
    assert_eq!(alone(&kept, greedy(43, None)).tokens, whole.tokens[57..]);
    let mut batcher = batcher(&artifact, 512, &BatchOptions { piece: 512, ..BatchOptions::default() });
    let (_, heard) = submit(&mut batcher, Request::new(prompt.clone(), greedy(100, Some(16))));
    while batcher.step() {}
    assert_eq!(heard.lock().unwrap().choices[&0].0.len(), 100);
    is_empty(&mut batcher);
}
