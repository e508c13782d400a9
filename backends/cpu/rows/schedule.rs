//! Orders the nodes of a row program and decides where each value's row lives.
//!
//! ```text
//! %3 = add %0, %1   %4 = rms_normalize %3   %5 = mul_row %4, %2   %6 = quantize %5      (results %3, %6)
//!
//! sweep  %3             x + y, stored to the result
//! stats  %4             mean square of %3
//! sweep  %4 %5          scaled and multiplied in registers, stored to the stack
//! node   %6             quantized to the result
//! ```
//!
//! A *sweep* is a maximal run of nodes that work element by element, in one loop. Views are other names of their operand's
//! row. A value that only its own sweep reads has no row at all; a result lives in its buffer; every other row is on the
//! stack, where rows share memory once their last reader is done.

use super::walk::LANES;
use mansard_ir::layout::row_bytes;
use mansard_ir::ops::Class;
use mansard_ir::{Error, Graph, Kind, Result, Type, ValueId, bail};
use std::collections::BTreeMap;

/// Most bytes of stack that the rows of a program may take.
const STACK_LIMIT: usize = 1 << 20;

/// What is emitted at once.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// One loop over rows of one width.
    Sweep {
        /// Heads and their width; one head where the nodes do not look at heads.
        heads: (usize, usize),
        /// In order.
        nodes: Vec<ValueId>,
    },
    /// Per-head figures of a normalization.
    Stats(ValueId),
    /// A node by itself.
    Node(ValueId),
    /// One more result that is the same row.
    Copy {
        /// The row.
        from: ValueId,
        /// The result.
        to: ValueId,
    },
}

/// Where a row lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// In the buffer of this value, which is an input, a result or a view of the row's value.
    Memory(ValueId),
    /// At this byte of the stack.
    Stack(usize),
    /// Wherever its node finds it: a row of another value.
    Elsewhere,
}

/// The outcome.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// In order of emission.
    pub steps: Vec<Step>,
    /// Of every value that has a row and is no view.
    pub homes: BTreeMap<ValueId, Home>,
    /// Bytes of stack.
    pub stack_bytes: usize,
}

/// The value whose row a view shows.
pub fn root(graph: &Graph, nodes: &[ValueId], mut value: ValueId) -> ValueId {
    while let Some(node) = graph.node(value) {
        if node.op.class() != Class::View || nodes.binary_search(&value).is_err() {
            break;
        }
        value = node.operands[0];
    }
    value
}

/// Elements of a value's row, all heads together.
pub fn width(graph: &Graph, value: ValueId) -> Result<usize> {
    let ty = graph.ty(value);
    ty.row_width().ok_or_else(|| Error::new(Kind::Internal, format!("{value}: {ty} has no rows")))
}

/// Heads and their width; rows without heads are one.
pub fn heads(graph: &Graph, value: ValueId) -> Result<(usize, usize)> {
    let ty = graph.ty(value);
    let last = match ty.as_tensor().and_then(|(_, shape)| shape.get(1..)?.last().copied()) {
        Some(mansard_ir::Dim::N(n)) if n > 0 => n,
        _ => bail!(Internal, "{value}: {ty} has no rows"),
    };
    Ok((width(graph, value)? / last, last))
}

/// Plans the rows of `nodes` (ascending). `stored` tells which values have a buffer.
pub fn schedule(graph: &Graph, nodes: &[ValueId], stored: &dyn Fn(ValueId) -> bool) -> Result<Schedule> {
    let planner = Planner { graph, nodes };
    let steps = planner.with_copies(planner.steps()?, stored);
    let (homes, stack_bytes) = planner.homes(&steps, stored)?;
    if stack_bytes > STACK_LIMIT {
        bail!(Unsupported, "rows of `{}` need {stack_bytes} bytes of stack, {STACK_LIMIT} are the limit", graph.name);
    }
    Ok(Schedule { steps, homes, stack_bytes })
}

struct Planner<'a> {
    graph: &'a Graph,
    nodes: &'a [ValueId],
}

/// One thing to order: a normalization is two.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Item {
    Stats(ValueId),
    Swept(ValueId),
    Alone(ValueId),
}

impl Planner<'_> {
    fn root(&self, value: ValueId) -> ValueId {
        root(self.graph, self.nodes, value)
    }

    fn class(&self, value: ValueId) -> Option<Class> {
        self.graph.node(value).map(|n| n.op.class())
    }

    fn inside(&self, value: ValueId) -> bool {
        self.nodes.binary_search(&value).is_ok()
    }

    /// Operands that are rows of this program, whoever computes them.
    fn rows_read(&self, value: ValueId) -> Vec<ValueId> {
        let Some(node) = self.graph.node(value) else { return vec![] };
        if matches!(node.op.class(), Class::Gather | Class::Angles) {
            return vec![];
        }
        let is_row = |v: &&ValueId| self.graph.ty(**v).rows().is_some();
        node.operands.iter().filter(is_row).map(|v| self.root(*v)).collect()
    }

    fn items(&self) -> Vec<Item> {
        let mut items = vec![];
        for &v in self.nodes {
            match self.class(v) {
                Some(Class::Elementwise | Class::RowBroadcast | Class::Combine) => items.push(Item::Swept(v)),
                Some(Class::RowReduce) => items.extend([Item::Stats(v), Item::Swept(v)]),
                Some(Class::View) | None => {}
                Some(_) => items.push(Item::Alone(v)),
            }
        }
        items
    }

    /// Greedy: each sweep takes every later node of its width whose operands are there.
    fn steps(&self) -> Result<Vec<Step>> {
        let mut left = self.items();
        let (mut steps, mut done, mut known) = (vec![], vec![], vec![]);
        while !left.is_empty() {
            match left[0] {
                Item::Alone(v) => {
                    steps.push(Step::Node(v));
                    done.push(v);
                    left.remove(0);
                }
                Item::Stats(v) => {
                    steps.push(Step::Stats(v));
                    known.push(v);
                    left.remove(0);
                }
                Item::Swept(first) => {
                    let width = width(self.graph, first)?;
                    let (mut taken, mut shape) = (vec![], None);
                    let mut later = vec![];
                    for item in left {
                        match item {
                            Item::Swept(v) if self.fits(v, width, &mut shape, (&done, &taken, &known))? => {
                                taken.push(v)
                            }
                            item => later.push(item),
                        }
                    }
                    left = later;
                    done.extend(&taken);
                    steps.push(Step::Sweep { heads: shape.unwrap_or((1, width)), nodes: taken });
                }
            }
        }
        Ok(steps)
    }

    /// Whether a node can join a sweep; the first node that looks at heads decides the sweep's.
    fn fits(
        &self,
        v: ValueId,
        wanted: usize,
        shape: &mut Option<(usize, usize)>,
        (done, taken, known): (&[ValueId], &[ValueId], &[ValueId]),
    ) -> Result<bool> {
        let computed = |r: &ValueId| !self.inside(*r) || done.contains(r) || taken.contains(r);
        // A combination reads several places of its operand's row, so the row must be there.
        let class = self.class(v);
        let whole = class == Some(Class::Combine);
        let ready = self.rows_read(v).iter().all(|r| computed(r) && !(whole && taken.contains(r)));
        if !ready || width(self.graph, v)? != wanted || (class == Some(Class::RowReduce) && !known.contains(&v)) {
            return Ok(false);
        }
        let own = match class {
            Some(Class::RowBroadcast | Class::RowReduce | Class::Combine) => Some(heads(self.graph, v)?),
            _ => None,
        };
        if let (Some(own), Some(shape)) = (own, *shape) {
            return Ok(own == shape);
        }
        *shape = shape.or(own);
        Ok(true)
    }

    /// Buffers that want the row of `value`, in order.
    fn wanted_by(&self, value: ValueId, stored: &dyn Fn(ValueId) -> bool) -> Vec<ValueId> {
        self.nodes.iter().copied().filter(|v| stored(*v) && self.root(*v) == value).collect()
    }

    /// A row is computed into one buffer and copied from there; what is not computed here is only copied.
    fn with_copies(&self, steps: Vec<Step>, stored: &dyn Fn(ValueId) -> bool) -> Vec<Step> {
        let mut out = vec![];
        let copies = |value: ValueId, skip: usize| -> Vec<Step> {
            let wanted = self.wanted_by(value, stored).into_iter().skip(skip);
            wanted.map(|to| Step::Copy { from: value, to }).collect()
        };
        for v in self.nodes {
            let source = self.root(*v);
            if stored(*v) && !self.inside(source) {
                out.push(Step::Copy { from: source, to: *v });
            }
        }
        for step in steps {
            let defined = defined(&step);
            out.push(step);
            for v in defined {
                out.extend(copies(v, if self.is_selection(v) { 0 } else { 1 }));
            }
        }
        out
    }

    /// `select_rows` moves nothing: its row is one of another value's.
    fn is_selection(&self, value: ValueId) -> bool {
        let Some(node) = self.graph.node(value) else { return false };
        node.op.class() == Class::Gather && !self.graph.ty(node.operands[1]).is_static()
    }

    /// Rows that a step reads from their homes.
    fn reads(&self, step: &Step) -> Vec<ValueId> {
        match step {
            Step::Sweep { nodes, .. } => {
                let all = nodes.iter().flat_map(|v| self.rows_read(*v));
                all.filter(|r| !nodes.contains(r)).collect()
            }
            Step::Stats(v) | Step::Node(v) => self.rows_read(*v),
            Step::Copy { from, .. } => vec![*from],
        }
    }

    fn homes(&self, steps: &[Step], stored: &dyn Fn(ValueId) -> bool) -> Result<(BTreeMap<ValueId, Home>, usize)> {
        let mut homes = BTreeMap::new();
        let mut stack = Stack::default();
        let mut last_read = BTreeMap::new();
        for (i, step) in steps.iter().enumerate() {
            for v in self.reads(step) {
                last_read.insert(v, i);
                if !self.inside(v) {
                    homes.insert(v, Home::Memory(v));
                }
            }
        }
        for (i, step) in steps.iter().enumerate() {
            for v in defined(step) {
                if matches!(self.graph.ty(v), Type::Cache { .. }) {
                    continue;
                }
                let home = match (self.wanted_by(v, stored).first(), last_read.get(&v)) {
                    _ if self.is_selection(v) => Home::Elsewhere,
                    (Some(result), _) => Home::Memory(*result),
                    (None, Some(last)) => {
                        let bytes = row_bytes(self.graph.ty(v));
                        let bytes = bytes.ok_or_else(|| Error::new(Kind::Internal, format!("{v} has no rows")))?;
                        Home::Stack(stack.place(bytes.next_multiple_of(LANES * 4), i, *last))
                    }
                    (None, None) => continue,
                };
                homes.insert(v, home);
            }
        }
        Ok((homes, stack.bytes))
    }
}

/// Values a step computes.
fn defined(step: &Step) -> Vec<ValueId> {
    match step {
        Step::Sweep { nodes, .. } => nodes.clone(),
        Step::Node(v) => vec![*v],
        Step::Stats(_) | Step::Copy { .. } => vec![],
    }
}

/// First-fit placement of rows that live from one step to another, both included.
#[derive(Default)]
struct Stack {
    /// `(first byte, end, last step)`; rows are placed in order of their first step.
    placed: Vec<(usize, usize, usize)>,
    bytes: usize,
}

impl Stack {
    fn place(&mut self, bytes: usize, from: usize, to: usize) -> usize {
        let mut alive: Vec<(usize, usize)> = self.placed.iter().filter(|p| p.2 >= from).map(|p| (p.0, p.1)).collect();
        alive.sort_unstable();
        let mut at = 0;
        for (first, end) in alive {
            if at + bytes <= first {
                break;
            }
            at = at.max(end);
        }
        self.placed.push((at, at + bytes, to));
        self.bytes = self.bytes.max(at + bytes);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(body: &str, results: &[u32]) -> Schedule {
        let text = format!("graph @g(%x: f32[t, 64], %y: f32[t, 64], %g: f32[64]) stage planned {{ {body} }}");
        let model = mansard_ir::text::parse("g", &text).unwrap();
        let graph = &model.graphs[0];
        schedule(graph, &graph.computed(), &|v| v.0 < 3 || results.contains(&v.0)).unwrap()
    }

    #[test]
    fn normalization_meets_its_gain() {
        let body = "%a = add %x, %y %n = rms_normalize %a {eps = 1e-5} %m = mul_row %n, %g %q = quantize %m \
                    return a = %a, q = %q";
        let schedule = plan(body, &[3, 6]);
        let v = ValueId;
        let expected = [
            Step::Sweep { heads: (1, 64), nodes: vec![v(3)] },
            Step::Stats(v(4)),
            Step::Sweep { heads: (1, 64), nodes: vec![v(4), v(5)] },
            Step::Node(v(6)),
        ];
        assert_eq!(schedule.steps, expected);
        assert_eq!(schedule.homes[&v(3)], Home::Memory(v(3)));
        assert_eq!(schedule.homes[&v(5)], Home::Stack(0));
        assert!(!schedule.homes.contains_key(&v(4)), "%4 stays in registers");
        assert_eq!(schedule.stack_bytes, 256);
    }

    #[test]
    fn rows_share_the_stack() {
        let body = "%a = l2_normalize %x {eps = 1e-5} %b = l2_normalize %a {eps = 1e-5} \
                    %c = l2_normalize %b {eps = 1e-5} %d = l2_normalize %c {eps = 1e-5} return d = %d";
        assert_eq!(plan(body, &[6]).stack_bytes, 512);
    }

    #[test]
    fn a_row_wanted_twice_is_copied() {
        let body = "%a = add %x, %y %h = split_heads %a {heads = 2} %m = merge_heads %h return h = %h, m = %m";
        let schedule = plan(body, &[4, 5]);
        let copy = Step::Copy { from: ValueId(3), to: ValueId(5) };
        assert_eq!(schedule.steps[1..], [copy]);
        assert_eq!(schedule.homes[&ValueId(3)], Home::Memory(ValueId(4)));
    }
}
