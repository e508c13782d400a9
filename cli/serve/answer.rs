//! What a request hears -> OpenAI's JSON, whole or in pieces.
//!
//! ```text
//!  Token "Hel", Token "lo", Done        {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
//!  the same with `stream`               data: {"choices": [{"delta": {"content": "Hel"}}]} ...
//! ```

use super::app::{App, Work};
use super::ask::{Ask, Endpoint};
use super::errors::{ApiError, ApiResult};
use axum::http::StatusCode;
use mansard_runtime::{Event, Finish, Handle, Logprobs, Usage};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

/// A request that has been taken in. It ends when this is dropped.
pub struct Answer {
    /// With the index of the prompt.
    events: UnboundedReceiver<(usize, Event)>,
    _handles: Vec<Handle>,
    deadline: Instant,
    /// What is asked.
    pub endpoint: Endpoint,
    /// Choices that are not done, and those of each prompt.
    pub left: usize,
    choices: usize,
    /// Prompts, where they are to be told; and whether their tokens are counted.
    echoed: Vec<Vec<u32>>,
    counted: Vec<bool>,
    /// Prompts are told with their log probabilities.
    prompts_told: bool,
    /// Token counts of all choices so far.
    pub usage: Usage,
    app: Arc<App>,
    id: String,
    created: u64,
}

/// What comes next.
pub enum Next {
    /// An event of a choice, counted over all prompts.
    Event(Event),
    /// Log probabilities of a prompt.
    Prompt(usize, Vec<Logprobs>),
    /// Nothing for that long.
    Silence,
}

impl Answer {
    /// Puts a request in the queue.
    ///
    /// # Errors
    /// Where the queue is full, or the model generates nothing.
    pub fn begin(app: &Arc<App>, ask: Ask) -> ApiResult<Answer> {
        let Work::Generate(service) = &app.work else {
            let message = "the model is an encoder, which embeds text and generates none: ask /v1/embeddings";
            return Err(ApiError::bad(message).code("unsupported"));
        };
        let (sender, events) = unbounded_channel();
        let choices = ask.requests.first().map_or(0, |request| request.choices);
        let (left, counted) = (choices * ask.requests.len(), vec![false; ask.requests.len()]);
        let prompts_told = ask.echo && ask.requests.iter().any(|request| request.logprobs.is_some());
        let echoed = ask.requests.iter().filter(|_| ask.echo);
        let echoed = echoed.map(|request| request.prompt.clone()).collect();
        let mut handles = vec![];
        for (index, request) in ask.requests.into_iter().enumerate() {
            let sender = sender.clone();
            let sink = Box::new(move |event| sender.send((index, event)).is_ok());
            handles.push(service.lock().unwrap_or_else(PoisonError::into_inner).submit(request, sink)?);
        }
        Ok(Answer {
            events,
            _handles: handles,
            deadline: Instant::now() + app.max_time,
            endpoint: ask.endpoint,
            left,
            choices,
            echoed,
            counted,
            prompts_told,
            usage: Usage::default(),
            app: app.clone(),
            id: id(ask.endpoint),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        })
    }

    /// Most silence in a stream of it.
    pub fn silence(&self) -> Duration {
        self.app.silence
    }

    /// Waits for the next event, or for some time.
    ///
    /// # Errors
    /// Where the request failed, or took longer than it may.
    pub async fn next(&mut self, patience: Duration) -> ApiResult<Next> {
        let until = self.deadline.min(Instant::now() + patience);
        match tokio::time::timeout_at(until, self.events.recv()).await {
            Ok(Some((_, Event::Failed(error)))) => Err(error.into()),
            Ok(Some((_, Event::Prompt(_)))) if !self.prompts_told => Ok(Next::Silence),
            Ok(Some((prompt, Event::Prompt(told)))) => Ok(Next::Prompt(prompt, told)),
            Ok(Some((prompt, mut event))) => {
                if let Event::Token { choice, .. } | Event::Done { choice, .. } = &mut event {
                    *choice += prompt * self.choices;
                }
                if let Event::Done { usage, .. } = &event {
                    self.left -= 1;
                    self.usage.generated += usage.generated;
                    if !std::mem::replace(&mut self.counted[prompt], true) {
                        self.usage.prompt += usage.prompt;
                        self.usage.cached += usage.cached;
                    }
                }
                Ok(Next::Event(event))
            }
            Ok(None) => Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the answer ended before its time")),
            Err(_) if Instant::now() < self.deadline => Ok(Next::Silence),
            Err(_) => {
                let seconds = self.app.max_time.as_secs();
                let message = format!("the request took longer than the {seconds} seconds it may");
                Err(ApiError::new(StatusCode::GATEWAY_TIMEOUT, message).code("timeout"))
            }
        }
    }

    /// The whole answer.
    ///
    /// # Errors
    /// As [`Answer::next`].
    pub async fn whole(mut self) -> ApiResult<Value> {
        let mut choices = self.beginnings()?;
        while self.left > 0 {
            match self.next(self.app.max_time).await? {
                Next::Event(Event::Token { choice, token, text, logprobs }) => {
                    let choice = &mut choices[choice];
                    let offset = choice.text.len();
                    choice.text += &text;
                    choice.logprobs.extend(logprobs.map(|logprobs| Told::Row(logprobs, offset)));
                    debug_assert!(choice.finish.is_none(), "token {token} after the end");
                }
                Next::Event(Event::Done { choice, finish, text, .. }) => {
                    choices[choice].text += &text;
                    choices[choice].finish = Some(reason(finish));
                }
                Next::Prompt(prompt, told) => {
                    self.choices_of(prompt).for_each(|choice| choices[choice].tell_prompt(&told));
                }
                _ => {}
            }
        }
        let choices: Vec<Value> =
            choices.iter().enumerate().map(|(index, choice)| self.choice(index, choice)).collect();
        let mut body = self.envelope(false, choices);
        body["usage"] = usage(&self.usage);
        Ok(body)
    }

    /// All choices before their first token.
    ///
    /// # Errors
    /// Where prompts that are to be told cannot be decoded.
    pub fn beginnings(&self) -> ApiResult<Vec<Choice>> {
        (0..self.left).map(|choice| self.beginning(choice)).collect()
    }

    /// Choices of a prompt.
    fn choices_of(&self, prompt: usize) -> std::ops::Range<usize> {
        prompt * self.choices..(prompt + 1) * self.choices
    }

    /// A choice before its first token: empty, or with its prompt.
    fn beginning(&self, choice: usize) -> ApiResult<Choice> {
        let Some(prompt) = self.echoed.get(choice / self.choices) else { return Ok(Choice::default()) };
        let mut decoder = self.app.tokens()?.decoder();
        let mut begun = Choice::default();
        for token in prompt {
            begun.untold.push_back((*token, begun.text.len()));
            begun.text += &decoder.push(*token)?;
        }
        begun.text += &decoder.finish()?;
        let first = begun.untold.pop_front().filter(|_| self.prompts_told);
        begun.logprobs.extend(first.map(|(token, offset)| Told::First(token, offset)));
        Ok(begun)
    }

    /// The text of a prompt, where a stream tells it at once.
    pub fn echo(&self, index: usize, choice: &Choice) -> Option<Value> {
        let at_once = !self.echoed.is_empty() && !self.prompts_told;
        at_once.then(|| self.piece(index, &choice.text, &[], None))
    }

    /// The next piece of a prompt for each of its choices, with its log probabilities.
    pub fn prompt_chunks(&self, prompt: usize, told: &[Logprobs], choices: &mut [Choice]) -> Vec<Value> {
        let piece = |index: usize| {
            let choice = &mut choices[index];
            choice.tell_prompt(told);
            let told = std::mem::take(&mut choice.logprobs);
            let start = told.first().map_or(choice.text.len(), |told| told.place().1);
            let end = choice.untold.front().map_or(choice.text.len(), |(_, offset)| *offset);
            self.piece(index, &choice.text[start..end], &told, None)
        };
        self.choices_of(prompt).map(piece).collect()
    }

    fn choice(&self, index: usize, choice: &Choice) -> Value {
        let logprobs = self.logprobs(&choice.logprobs);
        let finish = choice.finish;
        match self.endpoint {
            Endpoint::Chat => {
                let message = json!({"role": "assistant", "content": choice.text, "refusal": null});
                json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
            }
            Endpoint::Completion => {
                json!({"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": finish})
            }
        }
    }

    /// One event of a stream.
    pub fn chunk(&self, event: Event, choices: &mut [Choice]) -> Value {
        let (index, text, logprobs, finish) = match event {
            Event::Token { choice, text, logprobs, .. } => (choice, text, logprobs, None),
            Event::Done { choice, finish, text, .. } => (choice, text, None, Some(reason(finish))),
            Event::Failed(_) | Event::Prompt(_) => (0, String::new(), None, None),
        };
        let before = choices[index].text.len();
        choices[index].text += &text;
        let told: Vec<Told> = logprobs.into_iter().map(|logprobs| Told::Row(logprobs, before)).collect();
        self.piece(index, &text, &told, finish)
    }

    /// A piece of a choice, as a stream tells it.
    fn piece(&self, index: usize, text: &str, told: &[Told], finish: Option<&str>) -> Value {
        let logprobs = self.logprobs(told);
        let choice = match self.endpoint {
            Endpoint::Chat => {
                json!({"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish})
            }
            Endpoint::Completion => {
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
            }
        };
        self.envelope(true, vec![choice])
    }

    /// The event before the first token of a chat.
    pub fn opening(&self, choice: usize) -> Value {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        self.envelope(true, vec![json!({"index": choice, "delta": delta, "logprobs": null, "finish_reason": null})])
    }

    /// The event after the last one, where it was asked for.
    pub fn counts(&self) -> Value {
        let mut body = self.envelope(true, vec![]);
        body["usage"] = usage(&self.usage);
        body
    }

    fn envelope(&self, chunk: bool, choices: Vec<Value>) -> Value {
        let object = match (self.endpoint, chunk) {
            (Endpoint::Chat, true) => "chat.completion.chunk",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.app.name,
            "system_fingerprint": concat!("mansard-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    /// In the form of the endpoint; null where none were asked for.
    fn logprobs(&self, tokens: &[Told]) -> Value {
        if tokens.is_empty() {
            return Value::Null;
        }
        let text = |token: u32| {
            let text = self.app.tokens().and_then(|tokens| tokens.decode(&[token])).unwrap_or_default();
            let name = || self.app.tokens().ok().and_then(|tokens| tokens.name(token)).unwrap_or_default();
            if text.is_empty() { name() } else { text }
        };
        let told = |(token, logprob): (u32, f32)| {
            let text = text(token);
            json!({"token": text, "bytes": text.as_bytes(), "logprob": logprob})
        };
        let entry = |logprobs: &Logprobs| {
            let mut entry = told((logprobs.token, logprobs.logprob));
            entry["top_logprobs"] = logprobs.top.iter().map(|top| told(*top)).collect();
            entry
        };
        let likeliest = |logprobs: &Logprobs| -> Value {
            logprobs.top.iter().map(|(token, logprob)| (text(*token), json!(logprob))).collect()
        };
        match self.endpoint {
            Endpoint::Chat => {
                let content: Vec<Value> = tokens.iter().filter_map(Told::row).map(entry).collect();
                json!({"content": content, "refusal": null})
            }
            Endpoint::Completion => json!({
                "tokens": tokens.iter().map(|told| text(told.place().0)).collect::<Vec<_>>(),
                "token_logprobs": tokens.iter().map(|told| told.row().map(|l| l.logprob)).collect::<Vec<_>>(),
                "top_logprobs": tokens.iter().map(|told| told.row().map(likeliest)).collect::<Vec<_>>(),
                "text_offset": tokens.iter().map(|told| told.place().1).collect::<Vec<_>>(),
            }),
        }
    }
}

/// A token whose log probability is told, with the bytes of text before it.
#[derive(Clone)]
enum Told {
    /// A prompt's first, which has none.
    First(u32, usize),
    Row(Logprobs, usize),
}

impl Told {
    fn row(&self) -> Option<&Logprobs> {
        if let Told::Row(logprobs, _) = self { Some(logprobs) } else { None }
    }

    fn place(&self) -> (u32, usize) {
        match self {
            Told::First(token, offset) => (*token, *offset),
            Told::Row(logprobs, offset) => (logprobs.token, *offset),
        }
    }
}

/// A choice on its way.
#[derive(Clone, Default)]
pub struct Choice {
    text: String,
    /// Tokens of the prompt that is told, whose log probabilities have not come yet.
    untold: VecDeque<(u32, usize)>,
    logprobs: Vec<Told>,
    finish: Option<&'static str>,
}

impl Choice {
    fn tell_prompt(&mut self, told: &[Logprobs]) {
        for logprobs in told {
            let offset = self.untold.pop_front().map_or(0, |(_, offset)| offset);
            self.logprobs.push(Told::Row(logprobs.clone(), offset));
        }
    }
}

fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::StopToken(_) | Finish::StopText | Finish::Caller => "stop",
        Finish::MaxTokens | Finish::Context => "length",
    }
}

fn usage(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    })
}

fn id(endpoint: Endpoint) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let prefix = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
    let start = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64);
    format!("{prefix}-{start:x}{:04x}", NEXT.fetch_add(1, Ordering::Relaxed))
}
