//! How many blocks share a kernel's work: as many as there is work for, and at most as many as a GPU holds at once.
//!
//! Any grid is right; a larger one than there is work for only takes time to start. Attention divides the cache blocks in sight
//! among all blocks that there are.

use mansard_ir::layout::STRIP;
use mansard_ir::ops::Class;
use mansard_ir::{Dim, Graph, Node, Type};

/// Tokens that a block takes together of a product.
const PANEL: usize = 8;

/// Blocks of a grid for each multiprocessor, at most: with two, one computes while the other waits for memory.
const EACH: usize = 2;

/// Blocks of the largest grid on so many multiprocessors.
pub fn most(processors: usize) -> usize {
    EACH * processors.max(1)
}

/// Blocks of a grid on so many multiprocessors, each of which holds `resident` of them.
pub fn size(body: Option<&Graph>, tokens: usize, (processors, resident): (usize, usize)) -> usize {
    let most = processors.max(1) * resident.clamp(1, EACH);
    body.map_or(most, |body| blocks(body, tokens).clamp(1, most))
}

/// Blocks that find something to do in a step of at most `tokens` tokens.
fn blocks(body: &Graph, tokens: usize) -> usize {
    let of = |node: &Node| match node.op.class() {
        Class::Contract | Class::Estimate | Class::Rescore => strips(&node.ty) * tokens.div_ceil(PANEL),
        Class::ContractExperts => strips(&node.ty) * tokens * chosen(&node.ty),
        Class::Attend => usize::MAX,
        _ => 0,
    };
    let anchors = body.nodes.iter().map(of).fold(0, usize::saturating_add);
    if anchors > 0 { anchors } else { tokens }
}

/// Strips of a result's rows.
fn strips(ty: &Type) -> usize {
    let width = ty.as_tensor().and_then(|(_, shape)| shape.last()).and_then(|d| d.fixed()).unwrap_or(1);
    width.div_ceil(STRIP)
}

/// Experts of a token: the second of three dims.
fn chosen(ty: &Type) -> usize {
    match ty.as_tensor() {
        Some((_, [_, Dim::N(top), _])) => *top,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str) -> Graph {
        mansard_ir::text::parse("k", text).unwrap().graphs.remove(0)
    }

    #[test]
    fn work_is_counted_by_what_blocks_take() {
        let product = body(
            "graph @k(%x: a8[t, 64], %w: q4_1[40, 64]) stage planned when t = 1..8 { %y = matmul %x, %w return y = %y }",
        );
        assert_eq!([1, 8, 9].map(|t| blocks(&product, t)), [3, 3, 6]);
        let rows = body("graph @k(%x: f32[t, 64]) stage planned { %y = silu %x return y = %y }");
        assert_eq!(blocks(&rows, 7), 7);
        let sizes = [(2, 1), (2, 9), (100, 9)].map(|on| size(Some(&rows), 7, on));
        assert_eq!((sizes, size(None, 7, (5, 1)), most(5)), ([2, 4, 7], 5, 10));
    }
}
