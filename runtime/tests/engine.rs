//! Engines over a model that counts, in machine code by hand: steps, caches, workers, generation.
#![cfg(target_arch = "x86_64")]

mod support;

use mansard_runtime::{
    Engine, EngineOptions, Finish, GenerateOptions, Message, Model, Rows, SamplerOptions, SequenceId, WeightPages,
    Work, generate,
};
use support::counting_parts;

fn engine(options: EngineOptions) -> Engine {
    Model::open(counting_parts().write().path()).unwrap().engine(&options).unwrap()
}

fn small(threads: usize) -> EngineOptions {
    EngineOptions { threads: Some(threads), positions: Some(256), ..EngineOptions::default() }
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()
}

/// Cache blocks that are free, and that there are.
fn blocks(engine: &Engine) -> (usize, usize) {
    let [all] = engine.cache_use()[..] else { panic!("expected one cache group") };
    assert_eq!((all.window, all.block_bytes), (0, 256));
    (all.total - all.taken, all.total)
}

/// The sum that the cache gives back after `tokens` more.
fn sum_after(engine: &mut Engine, sequence: SequenceId, tokens: &[u32]) -> f32 {
    let output = engine.step(&[Work { sequence, tokens, rows: Rows::None }]).unwrap();
    output.rows("sum").unwrap().row(0).unwrap()[0]
}

#[test]
fn a_ragged_step_gives_rows_in_order() {
    let mut engine = engine(small(2));
    let (a, b, c) = (engine.new_sequence(), engine.new_sequence(), engine.new_sequence());
    let work = [
        Work { sequence: b, tokens: &[1, 2, 3, 4, 5], rows: Rows::Last },
        Work { sequence: a, tokens: &[6], rows: Rows::None },
        Work { sequence: c, tokens: &[7, 3], rows: Rows::All },
    ];
    let output = engine.step(&work).unwrap();
    let next: Vec<usize> = output.rows("logits").unwrap().iter().map(argmax).collect();
    assert_eq!(next, [6, 0, 4]);
    let sums: Vec<f32> = output.rows("sum").unwrap().iter().map(|row| row[0]).collect();
    assert_eq!(sums, [15.0, 6.0, 10.0]);
    assert!(output.logits(3).is_err());
    let error = output.rows("hidden").unwrap_err();
    assert!(error.message().contains("logits, sum, tally"), "{error}");
    assert_eq!([a, b, c].map(|s| engine.length(s).unwrap()), [1, 5, 2]);
}

#[test]
fn every_worker_runs_every_launch() {
    for threads in [1, 2, 5] {
        for weights in [WeightPages::Mapped, WeightPages::Huge] {
            let mut engine = engine(EngineOptions { weights, ..small(threads) });
            assert_eq!((engine.threads(), engine.weight_pages()), (threads, weights));
            let sequence = engine.new_sequence();
            for steps in 1..50 {
                let output = engine.step(&[Work { sequence, tokens: &[1], rows: Rows::None }]).unwrap();
                let tally = output.rows("tally").unwrap().row(0).unwrap()[0].to_bits() as usize;
                assert_eq!(tally, steps * threads * 2 * 5);
            }
        }
    }
}

#[test]
fn pinned_engines_give_the_same() {
    for weights in [WeightPages::Mapped, WeightPages::Huge] {
        let mut engine = engine(EngineOptions { pin: true, weights, ..small(1) });
        let sequence = engine.new_sequence();
        let output = engine.prefill(sequence, &[1, 2, 3]).unwrap();
        assert_eq!(output.rows("sum").unwrap().row(0), Some(&[6.0][..]));
    }
    let open = Model::open(support::counting_parts().write().path()).unwrap();
    let options = EngineOptions { pin: true, threads: Some(1000), ..EngineOptions::default() };
    let error = open.engine(&options).err().unwrap();
    assert!(error.exit_code() == 2 && error.message().contains("processors"), "{error}");
}

#[test]
fn caches_follow_their_sequences() {
    let mut engine = engine(small(1));
    let (a, b) = (engine.new_sequence(), engine.new_sequence());
    let mut sums = [0.0, 0.0];
    for round in 0..50 {
        let tokens = [[round % 8, 1], [3, round % 5]];
        let work = [
            Work { sequence: a, tokens: &tokens[0], rows: Rows::None },
            Work { sequence: b, tokens: &tokens[1], rows: Rows::None },
        ];
        let output = engine.step(&work).unwrap();
        for i in 0..2 {
            sums[i] += tokens[i].iter().sum::<u32>() as f32;
            assert_eq!(output.rows("sum").unwrap().row(i).unwrap()[0], sums[i]);
        }
    }
    assert_eq!(blocks(&engine), (0, 4));
    let error = engine.step(&[Work { sequence: a, tokens: &[1; 16], rows: Rows::None }]);
    assert!(error.is_ok(), "100 + 16 positions fit into two cache blocks");
    engine.release(b).unwrap();
    assert_eq!(blocks(&engine), (2, 4));
    assert!(engine.release(b).is_err() && engine.length(b).is_err());
    let c = engine.new_sequence();
    assert!(engine.length(b).is_err(), "the place of a released sequence has another name");
    assert_eq!(sum_after(&mut engine, c, &[7, 7]), 14.0);
}

#[test]
fn truncation_rolls_back() {
    let mut engine = engine(small(1));
    let sequence = engine.new_sequence();
    for _ in 0..10 {
        sum_after(&mut engine, sequence, &[1; 13]);
    }
    assert_eq!(blocks(&engine), (1, 4));
    engine.truncate(sequence, 64).unwrap();
    assert_eq!((engine.length(sequence).unwrap(), blocks(&engine).0), (64, 3));
    assert_eq!(sum_after(&mut engine, sequence, &[2]), 66.0);
    engine.truncate(sequence, 10).unwrap();
    assert_eq!(sum_after(&mut engine, sequence, &[5]), 15.0);
    assert_eq!(engine.truncate(sequence, 12).unwrap_err().exit_code(), 2);
}

#[test]
fn forks_share_until_they_part() {
    let mut engine = engine(small(1));
    let a = engine.new_sequence();
    for _ in 0..7 {
        sum_after(&mut engine, a, &[1; 10]);
    }
    let b = engine.fork(a).unwrap();
    assert_eq!(blocks(&engine), (2, 4));
    assert_eq!(sum_after(&mut engine, b, &[5]), 75.0);
    assert_eq!(blocks(&engine).0, 1, "the half-filled cache block was copied");
    assert_eq!(sum_after(&mut engine, a, &[3]), 73.0);
    assert_eq!(sum_after(&mut engine, b, &[0]), 75.0);
    engine.truncate(b, 20).unwrap();
    assert_eq!(sum_after(&mut engine, b, &[7]), 27.0);
    assert_eq!(sum_after(&mut engine, a, &[0]), 73.0);
    engine.release(a).unwrap();
    assert_eq!(sum_after(&mut engine, b, &[0]), 27.0);
    engine.release(b).unwrap();
    assert_eq!(blocks(&engine), (4, 4));
}

#[test]
fn duplicates_share_nothing() {
    let mut engine = engine(small(1));
    let a = engine.new_sequence();
    for _ in 0..7 {
        sum_after(&mut engine, a, &[1; 10]);
    }
    let b = engine.duplicate(a).unwrap();
    assert_eq!(blocks(&engine), (0, 4));
    assert_eq!(sum_after(&mut engine, a, &[3]), 73.0);
    assert_eq!(sum_after(&mut engine, b, &[5]), 75.0);
    engine.truncate(b, 20).unwrap();
    assert_eq!((sum_after(&mut engine, b, &[7]), blocks(&engine).0), (27.0, 1));
    assert!(engine.duplicate(a).unwrap_err().message().contains("expected 2 free cache blocks"));
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let mut engine = engine(small(1));
    let (a, b) = (engine.new_sequence(), engine.new_sequence());
    let all = |sequence, tokens| Work { sequence, tokens, rows: Rows::All };
    let none = |sequence, tokens| Work { sequence, tokens, rows: Rows::None };
    let refusals: &[(&str, &[Work<'_>])] = &[
        ("at least one sequence", &[]),
        ("at least one token", &[none(a, &[])]),
        ("at most 16 tokens, found 17", &[none(a, &[1; 17])]),
        ("at most 8 rows, found 9", &[all(a, &[1; 9])]),
        ("tokens below 8, found 8", &[none(a, &[1, 8])]),
        ("occurs twice", &[none(a, &[1]), none(a, &[1])]),
        ("at most 4 sequences", &[none(a, &[1]), none(a, &[1]), none(a, &[1]), none(a, &[1]), none(a, &[1])]),
    ];
    for (expected, work) in refusals {
        let error = engine.step(work).err().expect(expected);
        assert!(error.message().contains(expected) && error.exit_code() == 2, "expected {expected:?} in {error}");
    }
    let error = engine.prefill(a, &[1; 257]).err().unwrap();
    assert!(error.message().contains("257 tokens after 0 exceed the context of 256"), "{error}");
    engine.prefill(a, &[1; 200]).unwrap();
    let error = engine.prefill(b, &[1; 65]).err().unwrap();
    assert!(error.message().contains("expected 2 free cache blocks"), "{error}");
    assert_eq!((engine.length(a).unwrap(), engine.length(b).unwrap()), (200, 0));
    assert_eq!(sum_after(&mut engine, a, &[0]), 200.0);
}

#[test]
fn prompts_of_any_length() {
    let mut engine = engine(small(2));
    for length in [1, 15, 16, 17, 32, 33, 250] {
        let prompt: Vec<u32> = (0..length).map(|i| i * 5 % 8).collect();
        let sequence = engine.new_sequence();
        let output = engine.prefill(sequence, &prompt).unwrap();
        assert_eq!(output.rows("logits").unwrap().len(), 1);
        assert_eq!(argmax(output.logits(0).unwrap()) as u32, (prompt[prompt.len() - 1] + 1) % 8);
        let sum = output.rows("sum").unwrap().row(0).unwrap()[0];
        assert_eq!(sum, prompt.iter().sum::<u32>() as f32);
        engine.truncate(sequence, 0).unwrap();
        let mut rows = vec![];
        let mut visit = |i: usize, row: &[f32]| {
            rows.push((i, argmax(row) as u32));
            Ok(())
        };
        engine.each_row(sequence, &prompt, "logits", &mut visit).unwrap();
        let expected: Vec<(usize, u32)> = prompt.iter().map(|t| (t + 1) % 8).enumerate().collect();
        assert_eq!(rows, expected);
        engine.release(sequence).unwrap();
    }
}

#[test]
fn generation_ends_for_its_reasons() {
    let mut engine = engine(small(1));
    let greedy = GenerateOptions { sampler: SamplerOptions::greedy(), ..GenerateOptions::default() };
    let mut run = |prompt: &[u32], options: &GenerateOptions, stop_after: usize| {
        let sequence = engine.new_sequence();
        let mut seen = vec![];
        let generated = generate(&mut engine, sequence, prompt, options, |token| {
            seen.push(token);
            Ok(seen.len() < stop_after)
        });
        engine.release(sequence).unwrap();
        generated.inspect(|g| assert_eq!(g.tokens, seen)).map(|g| (g.tokens, g.finish))
    };
    assert_eq!(run(&[3], &greedy, 99).unwrap(), (vec![4, 5, 6, 7], Finish::StopToken(0)));
    assert_eq!(run(&[3], &greedy, 2).unwrap(), (vec![4, 5], Finish::Caller));
    let three = GenerateOptions { max_tokens: 3, stop_tokens: Some(vec![]), ..greedy.clone() };
    assert_eq!(run(&[6], &three, 99).unwrap(), (vec![7, 0, 1], Finish::MaxTokens));
    let long = GenerateOptions { stop_tokens: Some(vec![]), ..greedy.clone() };
    assert_eq!(run(&[1; 250], &long, 999).unwrap(), (vec![2, 3, 4, 5, 6, 7, 0], Finish::Context));
    let none = GenerateOptions { max_tokens: 0, ..greedy.clone() };
    assert_eq!(run(&[1], &none, 99).unwrap_err().exit_code(), 2);
    assert_eq!(run(&[], &greedy, 99).unwrap_err().exit_code(), 2);
}

#[test]
fn text_in_and_out() {
    let model = Model::open(counting_parts().write().path()).unwrap();
    let tokens = model.tokens().unwrap();
    let prompt = tokens.chat_prompt(&[Message::new("user", "one two"), Message::new("user", "three")]).unwrap();
    assert_eq!(tokens.encode(&prompt, false).unwrap(), [1, 2, 3]);
    assert_eq!(tokens.decode(&[4, 5]).unwrap(), "four five");
    let mut parts = counting_parts();
    parts.manifest.model.tokenizer = None;
    let error = Model::open(parts.write().path()).unwrap().tokens().err().unwrap();
    assert!(error.message().contains("without a tokenizer"), "{error}");
}

#[test]
fn an_encoder_reads_a_text_at_once() {
    let mut parts = counting_parts();
    parts.manifest.model.encoder = true;
    let mut engine = Model::open(parts.write().path()).unwrap().engine(&small(1)).unwrap();
    let sequence = engine.new_sequence();
    assert!(engine.prefill(sequence, &[1; 17]).err().unwrap().message().contains("at most 16 tokens"));
    engine.prefill(sequence, &[1; 16]).unwrap();
    assert!(engine.prefill(sequence, &[1]).is_err());
}

#[test]
fn machines_that_cannot_run_the_code_say_why() {
    let mut parts = counting_parts();
    parts.manifest.code[0].features.push("avx9000".into());
    let file = parts.write();
    let error = Model::open(file.path()).unwrap().engine(&small(1)).err().unwrap();
    assert_eq!(error.exit_code(), 4);
    assert!(error.to_string().contains("lacks avx9000"), "{error}");
}

#[test]
fn engines_come_and_go() {
    let model = Model::open(counting_parts().write().path()).unwrap();
    for threads in [1, 2, 3, 8] {
        for _ in 0..20 {
            let mut engine = model.engine(&small(threads)).unwrap();
            let sequence = engine.new_sequence();
            engine.prefill(sequence, &[1, 2, 3]).unwrap();
        }
    }
    assert!(model.engine(&EngineOptions { threads: Some(0), ..small(1) }).is_err());
    assert!(model.engine(&EngineOptions { positions: Some(0), ..small(1) }).is_err());
}
