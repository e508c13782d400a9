//! Several kernels in one image.

use super::*;
use crate::harness::kernel;
use mansard_ir::Tuning;
use mansard_ir::plan::Program;

/// Six small kernels: more than one module.
fn plan() -> Plan {
    let text = |i: usize| {
        format!(
            "graph @k{i}(%x: f32[t, 64], %w: f32[{}, 64]) stage planned when t = 1..1 {{
               %y = matmul %x, %w
               return y = %y
             }}",
            16 * (i + 1)
        )
    };
    Plan { kernels: (0..6).map(|i| kernel(&text(i))).collect(), packs: vec![], program: Program::default() }
}

#[test]
fn entries_are_in_the_plans_order_and_bytes_do_not_depend_on_threads() {
    let (plan, target) = (plan(), target("x86-64-v3").unwrap());
    let mut heard = vec![];
    let image = compile(&plan, &target, &Tuning::default(), 1, &mut |done, all| heard.push((done, all))).unwrap();
    assert_eq!(heard, [(0, 6), (4, 6), (6, 6)]);
    let names: Vec<&str> = image.entries.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["k0", "k1", "k2", "k3", "k4", "k5"]);
    assert_eq!(image, compile(&plan, &target, &Tuning::default(), 3, &mut |_, _| {}).unwrap());
}

#[test]
fn every_layer_can_be_read() {
    let (plan, target) = (plan(), target("x86-64-v4").unwrap());
    let text = |layer| String::from_utf8(emit(&plan, &target, &Tuning::default(), layer).unwrap()).unwrap();
    assert!(text(Layer::Mlir).contains("func.func @k5("));
    assert!(text(Layer::Llvm).contains("define void @k5("));
    assert!(text(Layer::Asm).contains("zmm"));
    assert!(emit(&plan, &target, &Tuning::default(), Layer::Object).unwrap().starts_with(b"\x7fELF"));
}

#[test]
fn a_kernel_twice_is_an_error() {
    let mut plan = plan();
    plan.kernels.truncate(1);
    plan.kernels.push(plan.kernels[0].clone());
    let error = compile(&plan, &target("x86-64-v3").unwrap(), &Tuning::default(), 2, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("k0"), "{error}");
}
