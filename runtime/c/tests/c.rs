//! A C program against the static library: everything right and wrong that can be done with `mansard.h`, plainly and under
//! valgrind; and the names that the shared library exports.

#[path = "../../tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file that this package was built to, beside this test.
fn built(name: &str) -> PathBuf {
    // Linked so that it is built, whatever its kind.
    assert_eq!(mansard_c::mansard_abi_version(), mansard_c::MANSARD_ABI_VERSION);
    std::env::current_exe().unwrap().with_file_name(name)
}

/// A program that may be missing, but not where `CI` is set.
fn have(program: &str) -> bool {
    if Command::new(program).arg("--version").output().is_ok() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "{program} is missing: run .ci/setup");
    let _ = std::io::stderr().write_all(format!("skipped: there is no {program} here\n").as_bytes());
    false
}

fn succeeds(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {}\n{said}", out.status);
    String::from_utf8(out.stdout).unwrap()
}

/// `abi.c`, built by `compiler`.
fn program(folder: &Path, compiler: &str, flags: &[&str]) -> PathBuf {
    let exe = folder.join(compiler);
    let mut cc = Command::new(compiler);
    cc.args(flags).args(["-Wall", "-Wextra", "-Werror", "-g", "-O1", "-I"]).arg(here());
    succeeds(
        cc.arg(here().join("tests/abi.c")).arg(built("libmansard_c.a")).args(["-lm", "-lpthread", "-o"]).arg(&exe),
    );
    exe
}

/// The model that counts, whose tokens are bytes.
fn with_bytes() -> support::Parts {
    let level =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let words = ["", "1", "2", "3", "4", "{", "}", "\""].into_iter().zip(0..);
    let vocab: serde_json::Map<String, serde_json::Value> = words.map(|(word, id)| (word.into(), id.into())).collect();
    let model = serde_json::json!({"type": "WordLevel", "unk_token": "1", "vocab": vocab});
    let tokenizer = serde_json::json!({"version": "1.0", "added_tokens": [], "decoder": level, "model": model});
    let mut parts = support::counting_parts();
    let section = parts.sections.iter_mut().find(|(name, _)| name == "tokenizer.json").unwrap();
    let size = section.1.len();
    section.1 = tokenizer.to_string().into_bytes();
    section.1.resize(section.1.len().next_multiple_of(size), b' ');
    parts
}

#[test]
fn c_programs_work_and_misuse_is_found() {
    if !have("cc") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let artifact = support::counting_parts().write();
    let bytes = with_bytes().write();
    let exe = program(folder.path(), "cc", &["-std=c11", "-pedantic"]);
    let paths = [artifact.path(), bytes.path()];
    assert_eq!(succeeds(Command::new(&exe).args(paths)), "fine\n");
    if !have("valgrind") {
        return;
    }
    let mut valgrind = Command::new("valgrind");
    let known = here().join("tests/valgrind.supp");
    valgrind.arg(format!("--suppressions={}", known.display()));
    valgrind.args(["-q", "--error-exitcode=9", "--leak-check=full", "--fair-sched=yes"]);
    valgrind.args(["--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]);
    assert_eq!(succeeds(valgrind.arg(&exe).args(paths)), "fine\n");
}

#[test]
fn the_header_is_cpp_too() {
    if have("g++") {
        let header = here().join("mansard.h");
        succeeds(Command::new("g++").args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]).arg(header));
    }
}

/// Names after which a bracket opens, of the functions that the header declares.
fn declared() -> BTreeSet<String> {
    let header = std::fs::read_to_string(here().join("mansard.h")).unwrap();
    let code: String =
        header.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let names = code.split('(').filter_map(|before| before.split([' ', '*', '\n']).next_back());
    names.filter(|name| name.starts_with("mansard_") && !name.ends_with(')')).map(String::from).collect()
}

#[test]
fn nothing_else_is_exported() {
    if !have("nm") {
        return;
    }
    let names = succeeds(Command::new("nm").args(["-D", "--defined-only", "-P"]).arg(built("libmansard_c.so")));
    // The grammars' crate has a C interface of its own, which rustc exports wherever it is linked.
    let ours = names.lines().filter_map(|l| l.split(' ').next()).filter(|name| !name.starts_with("llg_"));
    let exported: BTreeSet<String> = ours.map(String::from).collect();
    assert_eq!(exported, declared());
    assert!(exported.len() > 20, "{exported:?}");
}
