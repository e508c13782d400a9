//! The projection in two planes against the interpreter, op by op and as a whole.

use crate::harness::{self, Given, machines};
use crate::{cpu, pack};
use mansard_ir::eval::{self, Step, Tensor, Value};
use mansard_ir::planes::PlanesLayout;
use mansard_ir::{DType, layout};

const RANGE: &str = "stage planned when t = 1..64";

fn estimate(n: usize, k: usize) -> String {
    format!(
        "graph @e(%x: a16[r, {k}], %w: q8_planes[{n}, {k}], %step: step[s]) {RANGE} {{ %e = estimate %x, %w, %step \
         %b = estimate_bounds %x, %w, %step {{margin = 3}} return e = %e, b = %b }}"
    )
}

fn rescore(n: usize, k: usize) -> String {
    let width = 3 * n.div_ceil(layout::STRIP);
    format!(
        "graph @r(%e: f32[r, {n}], %b: f32[r, {width}], %x: a16[r, {k}], %w: q8_planes[{n}, {k}], %step: step[s]) {RANGE} \
         {{ %y = rescore %e, %b, %x, %w, %step return y = %y }}"
    )
}

/// Half as many rows leave as there are tokens.
fn step(tokens: usize, candidates: usize) -> Step {
    Step::new(&[(0, tokens)]).wanting(candidates)
}

#[test]
fn estimates_and_bounds() {
    for (n, k) in [(50, 96), (300, 320), (40, 576)] {
        let kernel = harness::kernel(&estimate(n, k));
        for tokens in [1, 7, 25] {
            let step = step(tokens, 1);
            harness::check(&kernel, &harness::inputs(&kernel, &step, 3), &step, 2e-6);
        }
    }
}

#[test]
fn one_of_them_alone() {
    for op in ["%y = estimate %x, %w, %step", "%y = estimate_bounds %x, %w, %step {margin = 8}"] {
        let text =
            format!("graph @e(%x: a16[r, 64], %w: q8_planes[70, 64], %step: step[s]) {RANGE} {{ {op} return y = %y }}");
        let (kernel, step) = (harness::kernel(&text), step(3, 5));
        harness::check(&kernel, &harness::inputs(&kernel, &step, 9), &step, 2e-6);
    }
}

#[test]
fn everything_exactly() {
    for (n, k) in [(50, 96), (300, 320), (40, 576)] {
        let kernel = harness::kernel(&rescore(n, k));
        for tokens in [1, 7, 25] {
            let step = step(tokens, 0);
            harness::check(&kernel, &harness::inputs(&kernel, &step, 4), &step, 2e-6);
        }
    }
}

/// A step wants the largest few: the kernels agree with the interpreter on which rows, and what comes out has the largest
/// few of the whole matrix in their order.
#[test]
fn the_largest_are_exact() {
    let (n, k) = (2000, 160);
    let (first, second) = (harness::kernel(&estimate(n, k)), harness::kernel(&rescore(n, k)));
    for (tokens, candidates) in [(1, 1), (5, 1), (3, 7), (2, 64)] {
        let step = step(tokens, candidates);
        let inputs = harness::inputs(&first, &step, 11);
        let [Given::Value(x), Given::Weight(w), _] = &inputs[..] else { panic!("{inputs:?}") };
        let reals: Vec<Value> = inputs.iter().map(Given::reals).collect();
        let found = eval::graph(&first.body, &reals, &mut |name, _| panic!("weight {name}")).unwrap();
        let [e, b] = &found[..] else { panic!("{found:?}") };
        let given = [Given::Value(e.clone()), Given::Value(b.clone()), inputs[0].clone(), inputs[1].clone()];
        let given = [&given[..], &[Given::Value(Value::Step(step.clone()))]].concat();
        harness::check(&second, &given, &step, 2e-6);

        let planes = Value::of_weight(w).unwrap();
        let whole: Vec<f32> = (0..n).flat_map(|j| planes.planes().unwrap().row(j).collect::<Vec<_>>()).collect();
        let whole = Value::Tensor(Tensor::new([n, k], whole));
        let matmul = mansard_ir::Op::named("matmul").unwrap().row().eval;
        let exact = matmul(&[x, &whole], &mansard_ir::Attrs::none()).unwrap();
        let reals: Vec<Value> = given.iter().map(Given::reals).collect();
        let rescored = eval::graph(&second.body, &reals, &mut |name, _| panic!("weight {name}")).unwrap();
        let (exact, rescored, e) = (exact.tensor().unwrap(), rescored[0].tensor().unwrap(), e.tensor().unwrap());
        for ((exact, rescored), e) in exact.rows().zip(rescored.rows()).zip(e.rows()) {
            assert_eq!(largest(exact, candidates), largest(rescored, candidates));
            let kept = rescored.iter().zip(e).filter(|(y, e)| y == e).count();
            assert!(kept > 0 && kept < n, "{kept} of {n} estimates kept");
        }
    }
}

fn largest(row: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
    order.truncate(count);
    order
}

/// Ties and few rows: fewer strips than candidates leave nothing out.
#[test]
fn more_candidates_than_strips() {
    let kernel = harness::kernel(&rescore(40, 64));
    let step = step(4, 5);
    harness::check(&kernel, &harness::inputs(&kernel, &step, 2), &step, 2e-6);
}

#[test]
fn rows_of_a_table_in_planes() {
    for k in [32, 96, 320] {
        let text = format!(
            "graph @t(%i: i32[t], %w: q8_planes[37, {k}]) {RANGE} {{ %e = embed %i, %w %y = scale %e {{by = 2.0}} return y = %y }}"
        );
        harness::case(&text, &[(0, 9), (4, 1)], 1e-6);
    }
}

/// What is packed is both planes: the bytes of a row, read as the layout says, are the codes of the file.
#[test]
fn packed_planes_are_the_codes() {
    let (n, k) = (37, 96);
    let weight = harness::quantized_weight(DType::Q8_PLANES, &[n, k], 6);
    let packed = |threads| {
        let mut bytes = vec![];
        let mut sink = |b: &[u8]| {
            bytes.extend_from_slice(b);
            Ok(())
        };
        pack::pack(&weight, threads, &mut sink).unwrap();
        bytes
    };
    let (bytes, p) = (packed(1), PlanesLayout::new(k));
    assert_eq!(bytes, packed(3));
    assert_eq!(bytes.len(), layout::packed_bytes(DType::Q8_PLANES, &[n, k]));
    let int = DType::Q4_0.int().unwrap();
    for row in 0..n {
        let split = mansard_ir::planes::SplitRow::of(&weight, row).unwrap();
        let (strip, lane) = (&bytes[row / 16 * p.strip_bytes..], row % 16);
        let lower = &bytes[p.upper_bytes(n) + row * p.row_bytes..][..p.row_bytes];
        for (column, code) in split.codes.iter().enumerate() {
            let (group, quad, i) = (column / 32, column % 32 / 4, column % 4);
            let line = p.strip.codes_at(int, group) + quad % 4 * 64 + lane * 4 + i;
            let high = strip[line] >> (quad / 4 * 4) & 15;
            let low = lower[p.codes + group * 16 + column % 16] >> (column % 32 / 16 * 4) & 15;
            assert_eq!(*code, high << 4 | low, "row {row} column {column}");
        }
        let spread = strip[p.spreads() + 4 * lane..][..4].try_into().unwrap();
        assert_eq!(f32::from_le_bytes(spread), split.spread);
    }
    assert!(!machines().is_empty() && cpu::arguments(&harness::kernel(&rescore(16, 32)).body).len() == 4);
}
