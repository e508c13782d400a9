//! An answer -> server-sent events, as it comes; a comment after some silence keeps proxies patient.

use super::answer::{Answer, Choice, Next};
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
    let begun = match answer.beginnings() {
        Ok(choices) => {
            let echoed = choices.iter().enumerate().filter_map(|(index, choice)| answer.echo(index, choice));
            echoed.for_each(|text| opening += &event(&text));
            Some((answer, choices))
        }
        Err(error) => {
            opening += &failure(&error);
            None
        }
    };
    let first = stream::iter([Ok::<_, Infallible>(opening)]);
    let rest = stream::unfold(begun, move |begun| async move {
        let (mut answer, mut choices) = begun?;
        let (text, more) = next(&mut answer, &mut choices, include_usage).await;
        Some((Ok(text), more.then_some((answer, choices))))
    });
    let mut response = text("text/event-stream", Body::from_stream(stream::StreamExt::chain(first, rest)));
    let headers = response.headers_mut();
    headers.insert("cache-control", axum::http::HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}

/// The next events, and whether more will follow.
async fn next(answer: &mut Answer, choices: &mut [Choice], include_usage: bool) -> (String, bool) {
    match answer.next(answer.silence()).await {
        Ok(Next::Silence) => (": on its way\n\n".into(), true),
        Ok(Next::Prompt(prompt, told)) => {
            (answer.prompt_chunks(prompt, &told, choices).iter().map(event).collect(), true)
        }
        Err(error) => (failure(&error), false),
        Ok(Next::Event(told)) => {
            let mut text = event(&answer.chunk(told, choices));
            if answer.left > 0 {
                return (text, true);
            }
            if include_usage {
                text += &event(&answer.counts());
            }
            (text + "data: [DONE]\n\n", false)
        }
    }
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn failure(error: &ApiError) -> String {
    event(&error.body())
}
