//! The executable that `mansard bundle --exe` puts an artifact into: a prompt goes in, the answer streams out.
//!
//! ```text
//!  | this program | artifact, in a section of its own |      ./answer -p "..." maps itself and generates
//! ```
#![forbid(unsafe_code)]

mod options;
mod own;

use mansard_ir::{Error, Result, bail};
use mansard_runtime::{
    Decoder, Engine, EngineOptions, Message, Model, OpenOptions, embed, embedded_positions, generate,
};
use options::Options;
use std::io::{ErrorKind, Read, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if reader_left(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(help) = error.advice() {
                eprintln!("help: {help}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// The reader of our output has gone, as `head` does when it has enough.
fn reader_left(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|e| e.downcast_ref::<std::io::Error>());
    source.is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}

fn run() -> Result<()> {
    let options = Options::parse(lexopt::Parser::from_env())?;
    if options.help {
        return print(options::HELP);
    }
    let model = Model::from(own::artifact(&OpenOptions { verify_weights: !options.trust })?);
    if options.about {
        return print(&about(&model));
    }
    // The tokenizer loads beside the engine.
    let (prompt, engine) = std::thread::scope(|scope| {
        let prompt = scope.spawn(|| prompt(&options, &model));
        let engine = engine(&options, &model);
        (prompt.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), engine)
    });
    let (prompt, mut engine) = (prompt?, engine?);
    if model.info().encoder {
        let vectors = embed(&mut engine, &[prompt])?;
        return print(&format!("{}\n", serde_json::json!(vectors[0])));
    }
    answer(&options, &model, &mut engine, &prompt)
}

/// Generates, and prints each token as it comes.
fn answer(options: &Options, model: &Model, engine: &mut Engine, prompt: &[u32]) -> Result<()> {
    let mut decoder = match model.info().tokenizer {
        Some(_) => Some(model.tokens()?.decoder()),
        None => None,
    };
    let sequence = engine.new_sequence();
    generate(engine, sequence, prompt, &options.generate, |token| {
        match &mut decoder {
            Some(decoder) => print(&decoder.push(token)?)?,
            // Without a tokenizer, ids come out.
            None => print(&format!("{token} "))?,
        }
        Ok(true)
    })?;
    let rest = decoder.map(Decoder::finish).transpose()?.unwrap_or_default();
    print(&format!("{rest}\n"))
}

fn engine(options: &Options, model: &Model) -> Result<Engine> {
    let limits = &model.artifact().manifest().program.limits;
    let positions = model.info().encoder.then(|| embedded_positions(limits));
    model.engine(&EngineOptions { threads: options.threads, positions, ..EngineOptions::default() })
}

fn prompt(options: &Options, model: &Model) -> Result<Vec<u32>> {
    if let Some(tokens) = &options.tokens {
        return Ok(tokens.clone());
    }
    let text = options.prompt.clone().map_or_else(standard_input, Ok)?;
    let tokens = model.tokens()?;
    if options.raw || model.info().encoder || !tokens.has_chat_template() && options.system.is_none() {
        return tokens.encode(&text, true);
    }
    let system = options.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
    tokens.encode(&tokens.chat_prompt(&messages)?, false)
}

fn standard_input() -> Result<String> {
    let mut bytes = vec![];
    std::io::stdin().read_to_end(&mut bytes).map_err(|e| Error::io("standard input", e))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.trim_end().into()),
        Err(e) => bail!(Usage, "standard input: expected UTF-8: {e}"),
    }
}

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("standard output", e))
}

fn about(model: &Model) -> String {
    let (info, artifact) = (model.info(), model.artifact());
    let targets: Vec<&str> = artifact.manifest().code.iter().map(|code| code.target.as_str()).collect();
    format!(
        "a {} model of {} bytes, for {}, context {}; mansard {}, runner {}\n",
        info.architecture,
        artifact.file_bytes(),
        targets.join(", "),
        artifact.manifest().program.limits.context,
        artifact.manifest().provenance.version,
        env!("CARGO_PKG_VERSION"),
    )
}
