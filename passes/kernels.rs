//! Every legal kernel that could run last: the candidates of the extraction.
//!
//! A *demand* is the set of values that must be in memory once some kernel has run. A candidate computes one of them, on
//! which none of the others depends, and any other values the grammar ([`ir::kernel`]) lets it hold: operands pulled
//! inside, down to values left in memory, and siblings from the demand. It stores what is demanded and needs what it reads:
//!
//! ```text
//! demand {gate*up}          candidates: [mul]  [silu mul]  [matmul silu mul]  [matmul matmul silu mul] ...
//! ```
//!
//! Values are decided once each, last first: inside (by one of the equal nodes of their class) or in memory. So every
//! kernel comes up once, and no kernel can depend on itself through another: what is needed comes earlier by rank.

use crate::extract::{Choice, Program, Role};
use ir::kernel::{KernelKind, after_anchor, is_row_class};
use ir::ops::Class;
use ir::{Dim, Type};
use std::collections::{BTreeMap, BTreeSet};

/// What each kind of kernel may hold, for the reference page.
pub static KINDS: [(KernelKind, &str); 7] = [
    (
        KernelKind::Contract,
        "one or more contractions that share their activations, each growing an epilogue of elementwise ops, row vectors and views; epilogues may meet. For at most 8 tokens also what computes the activations",
    ),
    (KernelKind::Experts, "the same over experts, without computing activations"),
    (KernelKind::Attend, "attention, then views"),
    (KernelKind::Pool, "pooling, then norms"),
    (
        KernelKind::Rows,
        "anything row by row: gathers, norms, elementwise ops, rope, views, quantize, append, route, combine",
    ),
    (KernelKind::Estimate, "estimates of one matrix and the same rows, and bounds on the products"),
    (KernelKind::Rescore, "rescoring alone"),
];

/// Decisions for each kernel that is asked for, before the search gives up on a demand.
const STEPS: usize = 64;

/// What a value does inside a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Computes the activations of a contraction; never stored, repeated by every worker.
    Prologue,
    /// The anchor.
    Anchor,
    /// After an anchor, or anything in a kernel without one.
    Body,
}

/// A kernel the grammar admits.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its kind.
    pub kind: KernelKind,
    /// Values computed inside by rank: which of the equal nodes, and where it stands.
    pub inside: BTreeMap<usize, (usize, Place)>,
    /// Demanded values that it stores.
    pub stored: Vec<usize>,
    /// Values it reads from memory, inputs of the graph included, weights not.
    pub reads: BTreeSet<usize>,
}

impl Candidate {
    /// A kernel of one node.
    pub fn alone(program: &Program, value: usize, index: usize, choice: &Choice) -> Candidate {
        let anchor = KernelKind::of_anchor(choice.op.class());
        let place = if anchor.is_some() { Place::Anchor } else { Place::Body };
        Candidate {
            kind: anchor.unwrap_or(KernelKind::Rows),
            inside: BTreeMap::from([(value, (index, place))]),
            stored: vec![value],
            reads: choice.operands.iter().copied().filter(|o| program.in_memory(*o)).collect(),
        }
    }

    /// An operand prologue reads `value`, so every worker does.
    pub fn feeds_prologue(&self, program: &Program, value: usize) -> bool {
        self.inside.iter().any(|(user, (index, place))| {
            *place == Place::Prologue && program.values[*user].choices[*index].operands.contains(&value)
        })
    }
}

/// Demands of at most this many values are met in every order; larger ones in order of rank, last first.
const ORDERED: usize = 6;

/// All candidates that could be the last kernel before `demand` (ascending) is in memory, at most `limit` for each of its
/// values; larger kernels come first.
pub fn candidates(program: &Program, demand: &[usize], prologues: bool, limit: usize) -> Vec<Candidate> {
    let mut out = vec![];
    let tried = if demand.len() <= ORDERED && limit > 1 { demand.len() } else { 1 };
    for (index, last) in demand.iter().enumerate().rev().take(tried) {
        if demand[index + 1..].iter().any(|later| program.depends(*later, *last)) {
            continue;
        }
        let most = out.len() + limit;
        for kind in KINDS.map(|(kind, _)| kind) {
            let mut growth = Growth {
                program,
                demand,
                kind,
                prologues: prologues && kind == KernelKind::Contract,
                limit: most,
                steps: STEPS * limit,
                inside: BTreeMap::new(),
                reads: BTreeSet::new(),
                lead: program.lead(*last),
                activations: None,
                out: &mut out,
            };
            growth.decide(*last);
        }
    }
    out
}

struct Growth<'a> {
    program: &'a Program,
    demand: &'a [usize],
    kind: KernelKind,
    prologues: bool,
    limit: usize,
    steps: usize,
    inside: BTreeMap<usize, (usize, Place)>,
    reads: BTreeSet<usize>,
    lead: Option<Dim>,
    /// Operands all contractions share: activations, and the routing.
    activations: Option<(usize, Option<usize>)>,
    out: &'a mut Vec<Candidate>,
}

impl Growth<'_> {
    /// The next value to decide: the last one below `below` that is read inside or demanded.
    fn next(&self, below: usize) -> Option<usize> {
        let read = self.reads.range(..below).rev().find(|v| self.program.values[**v].role == Role::Computed).copied();
        let demanded = self.demand.iter().rev().find(|v| **v < below).copied();
        read.max(demanded)
    }

    /// Decides `value` and, by recursion, everything below it.
    fn decide(&mut self, value: usize) {
        if self.out.len() >= self.limit || self.steps == 0 {
            return;
        }
        self.steps -= 1;
        let (program, mut taken) = (self.program, false);
        for (index, choice) in program.values[value].choices.iter().enumerate() {
            let Some(place) = self.place(value, choice) else { continue };
            taken = true;
            self.with_inside(value, index, choice, place);
        }
        if self.inside.is_empty() || taken && self.joins(value) {
            return; // the last value is what the kernel is for
        }
        match self.next(value) {
            Some(next) => self.decide(next),
            None => self.finish(),
        }
    }

    fn with_inside(&mut self, value: usize, index: usize, choice: &Choice, place: Place) {
        let activations = self.activations;
        let (reads, new): (bool, Vec<usize>) = (
            self.reads.remove(&value),
            choice.operands.iter().copied().filter(|o| self.program.in_memory(*o) && !self.reads.contains(o)).collect(),
        );
        if place == Place::Anchor {
            self.activations = Some(self.shared(choice));
        }
        self.reads.extend(&new);
        self.inside.insert(value, (index, place));
        match self.next(value) {
            Some(next) => self.decide(next),
            None => self.finish(),
        }
        self.inside.remove(&value);
        new.iter().for_each(|v| _ = self.reads.remove(v));
        if reads {
            self.reads.insert(value);
        }
        self.activations = activations;
    }

    /// Where `value`, computed by `choice`, may stand in this kernel; `None`: only in memory.
    fn place(&self, value: usize, choice: &Choice) -> Option<Place> {
        let class = choice.op.class();
        let (program, demanded) = (self.program, self.demand.binary_search(&value).is_ok());
        if program.lead(value) != self.lead {
            return None;
        }
        let users: Vec<(usize, &Choice, Place)> = self.users(value).collect();
        // indices, gathered tables and caches are read from memory; so is a cache after its append
        let from_memory = |(_, user, _): &(usize, &Choice, Place)| match user.op.class() {
            Class::Gather => true,
            Class::Append => user.operands[0] == value,
            _ => false,
        };
        let cache = matches!(program.values[value].ty, Type::Cache { .. });
        if users.iter().any(from_memory) || cache && (!users.is_empty() || self.needed_earlier(value)) {
            return None; // above all, nothing is appended twice
        }
        let rows = is_row_class(class);
        if self.kind == KernelKind::Rows {
            return rows.then_some(Place::Body);
        }
        if users.iter().any(|(.., p)| *p != Place::Body) {
            // activations: inside only as a prologue, and then for contractions and prologues alone
            let feeds = users.iter().all(|(.., p)| *p != Place::Body);
            return (self.prologues && feeds && rows && class != Class::Append).then_some(Place::Prologue);
        }
        if !program.anchored(value, self.kind) || users.is_empty() && !demanded {
            return None;
        }
        if KernelKind::of_anchor(class) != Some(self.kind) {
            return after_anchor(self.kind, class).then_some(Place::Body);
        }
        let fits = self.activations.is_none_or(|shared| !self.kind.is_alone() && shared == self.shared(choice));
        fits.then_some(Place::Anchor)
    }

    /// What anchors of a kernel share: the activations, and the routing; of estimates, the matrix.
    fn shared(&self, choice: &Choice) -> (usize, Option<usize>) {
        let second = if self.kind == KernelKind::Estimate { 1 } else { 2 };
        (choice.operands[0], choice.operands.get(second).copied())
    }

    /// Row work that no anchor could take joins a rows kernel at once where nothing decided so far needs it earlier:
    /// that saves a launch, and leaving it to a kernel of its own is not tried.
    fn joins(&self, value: usize) -> bool {
        self.kind == KernelKind::Rows
            && self.program.rows_only(value)
            && self.demand.binary_search(&value).is_ok()
            && !self.needed_earlier(value)
    }

    /// What an earlier kernel has to store depends on `value`.
    fn needed_earlier(&self, value: usize) -> bool {
        let earlier = |v: &usize| *v > value && !self.inside.contains_key(v) && self.program.depends(*v, value);
        self.reads.iter().any(earlier) || self.demand.iter().any(earlier)
    }

    fn users(&self, value: usize) -> impl Iterator<Item = (usize, &Choice, Place)> {
        self.inside.iter().filter_map(move |(user, (index, place))| {
            let choice = &self.program.values[*user].choices[*index];
            choice.operands.contains(&value).then_some((*user, choice, *place))
        })
    }

    /// Keeps the kernel where it is whole: anchored, every epilogue node after an anchor.
    fn finish(&mut self) {
        let anchors = self.inside.values().filter(|(_, p)| *p == Place::Anchor).count();
        let anchored = self.inside.iter().filter(|(_, (_, p))| *p == Place::Body).all(|(v, (index, _))| {
            let inside = |o: &usize| matches!(self.inside.get(o), Some((_, Place::Body | Place::Anchor)));
            self.program.values[*v].choices[*index].operands.iter().any(inside)
        });
        let whole = match self.kind {
            KernelKind::Rows => anchors == 0,
            KernelKind::Attend | KernelKind::Pool | KernelKind::Rescore => anchors == 1 && anchored,
            KernelKind::Contract | KernelKind::Experts | KernelKind::Estimate => anchors > 0 && anchored,
        };
        if !whole {
            return;
        }
        let stored = self
            .inside
            .iter()
            .filter(|(v, (_, place))| *place != Place::Prologue && self.demand.binary_search(v).is_ok());
        self.out.push(Candidate {
            kind: self.kind,
            stored: stored.map(|(v, _)| *v).collect(),
            inside: self.inside.clone(),
            reads: self.reads.clone(),
        });
    }
}
