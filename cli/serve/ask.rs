//! The body of a request -> what the runtime is asked.
//!
//! Every field of OpenAI's that changes the answer is either done or refused by name; fields that change nothing here
//! (`user`, `store`, `metadata`...) are read and left. Beyond OpenAI's there are `top_k`, `min_p`, `typical_p`,
//! `repetition_penalty` and `ignore_eos`.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::grammar::Format;
use axum::http::StatusCode;
use mansard_ir::Place;
use mansard_runtime::{GenerateOptions, Message, Request, SamplerOptions};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// `/v1/chat/completions` and `/v1/completions`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Body {
    model: String,
    /// Of a chat.
    messages: Option<Vec<ChatMessage>>,
    /// Of a completion.
    prompt: Option<Prompt>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    n: Option<usize>,
    stop: Option<OneOrMore>,
    ignore_eos: Option<bool>,
    /// A flag in chats, a number in completions.
    logprobs: Option<Value>,
    top_logprobs: Option<usize>,
    response_format: Option<Format>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// Fields that change nothing here, and those that would change the answer, which are refused where they ask for anything.
    #[serde(rename = "user", alias = "safety_identifier")]
    _user: Option<Value>,
    #[serde(rename = "metadata")]
    _metadata: Option<Value>,
    #[serde(rename = "store")]
    _store: Option<Value>,
    #[serde(rename = "service_tier")]
    _service_tier: Option<Value>,
    #[serde(rename = "parallel_tool_calls")]
    _parallel_tool_calls: Option<Value>,
    #[serde(rename = "prompt_cache_key")]
    _prompt_cache_key: Option<Value>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    functions: Option<Value>,
    function_call: Option<Value>,
    modalities: Option<Value>,
    audio: Option<Value>,
    reasoning_effort: Option<Value>,
    web_search_options: Option<Value>,
    prediction: Option<Value>,
    /// Of a completion: the prompt before its answer.
    echo: Option<bool>,
    suffix: Option<Value>,
    best_of: Option<Value>,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// Which of the two a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

/// What is asked.
pub struct Ask {
    /// As the runtime takes them: one for each prompt.
    pub requests: Vec<Request>,
    /// Tell the prompts, too.
    pub echo: bool,
    /// Which of the two.
    pub endpoint: Endpoint,
    /// Answer in events.
    pub stream: bool,
    /// And with a last one that counts tokens.
    pub include_usage: bool,
}

/// Most stop strings, and bytes of one.
const MOST_STOPS: (usize, usize) = (16, 256);
/// Most prompts of a request.
const MOST_PROMPTS: usize = 128;
/// Most likeliest tokens told.
const MOST_LOGPROBS: usize = 20;

impl Body {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the field that makes no sense or is not done.
    pub fn check(self, app: &App, endpoint: Endpoint, client: u64) -> ApiResult<Ask> {
        known_model(app, &self.model)?;
        self.refuse_others()?;
        let prompts = self.prompts(app, endpoint)?;
        let choices = self.n.unwrap_or(1);
        if !(1..=app.max_choices).contains(&choices) {
            return Err(ApiError::field("n", format!("expected 1 to {} choices, found {choices}", app.max_choices)));
        }
        let constraint = self.response_format.as_ref().map(|format| format.constraint(app)).transpose()?.flatten();
        let (logprobs, echo) = (self.logprobs(endpoint)?, self.echo(endpoint)?);
        let request = |prompt: Vec<u32>| {
            let options = self.options(app, endpoint, prompt.len())?;
            let told = logprobs.or((options.max_tokens == 0).then_some(0));
            Ok(Request {
                choices,
                stop: self.stops()?,
                logprobs,
                prompt_logprobs: told.filter(|_| echo),
                constraint: constraint.as_ref().map(|constraint| constraint.fork()),
                client,
                ..Request::new(prompt, options)
            })
        };
        let requests = prompts.into_iter().map(request).collect::<ApiResult<_>>()?;
        let include_usage = self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false);
        Ok(Ask { requests, echo, endpoint, stream: self.stream.unwrap_or(false), include_usage })
    }

    fn refuse_others(&self) -> ApiResult<()> {
        let empty = |value: &Value| {
            let list = value.as_array().is_some_and(Vec::is_empty);
            list || value.is_null() || *value == "none" || *value == false || *value == 1 || *value == ""
        };
        let text_only = |value: &Value| *value == serde_json::json!(["text"]);
        let others = [
            ("tools", &self.tools),
            ("tool_choice", &self.tool_choice),
            ("functions", &self.functions),
            ("function_call", &self.function_call),
            ("modalities", &self.modalities),
            ("audio", &self.audio),
            ("reasoning_effort", &self.reasoning_effort),
            ("web_search_options", &self.web_search_options),
            ("prediction", &self.prediction),
            ("suffix", &self.suffix),
            ("best_of", &self.best_of),
        ];
        for (name, value) in others {
            if value.as_ref().is_some_and(|value| !empty(value) && !text_only(value)) {
                return Err(
                    ApiError::field(name, format!("`{name}` is not supported by this server")).code("unsupported")
                );
            }
        }
        Ok(())
    }

    /// Whether the prompt is part of the answer.
    fn echo(&self, endpoint: Endpoint) -> ApiResult<bool> {
        let echo = self.echo.unwrap_or(false);
        if echo && endpoint == Endpoint::Chat {
            return Err(ApiError::field("echo", "`echo` is of completions").code("unsupported"));
        }
        Ok(echo)
    }

    fn prompts(&self, app: &App, endpoint: Endpoint) -> ApiResult<Vec<Vec<u32>>> {
        let (prompts, wanted, other) = match endpoint {
            Endpoint::Chat => (vec![self.chat_prompt(app)?], "messages", self.prompt.is_some().then_some("prompt")),
            Endpoint::Completion => (self.plain_prompts(app)?, "prompt", self.messages.is_some().then_some("messages")),
        };
        if let Some(other) = other {
            return Err(ApiError::field(other, format!("expected `{wanted}` alone, found `{other}` too")));
        }
        for tokens in &prompts {
            if tokens.is_empty() {
                return Err(ApiError::field(wanted, "expected a prompt of at least one token, found none"));
            }
            if tokens.len() >= app.context {
                let (found, most) = (tokens.len(), app.context);
                let message =
                    format!("expected a prompt that leaves room in a context of {most} tokens, found {found} tokens");
                return Err(ApiError::field(wanted, message).code("context_length_exceeded"));
            }
        }
        Ok(prompts)
    }

    fn chat_prompt(&self, app: &App) -> ApiResult<Vec<u32>> {
        let messages = self.messages.as_deref().unwrap_or_default();
        if messages.is_empty() {
            return Err(ApiError::field("messages", "expected at least one message, found none"));
        }
        let messages = messages.iter().enumerate().map(|(i, m)| m.message(i)).collect::<ApiResult<Vec<_>>>()?;
        let tokens = app.tokens()?;
        let text = tokens.chat_prompt(&messages).at(|| "messages".into());
        Ok(tokens.encode(&text?, false).at(|| "messages".into())?)
    }

    fn plain_prompts(&self, app: &App) -> ApiResult<Vec<Vec<u32>>> {
        let encode = |text: &String| Ok(app.tokens()?.encode(text, true)?);
        let prompts: Vec<Vec<u32>> = match &self.prompt {
            None => return Err(ApiError::field("prompt", "expected a prompt, found none")),
            Some(Prompt::Text(text)) => vec![encode(text)?],
            Some(Prompt::Tokens(ids)) => vec![ids.clone()],
            Some(Prompt::Texts(texts)) => texts.iter().map(encode).collect::<ApiResult<_>>()?,
            Some(Prompt::TokenLists(lists)) => lists.clone(),
        };
        match prompts.len() {
            1..=MOST_PROMPTS => Ok(prompts),
            found => Err(ApiError::field("prompt", format!("expected 1 to {MOST_PROMPTS} prompts, found {found}"))),
        }
    }

    fn options(&self, app: &App, endpoint: Endpoint, prompt: usize) -> ApiResult<GenerateOptions> {
        let asked = self.max_completion_tokens.or(self.max_tokens);
        let most = if endpoint == Endpoint::Chat { app.max_tokens } else { 16 };
        let room = if app.shift.is_some() { usize::MAX } else { app.context - prompt };
        let max_tokens = asked.unwrap_or(most).min(room);
        if max_tokens == 0 && !self.echo.unwrap_or(false) || max_tokens > app.max_tokens && asked.is_some() {
            let message = format!("expected 1 to {} tokens, found {}", app.max_tokens, asked.unwrap_or(0));
            return Err(ApiError::field("max_tokens", message));
        }
        let plain = SamplerOptions::plain();
        let sampler = SamplerOptions {
            temperature: self.temperature.unwrap_or(plain.temperature),
            top_p: self.top_p.unwrap_or(plain.top_p),
            top_k: self.top_k.unwrap_or(plain.top_k),
            min_p: self.min_p.unwrap_or(plain.min_p),
            typical: self.typical_p.unwrap_or(plain.typical),
            repetition_penalty: self.repetition_penalty.unwrap_or(plain.repetition_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(plain.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(plain.presence_penalty),
            logit_bias: self.biases(app)?,
            seed: self.seed.map_or_else(random_seed, |seed| seed as u64),
            ..plain
        };
        let stop_tokens = self.ignore_eos.unwrap_or(false).then(Vec::new);
        Ok(GenerateOptions { max_tokens, sampler, stop_tokens, shift: app.shift })
    }

    fn biases(&self, app: &App) -> ApiResult<Vec<(u32, f32)>> {
        let vocab = app.model.info().vocab;
        let bias = |(id, bias): (&String, &f32)| {
            let id = id.parse().ok().filter(|id| (*id as usize) < vocab && (-100.0..=100.0).contains(bias));
            let wrong = || {
                let message = format!("expected token ids below {vocab} with biases of -100 to 100");
                ApiError::field("logit_bias", message)
            };
            id.map(|id| (id, *bias)).ok_or_else(wrong)
        };
        self.logit_bias.iter().flatten().map(bias).collect()
    }

    fn stops(&self) -> ApiResult<Vec<String>> {
        let stops = match &self.stop {
            None => vec![],
            Some(OneOrMore::One(stop)) => vec![stop.clone()],
            Some(OneOrMore::More(stops)) => stops.clone(),
        };
        let (count, bytes) = MOST_STOPS;
        if stops.len() > count || stops.iter().any(|stop| stop.is_empty() || stop.len() > bytes) {
            let message = format!("expected at most {count} stop strings of 1 to {bytes} bytes");
            return Err(ApiError::field("stop", message));
        }
        Ok(stops)
    }

    /// Likeliest tokens to tell beside the one chosen.
    fn logprobs(&self, endpoint: Endpoint) -> ApiResult<Option<usize>> {
        let asked = self.logprobs.as_ref().filter(|value| !value.is_null());
        let count = match (endpoint, asked) {
            (Endpoint::Chat, None | Some(Value::Bool(false))) if self.top_logprobs.unwrap_or(0) == 0 => None,
            (Endpoint::Chat, Some(Value::Bool(true))) => Some(self.top_logprobs.unwrap_or(0)),
            (Endpoint::Completion, None) => None,
            (Endpoint::Completion, Some(value)) if value.is_u64() => value.as_u64().map(|count| count as usize),
            (Endpoint::Chat, _) => return Err(ApiError::field("logprobs", "expected true beside `top_logprobs`")),
            (Endpoint::Completion, _) => return Err(ApiError::field("logprobs", "expected a number")),
        };
        if count.is_some_and(|count| count > MOST_LOGPROBS) {
            return Err(ApiError::field("logprobs", format!("expected at most {MOST_LOGPROBS} likeliest tokens")));
        }
        Ok(count)
    }
}

impl ChatMessage {
    fn message(&self, index: usize) -> ApiResult<Message> {
        let param = format!("messages[{index}]");
        let role = match self.role.as_str() {
            "developer" => "system",
            role @ ("system" | "user" | "assistant" | "tool") => role,
            other => {
                let message = format!("expected a role of system, user, assistant or tool, found `{other}`");
                return Err(ApiError::field(&param, message));
            }
        };
        let content = match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                let text = |part: &ContentPart| part.text.clone().filter(|_| part.kind == "text");
                let texts: Option<Vec<String>> = parts.iter().map(text).collect();
                texts
                    .ok_or_else(|| ApiError::field(&param, "expected parts of type `text`; others are not supported"))?
                    .concat()
            }
        };
        Ok(Message::new(role, content))
    }
}

/// Refuses a model that is not served here.
///
/// # Errors
/// Then.
pub fn known_model(app: &App, model: &str) -> ApiResult<()> {
    if model == app.name {
        return Ok(());
    }
    let message = format!("expected the model `{}`, found `{model}`", app.name);
    let error = ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found");
    Err(ApiError { param: Some("model".into()), ..error })
}

/// Another one for every request that gives none.
fn random_seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let mut hash = blake3::Hasher::new();
    hash.update(&now.to_le_bytes()).update(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    u64::from_le_bytes(*hash.finalize().as_bytes().first_chunk().unwrap_or(&[0; 8]))
}
