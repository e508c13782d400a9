//! What the interpreter computes with: a [`Type`] with its symbolic dims bound becomes a [`Value`].
//!
//! ```text
//! f32[t, 576]           Tensor { shape: [10, 576], data: 5760 reals }
//! q4_1[576, 1536]       Tensor: the reals its codes stand for. A dtype is storage, no part of a value
//! i32[t]                Ints
//! keys<f16>[c, 3, 64]   Cache: for each sequence of the step its positions so far, rounded to the stored type
//! step[s]               Step
//! routing[t, 2, 8]      Routing
//! q8_planes[n, k]       Planes
//! ```
//!
//! Reals are kept in f32 and computed in f64.

use crate::formats::{DType, e4m3, to_e4m3};
use crate::layout::CACHE_BLOCK;
pub use crate::planes::Planes;
use crate::types::{Dim, Type};
use crate::{Result, bail};
use half::f16;
use std::sync::Arc;

/// A value of the interpreter.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Activations and weights.
    Tensor(Tensor),
    /// Token ids, positions, rows.
    Ints(Ints),
    /// Keys or values.
    Cache(Cache),
    /// The step's description.
    Step(Step),
    /// Chosen experts.
    Routing(Routing),
    /// A matrix in two planes.
    Planes(Planes),
}

/// Reals, row-major. Clones share the data.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// As many as the product of the extents.
    pub data: Arc<Vec<f32>>,
}

/// Token ids, positions or row numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ints {
    /// One extent.
    pub shape: Vec<usize>,
    /// The integers.
    pub data: Vec<i32>,
}

/// Keys or values of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Cache {
    /// Key-value heads.
    pub heads: usize,
    /// Width of a head.
    pub dim: usize,
    /// As stored; what is appended is rounded to it.
    pub dtype: DType,
    /// For each sequence of the step `[positions, heads, dim]`.
    pub sequences: Vec<Arc<Vec<f32>>>,
}

/// The ragged step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// In order of their tokens.
    pub sequences: Vec<Sequence>,
    /// How many of the largest logits of a row must be exact; 0: all.
    pub candidates: usize,
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its first token among the step's.
    pub start: usize,
    /// New tokens.
    pub len: usize,
    /// Positions it had before.
    pub past: usize,
}

/// For every token the chosen experts and their weights, best first.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts chosen per token.
    pub top: usize,
    /// Experts there are.
    pub experts: usize,
    /// `[t, top]`.
    pub chosen: Vec<usize>,
    /// `[t, top]`.
    pub weights: Vec<f32>,
}

/// What the symbolic dims of a step are; filled in as values are seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extents {
    /// New tokens.
    pub t: Option<usize>,
    /// Sequences.
    pub s: Option<usize>,
    /// Rows asked for.
    pub r: Option<usize>,
}

impl Tensor {
    /// A tensor of that shape.
    ///
    /// # Panics
    /// Where the shape and the number of reals disagree.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Tensor {
        let shape = shape.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "reals of a tensor of {shape:?}");
        Tensor { shape, data: Arc::new(data) }
    }

    /// Extent of the last axis.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Slices along the last axis. A last axis of 0 has none.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.data.chunks_exact(self.width().max(1))
    }

    /// The slice `index` along the first axis.
    pub fn outer(&self, index: usize) -> &[f32] {
        let width: usize = self.shape.iter().skip(1).product();
        &self.data[index * width..][..width]
    }
}

impl Step {
    /// A step in which sequence `i` has `pasts_and_lens[i].0` positions and brings `pasts_and_lens[i].1` tokens.
    pub fn new(pasts_and_lens: &[(usize, usize)]) -> Step {
        let mut start = 0;
        let place = |&(past, len): &(usize, usize)| {
            start += len;
            Sequence { start: start - len, len, past }
        };
        Step { sequences: pasts_and_lens.iter().map(place).collect(), candidates: 0 }
    }

    /// The step, of which only so many of a row's largest logits are wanted.
    pub fn wanting(self, candidates: usize) -> Step {
        Step { candidates, ..self }
    }

    /// New tokens over all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.len).sum()
    }

    /// The position of every token in its sequence.
    pub fn positions(&self) -> Vec<i32> {
        self.sequences.iter().flat_map(|s| s.past..s.past + s.len).map(|p| p as i32).collect()
    }
}

impl Cache {
    /// A cache of that type for sequences that have no positions yet; `None` for types that are no cache.
    pub fn empty(ty: &Type, sequences: usize) -> Option<Cache> {
        match *ty {
            Type::Cache { heads, dim, dtype, .. } => {
                Some(Cache { heads, dim, dtype, sequences: vec![Arc::default(); sequences] })
            }
            _ => None,
        }
    }

    /// What a cache of `dtype` keeps of one head at one position.
    pub fn stored(dtype: DType, head: &[f32]) -> Vec<f32> {
        match dtype {
            DType::F16 => head.iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
            DType::BF16 => head.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect(),
            DType::FP8 => head.iter().map(|x| e4m3(to_e4m3(*x))).collect(),
            DType::I8 => rounded_to_codes(head),
            DType::I4 => {
                let (scale, codes) = Cache::int4(head);
                codes.iter().map(|code| scale * f32::from(*code)).collect()
            }
            _ => head.to_vec(),
        }
    }

    /// What a cache of type `ty` keeps of `[positions, heads, dim]`.
    pub fn keep(ty: &Type, rows: &[f32]) -> Vec<f32> {
        match *ty {
            Type::Cache { heads, dim, .. } if ty.kept(1) == 0 => {
                rows.chunks_exact(CACHE_BLOCK * heads * dim).flat_map(Cache::stored_block).collect()
            }
            Type::Cache { dim, dtype, .. } => rows.chunks(dim).flat_map(|head| Cache::stored(dtype, head)).collect(),
            _ => vec![],
        }
    }

    /// What int4 keys keep of a whole cache block, `[64, heads, dim]`.
    pub fn stored_block(block: &[f32]) -> Vec<f32> {
        let (mut stored, width) = (block.to_vec(), block.len() / CACHE_BLOCK);
        for channel in 0..width {
            let line: Vec<f32> = block.iter().skip(channel).step_by(width).copied().collect();
            let (scale, middle, codes) = Cache::int4_channel(&line);
            let places = stored.iter_mut().skip(channel).step_by(width);
            places.zip(codes).for_each(|(x, code)| *x = scale.mul_add(f32::from(code), middle));
        }
        stored
    }

    /// Scale, middle and int4 codes of a channel in the positions of a cache block: its least value becomes -8, its largest 7;
    /// ties to even. Scale and middle are those of f16. (Keys by channel: KIVI, Liu et al., 2024.)
    pub fn int4_channel(line: &[f32]) -> (f32, f32, Vec<i8>) {
        let (least, most) = line.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), x| (a.min(*x), b.max(*x)));
        let scale = f16::from_f32((most - least) / 15.0).to_f32();
        let middle = f16::from_f32(scale.mul_add(8.0, least)).to_f32();
        let code = |x: &f32| if scale == 0.0 { 0.0 } else { ((x - middle) / scale).round_ties_even().clamp(-8.0, 7.0) };
        (scale, middle, line.iter().map(|x| code(x) as i8).collect())
    }

    /// The scale and the int4 codes of a head: its largest value by magnitude becomes -8, so that all sixteen codes are
    /// used; ties to even. The scale is one of f16.
    pub fn int4(head: &[f32]) -> (f32, Vec<i8>) {
        let (least, most) = head.iter().fold((0f32, 0f32), |(a, b), x| (a.min(*x), b.max(*x)));
        let scale = f16::from_f32(if most >= -least { most } else { least } / -8.0).to_f32();
        let code = |x: &f32| if scale == 0.0 { 0.0 } else { (x / scale).round_ties_even().clamp(-8.0, 7.0) };
        (scale, head.iter().map(|x| code(x) as i8).collect())
    }

    /// Positions of a sequence.
    pub fn positions(&self, sequence: usize) -> usize {
        self.sequences[sequence].len() / (self.heads * self.dim).max(1)
    }

    /// Keys or values of one head at one position.
    pub fn at(&self, sequence: usize, position: usize, head: usize) -> &[f32] {
        &self.sequences[sequence][(position * self.heads + head) * self.dim..][..self.dim]
    }
}

/// Int8 codes of one scale as reals: `scale = max |x| / 127`, ties to even.
pub fn rounded_to_codes(group: &[f32]) -> Vec<f32> {
    let scale = group.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
    let code = |x: &f32| if scale > 0.0 { (x / scale).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
    group.iter().map(|x| scale * code(x)).collect()
}

macro_rules! accessor {
    ($name:ident, $variant:ident, $meaning:literal) => {
        #[doc = concat!("The value as ", $meaning, ".\n\n# Errors\nWhere it is something else.")]
        pub fn $name(&self) -> Result<&$variant> {
            match self {
                Value::$variant(inner) => Ok(inner),
                other => bail!(Internal, concat!("expected ", $meaning, ", found {}"), other.describe()),
            }
        }
    };
}

impl Value {
    accessor!(tensor, Tensor, "a tensor");
    accessor!(ints, Ints, "integers");
    accessor!(cache, Cache, "a cache");
    accessor!(step, Step, "the step");
    accessor!(routing, Routing, "a routing");
    accessor!(planes, Planes, "a matrix in planes");

    /// Integers of one axis.
    pub fn from_ints(data: impl Into<Vec<i32>>) -> Value {
        let data = data.into();
        Value::Ints(Ints { shape: vec![data.len()], data })
    }

    /// Kind and extents, for messages.
    pub fn describe(&self) -> String {
        match self {
            Value::Tensor(t) => format!("reals {:?}", t.shape),
            Value::Ints(i) => format!("integers {:?}", i.shape),
            Value::Cache(c) => format!("a cache of {} sequences, {} heads of {}", c.sequences.len(), c.heads, c.dim),
            Value::Step(s) => format!("a step of {} sequences", s.sequences.len()),
            Value::Planes(p) => format!("planes {:?}", p.shape),
            Value::Routing(r) => {
                format!("a routing of {} tokens to {} experts", r.chosen.len() / r.top.max(1), r.experts)
            }
        }
    }

    /// Checks that the value is one of type `ty` under `extents`, which learn the dims not yet known.
    ///
    /// # Errors
    /// Naming the type and the value found.
    pub fn check(&self, ty: &Type, extents: &mut Extents) -> Result<()> {
        let fits = match (self, ty) {
            (Value::Tensor(v), Type::Tensor { dtype, shape }) => {
                !matches!(dtype, DType::I32 | DType::Q8_PLANES) && extents.fit(shape, &v.shape)
            }
            (Value::Planes(v), Type::Tensor { dtype, shape }) => {
                *dtype == DType::Q8_PLANES && extents.fit(shape, &v.shape)
            }
            (Value::Ints(v), Type::Tensor { dtype, shape }) => *dtype == DType::I32 && extents.fit(shape, &v.shape),
            (Value::Cache(v), Type::Cache { heads, dim, dtype, .. }) => {
                (v.heads, v.dim, v.dtype) == (*heads, *dim, *dtype) && extents.fit(&[Dim::S], &[v.sequences.len()])
            }
            (Value::Step(v), Type::Step) => {
                let starts = v.sequences.iter().map(|s| s.start);
                let expected = Step::new(&v.sequences.iter().map(|s| (s.past, s.len)).collect::<Vec<_>>());
                starts.eq(expected.sequences.iter().map(|s| s.start))
                    && extents.fit(&[Dim::S, Dim::T], &[v.sequences.len(), v.tokens()])
            }
            (Value::Routing(v), Type::Routing { top, experts }) => {
                (v.top, v.experts) == (*top, *experts)
                    && v.chosen.len() == v.weights.len()
                    && extents.fit(&[Dim::T], &[v.chosen.len() / (*top).max(1)])
            }
            _ => false,
        };
        if !fits {
            let Extents { t, s, r } = *extents;
            let known = [("t", t), ("s", s), ("r", r)].map(|(n, x)| x.map(|x| format!("{n} = {x}")));
            let known: Vec<String> = known.into_iter().flatten().collect();
            bail!(Input, "expected {ty} ({}), found {}", known.join(", "), self.describe());
        }
        Ok(())
    }
}

impl Extents {
    /// Whether `shape` can be `extents`, learning symbolic dims on the way.
    fn fit(&mut self, shape: &[Dim], extents: &[usize]) -> bool {
        let mut fit = |(dim, &found): (&Dim, &usize)| match dim {
            Dim::N(n) => *n == found,
            Dim::T => *self.t.get_or_insert(found) == found,
            Dim::S => *self.s.get_or_insert(found) == found,
            Dim::R => *self.r.get_or_insert(found) == found,
        };
        shape.len() == extents.len() && shape.iter().zip(extents).all(&mut fit)
    }
}
