//! `mansard logits`: what a model says of every token of an input, as numbers.

use crate::report::{EngineArguments, InputArguments, le_bytes, write_npy};
use mansard_ir::{Error, Result, bail};
use std::path::PathBuf;

/// Write the logits of every token as a NumPy file (of an encoder: the last hidden state)
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    #[command(flatten)]
    input: InputArguments,
    /// The file: f32 [tokens, vocabulary], of an encoder f32 [tokens, hidden]
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open, the input does not fit, or the file cannot be written.
pub fn run(arguments: &Arguments) -> Result<()> {
    let model = arguments.engine.open(&arguments.artifact)?;
    let tokens = arguments.input.ids_or_text(&model)?;
    let mut engine = arguments.engine.engine(&model, &arguments.engine.options())?;
    let name = if model.info().encoder { "hidden" } else { "logits" };
    let outputs = &model.artifact().manifest().program.outputs;
    let Some(output) = outputs.iter().find(|o| o.name == name) else {
        bail!(Input, "{}: expected an output `{name}`, found none", arguments.artifact.display());
    };
    let sequence = engine.new_sequence();
    write_npy(&arguments.output, [tokens.len(), output.width], |out| {
        engine.each_row(sequence, &tokens, name, |_, row| {
            out.write_all(&le_bytes(row)).map_err(|e| Error::io(&arguments.output, e))
        })
    })
}
