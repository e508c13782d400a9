//! Contractions: `x[t, k] w[n, k]^T` over packed weights, with an epilogue on the accumulators.
//!
//! A body falls into *components*: contractions that meet in the epilogue (gate and up projections) are computed side by
//! side on the same 16 output rows; contractions that do not meet (queries, keys, values) follow one another. For each
//! component a worker takes a run of strips and walks
//!
//! ```text
//! for cache tile of strips (its weights stay in the second-level cache)
//!   for token tile (of the main shape, then smaller ones for what is left)
//!     for strip: products -> epilogue -> store
//! ```
//!
//! Token tiles end with the step's last row. What lies past it may be anything, and there are processors that take a
//! hundred times as long for a number that is not normal.

mod choice;
mod experts;
mod shape;
mod tiled;

pub use choice::{alternatives, tiles};
pub use shape::{AHEAD, Respect};

use crate::cpu::count_of;
use crate::cpu::dot::{self, Rows};
use crate::emit::{Cmp, Emitter, F32, KernelArgs, Scalar, Val};
use crate::math;
use mansard_ir::kernel::PROLOGUE_TOKENS;
use mansard_ir::layout::{STRIP, StripLayout, row_bytes};
use mansard_ir::ops::Class;
use mansard_ir::plan::Kernel;
use mansard_ir::{Choice, DType, Dim, Error, Graph, Kind, Result, Target, ValueId, bail};
use shape::Shape;
use std::collections::BTreeMap;

/// Emits a `contract` or `experts` kernel, with the formulas' tiles where nothing is chosen.
///
/// # Errors
/// Where the body is no contraction or its shapes have no code; where the choice is none that the kernel has.
pub fn emit(kernel: &Kernel, target: &Target, choice: Option<Choice>) -> Result<String> {
    let body = &kernel.body;
    let (mut e, k) = Emitter::kernel(kernel, target);
    let mut memory = super::memory(&mut e, k, body);
    let components = components(body)?;
    prologue(&mut e, k, kernel, &components, &mut memory)?;
    for component in &components {
        let Some(first) = component.dots.first() else { continue };
        let choice = choice::chosen(kernel, target, component, choice)?;
        let c = Contraction { kernel, body, target, k, memory: &memory, component, choice };
        if first.routing.is_some() { c.emit_experts(&mut e)? } else { c.emit(&mut e)? }
    }
    Ok(e.finish())
}

/// One contraction node.
#[derive(Clone, Debug)]
pub(crate) struct Dot {
    pub(crate) value: ValueId,
    pub(crate) x: ValueId,
    pub(crate) weight: ValueId,
    pub(crate) routing: Option<ValueId>,
    pub(crate) dtype: DType,
    /// Columns.
    pub(crate) k: usize,
    /// Type of the activations.
    pub(crate) activations: DType,
    /// Planes of int8 codes of the activations.
    pub(crate) planes: usize,
}

impl Dot {
    fn rows(&self, first: Val, stride: usize, count: usize) -> Rows {
        Rows { first, stride, count, dtype: self.activations, planes: self.planes, prefetch: 0, ahead: None }
    }

    /// Codes that meet bf16.
    fn widens(&self) -> bool {
        self.activations == DType::BF16 && self.dtype.int().is_some()
    }

    /// One register tile can hold both.
    fn shares_tile(&self, other: &Dot) -> bool {
        self.dtype.int().is_none() && (self.x, self.dtype, self.k) == (other.x, other.dtype, other.k)
    }
}

/// Contractions that meet in the epilogue, and the nodes where they do.
pub(crate) struct Component {
    pub(crate) dots: Vec<Dot>,
    pub(crate) epilogue: Vec<ValueId>,
    /// Output rows of every contraction in it.
    pub(crate) n: usize,
}

/// Splits a body: nodes connected through computed values belong together.
pub(crate) fn components(body: &Graph) -> Result<Vec<Component>> {
    let mut home: Vec<Option<usize>> = vec![None; body.len()];
    let mut parts: Vec<Component> = vec![];
    for value in body.values() {
        let Some(node) = body.node(value) else { continue };
        match node.op.class() {
            Class::Contract | Class::ContractExperts => {
                let (dtype, shape) = body.ty(node.operands[1]).as_tensor().ok_or_else(|| internal(body))?;
                let extent = |i: usize| if let Some(Dim::N(n)) = shape.get(i) { *n } else { 0 };
                let (n, columns) = (extent(shape.len() - 2), extent(shape.len() - 1));
                let routing = node.operands.get(2).copied();
                let activations = body.ty(node.operands[0]).dtype().unwrap_or(DType::F32);
                if activations.planes().is_some() != dtype.is_integer() && activations != DType::BF16 {
                    let x = body.ty(node.operands[0]);
                    bail!(Unsupported, "no product of {x} and {dtype} weights: int8 meets integer formats only");
                }
                let planes = activations.planes().unwrap_or(1);
                let (x, weight) = (node.operands[0], node.operands[1]);
                let dot = Dot { value, x, weight, routing, dtype, k: columns, activations, planes };
                home[value.0 as usize] = Some(parts.len());
                parts.push(Component { dots: vec![dot], epilogue: vec![], n });
            }
            Class::Elementwise | Class::RowBroadcast | Class::View => {
                let mut homes: Vec<usize> = node.operands.iter().filter_map(|v| home[v.0 as usize]).collect();
                homes.sort_unstable();
                homes.dedup();
                let Some((&to, others)) = homes.split_first() else { continue };
                for from in others {
                    let moved =
                        std::mem::replace(&mut parts[*from], Component { dots: vec![], epilogue: vec![], n: 0 });
                    if moved.n != parts[to].n {
                        bail!(Internal, "contractions of {} and {} rows meet in `{}`", moved.n, parts[to].n, body.name);
                    }
                    parts[to].dots.extend(moved.dots);
                    parts[to].epilogue.extend(moved.epilogue);
                    home.iter_mut().filter(|h| **h == Some(*from)).for_each(|h| *h = Some(to));
                }
                parts[to].epilogue.push(value);
                parts[to].epilogue.sort_unstable();
                home[value.0 as usize] = Some(to);
            }
            _ => {}
        }
    }
    Ok(parts)
}

/// What a kernel computes before its contractions.
pub(crate) struct Before {
    pub(crate) nodes: Vec<ValueId>,
    /// Those of them that are read afterwards, with the bytes of their rows.
    pub(crate) read: Vec<(ValueId, usize)>,
}

/// Finds what is computed before the contractions: only kernels for few tokens may have something there.
pub(crate) fn before(kernel: &Kernel, components: &[Component]) -> Result<Before> {
    let body = &kernel.body;
    let after = |v: &ValueId| components.iter().any(|c| c.epilogue.contains(v) || c.dots.iter().any(|d| d.value == *v));
    let (after, nodes): (Vec<ValueId>, Vec<ValueId>) = body.computed().into_iter().partition(after);
    if !nodes.is_empty() && kernel.range.max > PROLOGUE_TOKENS {
        bail!(Internal, "`{}` computes activations for up to {} tokens", body.name, kernel.range.max);
    }
    let read = |v: &&ValueId| after.iter().filter_map(|a| body.node(*a)).any(|n| n.operands.contains(v));
    let read = nodes.iter().filter(read).filter_map(|v| Some((*v, row_bytes(body.ty(*v))?))).collect();
    Ok(Before { nodes, read })
}

/// Computes what contractions read and no buffer holds: every worker fills rows of its own stack. Kernels with a prologue
/// are for few tokens.
fn prologue(
    e: &mut Emitter,
    k: KernelArgs,
    kernel: &Kernel,
    components: &[Component],
    memory: &mut [Option<Val>],
) -> Result<()> {
    let body = &kernel.body;
    let Before { nodes, read } = before(kernel, components)?;
    let Some(last) = nodes.last() else { return Ok(()) };
    for (v, bytes) in read {
        memory[v.0 as usize] = Some(e.stack(bytes * PROLOGUE_TOKENS));
    }
    let rows = count_of(e, k, body.ty(*last))?;
    let zero = e.i64(0);
    let mut result = Ok(());
    e.repeat(zero, rows, 1, |e, row| result = super::rows::emit_row(e, k, body, &nodes, memory, &[], row));
    result
}

fn internal(body: &Graph) -> Error {
    Error::new(Kind::Internal, format!("`{}` is not a contraction over packed weights", body.name))
}

struct Contraction<'a> {
    kernel: &'a Kernel,
    body: &'a Graph,
    target: &'a Target,
    k: KernelArgs,
    memory: &'a [Option<Val>],
    component: &'a Component,
    choice: Choice,
}

impl Contraction<'_> {
    fn pointer(&self, value: ValueId) -> Result<Val> {
        self.memory[value.0 as usize].ok_or_else(|| internal(self.body))
    }

    /// Register tiles, the full one first.
    fn shapes(&self) -> Vec<Shape> {
        shape::shapes(&self.component.dots, self.kernel.range.max, self.choice)
    }

    fn emit(&self, e: &mut Emitter) -> Result<()> {
        let component = self.component;
        let strips = component.n.div_ceil(STRIP);
        let all = e.i64(strips as i64);
        let (low, high) = e.share(self.k, all);
        let rows = count_of(e, self.k, self.body.ty(component.dots[0].value))?;
        match self.operands()? {
            Some(operands) => {
                let few = self.fewest(operands);
                self.emit_tiled(e, operands, (low, high, rows), |e| self.emit_rows(e, (low, high, rows), few))
            }
            None => self.emit_rows(e, (low, high, rows), self.kernel.range.max),
        }
    }

    /// The worker's strips for all rows, at most `most`, on vector units.
    fn emit_rows(&self, e: &mut Emitter, (low, high, rows): (Val, Val, Val), most: usize) -> Result<()> {
        let component = self.component;
        let strips = component.n.div_ceil(STRIP);
        let cache_tile = shape::cache_tile(&component.dots, self.choice).min(strips.max(1));
        // Cache tiles of whole register tiles keep the odd strips at the end of a worker's share.
        let shapes = shape::shapes(&component.dots, most, self.choice);
        let cache_tile = cache_tile.next_multiple_of(shapes[0].strips) as i64;
        let mut result = Ok(());
        e.repeat(low, high, cache_tile, |e, from| {
            let size = e.i64(cache_tile);
            let to = e.add(from, size);
            let to = e.min(to, high);
            let (last, none) = (e.cmp(Cmp::Eq, to, high), e.i64(0));
            let ahead = e.select(last, none, size);
            result = self.token_tiles(e, &shapes, rows, Strips { from, to, ahead });
        });
        result
    }

    /// Full token tiles, then smaller ones, each once at most, that together cover what is left.
    fn token_tiles(&self, e: &mut Emitter, shapes: &[Shape], rows: Val, strips: Strips) -> Result<()> {
        let (main, mut result) = (shapes[0], Ok(()));
        let (zero, tokens) = (e.i64(0), e.i64(main.tokens as i64));
        let rest = e.rem(rows, tokens);
        let mut first = e.sub(rows, rest);
        e.repeat(zero, first, main.tokens as i64, |e, first| result = self.strips(e, main, first, strips));
        for shape in &shapes[1..] {
            let tokens = e.i64(shape.tokens as i64);
            let next = e.add(first, tokens);
            let fits = e.cmp(Cmp::Le, next, rows);
            e.when(fits, |e| {
                if result.is_ok() {
                    result = self.strips(e, *shape, first, strips);
                }
            });
            first = e.select(fits, next, first);
        }
        result
    }

    /// All strips of a cache tile for one token tile.
    fn strips(&self, e: &mut Emitter, shape: Shape, first: Val, strips: Strips) -> Result<()> {
        let Strips { from, to, ahead } = strips;
        by_strips(e, shape.strips, (from, to), |e, strip, strips| {
            self.register_tile(e, Shape { strips, ..shape }, first, (strip, ahead))
        })
    }

    /// Products of one register tile, epilogue, stores.
    fn register_tile(&self, e: &mut Emitter, shape: Shape, first: Val, (strip, ahead): (Val, Val)) -> Result<()> {
        let mut tiles = vec![];
        for dot in &self.component.dots {
            let weight = self.pointer(dot.weight)?;
            let stride = row_bytes(self.body.ty(dot.x)).ok_or_else(|| internal(self.body))?;
            let x = self.pointer(dot.x)?;
            let base = dot::strip_at(e, weight, strip, dot.dtype, dot.k);
            let bytes = StripLayout::new(dot.dtype, dot.k).bytes;
            let mut rows = dot.rows(e.row(x, first, stride), stride, shape.tokens);
            rows.prefetch = self.choice.ahead;
            // Where one tile of tokens follows another, there is time for it.
            if shape.tokens > 8 {
                rows.ahead = Some(e.scaled(ahead, bytes, 0));
            }
            tiles.push(((0..shape.strips).map(|s| e.gep_const(base, s * bytes)).collect(), rows));
        }
        let products = self.products(e, &tiles);
        for s in 0..shape.strips {
            let offset = e.scaled(strip, STRIP * 4, s * STRIP * 4);
            for r in 0..shape.tokens {
                let start = products.iter().map(|(v, p)| (*v, p[s * shape.tokens + r])).collect();
                self.epilogue(e, start, Place { first, row: r, offset, column: offset })?;
            }
        }
        Ok(())
    }

    /// Products of every contraction's strips and rows. Contractions of floats that share their rows are one tile, which
    /// loads and broadcasts each activation once.
    fn products(&self, e: &mut Emitter, tiles: &[(Vec<Val>, Rows)]) -> BTreeMap<ValueId, Vec<Val>> {
        let mut products: BTreeMap<ValueId, Vec<Val>> = BTreeMap::new();
        let dots = &self.component.dots;
        for (dot, (own, rows)) in dots.iter().zip(tiles) {
            if products.contains_key(&dot.value) {
                continue;
            }
            let alike = |other: &Dot| dot.value == other.value || dot.shares_tile(other);
            let joined = dots.iter().zip(tiles).filter(|(other, _)| alike(other));
            let strips: Vec<Val> = joined.clone().flat_map(|(_, (strips, _))| strips.iter().copied()).collect();
            let all = dot::tile(e, self.target, dot.dtype, dot.k, &strips, *rows);
            let parts = all.chunks_exact(own.len() * rows.count);
            products.extend(joined.zip(parts).map(|((other, _), part)| (other.value, part.to_vec())));
        }
        products
    }

    /// Runs the epilogue on one vector of 16 outputs and stores the results.
    fn epilogue(&self, e: &mut Emitter, start: BTreeMap<ValueId, Val>, place: Place) -> Result<()> {
        let mut values = start;
        for id in &self.component.epilogue {
            let Some(node) = self.body.node(*id) else { continue };
            let mut operands = vec![];
            for operand in &node.operands {
                let value = match values.get(operand) {
                    Some(v) => *v,
                    None => self.operand(e, *operand, place)?,
                };
                operands.push(value);
            }
            let value =
                if node.op.class() == Class::View { operands[0] } else { math::elementwise(e, node, &operands)? };
            values.insert(*id, value);
        }
        for (_, result) in &self.body.results {
            if let Some(value) = values.get(result) {
                let at = self.element_at(e, *result, place)?;
                e.store(*value, at, if value.ty.scalar == Scalar::BF16 { 32 } else { 64 });
            }
        }
        Ok(())
    }

    /// The 16 elements of a value in memory that stand beside a tile position. A vector of one head's width stands beside
    /// every head, one of a whole row beside all experts of a token.
    fn operand(&self, e: &mut Emitter, value: ValueId, place: Place) -> Result<Val> {
        let width = match self.body.ty(value).as_tensor() {
            Some((_, [Dim::N(width)])) if *width != self.component.n => *width,
            _ => {
                let at = self.element_at(e, value, place)?;
                return Ok(e.load(at, F32.x(STRIP), 64));
            }
        };
        let (base, bytes) = (self.pointer(value)?, e.i64(4 * width as i64));
        if width.is_multiple_of(STRIP) {
            let column = e.rem(place.offset, bytes);
            let at = e.gep(base, column);
            return Ok(e.load(at, F32.x(STRIP), 64));
        }
        let element = |e: &mut Emitter, lane: usize| {
            let lane = e.i64(4 * lane as i64);
            let column = e.add(place.offset, lane);
            let column = e.rem(column, bytes);
            let at = e.gep(base, column);
            e.load(at, F32, 4)
        };
        let first = element(e, 0);
        let mut lanes = e.broadcast(first, STRIP);
        for lane in 1..STRIP {
            let x = element(e, lane);
            lanes = e.op(lanes.ty, format_args!("vector.insert {x}, {lanes} [{lane}] : f32 into {}", lanes.ty));
        }
        Ok(lanes)
    }

    /// Address of the 16 elements a tile position stands for, in an activation or in a vector.
    fn element_at(&self, e: &mut Emitter, value: ValueId, place: Place) -> Result<Val> {
        let base = self.pointer(value)?;
        let ty = self.body.ty(value);
        if ty.is_static() {
            return Ok(e.gep(base, place.column));
        }
        let stride = row_bytes(ty).ok_or_else(|| internal(self.body))?;
        let row = e.row(base, place.first, stride);
        let row = e.gep_const(row, place.row * stride);
        let narrow = ty.dtype() == Some(DType::BF16);
        let offset = if narrow { e.shr(place.offset, 1) } else { place.offset };
        Ok(e.gep(row, offset))
    }
}

/// Strips `count` at a time, then the odd ones one by one.
fn by_strips(
    e: &mut Emitter,
    count: usize,
    (from, to): (Val, Val),
    mut body: impl FnMut(&mut Emitter, Val, usize) -> Result<()>,
) -> Result<()> {
    let mut result = Ok(());
    if count == 1 {
        e.repeat(from, to, 1, |e, strip| result = body(e, strip, 1));
        return result;
    }
    let (many, all) = (e.i64(count as i64), e.sub(to, from));
    let odd = e.rem(all, many);
    let middle = e.sub(to, odd);
    let mut tail = Ok(());
    e.repeat(from, middle, count as i64, |e, strip| result = body(e, strip, count));
    e.repeat(middle, to, 1, |e, strip| tail = body(e, strip, 1));
    result.and(tail)
}

/// Strips of a cache tile.
#[derive(Clone, Copy)]
struct Strips {
    from: Val,
    to: Val,
    /// Strips from one of them to the same of the next cache tile; 0 where there is none.
    ahead: Val,
}

/// Where a vector of 16 outputs lies: row `first + row`, `offset` bytes in; in a vector repeated for every row, `column`
/// bytes in.
#[derive(Clone, Copy)]
struct Place {
    first: Val,
    row: usize,
    offset: Val,
    column: Val,
}

#[cfg(test)]
#[path = "contract_tests.rs"]
mod tests;
