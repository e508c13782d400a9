//! Products of warpgroups compute what the interpreter does, and what is wrong with how they are fed is found.

use super::tests::verdict;
use crate::cuda::{self, Chip, Source};
use crate::harness;
use mansard_ir::eval::Step;
use mansard_ir::plan::Kernel;

fn kernel(body: &str, inputs: &str) -> (Kernel, Source) {
    let text = format!("graph @k({inputs}) stage planned when t = 33..512 {{ {body} }}");
    let kernel = harness::kernel(&text);
    let source = cuda::emit(&kernel, Chip::Sm90a).unwrap();
    (kernel, source)
}

/// Tiles of 256 tokens and of 128, and a step of fewer; more steps than slots; rows that are no whole tile.
#[test]
fn warpgroups_multiply_bf16() {
    for format in ["bf16", "q8_0", "q4_0", "q4_1", "q5_1", "int4_g128", "mxfp4"] {
        let (kernel, source) =
            kernel("%y = matmul %x, %w return y = %y", &format!("%x: bf16[t, 384], %w: {format}[40, 384]"));
        for tokens in [300, 44] {
            assert_eq!(verdict(&kernel, &source, &Step::new(&[(0, tokens)])), Ok(()), "{format}, {tokens} tokens");
        }
    }
}

/// Contractions that meet in the epilogue, and one beside them with an epilogue of its own.
#[test]
fn warpgroups_share_what_meets() {
    let body =
        "%a = matmul %x, %w %b = matmul %x, %v %c = silu %a %y = mul %b, %c %z = matmul %x, %u %s = mul_row %z, %g
        return y = %y, s = %s";
    let inputs = "%x: bf16[t, 320], %w: q4_0[100, 320], %v: q4_0[100, 320], %u: bf16[20, 320], %g: f32[20]";
    let (kernel, source) = kernel(body, inputs);
    assert!(source.text.contains("wgmma.mma_async"));
    assert_eq!(verdict(&kernel, &source, &Step::new(&[(0, 37), (3, 144)])), Ok(()));
}

/// Which kernels go which way.
#[test]
fn other_products_stay_with_smaller_tiles() {
    let warpgroups = |inputs: &str, chip| {
        let (kernel, _) = kernel("%y = matmul %x, %w return y = %y", inputs);
        cuda::emit(&kernel, chip).unwrap().text.contains("wgmma.mma_async")
    };
    assert!(warpgroups("%x: bf16[t, 384], %w: q4_0[64, 384]", Chip::Sm90a));
    assert!(!warpgroups("%x: bf16[t, 384], %w: q4_0[64, 384]", Chip::Sm80));
    assert!(!warpgroups("%x: a8[t, 384], %w: q4_0[64, 384]", Chip::Sm90a));
    assert!(!warpgroups("%x: bf16[t, 32], %w: bf16[64, 32]", Chip::Sm90a));
}

/// One thing at a time is taken away or changed, wherever it stands.
#[test]
fn wrong_pipelines_are_found() {
    let (kernel, source) = kernel("%y = matmul %x, %w return y = %y", "%x: bf16[t, 384], %w: bf16[40, 384]");
    let step = Step::new(&[(0, 300)]);
    assert_eq!(verdict(&kernel, &source, &step), Ok(()));
    let call = |name: &str| format!("llvm.call_intrinsic \"llvm.nvvm.{name}");
    // Every line that calls `name`, as `change` has it.
    let with = |name: &str, change: &dyn Fn(&str) -> String| {
        let lines = source.text.lines().map(|l| if l.contains(name) { change(l) } else { l.to_owned() });
        let text = lines.collect::<Vec<_>>().join("\n");
        assert_ne!(text, source.text.trim_end(), "`{name}`");
        verdict(&kernel, &Source { text: text + "\n", ..source.clone() }, &step)
    };
    let without = |name: &str| with(name, &|_| String::new());
    let swap = |name: &str, from: &str, to: &str| with(name, &|line| line.replace(from, to));
    let wants = |what: &str, found: Result<(), String>, words: &[&str]| {
        let fault = found.expect_err(what);
        assert!(words.iter().any(|word| fault.contains(word)), "{what}: {fault}");
    };
    // A wait that is over at once.
    let ends = |line: &str| {
        let (to, _) = line.split_once(" = ").unwrap();
        format!("{to} = arith.constant true")
    };
    wants("no waits", with("mbarrier.try.wait", &ends), &["race"]);
    let parity = |line: &str| {
        let (at, args) = line.split_once("space.cta\"(").unwrap();
        let (place, parity) = args.split_once(", ").unwrap();
        let (parity, rest) = parity.split_once(')').unwrap();
        format!(
            "%other{0} = arith.constant 1 : i32\n%odd{0} = arith.xori {parity}, %other{0} : i32\n{at}space.cta\"({place}, %odd{0}){rest}",
            &place[1..]
        )
    };
    wants("the other parity", with("mbarrier.try.wait", &parity), &["race", "deadlock"]);
    let bytes = |line: &str| {
        let (place, rest) = line.split_once(", ").unwrap();
        let (_, rest) = rest.split_once(')').unwrap();
        let id = place.split('(').nth(1).unwrap();
        format!("%few{0} = arith.constant 16384 : i32\n{place}, %few{0}){rest}", &id[1..])
    };
    wants("fewer bytes", with("mbarrier.arrive.expect", &bytes), &["deadlock"]);
    wants("nobody says that a slot is free", without("mbarrier.arrive.shared"), &["deadlock"]);
    wants("no fence of barriers", without("fence.mbarrier_init"), &["not fenced"]);
    wants("no fence of products", without("wgmma.fence"), &["no fence before it"]);
    wants("open groups", without("wgmma.commit_group"), &["race", "off", "not waited for"]);
    let goes = "wgmma.wait_group.sync.aligned 0;";
    wants(
        "no wait for products",
        swap(goes, goes, "wgmma.wait_group.sync.aligned 4;"),
        &["race", "off", "not waited for"],
    );
    wants("no fence of the proxy", without("fence.proxy.async"), &["no fence of the asynchronous proxy"]);
    wants("a description not acquired", without("tensormap_generic.acquire"), &["not acquired"]);
    wants("a field not described", without("replace.swizzle.mode"), &["is described"]);
    wants("a draft not cleared", without(&call("bar.warp.sync")), &["race", "is described"]);
    // Every eighth row 512 bytes further, not 1024.
    let descriptor = |stride: u64| (1_u64 << 62 | stride << 32 | 1 << 16).to_string();
    wants("a wrong stride", swap("arith.constant", &descriptor(64), &descriptor(32)), &["off"]);
    // Half a row further.
    let place = (1_u64 << 62 | 64 << 32 | 1 << 16 | 4).to_string();
    wants("a wrong step over columns", swap("arith.constant", &descriptor(64), &place), &["off", "race"]);
}

/// Prompts: heads of several widths, in groups, through a window and a cap, over caches in halves.
#[test]
fn tensor_cores_attend_to_prompts() {
    let shapes = [
        ("f16", 64, 4, 2, 0, "0.0"),
        ("bf16", 96, 2, 2, 40, "0.0"),
        ("f16", 128, 8, 1, 0, "30.0"),
        ("f16", 112, 3, 1, 0, "0.0"),
    ];
    for (dtype, dim, heads, kv, window, cap) in shapes {
        let text = format!(
            "graph @k(%q: f32[t, {heads}, {dim}], %k: keys<{dtype}>[c, {kv}, {dim}], %v: values<{dtype}>[c, {kv}, {dim}], %step: step[s])
                stage planned when t = 1..512 {{
                %y = attend %q, %k, %v, %step {{scale = 0.1, causal = true, window = {window}, softcap = {cap}}} return y = %y }}"
        );
        let kernel = harness::kernel(&text);
        let source = cuda::emit(&kernel, Chip::Sm90a).unwrap();
        assert!(source.text.contains("ldmatrix"), "{dtype}, heads of {dim}");
        let step = Step::new(&[(70, 40), (0, 65)]);
        assert_eq!(verdict(&kernel, &source, &step), Ok(()), "{dtype}, heads of {dim}");
    }
}
