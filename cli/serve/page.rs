//! The chat page: one file that refers to nothing outside itself.

/// `/`.
pub const PAGE: &str = include_str!("page.html");

/// Nothing but the page's own styles and scripts, and this server.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                          img-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'";
