//! House rules as tests: the star of dependencies, fenced unsafe code, front doors, file sizes, recipes that name real
//! files, and reference pages that are up to date.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

const CRATES: [&str; 8] = ["ir", "frontend", "passes", "backends", "runtime", "cli", "tests", "bench/gpu-check"];

/// Every Rust source of a crate, by path relative to the workspace.
fn sources(krate: &str) -> Vec<(String, String)> {
    let mut found = vec![];
    let mut todo = vec![root().join(krate)];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(root()).expect("inside").display().to_string();
                found.push((name, fs::read_to_string(&path).expect("text")));
            }
        }
    }
    found.sort();
    found
}

fn all_sources() -> Vec<(String, String)> {
    CRATES.iter().flat_map(|c| sources(c)).collect()
}

/// The crates of this workspace that a crate's manifest names, apart from test-only ones.
fn ours(krate: &str) -> BTreeSet<String> {
    let manifest = fs::read_to_string(root().join(krate).join("Cargo.toml")).expect("a manifest");
    let normal = manifest.split("[dev-dependencies]").next().unwrap_or_default();
    normal
        .lines()
        .filter_map(|l| l.strip_prefix("mansard-"))
        .map(|l| l.split(['.', ' ']).next().unwrap().into())
        .collect()
}

#[test]
fn dependencies_are_a_star() {
    for krate in ["frontend", "passes", "runtime"] {
        assert_eq!(ours(krate), BTreeSet::from(["ir".to_string()]), "{krate} sees only ir");
    }
    assert_eq!(ours("backends"), BTreeSet::from(["ir".to_string(), "mlir-c".to_string()]), "backends sees only ir");
    for (skin, seen) in [
        ("runtime/grammar", vec!["ir", "runtime"]),
        ("runtime/c", vec!["grammar", "ir", "runtime"]),
        ("runtime/runner", vec!["ir", "runtime"]),
    ] {
        let seen: BTreeSet<String> = seen.into_iter().map(String::from).collect();
        assert_eq!(ours(skin), seen, "what {skin} sees");
    }
    assert_eq!(ours("ir"), BTreeSet::new(), "ir sees none of ours");
}

#[test]
fn the_runtime_links_no_compiler() {
    let tree = std::process::Command::new(env!("CARGO"))
        .args(["tree", "--offline", "-p", "mansard-c", "-p", "mansard-runner", "-e", "normal", "--prefix", "none"])
        .current_dir(root())
        .output()
        .expect("cargo tree");
    let tree = String::from_utf8(tree.stdout).expect("text");
    assert!(tree.contains("mansard-runtime"), "cargo tree shows nothing: {tree}");
    for compiler in ["melior", "mlir-sys", "llvm-sys", "inkwell", "egg ", "mansard-passes", "mansard-backends"] {
        assert!(!tree.contains(compiler), "the runtime depends on {compiler}:\n{tree}");
    }
}

/// Files that others include in the middle of a program, where `//!` cannot stand.
const INCLUDED: &[&str] = &["runtime/tests/support/mod.rs"];

#[test]
fn files_have_front_doors_and_a_size_one_can_read() {
    let mut faults = vec![];
    for (name, text) in all_sources() {
        let door = if INCLUDED.contains(&name.as_str()) { "// " } else { "//! " };
        if !text.starts_with(door) {
            faults.push(format!("{name}: no front door (`{door}` on the first line)"));
        }
        let lines = text.lines().count();
        if lines > 600 {
            faults.push(format!("{name}: {lines} lines, at most 600"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The files that may hold unsafe code, as `docs/architecture.md` lists them.
const UNSAFE: &[&str] = &[
    "ir/file.rs",
    "backends/mlir.rs",
    "backends/llvm.rs",
    "backends/cuda/emulator/machine.rs",
    "backends/cuda/emulator/units.rs",
    "backends/cuda/emulator/mod.rs",
    "backends/cuda/emulator/retarget.rs",
    "backends/cuda/emulator/tests.rs",
    "backends/harness/emulated.rs",
    "backends/harness.rs",
    "runtime/c/engine.rs",
    "runtime/c/memory.rs",
    "runtime/c/model.rs",
    "runtime/c/options.rs",
    "runtime/c/planted.rs",
    "runtime/c/request.rs",
    "runtime/c/service.rs",
    "runtime/c/status.rs",
    "runtime/code.rs",
    "runtime/device/cuda.rs",
    "runtime/memory.rs",
];

#[test]
fn unsafe_code_is_fenced() {
    let architecture = fs::read_to_string(root().join("docs/architecture.md")).expect("docs/architecture.md");
    let mut faults = vec![];
    for name in UNSAFE {
        if !architecture.contains(&format!("`{name}`")) {
            faults.push(format!("docs/architecture.md does not name {name}"));
        }
    }
    for (name, text) in all_sources().iter().filter(|(name, _)| name != "tests/tidy.rs") {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let allowed = UNSAFE.contains(&name.as_str());
            if code.contains("allow(unsafe_code)") && !allowed {
                faults.push(format!("{name}:{}: unsafe code outside the named files", i + 1));
            }
            let needs_reason = ["unsafe {", "unsafe impl"].iter().any(|mark| code.contains(mark));
            // A comment of up to three lines, and a statement that began on the line before.
            let reason = lines[i.saturating_sub(4)..i].iter().any(|l| l.trim_start().starts_with("// SAFETY:"));
            if needs_reason && !(allowed && reason) {
                faults.push(format!("{name}:{}: no SAFETY line", i + 1));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn no_unfinished_marks() {
    let marks =
        [concat!("todo", "!("), concat!("unimpl", "emented!("), concat!("FIX", "ME"), concat!("allow(dead", "_code)")];
    for (name, text) in all_sources() {
        for mark in marks {
            assert!(!text.contains(mark), "{name} contains {mark}");
        }
    }
}

#[test]
fn recipes_name_files_that_exist() {
    let recipes = fs::read_to_string(root().join("docs/recipes.md")).expect("docs/recipes.md");
    let mut named = 0;
    for name in recipes.split('`').skip(1).step_by(2) {
        let is_path = name.contains('/') && !name.contains([' ', '*', '<', '{']) || name.ends_with(".md");
        if is_path {
            named += 1;
            assert!(root().join(name).exists(), "docs/recipes.md names `{name}`, which does not exist");
        }
    }
    assert!(named >= 15, "docs/recipes.md names only {named} files");
}

/// Compares a generated page with the one in `docs/`; `UPDATE_DOCS=1` rewrites it.
fn page_is_current(name: &str, generated: &str) {
    let path = root().join("docs").join(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, generated).expect("docs are writable");
    }
    let stored = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stored == generated,
        "docs/{name} is out of date: run `UPDATE_DOCS=1 cargo test -p mansard-tests --test tidy`"
    );
}

#[test]
fn reference_pages_are_current() {
    page_is_current("ops.md", &mansard_ir::docs::ops_markdown());
    page_is_current("passes.md", &mansard_passes::docs_markdown());
}

/// Every file below a folder, with one of these endings.
fn files(folder: &str, endings: [&str; 2]) -> Vec<PathBuf> {
    let (mut found, mut todo) = (vec![], vec![root().join(folder)]);
    while let Some(dir) = todo.pop() {
        for path in fs::read_dir(&dir).expect("a folder").flatten().map(|e| e.path()) {
            let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if path.is_dir() {
                todo.push(path);
            } else if endings.contains(&ending) {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn machine_files_are_read() {
    let files = files("machines", ["toml", "toml"]);
    assert!(files.len() >= 6, "machines/ holds {} machine files", files.len());
    for file in files {
        let found = mansard::machine::MachineFile::read(&file).unwrap_or_else(|e| panic!("{e}"));
        assert!(found.table.whole().bandwidth > 0.0);
    }
}

#[test]
fn cases_and_snapshots_belong_together() {
    let files = files("tests/cases", ["mir", "snap"]);
    assert!(files.len() >= 100, "only {} case files and snapshots", files.len());
    for file in files {
        for ending in ["mir", "snap"] {
            assert!(file.with_extension(ending).exists(), "{} has no .{ending} beside it", file.display());
        }
    }
}

#[test]
fn every_pass_has_two_cases() {
    for pass in mansard_passes::PASSES {
        let begins = |p: &&PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(pass.name));
        let named = files("tests/cases/passes", ["mir", "mir"]).iter().filter(begins).count();
        assert!(named >= 2, "tests/cases/passes holds {named} cases of `{}`", pass.name);
    }
}

#[test]
fn the_test_files_stay_small() {
    let (mut bytes, mut todo) = (0, vec![root().join("tests")]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() { todo.push(path) } else { bytes += entry.metadata().expect("a size").len() }
        }
    }
    assert!(bytes < 6 << 20, "tests/ holds {bytes} bytes, at most 6 MiB");
}
