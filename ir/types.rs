//! What a value is: dtype and shape with symbolic dims, a cache, the step's description, or a routing.
//!
//! Printed and parsed as `f32[t, 576]`, `q4_1[576, 1536]`, `a8[t, 576]`, `keys<f16>[c, 3, 64]`,
//! `values<f16, window = 512>[c, 3, 64]`, `step[s]`, `routing[t, 2, 8]`.

use crate::formats::DType;
use crate::layout::CACHE_BLOCK;
use std::fmt;

/// Extent of one axis. The symbolic dims are the ones transformers have; a step binds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dim {
    /// A fixed extent.
    N(usize),
    /// New tokens in this step, over all sequences.
    T,
    /// Sequences in this step.
    S,
    /// Rows the caller asked for (positions whose logits or hidden state leave the step).
    R,
}

/// What a cache holds; keys and values are laid out differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CacheRole {
    /// Keys: dim-major inside a cache block, so that scores need no horizontal sums.
    Keys,
    /// Values: position-major inside a cache block.
    Values,
}

/// The type of a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Type {
    /// A tensor; a weight's dtype is its storage format.
    Tensor {
        /// Element type or quantized storage format.
        dtype: DType,
        /// Extents, outermost first.
        shape: Vec<Dim>,
    },
    /// Keys or values of one layer for every sequence, `[context, heads, dim]` each.
    Cache {
        /// Keys or values.
        role: CacheRole,
        /// Key-value heads.
        heads: usize,
        /// Width of one head.
        dim: usize,
        /// How elements are stored, see [`crate::formats::CACHED`].
        dtype: DType,
        /// How many of the last positions must be kept, a token's own included; 0 for all.
        window: usize,
    },
    /// The ragged step: for each sequence its range of tokens and its cache blocks.
    Step,
    /// For every token the chosen experts and their weights.
    Routing {
        /// Experts chosen per token.
        top: usize,
        /// Experts there are.
        experts: usize,
    },
}

impl Dim {
    /// A fixed extent.
    pub fn fixed(self) -> Option<usize> {
        if let Dim::N(n) = self { Some(n) } else { None }
    }
}

impl Type {
    /// `f32[shape]`.
    pub fn f32(shape: impl Into<Vec<Dim>>) -> Type {
        Type::Tensor { dtype: DType::F32, shape: shape.into() }
    }

    /// A tensor of any dtype.
    pub fn tensor(dtype: DType, shape: impl Into<Vec<Dim>>) -> Type {
        Type::Tensor { dtype, shape: shape.into() }
    }

    /// Dtype and shape of a tensor.
    pub fn as_tensor(&self) -> Option<(DType, &[Dim])> {
        match self {
            Type::Tensor { dtype, shape } => Some((*dtype, shape)),
            _ => None,
        }
    }

    /// Element type of a tensor or a cache; a weight's storage format.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            Type::Tensor { dtype, .. } | Type::Cache { dtype, .. } => Some(*dtype),
            _ => None,
        }
    }

    /// Elements of one row: the product of all dims after the first. `None` unless those are fixed.
    pub fn row_width(&self) -> Option<usize> {
        let (_, shape) = self.as_tensor()?;
        shape.get(1..)?.iter().map(|d| if let Dim::N(n) = d { Some(*n) } else { None }).product()
    }

    /// The symbolic leading dim (`t`, `s` or `r`) of an activation; `None` for weights and caches.
    pub fn rows(&self) -> Option<Dim> {
        match self {
            Type::Tensor { shape, .. } => shape.first().copied().filter(|d| !matches!(d, Dim::N(_))),
            Type::Routing { .. } => Some(Dim::T),
            _ => None,
        }
    }

    /// The cache that holds the last positions of one of few bits more accurately, see `attend_mixed`.
    pub fn recent(&self) -> Option<Type> {
        match *self {
            Type::Cache { role, heads, dim, dtype: DType::I4, .. } => {
                Some(Type::Cache { role, heads, dim, dtype: DType::F16, window: CACHE_BLOCK })
            }
            _ => None,
        }
    }

    /// Of so many positions those that a cache has: int4 keys only have whole cache blocks, see `append_blocks`.
    pub fn kept(&self, positions: usize) -> usize {
        match self {
            Type::Cache { role: CacheRole::Keys, dtype: DType::I4, .. } => positions / CACHE_BLOCK * CACHE_BLOCK,
            _ => positions,
        }
    }

    /// All extents fixed: a weight.
    pub fn is_static(&self) -> bool {
        matches!(self, Type::Tensor { shape, .. } if shape.iter().all(|d| matches!(d, Dim::N(_))))
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::N(n) => write!(f, "{n}"),
            Dim::T => f.write_str("t"),
            Dim::S => f.write_str("s"),
            Dim::R => f.write_str("r"),
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Type::Tensor { dtype, shape } => {
                let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
                write!(f, "{dtype}[{}]", dims.join(", "))
            }
            Type::Cache { role, heads, dim, dtype, window } => {
                let role = if *role == CacheRole::Keys { "keys" } else { "values" };
                let window = if *window > 0 { format!(", window = {window}") } else { String::new() };
                write!(f, "{role}<{dtype}{window}>[c, {heads}, {dim}]")
            }
            Type::Step => f.write_str("step[s]"),
            Type::Routing { top, experts } => write!(f, "routing[t, {top}, {experts}]"),
        }
    }
}
