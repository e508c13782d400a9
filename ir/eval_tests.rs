//! The interpreter against values computed by hand, one op at a time, then over the steps of a small model.

use super::*;
use crate::model::{ModelInfo, Source, Weight, WeightTable};
use crate::text;

fn tensor(shape: &[usize], data: &[f32]) -> Value {
    Value::Tensor(Tensor::new(shape, data.to_vec()))
}

/// Evaluates the one node `op` makes of `%a, %b, ..` of these types.
fn node(types: &[&str], op: &str, values: &[Value]) -> Result<Value> {
    let names = ["a", "b", "c", "d"];
    let inputs: Vec<String> = types.iter().zip(names).map(|(ty, n)| format!("%{n}: {ty}")).collect();
    let operands: Vec<String> = names[..types.len()].iter().map(|n| format!("%{n}")).collect();
    let (name, attrs) = op.split_once(' ').unwrap_or((op, ""));
    let text = format!(
        "graph @g({}) stage imported {{ %y = {name} {} {attrs} return y = %y }}",
        inputs.join(", "),
        operands.join(", ")
    );
    let model = text::parse("test", &text)?;
    let mut none = |name: &str, _: &Type| panic!("weight {name}");
    Ok(graph(&model.graphs[0], values, &mut none)?.remove(0))
}

fn check(types: &[&str], op: &str, values: &[Value], expected: &[f32]) {
    let found = node(types, op, values).unwrap();
    let found = found.tensor().unwrap().data.to_vec();
    assert_eq!(found.len(), expected.len(), "{op}: {found:?}");
    for (x, y) in found.iter().zip(expected) {
        assert!((x - y).abs() <= 1e-6 * y.abs().max(1.0), "{op}: {found:?}, expected {expected:?}");
    }
}

#[test]
fn elementwise_values() {
    let x = tensor(&[1, 3], &[-1.0, 0.0, 2.0]);
    let cases: [(&str, [f32; 3]); 9] = [
        ("scale {by = 3}", [-3.0, 0.0, 6.0]),
        ("offset {by = 1}", [0.0, 1.0, 3.0]),
        ("softcap {cap = 2}", [-0.924_234_3, 0.0, 1.523_188_3]),
        ("silu", [-0.268_941_43, 0.0, 1.761_594_2]),
        ("gelu", [-0.158_655_26, 0.0, 1.954_499_7]),
        ("gelu_tanh", [-0.158_808, 0.0, 1.954_597_7]),
        ("gelu_sigmoid", [-0.154_204_23, 0.0, 1.935_656_8]),
        ("relu", [0.0, 0.0, 2.0]),
        ("tanh", [-0.761_594_2, 0.0, 0.964_027_6]),
    ];
    for (op, expected) in cases {
        check(&["f32[t, 3]"], op, std::slice::from_ref(&x), &expected);
    }
    let y = tensor(&[1, 3], &[5.0, 6.0, 7.0]);
    check(&["f32[t, 3]", "f32[t, 3]"], "add", &[x.clone(), y.clone()], &[4.0, 6.0, 9.0]);
    check(&["f32[t, 3]", "f32[t, 3]"], "mul", &[x, y], &[-5.0, 0.0, 14.0]);
    let (x, row) = (tensor(&[2, 2], &[1.0, 2.0, 3.0, 4.0]), tensor(&[2], &[10.0, 20.0]));
    check(&["f32[t, 2]", "f32[2]"], "add_row", &[x.clone(), row.clone()], &[11.0, 22.0, 13.0, 24.0]);
    check(&["f32[t, 2]", "f32[2]"], "mul_row", &[x, row], &[10.0, 40.0, 30.0, 80.0]);
}

#[test]
fn row_values() {
    let x = [tensor(&[2, 2], &[3.0, 4.0, 0.0, 0.0])];
    check(&["f32[t, 2]"], "rms_normalize {eps = 0.5}", &x, &[3.0 / 13f32.sqrt(), 4.0 / 13f32.sqrt(), 0.0, 0.0]);
    check(&["f32[t, 2]"], "layer_normalize {eps = 0.75}", &x, &[-0.5, 0.5, 0.0, 0.0]);
    check(&["f32[t, 2]"], "l2_normalize {eps = 1e-6}", &x, &[0.6, 0.8, 0.0, 0.0]);
}

#[test]
fn quantization_rounds_ties_to_even() {
    let mut x = vec![0.0; 64];
    (x[0], x[1], x[2], x[3], x[4]) = (-127.0, 2.5, 3.5, -0.5, 0.75);
    let mut expected = vec![0.0; 64];
    (expected[0], expected[1], expected[2], expected[4]) = (-127.0, 2.0, 4.0, 1.0);
    check(&["f32[t, 64]"], "quantize", &[tensor(&[1, 64], &x)], &expected);
}

#[test]
fn products() {
    let x = tensor(&[2, 5], &[1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 1.0, 0.0, 1.0]);
    let w = tensor(&[2, 5], &[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, -2.0]);
    check(&["f32[t, 5]", "f32[2, 5]"], "matmul", &[x, w.clone()], &[15.0, -8.0, 2.0, -2.0]);
    let g = tensor(&[5], &[1.0, 2.0, 3.0, 4.0, 5.0]);
    let scaled = [1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 2.0, 0.0, 0.0, -10.0];
    check(&["f32[2, 5]", "f32[5]"], "scale_columns", &[w, g], &scaled);
}

#[test]
fn weights_of_weights() {
    let w = tensor(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let vector = |values: &[f32]| tensor(&[values.len()], values);
    check(
        &["f32[2, 3]", "f32[2]"],
        "scale_rows",
        &[w.clone(), vector(&[2.0, -1.0])],
        &[2.0, 4.0, 6.0, -4.0, -5.0, -6.0],
    );
    let b = tensor(&[3, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    check(&["f32[2, 3]", "f32[3, 2]"], "multiply_weights", &[w.clone(), b], &[4.0, 5.0, 10.0, 11.0]);
    check(&["f32[2, 3]", "f32[3]"], "times_vector", &[w.clone(), vector(&[1.0, 0.0, -1.0])], &[-2.0, -2.0]);
    check(&["f32[2, 3]"], "slice_rows {from = 1, count = 1}", std::slice::from_ref(&w), &[4.0, 5.0, 6.0]);
    let row = tensor(&[1, 3], &[7.0, 8.0, 9.0]);
    let all = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
    check(&["f32[2, 3]", "f32[1, 3]"], "concat_rows", &[w, row], &all);
    check(&[], "hadamard_matrix {size = 2}", &[], &[0.5f32.sqrt(), 0.5f32.sqrt(), 0.5f32.sqrt(), -0.5f32.sqrt()]);
    let x = tensor(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    check(&["f32[t, 3]"], "slice {from = 1, count = 2}", std::slice::from_ref(&x), &[2.0, 3.0, 5.0, 6.0]);
    let y = tensor(&[2, 1], &[9.0, 8.0]);
    check(&["f32[t, 3]", "f32[t, 1]"], "concat", &[x, y], &[1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 8.0]);
}

#[test]
fn experts() {
    let scores = tensor(&[2, 3], &[0.0, 2f32.ln(), 2f32.ln(), 3f32.ln(), 0.0, 0.0]);
    let routing = |normalize| {
        let op = format!("route {{top = 2, normalize = {normalize}}}");
        node(&["f32[t, 3]"], &op, std::slice::from_ref(&scores)).unwrap().routing().unwrap().clone()
    };
    assert_eq!(routing(true).chosen, [1, 2, 0, 1], "ties go to the lower index");
    assert_eq!(routing(true).weights, [0.5, 0.5, 0.75, 0.25]);
    assert_eq!(routing(false).weights, [0.4, 0.4, 0.6, 0.2]);

    let w = tensor(&[3, 1, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    let types = ["f32[t, 2]", "f32[3, 1, 2]", "routing[t, 2, 3]"];
    let x = tensor(&[2, 2], &[2.0, 5.0, 3.0, 4.0]);
    let routed = Value::Routing(routing(true));
    check(&types, "matmul_experts", &[x, w.clone(), routed.clone()], &[5.0, 7.0, 3.0, 4.0]);
    let x = tensor(&[2, 2, 2], &[2.0, 5.0, 1.0, 1.0, 3.0, 4.0, 0.0, 8.0]);
    let types = ["f32[t, 2, 2]", types[1], types[2]];
    check(&types, "matmul_experts", &[x, w, routed.clone()], &[5.0, 2.0, 3.0, 8.0]);
    let x = tensor(&[2, 2, 1], &[5.0, 2.0, 3.0, 8.0]);
    check(&["f32[t, 2, 1]", "routing[t, 2, 3]"], "combine", &[x, routed], &[3.5, 4.25]);
}

#[test]
fn turned_heads() {
    let x = tensor(&[1, 1, 4], &[1.0, 2.0, 3.0, 4.0]);
    check(&["f32[t, 1, 4]"], "hadamard", &[x], &[5.0, -1.0, -2.0, 0.0]);
    let x = tensor(&[1, 1, 6], &[3.0, 1.0, 0.0, 2.0, 5.0, 5.0]);
    let half = 0.5f32.sqrt();
    check(&["f32[t, 1, 6]"], "hadamard", &[x], &[4.0, 2.0, 2.0, -2.0, 10.0, 0.0].map(|x| x * half));
}

#[test]
fn gathers_and_rope() {
    let table = tensor(&[3, 2], &[0.0, 1.0, 10.0, 11.0, 20.0, 21.0]);
    let types = ["i32[t]", "f32[3, 2]"];
    check(&types, "embed", &[Value::from_ints([2, 0]), table.clone()], &[20.0, 21.0, 0.0, 1.0]);
    let message = node(&types, "embed", &[Value::from_ints([3]), table]).unwrap_err().to_string();
    assert_eq!(message, "graph @g: %2 = embed: index 3 at 0 is out of range: there are 3 rows");

    let (cos, sin) = (2f32.cos(), 2f32.sin());
    let f = tensor(&[1], &[0.5]);
    check(&["i32[t]", "f32[1]"], "rope_table {scale = 3}", &[Value::from_ints([4]), f], &[3.0 * cos, 3.0 * sin]);
    // Two frequencies, head dim 5: angles of 90 and 180 degrees, the last dim passes.
    let angles = tensor(&[1, 4], &[0.0, -1.0, 1.0, 0.0]);
    let x = tensor(&[1, 1, 5], &[1.0, 2.0, 3.0, 4.0, 5.0]);
    let types = ["f32[t, 1, 5]", "f32[t, 4]"];
    check(&types, "rope {pairing = \"half\"}", &[x.clone(), angles.clone()], &[-3.0, -2.0, 1.0, -4.0, 5.0]);
    check(&types, "rope {pairing = \"adjacent\"}", &[x, angles], &[-2.0, 1.0, -3.0, -4.0, 5.0]);
}

#[test]
fn caches_grow_and_round() {
    let ty = text::parse_type("keys<f16>[c, 1, 1]").unwrap();
    let mut cache = Cache::empty(&ty, 2).unwrap();
    cache.sequences[0] = Arc::new(vec![9.0]);
    let step = Value::Step(Step::new(&[(1, 2), (0, 1)]));
    let types = ["keys<f16>[c, 1, 1]", "f32[t, 1, 1]", "step[s]"];
    let x = tensor(&[3, 1, 1], &[1.0, 1.0 / 3.0, 3.0]);
    let found = node(&types, "append", &[Value::Cache(cache.clone()), x.clone(), step]).unwrap();
    assert_eq!(*found.cache().unwrap().sequences[0], [9.0, 1.0, 0.333_251_95]);
    assert_eq!(*found.cache().unwrap().sequences[1], [3.0]);
    let wrong = Value::Step(Step::new(&[(0, 2), (0, 1)]));
    assert!(node(&types, "append", &[Value::Cache(cache), x, wrong]).is_err());
}

/// Equal keys make attention a mean of the values seen.
#[test]
fn attention_sees_the_past() {
    let cache = |data: &[f32]| {
        Value::Cache(Cache { heads: 1, dim: 1, dtype: DType::F32, sequences: vec![Arc::new(data.to_vec())] })
    };
    use crate::formats::DType;
    let types = ["f32[t, 2, 1]", "keys<f32>[c, 1, 1]", "values<f32>[c, 1, 1]", "step[s]"];
    let run = |rest: &str, keys: &[f32], expected: &[f32]| {
        let operands = [
            tensor(&[2, 2, 1], &[1.0, 0.0, 1.0, 0.0]),
            cache(keys),
            cache(&[3.0, 6.0, 12.0]),
            Value::Step(Step::new(&[(1, 2)])),
        ];
        check(&types, &format!("attend {{{rest}}}"), &operands, expected);
    };
    let zero = [0.0; 3];
    run("scale = 1, causal = true, window = 0, softcap = 0", &zero, &[4.5, 4.5, 7.0, 7.0]);
    run("scale = 1, causal = false, window = 0, softcap = 0", &zero, &[7.0; 4]);
    run("scale = 1, causal = true, window = 2, softcap = 0", &zero, &[4.5, 4.5, 9.0, 9.0]);
    run("scale = 1, causal = true, window = 1, softcap = 0", &zero, &[6.0, 6.0, 12.0, 12.0]);
    // exp(2 ln 3) : exp(0) = 9 : 1 for the head that asks; the other sees a mean.
    let keys = [3f32.ln(), 0.0, 0.0];
    run("scale = 2, causal = true, window = 0, softcap = 0", &keys, &[3.3, 4.5, 45.0 / 11.0, 7.0]);
    // A tiny cap makes all scores equal but for themselves: cap * tanh(..) is about 1e-9.
    run("scale = 2, causal = true, window = 0, softcap = 1e-9", &keys, &[4.5, 4.5, 7.0, 7.0]);
}

#[test]
fn pooling_is_by_sequence() {
    let step = Value::Step(Step::new(&[(0, 2), (0, 1)]));
    let x = tensor(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    check(&["f32[t, 2]", "step[s]"], "mean_pool", &[x, step], &[2.0, 3.0, 5.0, 6.0]);
}

#[test]
fn inputs_must_fit() {
    let message = |types: [&str; 2], values: [Value; 2]| node(&types, "add", &values).unwrap_err().to_string();
    assert_eq!(
        message(["f32[t, 2]", "f32[t, 2]"], [tensor(&[1, 2], &[0.0; 2]), tensor(&[2, 2], &[0.0; 4])]),
        "graph @g: input %b: expected f32[t, 2] (t = 1), found reals [2, 2]"
    );
}

/// A model that sums, over a sequence's tokens so far, rows of its table: it must not matter how tokens are cut in steps.
const SUMS: &str = r#"
graph @embed(%tokens: i32[t]) stage imported {
  %w = weight "table" : f32[4, 2]
  %x = embed %tokens, %w
  return x = %x
}
graph @layer(%x: f32[t, 2], %keys: keys<f32>[c, 1, 2], %values: values<f32>[c, 1, 2], %step: step[s]) stage imported {
  %h = split_heads %x {heads = 1}
  %k = append %keys, %h, %step
  %v = append %values, %h, %step
  %a = attend %h, %k, %v, %step {scale = 1, causal = true, window = 0, softcap = 0}
  %m = merge_heads %a
  return x = %m, keys = %k, values = %v
}
graph @head(%x: f32[t, 2], %rows: i32[r]) stage imported {
  %y = select_rows %x, %rows
  return logits = %y
}
model @sums { call @embed call @layer x 2 with "layers.{i}." call @head output logits }
"#;

#[test]
fn steps_keep_their_caches() {
    let mut model = text::parse("sums", SUMS).unwrap();
    model.weights = WeightTable::default();
    let values = [0.0, 0.5, 1.0, -0.5, 0.25, 2.0, -1.0, 1.5];
    let ty = text::parse_type("f32[4, 2]").unwrap();
    model.weights.insert("table", Weight { ty, source: Source::Values(Arc::from(values)) });
    model.info = ModelInfo::default();
    let whole = |tokens: &[u32]| {
        let mut run = Interpreter::new(&model);
        run.step(&[(0, tokens)], &[tokens.len() - 1]).unwrap()["logits"].clone()
    };
    // Two sequences in one ragged step, then one token more for each, in the other order.
    let mut run = Interpreter::new(&model);
    let first = run.step(&[(7, &[1, 2]), (3, &[3])], &[1, 2]).unwrap()["logits"].clone();
    assert_eq!((first.outer(0), first.outer(1)), (whole(&[1, 2]).outer(0), whole(&[3]).outer(0)));
    let second = run.step(&[(3, &[0]), (7, &[3])], &[0, 1]).unwrap()["logits"].clone();
    assert_eq!((second.outer(0), second.outer(1)), (whole(&[3, 0]).outer(0), whole(&[1, 2, 3]).outer(0)));
    // A step that fails leaves the sequences as they were.
    assert!(run.step(&[(7, &[99])], &[0]).is_err());
    let third = run.step(&[(7, &[0])], &[0]).unwrap()["logits"].clone();
    assert_eq!(third.outer(0), whole(&[1, 2, 3, 0]).outer(0));
}
