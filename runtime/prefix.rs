//! Common beginnings of prompts -> cache blocks that are computed once: a radix tree over pieces of prompts.
//!
//! ```text
//!  root -+- [128 tokens: the system's words] -+- [64 tokens: a question]
//!        |                                    +- [128 tokens: another] --- [64 tokens]
//!        +- [64 tokens: a prompt of its own]
//! ```
//!
//! A node is a piece of whole cache blocks as one step computed it, with a holder's share of them; sequences that go on from
//! it hold them too. Pieces are cut where only the prompt's own length decides (`batch/pieces.rs`), so what a prompt finds here
//! is, bit for bit, what it would have computed. When cache blocks run out, nodes that nothing goes on from are let go, those
//! used longest ago first.

use crate::caches::{Caches, Held};
use std::collections::{BTreeMap, BTreeSet};

/// Names a node. Never valid again once it has been let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Node(u64);

/// Nothing yet.
pub(crate) const ROOT: Node = Node(0);

/// All pieces that are kept.
#[derive(Debug)]
pub(crate) struct Prefixes {
    kept: BTreeMap<Node, Kept>,
    /// Nodes that nothing goes on from, by when they were used last.
    leaves: BTreeSet<(u64, Node)>,
    clock: u64,
    next: u64,
}

#[derive(Debug, Default)]
struct Kept {
    /// Where it goes on from, and with which tokens.
    from: Option<(Node, Box<[u32]>)>,
    blocks: Vec<Held>,
    children: BTreeMap<Box<[u32]>, Node>,
    used: u64,
}

impl Prefixes {
    /// Nothing kept.
    pub fn new() -> Prefixes {
        let kept = BTreeMap::from([(ROOT, Kept::default())]);
        Prefixes { kept, leaves: BTreeSet::new(), clock: 0, next: 1 }
    }

    /// Pieces that are kept.
    pub fn len(&self) -> usize {
        self.kept.len() - 1
    }

    /// The node that goes on from `node` with these tokens.
    pub fn child(&self, node: Node, tokens: &[u32]) -> Option<Node> {
        self.kept.get(&node)?.children.get(tokens).copied()
    }

    /// The cache blocks of a node, which is used now.
    pub fn take(&mut self, node: Node) -> &[Held] {
        self.clock += 1;
        let Some(kept) = self.kept.get_mut(&node) else { return &[] };
        if self.leaves.remove(&(kept.used, node)) {
            self.leaves.insert((self.clock, node));
        }
        kept.used = self.clock;
        &kept.blocks
    }

    /// Keeps what goes on from a node; `None`, the cache blocks given back, where the node is gone or goes on so already.
    pub fn insert(&mut self, from: Node, tokens: &[u32], blocks: Vec<Held>) -> Result<Node, Vec<Held>> {
        let node = Node(self.next);
        self.clock += 1;
        let Some(parent) = self.kept.get_mut(&from).filter(|kept| !kept.children.contains_key(tokens)) else {
            return Err(blocks);
        };
        parent.children.insert(tokens.into(), node);
        self.leaves.remove(&(parent.used, from));
        self.leaves.insert((self.clock, node));
        let kept = Kept { from: Some((from, tokens.into())), blocks, children: BTreeMap::new(), used: self.clock };
        self.kept.insert(node, kept);
        self.next += 1;
        Ok(node)
    }

    /// Cache blocks of each group that would be free if all were let go that can be.
    pub fn spare(&self, caches: &Caches) -> usize {
        self.kept.keys().map(|node| self.idle(*node, caches)).sum()
    }

    /// A node's cache blocks of each group that nobody else holds.
    pub fn idle(&self, node: Node, caches: &Caches) -> usize {
        let blocks = self.kept.get(&node).map_or(&[][..], |kept| &kept.blocks);
        blocks.iter().filter(|held| caches.only_here(held)).count()
    }

    /// Lets go of the node used longest ago, of those that nothing goes on from; gives whether there was one.
    pub fn let_go(&mut self, caches: &mut Caches) -> bool {
        let idle = |node: &Node| self.idle(*node, caches) == self.kept[node].blocks.len();
        let Some((used, node)) = self.leaves.iter().find(|(_, node)| idle(node)).copied() else { return false };
        self.leaves.remove(&(used, node));
        let Some(kept) = self.kept.remove(&node) else { return false };
        kept.blocks.into_iter().for_each(|held| caches.let_go(held));
        if let Some((from, tokens)) = kept.from
            && let Some(parent) = self.kept.get_mut(&from)
        {
            parent.children.remove(&tokens);
            if parent.children.is_empty() && from != ROOT {
                self.leaves.insert((parent.used, from));
            }
        }
        true
    }
}
