//! How many blocks share a kernel's work: as many as there is work for, and at most as many as a GPU holds at once.
//!
//! Any grid is right; a larger one than there is work for only takes time to start.

use mansard_ir::layout::STRIP;
use mansard_ir::ops::Class;
use mansard_ir::{Dim, Graph, Node, Type};

/// Tokens that a block takes together of a product.
const PANEL: usize = 8;

/// Blocks that find something to do in a step of at most `tokens` tokens.
pub fn blocks(body: &Graph, tokens: usize) -> usize {
    let of = |node: &Node| match node.op.class() {
        Class::Contract | Class::Estimate | Class::Rescore => strips(&node.ty) * tokens.div_ceil(PANEL),
        Class::ContractExperts => strips(&node.ty) * tokens * chosen(&node.ty),
        Class::Attend => tokens * node.operands.iter().map(|v| heads(body.ty(*v))).max().unwrap_or(1),
        _ => 0,
    };
    let anchors: usize = body.nodes.iter().map(of).sum();
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

fn heads(ty: &Type) -> usize {
    if let Type::Cache { heads, .. } = ty { *heads } else { 1 }
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
    }
}
