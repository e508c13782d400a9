//! The one error type: a sentence that says what was expected and found, the places it concerns (innermost first), and
//! what to try.
//!
//! Inner code makes the sentence; whoever knows the place attaches it on the way up:
//!
//! ```
//! use mansard_ir::{Error, Kind};
//! let error = Error::new(Kind::Input, "expected 18 groups of 32, found 17")
//!     .at("tensor `blk.0.ffn_down.weight`")
//!     .at("smollm2.gguf");
//! assert_eq!(error.to_string(), "smollm2.gguf: tensor `blk.0.ffn_down.weight`: expected 18 groups of 32, found 17");
//! assert_eq!(error.exit_code(), 3);
//! ```

use std::fmt;

/// Whose fault an error is; decides the exit code of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was asked has been answered, with no: an artifact that is further from its model than it may be (exit 1).
    Differs,
    /// A request that makes no sense: contradictory options, an empty prompt, a context that is too short (exit 2).
    Usage,
    /// Outside bytes that are damaged, hostile or inconsistent (exit 3).
    Input,
    /// Well-formed, but something this version does not do; the message lists what is supported (exit 4).
    Unsupported,
    /// The operating system refused: a missing file, a full disk, no memory (exit 5).
    Io,
    /// A broken invariant of Mansard itself: a pass or backend produced something illegal (exit 70).
    Internal,
}

/// An error with its places and advice. Cheap to move: one pointer.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    places: Vec<String>,
    help: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` saying `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner { kind, message: message.into(), places: vec![], help: None, source: None }))
    }

    /// Adds the next-outer place: a value, a tensor, a byte range, then the file.
    pub fn at(mut self, place: impl Into<String>) -> Error {
        self.0.places.push(place.into());
        self
    }

    /// Adds what to try.
    pub fn help(mut self, help: impl Into<String>) -> Error {
        self.0.help = Some(help.into());
        self
    }

    /// Keeps the error that caused this one.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// An operating-system error about `path`.
    pub fn io(path: impl AsRef<std::path::Path>, error: std::io::Error) -> Error {
        Error::new(Kind::Io, error.to_string()).at(path.as_ref().display().to_string()).caused_by(error)
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The sentence, without places.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The places, innermost first.
    pub fn places(&self) -> &[String] {
        &self.0.places
    }

    /// What to try, where something is known.
    pub fn advice(&self) -> Option<&str> {
        self.0.help.as_deref()
    }

    /// The documented exit code of the command line for this kind.
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            Kind::Differs => 1,
            Kind::Usage => 2,
            Kind::Input => 3,
            Kind::Unsupported => 4,
            Kind::Io => 5,
            Kind::Internal => 70,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for place in self.0.places.iter().rev() {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

/// Attaches places to the error of a `Result` on its way up.
pub trait Place<T> {
    /// Adds `place`, computed only on failure.
    fn at(self, place: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Place<T> for Result<T> {
    fn at(self, place: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.at(place()))
    }
}

/// `bail!(Input, "expected {n}")` returns an [`Error`] of that kind.
#[macro_export]
macro_rules! bail {
    ($kind:ident, $($arg:tt)*) => { return Err($crate::Error::new($crate::Kind::$kind, format!($($arg)*))) };
}
