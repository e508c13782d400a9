//! Who may ask: API keys of a file, and requests that no web page of somebody else's can make.
//!
//! Keys are kept and compared as BLAKE3 hashes, all of them and in constant time.

use super::errors::{ApiError, ApiResult};
use axum::http::{HeaderMap, StatusCode, header};
use mansard_ir::{Error, Kind, Result};
use std::net::IpAddr;
use std::path::Path;
use subtle::{ConditionallySelectable, ConstantTimeEq};

/// The keys that are good.
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Reads a file of one key a line.
    ///
    /// # Errors
    /// Where it cannot be read, others than its owner can read it, or it holds no key.
    pub fn read(path: &Path) -> Result<Keys> {
        only_owner_reads(path)?;
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: Vec<[u8; 32]> = lines.map(|key| *blake3::hash(key.as_bytes()).as_bytes()).collect();
        if keys.is_empty() {
            let error = Error::new(Kind::Usage, "expected one API key a line, found none");
            return Err(error.at(path.display().to_string()));
        }
        Ok(Keys(keys))
    }

    /// The number of the key that was given.
    fn find(&self, given: &str) -> Option<u64> {
        let given = *blake3::hash(given.as_bytes()).as_bytes();
        let mut found = u64::MAX;
        for (key, index) in self.0.iter().zip(0u64..) {
            found.conditional_assign(&index, key.ct_eq(&given));
        }
        (found != u64::MAX).then_some(found)
    }
}

#[cfg(unix)]
fn only_owner_reads(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let message = format!("expected a key file that only its owner can read, found mode {:03o}", mode & 0o777);
    Err(Error::new(Kind::Usage, message).at(path.display().to_string()).help("chmod 600 it"))
}

#[cfg(not(unix))]
fn only_owner_reads(_: &Path) -> Result<()> {
    Ok(())
}

/// The client that a request is of: its key's number, or 0 where none is needed.
///
/// # Errors
/// Where a key is needed and none, or a wrong one, was given.
pub fn client(keys: Option<&Keys>, headers: &HeaderMap) -> ApiResult<u64> {
    let Some(keys) = keys else { return Ok(0) };
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.split_once(' ')).filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer"));
    let found = given.and_then(|(_, key)| keys.find(key.trim()));
    found.ok_or_else(|| {
        let message = "expected a good API key in `Authorization: Bearer KEY`, found none";
        ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key")
    })
}

/// Refuses what a web page could send to a server on its visitor's machine that needs no key: a name that the page's owner
/// lets mean this machine.
///
/// # Errors
/// Then.
pub fn own_host(headers: &HeaderMap) -> ApiResult<()> {
    let Some(host) = headers.get(header::HOST).and_then(|value| value.to_str().ok()) else { return Ok(()) };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    if name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
        return Ok(());
    }
    let message = "expected this machine's own name in `Host`: a server without API keys answers to no other";
    Err(ApiError::new(StatusCode::FORBIDDEN, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn keys_are_found_whole() {
        let keys = Keys(["one", "two"].map(|key| *blake3::hash(key.as_bytes()).as_bytes()).into());
        let client = |value: &str| client(Some(&keys), &headers(header::AUTHORIZATION, value)).ok();
        assert_eq!([client("Bearer one"), client("bearer two ")], [Some(0), Some(1)]);
        for wrong in ["Bearer tw", "Bearer twoo", "Bearer", "two", "Basic two", ""] {
            assert_eq!(client(wrong), None, "{wrong}");
        }
        assert!(super::client(Some(&keys), &HeaderMap::new()).is_err());
        assert_eq!(super::client(None, &HeaderMap::new()).unwrap(), 0);
    }

    #[test]
    fn other_names_are_refused() {
        let own = |host: &str| own_host(&headers(header::HOST, host)).is_ok();
        assert!(own("127.0.0.1:8080") && own("localhost") && own("[::1]:80") && own("LOCALHOST:1"));
        assert!(!own("evil.example:8080") && !own("10.0.0.1") && !own(""));
    }
}
