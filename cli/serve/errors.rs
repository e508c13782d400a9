//! What went wrong -> an HTTP status and OpenAI's error body.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mansard_ir::{Error, Kind};
use mansard_runtime::Refused;
use serde_json::{Value, json};

/// A refusal, or a failure on the way.
#[derive(Debug)]
pub struct ApiError {
    /// HTTP's.
    pub status: StatusCode,
    /// What was expected and found.
    pub message: String,
    /// The field of the request.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds after which it may be worth trying again.
    pub retry_after: Option<u64>,
}

/// `Result` of a handler.
pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    /// An error with that status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A request that makes no sense.
    pub fn bad(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field that makes no sense.
    pub fn field(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::bad(message) }
    }

    /// With a word for programs.
    pub fn code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// OpenAI's body.
    pub fn body(&self) -> Value {
        let ApiError { message, param, code, .. } = self;
        json!({"error": {"message": message, "type": self.kind(), "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        let status = match error.kind() {
            Kind::Usage | Kind::Input | Kind::Unsupported => StatusCode::BAD_REQUEST,
            Kind::Io => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Internal | Kind::Differs => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError::new(status, error.to_string())
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> ApiError {
        match refused {
            Refused::Busy(wait) => {
                let message = "as many requests wait as this server lets wait; try again later";
                let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full");
                ApiError { retry_after: Some(wait.as_secs().max(1)), ..error }
            }
            Refused::Closed => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down"),
        }
    }
}

/// A response that is complete.
pub fn text(content_type: &'static str, body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, content_type)], body.into()).into_response()
}
