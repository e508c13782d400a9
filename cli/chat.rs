//! `mansard chat`: a conversation at the terminal. What the turns before have in common with the next stays in the cache.

use crate::report::EngineArguments;
use crate::run::{Sampling, Writer, speeds};
use mansard_ir::{Error, Result, bail};
use mansard_runtime::{Engine, GenerateOptions, Message, SequenceId, Tokens, generate};
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;

/// Converse; `/clear` forgets the conversation, `/exit` ends it
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// What the system says first
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    engine: EngineArguments,
}

/// A conversation and what of it is in the cache.
struct Conversation<'a> {
    tokens: &'a Arc<Tokens>,
    messages: Vec<Message>,
    sequence: SequenceId,
    cached: Vec<u32>,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open or has no chat template, or the conversation outgrows the context.
pub fn run(arguments: &Arguments) -> Result<()> {
    let options = arguments.sampling.options()?;
    let model = arguments.engine.open(&arguments.artifact)?;
    if !model.tokens()?.has_chat_template() {
        bail!(Usage, "the model has no chat template; `mansard run --raw` continues plain text");
    }
    let mut engine = arguments.engine.engine(&model, &arguments.engine.options())?;
    let system: Vec<Message> = arguments.system.iter().map(|text| Message::new("system", text)).collect();
    let sequence = engine.new_sequence();
    let mut conversation = Conversation { tokens: model.tokens()?, messages: system.clone(), sequence, cached: vec![] };
    let stdin = std::io::stdin();
    loop {
        if stdin.is_terminal() {
            eprint!("> ");
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line).map_err(|e| Error::io("standard input", e))? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => {}
            "/exit" => return Ok(()),
            "/clear" => conversation.messages = system.clone(),
            text => conversation.turn(&mut engine, &options, text)?,
        }
    }
}

impl Conversation<'_> {
    /// One question and its answer.
    fn turn(&mut self, engine: &mut Engine, options: &GenerateOptions, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let prompt = self.tokens.encode(&self.tokens.chat_prompt(&self.messages)?, false)?;
        // At least one token must run, to give the next.
        let limit = prompt.len().saturating_sub(1);
        let common = self.cached.iter().zip(&prompt[..limit]).take_while(|(a, b)| a == b).count();
        // Layers that see a window may have let go of what the common part needs.
        let common = if common < engine.shortest(self.sequence)? { 0 } else { common };
        engine.truncate(self.sequence, common)?;
        let mut writer = Writer { decoder: Some(self.tokens.decoder()), text: String::new(), quiet: false };
        let generated = generate(engine, self.sequence, &prompt[common..], options, |token| {
            writer.push(token)?;
            Ok(true)
        })?;
        eprintln!("{}", speeds(&generated, prompt.len() - common));
        self.messages.push(Message::new("assistant", writer.finish()?));
        // The last token is not in the cache yet.
        self.cached = prompt;
        self.cached.extend(&generated.tokens);
        self.cached.truncate(engine.length(self.sequence)?);
        Ok(())
    }
}
