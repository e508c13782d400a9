//! Tests of [`super`].

use super::*;
use crate::eval::Interpreter;

#[test]
fn samplers_agree_with_type_rules() {
    let mut random = Random::new(1);
    for op in Op::all().filter(|op| op.class() != Class::Weight) {
        for _ in 0..50 {
            let (types, attrs) = (op.row().sample)(&mut random, None).unwrap();
            let types: Vec<&Type> = types.iter().collect();
            op.infer(&types, &attrs).unwrap_or_else(|e| panic!("{op}: {e}"));
            if types.is_empty() {
                continue;
            }
            // The first type it made is one it takes.
            let (again, attrs) = (op.row().sample)(&mut random, Some(types[0])).unwrap();
            assert_eq!(again[0], *types[0]);
            op.infer(&again.iter().collect::<Vec<_>>(), &attrs).unwrap_or_else(|e| panic!("{op}: {e}"));
        }
    }
}

#[test]
fn every_op_evaluates_to_its_type() {
    let mut random = Random::new(2);
    let step = Step::new(&[(3, 2), (0, 1)]);
    for op in Op::all().filter(|op| op.class() != Class::Weight) {
        for _ in 0..5 {
            let (types, attrs) = (op.row().sample)(&mut random, None).unwrap();
            let mut values: Vec<Value> = types.iter().map(|ty| value(ty, &step, 2, &mut random)).collect();
            if let (Some(cache), Class::Attend) = (values.get_mut(1), op.class()) {
                let longer = Step::new(&[(5, 0), (1, 0)]); // as after the append
                *cache = value(&types[1], &longer, 2, &mut random);
                for (value_of, ty) in values.iter_mut().zip(&types).skip(2).filter(|(v, _)| v.cache().is_ok()) {
                    *value_of = value(ty, &longer, 2, &mut random);
                }
            }
            let ty = op.infer(&types.iter().collect::<Vec<_>>(), &attrs).unwrap();
            let result = (op.row().eval)(&values.iter().collect::<Vec<_>>(), &attrs).unwrap();
            let mut extents = crate::eval::Extents { t: Some(3), s: Some(2), r: Some(2) };
            result.check(&ty, &mut extents).unwrap_or_else(|e| panic!("{op}: {e}"));
            if let Value::Tensor(t) = &result {
                assert!(t.data.iter().all(|x| x.is_finite()), "{op}");
            }
        }
    }
}

#[test]
fn random_weights_have_a_plausible_size() {
    let mut random = Random::new(3);
    for format in crate::formats::FORMATS.iter().filter(|f| f.dtype.is_float() || f.int.is_some()) {
        let weight = weight(&Type::tensor(format.dtype, [Dim::N(64), Dim::N(256)]), &mut random).unwrap();
        let values = weight.read_all().unwrap();
        let size = (values.iter().map(|x| (x * x) as f64).sum::<f64>() / values.len() as f64 * 256.0).sqrt();
        let most = values.iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!((0.1..1.5).contains(&size) && most < 0.3, "{}: {size}, {most}", format.name);
        assert!(weight.stored_as(format.dtype));
    }
}

#[test]
fn random_models_are_legal_and_run() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..600 {
        let model = graph(seed, 30).unwrap();
        crate::verify::verify_model(&model).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let text = crate::text::print_model(&model);
        assert_eq!(crate::text::print_model(&crate::text::parse("random", &text).unwrap()), text);
        let mut run = Interpreter::new(&model);
        for (new, rows) in [(vec![(0, &[1, 2, 3][..]), (1, &[4][..])], &[2, 3][..]), (vec![(1, &[5, 6][..])], &[1])] {
            let out = run.step(&new, rows).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            let logits = &out["logits"];
            assert_eq!(logits.shape, [rows.len(), model.info.vocab]);
            let most = logits.data.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!(most.is_finite() && most > 1e-3 && most < 1e3, "seed {seed}: {most}");
        }
        let step = Step::new(&[(2, 3), (0, 1)]);
        for graph in &model.graphs {
            let mut weights = |name: &str, ty: &Type| weight_value(name, ty, seed);
            let results = crate::eval::graph(graph, &inputs(graph, &step, 2, seed), &mut weights);
            results.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
        seen.extend(model.graphs.iter().flat_map(|g| &g.nodes).map(|n| n.op));
    }
    // Only encoders pool, and only passes estimate, turn heads and divide caches.
    let passes = |op: &Op| matches!(op.class(), Class::Estimate | Class::Rescore | Class::Turn);
    let elsewhere =
        |op: &Op| op.class() == Class::Pool || passes(op) || ["attend_mixed", "append_blocks"].contains(&op.name());
    let never: Vec<Op> = Op::all().filter(|op| !elsewhere(op) && !seen.contains(op)).collect();
    assert!(never.is_empty(), "no random model has {never:?}");
}
