//! Samplers of legal operand types and attributes, one for each op of the table.
//!
//! Given the type of the first operand, or nothing, a sampler makes the types of all operands and the attributes: what the
//! type rule accepts. `None`: this op cannot take such a first operand. Extents are small and drawn from those that
//! models have; last axes suit the formats they are stored in.

use crate::attrs;
use crate::formats::{CACHED, DType};
use crate::graph::Attrs;
use crate::layout::{CACHE_BLOCK, STRIP};
use crate::sample::Random;
use crate::types::{CacheRole, Dim, Type};

/// What a sampler makes.
pub type Sample = Option<(Vec<Type>, Attrs)>;

/// Row widths: multiples of 32 so that any can be quantized, one of 256 for the formats with large blocks.
pub const WIDTHS: [usize; 5] = [32, 64, 96, 128, 256];

const HEADS: [usize; 6] = [1, 2, 3, 4, 6, 8];

/// Formats a weight with rows of `k` can be stored in.
pub fn weight_dtypes(k: usize, float: bool) -> Vec<DType> {
    weights(k, |dtype| if float { dtype.is_float() } else { dtype.int().is_some() })
}

fn weights(k: usize, is: impl Fn(DType) -> bool) -> Vec<DType> {
    let all = crate::formats::FORMATS.iter().filter(|f| is(f.dtype) && k.is_multiple_of(f.block));
    all.map(|f| f.dtype).collect()
}

fn activation(dtype: DType, lead: Dim, rest: &[usize]) -> Type {
    Type::tensor(dtype, std::iter::once(lead).chain(rest.iter().map(|n| Dim::N(*n))).collect::<Vec<_>>())
}

fn fixed(dtype: DType, shape: &[usize]) -> Type {
    Type::tensor(dtype, shape.iter().map(|n| Dim::N(*n)).collect::<Vec<_>>())
}

/// Dtype, leading dim and the rest of an activation of `rank` axes: `x`, or a new one.
fn rows(r: &mut Random, x: Option<&Type>, rank: usize) -> Option<(DType, Dim, Vec<usize>)> {
    let Some(x) = x else {
        let heads = [r.pick(&HEADS), r.pick(&[16, 32, 64])];
        let rest = if rank == 2 { vec![r.pick(&WIDTHS)] } else { heads.to_vec() };
        return Some((DType::F32, Dim::T, rest));
    };
    let (dtype, shape) = x.as_tensor()?;
    let rest: Vec<usize> = shape[1..].iter().map_while(|d| if let Dim::N(n) = d { Some(*n) } else { None }).collect();
    (shape.len() == rank && rest.len() == rank - 1).then_some((dtype, x.rows()?, rest))
}

/// The same, in f32.
fn reals(r: &mut Random, x: Option<&Type>, rank: usize) -> Option<(Dim, Vec<usize>)> {
    rows(r, x, rank).filter(|(dtype, ..)| *dtype == DType::F32).map(|(_, lead, rest)| (lead, rest))
}

/// An f32 activation of two or three axes.
fn any(r: &mut Random, x: Option<&Type>) -> Option<Type> {
    let rank = match x {
        Some(x) => x.as_tensor()?.1.len(),
        None => 2 + r.below(2),
    };
    reals(r, x, rank).map(|(lead, rest)| activation(DType::F32, lead, &rest))
}

/// A float or integer format for rows of `k`; integer where the activations are.
fn dtype_for(r: &mut Random, x: DType, k: usize) -> DType {
    if x == DType::BF16 {
        return DType::BF16;
    }
    let float = x == DType::F32 && r.chance(0.4);
    let choices = if x == DType::F32 { weight_dtypes(k, float) } else { weights(k, DType::is_integer) };
    if choices.is_empty() { DType::F32 } else { r.pick(&choices) }
}

/// Activations that contractions take.
fn multiplies(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16) || dtype.planes().is_some()
}

pub fn none(_: &mut Random, _: Option<&Type>) -> Sample {
    None
}

pub fn unary(r: &mut Random, x: Option<&Type>) -> Sample {
    Some((vec![any(r, x)?], Attrs::none()))
}

pub fn round_bf16(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 2)?;
    rest[0].is_multiple_of(2).then(|| (vec![activation(DType::F32, lead, &rest)], Attrs::none()))
}

pub fn factor(r: &mut Random, x: Option<&Type>) -> Sample {
    Some((vec![any(r, x)?], attrs! { by = r.quarters(-8, 8) }))
}

pub fn cap(r: &mut Random, x: Option<&Type>) -> Sample {
    Some((vec![any(r, x)?], attrs! { cap = r.quarters(2, 40) }))
}

pub fn eps(r: &mut Random, x: Option<&Type>) -> Sample {
    Some((vec![any(r, x)?], attrs! { eps = r.pick(&[1e-6, 1e-5, 1e-3]) }))
}

pub fn pair(r: &mut Random, x: Option<&Type>) -> Sample {
    let x = any(r, x)?;
    Some((vec![x.clone(), x], Attrs::none()))
}

pub fn row_vector(r: &mut Random, x: Option<&Type>) -> Sample {
    let x = any(r, x)?;
    let last = *x.as_tensor()?.1.last()?;
    Some((vec![x, Type::f32([last])], Attrs::none()))
}

pub fn scale_columns(r: &mut Random, x: Option<&Type>) -> Sample {
    let k = r.pick(&WIDTHS);
    let w = match x {
        Some(w) if w.is_static() && w.as_tensor().is_some_and(|(d, s)| d == DType::F32 && s.len() > 1) => w.clone(),
        Some(_) => return None,
        None => fixed(DType::F32, &[r.pick(&WIDTHS), k]),
    };
    let columns = *w.as_tensor()?.1.last()?;
    Some((vec![w, Type::f32([columns])], Attrs::none()))
}

/// An f32 matrix: `x`, or a new one.
fn matrix(r: &mut Random, x: Option<&Type>) -> Option<(Type, usize, usize)> {
    let w = x.cloned().unwrap_or_else(|| fixed(DType::F32, &[r.pick(&WIDTHS), r.pick(&WIDTHS)]));
    match w.as_tensor()? {
        (DType::F32, [Dim::N(n), Dim::N(k)]) => Some((w.clone(), *n, *k)),
        _ => None,
    }
}

pub fn scale_rows(r: &mut Random, x: Option<&Type>) -> Sample {
    matrix(r, x).map(|(w, n, _)| (vec![w, fixed(DType::F32, &[n])], Attrs::none()))
}

pub fn multiply_weights(r: &mut Random, x: Option<&Type>) -> Sample {
    matrix(r, x).map(|(a, _, m)| (vec![a, fixed(DType::F32, &[m, r.pick(&WIDTHS)])], Attrs::none()))
}

pub fn hadamard_matrix(r: &mut Random, _: Option<&Type>) -> Sample {
    Some((vec![], attrs! { size = r.pick(&[32usize, 64, 128]) }))
}

pub fn times_vector(r: &mut Random, x: Option<&Type>) -> Sample {
    matrix(r, x).map(|(w, _, k)| (vec![w, fixed(DType::F32, &[k])], Attrs::none()))
}

pub fn slice_rows(r: &mut Random, x: Option<&Type>) -> Sample {
    matrix(r, x).map(|(w, n, _)| (vec![w], range(r, n)))
}

pub fn concat_rows(r: &mut Random, x: Option<&Type>) -> Sample {
    matrix(r, x).map(|(a, _, k)| (vec![a, fixed(DType::F32, &[r.pick(&WIDTHS), k])], Attrs::none()))
}

/// Part of `n`, at least one.
fn range(r: &mut Random, n: usize) -> Attrs {
    let from = r.below(n);
    attrs! { from = from, count = 1 + r.below(n - from) }
}

pub fn slice(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 2)?;
    let count = r.pick(&WIDTHS).min(rest[0]);
    let attrs = attrs! { from = r.below(rest[0] - count + 1), count = count };
    Some((vec![activation(DType::F32, lead, &rest)], attrs))
}

pub fn concat(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 2)?;
    Some((vec![activation(DType::F32, lead, &rest), activation(DType::F32, lead, &[r.pick(&WIDTHS)])], Attrs::none()))
}

pub fn embed(r: &mut Random, x: Option<&Type>) -> Sample {
    let tokens = Type::tensor(DType::I32, [Dim::T]);
    let k = r.pick(&WIDTHS);
    let table = fixed(dtype_for(r, DType::F32, k), &[r.pick(&[17, 32, 50]), k]);
    x.is_none_or(|x| *x == tokens).then(|| (vec![tokens, table], Attrs::none()))
}

pub fn select_rows(r: &mut Random, x: Option<&Type>) -> Sample {
    Some((vec![any(r, x)?, Type::tensor(DType::I32, [Dim::R])], Attrs::none()))
}

pub fn rope_table(r: &mut Random, x: Option<&Type>) -> Sample {
    let positions = Type::tensor(DType::I32, [Dim::T]);
    let types = vec![positions.clone(), fixed(DType::F32, &[r.pick(&[4, 8, 16])])];
    x.is_none_or(|x| *x == positions).then(|| (types, attrs! { scale = r.quarters(2, 6) }))
}

pub fn rope(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 3)?;
    let widths: Vec<usize> = [rest[1], rest[1] / 2].into_iter().filter(|w| *w > 0 && w % 2 == 0).collect();
    let table = if widths.is_empty() { return None } else { r.pick(&widths) };
    let types = vec![activation(DType::F32, lead, &rest), activation(DType::F32, lead, &[table])];
    Some((types, attrs! { pairing = r.pick(&["half", "adjacent"]) }))
}

pub fn hadamard(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 3)?;
    (rest[1] % 2 == 0).then(|| (vec![activation(DType::F32, lead, &rest)], Attrs::none()))
}

pub fn split_heads(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 2)?;
    let heads: Vec<usize> = HEADS.into_iter().filter(|h| rest[0].is_multiple_of(*h)).collect();
    Some((vec![activation(DType::F32, lead, &rest)], attrs! { heads = r.pick(&heads) }))
}

pub fn merge_heads(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 3)?;
    Some((vec![activation(DType::F32, lead, &rest)], Attrs::none()))
}

pub fn quantize(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 2)?;
    rest[0].is_multiple_of(32).then(|| (vec![activation(DType::F32, lead, &rest)], Attrs::none()))
}

pub fn matmul(r: &mut Random, x: Option<&Type>) -> Sample {
    let (dtype, lead, rest) = rows(r, x, 2)?;
    let w = fixed(dtype_for(r, dtype, rest[0]), &[r.pick(&WIDTHS), rest[0]]);
    let fits = multiplies(dtype);
    fits.then(|| (vec![activation(dtype, lead, &rest), w], Attrs::none()))
}

pub fn route(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = match x {
        None => (Dim::T, vec![r.pick(&[4, 8])]),
        Some(_) => reals(r, x, 2)?,
    };
    let attrs = attrs! { top = 1 + r.below(rest[0].min(3)), normalize = r.chance(0.5) };
    (lead == Dim::T).then(|| (vec![activation(DType::F32, lead, &rest)], attrs))
}

pub fn matmul_experts(r: &mut Random, x: Option<&Type>) -> Sample {
    let rank = x.and_then(Type::as_tensor).map_or(2, |(_, shape)| shape.len());
    let (dtype, lead, rest) = rows(r, x, rank).filter(|_| rank == 2 || rank == 3)?;
    let top = if rank == 3 { rest[0] } else { 1 + r.below(2) };
    let (k, experts) = (rest[rest.len() - 1], top.max(r.pick(&[4, 8])));
    let w = fixed(dtype_for(r, dtype, k), &[experts, r.pick(&WIDTHS), k]);
    let fits = multiplies(dtype) && lead == Dim::T;
    fits.then(|| (vec![activation(dtype, lead, &rest), w, Type::Routing { top, experts }], Attrs::none()))
}

pub fn combine(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 3)?;
    let routing = Type::Routing { top: rest[0], experts: rest[0].max(r.pick(&[4, 8])) };
    (lead == Dim::T).then(|| (vec![activation(DType::F32, lead, &rest), routing], Attrs::none()))
}

/// Windows of attention.
pub const WINDOWS: [usize; 5] = [0, 0, 0, 3, 70];

fn cache(role: CacheRole, heads: usize, dim: usize, dtype: DType, window: usize) -> Type {
    Type::Cache { role, heads, dim, dtype, window }
}

/// What caches of heads of that width may be stored in, one row at a time: not int4, whose keys come by cache blocks.
pub fn cached(r: &mut Random, dim: usize) -> DType {
    let fits: Vec<DType> = CACHED.into_iter().filter(|dtype| dtype.caches(dim) && *dtype != DType::I4).collect();
    r.pick(&fits)
}

pub fn append(r: &mut Random, x: Option<&Type>) -> Sample {
    let (heads, dim, dtype) = match x {
        None => {
            let dim = r.pick(&[16, 32, 64]);
            (r.pick(&HEADS), dim, cached(r, dim))
        }
        Some(Type::Cache { heads, dim, dtype, .. }) => (*heads, *dim, *dtype),
        Some(_) => return None,
    };
    let role = r.pick(&[CacheRole::Keys, CacheRole::Values]);
    let window = r.pick(&WINDOWS);
    let before = x.cloned().unwrap_or_else(|| cache(role, heads, dim, dtype, window));
    let types = vec![before, activation(DType::F32, Dim::T, &[heads, dim]), Type::Step];
    (types[0].kept(1) == 1).then_some((types, Attrs::none()))
}

pub fn append_blocks(r: &mut Random, x: Option<&Type>) -> Sample {
    let keys = cache(CacheRole::Keys, r.pick(&HEADS), r.pick(&[32, 64]), DType::I4, r.pick(&WINDOWS));
    let keys = x.cloned().unwrap_or(keys);
    let recent = keys.recent().filter(|_| keys.kept(1) == 0)?;
    Some((vec![keys, recent, Type::Step], Attrs::none()))
}

pub fn attend(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 3)?;
    let (heads, dim) = (rest[0], rest[1]);
    let shared: Vec<usize> = HEADS.into_iter().filter(|h| heads.is_multiple_of(*h)).collect();
    let (kv, dtype) = (r.pick(&shared), cached(r, dim));
    let window = r.pick(&WINDOWS);
    let kept = kept(r, window);
    let [keys, values] = [CacheRole::Keys, CacheRole::Values].map(|role| cache(role, kv, dim, dtype, kept));
    let types = vec![activation(DType::F32, lead, &rest), keys, values, Type::Step];
    (lead == Dim::T).then(|| (types, attention_attrs(r, dim, window)))
}

pub fn attend_mixed(r: &mut Random, x: Option<&Type>) -> Sample {
    let (mut types, attrs) = attend(r, x)?;
    let recent = |cache: &Type| match *cache {
        Type::Cache { role, heads, dim, .. } => {
            Type::Cache { role, heads, dim, dtype: DType::F16, window: CACHE_BLOCK }
        }
        _ => cache.clone(),
    };
    let recent = [recent(&types[1]), recent(&types[2])];
    types.splice(3..3, recent);
    Some((types, attrs))
}

/// The window of caches for an `attend` with a window: often the same.
pub fn kept(r: &mut Random, window: usize) -> usize {
    if window == 0 { 0 } else { r.pick(&[window, window, window + 9, 0]) }
}

/// Attributes of an `attend` over heads of `dim` with that window.
pub fn attention_attrs(r: &mut Random, dim: usize, window: usize) -> Attrs {
    attrs! {
        scale = 1.0 / (dim as f64).sqrt(),
        causal = r.chance(0.8),
        window = window,
        softcap = r.pick(&[0.0, 0.0, 20.0]),
    }
}

pub fn mean_pool(r: &mut Random, x: Option<&Type>) -> Sample {
    let (lead, rest) = reals(r, x, 2)?;
    (lead == Dim::T).then(|| (vec![activation(DType::F32, lead, &rest), Type::Step], Attrs::none()))
}

/// Rows in two planes, a matrix in two planes, the step.
fn two_planes(r: &mut Random, x: Option<&Type>) -> Option<(Dim, usize, Vec<Type>)> {
    let new = activation(DType::A16, Dim::R, &[r.pick(&WIDTHS)]);
    let x = x.cloned().unwrap_or(new);
    let (dtype, lead, rest) = rows(r, Some(&x), 2)?;
    let n = r.pick(&[16, 50, 96]);
    let types = vec![x, fixed(DType::Q8_PLANES, &[n, rest[0]]), Type::Step];
    (dtype == DType::A16).then_some((lead, n, types))
}

pub fn estimate(r: &mut Random, x: Option<&Type>) -> Sample {
    two_planes(r, x).map(|(.., types)| (types, Attrs::none()))
}

pub fn estimate_bounds(r: &mut Random, x: Option<&Type>) -> Sample {
    two_planes(r, x).map(|(.., types)| (types, attrs! { margin = r.quarters(4, 32) }))
}

pub fn rescore(r: &mut Random, x: Option<&Type>) -> Sample {
    let (mut lead, mut n, mut types) = two_planes(r, None)?;
    if x.is_some() {
        let rest;
        (lead, rest) = reals(r, x, 2)?;
        n = rest[0];
        types[0] = activation(DType::A16, lead, &[64]);
        types[1] = fixed(DType::Q8_PLANES, &[n, 64]);
    }
    let result = |width| activation(DType::F32, lead, &[width]);
    types.splice(..0, [result(n), result(3 * n.div_ceil(STRIP))]);
    Some((types, Attrs::none()))
}
