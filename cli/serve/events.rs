//! An answer -> server-sent events, as it comes; a comment after some silence keeps proxies patient.

use super::answer::{Answer, Next};
use super::ask::Endpoint;
use super::errors::{ApiError, text};
use axum::body::Body;
use axum::response::Response;
use futures_util::stream;
use serde_json::Value;
use std::convert::Infallible;

/// The response. When the client leaves, the stream is dropped, and the answer with it.
pub fn respond(answer: Answer, include_usage: bool) -> Response {
    let mut opening = String::new();
    if answer.endpoint == Endpoint::Chat {
        (0..answer.left).for_each(|choice| opening += &event(&answer.opening(choice)));
    }
    for choice in 0..answer.left {
        match answer.echo(choice) {
            Ok(text) => text.iter().for_each(|text| opening += &event(text)),
            Err(error) => opening += &failure(&error),
        }
    }
    let first = stream::iter([Ok::<_, Infallible>(opening)]);
    let rest = stream::unfold(Some(answer), move |answer| async move {
        let (text, answer) = next(answer?, include_usage).await;
        Some((Ok(text), answer))
    });
    let mut response = text("text/event-stream", Body::from_stream(stream::StreamExt::chain(first, rest)));
    let headers = response.headers_mut();
    headers.insert("cache-control", axum::http::HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}

/// The next events, and the answer where more will follow.
async fn next(mut answer: Answer, include_usage: bool) -> (String, Option<Answer>) {
    match answer.next(answer.silence()).await {
        Ok(Next::Silence) => (": on its way\n\n".into(), Some(answer)),
        Ok(Next::Prompt(..)) => (String::new(), Some(answer)),
        Err(error) => (failure(&error), None),
        Ok(Next::Event(told)) => {
            let mut text = event(&answer.chunk(told));
            if answer.left > 0 {
                return (text, Some(answer));
            }
            if include_usage {
                text += &event(&answer.counts());
            }
            (text + "data: [DONE]\n\n", None)
        }
    }
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn failure(error: &ApiError) -> String {
    event(&error.body())
}
