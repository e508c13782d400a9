//! `mansard run`: a prompt goes in, the answer streams out.

use crate::report::{self, EngineArguments, InputArguments};
use mansard_ir::{Result, bail};
use mansard_runtime::{Finish, GenerateOptions, Generated, Message, Model, SamplerOptions, Tokens, generate};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Generate text from a prompt
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    #[command(flatten)]
    input: InputArguments,
    /// What the system says before the prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Continue the plain text: no chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    engine: EngineArguments,
    /// Report in JSON, with the whole text
    #[arg(long)]
    json: bool,
}

/// How tokens are chosen, and how many.
#[derive(clap::Args)]
pub struct Sampling {
    /// Most tokens to generate
    #[arg(short = 'n', long = "max-tokens", value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Divides logits; 0 takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    temp: f32,
    /// Likeliest tokens kept; 0 keeps all
    #[arg(long, value_name = "N", default_value_t = 40)]
    top_k: usize,
    /// Mass kept
    #[arg(long, value_name = "X", default_value_t = 0.95)]
    top_p: f32,
    /// Least probability kept, as a share of the likeliest's
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    min_p: f32,
    /// Mass kept of the tokens whose surprise is nearest to the expected; 1 keeps all
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    typical: f32,
    /// Taken off a logit for each time its token was generated
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Taken off a logit if its token was generated at all
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Penalty of recent tokens; 1 for none
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Tokens that count as recent
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_window: usize,
    /// Start of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on where the model would end
    #[arg(long)]
    ignore_end: bool,
}

impl Sampling {
    /// As the runtime takes them.
    ///
    /// # Errors
    /// Where no token is asked for.
    pub fn options(&self) -> Result<GenerateOptions> {
        if self.max_tokens == 0 {
            bail!(Usage, "-n: expected at least one token to generate, found 0");
        }
        let sampler = SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_window,
            typical: self.typical,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
            logit_bias: vec![],
        };
        let stop_tokens = self.ignore_end.then(Vec::new);
        Ok(GenerateOptions { max_tokens: self.max_tokens, sampler, stop_tokens })
    }
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open, the prompt does not fit, or output cannot be written.
pub fn run(arguments: &Arguments) -> Result<()> {
    let options = arguments.sampling.options()?;
    let model = arguments.engine.open(&arguments.artifact)?;
    // Copying weights and loading a large tokenizer both take time; they do so side by side.
    let (prompt, engine) = std::thread::scope(|scope| {
        let prompt = scope.spawn(|| prompt(arguments, &model));
        let engine = arguments.engine.engine(&model, &arguments.engine.options());
        (prompt.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), engine)
    });
    let (prompt, mut engine) = (prompt?, engine?);
    let sequence = engine.new_sequence();
    // Token ids need no tokenizer: without one, ids come out too.
    let tokens = if model.info().tokenizer.is_some() { Some(model.tokens()?) } else { None };
    let mut writer = Writer { decoder: tokens.map(Tokens::decoder), text: String::new(), quiet: arguments.json };
    let generated = generate(&mut engine, sequence, &prompt, &options, |token| {
        writer.push(token)?;
        Ok(true)
    })?;
    let text = writer.finish()?;
    if arguments.json {
        return report::print(report::json(&summary(&generated, prompt.len(), &text))?);
    }
    eprintln!("{}", speeds(&generated, prompt.len()));
    Ok(())
}

fn prompt(arguments: &Arguments, model: &Model) -> Result<Vec<u32>> {
    let (input, text) = (&arguments.input, arguments.input.prompt.as_deref());
    let Some(text) = text.filter(|_| !arguments.raw) else { return input.ids_or_text(model) };
    let tokens = model.tokens()?;
    if !tokens.has_chat_template() && arguments.system.is_none() {
        eprintln!("note: the model has no chat template, its answer continues the plain text");
        return tokens.encode(text, true);
    }
    let system = arguments.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
    tokens.encode(&tokens.chat_prompt(&messages)?, false)
}

/// Prints text as it is generated, and keeps it.
pub struct Writer {
    /// Turns tokens into text; without one, ids are printed.
    pub decoder: Option<mansard_runtime::Decoder>,
    /// All so far.
    pub text: String,
    /// Keeps, but does not print.
    pub quiet: bool,
}

impl Writer {
    /// One more token.
    ///
    /// # Errors
    /// Where it cannot be decoded or printed.
    pub fn push(&mut self, token: u32) -> Result<()> {
        let piece = match &mut self.decoder {
            Some(decoder) => decoder.push(token)?,
            None => format!("{}{token}", if self.text.is_empty() { "" } else { "," }),
        };
        self.put(&piece)
    }

    /// The end: what was unfinished, and a newline. Gives all text but the newline.
    ///
    /// # Errors
    /// As [`Writer::push`].
    pub fn finish(mut self) -> Result<String> {
        let rest = self.decoder.take().map_or_else(|| Ok(String::new()), |d| d.finish())?;
        self.put(&rest)?;
        if !self.quiet {
            report::print("\n")?;
        }
        Ok(self.text)
    }

    fn put(&mut self, piece: &str) -> Result<()> {
        self.text += piece;
        if self.quiet { Ok(()) } else { report::print(piece) }
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

/// `prompt 9 tokens, 310.2 tokens/s; answer 63 tokens, 95.1 tokens/s`.
pub fn speeds(generated: &Generated, prompt: usize) -> String {
    // The first token comes with the prompt.
    let decoded = generated.tokens.len().saturating_sub(1);
    let (prefill, decode) = (rate(prompt, generated.prefill), rate(decoded, generated.decode));
    let answer = generated.tokens.len();
    format!("prompt {prompt} tokens, {prefill:.1} tokens/s; answer {answer} tokens, {decode:.1} tokens/s")
}

fn summary(generated: &Generated, prompt: usize, text: &str) -> serde_json::Value {
    let finish = match generated.finish {
        Finish::StopToken(_) => "stop_token",
        Finish::MaxTokens => "max_tokens",
        Finish::Context => "context",
        Finish::StopText => "stop_text",
        Finish::Caller => "caller",
    };
    json!({
        "text": text,
        "tokens": generated.tokens,
        "finish": finish,
        "prompt_tokens": prompt,
        "prefill_seconds": generated.prefill.as_secs_f64(),
        "decode_seconds": generated.decode.as_secs_f64(),
    })
}
