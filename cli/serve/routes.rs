//! Paths -> handlers; what all of them have in common: keys, bodies, spans, figures.

use super::access;
use super::answer::Answer;
use super::app::{App, Work};
use super::ask::{self, Endpoint};
use super::errors::{ApiError, ApiResult, text};
use super::{embeddings, events, metrics, page};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use tracing::Instrument;

type Shared = State<Arc<App>>;

const ROUTES: [&str; 7] =
    ["/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"];

/// All paths.
pub fn router(app: &Arc<App>) -> Router {
    Router::new()
        .route("/", get(chat_page))
        .route("/health", get(health))
        .route("/metrics", get(figures))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(models))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(complete))
        .route("/v1/embeddings", post(embed))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(from_fn_with_state(app.clone(), common))
        .with_state(app.clone())
}

/// Around every request: who asks, a span, figures.
async fn common(State(app): Shared, request: Request, next: Next) -> Response {
    let route = ROUTES.into_iter().find(|route| *route == request.uri().path()).unwrap_or("other");
    let span = tracing::info_span!("request", method = %request.method(), route);
    let start = Instant::now();
    let response = async {
        match admitted(&app, &request, route) {
            Ok(()) => next.run(request).await,
            Err(error) => error.into_response(),
        }
    };
    let response = response.instrument(span.clone()).await;
    let status = response.status().as_u16();
    app.http.count(route, status);
    span.in_scope(|| tracing::info!(status, seconds = start.elapsed().as_secs_f64(), "answered"));
    response
}

fn admitted(app: &App, request: &Request, route: &str) -> ApiResult<()> {
    if app.only_own_host {
        access::own_host(request.headers())?;
    }
    if route != "/" && route != "/health" {
        access::client(app.keys.as_ref(), request.headers())?;
    }
    Ok(())
}

async fn chat_page() -> Response {
    let mut response = text("text/html; charset=utf-8", page::PAGE);
    let policy = HeaderValue::from_static(page::POLICY);
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn health(State(app): Shared) -> Response {
    let alive = match &app.work {
        Work::Generate(service) => service.lock().unwrap_or_else(PoisonError::into_inner).is_alive(),
        Work::Embed(_) => true,
    };
    let status = if alive { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let word = if alive { "ok" } else { "failed" };
    (status, axum::Json(json!({"status": word, "artifact_replaced": app.is_replaced()}))).into_response()
}

async fn figures(State(app): Shared) -> Response {
    text("text/plain; version=0.0.4", metrics::page(&app))
}

async fn models(State(app): Shared, request: Request) -> ApiResult<axum::Json<Value>> {
    let info = app.model.info();
    let kind = if info.encoder { "embedding" } else { "generation" };
    let chat = app.tokens()?.has_chat_template();
    let model = json!({
        "id": app.name, "object": "model", "created": app.created, "owned_by": "mansard",
        "architecture": info.architecture, "context": app.context, "kind": kind, "chat": chat,
    });
    match request.uri().path().strip_prefix("/v1/models/") {
        None => Ok(axum::Json(json!({"object": "list", "data": [model]}))),
        Some(name) => ask::known_model(&app, name).map(|()| axum::Json(model)),
    }
}

async fn chat(state: Shared, request: Request) -> ApiResult<Response> {
    generate(state, request, Endpoint::Chat).await
}

async fn complete(state: Shared, request: Request) -> ApiResult<Response> {
    generate(state, request, Endpoint::Completion).await
}

async fn generate(State(app): Shared, request: Request, endpoint: Endpoint) -> ApiResult<Response> {
    let client = access::client(app.keys.as_ref(), request.headers())?;
    let body: ask::Body = read(&app, request).await?;
    // Templates, tokenizers and grammars take their time, which other connections need not wait for.
    let theirs = app.clone();
    let checked = tokio::task::spawn_blocking(move || body.check(&theirs, endpoint, client));
    let failed = |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "reading the request failed; please report it");
    let ask = checked.await.map_err(failed)??;
    let (stream, include_usage) = (ask.stream, ask.include_usage);
    tracing::debug!(prompts = ask.requests.len(), stream, "asked");
    let answer = Answer::begin(&app, ask)?;
    match stream {
        true => Ok(events::respond(answer, include_usage)),
        false => Ok(axum::Json(answer.whole().await?).into_response()),
    }
}

async fn embed(State(app): Shared, request: Request) -> ApiResult<axum::Json<Value>> {
    let body = read(&app, request).await?;
    Ok(axum::Json(embeddings::answer(&app, body).await?))
}

/// The body, which is JSON, no larger than it may be, and comes in time.
async fn read<T: DeserializeOwned>(app: &App, request: Request) -> ApiResult<T> {
    is_json(request.headers())?;
    let too_large = || {
        let message = format!("expected a body of at most {} bytes", app.max_body);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if length.and_then(|length| length.parse::<u64>().ok()).is_some_and(|length| length > app.max_body as u64) {
        return Err(too_large());
    }
    let body: Body = request.into_body();
    let bytes = tokio::time::timeout(app.read_time, to_bytes(body, app.max_body)).await;
    let slow = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request's body did not come in time");
    let bytes = bytes.map_err(slow)?.map_err(|_| too_large())?;
    let text = std::str::from_utf8(&bytes).map_err(|e| ApiError::bad(format!("expected a body in UTF-8: {e}")))?;
    serde_json::from_str(text).map_err(|e| ApiError::bad(format!("the request's body: {e}")).code("invalid_body"))
}

/// Only JSON: a web page of somebody else's cannot send that without asking this server first.
fn is_json(headers: &HeaderMap) -> ApiResult<()> {
    let found = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if found.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        return Ok(());
    }
    let message = format!("expected a Content-Type of application/json, found `{found}`");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}

async fn unknown_path(request: Request) -> ApiError {
    let message = format!("expected one of {}, found {}", ROUTES.join(", "), request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, message)
}

async fn unknown_method(method: Method) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} means nothing here"))
}
