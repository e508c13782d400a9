//! Opens an artifact and generates: `generate model.mansard "prompt" [tokens]`. All that a deployed program needs.

use mansard_runtime::{EngineOptions, GenerateOptions, Message, Model, SamplerOptions, generate};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run() -> mansard_ir::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (args.next(), args.next()) else {
        mansard_ir::bail!(Usage, "expected the path of an artifact and a prompt");
    };
    let model = Model::open(path)?;
    let mut engine = model.engine(&EngineOptions::default())?;
    let tokens = model.tokens()?;
    let prompt = match tokens.has_chat_template() {
        true => tokens.encode(&tokens.chat_prompt(&[Message::new("user", prompt)])?, false)?,
        false => tokens.encode(&prompt, true)?,
    };
    let max_tokens = args.next().and_then(|n| n.parse().ok()).unwrap_or(128);
    let options = GenerateOptions { max_tokens, sampler: SamplerOptions::greedy(), ..GenerateOptions::default() };
    let sequence = engine.new_sequence();
    let mut decoder = tokens.decoder();
    generate(&mut engine, sequence, &prompt, &options, |token| {
        print!("{}", decoder.push(token)?);
        Ok(std::io::stdout().flush().is_ok())
    })?;
    println!("{}", decoder.finish()?);
    Ok(())
}
