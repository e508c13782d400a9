//! Kernels for aarch64, run by `qemu-aarch64` as one static program.
//!
//! ```text
//!  0x100000  runner: for each call { kernel(args, step, thread, threads) }; write(1, data); exit(0)
//!  0x203000  the kernels' image, at a page that begins nothing larger
//!  0x40000000  data: number of calls, calls; step; addresses of arguments; arguments     -> comes back on standard output
//! ```
//!
//! The runner is made as kernels are, from MLIR. There is no C library and no linker: an ELF file is a header before the
//! three segments. Workers run one after the other, which their disjoint shares allow.

use super::memory::{GUARD, Memory, StepArrays};
use crate::llvm::CodeGenerator;
use crate::mlir::Mlir;
use crate::{Image, link, target};
use inkwell::targets::FileType;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Where the segments are.
const RUNNER: usize = 0x10_0000;
const CODE: usize = 0x20_3000;
const DATA: usize = 0x4000_0000;

/// Bytes of a page, in memory and in the file.
const PAGE: usize = 4096;

/// 64-bit words of a call: kernel, arguments, step, thread, threads.
const CALL_WORDS: usize = 5;

const RUNNER_TEXT: &str = r#"
llvm.func @_start() {
  %data = llvm.mlir.constant(DATA : i64) : i64
  %base = llvm.inttoptr %data : i64 to !llvm.ptr
  %zero = arith.constant 0 : i64
  %one = arith.constant 1 : i64
  %size = llvm.load %base {alignment = 8 : i64} : !llvm.ptr -> i64
  %count_at = llvm.getelementptr %base[8] : (!llvm.ptr) -> !llvm.ptr, i8
  %count = llvm.load %count_at {alignment = 8 : i64} : !llvm.ptr -> i64
  scf.for %i = %zero to %count step %one : i64 {
    %bytes = arith.constant 40 : i64
    %offset = arith.muli %i, %bytes : i64
    %call = llvm.getelementptr %base[%offset] : (!llvm.ptr, i64) -> !llvm.ptr, i8
    %p0 = llvm.getelementptr %call[16] : (!llvm.ptr) -> !llvm.ptr, i8
    %p1 = llvm.getelementptr %call[24] : (!llvm.ptr) -> !llvm.ptr, i8
    %p2 = llvm.getelementptr %call[32] : (!llvm.ptr) -> !llvm.ptr, i8
    %p3 = llvm.getelementptr %call[40] : (!llvm.ptr) -> !llvm.ptr, i8
    %p4 = llvm.getelementptr %call[48] : (!llvm.ptr) -> !llvm.ptr, i8
    %kernel = llvm.load %p0 {alignment = 8 : i64} : !llvm.ptr -> !llvm.ptr
    %args = llvm.load %p1 {alignment = 8 : i64} : !llvm.ptr -> !llvm.ptr
    %step = llvm.load %p2 {alignment = 8 : i64} : !llvm.ptr -> !llvm.ptr
    %thread = llvm.load %p3 {alignment = 8 : i64} : !llvm.ptr -> i64
    %threads = llvm.load %p4 {alignment = 8 : i64} : !llvm.ptr -> i64
    llvm.call %kernel(%args, %step, %thread, %threads) : !llvm.ptr, (!llvm.ptr, !llvm.ptr, i64, i64) -> ()
  }
  %write = arith.constant 64 : i64
  %exit = arith.constant 93 : i64
  %end = scf.while (%at = %zero) : (i64) -> i64 {
    %more = arith.cmpi slt, %at, %size : i64
    scf.condition(%more) %at : i64
  } do {
  ^bb0(%at: i64):
    %left = arith.subi %size, %at : i64
    %from = arith.addi %data, %at : i64
    %written = llvm.inline_asm has_side_effects "svc #0", "={x0},{x8},{x0},{x1},{x2},~{memory}" %write, %one, %from, %left : (i64, i64, i64, i64) -> i64
    %failed = arith.cmpi sle, %written, %zero : i64
    scf.if %failed {
      %never = llvm.inline_asm has_side_effects "svc #0", "={x0},{x8},{x0},~{memory}" %exit, %one : (i64, i64) -> i64
    }
    %next = arith.addi %at, %written : i64
    scf.yield %next : i64
  }
  %never = llvm.inline_asm has_side_effects "svc #0", "={x0},{x8},{x0},~{memory}" %exit, %zero : (i64, i64) -> i64
  llvm.unreachable
}
"#;

/// An emulated processor.
#[derive(Clone, Copy, Debug)]
pub struct Qemu {
    /// As `qemu-aarch64 -cpu` names it.
    pub cpu: &'static str,
}

impl Qemu {
    /// A processor with the features of an aarch64 target and not much more; `None` without qemu, after saying so. Where
    /// `CI` is set, qemu must be there.
    pub fn for_target(name: &str) -> Option<Qemu> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let found = *FOUND.get_or_init(|| {
            let found = Command::new("qemu-aarch64").arg("--version").stdout(Stdio::null()).status().is_ok();
            assert!(found || std::env::var_os("CI").is_none(), "qemu-aarch64 is missing: run .ci/setup");
            if !found {
                // Straight to the stream: what tests print is shown only when they fail.
                let words = b"skipped: aarch64 targets: qemu-aarch64 is not there (`.ci/setup` installs it)\n";
                let _ = std::io::stderr().write_all(words);
            }
            found
        });
        // Neoverse N1 has dot products and no i8mm.
        found.then_some(Qemu { cpu: if name == "aarch64+dotprod" { "neoverse-n1" } else { "max" } })
    }

    /// Calls the image's only kernel on each of the memories, with that many workers.
    pub fn call(self, image: &Image, runs: &mut [(Vec<Memory>, usize)], step: &StepArrays) {
        let [(_, entry)] = image.entries.as_slice() else { panic!("expected one kernel") };
        let (data, places) = data(CODE + entry, runs, step);
        let mut file = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempfile().unwrap();
        let segments = [(RUNNER, 5, runner().bytes.as_slice()), (CODE, 5, &image.bytes), (DATA, 6, &data)];
        file.write_all(&elf(&segments)).unwrap();
        let output = Command::new("qemu-aarch64").args(["-cpu", self.cpu]).arg(file.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-aarch64 -cpu {}: {}: {said}", self.cpu, output.status);
        assert_eq!(output.stdout.len(), data.len(), "{said}");
        for (memory, at) in runs.iter_mut().flat_map(|(memories, _)| memories).zip(places) {
            memory.replace(&output.stdout[at..]);
        }
    }
}

/// The data segment, and where in it each memory is.
fn data(kernel: usize, runs: &[(Vec<Memory>, usize)], step: &StepArrays) -> (Vec<u8>, Vec<usize>) {
    let calls: usize = runs.iter().map(|(_, threads)| threads).sum();
    let step_at = (16 + 8 * CALL_WORDS * calls).next_multiple_of(64);
    let mut data = vec![0; step_at];
    data.extend(step.whole(DATA + step_at));
    let (mut places, mut words) = (vec![], vec![0, calls]);
    for (memories, threads) in runs {
        let mut addresses = vec![];
        for memory in memories {
            data.resize(data.len().next_multiple_of(64), 0);
            places.push(data.len());
            addresses.push(DATA + data.len() + 64 * GUARD);
            data.extend(memory.whole());
        }
        let args = DATA + data.len();
        data.extend(addresses.iter().flat_map(|a| a.to_le_bytes()));
        words.extend((0..*threads).flat_map(|thread| [kernel, args, DATA + step_at, thread, *threads]));
    }
    words[0] = data.len();
    for (bytes, word) in data.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    (data, places)
}

/// Machine code of the runner, whose first function is its entry.
fn runner() -> &'static Image {
    static RUNNER: OnceLock<Image> = OnceLock::new();
    RUNNER.get_or_init(|| {
        let context = inkwell::context::Context::create();
        let text = RUNNER_TEXT.replace("DATA", &DATA.to_string());
        let module = Mlir::new().and_then(|mlir| mlir.lower_text("runner", &text, &context));
        let object = module.and_then(|module| {
            let generator = CodeGenerator::new(&target::target("aarch64+dotprod")?)?;
            generator.optimize(&module)?;
            generator.emit(&module, FileType::Object)
        });
        let image = object.and_then(|object| link::link(&[object])).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(image.entries, [("_start".to_owned(), 0)]);
        image
    })
}

/// A static program of `(address, permissions, bytes)`, entered at the first byte of the first.
fn elf(segments: &[(usize, u32, &[u8])]) -> Vec<u8> {
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    // Executable, aarch64, version 1.
    out.extend([2u16, 183].iter().flat_map(|x| x.to_le_bytes()));
    out.extend(1u32.to_le_bytes());
    out.extend([segments[0].0 as u64, 64, 0].iter().flat_map(|x| x.to_le_bytes()));
    out.extend(0u32.to_le_bytes());
    out.extend([64u16, 56, segments.len() as u16, 64, 0, 0].iter().flat_map(|x| x.to_le_bytes()));
    let mut offset = PAGE;
    for (address, permissions, bytes) in segments {
        out.extend([1u32, *permissions].iter().flat_map(|x| x.to_le_bytes()));
        let figures = [offset, *address, *address, bytes.len(), bytes.len(), PAGE];
        out.extend(figures.iter().flat_map(|x| (*x as u64).to_le_bytes()));
        offset = (offset + bytes.len()).next_multiple_of(PAGE);
    }
    for (_, _, bytes) in segments {
        out.resize(out.len().next_multiple_of(PAGE), 0);
        out.extend(*bytes);
    }
    out
}
