//! Simpler spellings of one value: factors and summands collected, activations recognised in their parts, norms freed of
//! what they take away anyway.

use super::{Rule, rule};

/// The theme's rules.
pub static RULES: &[Rule] = &[
    // factors and summands
    rule("scale-twice | (scale ?a (scale ?b ?x)) | (scale (product ?a ?b) ?x) |  | reassociates", "a (b x) = (a b) x"),
    rule("scale-by-one | (scale {by=1.0} ?x) | ?x |  | exact", "1 x = x"),
    rule(
        "offset-twice | (offset ?a (offset ?b ?x)) | (offset (sum ?a ?b) ?x) |  | reassociates",
        "(x + b) + a = x + (a + b)",
    ),
    rule("offset-by-zero | (offset {by=0.0} ?x) | ?x |  | exact", "x + 0 = x"),
    rule(
        "scale-of-offset | (scale ?a (offset ?b ?x)) | (offset (product ?a ?b) (scale ?a ?x)) |  | reassociates",
        "a (x + b) = a x + a b",
    ),
    rule(
        "scale-of-sum | (add (scale ?a ?x) (scale ?a ?y)) | (scale ?a (add ?x ?y)) |  | reassociates",
        "a x + a y = a (x + y)",
    ),
    rule("scale-of-product | (mul (scale ?a ?x) ?y) | (scale ?a (mul ?x ?y)) |  | reassociates", "(a x) y = a (x y)"),
    rule("scale-in-product | (scale ?a (mul ?x ?y)) | (mul (scale ?a ?x) ?y) |  | reassociates", "a (x y) = (a x) y"),
    rule(
        "offset-of-sum | (add (offset ?a ?x) ?y) | (offset ?a (add ?x ?y)) |  | reassociates",
        "(x + a) + y = (x + y) + a",
    ),
    rule(
        "common-factor | (add (mul ?x ?z) (mul ?y ?z)) | (mul (add ?x ?y) ?z) |  | reassociates",
        "x z + y z = (x + y) z",
    ),
    // vectors repeated for every row
    rule("gain-twice | (mul_row (mul_row ?x ?g) ?h) | (mul_row ?x (mul ?g ?h)) |  | reassociates", "(x g) h = x (g h)"),
    rule(
        "bias-twice | (add_row (add_row ?x ?b) ?c) | (add_row ?x (add ?b ?c)) |  | reassociates",
        "(x + b) + c = x + (b + c)",
    ),
    rule(
        "gain-of-bias | (mul_row (add_row ?x ?b) ?g) | (add_row (mul_row ?x ?g) (mul ?b ?g)) |  | reassociates",
        "(x + b) g = x g + b g",
    ),
    rule(
        "scale-of-gain | (scale ?a (mul_row ?x ?g)) | (mul_row ?x (scale ?a ?g)) |  | reassociates",
        "a (x g) = x (a g)",
    ),
    rule(
        "scale-of-bias | (scale ?a (add_row ?x ?b)) | (add_row (scale ?a ?x) (scale ?a ?b)) |  | reassociates",
        "a (x + b) = a x + a b",
    ),
    rule(
        "offset-in-bias | (add_row (offset ?a ?x) ?b) | (add_row ?x (offset ?a ?b)) |  | reassociates",
        "(x + a) + b = x + (a + b)",
    ),
    rule(
        "bias-of-sum | (add (add_row ?x ?b) ?y) | (add_row (add ?x ?y) ?b) |  | reassociates",
        "(x + b) + y = (x + y) + b",
    ),
    rule(
        "gain-of-sum | (add (mul_row ?x ?g) (mul_row ?y ?g)) | (mul_row (add ?x ?y) ?g) |  | reassociates",
        "x g + y g = (x + y) g",
    ),
    rule(
        "gain-of-product | (mul (mul_row ?x ?g) ?y) | (mul_row (mul ?x ?y) ?g) |  | reassociates",
        "(x g) y = (x y) g",
    ),
    rule(
        "gain-in-product | (mul_row (mul ?x ?y) ?g) | (mul (mul_row ?x ?g) ?y) |  | reassociates",
        "(x y) g = (x g) y",
    ),
    // activations in their parts
    rule("silu-in-parts | (mul ?x (sigmoid ?x)) | (silu ?x) |  | reassociates", "x σ(x) = silu x"),
    rule(
        "gelu-sigmoid-in-parts | (mul ?x (sigmoid (scale {by=1.702} ?x))) | (gelu_sigmoid ?x) |  | reassociates",
        "x σ(1.702 x)",
    ),
    rule(
        "gelu-tanh-in-parts | (scale {by=0.5} (mul ?x (offset {by=1.0} (tanh (scale {by=0.7978845608028654} (add ?x (scale {by=0.044715} (mul ?x (mul ?x ?x))))))))) | (gelu_tanh ?x) |  | reassociates",
        "x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2",
    ),
    rule(
        "sigmoid-by-tanh | (scale {by=0.5} (offset {by=1.0} (tanh (scale {by=0.5} ?x)))) | (sigmoid ?x) |  | reassociates",
        "(1 + tanh(x / 2)) / 2 = σ(x)",
    ),
    rule(
        "softcap-in-parts | (scale ?a (tanh (scale ?b ?x))) | (softcap (bound ?a) ?x) | positive ?a; inverse ?a ?b | reassociates",
        "c tanh(x / c)",
    ),
    rule(
        "softcap-of-scale | (softcap ?c (scale ?a ?x)) | (scale ?a (softcap (over ?c ?a) ?x)) | positive ?a | reassociates",
        "c tanh(a x / c) = a (c/a) tanh(x / (c/a))",
    ),
    rule(
        "relu-of-scale | (relu (scale ?a ?x)) | (scale ?a (relu ?x)) | positive ?a | reassociates",
        "max(a x, 0) = a max(x, 0)",
    ),
    rule("relu-twice | (relu (relu ?x)) | (relu ?x) |  | exact", "max(max(x, 0), 0) = max(x, 0)"),
    // norms
    rule(
        "rms-of-scale | (rms_normalize ?e (scale ?a ?x)) | (rms_normalize (over_square ?e ?a) ?x) | positive ?a | reassociates",
        "a x / √(a² m + ε) = x / √(m + ε/a²)",
    ),
    rule(
        "layer-norm-of-scale | (layer_normalize ?e (scale ?a ?x)) | (layer_normalize (over_square ?e ?a) ?x) | positive ?a | reassociates",
        "a (x - µ) / √(a² v + ε) = (x - µ) / √(v + ε/a²)",
    ),
    rule(
        "layer-norm-of-offset | (layer_normalize ?e (offset ?a ?x)) | (layer_normalize ?e ?x) |  | reassociates",
        "(x + a) - (µ + a) = x - µ",
    ),
    rule(
        "l2-norm-of-scale | (l2_normalize ?e (scale ?a ?x)) | (l2_normalize (over ?e ?a) ?x) | positive ?a | reassociates",
        "a x / max(a |x|, ε) = x / max(|x|, ε/a)",
    ),
];
