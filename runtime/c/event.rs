//! What becomes of a request, as C sees it.

use crate::status::{Failure, mansard_status};
use mansard_runtime::{Event, Finish, Logprobs, Usage};
use std::ffi::c_char;

/// What an event tells.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum mansard_kind {
    /// Nothing came in time.
    MANSARD_NOTHING = 0,
    /// A token, and the text that can be shown now.
    MANSARD_TOKEN = 1,
    /// The end of one answer, and text that was held back.
    MANSARD_DONE = 2,
    /// The end of all answers; nothing comes after it.
    MANSARD_END = 3,
    /// An error, which `status` and `text` tell. Only functions of the caller's hear of it this way; nothing comes after it.
    MANSARD_FAILED = 4,
}

/// Why an answer ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum mansard_finish {
    /// It has not.
    MANSARD_GOES_ON = 0,
    /// The model said so.
    MANSARD_STOP_TOKEN = 1,
    /// As many tokens as asked for.
    MANSARD_MAX_TOKENS = 2,
    /// The context is full, or what the caches hold.
    MANSARD_CONTEXT = 3,
    /// One of the texts in `stop` came.
    MANSARD_STOP_TEXT = 4,
}

/// A token and its log probability, in nats.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct mansard_likely {
    /// The token.
    pub token: u32,
    /// Its log probability, before temperature, penalties and filters.
    pub logprob: f32,
}

/// What became of a request. What it points to is there until the next event of the same request, or the request is freed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct mansard_event {
    /// What it tells.
    pub kind: mansard_kind,
    /// Of which answer.
    pub choice: u32,
    /// Of MANSARD_TOKEN: its id.
    pub token: u32,
    /// Of MANSARD_DONE: why.
    pub finish: mansard_finish,
    /// Of MANSARD_FAILED: what.
    pub status: mansard_status,
    /// UTF-8, whole characters, with a zero byte after it; empty while a character is unfinished or a stop text may have begun.
    pub text: *const c_char,
    /// Its bytes.
    pub text_bytes: usize,
    /// Of MANSARD_TOKEN, where asked for: the token's log probability.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first.
    pub top: *const mansard_likely,
    /// How many they are.
    pub top_count: usize,
    /// Of MANSARD_DONE: tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, what other requests had computed.
    pub cached_tokens: usize,
    /// Tokens of this answer; one that ends the text not counted.
    pub generated_tokens: usize,
}

/// An event and what it points to.
pub struct Shown {
    event: mansard_event,
    /// What it points to.
    pub kept: Kept,
}

/// What an event points to.
#[derive(Default)]
pub struct Kept {
    text: Vec<u8>,
    top: Vec<mansard_likely>,
}

impl Shown {
    /// An event that tells no more than its kind.
    pub fn of(kind: mansard_kind) -> Shown {
        let event = mansard_event {
            kind,
            choice: 0,
            token: 0,
            finish: mansard_finish::MANSARD_GOES_ON,
            status: mansard_status::MANSARD_OK,
            text: std::ptr::null(),
            text_bytes: 0,
            logprob: 0.0,
            top: std::ptr::null(),
            top_count: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
        };
        Shown { event, kept: Kept { text: vec![0], top: vec![] } }
    }

    /// A failure as an event.
    pub fn failure(failure: &Failure) -> Shown {
        let mut shown = Shown::of(mansard_kind::MANSARD_FAILED).with_text(failure.message());
        shown.event.status = failure.status;
        shown
    }

    fn with_text(mut self, text: &str) -> Shown {
        self.kept.text = [text.as_bytes(), &[0]].concat();
        self
    }

    /// As C sees it.
    pub fn event(&self) -> mansard_event {
        let Kept { text, top } = &self.kept;
        mansard_event {
            text: text.as_ptr().cast(),
            text_bytes: text.len() - 1,
            top: if top.is_empty() { std::ptr::null() } else { top.as_ptr() },
            top_count: top.len(),
            ..self.event
        }
    }
}

impl TryFrom<Event> for Shown {
    type Error = Failure;

    fn try_from(event: Event) -> Result<Shown, Failure> {
        match event {
            Event::Token { choice, token, text, logprobs } => {
                let mut shown = Shown::of(mansard_kind::MANSARD_TOKEN).with_text(&text);
                (shown.event.choice, shown.event.token) = (choice as u32, token);
                if let Some(Logprobs { logprob, top, .. }) = logprobs {
                    shown.event.logprob = logprob;
                    shown.kept.top =
                        top.into_iter().map(|(token, logprob)| mansard_likely { token, logprob }).collect();
                }
                Ok(shown)
            }
            Event::Done { choice, finish, text, usage: Usage { prompt, cached, generated } } => {
                let mut shown = Shown::of(mansard_kind::MANSARD_DONE).with_text(&text);
                shown.event.choice = choice as u32;
                shown.event.finish = match finish {
                    Finish::StopToken(_) => mansard_finish::MANSARD_STOP_TOKEN,
                    Finish::MaxTokens => mansard_finish::MANSARD_MAX_TOKENS,
                    Finish::Context => mansard_finish::MANSARD_CONTEXT,
                    Finish::StopText => mansard_finish::MANSARD_STOP_TEXT,
                    Finish::Caller => mansard_finish::MANSARD_GOES_ON,
                };
                shown.event.prompt_tokens = prompt;
                shown.event.cached_tokens = cached;
                shown.event.generated_tokens = generated;
                Ok(shown)
            }
            Event::Prompt(_) => {
                let message = "log probabilities of a prompt, which nobody asked for";
                Err(Failure::new(mansard_status::MANSARD_INTERNAL, message))
            }
            Event::Failed(error) => Err(error.into()),
        }
    }
}
