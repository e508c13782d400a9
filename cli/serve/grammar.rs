//! `response_format` -> what keeps an answer to it.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use mansard_grammar::Grammars;
use mansard_ir::Kind;
use mansard_runtime::Constraint;
use serde::Deserialize;
use serde_json::Value;

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

impl Format {
    /// What keeps an answer to it; `None` where anything may come.
    ///
    /// # Errors
    /// Where it cannot be satisfied or is not understood, or the vocabulary is not of bytes.
    pub fn constraint(&self, app: &App) -> ApiResult<Option<Box<dyn Constraint>>> {
        let format = match self {
            Format::Text => return Ok(None),
            Format::JsonObject => mansard_grammar::Format::Json,
            Format::JsonSchema { json_schema: NamedSchema { schema: None } } => {
                return Err(ApiError::field("response_format", "expected a schema, found none").code("invalid_schema"));
            }
            Format::JsonSchema { json_schema: NamedSchema { schema: Some(schema) } } => {
                mansard_grammar::Format::Schema(schema.to_string())
            }
            Format::Regex { regex } => mansard_grammar::Format::Regex(regex.clone()),
            Format::Grammar { grammar } => mansard_grammar::Format::Lark(grammar.clone()),
        };
        constraint(app, &format, "response_format").map(Some)
    }
}

/// What keeps an answer to a format that `param` asks for.
///
/// # Errors
/// As [`Format::constraint`].
pub fn constraint(app: &App, format: &mansard_grammar::Format, param: &str) -> ApiResult<Box<dyn Constraint>> {
    let grammars = Grammars::kept(&app.grammars, &app.model);
    let made = grammars.and_then(|grammars| grammars.constraint(format));
    made.map_err(|error| {
        let code = if error.kind() == Kind::Unsupported { "unsupported" } else { "invalid_schema" };
        ApiError::field(param, error.to_string()).code(code)
    })
}
