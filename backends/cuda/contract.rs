//! Contractions for few tokens: every block takes a strip of 16 output rows at a time and streams its weights.
//!
//! ```text
//! for strip of this block (and panel of up to 8 tokens)
//!   thread: lines 64 apart of the strip, 4 rows of each, times the panel's activations      in registers
//!   all 64 partial sums of an output meet in shared memory; barrier; a thread adds them up
//!   epilogue on one output a thread, stores
//! ```
//!
//! Contractions that meet in the epilogue are computed one after the other for the same outputs. An operand prologue is
//! computed by every block for itself, panel by panel, into shared memory.

pub(super) mod experts;
mod matrix;
pub(super) mod product;
pub(super) mod ring;
mod sums;
mod tile;
mod warpgroup;
mod widen;

use super::rows::emit_row;
use super::{Device, THREADS};
use crate::cpu::contract::{Before, Component, Dot, before, components};
use crate::cpu::{count_of, head::panels};
use crate::emit::{Cmp, Emitter, F32, Scalar, Val};
use crate::math;
use mansard_ir::layout::{STRIP, StripLayout, row_bytes};
use mansard_ir::ops::Class;
use mansard_ir::{Dim, Error, Graph, Kind, Result, ValueId};
use ring::Ring;
use std::collections::BTreeMap;

/// Tokens of a panel.
const PANEL: usize = 8;

/// Bytes of shared memory that the activations of a panel may take where a block computes them itself.
const PROLOGUE_BYTES: usize = 64 << 10;

fn internal(body: &Graph) -> Error {
    Error::new(Kind::Internal, format!("`{}` is not a contraction over packed weights", body.name))
}

/// Emits a `contract` kernel: for few tokens, for many, or for both, between which a launch chooses.
pub(super) fn emit(e: &mut Emitter, mut d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let components: Vec<Component> = components(body)?.into_iter().filter(|c| !c.dots.is_empty()).collect();
    let Some(first) = components.first() else { return Err(internal(body)) };
    let rows = count_of(e, d.k, body.ty(first.dots[0].value))?;
    let (most, range) = (e.i64(PANEL as i64), d.kernel.range);
    let is_few = e.cmp(Cmp::Le, rows, most);
    let mark = e.shared_mark();
    let ring = if range.min <= PANEL { Ring::of(e, &d, &components)? } else { None };
    match &ring {
        Some(ring) if range.max > PANEL => e.when(is_few, |e| ring.start(e)),
        Some(ring) => ring.start(e),
        None => {}
    }
    e.await_launches();
    let prologue = Prologue::new(e, &mut d, &components)?;
    let kernel = Contractions { d: &d, components: &components, rows };
    if range.max <= PANEL {
        return kernel.few(e, &prologue, ring.as_ref());
    }
    if range.min > PANEL {
        return kernel.many(e);
    }
    let (mut few, mut many) = (Ok(()), Ok(()));
    e.either(
        is_few,
        |e| few = kernel.few(e, &prologue, ring.as_ref()),
        |e| many = e.shared_over(mark, |e| kernel.many(e)),
    );
    few.and(many)
}

/// A `contract` kernel's work.
struct Contractions<'a> {
    d: &'a Device<'a>,
    components: &'a [Component],
    /// Tokens of the step.
    rows: Val,
}

impl Contractions<'_> {
    /// Strips of all components.
    fn strips(&self) -> i64 {
        strips(self.components).iter().sum::<usize>() as i64
    }

    /// One strip of all, for a panel.
    fn strip(&self, e: &mut Emitter, strip: Val, panel: Panel, stream: Stream<'_>) -> Result<()> {
        each(e, self.components, &strips(self.components), strip, |e, component, strip| {
            Contraction { d: self.d, component }.item(e, strip, panel, stream)
        })
    }

    /// At most [`PANEL`] tokens: blocks stream the weights once, or once for as many tokens as their activations have room.
    fn few(&self, e: &mut Emitter, prologue: &Prologue, ring: Option<&Ring>) -> Result<()> {
        let (k, strips, mut result) = (self.d.k, e.i64(self.strips()), Ok(()));
        panels(e, self.rows, self.d.kernel.range.max.min(PANEL), |e, first, tokens| {
            for from in (0..tokens).step_by(prologue.tokens) {
                let tokens = prologue.tokens.min(tokens - from);
                let first = e.scaled(first, 1, from);
                let mut done = prologue.fill(e, self.d, first, (self.rows, tokens));
                // The first pass over the weights has begun.
                if let (Some(ring), 1..) = (ring, from) {
                    ring.start(e);
                }
                let (zero, one) = (e.i64(0), e.i64(1));
                let own = if prologue.nodes.is_empty() { first } else { zero };
                e.for_loop((k.thread, strips, k.threads), &[zero], |e, strip, round| {
                    let stream = ring.map(|ring| (ring, round[0]));
                    done = std::mem::replace(&mut done, Ok(())).and(self.strip(
                        e,
                        strip,
                        Panel { first, tokens, own },
                        stream,
                    ));
                    vec![e.add(round[0], one)]
                });
                result = std::mem::replace(&mut result, Ok(())).and(done);
            }
        });
        result
    }

    /// Any number of tokens: on tensor cores where they multiply such formats, else panel by panel.
    fn many(&self, e: &mut Emitter) -> Result<()> {
        if warpgroup::suit(self.d, self.components) {
            return warpgroup::emit(e, self.d, self.components, self.rows);
        }
        if self.components.iter().all(tile::suits) {
            return tile::emit(e, self.d, self.components, self.rows);
        }
        if self.components.iter().all(matrix::suits) {
            return matrix::emit(e, self.d, self.components, self.rows);
        }
        let (k, strips, mut result) = (self.d.k, e.i64(self.strips()), Ok(()));
        let size = e.i64(PANEL as i64);
        let padded = e.scaled(self.rows, 1, PANEL - 1);
        let count = e.div(padded, size);
        let items = e.mul(count, strips);
        // Blocks that run together share the strip, which one of them brings into the second-level cache.
        e.for_loop((k.thread, items, k.threads), &[], |e, index, _| {
            let (panel, strip) = (e.rem(index, count), e.div(index, count));
            let first = e.mul(panel, size);
            result = self.strip(e, strip, Panel { first, tokens: PANEL, own: first }, None);
            vec![]
        });
        result
    }
}

/// Runs `body` with the component that item `index` belongs to, where each has so many one after the other, and its number there.
fn each(
    e: &mut Emitter,
    components: &[Component],
    counts: &[usize],
    index: Val,
    mut body: impl FnMut(&mut Emitter, &Component, Val) -> Result<()>,
) -> Result<()> {
    let (mut before, mut result) = (0, Ok(()));
    for (component, count) in components.iter().zip(counts) {
        let (low, after) = (e.i64(before as i64), before + count);
        let high = e.i64(after as i64);
        let (from, to) = (e.cmp(Cmp::Ge, index, low), e.cmp(Cmp::Lt, index, high));
        let here = e.and(from, to);
        e.when(here, |e| {
            let own = e.sub(index, low);
            result = std::mem::replace(&mut result, Ok(())).and(body(e, component, own));
        });
        before = after;
    }
    result
}

/// Strips of each component.
fn strips(components: &[Component]) -> Vec<usize> {
    components.iter().map(|component| component.n.div_ceil(STRIP)).collect()
}

/// What every block computes for itself.
struct Prologue {
    nodes: Vec<ValueId>,
    /// Tokens whose rows fit shared memory.
    tokens: usize,
}

impl Prologue {
    fn new(e: &mut Emitter, d: &mut Device<'_>, components: &[Component]) -> Result<Prologue> {
        let Before { nodes, read } = before(d.kernel, components)?;
        let bytes: usize = read.iter().map(|(_, bytes)| bytes).sum();
        let fitting = PROLOGUE_BYTES.checked_div(bytes).unwrap_or(PANEL).clamp(1, PANEL);
        let tokens = 1 << fitting.ilog2();
        for (v, bytes) in read {
            d.memory[v.0 as usize] = Some(e.shared(tokens * bytes));
        }
        Ok(Prologue { nodes, tokens })
    }

    /// Computes the rows of tokens `first..`, of those that the step has.
    fn fill(&self, e: &mut Emitter, d: &Device<'_>, first: Val, (rows, tokens): (Val, usize)) -> Result<()> {
        if self.nodes.is_empty() {
            return Ok(());
        }
        let (body, mut result) = (&d.kernel.body, Ok(()));
        let end = e.scaled(first, 1, tokens);
        let end = e.min(end, rows);
        e.repeat(first, end, 1, |e, row| {
            // Rows in shared memory are counted from the panel's first.
            let own = e.sub(row, first);
            let kept = self.nodes.iter().filter_map(|v| Some((*v, d.memory[v.0 as usize]?, row_bytes(body.ty(*v))?)));
            let here: Vec<(ValueId, Val)> = kept.map(|(v, base, bytes)| (v, e.row(base, own, bytes))).collect();
            result = emit_row(e, d.k, body, &self.nodes, &d.memory, &here, row);
        });
        result
    }
}

/// Some tokens that share the weights.
#[derive(Clone, Copy)]
struct Panel {
    /// The first token.
    first: Val,
    tokens: usize,
    /// The first token's row among the activations.
    own: Val,
}

/// Gives the strip of a contraction's weights, and its rows of activations.
type Operands<'a> = dyn Fn(&mut Emitter, &Dot) -> Result<(Val, Vec<Val>)> + 'a;

/// A ring, and which of the block's strips comes next.
type Stream<'a> = Option<(&'a Ring, Val)>;

struct Contraction<'a> {
    d: &'a Device<'a>,
    component: &'a Component,
}

/// The output of a thread: its row of activations, which of the elements that row has in the result, and which column of
/// the weights' rows.
#[derive(Clone, Copy)]
struct Place {
    token: Val,
    element: Val,
    column: Val,
    /// The thread is to store.
    counts: Val,
}

impl Contraction<'_> {
    fn body(&self) -> &Graph {
        &self.d.kernel.body
    }

    /// One strip of a panel.
    fn item(&self, e: &mut Emitter, strip: Val, panel: Panel, stream: Stream<'_>) -> Result<()> {
        let rows = |e: &mut Emitter, dot: &Dot| -> Result<(Val, Vec<Val>)> {
            let stride = row_bytes(self.body().ty(dot.x)).ok_or_else(|| internal(self.body()))?;
            let base = self.d.pointer(dot.x)?;
            let first = e.row(base, panel.own, stride);
            let rows = (0..panel.tokens).map(|t| e.gep_const(first, t * stride)).collect();
            let weight = self.d.pointer(dot.weight)?;
            Ok((e.row(weight, strip, StripLayout::new(dot.dtype, dot.k).bytes), rows))
        };
        let first_column = e.scaled(strip, STRIP, 0);
        self.outputs(e, (panel.tokens, stream), &rows, |e, token, row, counts| {
            let column = e.add(first_column, row);
            Place { token: e.add(panel.first, token), element: column, column, counts }
        })
    }

    /// Products of a strip of every contraction with `tokens` rows, then the epilogue; `operands` gives the strip and the
    /// rows of a contraction, `place` the output of a token and row of the strip.
    fn outputs(
        &self,
        e: &mut Emitter,
        (tokens, stream): (usize, Stream<'_>),
        operands: &Operands<'_>,
        place: impl FnOnce(&mut Emitter, Val, Val, Val) -> Place,
    ) -> Result<()> {
        e.scoped(|e| {
            let partials = e.shared(product::partial_bytes(tokens));
            let mut values = BTreeMap::new();
            for (index, dot) in self.component.dots.iter().enumerate() {
                let (strip, rows) = operands(e, dot)?;
                let feed = stream.map(|(ring, round)| ring.feed(e, round, index));
                product::partial_sums(e, dot, (strip, feed), &rows, partials)?;
                e.barrier();
                values.insert(dot.value, product::sum_of_parts(e, tokens, partials));
                e.barrier();
            }
            let (thread, outputs) = (e.thread(), e.i64((STRIP * tokens) as i64));
            let (lanes, own) = (e.i64(STRIP as i64), e.rem(thread, outputs));
            let (token, row, counts) = (e.div(own, lanes), e.rem(own, lanes), e.cmp(Cmp::Lt, thread, outputs));
            let place = place(e, token, row, counts);
            self.epilogue(e, values, place)
        })
    }

    /// Runs the epilogue on a thread's output and stores the results.
    fn epilogue(&self, e: &mut Emitter, mut values: BTreeMap<ValueId, Val>, place: Place) -> Result<()> {
        for id in &self.component.epilogue {
            let Some(node) = self.body().node(*id) else { continue };
            let mut operands = vec![];
            for operand in &node.operands {
                operands.push(match values.get(operand) {
                    Some(v) => *v,
                    None => self.operand(e, *operand, place)?,
                });
            }
            let value =
                if node.op.class() == Class::View { operands[0] } else { math::elementwise(e, node, &operands)? };
            values.insert(*id, value);
        }
        for (_, result) in &self.body().results {
            if let Some(value) = values.get(result) {
                let bytes = if value.ty.scalar == Scalar::BF16 { 2 } else { 4 };
                let at = self.element(e, *result, place, bytes)?;
                e.when(place.counts, |e| e.store(*value, at, bytes));
            }
        }
        Ok(())
    }

    /// The element of a value in memory beside an output. A vector of one head's width stands beside every head, one of a
    /// whole row beside all experts of a token.
    fn operand(&self, e: &mut Emitter, value: ValueId, place: Place) -> Result<Val> {
        let at = match self.body().ty(value).as_tensor() {
            Some((_, [Dim::N(width)])) => {
                let (base, size) = (self.d.pointer(value)?, e.i64(*width as i64));
                let column = if *width == self.component.n { place.column } else { e.rem(place.element, size) };
                e.row(base, column, 4)
            }
            _ => self.element(e, value, place, 4)?,
        };
        Ok(e.load(at, F32, 4))
    }

    fn element(&self, e: &mut Emitter, value: ValueId, place: Place, bytes: usize) -> Result<Val> {
        let stride = row_bytes(self.body().ty(value)).ok_or_else(|| internal(self.body()))?;
        let base = self.d.pointer(value)?;
        let row = e.row(base, place.token, stride);
        Ok(e.row(row, place.element, bytes))
    }
}

const _: () = assert!(STRIP * PANEL <= THREADS, "every output of a panel has a thread");
