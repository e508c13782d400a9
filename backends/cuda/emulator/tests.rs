//! The emulator finds what is planted: kernels that are wrong only when threads meet in some order, and those that hang.

use super::{SCHEDULES, retarget::Code};
use crate::cuda::{self, Source};
use crate::harness::{self, emulated};
use mansard_ir::eval::{self, Step, Value};
use mansard_ir::plan::Kernel;

const BARRIER: &str = "llvm.call_intrinsic \"llvm.nvvm.barrier.cta.sync.aligned.all\"";

/// What is said of a kernel whose text was changed.
fn verdict(kernel: &Kernel, source: &Source, step: &Step) -> Result<(), String> {
    let inputs = harness::inputs(kernel, step, 1);
    let reals: Vec<Value> = inputs.iter().map(harness::Given::reals).collect();
    let expected = eval::graph(&kernel.body, &reals, &mut |name, _| panic!("weight {name}")).unwrap();
    emulated::run(kernel, source, &inputs, step, &|found| harness::differences(kernel, found, &expected, 1e-2))
}

/// The text without its `n`-th barrier.
fn without_barrier(text: &str, n: usize) -> Option<String> {
    let (at, _) = text.match_indices(BARRIER).nth(n)?;
    let end = at + text[at..].find('\n')?;
    Some(text[..at].to_owned() + &text[end + 1..])
}

fn kernels() -> Vec<(Kernel, Step)> {
    let norm = "graph @norm(%x: f32[t, 320], %g: f32[320]) stage planned when t = 1..8 {
        %n = rms_normalize %x {eps = 1e-5} %m = mul_row %n, %g
        %l = l2_normalize %m {eps = 1e-5} return l = %l }";
    let product = "graph @product(%x: a8[t, 1024], %w: q4_0[40, 1024]) stage planned when t = 1..1 {
        %y = matmul %x, %w return y = %y }";
    let attend = "graph @attend(%q: f32[t, 4, 32], %k: keys<f16>[c, 2, 32], %v: values<f16>[c, 2, 32], %step: step[s])
        stage planned when t = 1..8 {
        %y = attend %q, %k, %v, %step {scale = 0.2, causal = true, window = 0, softcap = 0.0} return y = %y }";
    let few = [(90, 3), (0, 2)];
    [(norm, &few[..]), (product, &[(0, 1)]), (attend, &few)]
        .map(|(text, step)| (harness::kernel(text), Step::new(step)))
        .into()
}

/// Few barriers may be spared: those after which nothing of shared memory is used again.
#[test]
fn missing_barriers_are_found() {
    for (kernel, step) in kernels() {
        let source = cuda::emit(&kernel).unwrap();
        assert_eq!(verdict(&kernel, &source, &step), Ok(()), "{}", kernel.name);
        let (mut found, mut all) = (0, 0);
        while let Some(text) = without_barrier(&source.text, all) {
            all += 1;
            if let Err(fault) = verdict(&kernel, &Source { text, ..source.clone() }, &step) {
                assert!(fault.contains("race") || fault.contains("deadlock") || fault.contains("off"), "{fault}");
                found += 1;
            }
        }
        assert!(found > 0 && all - found <= 2, "`{}`: {found} of {all} missing barriers were found", kernel.name);
    }
}

#[test]
fn a_wrong_step_over_columns_is_found() {
    let (kernel, step) = kernels().swap_remove(1);
    let source = cuda::emit(&kernel).unwrap();
    // The loop over lines carries the most values.
    let carries = |line: &&str| line.matches(" = ").count() * usize::from(line.contains("scf.for"));
    let line = source.text.lines().max_by_key(carries).unwrap();
    let step_at = line.find(" step ").unwrap() + 6;
    let end = step_at + line[step_at..].find(' ').unwrap();
    let wrong = format!("%wrong = arith.constant 192 : i64\n{}%wrong{}", &line[..step_at], &line[end..]);
    let text = source.text.replace(line, &wrong);
    let fault = verdict(&kernel, &Source { text, ..source }, &step).unwrap_err();
    assert!(fault.contains("values are off"), "{fault}");
}

#[test]
fn memory_that_was_not_asked_for_is_not_there() {
    let (kernel, step) = kernels().swap_remove(1);
    let source = cuda::emit(&kernel).unwrap();
    let less = Source { shared_bytes: source.shared_bytes / 2, ..source };
    // The text is the same, so the code must be another's.
    let less = Source { text: less.text.replace("@product(", "@less("), ..less };
    let fault = verdict(&kernel, &less, &step).unwrap_err();
    assert!(fault.contains("of shared memory"), "{fault}");
}

/// Codes of both signs, with zero points and minima, one plane of activations and two, and bf16.
#[test]
fn tensor_cores_multiply_many_tokens() {
    let step = Step::new(&[(0, 37), (3, 5)]);
    let of = |weights: &str, x: &str| {
        let text = format!(
            "graph @k(%x: {x}[t, 512], %w: {weights}[40, 512]) stage planned when t = 9..512 {{
                %y = matmul %x, %w return y = %y }}"
        );
        let kernel = harness::kernel(&text);
        let source = cuda::emit(&kernel).unwrap();
        (kernel, source)
    };
    let formats =
        [("q8_0", "a8"), ("q4_0", "a16"), ("q4_1", "a8"), ("q5_1", "a8"), ("int4_g128", "a8"), ("mxfp4", "a8")];
    for (weights, x) in formats.into_iter().chain([("bf16", "bf16")]) {
        let (kernel, source) = of(weights, x);
        assert!(source.text.contains("llvm.nvvm.mma.m16n8k"), "{weights}");
        assert_eq!(verdict(&kernel, &source, &step), Ok(()), "{weights}");
    }
    let (kernel, source) = of("q8_0", "a8");
    let text = source.text.replace(".u8.s8", ".s8");
    let fault = verdict(&kernel, &Source { text, ..source.clone() }, &step).unwrap_err();
    assert!(fault.contains("values are off"), "codes of the wrong sign: {fault}");
    // The first word of a token where the second belongs.
    let text = source.text.replace("[16] : (!llvm.ptr) -> !llvm.ptr, i8", "[0] : (!llvm.ptr) -> !llvm.ptr, i8");
    assert_ne!(text, source.text);
    let fault = verdict(&kernel, &Source { text, ..source }, &step).unwrap_err();
    assert!(fault.contains("values are off"), "a word of the wrong columns: {fault}");
}

/// A function on shared memory alone.
fn alone(body: &str) -> Result<(), String> {
    let text = format!(
        "llvm.func @alone(%0: !llvm.ptr<1>) attributes {{nvvm.kernel}} {{
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %s = llvm.mlir.addressof @shared : !llvm.ptr<3>
  %t = llvm.call_intrinsic \"llvm.nvvm.read.ptx.sreg.tid.x\"() : () -> i32
  %first = arith.cmpi eq, %t, %c0 : i32
{body}
  llvm.return
}}
"
    );
    let code = Code::new(&Source { text, shared_bytes: 4096 });
    SCHEDULES.into_iter().try_for_each(|schedule| {
        // SAFETY: the kernel does not touch its argument.
        unsafe { code.launch(&[0], 1, schedule) }
    })
}

#[test]
fn threads_that_wait_for_ever_are_a_deadlock() {
    let barrier = format!("{BARRIER}(%c0) : (i32) -> ()");
    let fault = alone(&format!("  scf.if %first {{ {barrier} }}")).unwrap_err();
    assert!(fault.contains("deadlock: 1 threads wait, 1 of 256 of them at a barrier"), "{fault}");
    assert_eq!(alone(&format!("  {barrier}")), Ok(()));
}

#[test]
fn races_are_found_even_where_values_agree() {
    let store = "  llvm.store %c1, %s : i32, !llvm.ptr<3>";
    assert!(alone(store).unwrap_err().contains("race: thread 1 writes byte 0"));
    let own = "  %p = llvm.getelementptr %s[%t] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, i32
  llvm.store %c1, %p : i32, !llvm.ptr<3>";
    assert_eq!(alone(own), Ok(()));
    let read = format!("{own}\n  %x = llvm.load volatile %s : !llvm.ptr<3> -> i32");
    assert!(alone(&read).unwrap_err().contains("race"), "a read of another thread's word");
    // Lanes that met are in order; another warp is not.
    let met = "  %c32 = arith.constant 32 : i32
  %lane = arith.remui %t, %c32 : i32
  %warp = arith.divui %t, %c32 : i32
  %lead = arith.cmpi eq, %lane, %c0 : i32
  %p = llvm.getelementptr %s[%warp] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, i32
  %all = arith.constant -1 : i32
  scf.if %lead { llvm.store %c1, %p : i32, !llvm.ptr<3> }
  SYNC
  %x = llvm.load volatile %p : !llvm.ptr<3> -> i32";
    let sync = "llvm.call_intrinsic \"llvm.nvvm.bar.warp.sync\"(%all) : (i32) -> ()";
    assert_eq!(alone(&met.replace("SYNC", sync)), Ok(()));
    assert!(alone(&met.replace("SYNC", "")).unwrap_err().contains("race"));
}
