//! `mansard embed`: texts become vectors, several in one ragged step.

use crate::report::{self, EngineArguments, le_bytes, write_npy};
use mansard_ir::{Error, Result, bail};
use mansard_runtime::{EngineOptions, embed, embedded_positions};
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
    let positions = Some(embedded_positions(&model.artifact().manifest().program.limits));
    let mut engine = arguments.engine.engine(&model, &EngineOptions { positions, ..arguments.engine.options() })?;
    let tokens = texts.iter().map(|text| model.tokens()?.encode(text, true)).collect::<Result<Vec<_>>>()?;
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

fn line(vector: &[f32]) -> String {
    let numbers: Vec<String> = vector.iter().map(f32::to_string).collect();
    format!("[{}]", numbers.join(", "))
}
