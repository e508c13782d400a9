//! What an answer has to look like -> which tokens may come next, by the `llguidance` crate.
//!
//! ```text
//!  JSON schema, regular expression, grammar --Grammars (a vocabulary)--> Constraint --> Request::constraint
//! ```
//!
//! A crate of its own, so that programs that need no grammars are without them. The vocabulary must be one of bytes, which
//! byte-level BPE and SentencePiece are.
//!
//! ```no_run
//! use mansard_grammar::{Format, Grammars};
//! use mansard_runtime::{GenerateOptions, Model, Request};
//!
//! # fn main() -> mansard_ir::Result<()> {
//! let model = Model::open("m.mansard")?;
//! let grammars = Grammars::new(&model)?; // once: it reads the whole vocabulary
//! let schema = Format::Schema(r#"{"type": "object", "properties": {"city": {"type": "string"}}}"#.into());
//! let prompt = model.tokens()?.encode("Where is the Colosseum?", true)?;
//! let constraint = Some(grammars.constraint(&schema)?);
//! let request = Request { constraint, ..Request::new(prompt, GenerateOptions::default()) };
//! # Ok(()) }
//! ```

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use mansard_ir::{Error, Kind, Result};
use mansard_runtime::{Constraint, Model};
use serde_json::{Value, json};
use std::sync::{Arc, OnceLock};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// What an answer has to look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// Any JSON object.
    Json,
    /// JSON of a schema, which is JSON itself.
    Schema(String),
    /// The whole answer matches a regular expression in Rust's syntax, without look-around.
    Regex(String),
    /// A context-free grammar in Lark's form, as llguidance reads it.
    Lark(String),
}

impl Format {
    fn grammar(&self) -> Result<TopLevelGrammar> {
        Ok(match self {
            Format::Json => TopLevelGrammar::from_json_schema(json!({"type": "object"})),
            Format::Schema(schema) => {
                let schema: Value = serde_json::from_str(schema).map_err(|e| wrong(format!("not JSON: {e}")))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Format::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Format::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        })
    }

    /// What it is called in messages.
    fn name(&self) -> &'static str {
        match self {
            Format::Json => "the format",
            Format::Schema(_) => "the schema",
            Format::Regex(_) => "the regular expression",
            Format::Lark(_) => "the grammar",
        }
    }
}

/// A model's vocabulary as grammars read it.
pub struct Grammars(ParserFactory);

impl Grammars {
    /// Reads the vocabulary.
    ///
    /// # Errors
    /// Where it is not of bytes, or no token ends an answer.
    pub fn new(model: &Model) -> Result<Grammars> {
        let info = model.info();
        let words = model.tokens()?.bytes(info.vocab)?;
        let Some(end) = info.end_tokens.first() else {
            let message = "the model has no token that ends an answer, which a grammar needs";
            return Err(Error::new(Kind::Unsupported, message));
        };
        let trie = TokTrie::from(&TokRxInfo::new(info.vocab as u32, *end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| wrong(format!("{e:#}")))?;
        factory.quiet();
        Ok(Grammars(factory))
    }

    /// Those of a model that are kept in `cell`, made when first asked for.
    ///
    /// # Errors
    /// As [`Grammars::new`].
    pub fn kept<'a>(cell: &'a OnceLock<Grammars>, model: &Model) -> Result<&'a Grammars> {
        if let Some(grammars) = cell.get() {
            return Ok(grammars);
        }
        let made = Grammars::new(model)?;
        Ok(cell.get_or_init(|| made))
    }

    /// What keeps an answer to a format, from its first token on.
    ///
    /// # Errors
    /// Where it is not understood, or nothing satisfies it.
    pub fn constraint(&self, format: &Format) -> Result<Box<dyn Constraint>> {
        let refused = |e: Error| e.at(format.name());
        let parser = self.0.create_parser(format.grammar().map_err(refused)?);
        let mut matcher = Matcher::new(Ok(parser.map_err(|e| refused(wrong(format!("{e:#}"))))?));
        matcher.compute_mask().map_err(|e| refused(wrong(format!("{e:#}"))))?;
        Ok(Box::new(Grammar { matcher, allowed: vec![], name: format.name() }))
    }
}

fn wrong(message: String) -> Error {
    Error::new(Kind::Usage, message.trim().to_owned())
}

/// A grammar at some place of an answer.
struct Grammar {
    matcher: Matcher,
    allowed: Vec<u32>,
    name: &'static str,
}

impl Constraint for Grammar {
    fn allowed(&mut self) -> Result<&[u32]> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| wrong(e.to_string()).at(self.name))?;
        self.allowed = mask.as_slice().to_vec();
        Ok(&self.allowed)
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(|e| wrong(e.to_string()).at(self.name))
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Grammar { matcher: self.matcher.deep_clone(), allowed: vec![], name: self.name })
    }
}
