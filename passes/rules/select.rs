//! Fewer rows: what happens to each row by itself happens to those that leave a step only, and to one row a sequence instead
//! of one a token.

use super::{Rule, rule};

/// The theme's rules.
pub static RULES: &[Rule] = &[
    // rows that leave the step
    rule(
        "select-unary | (select_rows (@unary ?x) ?r) | (@unary (select_rows ?x ?r)) |  | exact",
        "(f x)[r] = f (x[r])",
    ),
    rule(
        "select-binary | (select_rows (@binary ?x ?y) ?r) | (@binary (select_rows ?x ?r) (select_rows ?y ?r)) |  | exact",
        "(x ∘ y)[r] = x[r] ∘ y[r]",
    ),
    rule(
        "select-row | (select_rows (@row ?x ?g) ?r) | (@row (select_rows ?x ?r) ?g) |  | exact",
        "(x ∘ g)[r] = x[r] ∘ g",
    ),
    rule(
        "select-reduce | (select_rows (@reduce ?x) ?r) | (@reduce (select_rows ?x ?r)) |  | exact",
        "norm(x)[r] = norm(x[r]), row by row",
    ),
    rule(
        "select-contraction | (select_rows (matmul ?x ?w) ?r) | (matmul (select_rows ?x ?r) ?w) |  | exact",
        "(x wᵀ)[r] = x[r] wᵀ",
    ),
    rule(
        "select-split | (select_rows (split_heads ?h ?x) ?r) | (split_heads ?h (select_rows ?x ?r)) |  | exact",
        "(view x)[r] = view (x[r])",
    ),
    rule(
        "select-merge | (select_rows (merge_heads ?x) ?r) | (merge_heads (select_rows ?x ?r)) |  | exact",
        "(view x)[r] = view (x[r])",
    ),
    rule(
        "select-rope | (select_rows (rope ?p ?x ?t) ?r) | (rope ?p (select_rows ?x ?r) (select_rows ?t ?r)) |  | exact",
        "(R_t x_t)[r] = R[r] x[r]",
    ),
    rule(
        "select-slice | (select_rows (slice ?s ?x) ?r) | (slice ?s (select_rows ?x ?r)) |  | exact",
        "x[r][a..b] = x[a..b][r]",
    ),
    rule(
        "select-concat | (select_rows (concat ?x ?y) ?r) | (concat (select_rows ?x ?r) (select_rows ?y ?r)) |  | exact",
        "(x | y)[r] = (x[r] | y[r])",
    ),
    // one row a sequence: a mean is linear
    rule(
        "pool-of-scale | (mean_pool (scale ?a ?x) ?s) | (scale ?a (mean_pool ?x ?s)) |  | reassociates",
        "mean (a x) = a mean x",
    ),
    rule(
        "pool-of-gain | (mean_pool (mul_row ?x ?g) ?s) | (mul_row (mean_pool ?x ?s) ?g) |  | reassociates",
        "mean (x g) = (mean x) g",
    ),
    rule(
        "pool-of-bias | (mean_pool (add_row ?x ?b) ?s) | (add_row (mean_pool ?x ?s) ?b) |  | reassociates",
        "mean (x + b) = mean x + b",
    ),
    rule(
        "pool-of-contraction | (mean_pool (matmul ?x ?w) ?s) | (matmul (mean_pool ?x ?s) ?w) |  | reassociates",
        "mean (x wᵀ) = (mean x) wᵀ",
    ),
    rule(
        "pool-of-slice | (mean_pool (slice ?c ?x) ?s) | (slice ?c (mean_pool ?x ?s)) |  | reassociates",
        "mean of columns",
    ),
    rule(
        "sum-of-pools | (add (mean_pool ?x ?s) (mean_pool ?y ?s)) | (mean_pool (add ?x ?y) ?s) |  | reassociates",
        "mean x + mean y = mean (x + y)",
    ),
];
