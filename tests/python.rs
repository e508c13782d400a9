//! The Python package: built as `pip install ./python` builds it, its types checked, and used against compiled artifacts. (Built
//! as a test of the `mansard` package.)

mod page;
#[path = "serve/model.rs"]
mod tiny;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Python with the packages of `.ci/fetch-clients`, which in CI may not be missing.
fn python() -> Option<PathBuf> {
    let python = root().join("models/python/bin/python");
    let has = ["-c", "import maturin, cffi, numpy, mypy"];
    if python.exists() && Command::new(&python).args(has).stderr(Stdio::null()).status().unwrap().success() {
        return Some(python);
    }
    assert!(std::env::var_os("CI").is_none(), "{} lacks packages: run .ci/fetch-clients", python.display());
    let _ = std::io::stderr().write_all(b"skipped: models/python lacks packages (.ci/fetch-clients)\n");
    None
}

fn ok(command: &mut Command) {
    let out = command.stdin(Stdio::null()).output().unwrap();
    let [said, errors] = [&out.stdout, &out.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(out.status.success(), "{command:?}: {}\n{said}\n{errors}", out.status);
}

#[test]
fn the_package_builds_installs_and_answers() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let [wheels, packages] = ["wheels", "packages"].map(|name| folder.path().join(name));
    let path = std::env::join_paths(
        [python.parent().unwrap().to_owned()]
            .into_iter()
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    );
    // What builds it is there already; without that, pip would fetch it.
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w"]).arg(&wheels);
    // Whole-program optimization and incremental compilation do not go together.
    ok(pip.arg(root().join("python")).env("PATH", path.unwrap()).env("CARGO_INCREMENTAL", "0"));
    let wheel = std::fs::read_dir(&wheels).unwrap().next().unwrap().unwrap().path();
    ok(Command::new(&python).args(["-m", "pip", "install", "-q", "--no-deps", "--target"]).arg(&packages).arg(wheel));

    let (generator, encoder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let artifacts = [tiny::model(generator.path(), "llama"), tiny::model(encoder.path(), "bert")];
    let ours = |module: &[&str]| {
        let mut command = Command::new(&python);
        command.args(module).env("PYTHONPATH", &packages).current_dir(folder.path());
        command
    };
    let test = root().join("tests/python_package.py");
    ok(ours(&[]).arg(test).args(&artifacts).env("MANSARD_EXAMPLE", root().join("examples/chat.py")));
    ok(ours(&["-c", &page::program("python")]).args(&artifacts));
    let cache = folder.path().join("mypy");
    let types = root().join("python/pyproject.toml");
    ok(ours(&["-m", "mypy"]).arg("--config-file").arg(types).arg("--cache-dir").arg(cache));
}
