//! `mansard embed`: texts become vectors, several in one ragged step.

use crate::report::{self, EngineArguments, le_bytes, write_npy};
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::{Error, Place, Result, bail};
use mansard_runtime::{Engine, EngineOptions, Rows, Work};
use std::io::BufRead;
use std::path::PathBuf;

/// Embed texts with an encoder: mean-pooled, normalized vectors
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// A text; may be given several times [default: each line of standard input]
    #[arg(short, long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// A NumPy file f32 [texts, width] instead of a JSON list for each text
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open or is no encoder, or a text does not fit.
pub fn run(arguments: &Arguments) -> Result<()> {
    let model = arguments.engine.open(&arguments.artifact)?;
    if !model.info().encoder {
        let architecture = &model.info().architecture;
        bail!(Usage, "expected an encoder, found a {architecture} model, which generates text");
    }
    let mut texts = arguments.prompt.clone();
    if texts.is_empty() {
        let lines: std::io::Result<Vec<String>> = std::io::stdin().lock().lines().collect();
        texts = lines.map_err(|e| Error::io("standard input", e))?;
    }
    let limits = model.artifact().manifest().program.limits;
    // Every text of a step has cache blocks of its own, the last of them in part.
    let positions = Some(limits.tokens + limits.sequences * (CACHE_BLOCK - 1));
    let mut engine = model.engine(&EngineOptions { positions, ..arguments.engine.options() })?;
    let mut tokens = vec![];
    for (i, text) in texts.iter().enumerate() {
        let ids = model.tokens()?.encode(text, true)?;
        let most = limits.context.min(limits.tokens);
        if ids.is_empty() || ids.len() > most {
            bail!(Usage, "text {}: expected 1 to {most} tokens, found {}", i + 1, ids.len());
        }
        tokens.push(ids);
    }
    let vectors = embed(&mut engine, &tokens)?;
    match &arguments.output {
        None => vectors.iter().try_for_each(|v| report::print(format!("{}\n", line(v)))),
        Some(path) => {
            let width = vectors.first().map_or(0, Vec::len);
            write_npy(path, [vectors.len(), width], |out| {
                vectors.iter().try_for_each(|v| out.write_all(&le_bytes(v)).map_err(|e| Error::io(path, e)))
            })
        }
    }
}

/// As many texts at a time as fit into a step.
fn embed(engine: &mut Engine, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    let mut vectors = vec![];
    let limits = *engine.limits();
    let mut rest = texts;
    while !rest.is_empty() {
        let mut total = 0;
        let fits = |text: &&Vec<u32>| {
            total += text.len();
            total <= limits.tokens
        };
        let (batch, others) = rest.split_at(rest.iter().take(limits.sequences).take_while(fits).count().max(1));
        rest = others;
        let sequences: Vec<_> = batch.iter().map(|_| engine.new_sequence()).collect();
        let work: Vec<Work<'_>> = batch
            .iter()
            .zip(&sequences)
            .map(|(tokens, sequence)| Work { sequence: *sequence, tokens, rows: Rows::None })
            .collect();
        let first = vectors.len();
        let output = engine.step(&work).at(|| format!("texts {} to {}", first + 1, first + batch.len()))?;
        vectors.extend(output.rows("embedding")?.iter().map(<[f32]>::to_vec));
        sequences.into_iter().try_for_each(|sequence| engine.release(sequence))?;
    }
    Ok(vectors)
}

fn line(vector: &[f32]) -> String {
    let numbers: Vec<String> = vector.iter().map(f32::to_string).collect();
    format!("[{}]", numbers.join(", "))
}
