//! What is asked of a batch, and what it tells.

use crate::generate::{Finish, GenerateOptions};
use crate::logprobs::Logprobs;
use crate::sample::Constraint;
use mansard_ir::Error;

/// Names a request of a batch, in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A prompt, and what is to be made of it.
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen, and how many. The first choice has this seed, the others seeds made of it.
    pub options: GenerateOptions,
    /// Answers to the prompt, each with random numbers of its own.
    pub choices: usize,
    /// Text that ends an answer, and is no part of it.
    pub stop: Vec<String>,
    /// Tell each token's log probability, and those of so many of the likeliest.
    pub logprobs: Option<usize>,
    /// Tell the prompt's own log probabilities, and those of so many of the likeliest in place of each of its tokens. Its
    /// pieces are then computed for this request alone, and it may ask for no token.
    pub prompt_logprobs: Option<usize>,
    /// What tokens may come.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Who asks: those who have fewest sequences running come first.
    pub client: u64,
    /// Dropped when the request no longer waits.
    pub ticket: Option<Box<dyn Send>>,
}

impl Request {
    /// One answer to a prompt.
    pub fn new(prompt: Vec<u32>, options: GenerateOptions) -> Request {
        Request {
            prompt,
            options,
            choices: 1,
            stop: vec![],
            logprobs: None,
            prompt_logprobs: None,
            constraint: None,
            client: 0,
            ticket: None,
        }
    }
}

/// Hears what becomes of a request; gives `false` where nobody listens any more, which ends it.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;

/// What becomes of a request. After `Done` for each choice, or `Failed`, comes nothing.
#[derive(Debug)]
pub enum Event {
    /// Log probabilities of the prompt's next tokens, from its second on, before any `Token`.
    Prompt(Vec<Logprobs>),
    /// A token.
    Token {
        /// Of which answer.
        choice: usize,
        /// Its id.
        token: u32,
        /// Text that can be shown now: empty while a character is unfinished or a stop string may have begun.
        text: String,
        /// Where asked for.
        logprobs: Option<Logprobs>,
    },
    /// The end of an answer.
    Done {
        /// Which answer.
        choice: usize,
        /// Why.
        finish: Finish,
        /// Text that was held back.
        text: String,
        /// Of this answer.
        usage: Usage,
    },
    /// The end of all answers.
    Failed(Error),
}

/// Tokens of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Of those, what other requests had computed.
    pub cached: usize,
    /// Generated; one that ends the text not counted.
    pub generated: usize,
}
