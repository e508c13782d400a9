//! What a program does in one step - operations and bytes - and how long a roofline says that takes.
//!
//! ```text
//! workload: 1 token, context 512        matmul f32[t, 576] x q4_0[1536, 576]
//!   f32 operations  1.77e6              weight bytes  497664 (as packed)       activation bytes  8448
//! ```
//!
//! Bytes are those of the layouts that kernels read: padded rows, packed strips, cache blocks at their stored type.

use crate::formats::DType;
use crate::graph::{Attrs, Graph, Node, ValueId};
use crate::layout::{self, A8};
use crate::ops::Class;
use crate::planes::PlanesLayout;
use crate::target::Machine;
use crate::types::{Dim, Type};

/// The step that a program is priced for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// New tokens.
    pub tokens: f64,
    /// Sequences.
    pub sequences: f64,
    /// Rows that leave the step.
    pub rows: f64,
    /// Positions a token attends to.
    pub context: f64,
    /// How many of the largest logits of a row are wanted; 0: all.
    pub candidates: usize,
}

/// What some nodes do together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// f32 operations.
    pub f32_ops: f64,
    /// Those among them outside products and attention: norms, activations, quantizing.
    pub scalar_ops: f64,
    /// What giving integer sums their groups' scales takes, in f32 operations; not counted among the operations.
    pub scaling: f64,
    /// Operations of products of bf16 pairs.
    pub bf16_ops: f64,
    /// int8 operations.
    pub i8_ops: f64,
    /// Bytes of packed weights, read once each.
    pub weight_bytes: f64,
    /// Bytes of caches read and written.
    pub cache_bytes: f64,
    /// Bytes of activations read and written.
    pub activation_bytes: f64,
}

impl Workload {
    /// `tokens` tokens of one sequence with `context` positions, of which one row leaves the step, for its largest logit.
    pub fn one(tokens: usize, context: usize) -> Workload {
        Workload { tokens: tokens as f64, sequences: 1.0, rows: 1.0, context: context as f64, candidates: 1 }
    }

    /// Extent of a dim.
    pub fn extent(&self, dim: Dim) -> f64 {
        match dim {
            Dim::N(n) => n as f64,
            Dim::T => self.tokens,
            Dim::S => self.sequences,
            Dim::R => self.rows,
        }
    }

    /// Bytes of a value in memory: an activation's rows, a packed weight, the cache's part that is attended.
    pub fn bytes(&self, ty: &Type) -> f64 {
        match ty {
            Type::Cache { .. } => self.sequences * self.context * layout::cache_position_bytes(ty).unwrap_or(0) as f64,
            Type::Step => 0.0,
            Type::Tensor { dtype, shape } if ty.is_static() => {
                let extents: Vec<usize> = shape.iter().map(|d| if let Dim::N(n) = d { *n } else { 1 }).collect();
                layout::packed_bytes(*dtype, &extents) as f64
            }
            _ => self.extent(ty.rows().unwrap_or(Dim::N(1))) * layout::row_bytes(ty).unwrap_or(0) as f64,
        }
    }

    /// Bytes that an attention of `attrs` reads of a cache: with a window, only the positions any of the step's tokens sees.
    pub fn attended_bytes(&self, ty: &Type, attrs: &Attrs) -> f64 {
        let (window, new) = (attrs.int("window") as f64, self.tokens / self.sequences);
        let kept = |window: f64| if window > 0.0 { self.context.min(window + new - 1.0) } else { self.context };
        let cached = if let Type::Cache { window, .. } = ty { *window as f64 } else { 0.0 };
        let context = kept(window).min(kept(cached));
        Workload { context, ..*self }.bytes(ty)
    }

    /// What the nodes among `values` of `graph` do when they run as one kernel: values from outside are read once,
    /// values that others read are written once.
    pub fn work(&self, graph: &Graph, values: &[ValueId]) -> Work {
        let mut work = Work::default();
        let (inside, mut read) = (|v: &ValueId| values.contains(v), vec![]);
        for (v, node) in values.iter().filter_map(|v| Some((v, graph.node(*v)?))) {
            self.operations(graph, *v, &mut work);
            for operand in node.operands.iter().filter(|o| !inside(o)) {
                if !read.contains(operand) {
                    read.push(*operand);
                    self.read(graph, node, *operand, &mut work);
                }
            }
        }
        let others = graph.values().filter(|v| !inside(v)).filter_map(|v| graph.node(v)).flat_map(|n| &n.operands);
        let leaving: Vec<&ValueId> = others.chain(graph.results.iter().map(|(_, v)| v)).collect();
        for v in values.iter().filter(|v| leaving.contains(v)) {
            match graph.ty(*v) {
                Type::Cache { .. } => {} // counted as the rows appended
                ty => work.activation_bytes += self.bytes(ty),
            }
        }
        work
    }

    fn operations(&self, graph: &Graph, v: ValueId, work: &mut Work) {
        let Some(node) = graph.node(v) else { return };
        let types: Vec<&Type> = node.operands.iter().map(|o| graph.ty(*o)).collect();
        let rows = types.iter().find_map(|ty| ty.rows()).map_or(0.0, |dim| self.extent(dim));
        let ops = (node.op.row().flops)(&types, &node.attrs, &node.ty, rows, self.context) * self.made(node.op.class());
        *work += Work::of(node.op.class(), &types, ops);
        if let (Class::Append, [_, x, ..]) = (node.op.class(), types.as_slice()) {
            let row = layout::cache_position_bytes(&node.ty).unwrap_or(0);
            work.cache_bytes += self.extent(x.rows().unwrap_or(Dim::T)) * row as f64;
        }
    }

    /// Adds the bytes a node reads of one operand.
    fn read(&self, graph: &Graph, node: &Node, operand: ValueId, work: &mut Work) {
        let (ty, class) = (graph.ty(operand), node.op.class());
        match (ty, class) {
            (Type::Cache { .. }, Class::Attend) => work.cache_bytes += self.attended_bytes(ty, &node.attrs),
            (Type::Cache { .. }, _) => {} // an append only writes
            _ if ty.is_static() => work.weight_bytes += self.bytes(ty) * self.share(graph, class, &node.operands, ty),
            _ => work.activation_bytes += self.bytes(ty),
        }
    }

    /// The share of a weight's rows that is read: of experts those chosen by any token, of a table those asked for.
    fn share(&self, graph: &Graph, class: Class, operands: &[ValueId], ty: &Type) -> f64 {
        let routing = operands.iter().find_map(|o| match graph.ty(*o) {
            Type::Routing { top, experts } => Some(*top as f64 / *experts as f64),
            _ => None,
        });
        let rows = operands.iter().find_map(|o| graph.ty(*o).rows()).map_or(1.0, |dim| self.extent(dim));
        match (class, routing, ty.as_tensor()) {
            (Class::ContractExperts, Some(each), _) => 1.0 - (1.0 - each).powf(rows),
            (Class::Gather, _, Some((_, [Dim::N(n), ..]))) => (rows / *n as f64).min(1.0),
            _ => self.planes_read(class, ty),
        }
    }

    /// The share of an op's products that are computed: of the vocabulary projection's two ops, what the step asks for.
    pub fn made(&self, class: Class) -> f64 {
        match (class, self.candidates) {
            (Class::Estimate, 0) => 0.0,
            (Class::Rescore, 1..) => RESCORED,
            _ => 1.0,
        }
    }

    /// The share of a weight that is read: estimates need its first plane, rescoring a few rows of the second, or all.
    pub fn planes_read(&self, class: Class, ty: &Type) -> f64 {
        let Some((_, [Dim::N(n), Dim::N(k)])) = ty.as_tensor() else { return 1.0 };
        let layout = PlanesLayout::new(*k);
        let first = layout.upper_bytes(*n) as f64 / layout.bytes(*n) as f64;
        match class {
            Class::Estimate => first * self.made(class),
            Class::Rescore if self.candidates > 0 => (1.0 - first) * RESCORED,
            _ => 1.0,
        }
    }
}

/// What scales cost where `ops` operations multiply codes: for every group of 32 at most, token and row the sum becomes a
/// real, the scales of both sides are multiplied, and a multiply-add; a minimum takes one more. Each costs as much as the
/// multiply-add that counts two.
fn scaling(ops: f64, group: usize, mins: bool) -> f64 {
    let groups = ops / 2.0 / group.min(A8::GROUP) as f64;
    groups * 2.0 * if mins { 5.0 } else { 3.0 }
}

/// Share of a vocabulary's rows that is assumed to be rescored.
const RESCORED: f64 = 0.02;

impl Work {
    /// What `ops` operations on operands of these types come to.
    pub fn of(class: Class, types: &[&Type], ops: f64) -> Work {
        let dtype = |ty: &&Type| Some(ty.as_tensor()?.0);
        let codes = types.iter().find_map(|ty| dtype(ty)?.planes());
        if let Some(planes) = codes {
            let ops = ops * planes as f64;
            let int = types.iter().find_map(|ty| dtype(ty)?.int());
            let scaling = int.map_or(0.0, |int| scaling(ops, int.group, int.zero.has_mins()));
            return Work { i8_ops: ops, scaling, ..Work::default() };
        }
        if types.first().and_then(dtype) == Some(DType::BF16) {
            return Work { bf16_ops: ops, ..Work::default() };
        }
        let products = matches!(class, Class::Contract | Class::ContractExperts | Class::Attend);
        Work { f32_ops: ops, scalar_ops: if products { 0.0 } else { ops }, ..Work::default() }
    }

    /// Every byte, from wherever it comes.
    pub fn bytes(&self) -> f64 {
        self.weight_bytes + self.cache_bytes + self.activation_bytes
    }

    /// Every operation, of whatever type.
    pub fn operations(&self) -> f64 {
        self.f32_ops + self.bf16_ops + self.i8_ops
    }

    /// Seconds of computing on that machine, with nothing to wait for.
    pub fn computing(&self, machine: &Machine) -> f64 {
        self.f32_ops / machine.peak_f32 + self.bf16_ops / machine.peak_bf16 + self.i8_ops / machine.peak_i8
    }

    /// Seconds of moving on that machine, with nothing to compute.
    pub fn moving(&self, machine: &Machine) -> f64 {
        let near = machine.near(self.activation_bytes);
        (self.weight_bytes + self.cache_bytes) / machine.bandwidth + self.activation_bytes / near
    }

    /// Seconds on that machine: the longer of computing and moving.
    pub fn seconds(&self, machine: &Machine) -> f64 {
        self.computing(machine).max(self.moving(machine))
    }

    /// Seconds of computing as kernels do: scales and what is outside products take their part.
    pub fn busy(&self, machine: &Machine) -> f64 {
        let beside = self.scaling + self.scalar_ops * (1.0 / SCALAR_SHARE - 1.0);
        self.computing(machine) + beside / machine.peak_f32
    }
}

/// Share of the f32 peak that work outside products reaches: few multiply-adds, horizontal sums, polynomials.
const SCALAR_SHARE: f64 = 0.25;

/// Share of the smaller side of the roofline that the larger one does not hide.
const EXPOSED: f64 = 0.2;

/// Predicted seconds of a launch that computes and moves for so many seconds.
pub fn priced(computing: f64, moving: f64, machine: &Machine) -> f64 {
    computing.max(moving) + computing.min(moving) * EXPOSED + machine.barrier
}

impl std::ops::Mul<f64> for Work {
    type Output = Work;

    fn mul(self, by: f64) -> Work {
        Work {
            f32_ops: self.f32_ops * by,
            scalar_ops: self.scalar_ops * by,
            scaling: self.scaling * by,
            bf16_ops: self.bf16_ops * by,
            i8_ops: self.i8_ops * by,
            weight_bytes: self.weight_bytes * by,
            cache_bytes: self.cache_bytes * by,
            activation_bytes: self.activation_bytes * by,
        }
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.f32_ops += other.f32_ops;
        self.scalar_ops += other.scalar_ops;
        self.scaling += other.scaling;
        self.bf16_ops += other.bf16_ops;
        self.i8_ops += other.i8_ops;
        self.weight_bytes += other.weight_bytes;
        self.cache_bytes += other.cache_bytes;
        self.activation_bytes += other.activation_bytes;
    }
}

/// Seconds for `flops` f32 operations and `bytes` bytes from main memory.
pub fn roofline(flops: f64, bytes: f64, machine: &Machine) -> f64 {
    (flops / machine.peak_f32).max(bytes / machine.bandwidth)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(graph: &str, workload: Workload) -> Work {
        let model = crate::text::parse("g", graph).unwrap();
        let graph = &model.graphs[0];
        let nodes = graph.values().filter(|v| graph.node(*v).is_some_and(|n| n.op.class() != Class::Weight));
        workload.work(graph, &nodes.collect::<Vec<_>>())
    }

    #[test]
    fn a_product_reads_its_weight_once() {
        let text = "graph @g(%x: f32[t, 64]) stage imported { %w = weight \"w\" : q4_0[32, 64] %a = matmul %x, %w \
                    %y = silu %a return y = %y }";
        let found = work(text, Workload::one(3, 0));
        assert_eq!(found.f32_ops, 3.0 * 32.0 * (2.0 * 64.0 + 5.0));
        assert_eq!(found.weight_bytes, 2.0 * (64.0 + 64.0 * 16.0 / 2.0)); // two strips: two groups' scales, codes
        assert_eq!(found.activation_bytes, 3.0 * 4.0 * (64.0 + 32.0));
    }

    #[test]
    fn attention_works_on_its_window_and_reads_no_more() {
        let text = "graph @g(%q: f32[t, 4, 16], %k: keys<f16>[c, 2, 16], %v: values<f16>[c, 2, 16], %step: step[s]) \
                    stage imported { %y = attend %q, %k, %v, %step {scale = 1, causal = true, window = 8, softcap = 0} \
                    return y = %y }";
        let found = work(text, Workload::one(1, 100));
        assert_eq!(found.f32_ops, 8.0 * (4.0 * 64.0 + 5.0 * 4.0));
        assert_eq!(found.cache_bytes, 2.0 * 8.0 * 32.0 * 2.0);
        let (short, several) = (work(text, Workload::one(1, 5)), work(text, Workload::one(3, 100)));
        assert_eq!(short.cache_bytes, 2.0 * 5.0 * 32.0 * 2.0);
        assert_eq!(several.cache_bytes, 2.0 * (8.0 + 2.0) * 32.0 * 2.0);
    }

    #[test]
    fn tables_and_experts_are_read_in_part() {
        let text = "graph @g(%tokens: i32[t], %route: routing[t, 2, 8]) stage imported { \
                    %w = weight \"w\" : f32[100, 16] %x = embed %tokens, %w \
                    %e = weight \"e\" : f32[8, 16, 16] %y = matmul_experts %x, %e, %route return y = %y }";
        let found = work(text, Workload::one(2, 0));
        let experts = 8.0 * (1.0 - 0.75f64.powi(2)) * 16.0 * 16.0 * 4.0;
        let table = 7.0 * 16.0 * 16.0 * 4.0 * 2.0 / 100.0; // strips hold 112 rows
        assert!((found.weight_bytes - experts - table).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn the_roof_has_two_slopes() {
        let machine = Machine {
            threads: 1,
            bandwidth: 10.0,
            near_bandwidth: 0.0,
            near_bytes: 0.0,
            cache_bandwidth: 100.0,
            cache_bytes: 1e9,
            peak_f32: 1000.0,
            peak_bf16: 2000.0,
            peak_i8: 4000.0,
            barrier: 0.0,
        };
        assert_eq!(roofline(1000.0, 5.0, &machine), 1.0);
        assert_eq!(roofline(1000.0, 50.0, &machine), 5.0);
        let work = Work { f32_ops: 500.0, i8_ops: 2000.0, weight_bytes: 1.0, ..Work::default() };
        assert_eq!(work.seconds(&machine), 1.0);
        // What is outside products is slower, and scales are added.
        let work = Work { f32_ops: 500.0, scalar_ops: 500.0, scaling: 1000.0, ..Work::default() };
        assert_eq!((work.computing(&machine), work.busy(&machine)), (0.5, 3.0));
    }
}
