//! The emulator finds what is planted: kernels that are wrong only when threads meet in some order, and those that hang.

use super::{SCHEDULES, retarget::Code};
use crate::cuda::{self, Chip, Source};
use crate::harness::{self, emulated};
use mansard_ir::eval::{self, Step, Value};
use mansard_ir::plan::Kernel;

const BARRIER: &str = "llvm.call_intrinsic \"llvm.nvvm.barrier.cta.sync.aligned.all\"";

/// What is said of a kernel whose text was changed.
pub(super) fn verdict(kernel: &Kernel, source: &Source, step: &Step) -> Result<(), String> {
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

fn kernels() -> Vec<(Kernel, Source, Step)> {
    let norm = "graph @norm(%x: f32[t, 320], %g: f32[320]) stage planned when t = 1..8 {
        %n = rms_normalize %x {eps = 1e-5} %m = mul_row %n, %g
        %l = l2_normalize %m {eps = 1e-5} return l = %l }";
    let product = "graph @product(%x: a8[t, 2048], %w: q4_0[40, 2048]) stage planned when t = 1..1 {
        %y = matmul %x, %w return y = %y }";
    // Caches that prompts go through token by token, too.
    let attend = "graph @attend(%q: f32[t, 4, 32], %k: keys<f32>[c, 2, 32], %v: values<f32>[c, 2, 32], %step: step[s])
        stage planned when t = 1..8 {
        %y = attend %q, %k, %v, %step {scale = 0.2, causal = true, window = 0, softcap = 0.0} return y = %y }";
    let tile = "graph @tile(%x: bf16[t, 320], %w: bf16[40, 320], %g: f32[40]) stage planned when t = 9..512 {
        %y = matmul %x, %w %z = mul_row %y, %g return z = %z }";
    let few = [(150, 3), (0, 2)];
    [(norm, &few[..]), (product, &[(0, 1)]), (attend, &few), (tile, &[(0, 30), (0, 40)])]
        .map(|(text, step)| {
            let kernel = harness::kernel(text);
            // Tiles of Hopper are others: see `units_tests.rs`.
            let chip = if kernel.name == "tile" { Chip::Sm80 } else { Chip::Sm90a };
            let source = cuda::emit(&kernel, chip).unwrap();
            (kernel, source, Step::new(step))
        })
        .into()
}

/// Few barriers may be spared: those after which nothing of shared memory is used again.
#[test]
fn missing_barriers_are_found() {
    for (kernel, source, step) in kernels() {
        assert_eq!(verdict(&kernel, &source, &step), Ok(()), "{}", kernel.name);
        let (mut found, mut all) = (0, 0);
        while let Some(text) = without_barrier(&source.text, all) {
            all += 1;
            if let Err(fault) = verdict(&kernel, &Source { text, ..source.clone() }, &step) {
                assert!(fault.contains("race") || fault.contains("deadlock") || fault.contains("off"), "{fault}");
                found += 1;
            }
        }
        assert!(found > 0 && all - found <= 3, "`{}`: {found} of {all} missing barriers were found", kernel.name);
    }
}

#[test]
fn a_wrong_step_over_columns_is_found() {
    let (kernel, source, step) = kernels().swap_remove(1);
    // The loop over steps of the ring carries the most values.
    let carries = |line: &&str| line.matches(" = ").count() * usize::from(line.contains("scf.for"));
    let line = source.text.lines().rev().max_by_key(carries).unwrap();
    let step_at = line.find(" step ").unwrap() + 6;
    let end = step_at + line[step_at..].find(' ').unwrap();
    let wrong = format!("%wrong = arith.constant 192 : i64\n{}%wrong{}", &line[..step_at], &line[end..]);
    let text = source.text.replace(line, &wrong);
    let fault = verdict(&kernel, &Source { text, ..source }, &step).unwrap_err();
    assert!(fault.contains("values are off") || fault.contains("which a copy writes"), "{fault}");
}

#[test]
fn memory_that_was_not_asked_for_is_not_there() {
    let (kernel, source, step) = kernels().swap_remove(1);
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
        let source = cuda::emit(&kernel, Chip::Sm80).unwrap();
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

/// bf16 activations beside codes of every kind, and beside bf16; contractions that meet, and several that do not.
#[test]
fn tensor_cores_multiply_bf16() {
    let step = Step::new(&[(0, 37), (3, 44)]);
    let check = |body: &str, weights: &str| {
        let text = format!("graph @k(%x: bf16[t, 384], {weights}) stage planned when t = 33..512 {{ {body} }}");
        let kernel = harness::kernel(&text);
        let source = cuda::emit(&kernel, Chip::Sm80).unwrap();
        assert!(source.text.contains("llvm.nvvm.mma.m16n8k16.row.col.bf16"), "{weights}");
        assert_eq!(verdict(&kernel, &source, &step), Ok(()), "{weights}");
    };
    for format in ["bf16", "q8_0", "q4_0", "q4_1", "q5_1", "int4_g128", "mxfp4"] {
        check("%y = matmul %x, %w return y = %y", &format!("%w: {format}[600, 384]"));
    }
    let both =
        "%a = matmul %x, %w %b = matmul %x, %v %c = silu %a %y = mul %b, %c %z = matmul %x, %u return y = %y, z = %z";
    check(both, "%w: q4_0[100, 384], %v: bf16[100, 384], %u: q8_0[20, 384]");
}

/// The copies of a ring, and of a tile's activations: reading too early, or writing where another step is still to be read, is found in every case.
#[test]
fn a_wrong_wait_for_copies_is_found() {
    const WAIT: &str = "llvm.call_intrinsic \"llvm.nvvm.cp.async.wait.group\"";
    for (kernel, source, step) in [1, 3].map(|i| kernels().swap_remove(i)) {
        let wait = source.text.lines().find(|line| line.contains(WAIT)).unwrap().trim();
        let fault = |text: String| {
            assert_ne!(text, source.text);
            verdict(&kernel, &Source { text, ..source.clone() }, &step).unwrap_err()
        };
        let more = format!(
            "scf.execute_region {{\n%more = arith.constant 4 : i32\n{WAIT}(%more) : (i32) -> ()\nscf.yield\n}}"
        );
        let commit = "llvm.call_intrinsic \"llvm.nvvm.cp.async.commit.group\"() : () -> ()";
        for (what, mended) in [(wait, ""), (wait, more.as_str()), (commit, "")] {
            let fault = fault(source.text.replace(what, mended));
            assert!(fault.contains("which a copy writes"), "`{what}` became `{mended}`: {fault}");
        }
    }
}

/// Where activations take much of shared memory, a ring takes less, or there is none.
#[test]
fn rings_give_way() {
    let shared = |k: usize| {
        let text = format!(
            "graph @k(%x: f32[t, {k}], %w: q8_0[64, {k}], %g: f32[{k}]) stage planned when t = 1..8 {{
                %n = rms_normalize %x {{eps = 1e-5}} %m = mul_row %n, %g %q = quantize %m %y = matmul %q, %w return y = %y }}"
        );
        let source = cuda::emit(&harness::kernel(&text), Chip::Sm90a).unwrap();
        (source.shared_bytes, source.text.contains("llvm.nvvm.cp.async"))
    };
    let found = [4096, 16384, 24576].map(shared);
    assert!(found.iter().all(|(bytes, _)| *bytes <= cuda::SHARED_LIMIT), "{found:?}");
    assert_eq!(found.map(|(_, ring)| ring), [true, true, false]);
}

/// Wide heads leave no room for copies of cache blocks.
#[test]
fn copies_of_cache_blocks_give_way() {
    let copies = |heads: usize| {
        let text = format!(
            "graph @k(%q: f32[t, {heads}, 256], %k: keys<f16>[c, 1, 256], %v: values<f16>[c, 1, 256], %step: step[s])
                stage planned when t = 1..8 {{
                %y = attend %q, %k, %v, %step {{scale = 0.2, causal = true, window = 0, softcap = 0.0}} return y = %y }}"
        );
        cuda::emit(&harness::kernel(&text), Chip::Sm90a).unwrap().text.contains("llvm.nvvm.cp.async")
    };
    assert_eq!([4, 16].map(copies), [true, false]);
}

/// What a launch may not do before earlier ones are done: anything but copy weights.
#[test]
fn nothing_is_read_or_written_before_earlier_launches_are_done() {
    for (kernel, ..) in kernels() {
        let text = cuda::emit(&kernel, Chip::Sm90a).unwrap().text;
        let (before, after) = text.split_once("llvm.nvvm.griddepcontrol.wait").unwrap();
        // Blocks without work wait, too: launches after the next rely on it.
        assert_eq!(before.matches("{\n").count() - before.matches("}\n").count(), 1, "{before}");
        // What is loaded is the number of rows.
        assert!(before.matches("llvm.load").count() <= 1 && !before.contains("llvm.store"), "{before}");
        assert!(before.contains("griddepcontrol.launch.dependents") && !after.contains("griddepcontrol"));
        let older = cuda::emit(&kernel, Chip::Sm80).unwrap().text;
        assert!(!older.contains("griddepcontrol"));
    }
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
