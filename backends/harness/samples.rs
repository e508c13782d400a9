//! Seeded random inputs of every type.

use super::Given;
use mansard_ir::eval::{Cache, Routing, Step, Tensor, Value};
use mansard_ir::file::MappedFile;
use mansard_ir::model::{Part, Source, Weight};
use mansard_ir::ops::{Class, Op};
use mansard_ir::plan::Kernel;
pub use mansard_ir::sample::Random;
use mansard_ir::{Attrs, DType, Dim, Graph, Type, ValueId};
use std::io::Write;
use std::sync::Arc;

/// Rounds a real to what a float dtype can hold.
fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|n| Dim::N(*n)).collect()
}

/// A weight of random values that its dtype holds exactly.
pub fn float_weight(dtype: DType, shape: &[usize], seed: u64) -> Weight {
    let mut random = Random::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| stored(dtype, random.real())).collect();
    Weight { ty: Type::tensor(dtype, dims(shape)), source: Source::Values(values.into()) }
}

/// A weight of random quant blocks, with scales such that values are around 1.
pub fn quantized_weight(dtype: DType, shape: &[usize], seed: u64) -> Weight {
    let mut random = Random::new(seed);
    let (elements, ty) = (shape.iter().product::<usize>(), Type::tensor(dtype, dims(shape)));
    let dtype = dtype.in_file();
    let mut bytes: Vec<u8> = (0..dtype.bytes(elements).unwrap()).map(|_| random.bits() as u8).collect();
    for quant_block in bytes.chunks_exact_mut(dtype.format().block_bytes) {
        for (at, size) in dtype.format().scales {
            let half = half::f16::from_f32(size * (1.0 + 0.5 * random.real()));
            quant_block[*at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    let k = *shape.last().unwrap();
    let part = Part {
        file: Arc::new(MappedFile::open(file.path()).unwrap()),
        offset: 0,
        dtype,
        stored: (elements / k, k),
        transposed: false,
        rows: 0..elements / k,
        grid: None,
    };
    Weight { ty, source: Source::Parts(vec![part]) }
}

/// Random inputs for every input of a kernel.
pub fn inputs(kernel: &Kernel, step: &Step, seed: u64) -> Vec<Given> {
    let body = &kernel.body;
    let sample = |(i, input): (usize, &mansard_ir::Input)| {
        let mut random = Random::new(seed.wrapping_add(1000 * i as u64));
        match &input.ty {
            Type::Step => Given::Value(Value::Step(step.clone())),
            Type::Tensor { dtype, .. } if input.ty.is_static() => {
                let shape = fixed(&input.ty);
                let seed = random.bits();
                Given::Weight(match dtype.in_file().int() {
                    Some(_) => quantized_weight(*dtype, &shape, seed),
                    None => float_weight(*dtype, &shape, seed),
                })
            }
            Type::Tensor { dtype: DType::I32, shape } => {
                let count = extent(shape[0], step);
                Given::Value(Value::from_ints(indices(body, ValueId(i as u32), step, count, &mut random)))
            }
            Type::Tensor { dtype, shape } => {
                let shape: Vec<usize> = shape.iter().map(|d| extent(*d, step)).collect();
                let reals = Value::Tensor(Tensor::new(shape.clone(), random.reals(shape.iter().product())));
                Given::Value(rounded(*dtype, &reals))
            }
            ty @ Type::Cache { .. } => Given::Value(cache(body, ValueId(i as u32), ty, step, &mut random)),
            Type::Routing { top, experts } => Given::Value(routing(*top, *experts, step.tokens(), &mut random)),
        }
    };
    body.inputs.iter().enumerate().map(sample).collect()
}

fn fixed(ty: &Type) -> Vec<usize> {
    let (_, shape) = ty.as_tensor().unwrap();
    shape.iter().map(|d| if let Dim::N(n) = d { *n } else { panic!("{ty} is no weight") }).collect()
}

/// Rows leave for about half of the tokens.
fn extent(dim: Dim, step: &Step) -> usize {
    match dim {
        Dim::N(n) => n,
        Dim::T => step.tokens(),
        Dim::S => step.sequences.len(),
        Dim::R => step.tokens().div_ceil(2),
    }
}

/// What is left of reals that are stored as activations of type `dtype`.
pub fn rounded(dtype: DType, reals: &Value) -> Value {
    let name = match dtype {
        DType::A8 => "quantize",
        DType::A16 => "quantize_fine",
        DType::BF16 => "round_bf16",
        _ => return reals.clone(),
    };
    (Op::named(name).unwrap().row().eval)(&[reals], &Attrs::none()).unwrap()
}

fn readers(body: &Graph, value: ValueId) -> impl Iterator<Item = &mansard_ir::Node> {
    body.nodes.iter().filter(move |n| n.operands.contains(&value))
}

/// Positions, token ids or row numbers, by who reads them.
fn indices(body: &Graph, value: ValueId, step: &Step, count: usize, random: &mut Random) -> Vec<i32> {
    let Some(reader) = readers(body, value).next() else { return vec![0; count] };
    if reader.op.class() == Class::Angles {
        return step.positions();
    }
    let source = body.ty(*reader.operands.iter().find(|v| **v != value).unwrap());
    let bound = if source.is_static() { fixed(source)[0] } else { step.tokens() };
    (0..count).map(|_| random.below(bound) as i32).collect()
}

/// With the step's own rows where attention reads it, without them where they are appended.
fn cache(body: &Graph, value: ValueId, ty: &Type, step: &Step, random: &mut Random) -> Value {
    let appended = readers(body, value).any(|n| n.op.class() == Class::Append && n.operands[0] == value);
    let mut cache = Cache::empty(ty, step.sequences.len()).unwrap();
    let width = cache.heads * cache.dim;
    for (sequence, s) in cache.sequences.iter_mut().zip(&step.sequences) {
        let positions = if appended { s.past } else { s.past + s.len };
        *sequence = Arc::new(Cache::keep(ty, &random.reals(positions * width)));
    }
    Value::Cache(cache)
}

fn routing(top: usize, experts: usize, tokens: usize, random: &mut Random) -> Value {
    let mut chosen = vec![];
    for _ in 0..tokens {
        let mut left: Vec<usize> = (0..experts).collect();
        chosen.extend((0..top).map(|_| left.remove(random.below(left.len()))));
    }
    let weights = (0..tokens * top).map(|_| random.real().abs() / top as f32).collect();
    Value::Routing(Routing { top, experts, chosen, weights })
}
