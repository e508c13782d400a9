//! Before matrices that become codes, columns of their inputs get scales, which the columns of the matrices take back.
//!
//! ```text
//! %q = matmul %x, %v         %s = weight "v.input_scales" : f32[576]
//! %k = matmul %x, %w    ->   %y = mul_row %x, %s
//!                            %q = matmul %y, %v           %k = matmul %y, %w          x diag s (w / diag s)ᵀ = x wᵀ
//! ```
//!
//! The scales are all 1 here; whoever quantizes finds better ones, and divides the matrices by them (Lin et al., "AWQ:
//! Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023). Rules move them on: into a norm's gain
//! (`gain-twice`), to where a kernel multiplies anyhow. Matrices that read the same share their scales. What is stored in
//! codes already stays as it is, and so does what leaves the step.

use crate::rebuild::Builder;
use crate::weights::names;
use ir::model::{Call, Source, Weight, WeightTable};
use ir::ops::Class;
use ir::quantize::{Quantizer, input_scales};
use ir::{Attr, Attrs, DType, Dim, Graph, Model, Node, Op, Result, Type, ValueId};
use std::collections::BTreeMap;

/// Gives inputs their scales where the quantizer is one that looks for them; says how many there are.
///
/// # Errors
/// Where a graph cannot be rebuilt.
pub fn insert(model: &mut Model, quantizer: Quantizer) -> Result<Option<String>> {
    if !quantizer.row().scales_inputs {
        return Ok(None);
    }
    let mut count = 0;
    for index in 0..model.graphs.len() {
        let graph = &model.graphs[index];
        let scaled = scaled(graph, &model.calls, &model.weights);
        let next = rebuilt(graph, &scaled)?;
        let new: BTreeMap<String, usize> = scaled.into_values().collect();
        for (name, columns) in new {
            let (attrs, ty) = (Attrs::new([("name", Attr::Str(name))]), Type::f32([Dim::N(columns)]));
            let node = Node { op: Op::WEIGHT, attrs, operands: vec![], ty };
            for name in names(&model.calls, &next.name, &node) {
                let source = Source::Values(vec![1.0; columns].into());
                model.weights.insert(name, Weight { ty: node.ty.clone(), source });
                count += 1;
            }
        }
        model.graphs[index] = next;
    }
    let line = format!("inputs of products: scaled column by column {count} times, by {quantizer}");
    Ok((count > 0).then_some(line))
}

/// Contractions by their numbers: the scales of their inputs, named after the first matrix that reads the same, and how many.
fn scaled(graph: &Graph, calls: &[Call], weights: &WeightTable) -> BTreeMap<usize, (String, usize)> {
    let (mut scaled, mut of_values) = (BTreeMap::new(), BTreeMap::new());
    for (index, node) in graph.nodes.iter().enumerate().filter(|(_, n)| n.op.class() == Class::Contract) {
        let (x, matrix) = (node.operands[0], graph.node(node.operands[1]).filter(|m| m.op == Op::WEIGHT));
        let Some(matrix) = matrix.filter(|m| becomes_codes(graph, m, calls, weights)) else { continue };
        let Some((DType::F32, [.., Dim::N(columns)])) = graph.ty(x).as_tensor() else { continue };
        if graph.ty(x).rows() != Some(Dim::R) {
            let name = of_values.entry(x).or_insert_with(|| input_scales(matrix.attrs.str("name")));
            scaled.insert(index, (name.clone(), *columns));
        }
    }
    scaled
}

/// Of few bits, and not stored so.
fn becomes_codes(graph: &Graph, matrix: &Node, calls: &[Call], weights: &WeightTable) -> bool {
    let Some(dtype) = matrix.ty.dtype().filter(|d| d.int().is_some_and(|int| int.bits < 8)) else { return false };
    let names = names(calls, &graph.name, matrix);
    names.iter().all(|name| weights.get(name).is_ok_and(|weight| !weight.stored_as(dtype)))
}

fn rebuilt(graph: &Graph, scaled: &BTreeMap<usize, (String, usize)>) -> Result<Graph> {
    let mut builder = Builder::like(graph);
    let mut to: Vec<ValueId> = graph.values().collect();
    for (index, node) in graph.nodes.iter().enumerate() {
        let mut operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
        if let Some((name, columns)) = scaled.get(&index) {
            let scales = builder.weight(name, &Type::f32([Dim::N(*columns)]));
            operands[0] = builder.push("mul_row", Attrs::none(), &[operands[0], scales])?;
        }
        to[graph.value_of(index).0 as usize] = builder.copy(node, &operands)?;
    }
    builder.graph.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
    Ok(builder.graph)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "graph @layer(%x: f32[t, 64]) stage canonical {
        %q = weight \"q\" : q4_0[32, 64]
        %0 = matmul %x, %q
        %k = weight \"k\" : q4_0[32, 64]
        %1 = matmul %x, %k
        %s = weight \"stored\" : q4_0[32, 64]
        %2 = matmul %x, %s
        return q = %0, k = %1, s = %2
    }";

    /// Matrices that read the same share their scales, which every call has; a matrix that is stored in codes gets none.
    #[test]
    fn matrices_that_read_the_same_share_their_scales() {
        let mut model = ir::text::parse("test", MODEL).unwrap();
        let matrix = |source| Weight { ty: Type::tensor(DType::Q4_0, [Dim::N(32), Dim::N(64)]), source };
        let stored = Source::Bytes { dtype: DType::Q4_0, bytes: vec![0; 32 * 36].into() };
        for (name, source) in
            [("q", Source::Synthetic { seed: 1 }), ("k", Source::Synthetic { seed: 2 }), ("stored", stored)]
        {
            model.weights.insert(name, matrix(source));
        }
        assert!(insert(&mut model, Quantizer::Gptq).unwrap().is_none());
        let said = insert(&mut model, Quantizer::Awq).unwrap().unwrap();
        assert!(said.contains("1 times, by awq"), "{said}");
        let graph = &model.graphs[0];
        let read = |index: usize| {
            let contractions: Vec<_> = graph.nodes.iter().filter(|n| n.op.class() == Class::Contract).collect();
            contractions[index].operands[0]
        };
        assert!(read(0) == read(1) && read(2) == ValueId(0));
        assert_eq!(graph.node(read(0)).unwrap().op, Op::named("mul_row").unwrap());
        assert_eq!(model.weights.get(&input_scales("q")).unwrap().read_all().unwrap(), [1.0; 64]);
        assert!(model.weights.get(&input_scales("k")).is_err());
    }
}
