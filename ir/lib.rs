//! The nouns of Mansard: what a program *is*, at every stage.
//!
//! ```text
//!  model file         Model             Plan             Artifact          tokens
//!      o---frontend---->o-----passes----->o----backends---->o-----runtime----->o
//!                        \____________ ir: the nouns ______________/
//! ```
//!
//! A [`Model`] calls straight-line [`Graph`]s over tensors with the symbolic dims `t` (new tokens), `s` (sequences) and `c`
//! (context). Every op is one row of one table ([`ops`]); parser, printer, verifier, interpreter, cost and generators read
//! the row.

pub mod artifact;
pub mod cost;
pub mod costs;
pub mod decode;
pub mod docs;
pub mod error;
pub mod eval;
pub mod file;
pub mod formats;
pub mod graph;
pub mod grid;
pub mod kernel;
pub mod layout;
pub mod model;
pub mod ops;
pub mod plan;
pub mod planes;
pub mod quantize;
pub mod recipe;
pub mod sample;
pub mod synthetic;
pub mod target;
pub mod text;
pub mod traffic;
pub mod tuning;
pub mod types;
pub mod value;
pub mod verify;

pub use error::{Error, Kind, Place, Result};
pub use formats::DType;
pub use graph::{Attr, Attrs, Graph, Input, Node, Stage, TokenRange, ValueId};
pub use model::Model;
pub use ops::Op;
pub use target::{Machine, Target};
pub use traffic::Traffic;
pub use tuning::{Choice, Tuning};
pub use types::{CacheRole, Dim, Type};
