//! `/v1/embeddings`: texts -> vectors, by an encoder.

use super::app::{App, Work};
use super::ask::known_model;
use super::errors::{ApiError, ApiResult};
use mansard_ir::Place;
use mansard_runtime::embed;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::{Arc, PoisonError};

/// The request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Body {
    model: String,
    input: Input,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
    #[serde(rename = "user")]
    _user: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Input {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// Most texts of a request.
const MOST_TEXTS: usize = 2048;

/// Answers it.
///
/// # Errors
/// Where a field makes no sense, or the model is no encoder.
pub async fn answer(app: &Arc<App>, body: Body) -> ApiResult<Value> {
    known_model(app, &body.model)?;
    let Work::Embed(engine) = &app.work else {
        let message = "the model generates text; /v1/embeddings needs an encoder's artifact";
        return Err(ApiError::bad(message).code("unsupported"));
    };
    let base64 = match body.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let message = format!("expected `float` or `base64`, found `{other}`");
            return Err(ApiError::field("encoding_format", message));
        }
    };
    let width = app.model.info().hidden;
    if body.dimensions.is_some_and(|dimensions| dimensions != width) {
        return Err(ApiError::field("dimensions", format!("expected {width}, the model's own")));
    }
    let texts = texts(app, body.input)?;
    let count: usize = texts.iter().map(Vec::len).sum();
    let engine = engine.clone();
    let vectors = tokio::task::spawn_blocking(move || {
        let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
        embed(&mut engine, &texts).at(|| "input".into())
    });
    let vectors = vectors.await.map_err(|_| ApiError::bad("the embedding was given up"))??;
    let data: Vec<Value> = vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| {
            let embedding = if base64 { json!(to_base64(vector)) } else { json!(vector) };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    let usage = json!({"prompt_tokens": count, "total_tokens": count});
    Ok(json!({"object": "list", "data": data, "model": app.name, "usage": usage}))
}

fn texts(app: &App, input: Input) -> ApiResult<Vec<Vec<u32>>> {
    let encode = |text: &String| Ok(app.tokens()?.encode(text, true)?);
    let texts: Vec<Vec<u32>> = match input {
        Input::Text(text) => vec![encode(&text)?],
        Input::Texts(texts) => texts.iter().map(encode).collect::<ApiResult<_>>()?,
        Input::Tokens(tokens) => vec![tokens],
        Input::TokenLists(lists) => lists,
    };
    if texts.is_empty() || texts.len() > MOST_TEXTS {
        return Err(ApiError::field("input", format!("expected 1 to {MOST_TEXTS} texts, found {}", texts.len())));
    }
    Ok(texts)
}

/// Little-endian f32 in base64 (RFC 4648), which OpenAI's Python client asks for.
fn to_base64(vector: &[f32]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in crate::report::le_bytes(vector).chunks(3) {
        let bits = (0..3).fold(0u32, |bits, i| bits << 8 | u32::from(chunk.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_little_endian_floats() {
        assert_eq!(to_base64(&[1.0]), "AACAPw==");
        assert_eq!(to_base64(&[1.0, -2.5]), "AACAPwAAIMA=");
        assert_eq!(to_base64(&[0.0; 3]), "AAAAAAAAAAAAAAAA");
    }
}
