//! `response_format` -> which tokens may come next, by the `llguidance` crate.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use mansard_ir::{Error, Kind, Result};
use mansard_runtime::Constraint;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// What an answer has to look like. `regex` and `grammar` (Lark) are not OpenAI's.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Format {
    /// Anything.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// The schema and its name.
        json_schema: NamedSchema,
    },
    /// A regular expression for the whole answer.
    Regex {
        /// In Rust's syntax, without look-around.
        regex: String,
    },
    /// A context-free grammar.
    Grammar {
        /// In Lark's form, as llguidance reads it.
        grammar: String,
    },
}

/// A schema as OpenAI's clients send it.
#[derive(Deserialize)]
pub struct NamedSchema {
    schema: Option<Value>,
}

/// The vocabulary as grammars read it.
pub struct Grammars(ParserFactory);

impl Format {
    /// What keeps an answer to it; `None` where anything may come.
    ///
    /// # Errors
    /// Where it cannot be satisfied or is not understood, or the vocabulary is not of bytes.
    pub fn constraint(&self, app: &App) -> ApiResult<Option<Box<dyn Constraint>>> {
        let grammar = match self {
            Format::Text => return Ok(None),
            Format::JsonObject => TopLevelGrammar::from_json_schema(json!({"type": "object"})),
            Format::JsonSchema { json_schema } => {
                let schema = json_schema.schema.clone();
                TopLevelGrammar::from_json_schema(schema.ok_or_else(|| wrong("expected a schema, found none"))?)
            }
            Format::Regex { regex } => TopLevelGrammar::from_regex(regex),
            Format::Grammar { grammar } => TopLevelGrammar::from_lark(grammar.clone()),
        };
        let factory = &grammars(app)?.0;
        let parser = factory.create_parser(grammar).map_err(|e| wrong(&format!("{e:#}")))?;
        let mut matcher = Matcher::new(Ok(parser));
        matcher.compute_mask().map_err(|e| wrong(&format!("{e:#}")))?;
        Ok(Some(Box::new(Grammar { matcher, allowed: vec![] })))
    }
}

fn wrong(message: &str) -> ApiError {
    ApiError::field("response_format", message.trim()).code("invalid_schema")
}

fn grammars(app: &App) -> ApiResult<&Grammars> {
    if let Some(grammars) = app.grammars.get() {
        return Ok(grammars);
    }
    let info = app.model.info();
    let words = app.tokens()?.bytes(info.vocab)?;
    let Some(end) = info.end_tokens.first() else {
        return Err(wrong("the model has no token that ends an answer, which a grammar needs"));
    };
    let trie = TokTrie::from(&TokRxInfo::new(info.vocab as u32, *end), &words);
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&environment).map_err(|e| wrong(&format!("{e:#}")))?;
    factory.quiet();
    Ok(app.grammars.get_or_init(|| Grammars(factory)))
}

/// A grammar at some place of an answer.
struct Grammar {
    matcher: Matcher,
    allowed: Vec<u32>,
}

impl Constraint for Grammar {
    fn allowed(&mut self) -> Result<&[u32]> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| failed(&e.to_string()))?;
        self.allowed = mask.as_slice().to_vec();
        Ok(&self.allowed)
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(|e| failed(&e.to_string()))
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Grammar { matcher: self.matcher.deep_clone(), allowed: vec![] })
    }
}

fn failed(message: &str) -> Error {
    Error::new(Kind::Input, message.to_owned()).at("response_format")
}
