//! The vocabulary projection in two planes changes no token: on the published models and real text, what a step says that
//! wants the likeliest tokens only is what one says that wants all logits. Skipped where the models are not at hand.

use mansard::driver::CompileOptions;
use mansard_runtime::{Engine, EngineOptions, Logits, Model, Rows, SequenceId, Work};
use mansard_tests::{argmax, compiled, here, published};

/// Tokens from an empty context.
const WINDOW: usize = 256;

/// Positions compared at once: as many rows as may want few logits.
const CHUNK: usize = 8;

/// Positions compared, of each model.
const POSITIONS: usize = 10_000;

/// One in so many chunks is also compared by its 40 likeliest tokens.
const SETS: usize = 8;

/// Prose, documentation, code.
fn text() -> String {
    let files =
        ["cli/evaluation.txt", "README.md", "docs/architecture.md", "docs/recipes.md", "ir/formats.rs", "ir/verify.rs"];
    files.map(|file| std::fs::read_to_string(here().join("..").join(file)).unwrap()).join("\n")
}

fn rows(engine: &mut Engine, sequence: SequenceId, tokens: &[u32], logits: Logits) -> Vec<Vec<f32>> {
    let before = engine.length(sequence).unwrap();
    let out = engine.step_for(&[Work { sequence, tokens, rows: Rows::All }], logits).unwrap();
    let rows = out.rows("logits").unwrap().iter().map(<[f32]>::to_vec).collect();
    engine.truncate(sequence, before).unwrap();
    rows
}

fn likeliest(row: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.select_nth_unstable_by(count - 1, |a, b| row[*b].total_cmp(&row[*a]));
    order.truncate(count);
    order.sort_unstable();
    order
}

fn no_token_changes(file: &str) {
    let Some(model) = published(file) else { return };
    let (folder, artifact) = compiled(&model, &CompileOptions::default()).unwrap();
    let said = artifact.manifest().provenance.approximations.join("\n");
    assert!(said.contains("vocabulary projection"), "{said}");
    let tokens =
        Model::open(folder.path().join("model.mansard")).unwrap().tokens().unwrap().encode(&text(), true).unwrap();
    assert!(tokens.len() > POSITIONS, "a text of {} tokens", tokens.len());
    let mut engine = Engine::new(artifact, &EngineOptions::default()).unwrap();
    let (mut compared, mut sets, mut estimates, mut logits) = (0, 0, 0, 0);
    for window in tokens[..POSITIONS].chunks(WINDOW) {
        let sequence = engine.new_sequence();
        for chunk in window.chunks(CHUNK) {
            let exact = rows(&mut engine, sequence, chunk, Logits::All);
            for (exact, few) in exact.iter().zip(rows(&mut engine, sequence, chunk, Logits::Largest(1))) {
                assert_eq!(argmax(exact), argmax(&few), "position {compared}");
                compared += 1;
            }
            if (compared / CHUNK).is_multiple_of(SETS) {
                for (exact, few) in exact.iter().zip(rows(&mut engine, sequence, chunk, Logits::Largest(40))) {
                    assert_eq!(likeliest(exact, 40), likeliest(&few, 40), "40 likeliest near position {compared}");
                    sets += 1;
                    let apart = |(a, b): &(&f32, &f32)| (**a - **b).abs() > 1e-3 * a.abs().max(1.0);
                    estimates += exact.iter().zip(&few).filter(apart).count();
                    logits += few.len();
                }
            }
            engine.step(&[Work { sequence, tokens: chunk, rows: Rows::None }]).unwrap();
        }
        engine.release(sequence).unwrap();
    }
    let share = estimates as f64 / logits as f64;
    println!(
        "{file}: {compared} tokens and {sets} sets of 40 unchanged; {:.1}% of the logits visibly estimates",
        share * 100.0
    );
    assert!(compared == POSITIONS && sets > 1000 && share > 0.3, "{compared} {sets} {share}");
}

#[test]
fn smollm2() {
    no_token_changes("smollm2.gguf");
}

#[test]
fn gemma3() {
    no_token_changes("gemma3-270m.gguf");
}
