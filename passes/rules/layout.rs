//! Where linear work, views and slices stand: before or after a contraction, rope, a sum over experts, attention. Projections
//! that a file merged (queries, keys and values; gate and up) are cut apart, and what a graph puts side by side is merged.

use super::{Rule, rule};

/// The theme's rules.
pub static RULES: &[Rule] = &[
    // factors
    rule(
        "scale-after-contraction | (matmul (scale ?a ?x) ?w) | (scale ?a (matmul ?x ?w)) |  | reassociates",
        "(a x) wᵀ = a (x wᵀ)",
    ),
    rule(
        "scale-after-experts | (matmul_experts (scale ?a ?x) ?w ?r) | (scale ?a (matmul_experts ?x ?w ?r)) |  | reassociates",
        "(a x) w_eᵀ = a (x w_eᵀ)",
    ),
    rule(
        "scale-after-gain | (mul_row (scale ?a ?x) ?g) | (scale ?a (mul_row ?x ?g)) |  | reassociates",
        "(a x) g = a (x g)",
    ),
    rule(
        "scale-before-gain | (scale ?a (mul_row ?x ?g)) | (mul_row (scale ?a ?x) ?g) |  | reassociates",
        "a (x g) = (a x) g",
    ),
    rule(
        "scale-after-combine | (combine (scale ?a ?x) ?r) | (scale ?a (combine ?x ?r)) |  | reassociates",
        "Σ p_j (a x_j) = a Σ p_j x_j",
    ),
    rule(
        "scale-after-rope | (rope ?p (scale ?a ?x) ?t) | (scale ?a (rope ?p ?x ?t)) |  | reassociates",
        "R (a x) = a (R x)",
    ),
    rule(
        "scale-before-rope | (scale ?a (rope ?p ?x ?t)) | (rope ?p (scale ?a ?x) ?t) |  | reassociates",
        "a (R x) = R (a x)",
    ),
    rule(
        "scale-before-split | (scale ?a (split_heads ?h ?x)) | (split_heads ?h (scale ?a ?x)) |  | exact",
        "a (view x) = view (a x)",
    ),
    rule(
        "scale-before-merge | (scale ?a (merge_heads ?x)) | (merge_heads (scale ?a ?x)) |  | exact",
        "a (view x) = view (a x)",
    ),
    rule(
        "scale-in-scores | (attend ?s (scale ?a ?q) ?k ?v ?n) | (attend (scores ?s ?a) ?q ?k ?v ?n) |  | reassociates",
        "softmax(s (a q) kᵀ) = softmax((s a) q kᵀ)",
    ),
    // sums
    rule(
        "rope-of-sum | (add (rope ?p ?x ?t) (rope ?p ?y ?t)) | (rope ?p (add ?x ?y) ?t) |  | reassociates",
        "R x + R y = R (x + y)",
    ),
    rule(
        "combine-of-sum | (add (combine ?x ?r) (combine ?y ?r)) | (combine (add ?x ?y) ?r) |  | reassociates",
        "Σ p_j x_j + Σ p_j y_j = Σ p_j (x_j + y_j)",
    ),
    rule(
        "gain-after-combine | (combine (mul_row ?x ?g) ?r) | (mul_row (combine ?x ?r) ?g) |  | reassociates",
        "Σ p_j (x_j g) = (Σ p_j x_j) g",
    ),
    // heads
    rule(
        "view-after-unary | (split_heads ?h (@unary ?x)) | (@unary (split_heads ?h ?x)) |  | exact",
        "view (f x) = f (view x)",
    ),
    rule(
        "merge-after-unary | (merge_heads (@unary ?x)) | (@unary (merge_heads ?x)) |  | exact",
        "view (f x) = f (view x)",
    ),
    rule(
        "merge-after-binary | (merge_heads (@binary ?x ?y)) | (@binary (merge_heads ?x) (merge_heads ?y)) |  | exact",
        "view (x ∘ y) = view x ∘ view y",
    ),
    rule(
        "split-after-binary | (split_heads ?h (@binary ?x ?y)) | (@binary (split_heads ?h ?x) (split_heads ?h ?y)) |  | exact",
        "view (x ∘ y) = view x ∘ view y",
    ),
    rule("split-of-merge | (split_heads ?h (merge_heads ?x)) | ?x |  | exact", "the same heads again"),
    rule("merge-of-split | (merge_heads (split_heads ?h ?x)) | ?x |  | exact", "the same row again"),
    // slices: a projection that a file merged is cut into those it is made of
    rule(
        "slice-of-contraction | (slice ?s (matmul ?x ?w)) | (matmul ?x (slice_rows ?s ?w)) | unshared ?w | exact",
        "(x wᵀ)[.., a..b] = x w[a..b]ᵀ",
    ),
    rule(
        "slice-of-bias | (slice ?s (add_row ?x ?b)) | (add_row (slice ?s ?x) (slice_rows ?s ?b)) |  | exact",
        "(x + b)[a..b] = x[a..b] + b[a..b]",
    ),
    rule(
        "slice-of-gain | (slice ?s (mul_row ?x ?g)) | (mul_row (slice ?s ?x) (slice_rows ?s ?g)) |  | exact",
        "(x g)[a..b] = x[a..b] g[a..b]",
    ),
    rule("slice-of-unary | (slice ?s (@unary ?x)) | (@unary (slice ?s ?x)) |  | exact", "(f x)[a..b] = f (x[a..b])"),
    rule(
        "slice-of-binary | (slice ?s (@binary ?x ?y)) | (@binary (slice ?s ?x) (slice ?s ?y)) |  | exact",
        "(x ∘ y)[a..b] = x[a..b] ∘ y[a..b]",
    ),
    rule("slice-of-slice | (slice ?s (slice ?r ?x)) | (slice (within ?s ?r) ?x) |  | exact", "columns of columns"),
    rule("slice-of-all | (slice ?s ?x) | ?x |  | exact", "all columns"),
    rule("slice-of-left | (slice ?s (concat ?x ?y)) | (slice (left ?s ?x) ?x) |  | exact", "(x | y)[a..b] = x[a..b]"),
    rule(
        "slice-of-right | (slice ?s (concat ?x ?y)) | (slice (right ?s ?x) ?y) |  | exact",
        "(x | y)[a..b] = y[a-n..b-n]",
    ),
    // side by side: one projection over matrices one above the other
    rule(
        "concat-of-contractions | (concat (matmul ?x ?v) (matmul ?x ?w)) | (matmul ?x (concat_rows ?v ?w)) | unshared ?v; unshared ?w | exact",
        "(x vᵀ | x wᵀ) = x [v; w]ᵀ",
    ),
    rule(
        "concat-of-biases | (concat (add_row ?x ?b) (add_row ?y ?c)) | (add_row (concat ?x ?y) (concat_rows ?b ?c)) |  | exact",
        "(x + b | y + c) = (x | y) + (b | c)",
    ),
    rule(
        "concat-of-unary | (concat (@unary ?x) (@unary ?y)) | (@unary (concat ?x ?y)) |  | exact",
        "(f x | f y) = f (x | y)",
    ),
    rule(
        "concat-of-slices | (concat (slice ?s ?x) (slice ?r ?x)) | (slice (joined ?s ?r) ?x) |  | exact",
        "(x[a..b] | x[b..c]) = x[a..c]",
    ),
];
