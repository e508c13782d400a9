//! `mansard chat`: a conversation at the terminal. What the turns before have in common with the next stays in the cache.

use crate::report::EngineArguments;
use crate::run::{Sampling, Writer, speeds};
use crate::stream::{Stream, StreamArguments};
use mansard_ir::{Error, Result, bail};
use mansard_runtime::{GenerateOptions, Message, Tokens};
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
    stream: StreamArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// A conversation.
struct Conversation<'a> {
    tokens: &'a Arc<Tokens>,
    messages: Vec<Message>,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open or has no chat template, or the conversation outgrows the context.
pub fn run(arguments: &Arguments) -> Result<()> {
    let options = arguments.sampling.options(&arguments.stream)?;
    let model = arguments.engine.open(&arguments.artifact)?;
    if !model.tokens()?.has_chat_template() {
        bail!(Usage, "the model has no chat template; `mansard run --raw` continues plain text");
    }
    let mut stream = Stream::open(&model, &arguments.engine, &arguments.stream)?;
    let system: Vec<Message> = arguments.system.iter().map(|text| Message::new("system", text)).collect();
    let mut conversation = Conversation { tokens: model.tokens()?, messages: system.clone() };
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
            text => conversation.turn(&mut stream, &options, text)?,
        }
    }
}

impl Conversation<'_> {
    /// One question and its answer.
    fn turn(&mut self, stream: &mut Stream, options: &GenerateOptions, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let prompt = self.tokens.encode(&self.tokens.chat_prompt(&self.messages)?, false)?;
        let mut writer = Writer { decoder: Some(self.tokens.decoder()), text: String::new(), quiet: false };
        let answer = stream.answer(&prompt, options, |token| writer.push(token))?;
        eprintln!("{}", speeds(&answer));
        self.messages.push(Message::new("assistant", writer.finish()?));
        Ok(())
    }
}
