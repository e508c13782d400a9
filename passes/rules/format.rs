//! Work that commutes with the rounding of activations. A factor that is a power of two changes exponents only: codes stay,
//! and scales are multiplied exactly. One rounding that several contractions share is one class already.

use super::{Rule, rule};

/// The theme's rules.
pub static RULES: &[Rule] = &[
    rule(
        "power-after-quantize | (matmul (quantize (scale ?a ?x)) ?w) | (scale ?a (matmul (quantize ?x) ?w)) | power ?a | exact",
        "q(2ⁿ x) = 2ⁿ q(x)",
    ),
    rule(
        "power-after-fine | (matmul (quantize_fine (scale ?a ?x)) ?w) | (scale ?a (matmul (quantize_fine ?x) ?w)) | power ?a | exact",
        "q(2ⁿ x) = 2ⁿ q(x)",
    ),
    rule(
        "power-after-bf16 | (matmul (round_bf16 (scale ?a ?x)) ?w) | (scale ?a (matmul (round_bf16 ?x) ?w)) | power ?a | exact",
        "bf16(2ⁿ x) = 2ⁿ bf16(x)",
    ),
    rule(
        "power-after-quantize-experts | (matmul_experts (quantize (scale ?a ?x)) ?w ?r) | (scale ?a (matmul_experts (quantize ?x) ?w ?r)) | power ?a | exact",
        "q(2ⁿ x) = 2ⁿ q(x)",
    ),
    rule(
        "power-after-bf16-experts | (matmul_experts (round_bf16 (scale ?a ?x)) ?w ?r) | (scale ?a (matmul_experts (round_bf16 ?x) ?w ?r)) | power ?a | exact",
        "bf16(2ⁿ x) = 2ⁿ bf16(x)",
    ),
];
