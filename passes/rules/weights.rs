//! Work on activations becomes work on weights, done once when packing: gains, scales and biases move into matrices and
//! tables, products and sums of matrices are formed, rotations vanish; and back, where fewer bytes or products are better.

use super::{Rule, rule};

/// The theme's rules.
pub static RULES: &[Rule] = &[
    // gains: (x diag g) wᵀ = x (w diag g)ᵀ, (x wᵀ) diag g = x (diag g w)ᵀ
    rule(
        "fold-gain | (matmul (mul_row ?x ?g) ?w) | (matmul ?x (scale_columns ?w ?g)) | f32 ?w; unshared ?w | reassociates",
        "(x diag g) wᵀ = x (w diag g)ᵀ",
    ),
    rule(
        "fold-gain-experts | (matmul_experts (mul_row ?x ?g) ?w ?r) | (matmul_experts ?x (scale_columns ?w ?g) ?r) | f32 ?w; unshared ?w | reassociates",
        "(x diag g) w_eᵀ = x (w_e diag g)ᵀ",
    ),
    rule(
        "fold-gain-after | (mul_row (matmul ?x ?w) ?g) | (matmul ?x (scale_rows ?w ?g)) | f32 ?w; unshared ?w | reassociates",
        "(x wᵀ) diag g = x (diag g w)ᵀ",
    ),
    rule(
        "fold-gain-after-experts | (mul_row (matmul_experts ?x ?w ?r) ?g) | (matmul_experts ?x (scale_rows ?w ?g) ?r) | f32 ?w; unshared ?w | reassociates",
        "(x w_eᵀ) diag g = x (diag g w_e)ᵀ",
    ),
    rule(
        "fold-scale | (scale ?a (matmul ?x ?w)) | (matmul ?x (scale ?a ?w)) | f32 ?w; unshared ?w | reassociates",
        "a (x wᵀ) = x (a w)ᵀ",
    ),
    rule(
        "fold-scale-experts | (scale ?a (matmul_experts ?x ?w ?r)) | (matmul_experts ?x (scale ?a ?w) ?r) | f32 ?w; unshared ?w | reassociates",
        "a (x w_eᵀ) = x (a w_e)ᵀ",
    ),
    rule(
        "fold-bias | (matmul (add_row ?x ?b) ?w) | (add_row (matmul ?x ?w) (times_vector ?w ?b)) | f32 ?w | reassociates",
        "(x + b) wᵀ = x wᵀ + w b",
    ),
    // tables of tokens: what happens to each row happens to the table
    rule(
        "fold-table-gain | (mul_row (embed ?t ?w) ?g) | (embed ?t (scale_columns ?w ?g)) | f32 ?w; unshared ?w | reassociates",
        "w[t] diag g = (w diag g)[t]",
    ),
    rule(
        "fold-table-scale | (scale ?a (embed ?t ?w)) | (embed ?t (scale ?a ?w)) | f32 ?w; unshared ?w | reassociates",
        "a w[t] = (a w)[t]",
    ),
    rule(
        "fold-table-bias | (add_row (embed ?t ?w) ?b) | (embed ?t (add_row ?w ?b)) | f32 ?w; unshared ?w | reassociates",
        "w[t] + b = (w + b)[t]",
    ),
    rule(
        "fold-table-norm | (@reduce (embed ?t ?w)) | (embed ?t (@reduce ?w)) | f32 ?w; unshared ?w | exact",
        "norm(w[t]) = norm(w)[t]",
    ),
    rule(
        "fold-table-sum | (add (embed ?t ?w) (embed ?t ?v)) | (embed ?t (add ?w ?v)) | f32 ?w; f32 ?v; unshared ?w; unshared ?v | reassociates",
        "w[t] + v[t] = (w + v)[t]",
    ),
    rule(
        "fold-table-rotation | (matmul (embed ?t ?w) (hadamard_matrix ?s)) | (embed ?t (multiply_weights ?w (hadamard_matrix ?s))) | f32 ?w; unshared ?w | reassociates",
        "w[t] Hᵀ = (w H)[t], H symmetric",
    ),
    // products and sums of matrices (low-rank projections, latent attention, adapters)
    rule(
        "absorb | (matmul (matmul ?x ?v) ?w) | (matmul ?x (multiply_weights ?w ?v)) | f32 ?v; f32 ?w; unshared ?v; unshared ?w | reassociates",
        "(x vᵀ) wᵀ = x (w v)ᵀ",
    ),
    rule(
        "factor | (matmul ?x (multiply_weights ?w ?v)) | (matmul (matmul ?x ?v) ?w) | unshared ?v; unshared ?w | reassociates",
        "x (w v)ᵀ = (x vᵀ) wᵀ",
    ),
    rule(
        "sum-of-contractions | (add (matmul ?x ?v) (matmul ?x ?w)) | (matmul ?x (add ?v ?w)) | f32 ?v; f32 ?w; unshared ?v; unshared ?w | reassociates",
        "x vᵀ + x wᵀ = x (v + w)ᵀ",
    ),
    rule(
        "contraction-of-sum | (add (matmul ?x ?w) (matmul ?y ?w)) | (matmul (add ?x ?y) ?w) |  | reassociates",
        "x wᵀ + y wᵀ = (x + y) wᵀ",
    ),
    rule(
        "regroup-same-rows | (add (add ?x (matmul ?y ?v)) (matmul ?y ?w)) | (add ?x (add (matmul ?y ?v) (matmul ?y ?w))) |  | reassociates",
        "(x + y vᵀ) + y wᵀ = x + (y vᵀ + y wᵀ)",
    ),
    rule(
        "regroup-same-matrix | (add (add ?x (matmul ?y ?w)) (matmul ?z ?w)) | (add ?x (add (matmul ?y ?w) (matmul ?z ?w))) |  | reassociates",
        "(x + y wᵀ) + z wᵀ = x + (y wᵀ + z wᵀ)",
    ),
    // rotations: H is orthogonal and symmetric, so norms of rows stay and H H = 1
    rule(
        "rotate-twice | (matmul (matmul ?x (hadamard_matrix ?s)) (hadamard_matrix ?s)) | ?x |  | reassociates",
        "x H H = x",
    ),
    rule(
        "fold-rotation | (matmul (matmul ?x (hadamard_matrix ?s)) ?w) | (matmul ?x (multiply_weights ?w (hadamard_matrix ?s))) | f32 ?w; unshared ?w | reassociates",
        "(x H) wᵀ = x (w H)ᵀ",
    ),
    rule(
        "fold-rotation-after | (matmul (matmul ?x ?w) (hadamard_matrix ?s)) | (matmul ?x (multiply_weights (hadamard_matrix ?s) ?w)) | f32 ?w; unshared ?w | reassociates",
        "(x wᵀ) H = x (H w)ᵀ",
    ),
    rule(
        "rotate-after-rms | (rms_normalize ?e (matmul ?x (hadamard_matrix ?s))) | (matmul (rms_normalize ?e ?x) (hadamard_matrix ?s)) |  | reassociates",
        "norm(x H) = norm(x) H",
    ),
    rule(
        "rotate-after-l2 | (l2_normalize ?e (matmul ?x (hadamard_matrix ?s))) | (matmul (l2_normalize ?e ?x) (hadamard_matrix ?s)) |  | reassociates",
        "x H / |x H| = (x / |x|) H",
    ),
];
