//! The text form of every noun: what is printed parses to the same thing, and prints to the same bytes.
//!
//! ```text
//! graph @layer(%x: f32[t, 576], %keys: keys<f16>[c, 3, 64], %step: step[s]) stage canonical {
//!   %3 = weight "mlp.down_proj.weight" : q4_1[576, 1536]
//!   %4 = rms_normalize %x {eps = 1e-5}    # f32[t, 576]
//!   ...
//!   return x = %9, keys = %7
//! }
//!
//! model @smollm2 {
//!   call @embed
//!   call @layer x 30 with "model.layers.{i}."
//!   output x
//! }
//! ```
//!
//! Inputs go by name, other values by number; text written by hand may name values freely. `#` starts a comment. Types
//! are declared for inputs and weights, and follow from the op table elsewhere (a declared one is checked). At the
//! `optimized` stage `kernel { .. }` surrounds the nodes of each kernel. Weights are named, never contained.
//!
//! The parser takes any bytes: it neither recurses nor panics, and its memory is linear in the text.

mod lex;
mod parse;
mod print;

pub(crate) use lex::is_word;
pub use parse::{parse, parse_type};
pub use print::{print_graph, print_model, print_plan, print_program};

#[cfg(test)]
#[path = "text/tests.rs"]
mod tests;
