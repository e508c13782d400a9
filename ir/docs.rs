//! The reference page of ops, generated from the op table so that it cannot drift: `docs/ops.md`.
//!
//! ```text
//! | `matmul x, w` | | `f32[t, 64], q8_0[96, 64] -> f32[t, 96]` | x\[t, k] w\[n, k]^T |
//! ```

use crate::ops::{Class, Op};
use crate::sample::Random;
use std::fmt::Write;

/// The page as Markdown: one table for each class, in the order of the op table.
pub fn ops_markdown() -> String {
    let mut out = String::from(
        "# Ops\n\nEvery op is one row of the table in `ir/ops/mod.rs`; this page is generated from it, do not edit. Dims: `t` \
         new tokens, `s` sequences, `r` rows asked for, `c` context. The headings are classes: fusion goes by them. The \
         example is a random one that the type rule accepts.\n",
    );
    let mut classes: Vec<Class> = vec![];
    for op in Op::all() {
        if !classes.contains(&op.class()) {
            classes.push(op.class());
        }
    }
    for class in classes {
        _ = write!(out, "\n## {class:?}\n\n{}\n\n", meaning(class));
        out.push_str("| op | attributes | example | meaning |\n|---|---|---|---|\n");
        for op in Op::all().filter(|op| op.class() == class) {
            out.push_str(&row(op));
        }
    }
    out
}

/// Where fusion may put ops of a class; the words of its documentation.
fn meaning(class: Class) -> &'static str {
    match class {
        Class::Weight => "A weight by name.",
        Class::WeightFold => "A weight computed from weights, once, when packing.",
        Class::Elementwise => "Element by element over operands of one shape.",
        Class::RowBroadcast => "Element by element with a vector repeated for every row.",
        Class::RowReduce => "Each row (last axis) from the whole row.",
        Class::Rope => "Rotates pairs within each head by angles of the token.",
        Class::Turn => "Multiplies each head with a fixed orthogonal matrix.",
        Class::View => "The same bytes under another shape.",
        Class::Columns => "Some columns of rows, or columns side by side.",
        Class::Gather => "Rows of a table or of another value, by index.",
        Class::Angles => "Angles of each token's position.",
        Class::Quantize => "Rounds each row to int8 per group.",
        Class::Contract => "Rows times a weight matrix.",
        Class::ContractExperts => "Rows times the matrices of the experts they are routed to.",
        Class::Route => "Chooses experts.",
        Class::Combine => "Weighted sum over chosen experts.",
        Class::Append => "Writes new rows to a cache.",
        Class::Attend => "Softmax attention over a cache.",
        Class::Pool => "One row for each sequence.",
        Class::Estimate => "Rows times the first plane of a matrix.",
        Class::Rescore => "Adds the second plane to the estimates that can matter, in place.",
    }
}

fn row(op: Op) -> String {
    let row = op.row();
    let attrs: Vec<String> =
        row.attrs.iter().map(|a| format!("`{}` ({}): {}", a.name, a.kind.name(), text(a.meaning))).collect();
    let commutes = if row.commutative { "; commutes" } else { "" };
    let (name, meaning) = (format!("{} {}", row.name, row.operands.join(", ")), text(row.meaning));
    format!("| `{}` | {} | `{}` | {meaning}{commutes} |\n", name.trim_end(), attrs.join("<br>"), example(op))
}

/// Text for a cell: what Markdown would take for markup is escaped, but code stays code.
fn text(text: &str) -> String {
    let mut out = String::new();
    for (i, part) in text.split('`').enumerate() {
        let code = i % 2 == 1;
        let escape = |c: char| c == '|' || !code && matches!(c, '[' | '*' | '<' | '_');
        let escaped: String = part.chars().flat_map(|c| escape(c).then_some('\\').into_iter().chain([c])).collect();
        out += &if code { format!("`{escaped}`") } else { escaped };
    }
    out
}

/// Operand types and the type they give.
fn example(op: Op) -> String {
    let Some((types, attrs)) = (op.row().sample)(&mut Random::named(0, op.name()), None) else {
        return "f32[576, 1536]".into(); // declared
    };
    let operands: Vec<String> = types.iter().map(|ty| ty.to_string()).collect();
    match op.infer(&types.iter().collect::<Vec<_>>(), &attrs) {
        Ok(ty) => format!("{} -> {ty}", operands.join(", ")),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_op_has_a_row() {
        let page = super::ops_markdown();
        for op in crate::Op::all() {
            let row = |after: char| page.contains(&format!("| `{op}{after}"));
            assert!(row(' ') || row('`'), "{op}");
        }
        assert!(page.contains("`adjacent`: 2d with 2d + 1"));
    }
}
